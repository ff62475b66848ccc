"""Pushing an orthogonalized checkpoint to the Hub: what its record vouches for, its measurements, and a card."""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from abliterate._version import __version__
from abliterate.checkpoints.file_ranges import hash_file
from abliterate.checkpoints.hub import (
    check_repo_id,
    create_repo,
    fetch_card_facts,
    list_remote_files,
    repo_is_private,
    repo_url,
    upload_folder,
    whoami,
)
from abliterate.checkpoints.model_source import CardFacts, read_card_facts
from abliterate.editing.model_card import base_model_id, build_model_card
from abliterate.editing.record import (
    EVALUATION_NAME,
    RECORD_NAME,
    AbliterationRecord,
    as_recorded,
    check_hashes,
    check_sizes,
    read_record,
    shards_sha256,
)
from abliterate.errors import HubError, InputError, VerificationError
from abliterate.files import read_json_report
from abliterate.progress import SILENT, ProgressReporter
from abliterate.release.file_checks import verify_files
from abliterate.release.recorded_edits import find_local_base

CARD_NAME = "README.md"
_ADAPTER_CONFIG = "adapter_config.json"
_WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".gguf", ".pt", ".pth", ".ckpt", ".onnx", ".h5", ".msgpack", ".npz"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PushPackage:
    """A checkpoint that may be pushed.

    Attributes:
        checkpoint: The directory.
        record: Its record.
        evaluation: The content of the evaluation report, if there is one.
        evaluation_path: Where that report lies.
        left_out: Files of the directory that do not go, sorted.
    """

    checkpoint: Path
    record: AbliterationRecord
    evaluation: dict[str, Any] | None
    evaluation_path: Path | None
    left_out: tuple[str, ...]

    def sources(self) -> dict[str, Path | None]:
        """Map each path in the repository to its file; None stands for the generated card."""
        paths = self.record.files.keys() - set(self.left_out)
        sources: dict[str, Path | None] = {path: self.checkpoint / path for path in paths}
        sources[RECORD_NAME] = self.checkpoint / RECORD_NAME
        if self.evaluation_path is not None:
            sources[EVALUATION_NAME] = self.evaluation_path
        sources[CARD_NAME] = None
        return sources

    def rewritten(self) -> dict[str, bytes]:
        """Return what goes in other words than it lies here: files that name folders of this machine, without them."""
        found: dict[str, bytes] = {}
        content = _without_folders(self.record.content)
        for name, source in self.sources().items():
            if source is None or name not in {_ADAPTER_CONFIG, EVALUATION_NAME}:
                continue
            before = read_json_report(source)
            if (after := _without_folders(before)) != before:
                found[name] = _as_json(after)
                if name in content["side_files"]:
                    digest = hashlib.sha256(found[name]).hexdigest()
                    content["side_files"][name] |= {"sha256": digest, "bytes": len(found[name])}
        return found if content == self.record.content else {**found, RECORD_NAME: _as_json(content)}


_FOLDER_KEYS = {"model", "base", "name", "judge", "arguments", "base_model_name_or_path"}


def _without_folders(value: Any, *, named: bool = False) -> Any:
    """Return JSON values in which what names a folder or file of this machine is its last part alone."""
    if isinstance(value, dict):
        plain = {key: _without_folders(item, named=key in _FOLDER_KEYS) for key, item in value.items()}
        if isinstance(value.get("model"), str) and "revision" in value and not value["revision"]:
            # No Hub id, so it is a directory, whether or not it is still there.
            plain["model"] = PurePath(value["model"]).name or value["model"]
        return plain
    if isinstance(value, list):
        return [_without_folders(item, named=named) for item in value]
    if not (named and isinstance(value, str) and ("/" in value or os.sep in value)):
        return value
    try:
        is_here = PurePath(value).is_absolute() or value.startswith(("~", ".")) or Path(value).exists()
    except (OSError, ValueError):
        return value
    return PurePath(value).name or value if is_here else value


def _as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def read_push_package(checkpoint: Path, *, evaluation: Path | None = None) -> PushPackage:
    """Decide what goes, from the record, the directory's listing and the evaluation; no weight is read.

    Args:
        checkpoint: A directory that `orthogonalize_checkpoint` wrote.
        evaluation: An evaluation report; default: `evaluation.json` in the directory, if it is there.

    Raises:
        InputError: The directory has no record, or the evaluation cannot be used.
        VerificationError: A recorded file is missing or has another size, or there are unknown weights.
    """
    record = read_record(checkpoint)
    check_sizes(record)
    evaluation_path = evaluation or _own_evaluation(record)
    content = None if evaluation_path is None else _read_evaluation(evaluation_path, record=record)
    known = record.files.keys() | {RECORD_NAME, EVALUATION_NAME}
    present = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    unknown = present - known
    weights = sorted(path for path in unknown if _holds_weights(path))
    if weights:
        raise VerificationError(
            f"{checkpoint}: weight files that {RECORD_NAME} does not name: {', '.join(weights)}; "
            "move them out of the directory (nothing was sent)"
        )
    unedited = {path for path in record.content["side_files"] if _holds_weights(path)}
    return PushPackage(
        checkpoint=checkpoint,
        record=record,
        evaluation=content,
        evaluation_path=evaluation_path,
        left_out=tuple(sorted(unknown | unedited)),
    )


def find_base_card_facts(package: PushPackage, *, online: bool, progress: ProgressReporter) -> CardFacts | None:
    """Find what the base model's card says: beside the checkpoint, in a local base, or on the Hub if `online`."""
    base = package.record.content["base"]
    found: list[CardFacts | None] = []
    # The README.md among the side files is the base model's own card.
    if CARD_NAME in package.record.files:
        found.append(read_card_facts(package.checkpoint / CARD_NAME))
    if not base.get("revision"):
        found.append(read_card_facts(Path(base["model"]) / CARD_NAME))
    licensed = [facts for facts in found if facts and facts.license]
    if not licensed and online and base.get("revision"):
        try:
            found.append(fetch_card_facts(base["model"], revision=base["revision"]))
        except HubError as error:
            progress.message(f"the base model's licence is left out of the card: {error}")
        licensed = [facts for facts in found if facts and facts.license]
    return next(iter([*licensed, *(facts for facts in found if facts)]), None)


def stage_package(package: PushPackage, *, card: str, staging: Path) -> None:
    """Lay out what goes in the directory `staging`, by links where they can be made."""
    # The client uploads folders; with links the card replaces README.md there and not in the checkpoint.
    rewritten = package.rewritten()
    for name, source in package.sources().items():
        target = staging / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name in rewritten:
            target.write_bytes(rewritten[name])
            continue
        if source is None:
            target.write_text(card, encoding="utf-8", newline="\n")
            continue
        try:
            target.symlink_to(source.resolve())
        except OSError:
            shutil.copyfile(source, target)


def _holds_weights(path: str) -> bool:
    return PurePosixPath(path).suffix.lower() in _WEIGHT_SUFFIXES


def _own_evaluation(record: AbliterationRecord) -> Path | None:
    path = record.directory / EVALUATION_NAME
    if not path.is_file():
        return None
    inherited = record.base_evaluation is not None and hash_file(path) == record.base_evaluation.sha256
    return None if inherited else path


def _read_evaluation(path: Path, *, record: AbliterationRecord) -> dict[str, Any]:
    checkpoint = record.directory
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a report that `abliterate evaluate --output` wrote")
    evaluation = read_json_report(path)
    if not isinstance(evaluation.get("rates"), dict):
        raise InputError(f"{path}: no refusal rates in it; write it with `abliterate evaluate --output`")
    again = f"run `abliterate evaluate {checkpoint} --base BASE --output {checkpoint / EVALUATION_NAME}`"
    intervention = evaluation.get("intervention", "none")
    if intervention != "none":
        raise InputError(f"{path}: measured the intervention {intervention!r}, not these weights; {again}")
    measured = Path(str(evaluation.get("model", "")))
    hashed = evaluation.get("shards_sha256")
    # What an adapter was measured as, merged, has no record; nor has an older evaluation its hash.
    is_known = hashed is not None or ("shards_sha256" in evaluation and not record.is_adapter)
    if is_known and hashed != shards_sha256(record.content):
        raise InputError(f"{path}: measured {measured}, not {checkpoint}; {again}")
    if is_known:
        return evaluation
    if (measured / "config.json").is_file() and not measured.samefile(checkpoint):
        other = measured / RECORD_NAME
        if not other.is_file() or read_json_report(other).get("shards") != record.content["shards"]:
            raise InputError(f"{path}: measured {measured}, not {checkpoint}; {again}")
    return evaluation


@dataclass(frozen=True, slots=True, kw_only=True)
class PushFile:
    """One file of a push: its path in the repository and its size."""

    path: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PushReport:
    """What a push sent, or with `dry_run` would send.

    Attributes:
        repo_id: The repository, with its owner once the Hub has been asked.
        url: The repository's page.
        private: The visibility asked for.
        dry_run: Whether nothing was sent.
        created: Whether the repository was created by this push; None in a dry run.
        commit: The commit that holds the files; None in a dry run.
        commit_message: First line of the commit.
        base_model: Hub id of the base model, where it is known.
        license: Licence inherited from the base model's card, where it is known.
        evaluated: Whether the card has measurements.
        files: What goes, with sizes.
        total_bytes: The sum of the sizes.
        left_out: Files of the directory that do not go: those that the record does not name, and weights in
            other formats, which are the base model's, unedited.
        remote_only: Files that were in the repository before, are not part of this checkpoint, and stay.
        card: The text of the generated README.md.
    """

    repo_id: str
    url: str
    private: bool
    dry_run: bool
    created: bool | None
    commit: str | None
    commit_message: str
    base_model: str | None
    license: str | None
    evaluated: bool
    files: tuple[PushFile, ...]
    total_bytes: int
    left_out: tuple[str, ...]
    remote_only: tuple[str, ...]
    card: str


def push_checkpoint(
    *,
    checkpoint: Path,
    repo_id: str,
    private: bool = True,
    dry_run: bool = False,
    commit_message: str | None = None,
    evaluation: Path | None = None,
    progress: ProgressReporter = SILENT,
) -> PushReport:
    """Push a checkpoint or adapter that `orthogonalize` wrote, with a generated model card.

    Every file is checked against `abliteration.json` first: its hash; what is left of the direction in each
    edited tensor, reread; and, where the base is a directory that is still there, that nothing else differs. An
    adapter was merged and measured when it was written, so of it the hashes are checked.
    Nothing else of the directory goes, except `evaluation.json`; of folders of this machine that the JSON files name
    only the last part goes; the card takes the place of the base model's
    README.md in what is sent, not on disk. Nothing is deleted on the Hub, and the visibility of a repository that
    exists is never changed.
    An interrupted push goes on where it stopped when it is repeated.

    Args:
        checkpoint: The directory.
        repo_id: `OWNER/NAME`, or `NAME` for the user who is logged in.
        private: Whether the repository is to be private; one that exists must agree.
        dry_run: Whether to check and to report only, without any network.
        commit_message: First line of the commit.
        evaluation: An evaluation report; default: `evaluation.json` in the directory, if it is there.
        progress: Where to show progress.

    Raises:
        InputError: The directory has no record, or the evaluation or `repo_id` cannot be used.
        VerificationError: A file is missing, unknown, or not the one in the record, or an edited tensor still has
            the direction in it, or another one differs from the base's; or a file did not arrive.
        HubError: No token, no permission, the visibility differs, or the Hub cannot be reached.
    """
    check_repo_id(repo_id)
    package = read_push_package(checkpoint, evaluation=evaluation)
    exists = False
    if not dry_run:
        repo_id, exists = _look_up(repo_id, private=private)
    check_hashes(package.record, progress=progress)
    # The hashes say that this is what was written; this, that what was written is what the record says of it.
    if not package.record.is_adapter:
        check = verify_files(package.record, base=find_local_base(package.record), hashes=False, progress=progress)
        if check.failures:
            raise VerificationError(f"{check.failures[0]} (nothing was sent)")
    facts = find_base_card_facts(package, online=not dry_run, progress=progress)
    title = repo_id.rpartition("/")[2]
    told, measured = _without_folders(package.record.content), _without_folders(package.evaluation)
    with as_recorded(checkpoint):
        card = build_model_card(record=told, evaluation=measured, facts=facts, title=title)
    texts = {CARD_NAME: card.encode(), **package.rewritten()}
    files = tuple(
        PushFile(path=path, bytes=len(texts[path]) if source is None or path in texts else source.stat().st_size)
        for path, source in sorted(package.sources().items())
    )
    report = PushReport(
        repo_id=repo_id,
        url=repo_url(repo_id),
        private=private,
        dry_run=dry_run,
        created=None,
        commit=None,
        commit_message=commit_message or _commit_message(package),
        base_model=base_model_id(package.record.content, facts),
        license=facts.license if facts else None,
        evaluated=package.evaluation is not None,
        files=files,
        total_bytes=sum(file.bytes for file in files),
        left_out=package.left_out,
        remote_only=(),
        card=card,
    )
    if dry_run:
        return report
    _ensure_repo(repo_id, exists=exists, private=private)
    commit = _send(report, package, progress=progress)
    remote_only = _check_arrival(report, commit, package=package)
    return replace(report, created=not exists, commit=commit, remote_only=remote_only)


def _commit_message(package: PushPackage) -> str:
    what = "adapter made" if package.record.is_adapter else "checkpoint orthogonalized"
    return f"Upload {what} with abliterate {__version__}"


def _look_up(repo_id: str, *, private: bool) -> tuple[str, bool]:
    user = whoami()
    repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
    is_private = repo_is_private(repo_id)
    _check_visibility(repo_id, is_private=is_private, private=private)
    return repo_id, is_private is not None


def _send(report: PushReport, package: PushPackage, *, progress: ProgressReporter) -> str:
    progress.message(f"uploading {len(report.files)} files to {report.repo_id}")
    with tempfile.TemporaryDirectory(prefix="abliterate-push-") as name:
        staging = Path(name)
        stage_package(package, card=report.card, staging=staging)
        return upload_folder(report.repo_id, staging, commit_message=report.commit_message, quiet=progress is SILENT)


def _check_visibility(repo_id: str, *, is_private: bool | None, private: bool) -> None:
    if is_private is None or is_private == private:
        return
    if private:
        raise HubError(
            f"{repo_id} exists and is public, but this push is private (the default); use another name, "
            "make it private in its settings, or push with --public (nothing was sent)"
        )
    raise HubError(
        f"{repo_id} exists and is private, but this push is --public; push without --public, or make it "
        "public in its settings first (visibility is never changed by a push; nothing was sent)"
    )


def _ensure_repo(repo_id: str, *, exists: bool, private: bool) -> None:
    if not exists:
        create_repo(repo_id, private=private)
    # Asked again although just created: weights must not go where more people can read them than wanted.
    _check_visibility(repo_id, is_private=repo_is_private(repo_id), private=private)


def _check_arrival(report: PushReport, commit: str, *, package: PushPackage) -> tuple[str, ...]:
    """Compare what the Hub lists at the commit with what was sent; return what else lies there."""
    repo_id, files = report.repo_id, report.files
    remote = list_remote_files(repo_id, revision=commit)
    hashes = {path: file.sha256 for path, file in package.record.files.items() if path != CARD_NAME}
    hashes |= {path: hashlib.sha256(content).hexdigest() for path, content in package.rewritten().items()}
    for file in files:
        there = remote.get(file.path)
        if there is None:
            raise VerificationError(
                f"{repo_id}: {file.path} did not arrive; a .gitignore in the repository may exclude it; "
                "remove that and push again"
            )
        other_hash = there.sha256 is not None and hashes.get(file.path, there.sha256) != there.sha256
        if there.bytes != file.bytes or other_hash:
            raise VerificationError(f"{repo_id}: {file.path} arrived with other content; push again")
    return tuple(sorted(set(remote) - {file.path for file in files} - {".gitattributes"}))
