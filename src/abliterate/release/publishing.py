"""Pushing an orthogonalized checkpoint to the Hub: what its record vouches for, its measurements, and a card."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from abliterate._version import __version__
from abliterate.checkpoints.hub import (
    RepoSettings,
    add_to_collection,
    check_collection,
    check_repo_id,
    create_repo,
    gate_repo,
    list_remote_files,
    read_repo_settings,
    repo_url,
    upload_folder,
    whoami,
)
from abliterate.editing.model_card import base_model_id, build_model_card
from abliterate.editing.record import AbliterationRecord, as_recorded, check_hashes
from abliterate.errors import HubError, VerificationError
from abliterate.progress import SILENT, ProgressReporter
from abliterate.release.file_checks import verify_files
from abliterate.release.options import Gating, PushOptions
from abliterate.release.push_package import (
    CARD_NAME,
    PushPackage,
    find_base_card_facts,
    read_push_package,
    stage_package,
    without_folders,
)
from abliterate.release.recorded_edits import find_local_base
from abliterate.release.siblings import read_siblings


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
        gated: How readers ask for access to the repository: manual, its owner gives it; auto, the Hub does at once;
            None, they need none. In a dry run, what was asked for.
        dry_run: Whether nothing was sent.
        created: Whether the repository was created by this push; None in a dry run.
        commit: The commit that holds the files; None in a dry run.
        commit_message: First line of the commit.
        base_model: Hub id of the base model, where it is known.
        license: Licence inherited from the base model's card, where it is known.
        evaluated: Whether the card has measurements.
        files: What goes, with sizes.
        total_bytes: The sum of the sizes.
        left_out: Files of the directory that do not go: those that the record does not name, weights in
            other formats, which are the base model's, unedited, and logs of its training; those of a sibling's
            directory follow with its name.
        remote_only: Files that were in the repository before, are not part of this checkpoint, and stay.
        card: The text of the generated README.md.
        collection: What the model was added to, or in a dry run would be; None where nothing.
    """

    repo_id: str
    url: str
    private: bool
    gated: Gating | None
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
    collection: str | None


def push_checkpoint(
    *,
    checkpoint: Path,
    repo_id: str,
    options: PushOptions | None = None,
    dry_run: bool = False,
    progress: ProgressReporter = SILENT,
) -> PushReport:
    """Push a checkpoint or adapter that `orthogonalize` wrote, with a generated model card.

    Every file is checked against `abliteration.json` first: its hash; what is left of the direction in each
    edited tensor, reread; and, where the base is a directory that is still there, that nothing else differs. An
    adapter was merged and measured when it was written, so of it the hashes are checked. Siblings are checked as the
    checkpoint is, and must be the same edit by their records (see `read_siblings`).
    Nothing else of the directory goes, except `evaluation.json`; of folders of this machine that the JSON files name
    only the last part goes; the card takes the place of the base model's
    README.md in what is sent, not on disk. Nothing is deleted on the Hub, and the visibility of a repository that
    exists is never changed, nor whether it is gated.
    An interrupted push goes on where it stopped when it is repeated.

    Args:
        checkpoint: The directory.
        repo_id: `OWNER/NAME`, or `NAME` for the user who is logged in.
        options: What goes beside the checkpoint, and who can read it.
        dry_run: Whether to check and to report only, without any network.
        progress: Where to show progress.

    Raises:
        InputError: The directory has no record, or the evaluation or `repo_id` cannot be used, or a sibling is not the
            same edit.
        VerificationError: A file is missing, unknown, or not the one in the record, or an edited tensor still has
            the direction in it, or another one differs from the base's; or a file did not arrive.
        HubError: No token, no permission, the visibility or gating differs, there is no such collection, or the Hub
            cannot be reached.
    """
    options = options or PushOptions()
    check_repo_id(repo_id)
    package = read_push_package(checkpoint, evaluation=options.evaluation)
    package = replace(package, siblings=read_siblings(options.siblings, package=package))
    found = None
    if not dry_run:
        repo_id, found = _look_up(repo_id, options)
    for record in (package.record, *(sibling.record for sibling in package.siblings)):
        _check_files(record, progress=progress)
    facts = find_base_card_facts(package, online=not dry_run, progress=progress)
    gated = found.gated if found else options.gated
    with as_recorded(checkpoint):
        card = build_model_card(
            record=without_folders(package.record.content),
            evaluation=without_folders(package.evaluation),
            facts=facts,
            title=repo_id.rpartition("/")[2],
            gated=gated,
            siblings={sibling.record_name: sibling.told() for sibling in package.siblings},
        )
    texts = {CARD_NAME: card.encode(), **package.rewritten()}
    files = tuple(
        PushFile(path=path, bytes=len(texts[path]) if source is None or path in texts else source.stat().st_size)
        for path, source in sorted(package.sources().items())
    )
    report = PushReport(
        repo_id=repo_id,
        url=repo_url(repo_id),
        private=options.private,
        gated=gated,
        dry_run=dry_run,
        created=None,
        commit=None,
        commit_message=options.commit_message or _commit_message(package),
        base_model=base_model_id(package.record.content, facts),
        license=facts.license if facts else None,
        evaluated=package.evaluation is not None,
        files=files,
        total_bytes=sum(file.bytes for file in files),
        left_out=(*package.left_out, *_left_of_siblings(package)),
        remote_only=(),
        card=card,
        collection=options.collection,
    )
    if dry_run:
        return report
    if found is None:
        _make_repo(repo_id, options)
    commit = _send(report, package, progress=progress)
    remote_only = _check_arrival(report, commit, package=package)
    report = replace(report, created=found is None, commit=commit, remote_only=remote_only)
    _collect(report)
    return report


def _check_files(record: AbliterationRecord, *, progress: ProgressReporter) -> None:
    check_hashes(record, progress=progress)
    # The hashes say that this is what was written; this, that what was written is what the record says of it.
    if record.is_adapter:
        return
    check = verify_files(record, base=find_local_base(record), hashes=False, progress=progress)
    if check.failures:
        raise VerificationError(f"{check.failures[0]} (nothing was sent)")


def _left_of_siblings(package: PushPackage) -> list[str]:
    return [f"{sibling.record.directory.name}/{path}" for sibling in package.siblings for path in sibling.left_out]


def _commit_message(package: PushPackage) -> str:
    what = "adapter made" if package.record.is_adapter else "checkpoint orthogonalized"
    return f"Upload {what} with abliterate {__version__}"


def _look_up(repo_id: str, options: PushOptions) -> tuple[str, RepoSettings | None]:
    user = whoami()
    repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
    found = read_repo_settings(repo_id)
    _check_settings(repo_id, found, options)
    if options.collection is not None:
        check_collection(options.collection)
    return repo_id, found


def _send(report: PushReport, package: PushPackage, *, progress: ProgressReporter) -> str:
    progress.message(f"uploading {len(report.files)} files to {report.repo_id}")
    with tempfile.TemporaryDirectory(prefix="abliterate-push-") as name:
        staging = Path(name)
        stage_package(package, card=report.card, staging=staging)
        return upload_folder(report.repo_id, staging, commit_message=report.commit_message, quiet=progress is SILENT)


def _check_settings(repo_id: str, found: RepoSettings | None, options: PushOptions) -> None:
    if found is None:
        return
    if found.private != options.private and options.private:
        raise HubError(
            f"{repo_id} exists and is public, but this push is private (the default); use another name, "
            "make it private in its settings, or push with --public (nothing was sent)"
        )
    if found.private != options.private:
        raise HubError(
            f"{repo_id} exists and is private, but this push is --public; push without --public, or make it "
            "public in its settings first (visibility is never changed by a push; nothing was sent)"
        )
    if options.gated is not None and found.gated != options.gated:
        is_now = f"is gated ({found.gated})" if found.gated else "is not gated"
        raise HubError(
            f"{repo_id} exists and {is_now}, but this push is --gated {options.gated}; set that in its settings first, "
            "or use another name (gating of what exists is never changed by a push; nothing was sent)"
        )


def _make_repo(repo_id: str, options: PushOptions) -> None:
    create_repo(repo_id, private=options.private)
    if options.gated is not None:
        try:
            gate_repo(repo_id, gated=options.gated)
        except HubError as error:
            raise HubError(
                f"{error} ({repo_id} was made and is empty: gate it at {repo_url(repo_id)}/settings, or delete it, and "
                "push again)"
            ) from error
    # Asked again although just made: weights must not go where more people can read them than wanted.
    _check_settings(repo_id, read_repo_settings(repo_id), options)


def _collect(report: PushReport) -> None:
    if report.collection is None:
        return
    try:
        add_to_collection(report.collection, report.repo_id)
    except HubError as error:
        raise HubError(
            f"all is at {report.url}, commit {report.commit}, but not in the collection: {error}; then run "
            f"`hf collections add-item {report.collection} {report.repo_id} model`"
        ) from error


def _check_arrival(report: PushReport, commit: str, *, package: PushPackage) -> tuple[str, ...]:
    """Compare what the Hub lists at the commit with what was sent; return what else lies there."""
    repo_id, files = report.repo_id, report.files
    remote = list_remote_files(repo_id, revision=commit)
    hashes = package.sha256()
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
