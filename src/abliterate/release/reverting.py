"""Back to the base: the model that an edit was made from, byte for byte, from what was made of it and the base.

An edit takes away what cannot be computed again, so the base's own bytes are copied; what makes it a way back is that
the base is found and shown to be the one: its config.json by its hash, and, beside a whole edited checkpoint, every
byte that was not edited.
"""

from dataclasses import dataclass
from pathlib import Path

from abliterate.checkpoints.atomic_directory import published_directory
from abliterate.checkpoints.checkpoint import Checkpoint
from abliterate.checkpoints.file_assembly import NewFile, assemble_files, copied_segments
from abliterate.checkpoints.file_ranges import WrittenFile, open_file
from abliterate.checkpoints.model_source import ModelSource
from abliterate.editing.plan_report import check_output
from abliterate.editing.record import RECORD_NAME, AbliterationRecord, Format, read_record
from abliterate.errors import InputError, VerificationError
from abliterate.formats.gguf_checkpoint import open_weights
from abliterate.progress import SILENT, ProgressReporter
from abliterate.release.file_checks import compare_with_base
from abliterate.release.recorded_edits import find_base

# One copies while the other reads back.
_WORKERS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RevertReport:
    """What was restored, or with `dry_run` would be.

    Attributes:
        checkpoint: What was made of the base.
        format: Whether that is a whole checkpoint or an adapter.
        base: The base, as it was named.
        base_revision: Its commit, of a Hub model.
        output: The restored directory; None if a dry run named none.
        dry_run: Whether nothing was written.
        bytes_compared: Bytes of tensors that had to be the base's, and are; 0 for an adapter, which holds none.
        bytes_total: Bytes of all restored files.
        files: Path -> SHA-256 and size of each restored file, which are the base's; empty in a dry run.
    """

    checkpoint: str
    format: Format
    base: str
    base_revision: str | None
    output: str | None
    dry_run: bool
    bytes_compared: int
    bytes_total: int
    files: dict[str, WrittenFile]


def revert_checkpoint(
    *,
    checkpoint: Path,
    output: Path | None,
    base: ModelSource | Path | str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    progress: ProgressReporter = SILENT,
) -> RevertReport:
    """Restore the model that an orthogonalized checkpoint or adapter was made from.

    Args:
        checkpoint: A directory that `orthogonalize` wrote.
        output: Directory to make; may be None in a dry run.
        base: The model it was made from; by default what the record names, from the Hub if need be.
        dry_run: Find the base and compare, and write nothing.
        overwrite: Replace `output` if it is a checkpoint, an adapter or an empty directory.
        progress: Shown the bytes compared and written.

    Raises:
        InputError: There is no record, the base is not there or not the one, or `output` cannot be used.
        VerificationError: What was not edited differs from the base, or a restored file, reread, does.
        CheckpointError: A file cannot be read or written.
        HubError: The base cannot be fetched.
    """
    record = read_record(checkpoint)
    source = find_base(record, base)
    original = open_weights(source.path)
    if output is None and not dry_run:
        raise InputError("no output directory was given; name one with -o, or give --dry-run")
    if output is not None:
        for taken in (source.path, checkpoint):
            check_output(output, taken, overwrite=overwrite)
    compared = 0 if record.is_adapter else _compare(record, original, progress)
    names = sorted({*(shard.file_name for shard in original.shards), *original.side_files, *original.second_copies})
    total = sum((original.path / name).stat().st_size for name in names)
    files: dict[str, WrittenFile] = {}
    if output is not None and not dry_run:
        with published_directory(output, overwrite=overwrite, files=names) as partial:
            files = _copy(original.path, names, partial, total=total, progress=progress)
    return RevertReport(
        checkpoint=str(checkpoint),
        format="adapter" if record.is_adapter else "checkpoint",
        base=source.name,
        base_revision=source.revision,
        output=None if output is None else str(output),
        dry_run=dry_run,
        bytes_compared=compared,
        bytes_total=total,
        files=files,
    )


def _compare(record: AbliterationRecord, original: Checkpoint, progress: ProgressReporter) -> int:
    problems, compared = compare_with_base(record, base=original, progress=progress)
    if problems:
        raise VerificationError(
            f"{problems[0]}; so {original.path} is not what {record.directory / RECORD_NAME} was made from, or one of "
            "the two was changed since: nothing was restored, name the right one with --base"
        )
    return compared


def _copy(
    source: Path, names: list[str], partial: Path, *, total: int, progress: ProgressReporter
) -> dict[str, WrittenFile]:
    files: dict[str, WrittenFile] = {}
    with progress.task(f"Copying {source}", total=total, unit="bytes") as advance:
        assemble_files(
            (_copy_of(source, name) for name in names),
            target=partial,
            workers=_WORKERS,
            done=files.__setitem__,
            advance=advance,
        )
    return {name: files[name] for name in names}


def _copy_of(source: Path, name: str) -> NewFile:
    original = open_file(source / name)
    segments = copied_segments(original, start=0, end=original.size, offset=0)
    return NewFile(name=name, sources=(original,), segments=tuple(segments))
