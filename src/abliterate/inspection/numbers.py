"""Two stored tensors read side by side: their bytes, and their numbers in blocks of rows, whatever they are stored as.

Memory is that of a block, but for what is stored in few bits, of which a part (a matrix of a stack, some rows of an
embedding) is decoded at a time.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from abliterate.checkpoints.file_ranges import became_shorter, is_filled
from abliterate.checkpoints.safetensors_file import TensorInfo, encoded_parts
from abliterate.errors import CheckpointError
from abliterate.formats.segments import STORED
from abliterate.inspection.ahead import Ahead

Array = NDArray[Any]

# Two buffers of a thread that stay in its cache; larger ones are slower.
CHUNK_BYTES = 1 << 18
# Entries of a block: half a MiB of float32, of either side, for the same reason.
BLOCK_ENTRIES = 1 << 17
# Bits behind the leading one; what is stored otherwise has a grid of its own.
MANTISSA_BITS = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7, "F8_E4M3": 3, "F8_E5M2": 2}
# Below the smallest normal number, steps have one size; it matters where the range is narrow.
_LEAST_STEPS = {"F16": 2.0**-24, "F8_E4M3": 2.0**-9, "F8_E5M2": 2.0**-16}
_EXPONENT = 0x7F800000
# What each is read as; of what numpy has no numbers for, the bits.
_PLAIN = STORED | {"F8_E4M3": "u1", "F8_E5M2": "u1"}


def is_numbers(info: TensorInfo) -> bool:
    """Return whether a tensor holds floating-point numbers, plain or encoded."""
    return info.encoding is not None or info.dtype in _PLAIN


def bits_per_number(info: TensorInfo) -> float:
    """Return how many bits of the file a number takes, scales and all."""
    stored = (info,) if info.encoding is None else info.encoding.stored
    return 8 * sum(each.end - each.start for each in stored) / max(1, math.prod(info.shape))


class ByteComparer:
    """Compares byte ranges of files; one thread's, with buffers of its own."""

    def __init__(self) -> None:
        self._buffers = bytearray(CHUNK_BYTES), bytearray(CHUNK_BYTES)

    def same(self, old: tuple[Path, TensorInfo], new: tuple[Path, TensorInfo]) -> bool:
        """Return whether two stored tensors, each of a directory, have the same bytes, dtype and shape."""
        (old_path, old_info), (new_path, new_info) = old, new
        if (old_info.encoding is None) != (new_info.encoding is None):
            return False
        pairs = [(old_info, new_info)]
        if old_info.encoding is not None and new_info.encoding is not None:
            if type(old_info.encoding) is not type(new_info.encoding):
                return False
            pairs = list(zip(old_info.encoding.stored, new_info.encoding.stored, strict=False))
        return all(
            (one.dtype, one.shape) == (other.dtype, other.shape) and self._same_range(old_path, one, new_path, other)
            for one, other in pairs
        )

    def _same_range(self, old_path: Path, old: TensorInfo, new_path: Path, new: TensorInfo) -> bool:
        left = old.end - old.start
        if left != new.end - new.start:
            return False
        paths = old_path / old.shard, new_path / new.shard
        try:
            with paths[0].open("rb", buffering=0) as first, paths[1].open("rb", buffering=0) as second:
                first.seek(old.start)
                second.seek(new.start)
                ahead = [Ahead(file.fileno(), info.start, info.end) for file, info in ((first, old), (second, new))]
                while left:
                    size = min(left, CHUNK_BYTES)
                    for each in ahead:
                        each.ask(each.end - left)
                    # Whole buffers are compared by the C library; a shorter last part through copies.
                    views = [memoryview(buffer)[:size] for buffer in self._buffers]
                    for file, view, path in zip((first, second), views, paths, strict=True):
                        if not is_filled(file, view):
                            raise became_shorter(path)
                    whole = size == CHUNK_BYTES
                    if (self._buffers[0] != self._buffers[1]) if whole else (bytes(views[0]) != bytes(views[1])):
                        return False
                    left -= size
        except OSError as error:
            raise CheckpointError(f"{error.filename or paths[1]}: cannot be read: {error.strerror or error}") from error
        return True


class StoredMatrix:
    """One matrix of a checkpoint, whose rows are read in order, as often as is asked for."""

    def __init__(self, directory: Path, info: TensorInfo) -> None:
        """Take a tensor of two axes."""
        self.directory, self.info = directory, info
        self.shape: tuple[int, int] = (info.shape[0], info.shape[1])

    def blocks(self, rows: int, *, every: int = 1) -> Iterator[Array]:
        """Yield its rows in float32, so many at a time, or every so many of such blocks; each time the same memory."""
        if self.info.encoding is not None:
            for index, block in enumerate(self._decoded(rows)):
                if index % every == 0:
                    yield block
            return
        wide = np.empty((rows, self.shape[1]), np.float32)
        for stored in self.stored(rows, every=every):
            yield widen(stored, self.info.dtype, out=wide[: len(stored)])

    def stored(self, rows: int, *, every: int = 1) -> Iterator[Array]:
        """Yield the same as it is stored, if that is plain; of what numpy has no numbers for, the bits."""
        cols = self.shape[1]
        row_bytes = (self.info.end - self.info.start) // max(1, self.shape[0])
        raw = bytearray(rows * row_bytes)
        path = self.directory / self.info.shard
        try:
            with path.open("rb", buffering=0) as file:
                ahead = Ahead(file.fileno(), self.info.start, self.info.end)
                for first in range(0, self.shape[0], rows * every):
                    position = self.info.start + first * row_bytes
                    file.seek(position)
                    if every == 1:
                        ahead.ask(position)
                    count = min(rows, self.shape[0] - first)
                    if not is_filled(file, memoryview(raw)[: count * row_bytes]):
                        raise became_shorter(path)
                    yield np.frombuffer(raw, _PLAIN[self.info.dtype], count=count * cols).reshape(count, cols)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error

    def _decoded(self, rows: int) -> Iterator[Array]:
        """Yield blocks of what is decoded part by part; a block may lie in two parts."""
        from abliterate.checkpoints.stored_tensors import read_tensor

        rest: list[Array] = []
        for part in encoded_parts(self.info):
            rest.append(read_tensor(self.directory, part).reshape(-1, self.shape[1]).numpy())
            held = np.concatenate(rest) if len(rest) > 1 else rest[0]
            n_whole = len(held) // rows * rows
            yield from (held[first : first + rows] for first in range(0, n_whole, rows))
            rest = [held[n_whole:]] if n_whole < len(held) else []
        yield from rest


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixPair:
    """Two matrices of the same shape.

    Attributes:
        old: The base's.
        new: The model's.
        name: The tensor's in the model, for messages.
        every: Of its blocks every so many are read, for a part of the matrix.
        at_once: Rows of a block; None: as many as fit the cache.
    """

    old: StoredMatrix
    new: StoredMatrix
    name: str
    every: int = 1
    at_once: int | None = None

    @property
    def rows_at_once(self) -> int:
        """Rows of a block."""
        rows, columns = self.shape
        if self.at_once is not None:
            return self.at_once
        return max(1, min(rows, BLOCK_ENTRIES // max(1, columns)))

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.new.shape

    def blocks(self) -> Iterator[tuple[slice, Array, Array]]:
        """Yield rows, W of the base and D = W' - W of these rows, float32; the memory is used again."""
        at_once = self.rows_at_once
        both = (side.blocks(at_once, every=self.every) for side in (self.old, self.new))
        for index, (old, new) in enumerate(zip(*both, strict=True)):
            first = index * at_once * self.every
            part = slice(first, first + len(old))
            yield part, old, np.subtract(new, old, out=new if self.new.info.encoding is None else None)

    def stored(self) -> Iterator[tuple[slice, Array, Array]]:
        """Yield rows, W and W' of these rows as both are stored, if that is plain; the memory is used again."""
        at_once = self.rows_at_once
        first = 0
        for old, new in zip(*(side.stored(at_once) for side in (self.old, self.new)), strict=True):
            yield slice(first, first + len(old)), old, new
            first += len(old)


def matrices_of(old: TensorInfo, new: TensorInfo, *, old_directory: Path, new_directory: Path) -> list[MatrixPair]:
    """Return a pair of tensors as pairs of matrices: of a stack each; what has one axis is one row."""
    pair = partial(MatrixPair, name=new.name)
    found = []
    for one, other in zip(_matrices(old), _matrices(new), strict=True):
        found.append(pair(old=StoredMatrix(old_directory, one), new=StoredMatrix(new_directory, other)))
    return found


def _matrices(info: TensorInfo) -> list[TensorInfo]:
    shape = info.shape
    if len(shape) == 2:
        return [info]
    if len(shape) < 2 or (len(shape) > 3 and info.encoding is None):
        rows = shape[0] if len(shape) > 3 else 1
        return [replace(info, shape=(rows, math.prod(shape) // max(1, rows)))]
    if info.encoding is not None:
        return encoded_parts(info)
    count = shape[0]
    size = (info.end - info.start) // max(1, count)
    starts = [info.start + index * size for index in range(count)]
    return [replace(info, shape=shape[1:], start=start, end=start + size) for start in starts]


def widen(stored: Array, dtype: str, *, out: Array | None = None) -> Array:
    """Return stored numbers in float32.

    Args:
        stored: As `StoredMatrix.stored` yields them.
        dtype: What they are stored as, as safetensors names it.
        out: Where to put them, contiguous; None makes new memory.
    """
    wide = np.empty(stored.shape, np.float32) if out is None else out
    if dtype == "BF16":
        np.left_shift(stored, 16, out=wide.view(np.uint32), dtype=np.uint32)
    elif dtype in STORED:
        np.copyto(wide, stored, casting="same_kind")
    else:
        np.take(_numbers_of_a_byte(dtype), stored, out=wide)
    return wide


@cache
def _numbers_of_a_byte(dtype: str) -> Array:
    """Return what each byte is in a dtype of eight bits, float32."""
    import torch

    names = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
    numbers: Array = torch.arange(256, dtype=torch.uint8).view(getattr(torch, names[dtype])).float().numpy()
    return numbers


def steps(values: Array, dtype: str) -> Array:
    """Return how far apart neighbours of a floating dtype are at each of some float32 numbers."""
    # The exponent alone, as a number: a power of two, or 0 where that is below float32's range.
    powers = (np.ascontiguousarray(values).view(np.int32) & _EXPONENT).view(np.float32)
    powers *= 2.0 ** -MANTISSA_BITS[dtype]
    return np.maximum(powers, np.float32(_LEAST_STEPS.get(dtype, 0.0)), out=powers)


# Rows and columns that are looked at, and how many magnitudes there may be among them, or in one row.
_LOOKED_AT, _EIGHT_BITS, _FOUR_BITS = 128, 140, 17


def has_few_levels(pair: MatrixPair) -> int | None:
    """Return 8 or 4 where the model's numbers lie on a grid of so few bits, and the base's do not; else None.

    Seen are grids of 8 bits with a scale for a matrix or a block of it, and of 4 bits with one for a group of a row.
    """
    at_once = min(_LOOKED_AT, pair.shape[0])
    corners = [np.abs(next(side.blocks(at_once))[:, :_LOOKED_AT]) for side in (pair.old, pair.new)]
    if corners[0].size < _LOOKED_AT**2 // 2:
        return None
    whole = [len(np.unique(corner)) for corner in corners]
    if whole[1] <= _EIGHT_BITS < whole[0]:
        in_rows = sum(len(np.unique(row)) for row in corners[1]) / len(corners[1])
        return 4 if in_rows <= _FOUR_BITS else 8
    lines = [sum(len(np.unique(row)) for row in corner) / len(corner) for corner in corners]
    return 4 if lines[1] <= _FOUR_BITS < lines[0] else None
