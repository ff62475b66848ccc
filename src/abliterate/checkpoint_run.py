"""One run that writes a checkpoint, alone or with other processes, and publishes it or gives it up."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from abliterate.checkpoints.file_assembly import Traffic
from abliterate.checkpoints.resumable_directory import Key, PartialDirectory, PartialRun, is_worth_keeping, partial_path
from abliterate.edited_checkpoint import EditedFiles, FinishedFile
from abliterate.errors import AbliterateError, CheckpointError, VerificationError
from abliterate.processes import Ranks, share_by_size
from abliterate.progress import ProgressReporter
from abliterate.write_options import WriteOptions

Result = TypeVar("Result")
Conclude = Callable[[Path, dict[str, FinishedFile], Traffic], Result]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What one process has done, or why it has not."""

    finished: dict[str, FinishedFile]
    traffic: Traffic
    error: str | None = None
    is_worth_keeping: bool = True


def write_together(
    files: EditedFiles,
    *,
    target: Path,
    key: Key,
    conclude: Conclude[Result],
    writing: WriteOptions,
    ranks: Ranks,
    progress: ProgressReporter,
) -> Result | None:
    """Write the files of a checkpoint into a directory that appears when they are whole.

    Each process writes a part of the files, about as many bytes as every other; the bytes do not depend on how many
    there are. One that fails, fails all, when the others have finished theirs.

    Args:
        files: The files.
        target: The directory to be.
        key: What they are made from (see `plan_key`).
        conclude: Called by the first process with the unfinished directory when all files are whole: checks them and
            adds what is left to add.
        writing: How to write.
        ranks: Who works together.
        progress: Shown the bytes written.

    Returns:
        What `conclude` returned; None in the other processes, which do not wait for it.

    Raises:
        AbliterateError: As `PartialRun`, `EditedFiles.write` and `conclude` do; the message says what is kept.
    """
    run: PartialRun | None = None
    opened: dict[str, FinishedFile] | AbliterateError
    if ranks.is_first:
        try:
            run = PartialRun(target, key=key, resume=writing.resume, workers=writing.n_workers, progress=progress)
            opened = {name: FinishedFile.from_entry(entry) for name, entry in run.directory.kept.items()}
        except AbliterateError as error:
            opened = error
    opened = ranks.first_says(opened if ranks.is_first else {})
    if isinstance(opened, AbliterateError):
        raise opened
    if run is None:
        directory = PartialDirectory(partial_path(target), key=key, rank=ranks.index)
        _join(_write_part(files, target, directory, opened, writing, ranks, progress), ranks)
        return None
    try:
        run.check_space(files.sizes(), source=files.largest, edited=files.bytes_edited)
        finished, traffic = _join(_write_part(files, target, run.directory, opened, writing, ranks, progress), ranks)
        result = conclude(run.directory.path, opened | finished, traffic)
        run.publish()
    except BaseException as error:
        final = run.give_up(error)
        if final is error:
            raise
        raise final from error
    return result


def _write_part(
    files: EditedFiles,
    target: Path,
    directory: PartialDirectory,
    kept: dict[str, FinishedFile],
    writing: WriteOptions,
    ranks: Ranks,
    progress: ProgressReporter,
) -> _Part:
    """Write this process's part; an error is kept for the others to hear, unless there are none."""
    sizes = {name: size for name, size in files.sizes().items() if name not in kept}
    own = share_by_size(sizes, index=ranks.index, count=ranks.count)
    finished: dict[str, FinishedFile] = {}

    def done(name: str, file: FinishedFile) -> None:
        directory.journal.add(name, file.entry())
        finished[name] = file

    total = sum(sizes[name] for name in own)
    try:
        with progress.task(f"Writing {target}", total=total, unit="bytes") as advance:
            traffic = files.write(own, target=directory.path, workers=writing.n_workers, done=done, advance=advance)
    except Exception as error:
        if ranks.count == 1:
            raise
        return _Part(finished=finished, traffic=Traffic(), error=str(error), is_worth_keeping=is_worth_keeping(error))
    return _Part(finished=finished, traffic=traffic)


def _join(own: _Part, ranks: Ranks) -> tuple[dict[str, FinishedFile], Traffic]:
    """Wait for the parts of all processes and put them together.

    Raises:
        CheckpointError: A process failed, and the files that were finished are good.
        VerificationError: A process failed, and would again.
    """
    try:
        parts = ranks.gather(own)
    except RuntimeError as error:
        cause = OSError(str(error))
        raise CheckpointError("another process of this run ended before its part was done") from cause
    for part in parts:
        if part.error is not None and not part.is_worth_keeping:
            raise VerificationError(part.error)
    for part in parts:
        if part.error is not None:
            raise CheckpointError(part.error) from OSError(part.error)
    finished: dict[str, FinishedFile] = {}
    traffic = Traffic()
    for part in parts:
        finished |= part.finished
        traffic.add(part.traffic)
    return finished, traffic
