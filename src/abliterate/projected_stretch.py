"""A tensor that is edited on its way into a new file, block by block, and measured as it is read back."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abliterate.byte_ranges import SourceFile, TargetFile
from abliterate.errors import CheckpointError, VerificationError
from abliterate.projection import ComponentMeter, project_out
from abliterate.safetensors_file import TORCH_DTYPES, TensorInfo
from abliterate.stretches import Fill, Stretch, Worker
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


class ProjectedTensor(Stretch):
    """A tensor of another file with directions projected out.

    Args:
        start: Where it begins in the new file.
        source: The file that holds the original, open.
        info: The original.
        name: What it is called in the new file, with the shard.
        projection: What is done.
    """

    is_computed = True

    def __init__(self, *, start: int, source: SourceFile, info: TensorInfo, name: str, projection: Projection) -> None:
        super().__init__(start=start, end=start + info.end - info.start)
        self._source, self._info, self._name, self._projection = source, info, name, projection
        self._dtype = TORCH_DTYPES[info.dtype]
        self._blocks = blocks_of(info, residual_axis=projection.residual_axis)
        self._before: list[tuple[float, float]] = [(0.0, 0.0)] * len(self._blocks)
        self._sums = [0] * len(self._blocks)
        self._meter = ComponentMeter(projection.directions, shape=info.shape, residual_axis=projection.residual_axis)
        self._row_bytes = self._meter.row_length * self._dtype.itemsize
        # The widest words of which every piece of a block, and so every row, holds a whole number.
        lengths = [self._row_bytes, *(block.piece_bytes for block in self._blocks)]
        self._word = _WORDS[math.gcd(8, *lengths)]
        self._sum_read = 0

    @property
    def before(self) -> tuple[float, float]:
        """|U W| and |W| of the original, once all tasks are done."""
        along, total = (math.sqrt(math.fsum(part[i] ** 2 for part in self._before)) for i in (0, 1))
        return along, total

    @property
    def after(self) -> tuple[float, float]:
        """|U W'| and |W'| of what was read back."""
        return self._meter.result()

    @property
    def check_bytes(self) -> int:
        """See `Stretch.check_bytes`: whole rows."""
        return max(1, _METER_BYTES // self._row_bytes) * self._row_bytes

    def fills(self) -> Sequence[Fill]:
        """See `Stretch.fills`: a task a block."""

        def fill_of(index: int, block: TensorBlock) -> Fill:
            return lambda target, worker: self._fill(index, block, target, worker)

        return [fill_of(index, block) for index, block in enumerate(self._blocks)]

    def check(self, written: memoryview, *, offset: int, worker: Worker) -> None:  # noqa: ARG002
        """See `Stretch.check`."""
        rows = torch.frombuffer(written, dtype=self._dtype).view(-1, self._meter.row_length)
        self._meter.add(rows, scratch=worker.scratch)
        self._sum_read += self._sum(written)

    def finish(self) -> None:
        """See `Stretch.finish`."""
        if self._sum_read % (1 << 64) != sum(self._sums) % (1 << 64):
            raise VerificationError(
                f"{self._name}, reread, is not what was written; disk or memory may be faulty, run again"
            )

    def _fill(self, index: int, block: TensorBlock, target: TargetFile, worker: Worker) -> None:
        buffer = block.read(self._source, worker.memory("block"), start=self._info.start)
        stored = torch.frombuffer(buffer, dtype=self._dtype).view(block.shape)
        self._before[index] = self._measure(stored, worker)
        projection = self._projection
        moved = stored.to(projection.device)
        new = project_out(
            moved,
            directions=projection.directions,
            residual_axis=1,
            strength=projection.strength,
            preserve_norms=projection.preserve_norms,
            out=moved,
            scratch=worker.scratch,
        )
        if new is not stored:
            stored.copy_(new)
        self._sums[index] = self._sum(buffer)
        block.write(target, buffer, start=self.start)
        worker.traffic.read += block.nbytes
        worker.traffic.written += block.nbytes

    def _measure(self, block: Tensor, worker: Worker) -> tuple[float, float]:
        # What is left of the component after the edit takes float64 to measure; what there was before does not, unless
        # the numbers themselves are finer.
        dtype = torch.float32 if self._dtype == torch.bfloat16 else torch.float64
        meter = ComponentMeter(self._projection.directions, shape=block.shape, residual_axis=1, dtype=dtype)
        rows = block.view(-1, meter.row_length)
        step = max(1, _METER_BYTES // (meter.row_length * self._dtype.itemsize))
        for first in range(0, len(rows), step):
            meter.add(rows[first : first + step], scratch=worker.scratch)
        along, norm = meter.result()
        if not math.isfinite(norm):
            raise CheckpointError(
                f"{self._source.path.parent}: tensor {self._info.name} holds NaN or infinite values; "
                "download the checkpoint again"
            )
        return along, norm

    def _sum(self, data: memoryview) -> int:
        # A sum of words does not depend on their order, so blocks of columns and rows of the file have the same.
        return int(torch.frombuffer(data, dtype=self._word).sum(dtype=torch.int64))
