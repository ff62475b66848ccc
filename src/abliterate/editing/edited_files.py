"""Carrying out an edit plan: each file of the new checkpoint, as the segments that it is made of.

What is not edited is copied, or shared by the file system, each edited tensor is written once into its place and read
back once, which proves its bytes, and all of them give the file's hash (see `file_assembly`).
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from abliterate.checkpoints.checkpoint import CONFIG_NAME, INDEX_NAME, Checkpoint, with_changes
from abliterate.checkpoints.file_assembly import (
    GivenSegment,
    NewFile,
    Segment,
    Traffic,
    assemble_files,
    copied_segments,
)
from abliterate.checkpoints.file_ranges import PlainFile, WrittenFile, became_shorter, open_file
from abliterate.checkpoints.partial_run import Entry, PartialDirectory
from abliterate.checkpoints.safetensors_file import Shard, TensorInfo, damaged_file, extended_header
from abliterate.editing.checks import directions_through
from abliterate.editing.edited_tensors import MadeParts, ProjectedTensor, Projection, QuantizedEdit
from abliterate.editing.edits import TensorEdit
from abliterate.editing.plan import EditPlan
from abliterate.editing.record import EVALUATION_NAME, RECORD_NAME, EditedTensor
from abliterate.formats.segments import kernels_for
from abliterate.formats.stored_component import Component
from abliterate.progress import ProgressReporter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Numbers edited, above which the fused arithmetic saves more time than it takes to be loaded.
_WORTH_FUSING = 1 << 28


class EditedShard:
    """One shard of the new checkpoint.

    Args:
        shard: The original.
        plan: What is edited.
        edits: Of tensors that are there, by the names that they are stored under; those of the plan.
        directions: Norm chain -> the directions that a writer before it must not have.
        device: Where the arithmetic is done.
        fused: See `projection.project_out`.

    Attributes:
        edits: Name of each edited tensor in it -> what projects it, or None where nothing is projected.
    """

    def __init__(
        self,
        shard: Shard,
        plan: EditPlan,
        edits: Mapping[str, TensorEdit],
        directions: Mapping[str, NDArray[np.float64]],
        *,
        device: str,
        fused: bool,
    ) -> None:
        self.edits: dict[str, ProjectedTensor | None] = {}
        self._by_name = edits
        self._shard, self._plan, self._directions = shard, plan, directions
        self._device, self._fused = device, fused
        self._opened: dict[str, PlainFile] = {}
        self._segments: list[Segment] = []

    def file(self, *, added: Sequence[TensorEdit]) -> NewFile:
        """Return the new file, with `added` after its own tensors; the files that it reads are open.

        Raises:
            CheckpointError: The original cannot be read, or is not what it was when the plan was made.
        """
        shard = self._shard
        header = extended_header(shard, [edit.info for edit in added]) if added else shard.header_bytes
        self._add(GivenSegment(start=0, data=header, name=f"{shard.file_name}: the header"))
        edits = self._by_name
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
        return NewFile(name=shard.file_name, sources=tuple(self._opened.values()), segments=tuple(self._segments))

    def dequantized_file(self, layout: Shard, *, added: Sequence[TensorEdit]) -> NewFile:
        """Return the new file with every number plain, laid out as `layout` says, and `added` after its own tensors.

        Raises:
            CheckpointError: The original cannot be read, or is not what it was when the plan was made.
        """
        header = extended_header(layout, [edit.info for edit in added]) if added else layout.header_bytes
        self._add(GivenSegment(start=0, data=header, name=f"{layout.file_name}: the header"))
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
        return NewFile(name=layout.file_name, sources=tuple(self._opened.values()), segments=tuple(self._segments))

    @property
    def _end(self) -> int:
        return self._segments[-1].end if self._segments else 0

    def _add(self, *segments: Segment) -> None:
        self._segments.extend(segments)

    def _copy(self, shard_name: str, start: int, end: int) -> None:
        if start < end:
            source = self._source(shard_name)
            self._add(*copied_segments(source, start=start, end=end, offset=self._end))

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
                projection=self._projection(edit),
            )
            self.edits[edit.name] = projected
            self._add(*projected.segments)
        elif source is not None and edit.dose is None:
            self._copy(source.shard, source.start, source.end)
        else:
            # A bias and its dose are added in float64: one rounding, and nothing else.
            self._add(GivenSegment(start=self._end, data=_dosed(edit, path), name=name))

    def _requantize(self, edit: TensorEdit, stored: TensorInfo) -> None:
        made = self._quantized_edit(edit.info, edit)
        place = [each.name for each in made.encoding.stored].index(stored.name)
        if place == 0:
            self.edits[edit.name] = None
        n_parts = made.n_parts
        self._add(
            MadeParts(
                start=self._end,
                sizes=made.part_bytes if place == 0 else [(stored.end - stored.start) // n_parts] * n_parts,
                make=made.edit if place == 0 else functools.partial(made.refit, companion=place - 1),
                name=f"{stored.shard}: tensor {stored.name}",
            )
        )

    def _decode(self, source: TensorInfo, edit: TensorEdit | None) -> None:
        made = self._quantized_edit(source, edit)
        name = source.name if edit is None else edit.name
        self._add(
            MadeParts(
                start=self._end,
                sizes=made.plain_part_bytes,
                make=made.decoded,
                name=f"{source.shard}: tensor {name}",
            )
        )

    def _quantized_edit(self, source: TensorInfo, edit: TensorEdit | None) -> QuantizedEdit:
        projection = self._projection(edit) if edit is not None and edit.project else None
        made = QuantizedEdit(path=self._plan.checkpoint.path, info=source, projection=projection)
        for each in made.encoding.stored:
            self._source(each.shard)
        return made

    def _projection(self, edit: TensorEdit) -> Projection:
        return Projection(
            directions=self._directions[edit.name],
            residual_axis=edit.writer.residual_axis,
            strength=self._plan.options.strength_of(edit.writer),
            preserve_norms=self._plan.options.preserve_norms,
            device=self._device,
            fused=self._fused,
        )

    def _source(self, shard_name: str) -> PlainFile:
        if shard_name not in self._opened:
            own = self._shard if self._shard.file_name == shard_name else None
            shard = own or next(each for each in self._plan.checkpoint.shards if each.file_name == shard_name)
            self._opened[shard_name] = source = open_file(self._plan.checkpoint.path / shard_name)
            header = memoryview(bytearray(len(shard.header_bytes)))
            source.read_into(header, 0)
            if header != shard.header_bytes or source.size > shard.size:
                raise damaged_file(source.path, "it was changed while it was being read")
            if source.size < shard.size:
                raise became_shorter(source.path)
        return self._opened[shard_name]


def _dosed(edit: TensorEdit, path: Path) -> bytes:
    """Return a bias with its dose added, as a file stores it."""
    import torch

    from abliterate.checkpoints.stored_tensors import TORCH_DTYPES, read_tensor, tensor_bytes

    dtype, source = TORCH_DTYPES[edit.info.dtype], edit.source
    old = torch.zeros(edit.info.shape, dtype=dtype) if source is None else read_tensor(path, source)
    dose = torch.tensor(edit.dose or 0.0, dtype=torch.float64)
    return bytes(tensor_bytes((old.double() + dose).to(dtype)))


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedFile:
    """A file that is whole on the disk and was read back.

    Attributes:
        written: Its hash and size.
        edits: The edited tensors in it.
    """

    written: WrittenFile
    edits: tuple[EditedTensor, ...]

    def entry(self) -> Entry:
        """Return what a journal records of it."""
        edits = {tensor.name: [tensor.before, tensor.after] for tensor in self.edits}
        return {"sha256": self.written.sha256, "bytes": self.written.bytes, "edits": edits}

    @classmethod
    def from_entry(cls, entry: Entry, edits: Mapping[str, TensorEdit]) -> Self:
        """Return the file that an entry of a journal describes; `edits` are those of the plan, by name."""

        def component(values: Any) -> Component | None:
            return None if values is None else Component(float(values[0]), float(values[1]))

        made = tuple(
            EditedTensor(edit=edits[name], before=component(before), after=component(after))
            for name, (before, after) in entry["edits"].items()
        )
        return cls(written=WrittenFile(sha256=entry["sha256"], bytes=entry["bytes"]), edits=made)


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
        numbers = sum(math.prod(edit.info.shape) for edit in plan.edits if edit.project)
        self._fused = numbers >= _WORTH_FUSING
        self._is_compiled = self._fused and device == "cpu" and all(map(_is_compiled, plan.edits))
        self._shards = {shard.file_name: shard for shard in plan.checkpoint.shards}
        # Looked up for each shard, of which there may be thousands.
        there = [edit for edit in plan.edits if not edit.is_new]
        self._stored = {name: edit for edit in there for name in edit.stored_as or (edit.name,)}
        self._new = [edit for edit in plan.edits if edit.is_new]
        layout = plan.layout
        self._layouts = {shard.file_name: shard for shard in layout.shards}
        self._new_content = _changed_side_files(plan, layout)
        writers = [edit.writer for edit in plan.edits if edit.project]
        self._directions = directions_through(plan.checkpoint, plan.removed, writers=writers)
        left_out = {RECORD_NAME, EVALUATION_NAME} if RECORD_NAME in plan.checkpoint.side_files else set()
        self.shard_names = tuple(self._shards)
        self.side_names = tuple(name for name in plan.checkpoint.side_files if name not in left_out)

    @property
    def largest(self) -> Path:
        """The largest shard of the original."""
        shards = self._plan.checkpoint.shards
        return self._plan.checkpoint.path / max(shards, key=lambda shard: shard.size).file_name

    def bytes_stored(self) -> int:
        """Return the bytes that the original takes on the disk, which are fewer than its sizes where it has holes."""
        path = self._plan.checkpoint.path
        states = ((path / name).stat() for name in (*self.shard_names, *self.side_names))
        return sum(512 * state.st_blocks if hasattr(state, "st_blocks") else state.st_size for state in states)

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
        self, directory: PartialDirectory, *, target: Path, workers: int, progress: ProgressReporter
    ) -> tuple[dict[str, FinishedFile], Traffic]:
        """Make the files that a directory does not have yet, each flushed to the disk, read back, checked, journalled.

        Args:
            directory: Where they go.
            target: The directory that it will be.
            workers: Threads.
            progress: Shown the bytes written and checked.

        Returns:
            All files, those that the directory had among them, and what was moved.

        Raises:
            CheckpointError: The source cannot be read or was changed, or an edited tensor is not finite.
            VerificationError: What was read back is not what it must be.
            OSError: A file cannot be written.
        """
        planned = {edit.name: edit for edit in self._plan.edits}
        finished = {name: FinishedFile.from_entry(entry, planned) for name, entry in directory.kept.items()}
        missing = {name: size for name, size in self.sizes().items() if name not in finished}
        edits: dict[str, dict[str, ProjectedTensor | None]] = {}

        def files() -> Iterator[NewFile]:
            for name in missing:
                file, edits[name] = self._file(name)
                yield file

        def done(name: str, written: WrittenFile) -> None:
            made = tuple(_measured(planned[edited], tensor) for edited, tensor in edits.pop(name).items())
            finished[name] = FinishedFile(written=written, edits=made)
            directory.journal.add(name, finished[name].entry())

        task = progress.task(f"Writing {target}", total=sum(missing.values()), unit="bytes")
        with task as advance, nullcontext() if self._is_compiled else _one_thread_each():
            traffic = assemble_files(files(), target=directory.path, workers=workers, done=done, advance=advance)
        return finished, traffic

    def _file(self, name: str) -> tuple[NewFile, dict[str, ProjectedTensor | None]]:
        if name in self._new_content:
            data = GivenSegment(start=0, data=self._new_content[name], name=name)
            return NewFile(name=name, sources=(), segments=(data,)), {}
        directory = self._plan.checkpoint.path
        if name in self._shards:
            shard = EditedShard(
                self._shards[name],
                self._plan,
                self._stored,
                self._directions,
                device=self._device,
                fused=self._fused,
            )
            added = self._added(self._shards[name])
            if self._plan.is_dequantized:
                return shard.dequantized_file(self._layouts[name], added=added), shard.edits
            return shard.file(added=added), shard.edits
        source = open_file(directory / name)
        copied = copied_segments(source, start=0, end=source.size, offset=0)
        return NewFile(name=name, sources=(source,), segments=tuple(copied)), {}

    def _growth(self, shard: Shard) -> int:
        added = self._added(shard)
        header = len(extended_header(shard, [edit.info for edit in added])) - len(shard.header_bytes) if added else 0
        return header + sum(edit.nbytes for edit in added)

    def _added(self, shard: Shard) -> list[TensorEdit]:
        return [edit for edit in self._new if edit.info.shard == shard.file_name]


def _is_compiled(edit: TensorEdit) -> bool:
    """Say whether an edit is made without torch, where that is worth it."""
    is_plain = edit.source is None or edit.source.encoding is None
    return is_plain and edit.dose is None and kernels_for(edit.info.dtype) is not None


def _measured(edit: TensorEdit, tensor: ProjectedTensor | None) -> EditedTensor:
    if tensor is None:
        return EditedTensor(edit=edit)
    return EditedTensor(edit=edit, before=tensor.before, after=tensor.after)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let each worker compute with one thread of torch, so that the order of sums does not depend on their number."""
    import torch

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
