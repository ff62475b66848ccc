r"""Whether the change of one matrix is a projection of directions, how strong, and what was done to its norms.

A projection with strength a along orthonormal U [k, m] is D = -a U^T (U W): its left vectors span U, and what lies
along them is a multiple of what the base has along them, B = -A C. A change of low rank that is none (a LoRA merge)
has a B that has nothing to do with C; so |B + A C| / |B| with the best A tells them apart. Three ways are tried:

* along the axis of the residual stream, as the method says;
* with the rows of W divided by their lengths: W' = N (W~ - a u (u^T W~)), W~ = N^-1 W (normalised before projecting);
* along the other axis.

Norms. A projection takes a (2 - a) |C|^2 from |W|^2. Where that is not missing, lengths were restored: of the columns
or the rows, whichever kept theirs. D then has a part (s - 1) W of full rank, and whether that is all of it is a
regression of each line of W' on the same line of W.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from abliterate.inspection.change import (
    ABOVE_ROUNDING,
    MOST_KEPT,
    Lines,
    MatrixChange,
    Span,
    multiply,
    project,
    sum_lines,
)
from abliterate.inspection.numbers import Array, MatrixPair

Kept = Literal["columns", "rows", "whole"]

# Of the square of the change the projected directions make nearly all, and B is a multiple of C to this share.
_ENERGY, _MISFIT, _WORST_MISFIT = 0.95, 0.1, 0.5
# A projection of k directions needs many more vectors than those to be told from chance.
_FEWEST_LINES = 4
# Of several directions none is projected out by less than this share of the strength of the first.
_LEAST_STRENGTH = 0.1
# Of what a projection takes from |W|^2 at most this share may be missing where norms were restored.
_RESTORED = 0.25
# Where rounding moves |W|^2 by more than this share of what a projection takes, nothing is said of norms.
_BLURRED = 0.3
# Lengths are kept to what rounding does to them, or far better than those of the other lines.
_WITHIN_ROUNDING, _FAR_BETTER = 3.0, 0.3
_ARITHMETIC = 2e-3
# Scales and vectors are found in turn; a round takes an order of magnitude from the error, and less where few numbers
# of a direction are far larger than the others. So there are at least so many, and more as long as that helps.
_ROUNDS, _MOST_ROUNDS, _HELPS = 3, 20, 0.95
# And a strength that the vectors are found with moves by less than this share of itself.
_STEADY = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Projection:
    """A change that projects directions out of a matrix.

    Attributes:
        axis: The axis of the stored matrix along which they lie.
        vectors: [m, k] float64, orthonormal: directions as this matrix writes them, before any norm.
        strength: a; the mean over the directions, each by its share of W.
        left: |U W'|/|U W|.
        before_squared: |U W|^2.
        misfit: |B + A C| / |B|.
        error: Sine of the angle by which rounding turns the vectors.
        row_normalised: The rows were divided by their lengths before.
        kept: The lengths that were restored; None: none, or it cannot be told.
        is_whole: Whether the projection, the scaling of lengths and rounding are all of the change.
    """

    axis: int
    vectors: Array
    strength: float
    left: float
    before_squared: float
    misfit: float
    error: float
    row_normalised: bool
    kept: Kept | None
    is_whole: bool


def find_projection(pair: MatrixPair, change: MatrixChange, *, other: MatrixChange | None) -> Projection | None:
    """Return the projection that a change is, or None where it is none.

    Args:
        pair: The matrices.
        change: What was found of them along the axis of the residual stream.
        other: The same along the other axis, where that has the stream's width too.
    """
    if change.span is None or not _is_few(change):
        return None
    found = _fit(change, change.span)
    if found is None or found.misfit > _MISFIT / 2:
        weighted = _row_normalised(pair, change)
        found = min((each for each in (found, weighted) if each), key=lambda each: each.misfit, default=None)
    if found is None and other is not None and other.span is not None and _is_few(other):
        found, change = _fit(other, other.span), other
    return None if found is None else _with_norms(pair, change, found)


def _is_few(change: MatrixChange) -> bool:
    """Return whether the vectors that were kept make nearly all of what stands out."""
    squares = [value**2 for value in change.values]
    return sum(squares[:MOST_KEPT]) >= _ENERGY * sum(squares)


def measured_along(pair: MatrixPair, found: Projection, vectors: Array) -> Projection:
    """Return a projection with its strength and what is left measured along vectors [m, k] that are known better."""
    before, moved = project(pair, found.axis, vectors)
    squared = _squared(before)
    if not squared or found.row_normalised:
        return found
    strength = found.strength if found.kept else -float((before * moved).sum(dtype=np.float64)) / squared
    left = math.sqrt(_squared(before + moved) / squared)
    return replace(found, strength=strength, left=left, before_squared=squared)


def _fit(change: MatrixChange, span: Span) -> Projection | None:
    """Return the projection of those of a span's vectors, the strongest first, that what lies along them allows."""
    b, c = span.change.astype(np.float64), span.before.astype(np.float64)
    energies = np.square(b).sum(axis=1)
    m, n = span.vectors.shape[0], b.shape[1]
    # A tall or wide matrix of few vectors fits anything.
    most = min(len(b), n // _FEWEST_LINES, m // _FEWEST_LINES)
    if most < 1 or not c.any():
        return None
    lengths = np.sqrt(energies)
    rests = b - np.linalg.lstsq(c @ c.T, c @ b.T)[0].T @ c
    allowed = np.minimum(_MISFIT + 2 * change.rest / math.sqrt(m) / lengths, _WORST_MISFIT)
    strengths = -(b * c).sum(axis=1) / np.maximum(np.square(c).sum(axis=1), 1e-300)
    # What is left of restored lengths may look like a projection with next to no strength.
    is_strong = np.abs(strengths) >= _LEAST_STRENGTH * abs(strengths[0])
    fit = (np.linalg.norm(rests, axis=1) <= allowed * lengths) & is_strong
    fits = fit.tolist()
    k = next((index for index, fit in enumerate(fits[:most]) if not fit), most)
    if k == 0 or energies[:k].sum() < _ENERGY * energies.sum():
        return None
    before = _squared(c[:k])
    return Projection(
        axis=span.axis,
        vectors=span.vectors[:, :k],
        strength=-float((b[:k] * c[:k]).sum()) / before,
        left=math.sqrt(_squared(span.before[:k] + span.change[:k]) / before),
        before_squared=before,
        misfit=math.sqrt(_squared(rests[:k]) / float(energies[:k].sum())),
        error=min(1.0, change.rest / math.sqrt(change.lines) / float(lengths[k - 1])),
        row_normalised=False,
        kept=None,
        is_whole=False,
    )


def _row_normalised(pair: MatrixPair, change: MatrixChange) -> Projection | None:
    """Return the projection of the matrix whose rows (lines across the vectors) are divided by their lengths."""
    span = change.span
    assert span is not None
    lengths = np.sqrt(sum_lines(pair)[span.axis].before)
    if float(lengths.std()) < _ARITHMETIC * float(lengths.mean()):
        return None
    weights = np.where(lengths > 0, 1 / lengths, 0.0)[:, None]
    basis = np.linalg.qr(weights * span.vectors)[0]
    before, moved = project(pair, span.axis, weights * basis)
    turn = np.linalg.svd(moved.astype(np.float64), full_matrices=False)[0]
    narrow = turn.astype(np.float32).T
    turned = Span(axis=span.axis, vectors=basis @ turn, before=narrow @ before, change=narrow @ moved)
    scale = math.sqrt(_squared(weights) / len(weights))
    found = _fit(replace(change, rest=change.rest * scale), turned)
    if found is None:
        return None
    # What is left is said of the matrix as it is.
    before, moved = project(pair, span.axis, found.vectors)
    squared = _squared(before)
    left = math.sqrt(_squared(before + moved) / squared) if squared else 0.0
    return replace(found, row_normalised=True, left=left, before_squared=squared)


def _with_norms(pair: MatrixPair, change: MatrixChange, found: Projection) -> Projection:
    """Return a projection with what was done to the lengths of its matrix."""
    taken = found.strength * (2 - found.strength) * found.before_squared
    missing = -(2 * change.dots + change.change**2)
    # Of a reflection nothing is missing anyhow.
    is_told = abs(found.strength * (2 - found.strength)) > 0.05 and change.rounding**2 < _BLURRED * abs(taken)
    may_be_kept = is_told and abs(missing) <= _RESTORED * abs(taken)
    if not may_be_kept and (change.rest_is_rounding or found.row_normalised):
        return replace(found, is_whole=change.rest_is_rounding)
    lines = sum_lines(pair)
    kept = _kept(pair, change, found, lines) if may_be_kept else None
    if change.rest_is_rounding or found.row_normalised:
        return replace(found, kept=kept, is_whole=change.rest_is_rounding)
    allowed = ABOVE_ROUNDING * change.rounding + _ARITHMETIC * change.change
    ways = (_scaled_across, _scaled_along) if kept == "rows" else (_scaled_along, _scaled_across)
    for way in ways:
        scaled, rest = way(pair, lines, found, allowed)
        if rest <= allowed:
            error = min(found.error, rest / change.change)
            return replace(scaled, kept=kept, is_whole=True, error=error)
    return replace(found, kept=kept)


def _scaled_along(
    pair: MatrixPair, both: tuple[Lines, Lines], found: Projection, allowed: float
) -> tuple[Projection, float]:
    """Return a projection after which each vector along the axis was scaled, W' = (W - a U U^T W) S, and what is left.

    D - W (S - 1) has no other left vectors than U, so the two are found in turn.
    """
    lines, vectors = both[1 - found.axis], found.vectors
    last = math.inf
    for number in range(_MOST_ROUNDS):
        before, moved = project(pair, found.axis, vectors)
        scales, rest = _scales(lines, before, moved)
        if _is_found(number, rest, last, allowed):
            break
        last = rest
        narrow = np.concatenate([before, before * (scales - 1).astype(np.float32)])
        products = multiply(pair, found.axis, np.ascontiguousarray(narrow.T)).astype(np.float64)
        k = len(before)
        vectors = np.linalg.qr(products[:, :k] - products[:, k:])[0]
    else:
        before, moved = project(pair, found.axis, vectors)
        scales, rest = _scales(lines, before, moved)
    wanted = scales * before
    strength = 1 - float(((before + moved) * wanted).sum()) / _squared(wanted)
    return _renewed(found, vectors, before, moved, strength), rest


def _scaled_across(
    pair: MatrixPair, both: tuple[Lines, Lines], found: Projection, allowed: float
) -> tuple[Projection, float]:
    """Return a projection after which each line across the vectors was scaled, W' = S (W - a U U^T W); as above."""
    lines, vectors = both[found.axis], found.vectors
    strength, last = found.strength, math.inf
    sign = math.copysign(1.0, found.strength)
    for number in range(_MOST_ROUNDS):
        former = strength
        # A line that lies nearly along one vector has next to nothing beside it, which float32 does not tell.
        basis, turn = np.linalg.qr(project(pair, found.axis, vectors, dtype=np.float64)[0].T)
        before, moved = project(pair, 1 - found.axis, basis, dtype=np.float64)
        scales, rest = _scales(lines, before, moved)
        # D R - (S - 1) W R = -a S U (C R), and C R is the turn.
        made = ((moved - (scales - 1) * before) / scales).T @ np.linalg.inv(turn.T)
        vectors, strengths, _ = np.linalg.svd(made, full_matrices=False)
        # What restored lengths seemed to be at first is no direction.
        kept = strengths >= _LEAST_STRENGTH * strengths[0]
        vectors, strength = vectors[:, kept], sign * math.sqrt(_squared(strengths[kept]) / kept.sum())
        # As long as the strength moves, what is left may be small by chance.
        is_steady = abs(strength - former) < _STEADY * abs(strength)
        if _is_found(number, rest, last, allowed if is_steady else 0.0):
            break
        last = rest
    return _renewed(found, vectors, *project(pair, found.axis, vectors), strength), rest


def _is_found(number: int, rest: float, last: float, allowed: float) -> bool:
    """Return whether a round more would not help, which left so much after it was `last`."""
    return number >= _ROUNDS and (rest <= allowed or rest > _HELPS * last)


def _renewed(found: Projection, vectors: Array, before: Array, moved: Array, strength: float) -> Projection:
    squared = _squared(before)
    left = math.sqrt(_squared(before + moved) / squared) if squared else 0.0
    return replace(found, vectors=vectors, strength=strength, left=left, before_squared=squared)


def _squared(numbers: Array) -> float:
    return float(np.square(numbers, dtype=np.float64).sum())


def _scales(lines: Lines, before: Array, change: Array) -> tuple[Array, float]:
    """Return the scale of each line that explains most of D outside the vectors, and the norm of what it does not."""
    b, c = change.astype(np.float64), before.astype(np.float64)
    across = np.maximum(lines.change - np.square(b).sum(axis=0), 0)
    dots = lines.dots - (b * c).sum(axis=0)
    squares = lines.before - np.square(c).sum(axis=0)
    extra = np.where(squares > 1e-12 * lines.before, dots / squares, 0.0)
    return 1 + extra, math.sqrt(float(np.maximum(across - extra * dots, 0).sum()))


def _kept(pair: MatrixPair, change: MatrixChange, found: Projection, lines: tuple[Lines, Lines]) -> Kept:
    """Return which lengths were restored, where |W| was."""
    noise = 2 * change.rounding / change.norm + 1e-6
    m, n = pair.shape if found.axis == 0 else pair.shape[::-1]
    along, across = _changes(lines[1 - found.axis]), _changes(lines[found.axis])
    # Columns are what one input writes, rows what one output reads, however the matrix is stored.
    if along <= max(_WITHIN_ROUNDING * noise / math.sqrt(m), _FAR_BETTER * across):
        return "columns"
    return "rows" if across <= max(_WITHIN_ROUNDING * noise / math.sqrt(n), _FAR_BETTER * along) else "whole"


def _changes(lines: Lines) -> float:
    """Return the root of the mean square of the changes of squared lengths, each as a share of its own."""
    shares = np.where(lines.before > 0, (2 * lines.dots + lines.change) / lines.before, 0.0)
    return math.sqrt(_squared(shares) / len(shares))
