"""The blocks of GGML, of which the tensors of a GGUF file are made, edited in the type that they have.

A row is cut into blocks of 32 or 256 entries. A block holds codes of a few bits and, for each entry, what its code is
multiplied with and what is added: number = factor * level + offset, or, where codes are no whole numbers, factor *
table[level]. Factors and offsets are stored in the block in many ways; all of them keep their bytes through an edit,
whose change is far below a step, and only codes are rounded anew. That needs no choice of new scales, and so no
encoder and no importance matrix.

Codes lie in planes: a run of bytes is shifted by each of some numbers of bits, one after the other, and some low bits
of the result are a part of as many entries' codes. The layouts are those of ggml-common.h, and what is decoded here is
what the package `gguf` decodes, bit for bit.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from abliterate.checkpoints.encoding import EditableEncoding
from abliterate.checkpoints.safetensors_file import TensorInfo
from abliterate.formats.block_scaled import BlockLayout, Grid, round_levels
from abliterate.formats.format_int import WHOLE

# Entries that are unpacked at a time, and at most in one part of a tensor that is made by itself.
_CHUNK_ENTRIES = 1 << 22
_PART_ENTRIES = 1 << 24


def _cut(tensor: Tensor, *sizes: int) -> Tensor:
    """Return a tensor whose last axis is cut into pieces of these sizes, in as many axes more."""
    return tensor.reshape(*tensor.shape[:-1], -1, *sizes)


@dataclass(frozen=True, slots=True)
class Plane:
    """Some bits of each entry's code.

    Attributes:
        start: First byte in the block.
        length: Bytes.
        run: Bytes that are shifted together, whose entries follow each other.
        shifts: By how many bits, one after the other.
        bits: How many low bits count.
        up: Where in the code they go.
    """

    start: int
    length: int
    run: int
    shifts: tuple[int, ...]
    bits: int
    up: int = 0

    def read(self, blocks: Tensor) -> Tensor:
        """Return this part of the codes, int16 [..., entries of a block]."""
        stored = blocks[..., self.start : self.start + self.length].short()
        runs = _cut(stored, 1, self.run)
        shifts = torch.tensor(self.shifts, dtype=torch.int16).unsqueeze(-1)
        return ((runs >> shifts) & ((1 << self.bits) - 1)).flatten(-3) << self.up

    def write(self, blocks: Tensor, codes: Tensor) -> None:
        """Put this part of codes into blocks, in place; bits that are no plane's stay."""
        place = blocks[..., self.start : self.start + self.length]
        ours, mask = torch.zeros(place.shape, dtype=torch.int16), 0
        parts = (codes >> self.up) & ((1 << self.bits) - 1)
        parts = _cut(parts, len(self.shifts), self.run)
        for index, shift in enumerate(self.shifts):
            ours |= parts[..., index, :].flatten(-2) << shift
            mask |= ((1 << self.bits) - 1) << shift
        place.copy_((place.short() & ~mask | ours).to(torch.uint8))


@dataclass(frozen=True, slots=True)
class _Table(Grid):
    """Codes that stand for the numbers of a table, one each; a level is the place of a number in order."""

    table: tuple[float, ...]

    magnitudes: ClassVar[Tensor] = torch.empty(0)
    most_left: ClassVar[float] = 0.05

    @property
    def _ordered(self) -> Tensor:
        return torch.tensor(sorted(self.table), dtype=torch.float32)

    @property
    def _places(self) -> Tensor:
        """The level of each code."""
        order = torch.tensor(self.table).argsort(stable=True)
        return torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))

    def levels(self, codes: Tensor) -> Tensor:
        return self._places[codes.long()].short()

    def codes(self, levels: Tensor) -> Tensor:
        return self._places.argsort()[levels.long()].short()

    def replaced(self, codes: Tensor, levels: Tensor) -> Tensor:  # noqa: ARG002
        return self.codes(levels)

    def numbers(self, levels: Tensor) -> Tensor:
        return self._ordered[levels.long()]

    def nearest(self, values: Tensor) -> Tensor:
        ordered = self._ordered
        return torch.bucketize(values.contiguous(), (ordered[1:] + ordered[:-1]) / 2).short()


Scales = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockType:
    """A type of blocks.

    Attributes:
        name: As GGML calls it.
        size: Entries of a block.
        nbytes: Bytes of a block.
        share: Entries that have the same factor and offset.
        planes: Where the codes are.
        scales: Blocks -> factors and offsets, float32 [..., size / share]; None: no offsets.
        zero: The code that means 0, where codes are whole numbers.
        flip: Bits of the code that are stored the other way round.
        table: What codes mean, where they are no whole numbers.
    """

    name: str
    size: int
    nbytes: int
    share: int
    planes: tuple[Plane, ...]
    scales: Scales
    zero: int = 0
    flip: int = 0
    table: tuple[float, ...] | None = None

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return sum(plane.bits for plane in self.planes)

    @property
    def grid(self) -> Grid:
        """What levels mean."""
        return WHOLE if self.table is None else _Table(self.table)

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the greatest level."""
        # Of eight bits the one number without an opposite is left out, as GGML's own rounding leaves it out.
        return -self.zero + (self.bits == 8), (1 << self.bits) - 1 - self.zero

    def levels(self, blocks: Tensor) -> Tensor:
        """Return the levels in blocks [..., n, nbytes]: int16 [..., n * size]."""
        codes = self.planes[0].read(blocks)
        for plane in self.planes[1:]:
            codes |= plane.read(blocks)
        codes = codes.flatten(-2)
        return (codes ^ self.flip) - self.zero if self.table is None else self.grid.levels(codes)

    def replaced(self, blocks: Tensor, levels: Tensor) -> Tensor:
        """Return blocks that differ in their levels alone."""
        codes = (levels + self.zero) ^ self.flip if self.table is None else self.grid.codes(levels)
        codes, new = _cut(codes, self.size), blocks.clone()
        for plane in self.planes:
            plane.write(new, codes)
        return new

    def numbers(self, blocks: Tensor) -> Tensor:
        """Return what blocks [..., n, nbytes] mean, float32 [..., n * size]."""
        factors, offsets = self.scales(blocks)
        numbers = self.grid.numbers(self.levels(blocks)) * self._spread(factors)
        return numbers if offsets is None else numbers + self._spread(offsets)

    def _spread(self, of_shares: Tensor) -> Tensor:
        return of_shares.flatten(-2).repeat_interleave(self.share, dim=-1)


def _half(blocks: Tensor, at: int) -> Tensor:
    return blocks[..., at : at + 2].contiguous().view(torch.float16).float()


def _one(blocks: Tensor) -> tuple[Tensor, None]:
    return _half(blocks, 0), None


def _one_and_offset(blocks: Tensor) -> tuple[Tensor, Tensor]:
    return _half(blocks, 0), _half(blocks, 2)


def _of_q2_k(blocks: Tensor) -> tuple[Tensor, Tensor]:
    stored = blocks[..., :16]
    return _half(blocks, 80) * (stored & 15).float(), -(_half(blocks, 82) * (stored >> 4).float())


def _of_q3_k(blocks: Tensor) -> tuple[Tensor, None]:
    low, high = blocks[..., 96:104], blocks[..., 104:108]
    low = torch.cat([low & 15, low >> 4], dim=-1)
    high = torch.cat([(high >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1)
    return _half(blocks, 108) * ((low | high << 4).float() - 32), None


def _of_q4_and_q5_k(blocks: Tensor) -> tuple[Tensor, Tensor]:
    first, second, third = (blocks[..., at : at + 4] for at in (4, 8, 12))
    scales = torch.cat([first & 63, (third & 15) | ((first >> 2) & 48)], dim=-1)
    least = torch.cat([second & 63, (third >> 4) | ((second >> 2) & 48)], dim=-1)
    return _half(blocks, 0) * scales.float(), -(_half(blocks, 2) * least.float())


def _of_q6_k(blocks: Tensor) -> tuple[Tensor, None]:
    return _half(blocks, 208) * blocks[..., 192:208].contiguous().view(torch.int8).float(), None


def _of_iq4_xs(blocks: Tensor) -> tuple[Tensor, None]:
    high, low = blocks[..., 2:4].int(), blocks[..., 4:8]
    low = torch.stack([low & 15, low >> 4], dim=-1).flatten(-2)
    word = high[..., :1] | high[..., 1:] << 8
    high = torch.cat([(word >> shift) & 3 for shift in range(0, 16, 2)], dim=-1)
    return _half(blocks, 0) * ((low.int() | high << 4) - 32).float(), None


def _of_mxfp4(blocks: Tensor) -> tuple[Tensor, None]:
    return torch.exp2(blocks[..., :1].float() - 128), None


_NIBBLES, _PAIRS, _EACH = (0, 4), (0, 2, 4, 6), tuple(range(8))
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# Twice the numbers of e2m1, as the factors are half of what their exponents say.
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, -0.0, -1, -2, -3, -4, -6, -8, -12)


_SMALL = functools.partial(BlockType, size=32, share=32)
_LARGE = functools.partial(BlockType, size=256)
# By the number that a GGUF file gives them.
BLOCK_TYPES = {
    2: _SMALL(name="Q4_0", nbytes=18, planes=(Plane(2, 16, 16, _NIBBLES, 4),), scales=_one, zero=8),
    3: _SMALL(name="Q4_1", nbytes=20, planes=(Plane(4, 16, 16, _NIBBLES, 4),), scales=_one_and_offset),
    6: _SMALL(
        name="Q5_0",
        nbytes=22,
        planes=(Plane(6, 16, 16, _NIBBLES, 4), Plane(2, 4, 1, _EACH, 1, up=4)),
        scales=_one,
        zero=16,
    ),
    7: _SMALL(
        name="Q5_1",
        nbytes=24,
        planes=(Plane(8, 16, 16, _NIBBLES, 4), Plane(4, 4, 1, _EACH, 1, up=4)),
        scales=_one_and_offset,
    ),
    8: _SMALL(name="Q8_0", nbytes=34, planes=(Plane(2, 32, 32, (0,), 8),), scales=_one, zero=128, flip=128),
    10: _LARGE(name="Q2_K", nbytes=84, share=16, planes=(Plane(16, 64, 32, _PAIRS, 2),), scales=_of_q2_k),
    11: _LARGE(
        name="Q3_K",
        nbytes=110,
        share=16,
        planes=(Plane(32, 64, 32, _PAIRS, 2), Plane(0, 32, 32, _EACH, 1, up=2)),
        scales=_of_q3_k,
        zero=4,
    ),
    12: _LARGE(name="Q4_K", nbytes=144, share=32, planes=(Plane(16, 128, 32, _NIBBLES, 4),), scales=_of_q4_and_q5_k),
    13: _LARGE(
        name="Q5_K",
        nbytes=176,
        share=32,
        planes=(Plane(48, 128, 32, _NIBBLES, 4), Plane(16, 32, 32, _EACH, 1, up=4)),
        scales=_of_q4_and_q5_k,
    ),
    14: _LARGE(
        name="Q6_K",
        nbytes=210,
        share=16,
        planes=(Plane(0, 128, 64, _NIBBLES, 4), Plane(128, 64, 32, _PAIRS, 2, up=4)),
        scales=_of_q6_k,
        zero=32,
    ),
    20: _SMALL(name="IQ4_NL", nbytes=18, planes=(Plane(2, 16, 16, _NIBBLES, 4),), scales=_one, table=_IQ4),
    23: _LARGE(
        name="IQ4_XS", nbytes=136, share=32, planes=(Plane(8, 128, 16, _NIBBLES, 4),), scales=_of_iq4_xs, table=_IQ4
    ),
    39: _SMALL(name="MXFP4", nbytes=17, planes=(Plane(1, 16, 16, _NIBBLES, 4),), scales=_of_mxfp4, table=_E2M1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GgmlEncoding(EditableEncoding):
    """See `Encoding`: codes are the blocks, uint8 [..., rows, blocks of a row, bytes], and there are no companions.

    Attributes:
        kind: Their type.
        turned: Whether rows are vectors of the residual stream, as those of an embedding are.
    """

    kind: BlockType
    companions: tuple[TensorInfo, ...] = ()

    @property
    def stored_dtype(self) -> str:
        """See `Encoding.stored_dtype`."""
        return self.kind.name

    def parts(self, shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], Self]]:
        """See `Encoding.parts`; of an embedding, whose tokens are edited one by one, some tokens are a part."""
        if len(shape) != 2 or not self.turned:
            return EditableEncoding.parts(self, shape)
        rows, width = shape
        at_once, row = max(1, _PART_ENTRIES // width), (self.codes.end - self.codes.start) // max(1, rows)
        found: list[tuple[tuple[int, ...], Self]] = []
        for first in range(0, rows, at_once):
            n_rows = min(at_once, rows - first)
            start = self.codes.start + first * row
            codes = replace(self.codes, shape=(n_rows, *self.codes.shape[1:]), start=start, end=start + n_rows * row)
            found.append(((n_rows, width), replace(self, codes=codes)))
        return found

    def decode(self, codes: Tensor, companions: Sequence[Tensor]) -> Tensor:  # noqa: ARG002
        """See `Encoding.decode`."""
        numbers = self.kind.numbers(codes)
        return numbers.transpose(-1, -2) if self.turned else numbers

    def refit(
        self,
        codes: Tensor,  # noqa: ARG002
        companions: Sequence[Tensor],  # noqa: ARG002
        *,
        directions: Tensor,  # noqa: ARG002
        strength: float,  # noqa: ARG002
    ) -> tuple[Tensor, ...]:
        """See `EditableEncoding.refit`; there are none."""
        return ()

    def requantize(
        self,
        codes: Tensor,
        companions: Sequence[Tensor],  # noqa: ARG002
        *,
        directions: Tensor,
        strength: float,
    ) -> Tensor:
        """See `EditableEncoding.requantize`."""
        new = torch.empty_like(codes)
        # Vectors of the stream are whole in each chunk: some tokens of an embedding, or some blocks of every row.
        axis = 0 if self.turned else 1
        width = max(1, _CHUNK_ENTRIES // max(1, codes.shape[1 - axis] * self.kind.size))
        for first in range(0, codes.shape[axis], width):
            part = codes.narrow(axis, first, min(width, codes.shape[axis] - first))
            new.narrow(axis, first, part.shape[axis]).copy_(self._rounded(part, directions, strength))
        return new

    def _rounded(self, blocks: Tensor, directions: Tensor, strength: float) -> Tensor:
        kind = self.kind
        levels = kind.levels(blocks)
        factors, offsets = kind.scales(blocks)
        factors, offsets = factors.flatten(-2), None if offsets is None else offsets.flatten(-2)
        block = (1, kind.share)
        if self.turned:
            levels, factors, block = levels.T.contiguous(), factors.T.contiguous(), (kind.share, 1)
            offsets = None if offsets is None else offsets.T.contiguous()
        low, high = (torch.full(factors.shape, each, dtype=torch.int16) for each in kind.limits)
        rounded = round_levels(
            levels,
            factors,
            factors,
            layout=BlockLayout(grid=kind.grid, block=block),
            directions=directions,
            strength=strength,
            bounds=(low, high),
            offsets=offsets,
        ).levels
        return kind.replaced(blocks, rounded.T.contiguous() if self.turned else rounded)

    def largest_residue(self, *, d_model: int, k: int, along: float, norm: float) -> float:
        """See `EditableEncoding.largest_residue`."""
        share = 0.005 if self.kind.bits == 8 else WHOLE.most_left
        return share * max(along, math.sqrt(k / d_model) * norm)
