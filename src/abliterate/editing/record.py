"""The record of an orthogonalized checkpoint, `abliteration.json`: written with it, and later held against it.

It says what was edited, how, and from what, and vouches for every file of the checkpoint by hash and size.
Reading it needs neither torch nor the base model.
"""

import dataclasses
import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from abliterate.checkpoints.file_ranges import WrittenFile, hash_file, in_threads
from abliterate.checkpoints.provenance import values_sha256
from abliterate.directions import decode_rows
from abliterate.errors import InputError, VerificationError
from abliterate.files import has_file, in_one_line, read_json_report, write_json
from abliterate.progress import SILENT, ProgressReporter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from abliterate.checkpoints.model_source import ModelSource
    from abliterate.editing.edits import TensorEdit
    from abliterate.editing.options import EditOptions
    from abliterate.editing.plan import PartialEdit
    from abliterate.formats.stored_component import Component

RECORD_NAME = "abliteration.json"
FORMAT_VERSION = 2

Format = Literal["checkpoint", "adapter"]

# Written by `abliterate evaluate` about the weights it lies beside, so it must not move on to others.
EVALUATION_NAME = "evaluation.json"

_AGAIN = "run `abliterate orthogonalize` again"


@dataclass(frozen=True, slots=True, kw_only=True)
class EditedTensor:
    """One tensor that is not as it was in the base: its edit, and how much of the directions it had and has.

    Attributes:
        edit: What was to be done.
        before: |U W| and |W|, U being the directions seen through the norm chain; None in a dry run, and where
            nothing is projected.
        after: |U W'| and |W'|, reread from the disk; None where `before` is.
    """

    edit: "TensorEdit"
    before: "Component | None" = None
    after: "Component | None" = None

    @property
    def name(self) -> str:
        """Its name on disk, in the edited checkpoint."""
        return self.edit.name

    @property
    def component_before(self) -> float | None:
        """|U W|/|W|."""
        return None if self.before is None else self.before.share

    @property
    def component_after(self) -> float | None:
        """|U W'|/|W'|."""
        return None if self.after is None else self.after.share

    @property
    def survivor(self) -> float | None:
        """|U W'|/|U W|; 0 where there was nothing to remove."""
        return None if self.before is None or self.after is None else self.after.survivor_of(self.before)

    def to_json(self) -> dict[str, Any]:
        """Return it as the record and `orthogonalize --json` list it."""
        return {
            **self.edit.described(),
            "stored_as": self.edit.stored_as,
            "norm_chain": [dataclasses.asdict(norm) for norm in self.edit.writer.norm_chain],
            "kind": self.edit.kind,
            "component_before": self.component_before,
            "component_after": self.component_after,
            "survivor": self.survivor,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What the writing of a checkpoint took.

    Attributes:
        seconds: Wall time from the plan to the record.
        cpu_seconds: Of all threads.
        bytes_read: Into the process, checks included.
        bytes_written: Out of the process.
        bytes_shared: Of the original and the copy, by the file system: not written again.
        workers: Threads of each process.
        processes: Processes; CPU time is that of the first.
    """

    seconds: float
    cpu_seconds: float
    bytes_read: int
    bytes_written: int
    bytes_shared: int
    workers: int
    processes: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftAloneTensors:
    """Tensors that an edit does not touch though they have an axis of length d_model.

    Attributes:
        tensors: Their names, numbers as `*`.
        count: How many they are.
        reason: Why they do not write to the residual stream.
    """

    tensors: str
    count: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OrthogonalizationReport:
    """What was edited, or with `dry_run` what would be.

    The fields from `format_version` to `side_files`, and `partial`, make up the record `abliteration.json`.

    Attributes:
        output: The new directory; None if a dry run named none.
        dry_run: Whether nothing was written.
        format_version: Of the record.
        format: checkpoint, or adapter: the edit alone, to be merged into the base. Then the tensors' components are
            those that merging gives, `shards` is the adapter's weights, and `bytes_total` counts the base's.
        tool: Name and version of the tool and of the libraries that did the arithmetic.
        created: Time of writing, ISO 8601, UTC.
        base: The model that was edited: model, revision, model_type, config_file_sha256 (of the bytes of config.json,
            of a GGUF file of those of its header), tied_embeddings, pipeline_tag (what the Hub calls models that take
            what it takes); where they are tied, `tied_tensor`, the stored one of the pair; for an adapter
            `auto_class`, the class of transformers that loads it; and `abliteration`, the earlier edit, if it had
            been orthogonalized before.
        directions: sha256, d_model and metadata of each direction.
        subspace: k, d_model, dtype and base64 of the orthonormal rows that span them, little-endian.
        options: What was asked for.
        config_changes: Dotted path in config.json -> the value it has instead of the base's; None: it is not there.
        tensors: Every edited tensor, in file order.
        left_alone: What could be taken for a writer to the stream and is not one.
        shards: File name -> SHA-256 and size of each shard written; empty in a dry run.
        side_files: The same for every other file.
        counts: Role -> number of tensors in `tensors`.
        bytes_edited: Bytes of those tensors.
        bytes_total: Bytes of all shards.
        notes: What the user should know about this checkpoint.
        work: What the writing took; None in a dry run.
        partial: What the edit leaves though every writer is edited; None where it leaves nothing.
    """

    output: str | None
    dry_run: bool
    format_version: int
    format: Format = "checkpoint"
    tool: dict[str, str]
    created: str
    base: dict[str, Any]
    directions: tuple[dict[str, Any], ...]
    subspace: dict[str, Any]
    options: "EditOptions"
    config_changes: dict[str, Any]
    tensors: tuple[EditedTensor, ...]
    left_alone: tuple[LeftAloneTensors, ...] = ()
    shards: dict[str, WrittenFile]
    side_files: dict[str, WrittenFile]
    counts: dict[str, int]
    bytes_edited: int
    bytes_total: int
    notes: tuple[str, ...]
    work: Work | None = None
    partial: "PartialEdit | None" = None

    def record(self) -> dict[str, Any]:
        """Return the content of `abliteration.json`."""
        values = dataclasses.asdict(dataclasses.replace(self, tensors=()))
        values["tensors"] = [tensor.to_json() for tensor in self.tensors]
        outside = {"output", "dry_run", "counts", "bytes_edited", "bytes_total", "notes", "work"}
        return {name: value for name, value in values.items() if name not in outside}


@dataclass(frozen=True, slots=True, kw_only=True)
class AbliterationRecord:
    """A record as it was read back.

    Attributes:
        directory: The checkpoint.
        content: The content of `abliteration.json`; `base`, `directions`, `shards` and `side_files` are there.
        files: Path -> hash and size of every file that the record vouches for, as a relative POSIX path.
        base_evaluation: An `evaluation.json` that was copied from the base and may have been replaced since.
    """

    directory: Path
    content: dict[str, Any]
    files: dict[str, WrittenFile]
    base_evaluation: WrittenFile | None

    @property
    def is_adapter(self) -> bool:
        """Whether it is of an adapter and not of a whole checkpoint."""
        return bool(self.content.get("format") == "adapter")


def decode_subspace(encoded: dict[str, Any]) -> "NDArray[np.float64]":
    """Return the orthonormal rows [k, d_model] of a record.

    Raises:
        InputError: They are not what `directions.encode_rows` returns.
    """
    try:
        rows = decode_rows(encoded)
        if len(rows) > rows.shape[1]:
            raise ValueError(f"{len(rows)} vectors of {rows.shape[1]} are not orthonormal")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the subspace in {RECORD_NAME} cannot be read ({error}); {_AGAIN}") from error
    return rows


def write_record(report: OrthogonalizationReport, directory: Path) -> None:
    """Write `abliteration.json` to `directory`, where it must not be yet, and flush it to the disk."""
    path = directory / RECORD_NAME
    if path.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    write_json(path, report.record(), allow_nan=False)


def read_record(directory: Path) -> AbliterationRecord:
    """Read and check the record of an orthogonalized checkpoint; its files are not looked at.

    Raises:
        InputError: There is no record, or it is malformed or of another version.
        VerificationError: It names a file outside the directory.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory; give one that `abliterate orthogonalize` wrote")
    path = directory / RECORD_NAME
    if not path.is_file():
        raise InputError(f"{directory}: no {RECORD_NAME}; give a directory that `abliterate orthogonalize` wrote")
    content = read_json_report(path)
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path}: format version {version!r} is not {FORMAT_VERSION}; orthogonalize the base again with this "
            "abliterate, or use the one that wrote it"
        )
    base, directions = content.get("base"), content.get("directions")
    shards, side_files = content.get("shards"), content.get("side_files")
    if not (
        (isinstance(base, dict) and isinstance(base.get("model"), str) and "\0" not in base["model"])
        and isinstance(base.get("revision"), str | None)
        and (isinstance(directions, list) and directions)
        and all(isinstance(entry, dict) and isinstance(entry.get("sha256"), str) for entry in directions)
        and (isinstance(shards, dict) and shards and isinstance(side_files, dict))
    ):
        raise InputError(f"{path}: base, directions, shards or side_files is missing or malformed; {_AGAIN}")
    if wrong := _malformed_part(content):
        raise InputError(f"{path}: its {wrong} is malformed; {_AGAIN}")
    # A base directory may have had these two itself; what lies there now is this checkpoint's own.
    recorded = {name: entry for name, entry in (shards | side_files).items() if name != RECORD_NAME}
    files = {name: _read_entry(path, name, entry) for name, entry in recorded.items()}
    base_evaluation = files.pop(EVALUATION_NAME, None)
    return AbliterationRecord(directory=directory, content=content, files=files, base_evaluation=base_evaluation)


def resolve_base(
    base: str, *, revision: str | None, edited: "ModelSource", progress: ProgressReporter = SILENT
) -> "ModelSource":
    """Find the base to compare an edited model with: of a Hub id the commit that was edited, if its record names one.

    Args:
        base: A directory, a GGUF file or a Hub id.
        revision: Branch, tag or commit of a Hub id; None: what the record of the edited model names, else `main`.
        edited: The model that is compared with it.
        progress: Is told which commit is taken.

    Raises:
        InputError: `base` is not there, or is local and a revision is given, or the record cannot be read.
        HubError: The Hub does not give it.
    """
    from abliterate.checkpoints.model_source import find_local_model, resolve_model

    local = find_local_model(base)
    if local is not None:
        if revision is not None:
            raise InputError(f"--base-revision {revision}: {base} is on this machine; only Hub models have revisions")
        return local
    record = edited.path / RECORD_NAME
    if revision is None and record.is_file():
        recorded = read_json_report(record).get("base")
        if isinstance(recorded, dict) and recorded.get("model") == base and recorded.get("revision"):
            revision = str(recorded["revision"])
            progress.message(f"base: {base} at {revision}, the commit that {RECORD_NAME} names")
    return resolve_model(base, revision=revision)


def shards_sha256(record: Mapping[str, Any]) -> str | None:
    """Return a hash that stands for the weights a record vouches for; None for the content of no record."""
    shards = record.get("shards")
    return values_sha256(shards) if isinstance(shards, dict) and shards else None


def check_sizes(record: AbliterationRecord) -> None:
    """Check that every recorded file is there and has its size, which takes no time.

    Raises:
        VerificationError: A file is missing or has another size.
        CheckpointError: A file is a link that leads out of the directory.
    """
    for name, recorded in record.files.items():
        path = record.directory / name
        if not has_file(record.directory, name):
            raise VerificationError(f"{path}: missing, but {RECORD_NAME} names it; {_AGAIN}")
        size = path.stat().st_size
        if size != recorded.bytes:
            raise VerificationError(
                f"{path}: {size} bytes, not {recorded.bytes} as in {RECORD_NAME}: changed since then; {_AGAIN}"
            )


def check_hashes(record: AbliterationRecord, *, progress: ProgressReporter = SILENT) -> None:
    """Check the SHA-256 of every recorded file.

    Raises:
        VerificationError: A file is not the one that was written.
    """
    total = sum(recorded.bytes for recorded in record.files.values())
    with progress.task("Checking hashes", total=total, unit="bytes") as advance:
        paths = [record.directory / name for name in record.files]
        found = in_threads(lambda path: hash_file(path, advance=advance), paths)
        for path, sha256, recorded in zip(paths, found, record.files.values(), strict=True):
            if sha256 != recorded.sha256:
                raise VerificationError(
                    f"{path}: its SHA-256 is not the one in {RECORD_NAME}: changed since written; {_AGAIN}"
                )


@contextmanager
def as_recorded(directory: Path) -> Iterator[None]:
    """Read more out of a record than `read_record` checks, and say in one line where it is not as it was written.

    Args:
        directory: the checkpoint's.

    Raises:
        InputError: something in the record is of another kind.
    """
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        said = f"{RECORD_NAME} or {EVALUATION_NAME} is not as it was written ({in_one_line(error)})"
        raise InputError(f"{directory}: {said}; {_AGAIN}") from error


def _malformed_part(content: Mapping[str, Any]) -> str | None:
    """Return what of a record, where it is there, is not of the kind that was written."""
    for name in ("options", "tool", "config_changes", "subspace", "partial"):
        if not isinstance(content.get(name), dict | None):
            return name
    if not all(isinstance(each, str) for each in (content.get("tool") or {}).values()):
        return "tool"
    tensors = content.get("tensors", [])
    if not isinstance(tensors, list) or not all(isinstance(tensor, dict) for tensor in tensors):
        return "tensors"
    return next(
        ("metadata" for each in content["directions"] if not isinstance(each.get("metadata"), dict | None)), None
    )


def _read_entry(record: Path, name: str, entry: Any) -> WrittenFile:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\\" in name:
        raise VerificationError(f"{record}: names {name!r}, outside the directory; {_AGAIN}")
    if not isinstance(entry, dict) or not isinstance(entry.get("bytes"), int) or "sha256" not in entry:
        raise InputError(f"{record}: no sha256 and bytes for {name}; {_AGAIN}")
    return WrittenFile(sha256=str(entry["sha256"]), bytes=entry["bytes"])
