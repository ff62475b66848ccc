"""Cutting a stored tensor into blocks that fit into memory, each with whole vectors along the residual axis.

Where the residual axis is the last, such vectors lie in one piece and a block is one range of the file. Where it is
not, a block of columns is `d_model` pieces, one a row; unless the matrix is small enough to be a block itself.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from abliterate.checkpoints.file_ranges import AlignedMemory, SourceFile, TargetFile
from abliterate.checkpoints.safetensors_file import TORCH_DTYPES, TensorInfo
from abliterate.projection import block_width

# What is held of a tensor at a time, as it is stored: what is one range of the file, little enough to stay in the cache
# from being read to being written; columns, enough of them that a row's part is not too short to be read by itself.
# It must not depend on the number of workers: it decides together with `projection.block_width` which vectors are
# rounded together.
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

    def read(self, file: SourceFile, memory: AlignedMemory, *, start: int) -> memoryview:
        """Return the bytes of the block of the tensor that starts at byte `start` of a file; they lie in `memory`."""
        if self.n_pieces == 1:
            return file.read(start + self.offset, self.nbytes, memory)
        buffer = memory.take(self.nbytes)
        for at, position in self._pieces(start):
            file.read_into(buffer[at : at + self.piece_bytes], position)
        return buffer

    def write(self, file: TargetFile, data: memoryview, *, start: int) -> None:
        """Write the block into the tensor that starts at byte `start` of a file."""
        for at, position in self._pieces(start):
            file.write(data[at : at + self.piece_bytes], position)

    def _pieces(self, start: int) -> Iterator[tuple[int, int]]:
        for piece in range(self.n_pieces):
            yield piece * self.piece_bytes, start + self.offset + piece * self.stride_bytes


def blocks_of(info: TensorInfo, *, residual_axis: int, budget: int = BLOCK_BYTES) -> tuple[TensorBlock, ...]:
    """Cut a tensor into blocks of at most `budget` bytes; more only if that does not hold `block_width` vectors.

    Args:
        info: The tensor; it must have a floating-point dtype.
        residual_axis: The axis that indexes the residual stream.
        budget: Bytes a block may have.
    """
    axis = residual_axis % len(info.shape)
    d_model = info.shape[axis]
    n_matrices, n_columns = math.prod(info.shape[:axis]), math.prod(info.shape[axis + 1 :])
    item = TORCH_DTYPES[info.dtype].itemsize
    if not d_model * n_matrices * n_columns:
        return ()
    width = block_width(d_model)

    def n_vectors(nbytes: int) -> int:
        return max(width, nbytes // (d_model * item) // width * width)

    at_once = min(budget, RANGE_BYTES)
    if n_columns == 1:
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
