"""Pushing an orthogonalized checkpoint to the Hub: what its record vouches for, and a card that says so."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from abliterate._version import __version__
from abliterate.checkpoints.hub import (
    check_repo_id,
    create_repo,
    list_remote_files,
    repo_is_private,
    repo_url,
    upload_folder,
    whoami,
)
from abliterate.editing.model_card import base_model_id, build_model_card
from abliterate.editing.record import check_hashes
from abliterate.errors import HubError, VerificationError
from abliterate.progress import SILENT, ProgressReporter
from abliterate.push_package import CARD_NAME, PushPackage, find_base_card_facts, read_push_package, stage_package
from abliterate.quick_verification import verify_files
from abliterate.recorded_base import find_local_base


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
    Nothing else of the directory goes, except `evaluation.json`; the card takes the place of the base model's
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
    card = build_model_card(record=package.record.content, evaluation=package.evaluation, facts=facts, title=title)
    files = tuple(
        PushFile(path=path, bytes=source.stat().st_size if source else len(card.encode()))
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
