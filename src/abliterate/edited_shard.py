"""One shard of an edited checkpoint, as the stretches that it is made of."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from abliterate.architectures.writers import PostNorm
from abliterate.checkpoints.file_assembly import GivenBytes, NewFile, Stretch, copied_ranges
from abliterate.checkpoints.file_ranges import SourceFile, became_shorter
from abliterate.checkpoints.safetensors_file import (
    TORCH_DTYPES,
    Shard,
    TensorInfo,
    damaged_file,
    extended_header,
    read_tensor,
    tensor_bytes,
)
from abliterate.edit_plan import EditPlan
from abliterate.projected_stretch import ProjectedTensor, Projection
from abliterate.requantized_stretch import MadeMatrices, QuantizedEdit
from abliterate.tensor_edits import TensorEdit


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
        is_codes = stored.name == made.encoding.codes.name
        if is_codes:
            self.edits[edit.name] = None
        self._add(
            MadeMatrices(
                start=self._end,
                nbytes=stored.end - stored.start,
                make=made.edit if is_codes else made.refit,
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
        for each in (made.encoding.codes, made.encoding.scales):
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
