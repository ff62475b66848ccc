"""Carrying out an edit plan: each file of the new checkpoint, as the stretches that it is made of.

What is not edited is copied, or shared by the file system, each edited tensor is written once into its place and read
back once, which proves its bytes, and all of them give the file's hash (see `stretches` and `file_assembly`).

One shard of an edited checkpoint, as the stretches that it is made of.

One run that writes a checkpoint, alone or with other processes, and publishes it or gives it up.
"""

import functools
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from abliterate.architectures.writers import PostNorm
from abliterate.checkpoints.checkpoint import CONFIG_NAME, INDEX_NAME, Checkpoint, with_changes
from abliterate.checkpoints.file_assembly import GivenBytes, NewFile, Stretch, Traffic, assemble_files, copied_ranges
from abliterate.checkpoints.file_ranges import SourceFile, became_shorter
from abliterate.checkpoints.hashed_files import WrittenFile
from abliterate.checkpoints.resumable_directory import (
    Entry,
    Key,
    PartialDirectory,
    PartialRun,
    is_worth_keeping,
    partial_path,
)
from abliterate.checkpoints.safetensors_file import (
    TORCH_DTYPES,
    Shard,
    TensorInfo,
    damaged_file,
    extended_header,
    read_tensor,
    tensor_bytes,
)
from abliterate.editing.checks import directions_through
from abliterate.editing.edited_tensors import ProjectedTensor, Projection
from abliterate.editing.edits import TensorEdit
from abliterate.editing.options import WriteOptions
from abliterate.editing.plan import EditPlan
from abliterate.editing.record import EVALUATION_NAME, RECORD_NAME
from abliterate.editing.requantization import MadeMatrices, QuantizedEdit
from abliterate.errors import AbliterateError, CheckpointError, VerificationError
from abliterate.processes import Ranks, share_by_size
from abliterate.progress import Advance, ProgressReporter


class EditedShard:
    """One shard of the new checkpoint.

    Args:
        shard: The original.
        plan: What is edited.
        directions: Norm chain -> the directions that a writer before it must not have.
        device: Where the arithmetic is done.

    Attributes:
        edits: Name of each edited tensor in it -> what projects it, or None where nothing is projected.
    """

    def __init__(
        self, shard: Shard, plan: EditPlan, directions: Mapping[tuple[PostNorm, ...], Tensor], *, device: str
    ) -> None:
        self.edits: dict[str, ProjectedTensor | None] = {}
        self._shard, self._plan, self._directions, self._device = shard, plan, directions, device
        self._opened: dict[str, SourceFile] = {}
        self._stretches: list[Stretch] = []

    def file(self, *, added: Sequence[TensorEdit]) -> NewFile:
        """Return it with `added` behind its own tensors; its sources are open.

        Raises:
            CheckpointError: The original cannot be read, or is not what it was when the plan was made.
        """
        shard = self._shard
        header = extended_header(shard, [edit.info for edit in added]) if added else shard.header_bytes
        self._add(GivenBytes(start=0, data=header, name=f"{shard.file_name}: the header"))
        edits = {name: edit for edit in self._plan.edits if not edit.is_new for name in edit.stored_as or (edit.name,)}
        position = len(shard.header_bytes)
        for info in shard.tensors:
            if info.name in edits:
                self._copy(shard.file_name, position, info.start)
                if edits[info.name].stored_as:
                    self._requantize(edits[info.name], info)
                else:
                    self._edit(edits[info.name])
                position = info.end
        self._copy(shard.file_name, position, shard.size)
        for edit in added:
            self._edit(edit)
        return NewFile(name=shard.file_name, sources=tuple(self._opened.values()), stretches=tuple(self._stretches))

    def dequantized_file(self, layout: Shard, *, added: Sequence[TensorEdit]) -> NewFile:
        """Return it with every number plain, laid out as `layout` says, and `added` behind its own tensors.

        Raises:
            CheckpointError: The original cannot be read, or is not what it was when the plan was made.
        """
        header = extended_header(layout, [edit.info for edit in added]) if added else layout.header_bytes
        self._add(GivenBytes(start=0, data=header, name=f"{layout.file_name}: the header"))
        edits = {edit.name: edit for edit in self._plan.edits if not edit.is_new}
        seen = next(shard for shard in self._plan.view.shards if shard.file_name == layout.file_name)
        for info in seen.tensors:
            if info.name in edits:
                self._edit(edits[info.name])
            elif info.encoding is not None:
                self._decode(info, None)
            else:
                self._copy(info.shard, info.start, info.end)
        for edit in added:
            self._edit(edit)
        return NewFile(name=layout.file_name, sources=tuple(self._opened.values()), stretches=tuple(self._stretches))

    @property
    def _end(self) -> int:
        return self._stretches[-1].end if self._stretches else 0

    def _add(self, *stretches: Stretch) -> None:
        self._stretches.extend(stretches)

    def _copy(self, shard_name: str, start: int, end: int) -> None:
        if start < end:
            source = self._source(shard_name)
            self._add(*copied_ranges(source, start=start, end=end, offset=self._end))

    def _edit(self, edit: TensorEdit) -> None:
        self.edits[edit.name] = None
        path, source = self._plan.checkpoint.path, edit.source
        name = f"{edit.info.shard}: tensor {edit.name}"
        if source is not None and source.encoding is not None:
            self._decode(source, edit)
        elif source is not None and edit.project:
            projected = ProjectedTensor(
                start=self._end,
                source=self._source(source.shard),
                info=source,
                name=name,
                projection=Projection(
                    directions=self._directions[edit.norm_chain],
                    residual_axis=edit.residual_axis,
                    strength=self._plan.options.strength,
                    preserve_norms=self._plan.options.preserve_norms,
                    device=self._device,
                ),
            )
            self.edits[edit.name] = projected
            self._add(*projected.stretches)
        elif source is not None and edit.dose is None:
            self._copy(source.shard, source.start, source.end)
        else:
            # A bias and its dose are added in float64: one rounding, and nothing else.
            dtype = TORCH_DTYPES[edit.info.dtype]
            old = torch.zeros(edit.info.shape, dtype=dtype) if source is None else read_tensor(path, source)
            new = old if edit.dose is None else (old.double() + edit.dose).to(dtype)
            self._add(GivenBytes(start=self._end, data=bytes(tensor_bytes(new)), name=name))

    def _requantize(self, edit: TensorEdit, stored: TensorInfo) -> None:
        made = self._quantized_edit(edit.info, edit)
        place = [each.name for each in made.encoding.stored].index(stored.name)
        if place == 0:
            self.edits[edit.name] = None
        self._add(
            MadeMatrices(
                start=self._end,
                nbytes=stored.end - stored.start,
                make=made.edit if place == 0 else functools.partial(made.refit, companion=place - 1),
                matrices=made.matrices,
                name=f"{stored.shard}: tensor {stored.name}",
            )
        )

    def _decode(self, source: TensorInfo, edit: TensorEdit | None) -> None:
        made = self._quantized_edit(source, edit)
        name = source.name if edit is None else edit.name
        self._add(
            MadeMatrices(
                start=self._end,
                nbytes=source.plain_bytes,
                make=made.decoded,
                matrices=made.matrices,
                name=f"{source.shard}: tensor {name}",
            )
        )

    def _quantized_edit(self, source: TensorInfo, edit: TensorEdit | None) -> QuantizedEdit:
        options = self._plan.options
        made = QuantizedEdit(
            path=self._plan.checkpoint.path,
            info=source,
            directions=self._directions[edit.norm_chain] if edit is not None and edit.project else None,
            residual_axis=0 if edit is None else edit.residual_axis,
            strength=options.strength,
            preserve_norms=options.preserve_norms,
        )
        for each in made.encoding.stored:
            self._source(each.shard)
        return made

    def _source(self, shard_name: str) -> SourceFile:
        if shard_name not in self._opened:
            shard = next(each for each in self._plan.checkpoint.shards if each.file_name == shard_name)
            self._opened[shard_name] = source = SourceFile(self._plan.checkpoint.path / shard_name)
            header = memoryview(bytearray(len(shard.header_bytes)))
            source.read_into(header, 0)
            if header != shard.header_bytes or source.size > shard.size:
                raise damaged_file(source.path, "it was changed while it was being read")
            if source.size < shard.size:
                raise became_shorter(source.path)
        return self._opened[shard_name]


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeEdit:
    """What one edit did: |U W|, |W| and |U W'|, |W'|, the latter reread; None where nothing is projected."""

    before: tuple[float, float] | None = None
    after: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedFile:
    """A file that is whole on the disk and was read back.

    Attributes:
        written: Its hash and size.
        edits: Name of an edited tensor in it -> what was done.
    """

    written: WrittenFile
    edits: dict[str, MadeEdit]

    def entry(self) -> Entry:
        """Return what a journal holds of it."""
        edits = {name: [edit.before, edit.after] for name, edit in self.edits.items()}
        return {"sha256": self.written.sha256, "bytes": self.written.bytes, "edits": edits}

    @classmethod
    def from_entry(cls, entry: Entry) -> Self:
        """Return what `entry` made a journal hold."""

        def pair(values: Any) -> tuple[float, float] | None:
            return None if values is None else (float(values[0]), float(values[1]))

        edits = {name: MadeEdit(before=pair(both[0]), after=pair(both[1])) for name, both in entry["edits"].items()}
        return cls(written=WrittenFile(sha256=entry["sha256"], bytes=entry["bytes"]), edits=edits)


class EditedFiles:
    """The files that a plan makes of its checkpoint, all but the record.

    Args:
        plan: The plan.
        device: Where the arithmetic is done.

    Raises:
        CheckpointError: A norm that the plan needs is not finite or cannot be read.
    """

    def __init__(self, plan: EditPlan, *, device: str = "cpu") -> None:
        self._plan, self._device = plan, device
        self._shards = {shard.file_name: shard for shard in plan.checkpoint.shards}
        layout = plan.layout
        self._layouts = {shard.file_name: shard for shard in layout.shards}
        self._new_content = _changed_side_files(plan, layout)
        chains = {edit.norm_chain for edit in plan.edits if edit.project}
        self._directions = directions_through(plan.checkpoint, plan.subspace, chains=chains)
        left_out = {RECORD_NAME, EVALUATION_NAME} if RECORD_NAME in plan.checkpoint.side_files else set()
        self.shard_names = tuple(self._shards)
        self.side_names = tuple(name for name in plan.checkpoint.side_files if name not in left_out)

    @property
    def largest(self) -> Path:
        """The largest shard of the original."""
        shards = self._plan.checkpoint.shards
        return self._plan.checkpoint.path / max(shards, key=lambda shard: shard.size).file_name

    @property
    def bytes_edited(self) -> int:
        """Bytes of all edited tensors."""
        return sum(edit.nbytes for edit in self._plan.edits)

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each file, shards first."""
        sizes = {name: shard.size + self._growth(shard) for name, shard in self._layouts.items()}
        for name in self.side_names:
            content = self._new_content.get(name)
            sizes[name] = (self._plan.checkpoint.path / name).stat().st_size if content is None else len(content)
        return sizes

    def write(
        self,
        names: Collection[str],
        *,
        target: Path,
        workers: int,
        done: Callable[[str, FinishedFile], None],
        advance: Advance,
    ) -> Traffic:
        """Make the named files in a directory, each flushed to the disk, read back and checked.

        Args:
            names: Of shards and side files.
            target: The directory; they must not be there.
            workers: Threads.
            done: Told of each file that is whole.
            advance: Told the bytes written and checked.

        Raises:
            CheckpointError: The source cannot be read or was changed, or an edited tensor is not finite.
            VerificationError: What was read back is not what it must be.
            OSError: A file cannot be written.
        """
        edits: dict[str, dict[str, ProjectedTensor | None]] = {}

        def files() -> Iterator[NewFile]:
            for name in names:
                file, edits[name] = self._file(name)
                yield file

        def finished(file: NewFile, written: WrittenFile) -> None:
            made = {
                name: MadeEdit() if stretch is None else MadeEdit(before=stretch.before, after=stretch.after)
                for name, stretch in edits.pop(file.name).items()
            }
            done(file.name, FinishedFile(written=written, edits=made))

        with _one_thread_each():
            return assemble_files(files(), target=target, workers=workers, done=finished, advance=advance)

    def _file(self, name: str) -> tuple[NewFile, dict[str, ProjectedTensor | None]]:
        if name in self._new_content:
            data = GivenBytes(start=0, data=self._new_content[name], name=name)
            return NewFile(name=name, sources=(), stretches=(data,)), {}
        directory = self._plan.checkpoint.path
        if name in self._shards:
            shard = EditedShard(self._shards[name], self._plan, self._directions, device=self._device)
            added = self._added(self._shards[name])
            if self._plan.is_dequantized:
                return shard.dequantized_file(self._layouts[name], added=added), shard.edits
            return shard.file(added=added), shard.edits
        source = SourceFile(directory / name)
        copied = copied_ranges(source, start=0, end=source.size, offset=0)
        return NewFile(name=name, sources=(source,), stretches=tuple(copied)), {}

    def _growth(self, shard: Shard) -> int:
        added = self._added(shard)
        header = len(extended_header(shard, [edit.info for edit in added])) - len(shard.header_bytes) if added else 0
        return header + sum(edit.nbytes for edit in added)

    def _added(self, shard: Shard) -> list[TensorEdit]:
        return [edit for edit in self._plan.edits if edit.is_new and edit.info.shard == shard.file_name]


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let each worker compute with one thread, so that the order of sums does not depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _changed_side_files(plan: EditPlan, layout: Checkpoint) -> dict[str, bytes]:
    checkpoint = plan.checkpoint
    changed = {}
    if plan.config_changes:
        changed[CONFIG_NAME] = json.dumps(with_changes(checkpoint.config, plan.config_changes), indent=2) + "\n"
    if layout.index is not None and (layout.index is not checkpoint.index or any(edit.is_new for edit in plan.edits)):
        changed[INDEX_NAME] = json.dumps(_extended_index(plan, layout.index), indent=2) + "\n"
    return {name: text.encode() for name, text in changed.items()}


def _extended_index(plan: EditPlan, index: dict[str, Any]) -> dict[str, Any]:
    new = [edit for edit in plan.edits if edit.is_new]
    weight_map = index["weight_map"] | {edit.name: edit.info.shard for edit in new}
    metadata = dict(index.get("metadata") or {})
    for key, more in (
        ("total_size", sum(edit.nbytes for edit in new)),
        ("total_parameters", sum(math.prod(edit.info.shape) for edit in new)),
    ):
        if isinstance(metadata.get(key), int):
            metadata[key] += more
    return {**index, **({"metadata": metadata} if metadata else {}), "weight_map": dict(sorted(weight_map.items()))}


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
