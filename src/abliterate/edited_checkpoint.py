"""Carrying out an edit plan: each file of the new checkpoint, as the stretches that it is made of.

What is not edited is copied, or shared by the file system, each edited tensor is written once into its place and read
back once, which proves its bytes, and all of them give the file's hash (see `stretches` and `file_assembly`).
"""

import json
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from abliterate.abliteration_record import EVALUATION_NAME, RECORD_NAME
from abliterate.checkpoint_checks import directions_through
from abliterate.checkpoints.checkpoint import CONFIG_NAME, INDEX_NAME, Checkpoint, with_changes
from abliterate.checkpoints.file_assembly import GivenBytes, NewFile, Traffic, assemble_files, copied_ranges
from abliterate.checkpoints.file_ranges import SourceFile
from abliterate.checkpoints.hashed_files import WrittenFile
from abliterate.checkpoints.resumable_directory import Entry
from abliterate.checkpoints.safetensors_file import Shard, extended_header
from abliterate.edit_plan import EditPlan
from abliterate.edited_shard import EditedShard
from abliterate.progress import Advance
from abliterate.projected_stretch import ProjectedTensor
from abliterate.tensor_edits import TensorEdit


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
