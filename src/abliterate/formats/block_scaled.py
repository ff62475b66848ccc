"""Weights stored in eight or four bits with scales: decoded, and edited so that rounding does not undo the edit.

A stored matrix is codes, each of a sign and a magnitude, and a scale for each block of them: for 128 x 128 entries, a
row, or the whole tensor (FP8, e4m3), or for 32 entries of a row (MXFP4: e2m1, two codes a byte, and the exponents of
powers of two as scales).

The change that takes a direction out of a column is far less than half a step of such a grid, so plain rounding takes
most of it back: at d_model 4096 it leaves 0.4 of the component in FP8 and more than 0.9 in MXFP4. Here rounding is fed
back first, as in `projection`: T <- T - U^T (U Q - wanted), Q <- round(T), the best Q kept for each column. What that
leaves is about the smallest effect of a single step, so single entries are then moved to a neighbour on the grid, in
each column the one that takes most away, until next to nothing is left.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from abliterate.checkpoints.encoding import EditableEncoding

# Elements of a matrix that are worked on at a time: 4 MiB of float32.
_BLOCK_ELEMENTS = 1 << 20
_MOST_ROUNDS = 60
_LEAST_GAIN = 0.1
# Columns that are then so many times their goal away are searched for.
_FAR = 50

# Of a column at most 24 entries are moved, and at most one in 16: each moves by a whole step of the grid.
_MOST_STEPS = 24
_LARGEST_MOVED_SHARE = 1 / 16
# Steps end in a column when what is left is this share of a random column's component.
_TOLERANCE = 2e-5

_EXPONENT_BIAS = 127


@dataclass(frozen=True, slots=True)
class Grid(ABC):
    """The numbers that a code can stand for, before its scale, and how codes lie in a stored matrix.

    A level is a signed magnitude, int16: 0 for both zeros, 1 for the least positive number, -1 for its negative.

    Attributes:
        magnitudes: The numbers from 0 up, so that level i is the i-th of them.
        most_left: What share of a component may survive requantising; what does is far less, but for matrices of a few
            dozen rows.
    """

    magnitudes: ClassVar[Tensor]
    most_left: ClassVar[float]

    @abstractmethod
    def levels(self, codes: Tensor) -> Tensor:
        """Return the levels, [..., rows, columns], of codes as they are stored."""

    @abstractmethod
    def codes(self, levels: Tensor) -> Tensor:
        """Return levels as they are stored."""

    @abstractmethod
    def replaced(self, codes: Tensor, levels: Tensor) -> Tensor:
        """Return levels as they are stored; an entry that stays keeps its code, since there are two zeros."""

    @abstractmethod
    def nearest(self, values: Tensor) -> Tensor:
        """Return the level of the nearest number of the grid, ties to the even one; beyond its end, the last."""

    def numbers(self, levels: Tensor) -> Tensor:
        """Return the numbers of levels, float32; NaN for a code beyond the last magnitude."""
        magnitudes = self.magnitudes.to(levels.device)
        table = torch.cat([-magnitudes[1:].flip(0), magnitudes])
        beyond = levels.abs() >= len(magnitudes)
        found = table[(levels.long() + len(magnitudes) - 1).clamp(0, len(table) - 1)]
        return torch.where(beyond, torch.nan, found)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLayout:
    """How a matrix is stored.

    Attributes:
        grid: What its codes mean.
        block: Rows and columns that share a scale.
        power_of_two: Whether scales are powers of two; of dtype uint8 they are then biased exponents.
    """

    grid: Grid
    block: tuple[int, int]
    power_of_two: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockEncoding(EditableEncoding):
    """See `Encoding`: codes of a grid, and one companion, the scales of the blocks."""

    layout: BlockLayout

    def decode(self, codes: Tensor, companions: Sequence[Tensor]) -> Tensor:
        """See `Encoding.decode`."""
        return decode(codes, companions[0], layout=self.layout)

    def refit(
        self, codes: Tensor, companions: Sequence[Tensor], *, directions: Tensor, strength: float
    ) -> tuple[Tensor, ...]:
        """See `EditableEncoding.refit`."""
        return (refitted_scales(codes, companions[0], layout=self.layout, directions=directions, strength=strength),)

    def requantize(self, codes: Tensor, companions: Sequence[Tensor], *, directions: Tensor, strength: float) -> Tensor:
        """See `EditableEncoding.requantize`."""
        return requantize(codes, companions[0], layout=self.layout, directions=directions, strength=strength).codes

    def largest_residue(self, *, d_model: int, k: int, along: float, norm: float) -> float:
        """See `EditableEncoding.largest_residue`; W counts as having no less of U than a random weight has."""
        return self.layout.grid.most_left * max(along, math.sqrt(k / d_model) * norm)


@dataclass(frozen=True, slots=True, kw_only=True)
class Requantized:
    """An edited matrix as it is stored, and how much of the directions it has; Frobenius norms in float64.

    Attributes:
        codes: Of the shape and dtype of the old ones.
        scales: The same; only those of blocks whose values do not fit any more differ.
        before: |U W| and |W| of the decoded old matrix.
        after: |U W'| and |W'| of the decoded new one.
    """

    codes: Tensor
    scales: Tensor
    before: tuple[float, float]
    after: tuple[float, float]


def decode(codes: Tensor, scales: Tensor, *, layout: BlockLayout) -> Tensor:
    """Return the numbers that are stored, float32.

    Args:
        codes: [..., rows, columns], or as the grid packs them.
        scales: [..., block rows, block columns], or one number for each matrix.
        layout: How they are stored.
    """
    levels = layout.grid.levels(codes)
    factors = _scale_numbers(scales, layout).reshape(*levels.shape[:-2], *_scale_shape(levels, layout))
    rows, columns = _block_indices(levels.shape[-2], levels.shape[-1], layout)
    return layout.grid.numbers(levels) * factors[..., rows, :][..., columns]


def encode(values: Tensor, *, layout: BlockLayout, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantise a matrix anew: each block's scale such that its largest entry fits, each entry to the nearest code.

    Args:
        values: [rows, columns]; for MXFP4 the columns must fill whole groups.
        layout: How it is to be stored.
        scale_dtype: Of the scales; uint8 for biased exponents.

    Returns:
        Codes and scales, as `decode` takes them.
    """
    wide = values.float()
    largest = _largest_in_blocks(wide, layout)
    scales = _store_scales(_needed_scales(largest, layout), layout, scale_dtype)
    rows, columns = _block_indices(wide.shape[0], wide.shape[1], layout)
    factors = _scale_numbers(scales, layout)[rows, :][:, columns]
    return layout.grid.codes(layout.grid.nearest(wide / factors)), scales


def refitted_scales(
    codes: Tensor, scales: Tensor, *, layout: BlockLayout, directions: Tensor, strength: float = 1.0
) -> Tensor:
    """Return the scales that `requantize` stores: the old ones but for blocks that the edited values do not fit.

    Args:
        codes: One matrix, [d_model, n] or [d_model, groups, bytes].
        scales: Its scales.
        layout: How they are stored.
        directions: U, [k, d_model], orthonormal rows.
        strength: Share of the component that is removed.
    """
    levels = layout.grid.levels(codes)
    old = _scale_numbers(scales, layout).reshape(_scale_shape(levels, layout))
    largest = torch.zeros_like(old)
    for chunk in _Chunk.cut(levels, old, layout):
        exact, _ = _projected(chunk.values, directions, strength)
        chunk.gather_largest(exact, largest)
    magnitudes = layout.grid.magnitudes
    # What rounds to the greatest magnitude still fits.
    limit = magnitudes[-1] + (magnitudes[-1] - magnitudes[-2]) / 2
    fits = largest <= limit * old
    needed = _store_scales(_needed_scales(largest, layout), layout, scales.dtype)
    return torch.where(
        fits.reshape(scales.shape), scales.view(_bits(scales)), needed.reshape(scales.shape).view(_bits(scales))
    ).view(scales.dtype)


def requantize(
    codes: Tensor, scales: Tensor, *, layout: BlockLayout, directions: Tensor, strength: float = 1.0
) -> Requantized:
    """Project directions out of a stored matrix and store it again in the same layout.

    Args:
        codes: One matrix whose rows index the residual stream: [d_model, n] or [d_model, groups, bytes].
        scales: Its scales.
        layout: How they are stored.
        directions: U, [k, d_model], orthonormal rows.
        strength: Share of the component that is removed.

    Raises:
        ValueError: It holds NaN or infinite values, or scales that are no powers of two where they must be.
    """
    if (
        layout.power_of_two
        and scales.dtype != torch.uint8
        and bool((torch.frexp(scales.float())[0].abs() != 0.5).any())
    ):
        raise ValueError("the scales are to be powers of two, and some are not")
    new_scales = refitted_scales(codes, scales, layout=layout, directions=directions, strength=strength)
    levels = layout.grid.levels(codes)
    shape = _scale_shape(levels, layout)
    old_numbers, new_numbers = (_scale_numbers(each, layout).reshape(shape) for each in (scales, new_scales))
    rounded = round_levels(levels, old_numbers, new_numbers, layout=layout, directions=directions, strength=strength)
    return Requantized(
        codes=layout.grid.replaced(codes, rounded.levels),
        scales=new_scales,
        before=rounded.before,
        after=rounded.after,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundedLevels:
    """Levels of an edited matrix, and how much of the directions it has; see `Requantized`."""

    levels: Tensor
    before: tuple[float, float]
    after: tuple[float, float]


def round_levels(
    levels: Tensor,
    old: Tensor,
    new: Tensor,
    *,
    layout: BlockLayout,
    directions: Tensor,
    strength: float = 1.0,
    bounds: tuple[Tensor, Tensor] | None = None,
    offsets: Tensor | None = None,
) -> RoundedLevels:
    """Project directions out of a matrix given as levels and scales, and round it to levels again.

    Args:
        levels: [d_model, n], of a matrix whose rows index the residual stream.
        old: What the levels of each block are multiplied with, [block rows, block columns], float32.
        new: What the new ones are to be multiplied with.
        layout: How they are stored.
        directions: U, [k, d_model], orthonormal rows.
        strength: Share of the component that is removed.
        bounds: The least and the greatest level in each block; None: all of the grid.
        offsets: What is added to each block's numbers, old and new; None: nothing.

    Raises:
        ValueError: The matrix holds NaN or infinite values.
    """
    new_levels = torch.empty_like(levels)
    sums = torch.zeros(4, dtype=torch.float64)
    basis = directions.float()
    for chunk in _Chunk.cut(levels, old, layout):
        added = None if offsets is None else chunk.factors_of(offsets)
        before = chunk.values if added is None else chunk.values + added
        exact, wanted = _projected(before, basis, strength)
        if not bool(torch.isfinite(exact).all()):
            raise ValueError("it holds NaN or infinite values")
        factors = chunk.factors_of(new)
        limits = None if bounds is None else (chunk.factors_of(bounds[0]), chunk.factors_of(bounds[1]))
        rounding = _Rounding(grid=layout.grid, basis=basis, factors=factors, limits=limits, offsets=added)
        found = rounding.round_apart(exact, wanted)
        new_levels[:, chunk.columns] = found
        for index, value in enumerate((before, rounding.numbers(found))):
            sums[2 * index] += (directions.double() @ value.double()).square().sum()
            sums[2 * index + 1] += value.double().square().sum()
    along, norm, along_after, norm_after = sums.sqrt().tolist()
    return RoundedLevels(levels=new_levels, before=(along, norm), after=(along_after, norm_after))


def _projected(values: Tensor, directions: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    basis = directions.to(values.dtype)
    before = basis @ values
    return values - strength * (basis.T @ before), (1 - strength) * before


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rounding:
    """Rounding of some columns to levels, such that the directions have the components that they are to have.

    Attributes:
        grid: What levels mean.
        basis: U, [k, d_model], float32.
        factors: [d_model, n], what the number of each entry's level is multiplied with.
        limits: The least and the greatest level of each entry, [d_model, n]; None: all of the grid.
        offsets: What is added to each entry, [d_model, n]; None: nothing.
    """

    grid: Grid
    basis: Tensor
    factors: Tensor
    limits: tuple[Tensor, Tensor] | None
    offsets: Tensor | None = None

    def numbers(self, levels: Tensor) -> Tensor:
        """Return what levels stand for."""
        numbers = self.grid.numbers(levels) * self.factors
        return numbers if self.offsets is None else numbers + self.offsets

    def _of(self, columns: Tensor) -> "_Rounding":
        """Return the rounding of some of the columns."""
        return replace(
            self,
            factors=self.factors[:, columns],
            limits=None if self.limits is None else (self.limits[0][:, columns], self.limits[1][:, columns]),
            offsets=None if self.offsets is None else self.offsets[:, columns],
        )

    def _within(self, levels: Tensor, columns: Tensor | None = None) -> Tensor:
        if self.limits is None:
            top = len(self.grid.magnitudes) - 1
            return levels.clamp(-top, top)
        low, high = (each if columns is None else each[:, columns] for each in self.limits)
        return torch.minimum(torch.maximum(levels, low), high)

    def _nearest(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nearest levels of some values, and what they stand for."""
        # Where a block has a scale of 0 every level stands for 0.
        values = values if self.offsets is None else values - self.offsets
        scaled = (values / self.factors).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        levels = self._within(self.grid.nearest(scaled))
        return levels, self.numbers(levels)

    def round_apart(self, exact: Tensor, wanted: Tensor) -> Tensor:
        """Return levels [d_model, n] whose numbers have the components `wanted` [k, n] and are near `exact`.

        A matrix that was on the grid before leaves it unevenly where steps are wide: no entry moves until what is fed
        back has grown to half a step, and then many do at once. For columns that are far from their goal after that,
        the length of what is fed back is searched for.
        """
        share = (len(self.basis) / exact.shape[0]) ** 0.5
        goal = (_TOLERANCE * share * torch.linalg.vector_norm(exact, dim=0)).square()
        levels, error = self._fed_back(exact, wanted, goal)
        self._step_towards(levels, error, goal)
        sizes = error.square().sum(dim=0)
        far = (sizes > _FAR**2 * goal).nonzero().squeeze(1)
        if len(far):
            part = replace(self, factors=self.factors.expand_as(exact))._of(far)
            found, new_error = part._searched(exact[:, far], wanted[:, far], goal[far])
            part._step_towards(found, new_error, goal[far])
            better = new_error.square().sum(dim=0) < sizes[far]
            levels[:, far[better]] = found[:, better]
        return levels

    def _fed_back(self, exact: Tensor, wanted: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best levels of some rounds, each of which is given the last one's error, and their error."""
        basis, target = self.basis, exact.clone()
        levels, numbers = self._nearest(target)
        error = basis @ numbers - wanted
        sizes = error.square().sum(dim=0)
        best, best_error, best_sizes = levels.clone(), error.clone(), sizes.clone()
        for _ in range(_MOST_ROUNDS):
            before = float(best_sizes.sum())
            if not bool((best_sizes > goal).any()):
                break
            target -= basis.T @ error
            levels, numbers = self._nearest(target)
            error = basis @ numbers - wanted
            sizes = error.square().sum(dim=0)
            better = sizes < best_sizes
            best = torch.where(better, levels, best)
            best_error = torch.where(better, error, best_error)
            best_sizes = torch.where(better, sizes, best_sizes)
            if float(best_sizes.sum()) > (1 - _LEAST_GAIN) ** 2 * before:
                break
        return best, best_error

    def _searched(self, exact: Tensor, wanted: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
        """Return levels and their error; of what is fed back the length is searched for, in each column.

        It lies between one that moved nothing yet and one that moved too much; where that is not known it is doubled.
        """
        basis, target = self.basis, exact.clone()
        levels, numbers = self._nearest(target)
        error = basis @ numbers - wanted
        sizes, length = error.square().sum(dim=0), torch.ones_like(goal)
        nothing, too_much = torch.zeros_like(goal), torch.full_like(goal, torch.inf)
        for _ in range(_MOST_ROUNDS):
            if not bool((sizes > goal).any()):
                break
            tried = target - length * (basis.T @ error)
            new_levels, numbers = self._nearest(tried)
            new_error = basis @ numbers - wanted
            new_sizes = new_error.square().sum(dim=0)
            better, beyond = new_sizes < sizes, (new_error * error).sum(dim=0) < 0
            nothing = torch.where(better, 0.0, torch.where(beyond, nothing, length))
            too_much = torch.where(better, torch.inf, torch.where(beyond, length, too_much))
            middle = torch.where(too_much.isinf(), 2 * length, (nothing + too_much) / 2)
            length = torch.where(better, length, middle)
            target, levels, error = (
                torch.where(better, new, old)
                for new, old in ((tried, target), (new_levels, levels), (new_error, error))
            )
            sizes = torch.where(better, new_sizes, sizes)
        return levels, error

    def _step_towards(self, levels: Tensor, error: Tensor, goal: Tensor) -> None:
        """Move single entries of `levels` to a neighbour, in place, while that brings U Q closer to what it must be."""
        grid, basis = self.grid, self.basis
        lengths = basis.square().sum(dim=0).unsqueeze(1)
        factors = self.factors.expand_as(levels)
        for _ in range(min(_MOST_STEPS, math.ceil(_LARGEST_MOVED_SHARE * len(levels)))):
            open_columns = (error.square().sum(dim=0) > goal).nonzero().squeeze(1)
            if not len(open_columns):
                return
            here, scale = levels[:, open_columns], factors[:, open_columns]
            numbers = grid.numbers(here)
            slope = 2 * (basis.T @ error[:, open_columns])
            steps = torch.stack(
                [(grid.numbers(self._within(here + way, open_columns)) - numbers) * scale for way in (1, -1)]
            )
            # What |U Q - wanted|^2 gains by each step: s^2 |u_i|^2 + 2 s u_i . error.
            gains = steps * (slope + steps * lengths)
            best, entry = gains.flatten(0, 1).min(dim=0)
            helps = best < 0
            columns, entry = open_columns[helps], entry[helps]
            if not len(columns):
                return
            way, row = entry // len(levels), entry % len(levels)
            step = steps[way, row, helps.nonzero().squeeze(1)]
            levels[row, columns] += torch.where(way == 0, 1, -1).to(levels.dtype)
            error[:, columns] += basis[:, row] * step


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chunk:
    """Some columns of a stored matrix, decoded."""

    columns: slice
    values: Tensor
    rows_of: Tensor
    columns_of: Tensor

    @classmethod
    def cut(cls, levels: Tensor, factors: Tensor, layout: BlockLayout) -> "Iterator[_Chunk]":
        rows, columns = _block_indices(levels.shape[0], levels.shape[1], layout)
        width = max(1, _BLOCK_ELEMENTS // levels.shape[0])
        for first in range(0, levels.shape[1], width):
            part = slice(first, first + width)
            scale = factors[rows, :][:, columns[part]]
            yield cls(
                columns=part,
                values=layout.grid.numbers(levels[:, part]) * scale,
                rows_of=rows,
                columns_of=columns[part],
            )

    def factors_of(self, scales: Tensor) -> Tensor:
        return scales[self.rows_of, :][:, self.columns_of]

    def gather_largest(self, values: Tensor, largest: Tensor) -> None:
        """Raise the entries of `largest`, one a block, to the greatest magnitude of the block's entries in here."""
        index = self.rows_of.unsqueeze(1) * largest.shape[1] + self.columns_of.unsqueeze(0)
        flat = largest.view(-1)
        flat.scatter_reduce_(0, index.flatten(), values.abs().flatten(), reduce="amax")


def _scale_numbers(scales: Tensor, layout: BlockLayout) -> Tensor:
    if scales.dtype == torch.uint8:
        return torch.exp2(scales.float() - _EXPONENT_BIAS) if layout.power_of_two else scales.float()
    return scales.float()


def _needed_scales(largest: Tensor, layout: BlockLayout) -> Tensor:
    scales = largest / layout.grid.magnitudes[-1]
    scales = torch.where(scales > 0, scales, 1.0)
    return torch.exp2(torch.ceil(torch.log2(scales))) if layout.power_of_two else scales


def _store_scales(numbers: Tensor, layout: BlockLayout, dtype: torch.dtype) -> Tensor:
    if dtype == torch.uint8:
        return (torch.log2(numbers).round() + _EXPONENT_BIAS).clamp(0, 254).to(torch.uint8)
    if not layout.power_of_two and dtype != torch.float32:
        # The ends of a narrow format; the least number is a subnormal one.
        limits = torch.finfo(dtype)
        numbers = numbers.clamp(limits.tiny * limits.eps, limits.max / (1 + limits.eps))
    stored = numbers.to(dtype)
    if not layout.power_of_two and dtype != torch.float32:
        # Never below what the largest entry needs.
        step = 1 + torch.finfo(dtype).eps
        stored = torch.where(stored.float() < numbers, (numbers * step).to(dtype), stored)
    return stored


def _scale_shape(levels: Tensor, layout: BlockLayout) -> tuple[int, int]:
    rows, columns = levels.shape[-2:]
    return -(-rows // layout.block[0]), -(-columns // layout.block[1])


def _block_indices(rows: int, columns: int, layout: BlockLayout) -> tuple[Tensor, Tensor]:
    return torch.arange(rows) // layout.block[0], torch.arange(columns) // layout.block[1]


def _largest_in_blocks(values: Tensor, layout: BlockLayout) -> Tensor:
    rows, columns = _block_indices(values.shape[0], values.shape[1], layout)
    largest = torch.zeros(_scale_shape(values, layout))
    index = rows.unsqueeze(1) * largest.shape[1] + columns.unsqueeze(0)
    largest.view(-1).scatter_reduce_(0, index.flatten(), values.abs().flatten(), reduce="amax")
    return largest


def _bits(tensor: Tensor) -> torch.dtype:
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
