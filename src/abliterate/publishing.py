"""Pushing an orthogonalized checkpoint to the Hub: what its record vouches for, and a card that says so."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from abliterate._version import __version__
from abliterate.errors import HubError, InputError, VerificationError
from abliterate.hub import (
    CardFacts,
    check_repo_id,
    create_repo,
    fetch_card_facts,
    list_remote_files,
    read_card_facts,
    repo_is_private,
    repo_url,
    upload_folder,
    whoami,
)
from abliterate.model_card import base_model_id, build_model_card
from abliterate.progress import SILENT, ProgressReporter

RECORD_FILE = "abliteration.json"
EVALUATION_FILE = "evaluation.json"
CARD_FILE = "README.md"
_WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".gguf", ".pt", ".pth", ".ckpt", ".onnx", ".h5", ".msgpack", ".npz"}
)
_AGAIN = "run `abliterate orthogonalize` again (nothing was sent)"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recorded:
    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Package:
    checkpoint: Path
    record: dict[str, Any]
    recorded: tuple[_Recorded, ...]
    evaluation: dict[str, Any] | None
    evaluation_path: Path | None
    left_out: tuple[str, ...]


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
    """Push a checkpoint that `orthogonalize_checkpoint` wrote, with a generated model card.

    Every file is checked against `abliteration.json` first. Nothing else of the directory goes, except
    `evaluation.json`; the card takes the place of the base model's README.md in what is sent, not on disk.
    Nothing is deleted on the Hub, and the visibility of a repository that exists is never changed.
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
        VerificationError: A file is missing, unknown, or not the one in the record; or did not arrive.
        HubError: No token, no permission, the visibility differs, or the Hub cannot be reached.
    """
    check_repo_id(repo_id)
    package = _read_package(checkpoint, evaluation)
    exists = False
    if not dry_run:
        repo_id, exists = _look_up(repo_id, private=private)
    _check_hashes(package, progress)
    facts = _base_card_facts(package, online=not dry_run, progress=progress)
    title = repo_id.rpartition("/")[2]
    card = build_model_card(record=package.record, evaluation=package.evaluation, facts=facts, title=title)
    sources = _sources(package)
    files = tuple(
        PushFile(path=path, bytes=source.stat().st_size if source else len(card.encode()))
        for path, source in sorted(sources.items())
    )
    report = PushReport(
        repo_id=repo_id,
        url=repo_url(repo_id),
        private=private,
        dry_run=dry_run,
        created=None,
        commit=None,
        commit_message=commit_message or f"Upload checkpoint orthogonalized with abliterate {__version__}",
        base_model=base_model_id(package.record, facts),
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
    commit = _send(report, sources, progress=progress)
    remote_only = _check_arrival(report, commit, recorded=package.recorded)
    return replace(report, created=not exists, commit=commit, remote_only=remote_only)


def _look_up(repo_id: str, *, private: bool) -> tuple[str, bool]:
    user = whoami()
    repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
    is_private = repo_is_private(repo_id)
    _check_visibility(repo_id, is_private=is_private, private=private)
    return repo_id, is_private is not None


def _send(report: PushReport, sources: dict[str, Path | None], *, progress: ProgressReporter) -> str:
    progress.message(f"uploading {len(report.files)} files to {report.repo_id}")
    with tempfile.TemporaryDirectory(prefix="abliterate-push-") as name:
        staging = Path(name)
        _stage(sources, report.card, staging)
        return upload_folder(report.repo_id, staging, commit_message=report.commit_message, quiet=progress is SILENT)


def _read_package(checkpoint: Path, evaluation: Path | None) -> _Package:
    record = _read_record(checkpoint)
    files = {**record["shards"], **record["side_files"]}
    # A base directory may have had these two itself; what lies there now is this checkpoint's own.
    files.pop(RECORD_FILE, None)
    base_evaluation = files.pop(EVALUATION_FILE, None)
    recorded = tuple(_recorded(checkpoint, path, entry) for path, entry in files.items())
    _check_presence(checkpoint, recorded)
    evaluation_path = evaluation
    default = checkpoint / EVALUATION_FILE
    if evaluation is None and default.is_file():
        inherited = base_evaluation is not None and _sha256(default) == base_evaluation.get("sha256")
        evaluation_path = None if inherited else default
    content = None
    if evaluation_path is not None:
        content = _read_evaluation(evaluation_path, checkpoint=checkpoint, record=record)
    known = {file.path for file in recorded} | {RECORD_FILE, EVALUATION_FILE}
    present = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    unknown = present - known
    weights = sorted(path for path in unknown if _holds_weights(path))
    if weights:
        raise VerificationError(
            f"{checkpoint}: weight files that {RECORD_FILE} does not name: {', '.join(weights)}; "
            "move them out of the directory (nothing was sent)"
        )
    unedited = {path for path in record["side_files"] if _holds_weights(path)}
    return _Package(
        checkpoint=checkpoint,
        record=record,
        recorded=recorded,
        evaluation=content,
        evaluation_path=evaluation_path,
        left_out=tuple(sorted(unknown | unedited)),
    )


def _holds_weights(path: str) -> bool:
    return PurePosixPath(path).suffix.lower() in _WEIGHT_SUFFIXES


def _read_record(checkpoint: Path) -> dict[str, Any]:
    if not checkpoint.is_dir():
        raise InputError(f"{checkpoint}: no such directory; give one that `abliterate orthogonalize` wrote")
    path = checkpoint / RECORD_FILE
    if not path.is_file():
        raise InputError(
            f"{checkpoint}: no {RECORD_FILE}; push takes a directory that `abliterate orthogonalize` wrote"
        )
    record = _read_json(path)
    version = record.get("format_version")
    if version != 1:
        raise InputError(f"{path}: format version {version!r} is not 1; use the abliterate that wrote it")
    base, direction = record.get("base"), record.get("direction")
    shards, side_files = record.get("shards"), record.get("side_files")
    if not (
        (isinstance(base, dict) and "model" in base)
        and (isinstance(direction, dict) and "sha256" in direction)
        and (isinstance(shards, dict) and shards and isinstance(side_files, dict))
    ):
        raise InputError(f"{path}: base, direction, shards or side_files is missing; {_AGAIN}")
    return record


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no JSON object")
    return content


def _recorded(checkpoint: Path, path: str, entry: Any) -> _Recorded:
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or "\\" in path:
        raise VerificationError(f"{checkpoint / RECORD_FILE}: names {path!r}, outside the directory; {_AGAIN}")
    if not isinstance(entry, dict) or not isinstance(entry.get("bytes"), int) or "sha256" not in entry:
        raise InputError(f"{checkpoint / RECORD_FILE}: no sha256 and bytes for {path}; {_AGAIN}")
    return _Recorded(path=path, bytes=entry["bytes"], sha256=str(entry["sha256"]))


def _read_evaluation(path: Path, *, checkpoint: Path, record: dict[str, Any]) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a report that `abliterate evaluate --output` wrote")
    evaluation = _read_json(path)
    if not isinstance(evaluation.get("rates"), dict):
        raise InputError(f"{path}: no refusal rates in it; write it with `abliterate evaluate --output`")
    again = f"run `abliterate evaluate {checkpoint} --base BASE --output {checkpoint / EVALUATION_FILE}`"
    intervention = evaluation.get("intervention", "none")
    if intervention != "none":
        raise InputError(f"{path}: measured the intervention {intervention!r}, not these weights; {again}")
    measured = Path(str(evaluation.get("model", "")))
    if (measured / "config.json").is_file() and not measured.samefile(checkpoint):
        other = measured / RECORD_FILE
        if not other.is_file() or _read_json(other).get("shards") != record["shards"]:
            raise InputError(f"{path}: measured {measured}, not {checkpoint}; {again}")
    return evaluation


def _check_presence(checkpoint: Path, recorded: tuple[_Recorded, ...]) -> None:
    for file in recorded:
        path = checkpoint / file.path
        if not path.is_file():
            raise VerificationError(f"{path}: missing, but {RECORD_FILE} names it; {_AGAIN}")
        size = path.stat().st_size
        if size != file.bytes:
            raise VerificationError(
                f"{path}: {size} bytes, not {file.bytes} as in {RECORD_FILE}: changed since then; {_AGAIN}"
            )


def _check_hashes(package: _Package, progress: ProgressReporter) -> None:
    total = sum(file.bytes for file in package.recorded)
    with progress.task("Checking hashes", total=total, unit="bytes") as advance:
        for file in package.recorded:
            path = package.checkpoint / file.path
            digest = hashlib.sha256()
            for chunk in _chunks(path):
                digest.update(chunk)
                advance(len(chunk))
            if digest.hexdigest() != file.sha256:
                raise VerificationError(
                    f"{path}: its SHA-256 is not the one in {RECORD_FILE}: changed since written; {_AGAIN}"
                )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for chunk in _chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            yield chunk


def _base_card_facts(package: _Package, *, online: bool, progress: ProgressReporter) -> CardFacts | None:
    base = package.record["base"]
    found: list[CardFacts | None] = []
    # The README.md among the side files is the base model's own card.
    if any(file.path == CARD_FILE for file in package.recorded):
        found.append(read_card_facts(package.checkpoint / CARD_FILE))
    if not base.get("revision"):
        found.append(read_card_facts(Path(base["model"]) / CARD_FILE))
    licensed = [facts for facts in found if facts and facts.license]
    if not licensed and online and base.get("revision"):
        try:
            found.append(fetch_card_facts(base["model"], revision=base["revision"]))
        except HubError as error:
            progress.message(f"the base model's licence is left out of the card: {error}")
        licensed = [facts for facts in found if facts and facts.license]
    return next(iter([*licensed, *(facts for facts in found if facts)]), None)


def _sources(package: _Package) -> dict[str, Path | None]:
    """Map each path in the repository to its file; None stands for the generated card."""
    paths = {file.path for file in package.recorded}.difference(package.left_out)
    sources: dict[str, Path | None] = {path: package.checkpoint / path for path in paths}
    sources[RECORD_FILE] = package.checkpoint / RECORD_FILE
    if package.evaluation_path is not None:
        sources[EVALUATION_FILE] = package.evaluation_path
    sources[CARD_FILE] = None
    return sources


def _stage(sources: dict[str, Path | None], card: str, staging: Path) -> None:
    # The client uploads folders; with links the card replaces README.md there and not in the checkpoint.
    for name, source in sources.items():
        target = staging / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source is None:
            target.write_text(card, encoding="utf-8", newline="\n")
            continue
        try:
            target.symlink_to(source.resolve())
        except OSError:
            shutil.copyfile(source, target)


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


def _check_arrival(report: PushReport, commit: str, *, recorded: tuple[_Recorded, ...]) -> tuple[str, ...]:
    """Compare what the Hub lists at the commit with what was sent; return what else lies there."""
    repo_id, files = report.repo_id, report.files
    remote = list_remote_files(repo_id, revision=commit)
    hashes = {file.path: file.sha256 for file in recorded if file.path != CARD_FILE}
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
