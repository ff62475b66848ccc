"""A tensor that is edited on its way into a new file, block by block, and measured as it is read back.

A quantised one goes part by part (the matrices of a stack), in its own layout or dequantised. Its codes and companions
may lie in different files, in any order, so each computes what it needs by itself: new scales take a pass over the
decoded numbers, new codes that pass and the edit.

A block fits into memory and holds whole vectors along the residual axis. Where that axis is the last, such vectors lie
in one piece and a block is one range of the file. Where it is not, a block of columns is `d_model` pieces, one a row;
unless the matrix is small enough to be a block itself.
"""

from __future__ import annotations

import bisect
import itertools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from abliterate.checkpoints.encoding import EditableEncoding, Encoding
from abliterate.checkpoints.file_assembly import ComputedSegment, Fill, Worker, changed_on_the_way
from abliterate.checkpoints.file_ranges import AlignedMemory, PlainFile
from abliterate.checkpoints.safetensors_file import PLAIN_DTYPES, TensorInfo, encoded_parts
from abliterate.errors import CheckpointError
from abliterate.formats.segments import STORED, NormSums, bits_of, cut_in_segments, kernels_for, project_stored
from abliterate.formats.stored_component import Component, ComponentMeter

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

# Bytes of a tensor, as it is stored, that are held at a time. Where a block is one range of the file, few enough to
# stay in the cache from reading to writing. Where a block is some of the columns, enough that each row's part is worth
# a read of its own. What is written does not depend on either.
RANGE_BYTES = 4 << 20
BLOCK_BYTES = 112 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorBlock:
    """Part of a tensor, as ranges of equal length at equal distances.

    Attributes:
        shape: [n, d_model], or [n, d_model, columns]; the residual axis is 1.
        offset: Where its first byte is, counted from the tensor's first.
        n_pieces: Number of ranges.
        piece_bytes: Bytes of each.
        stride_bytes: From the start of one to the start of the next.
    """

    shape: tuple[int, ...]
    offset: int
    n_pieces: int = 1
    piece_bytes: int
    stride_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the block."""
        return self.n_pieces * self.piece_bytes

    def read(self, file: PlainFile, memory: AlignedMemory, *, start: int) -> memoryview:
        """Return the bytes of the block of the tensor that starts at byte `start` of a file; they lie in `memory`."""
        if self.n_pieces == 1:
            return file.read(start + self.offset, self.nbytes, memory)
        buffer = memory.take(self.nbytes)
        for at, position in self._pieces(start):
            file.read_into(buffer[at : at + self.piece_bytes], position)
        return buffer

    def write(self, file: PlainFile, data: memoryview, *, start: int) -> None:
        """Write the block into the tensor that starts at byte `start` of a file."""
        for at, position in self._pieces(start):
            file.write(data[at : at + self.piece_bytes], position)

    def _pieces(self, start: int) -> Iterator[tuple[int, int]]:
        for piece in range(self.n_pieces):
            yield piece * self.piece_bytes, start + self.offset + piece * self.stride_bytes


def blocks_of(info: TensorInfo, *, residual_axis: int, budget: int = BLOCK_BYTES) -> tuple[TensorBlock, ...]:
    """Cut a tensor into blocks of at most `budget` bytes; more only if that does not hold a vector.

    Args:
        info: The tensor; it must have a floating-point dtype.
        residual_axis: The axis that indexes the residual stream.
        budget: Bytes a block may have.
    """
    axis = residual_axis % len(info.shape)
    d_model = info.shape[axis]
    n_matrices, n_columns = math.prod(info.shape[:axis]), math.prod(info.shape[axis + 1 :])
    item = PLAIN_DTYPES[info.dtype]
    if not d_model * n_matrices * n_columns:
        return ()

    def n_vectors(nbytes: int) -> int:
        return max(1, nbytes // (d_model * item))

    at_once = min(budget, RANGE_BYTES)
    if axis == len(info.shape) - 1:
        counts = _counts(n_matrices, n_vectors(at_once))
        return tuple(
            TensorBlock(shape=(n, d_model), offset=first * d_model * item, piece_bytes=n * d_model * item)
            for first, n in counts
        )
    matrix = d_model * n_columns * item
    if n_columns <= n_vectors(budget):
        counts = _counts(n_matrices, max(1, at_once // matrix))
        return tuple(
            TensorBlock(shape=(n, d_model, n_columns), offset=first * matrix, piece_bytes=n * matrix)
            for first, n in counts
        )
    return tuple(
        TensorBlock(
            shape=(1, d_model, n),
            offset=index * matrix + first * item,
            n_pieces=d_model,
            piece_bytes=n * item,
            stride_bytes=n_columns * item,
        )
        for index in range(n_matrices)
        for first, n in _counts(n_columns, n_vectors(budget))
    )


def _counts(total: int, most: int) -> list[tuple[int, int]]:
    """Return where each of several parts begins and how long it is."""
    return [(first, min(most, total - first)) for first in range(0, total, most)]


_METER_BYTES = 1 << 20
_WORDS = {8: "<i8", 4: "<i4", 2: "<i2"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """What is projected out of a tensor, and how.

    Attributes:
        directions: U, [k, d_model] float64, orthonormal rows.
        residual_axis: The axis that indexes the residual stream.
        strength: Share of the component that is removed.
        preserve_norms: See `projection.project_out`.
        device: Where the arithmetic is done.
        fused: See `projection.project_out`.
    """

    directions: NDArray[np.float64]
    residual_axis: int
    strength: float = 1.0
    preserve_norms: bool = False
    device: str = "cpu"
    fused: bool = False


class ProjectedTensor:
    """A tensor of another file with directions projected out.

    Args:
        start: Where it begins in the new file.
        source: The file that holds the original, open.
        info: The original.
        name: What it is called in the new file, with the shard.
        projection: What is done.

    Attributes:
        segments: What it is made of, in file order: a block each where a block is one range of the file.
    """

    def __init__(self, *, start: int, source: PlainFile, info: TensorInfo, name: str, projection: Projection) -> None:
        self.name, self.projection = name, projection
        self.dtype = info.dtype
        blocks = blocks_of(info, residual_axis=projection.residual_axis)
        # On another device there is no compiled code.
        compiled = projection.fused and projection.device == "cpu" and len(projection.directions)
        self._kernels = kernels_for(info.dtype) if compiled else None
        self._segments = cut_in_segments(projection.directions, dtype=info.dtype) if self._kernels else None
        self.meter = ComponentMeter(
            projection.directions,
            shape=info.shape,
            residual_axis=projection.residual_axis,
            dtype=info.dtype,
            fused=projection.fused,
        )
        # The widest words of which every piece of a block, and so every row, holds a whole number.
        lengths = [self.meter.row_length * PLAIN_DTYPES[info.dtype], *(block.piece_bytes for block in blocks)]
        self.word = _WORDS[math.gcd(8, *lengths)]
        are_ranges = all(block.n_pieces == 1 for block in blocks)
        groups = [(block,) for block in blocks] if are_ranges else [blocks]
        self.segments = tuple(
            ProjectedBlocks(group, tensor=self, source=source, source_start=info.start, start=start) for group in groups
        )
        self._original = f"{source.path.parent}: tensor {info.name}"

    @property
    def before(self) -> Component:
        """|U W| and |W| of the original, once all tasks are done."""
        parts = [part for segment in self.segments for part in segment.before]
        along = math.fsum(part.along_squared for part in parts)
        return Component(math.sqrt(along), math.sqrt(math.fsum(part.total_squared for part in parts)))

    @property
    def after(self) -> Component:
        """|U W'| and |W'| of what was read back."""
        return self.meter.result()

    def project(self, data: memoryview, shape: Sequence[int], worker: Worker) -> NormSums:
        """Project a block of some shape in place, and return |U W| and |W| of what it was; the residual axis is 1.

        Raises:
            CheckpointError: It is not finite.
        """
        before = NormSums()
        if self._kernels is None or self._segments is None:
            self._project_with_torch(data, shape, worker, before)
        else:
            stored = bits_of(np.frombuffer(data, STORED[self.dtype]).reshape(shape), dtype=self.dtype)
            project_stored(
                self._kernels,
                stored,
                stored,
                segments=self._segments,
                residual_axis=1,
                strength=self.projection.strength,
                preserve_norms=self.projection.preserve_norms,
                before=before,
            )
        if not math.isfinite(before.total_squared):
            raise CheckpointError(f"{self._original} holds NaN or infinite values; download the checkpoint again")
        return before

    def _project_with_torch(self, data: memoryview, shape: Sequence[int], worker: Worker, before: NormSums) -> None:
        import torch

        from abliterate.checkpoints.stored_tensors import TORCH_DTYPES
        from abliterate.formats.projection import project_out

        projection = self.projection
        stored = torch.frombuffer(data, dtype=TORCH_DTYPES[self.dtype]).view(*shape)
        moved = stored.to(projection.device)
        new = project_out(
            moved,
            directions=torch.from_numpy(projection.directions),
            residual_axis=1,
            strength=projection.strength,
            preserve_norms=projection.preserve_norms,
            out=moved,
            scratch=worker.scratch,
            before=before,
        )
        if new is not stored:
            stored.copy_(new)


class ProjectedBlocks(ComputedSegment):
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
        source: PlainFile,
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
        """See `ComputedSegment.check_bytes`: whole rows."""
        row_bytes = self._tensor.meter.row_length * PLAIN_DTYPES[self._tensor.dtype]
        return max(1, _METER_BYTES // row_bytes) * row_bytes

    def fills(self) -> Sequence[Fill]:
        """See `ComputedSegment.fills`: a task a block."""

        def fill_of(index: int, block: TensorBlock) -> Fill:
            return lambda target, worker: self._fill(index, block, target, worker)

        return [fill_of(index, block) for index, block in enumerate(self._blocks)]

    def check(self, written: memoryview, *, offset: int, worker: Worker) -> None:  # noqa: ARG002
        """See `ComputedSegment.check`."""
        rows = np.frombuffer(written, STORED[self._tensor.dtype]).reshape(-1, self._tensor.meter.row_length)
        self._tensor.meter.add(rows)
        self._sum_read += self._sum(written)

    def finish(self) -> None:
        """See `ComputedSegment.finish`."""
        if self._sum_read % (1 << 64) != sum(self._sums) % (1 << 64):
            raise changed_on_the_way(self._tensor.name)

    def _fill(self, index: int, block: TensorBlock, target: PlainFile, worker: Worker) -> None:
        buffer = block.read(self._source, worker.memory("block"), start=self._source_start)
        self.before[index] = self._tensor.project(buffer, block.shape, worker)
        self._sums[index] = self._sum(buffer)
        block.write(target, buffer, start=self._tensor_start)
        worker.traffic.read += block.nbytes
        worker.traffic.written += block.nbytes

    def _sum(self, data: memoryview) -> int:
        # A sum of words does not depend on their order, so blocks of columns and rows of the file have the same.
        return int(np.frombuffer(data, self._tensor.word).sum(dtype=np.int64))


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedEdit:
    """What is done to a quantised tensor.

    Attributes:
        path: The directory of the checkpoint it is read from.
        info: The tensor, with its encoding.
        projection: What is projected out of it; None decodes it and takes nothing out. `preserve_norms` counts only
            where it is dequantised, and `device` does not: the arithmetic is done on the CPU.
    """

    path: Path
    info: TensorInfo
    projection: Projection | None = None

    @property
    def encoding(self) -> Encoding:
        """How it is stored."""
        if self.info.encoding is None:
            raise TypeError(f"{self.info.name} is stored as it is")
        return self.info.encoding

    @property
    def _editable(self) -> EditableEncoding:
        if not isinstance(self.encoding, EditableEncoding):
            raise TypeError(f"{self.info.name}: the plan lets no such tensor be written again")
        return self.encoding

    @property
    def n_parts(self) -> int:
        """In how many parts it is made."""
        return len(encoded_parts(self.info))

    @property
    def part_bytes(self) -> list[int]:
        """Bytes of the codes of each part."""
        return [part.end - part.start for part in encoded_parts(self.info)]

    @property
    def plain_part_bytes(self) -> list[int]:
        """Bytes of each part once it is decoded."""
        return [part.plain_bytes for part in encoded_parts(self.info)]

    def stored(self, index: int) -> tuple[Tensor, list[Tensor]]:
        """Return codes and companions of one part as they are stored in the checkpoint."""
        from abliterate.checkpoints.stored_tensors import read_codes

        part = encoded_parts(self.info)[index]
        return read_codes(self.path, part.encoding or self.encoding)

    def decoded(self, index: int) -> Tensor:
        """Return one matrix in bfloat16, the directions projected out if there are any.

        Raises:
            CheckpointError: It holds NaN or infinite values.
        """
        import torch

        from abliterate.formats.projection import project_out

        try:
            numbers = self.encoding.decode(*self.stored(index)).bfloat16()
        except ValueError as error:
            raise self._damaged(str(error)) from error
        matrix = (numbers.T if self.encoding.turned else numbers).contiguous()
        if not bool(torch.isfinite(matrix).all()):
            raise self._damaged("it holds NaN or infinite values")
        if self.projection is None:
            return matrix
        return project_out(
            matrix,
            directions=torch.from_numpy(self.projection.directions),
            residual_axis=self.projection.residual_axis - len(self.info.shape) + 2,
            strength=self.projection.strength,
            preserve_norms=self.projection.preserve_norms,
            fused=self.projection.fused,
        )

    def refit(self, index: int, companion: int) -> Tensor:
        """Return one of the new companions, such as the scales, of one matrix."""
        directions, strength = self._made
        new = self._editable.refit(*self.stored(index), directions=directions, strength=strength)
        return new[companion]

    def edit(self, index: int) -> Tensor:
        """Return the new codes of one matrix.

        Raises:
            CheckpointError: It holds NaN or infinite values.
        """
        directions, strength = self._made
        try:
            return self._editable.requantize(*self.stored(index), directions=directions, strength=strength)
        except ValueError as error:
            raise self._damaged(str(error)) from error

    @property
    def _made(self) -> tuple[Tensor, float]:
        """The directions and the strength."""
        import torch

        if self.projection is None:
            raise TypeError(f"{self.info.name}: there is nothing to take out")
        return torch.from_numpy(self.projection.directions), self.projection.strength

    def _damaged(self, how: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path / self.info.shard}: tensor {self.encoding.codes.name}: {how}; download the checkpoint again"
        )


class MadeParts(ComputedSegment):
    """A tensor that is made part by part, such as the matrices of a stack: new codes or scales, or what they mean.

    Args:
        start: Where it begins in the new file.
        sizes: Bytes of each part.
        make: Index of a part -> the part, of the dtype that is stored.
        name: What the tensor is called in the new file, with the shard.
    """

    def __init__(self, *, start: int, sizes: Sequence[int], make: Callable[[int], Tensor], name: str) -> None:
        self._starts = [0, *itertools.accumulate(sizes)]
        super().__init__(start=start, end=start + self._starts[-1])
        self._make, self._name = make, name
        self._sums: list[int | None] = [None] * len(sizes)
        self._sum_read = 0

    def fills(self) -> Sequence[Fill]:
        """See `ComputedSegment.fills`: a task a part."""

        def fill_of(index: int) -> Fill:
            return lambda target, worker: self._fill(index, target, worker)

        return [fill_of(index) for index in range(len(self._sums))]

    def check(self, written: memoryview, *, offset: int, worker: Worker) -> None:  # noqa: ARG002
        """See `ComputedSegment.check`."""
        while written:
            index = bisect.bisect_right(self._starts, offset) - 1
            begins, ends = self._starts[index], self._starts[index + 1]
            part = written[: ends - offset]
            self._sum_read = zlib.crc32(part, 0 if offset == begins else self._sum_read)
            if offset + len(part) == ends and self._sum_read != self._sums[index]:
                raise changed_on_the_way(self._name)
            written, offset = written[len(part) :], offset + len(part)

    def _fill(self, index: int, target: PlainFile, worker: Worker) -> None:
        from abliterate.checkpoints.stored_tensors import tensor_bytes

        data = tensor_bytes(self._make(index))
        self._sums[index] = zlib.crc32(data)
        target.write(data, self.start + self._starts[index])
        worker.traffic.read += len(data)
        worker.traffic.written += len(data)
