"""A tensor that is edited on its way into a new file, block by block, and measured as it is read back."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abliterate.checkpoints.file_assembly import ComputedStretch, Fill, Worker, changed_on_the_way
from abliterate.checkpoints.file_ranges import SourceFile, TargetFile
from abliterate.checkpoints.safetensors_file import TORCH_DTYPES, TensorInfo
from abliterate.errors import CheckpointError
from abliterate.projection import ComponentMeter, NormSums, project_out
from abliterate.tensor_blocks import TensorBlock, blocks_of

_METER_BYTES = 1 << 20
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """What is done to a tensor.

    Attributes:
        directions: U, [k, d_model] float64, orthonormal rows.
        residual_axis: The axis that indexes the residual stream.
        strength: Share of the component that is removed.
        preserve_norms: See `projection.project_out`.
        device: Where the arithmetic is done.
    """

    directions: Tensor
    residual_axis: int
    strength: float = 1.0
    preserve_norms: bool = False
    device: str = "cpu"


class ProjectedTensor:
    """A tensor of another file with directions projected out.

    Args:
        start: Where it begins in the new file.
        source: The file that holds the original, open.
        info: The original.
        name: What it is called in the new file, with the shard.
        projection: What is done.

    Attributes:
        stretches: What it is made of, in file order: a block each where a block is one range of the file.
    """

    def __init__(self, *, start: int, source: SourceFile, info: TensorInfo, name: str, projection: Projection) -> None:
        self.name, self.projection = name, projection
        self.dtype = TORCH_DTYPES[info.dtype]
        blocks = blocks_of(info, residual_axis=projection.residual_axis)
        self.meter = ComponentMeter(projection.directions, shape=info.shape, residual_axis=projection.residual_axis)
        # The widest words of which every piece of a block, and so every row, holds a whole number.
        lengths = [self.meter.row_length * self.dtype.itemsize, *(block.piece_bytes for block in blocks)]
        self.word = _WORDS[math.gcd(8, *lengths)]
        are_ranges = all(block.n_pieces == 1 for block in blocks)
        groups = [(block,) for block in blocks] if are_ranges else [blocks]
        self.stretches = tuple(
            ProjectedBlocks(group, tensor=self, source=source, source_start=info.start, start=start) for group in groups
        )
        self._original = f"{source.path.parent}: tensor {info.name}"

    @property
    def before(self) -> tuple[float, float]:
        """|U W| and |W| of the original, once all tasks are done."""
        parts = [part for stretch in self.stretches for part in stretch.before]
        along = math.fsum(part.along_squared for part in parts)
        return math.sqrt(along), math.sqrt(math.fsum(part.total_squared for part in parts))

    @property
    def after(self) -> tuple[float, float]:
        """|U W'| and |W'| of what was read back."""
        return self.meter.result()

    def project(self, stored: Tensor, worker: Worker) -> NormSums:
        """Project a block, in its place, and return |U W| and |W| of what it was.

        Raises:
            CheckpointError: It is not finite.
        """
        projection, before = self.projection, NormSums()
        moved = stored.to(projection.device)
        new = project_out(
            moved,
            directions=projection.directions,
            residual_axis=1,
            strength=projection.strength,
            preserve_norms=projection.preserve_norms,
            out=moved,
            scratch=worker.scratch,
            before=before,
        )
        if not math.isfinite(before.total_squared):
            raise CheckpointError(f"{self._original} holds NaN or infinite values; download the checkpoint again")
        if new is not stored:
            stored.copy_(new)
        return before


class ProjectedBlocks(ComputedStretch):
    """Blocks of a projected tensor that together are one range of the file.

    Args:
        blocks: Which.
        tensor: The tensor.
        source: The file that holds the original, open.
        source_start: Where the original begins in it.
        start: Where the tensor begins in the new file.

    Attributes:
        before: Of each block, |U W| and |W| of the original; once all tasks are done.
    """

    def __init__(
        self,
        blocks: Sequence[TensorBlock],
        *,
        tensor: ProjectedTensor,
        source: SourceFile,
        source_start: int,
        start: int,
    ) -> None:
        first = start + (blocks[0].offset if blocks else 0)
        super().__init__(start=first, end=first + sum(block.nbytes for block in blocks))
        self.before = [NormSums()] * len(blocks)
        self._blocks, self._tensor, self._tensor_start = blocks, tensor, start
        self._source, self._source_start = source, source_start
        self._sums = [0] * len(blocks)
        self._sum_read = 0

    @property
    def check_bytes(self) -> int:
        """See `ComputedStretch.check_bytes`: whole rows."""
        row_bytes = self._tensor.meter.row_length * self._tensor.dtype.itemsize
        return max(1, _METER_BYTES // row_bytes) * row_bytes

    def fills(self) -> Sequence[Fill]:
        """See `ComputedStretch.fills`: a task a block."""

        def fill_of(index: int, block: TensorBlock) -> Fill:
            return lambda target, worker: self._fill(index, block, target, worker)

        return [fill_of(index, block) for index, block in enumerate(self._blocks)]

    def check(self, written: memoryview, *, offset: int, worker: Worker) -> None:  # noqa: ARG002
        """See `ComputedStretch.check`."""
        rows = torch.frombuffer(written, dtype=self._tensor.dtype).view(-1, self._tensor.meter.row_length)
        self._tensor.meter.add(rows, scratch=worker.scratch)
        self._sum_read += self._sum(written)

    def finish(self) -> None:
        """See `ComputedStretch.finish`."""
        if self._sum_read % (1 << 64) != sum(self._sums) % (1 << 64):
            raise changed_on_the_way(self._tensor.name)

    def _fill(self, index: int, block: TensorBlock, target: TargetFile, worker: Worker) -> None:
        buffer = block.read(self._source, worker.memory("block"), start=self._source_start)
        stored = torch.frombuffer(buffer, dtype=self._tensor.dtype).view(block.shape)
        self.before[index] = self._tensor.project(stored, worker)
        self._sums[index] = self._sum(buffer)
        block.write(target, buffer, start=self._tensor_start)
        worker.traffic.read += block.nbytes
        worker.traffic.written += block.nbytes

    def _sum(self, data: memoryview) -> int:
        # A sum of words does not depend on their order, so blocks of columns and rows of the file have the same.
        return int(torch.frombuffer(data, dtype=self._tensor.word).sum(dtype=torch.int64))
