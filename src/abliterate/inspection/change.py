r"""What one matrix was changed by: the norm of D = W' - W, its numerical rank, and the space that it writes to.

A randomised range finder (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.1) on one side of D, the side of
the residual stream where the matrix has one: Y = D Omega with p random columns, Q an orthonormal basis of Y, and in a
second pass B = Q^T D and C = Q^T W. The singular values of B are those of D as far as Q holds it. What is left outside,
R = |D - Q Q^T D|, is known exactly, so every rank comes with its error.

A singular value counts where it stands out of what noise of the size of the rest has: a matrix [m, n] of independent
numbers with norm R has none above R (1/sqrt(m) + 1/sqrt(n)) but by a hair (Marchenko and Pastur). Rounding of W' to its
dtype is such noise, of the norm E = sqrt(sum of step^2 / 12), whose steps are known; it depends on what is rounded, so
singular values below E / 5 are not counted either. So a rank that is found with R
not above E is the rank of the change, and where R is above E the change has a part of full rank besides.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from abliterate.errors import CheckpointError
from abliterate.inspection.numbers import Array, MatrixPair, bits_per_number, steps, widen
from abliterate.inspection.products import Products, fused_products

# Columns of the first sketch and of the second, which is made where the first one is full.
NARROW, WIDE = 8, 72
# How far a singular value must stand out of noise; what is left may be above the noise of rounding.
_SMALL = 0.08
# Vectors that the second product takes besides those that stand out.
_MORE = 2
_STANDS_OUT, ABOVE_ROUNDING = 1.5, 1.3
# Norms in float32 differ from the exact ones by about this share, so less than it is never told from nothing.
_ARITHMETIC = 2e-3
# So many vectors of the change are kept; nobody projects out more directions.
MOST_KEPT = 8
# What rounding does depends on what is rounded, so that it has a structure of its own, weaker than this share of E; the
# E of codes is an estimate from above.
_STRUCTURE, _CODED_STRUCTURE = 0.2, 0.04
# A number is rounded if it lies within half a step of what it was, and a hair.
_HALF_A_STEP = 0.505
# The step is summed in every so many blocks, and in all where the dtypes differ.
_STEPS_SUMMED = 32
# Of a matrix of at least so many numbers some rows are looked at first: at most one in so many, and so many numbers,
# which lie in so many places. Vectors of the columns' axis are those of these rows; the others are found by all.
_WORTH_SAMPLING, _PART, _SAMPLE_ENTRIES, _PLACES = 1 << 22, 4, (1 << 21, 1 << 23), 32
# Less than this share of the largest is float32's own noise.
_NOTHING = 1e-5
# What plain quantisation moves numbers by, as a share of their norm: bits a number -> share; generous.
_QUANTISED = ((7.0, 0.045), (5.4, 0.06), (4.6, 0.1), (3.9, 0.16), (2.9, 0.35), (0.0, 0.7))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lines:
    """Of each row, or of each column: |w|^2, w . d and |d|^2; float64."""

    before: Array
    dots: Array
    change: Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Span:
    """What a change and its matrix have along some orthonormal vectors L, [m, k], of one axis.

    Attributes:
        axis: The axis of the stored matrix that L lies along.
        vectors: L, float64.
        before: L^T W, [k, n] float32.
        change: L^T D, likewise.
    """

    axis: int
    vectors: Array
    before: Array
    change: Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MatrixChange:
    """What was found of one matrix.

    Attributes:
        norm: |W|.
        change: |D|.
        rounding: E, what rounding to the coarser of both dtypes makes of |D|.
        beyond: Share of the numbers that are further from those of the base than rounding takes them; None where one
            side is stored in few bits, whose steps are not known.
        rank: How many singular values of D stand out; more than can be told where `is_full`.
        values: Those, the largest first.
        rest: |D| without them.
        is_full: More stand out than were looked for.
        span: What is kept of the first of them; None where there are none.
        dots: W . D.
        lines: How many lines across the axis the vectors of `span` were found by.
    """

    norm: float
    change: float
    rounding: float
    beyond: float | None
    rank: int
    values: tuple[float, ...]
    rest: float
    is_full: bool
    span: Span | None
    dots: float
    lines: int

    @property
    def is_rounding(self) -> bool:
        """Whether rounding alone explains the change."""
        if self.beyond is None:
            return self.rank == 0 and self.rest_is_rounding
        # A few numbers that were rounded, and no others, have a low rank, too.
        return self.beyond == 0 and self.change <= ABOVE_ROUNDING * self.rounding

    @property
    def rest_is_rounding(self) -> bool:
        """Whether rounding explains all but the rank that was found."""
        return self.rest <= ABOVE_ROUNDING * self.rounding + _ARITHMETIC * self.change


def measure_change(pair: MatrixPair, *, axis: int, seed: int, fused: bool = False) -> MatrixChange:
    """Read two matrices and tell what their difference is.

    Args:
        pair: The matrices.
        axis: On which axis the vectors of the change are looked for.
        seed: Of the random columns.
        fused: With the arithmetic of `fused_products`, which takes half a second to be loaded, where it can be had.

    Raises:
        CheckpointError: A file cannot be read, or a matrix holds NaN or infinite values.
    """
    generator = np.random.default_rng(seed)
    if math.prod(pair.shape) >= _WORTH_SAMPLING and pair.old.info.encoding is pair.new.info.encoding:
        found_by_sample = _measure_by_sample(pair, axis, generator, fused=fused)
        if found_by_sample is not None:
            return found_by_sample
    rows, columns = pair.shape
    m, n = (rows, columns) if axis == 0 else (columns, rows)
    # In a small matrix the singular values of a rank that is still low do not stand out one by one.
    narrow = NARROW if 1 / math.sqrt(m) + 1 / math.sqrt(n) < _SMALL else WIDE
    width = min(narrow, m, n)
    sketch = _Sketch(pair, axis)
    found = sketch.times(generator.standard_normal((n, width), np.float32), totals=True)
    totals = sketch.totals(pair)
    change = math.sqrt(totals.change_squared)
    if not change:
        return _of(totals, _Found(values=(), is_full=False, span=None), change)
    floor = _floor(totals)
    right, values = _right_vectors(pair, axis, found)
    rank = count_outliers(values, change, floor=floor, m=m, n=n)
    if rank >= width - 2 and width < min(m, n, WIDE):
        width = min(WIDE, m, n)
        found = sketch.times(generator.standard_normal((n, width), np.float32))
        right, values = _right_vectors(pair, axis, found)
        rank = count_outliers(values, change, floor=floor, m=m, n=n)
    if not rank:
        return _of(totals, _Found(values=(), is_full=False, span=None), change)
    # The range of D Omega holds the vectors but for |E|, that of D V but for what E has along V, which is far less.
    span, values = _decompose(pair, axis, sketch.times(right[:, : rank + _MORE]))
    rank = count_outliers(values, change, floor=floor, m=m, n=n)
    is_full = rank >= width - 2 and width < min(m, n)
    kept = _first(span, min(rank, MOST_KEPT)) if rank else None
    return _of(totals, _Found(values=tuple(values[:rank]), is_full=is_full, span=kept), change)


def sum_lines(pair: MatrixPair) -> tuple[Lines, Lines]:
    """Return the sums over each row and over each column."""
    rows, columns = (np.zeros((3, size)) for size in pair.shape)
    for part, old, change in pair.blocks():
        for index, (one, other) in enumerate(((old, old), (old, change), (change, change))):
            products = one * other
            rows[index, part] = products.sum(axis=1, dtype=np.float64)
            columns[index] += products.sum(axis=0, dtype=np.float64)
    made = [Lines(before=each[0], dots=each[1], change=each[2]) for each in (rows, columns)]
    return made[0], made[1]


def project(
    pair: MatrixPair, axis: int, vectors: Array, *, dtype: type[np.floating[Any]] = np.float32
) -> tuple[Array, Array]:
    """Return L^T W and L^T D, [k, n], of vectors L [m, k] of an axis; they need not be orthonormal.

    Args:
        pair: The matrices.
        axis: That of L.
        vectors: L.
        dtype: Of the arithmetic, and of what is returned.
    """
    factor = np.ascontiguousarray(vectors, dtype)
    k = factor.shape[1]
    rows, columns = pair.shape
    if axis == 0:
        before, change = np.zeros((2, k, columns), dtype)
        for part, *both in pair.blocks():
            old, difference = (each.astype(dtype, copy=False) for each in both)
            before += factor[part].T @ old
            change += factor[part].T @ difference
        return before, change
    before, change = np.empty((2, k, rows), dtype)
    for part, *both in pair.blocks():
        old, difference = (each.astype(dtype, copy=False) for each in both)
        before[:, part] = (old @ factor).T
        change[:, part] = (difference @ factor).T
    return before, change


def _measure_by_sample(
    pair: MatrixPair, axis: int, generator: np.random.Generator, *, fused: bool
) -> MatrixChange | None:
    """Return a change of few vectors that are found in some of the rows; None where all must be looked at for them.

    A change of low rank has that rank in any part. Norms, values and what is left are those of the whole, which is read
    once: D V, for the right singular vectors V of D in the sample, are the left ones, row by row.
    """
    rows, columns = pair.shape
    m, n = (rows, columns) if axis == 0 else (columns, rows)
    sample, totals = _sample_of(pair, _SAMPLE_ENTRIES[axis])
    right, values = _vectors_of(sample, generator)
    seen = math.sqrt(totals.change_squared)
    floor = _floor(totals)
    rank = count_outliers(values, seen, floor=floor, m=len(sample), n=columns) if seen else 0
    if not 0 < rank < NARROW - 2:
        return None
    lines = len(sample) if axis == 1 else n
    del sample
    sketch = _Sketch(pair, axis)
    span, values = sketch.decompose(right[:, : rank + _MORE], fused=fused)
    totals = sketch.totals(pair)
    change = math.sqrt(totals.change_squared)
    rank = count_outliers(values, change, floor=_floor(totals), m=m, n=n)
    if not rank:
        return None
    found = _Found(values=tuple(values[:rank]), is_full=False, span=_first(span, rank))
    found_all = replace(_of(totals, found, change), lines=lines)
    return found_all if found_all.rest_is_rounding else None


def _sample_of(pair: MatrixPair, entries: int) -> tuple[Array, "_Totals"]:
    """Return D of some rows, [m, columns] float32, that lie in some places of the matrix, and their sums."""
    rows, columns = pair.shape
    count = min(rows // _PART, max(NARROW, entries // columns))
    at_once = max(1, count // _PLACES)
    places = math.ceil(count / at_once)
    every = rows // at_once // places
    part = replace(pair, at_once=at_once, every=every)
    sketch, filled = _Sketch(part, 0), 0
    sample = np.empty((len(range(0, rows, at_once * every)) * at_once, columns), np.float32)
    for number, (_, old, change) in enumerate(part.blocks()):
        sketch.count(number, old, change)
        sample[filled : filled + len(change)] = change
        filled += len(change)
    return sample[:filled], sketch.totals(pair)


def _vectors_of(sample: Array, generator: np.random.Generator) -> tuple[Array, list[float]]:
    """Return the right singular vectors of a matrix, [n, p], and the singular values; the largest of them."""
    vectors = generator.standard_normal((sample.shape[1], NARROW), np.float32)
    values: list[float] = []
    # The second time from vectors that are nearly those, which leaves next to nothing of what the first one missed.
    for _ in range(2):
        basis = _orthonormal(sample @ vectors).astype(np.float32)
        vectors, values = _turned_columns(sample.T @ basis)
    return vectors, values


def _orthonormal(columns: Array) -> Array:
    """Return an orthonormal basis, float64, of what some columns span."""
    return np.linalg.qr(columns.astype(np.float64))[0]


def _turned_columns(columns: Array) -> tuple[Array, list[float]]:
    """Return the left singular vectors of a matrix of few columns, float32, and the singular values."""
    wide = columns.astype(np.float64)
    lengths, turn = _eigen(wide.T @ wide)
    values: list[float] = lengths.tolist()
    return (wide @ turn / np.maximum(lengths, 1e-300)).astype(np.float32), values


def _eigen(gram: Array) -> tuple[Array, Array]:
    """Return the roots of the eigenvalues of A^T A, the largest first, and the eigenvectors."""
    squares, turn = np.linalg.eigh(gram)
    return np.sqrt(np.maximum(squares[::-1], 0)), turn[:, ::-1]


def _floor(totals: "_Totals") -> float:
    return (_STRUCTURE if totals.beyond is not None else _CODED_STRUCTURE) * totals.rounding


def multiply(pair: MatrixPair, axis: int, vectors: Array) -> Array:
    """Return [D V, W V'], V and V' being the halves of [n, 2 k] vectors; of the other axis those of D^T and W^T."""
    k = vectors.shape[1] // 2
    rows, columns = pair.shape
    made = np.zeros((rows if axis == 0 else columns, 2 * k), np.float32)
    for part, old, change in pair.blocks():
        for half, matrix in ((slice(0, k), change), (slice(k, 2 * k), old)):
            if axis == 0:
                made[part, half] = matrix @ vectors[:, half]
            else:
                made[:, half] += matrix.T @ vectors[part, half]
    return made


def count_outliers(values: list[float], change: float, *, floor: float, m: int, n: int) -> int:
    """Return how many singular values, the largest first, stand out of noise as large as what they leave of |D|.

    Args:
        values: Singular values.
        change: |D|.
        floor: What none of those counts that are not above.
        m: Length of the axis that was looked at.
        n: Of the other.
    """
    values = [value for value in values if value > floor]
    ranks = range(1, min(len(values), min(m, n) // 2) + 1)
    return max((rank for rank in ranks if values[rank - 1] > _edge(values[:rank], change, m=m, n=n)), default=0)


def _edge(values: list[float], change: float, *, m: int, n: int) -> float:
    """Return the largest singular value of noise as large as what some singular values leave, and a margin."""
    rest = max(_rest(change, values), _ARITHMETIC * change)
    rank = len(values)
    return _STANDS_OUT * rest * (math.sqrt(m) + math.sqrt(n)) / math.sqrt((m - rank) * (n - rank))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Totals:
    before_squared: float
    dots: float
    change_squared: float
    rounding: float
    beyond: float | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Found:
    values: tuple[float, ...]
    is_full: bool
    span: Span | None


def _of(totals: _Totals, found: _Found, change: float) -> MatrixChange:
    return MatrixChange(
        norm=math.sqrt(totals.before_squared),
        change=change,
        rounding=totals.rounding,
        beyond=totals.beyond,
        rank=len(found.values),
        values=found.values,
        rest=_rest(change, list(found.values)),
        is_full=found.is_full,
        span=found.span,
        dots=totals.dots,
        lines=0 if found.span is None else found.span.before.shape[1],
    )


def _rest(change: float, values: list[float]) -> float:
    return math.sqrt(max(0.0, change**2 - sum(value**2 for value in values)))


def _decompose(pair: MatrixPair, axis: int, found: Array) -> tuple[Span, list[float]]:
    """Return the left singular vectors of D within the range of Y, what lies along them, and the singular values."""
    basis = _orthonormal(found)
    before, change = project(pair, axis, basis)
    return _turned(Span(axis=axis, vectors=basis, before=before, change=change))


def _turned(span: Span) -> tuple[Span, list[float]]:
    """Return a span whose vectors are the left singular vectors of D within it, and the singular values."""
    wide = span.change.astype(np.float64)
    lengths, turn = _eigen(wide @ wide.T)
    narrow = turn.astype(np.float32).T
    turned = replace(span, vectors=span.vectors @ turn, before=narrow @ span.before, change=narrow @ span.change)
    return turned, lengths.tolist()


def _right_vectors(pair: MatrixPair, axis: int, found: Array) -> tuple[Array, list[float]]:
    """Return the right singular vectors of D that are seen within the range of Y, [n, p], and the singular values."""
    basis = _orthonormal(found).astype(np.float32)
    return _turned_columns(_Sketch(pair, 1 - axis).times(basis))


def _first(span: Span, rank: int) -> Span:
    return Span(
        axis=span.axis,
        vectors=span.vectors[:, :rank].copy(),
        before=span.before[:rank].copy(),
        change=span.change[:rank].copy(),
    )


class _Sketch:
    """Products of D with few vectors, and, on the way of the first one, sums over its rows and columns."""

    def __init__(self, pair: MatrixPair, axis: int) -> None:
        self._pair, self._axis = pair, axis
        self._sums, self._entries = [0.0, 0.0, 0.0], 0
        self._steps, self._sampled, self._beyond = 0.0, 0, 0

    def times(self, vectors: Array, *, totals: bool = False) -> Array:
        """Return D V for V [n, p] (`axis` 0), or D^T V."""
        rows, columns = self._pair.shape
        made = np.zeros((rows if self._axis == 0 else columns, vectors.shape[1]), np.float32)
        for number, (part, old, change) in enumerate(self._pair.blocks()):
            if self._axis == 0:
                np.matmul(change, vectors, out=made[part])
            else:
                made += change.T @ vectors[part]
            if totals:
                self.count(number, old, change)
        return made

    def decompose(self, vectors: Array, *, fused: bool) -> tuple[Span, list[float]]:
        """Return what `_decompose` does, in one pass, from vectors V that span the right singular vectors; and count.

        Y = D V spans the left ones. Of the rows' axis, Y^T W and Y^T D are summed while a block is in the cache.
        """
        products = Products(self._pair, vectors, axis=self._axis)
        kernels = fused_products() if fused and products.can_be_fused else None
        if kernels is not None:
            for number, (part, stored, edited) in enumerate(self._pair.stored()):
                self._add(products.add_stored(part, stored, edited, kernels), stored.size)
                if number % _STEPS_SUMMED == 0:
                    old, new = (widen(each, self._pair.new.info.dtype) for each in (stored, edited))
                    self._sample(old, new - old)
        else:
            for number, (part, old, change) in enumerate(self._pair.blocks()):
                products.add(part, old, change)
                self.count(number, old, change)
        self.totals(self._pair)  # which no numbers would not get past
        if self._axis == 1:
            before, change = products.across
            return _turned(Span(axis=1, vectors=vectors.astype(np.float64), before=before.T, change=change.T))
        # Y = P S T^T, so P^T W = S^-1 T^T (Y^T W); a column that is nothing leads nowhere.
        basis, lengths, turn = np.linalg.svd(products.across[1].astype(np.float64), full_matrices=False)
        kept = int((lengths > _NOTHING * lengths[0]).sum())
        back = (turn[:kept] / lengths[:kept, None]).astype(np.float32)
        before, change = (back @ each for each in products.along)
        return _turned(Span(axis=0, vectors=basis[:, :kept], before=before, change=change))

    def count(self, number: int, old: Array, change: Array) -> None:
        """Count a block, of such a number."""
        self._sum(old, change)
        if number % _STEPS_SUMMED == 0 or self._is_stored_otherwise:
            self._sample(old, change)

    @property
    def _is_stored_otherwise(self) -> bool:
        return self._pair.old.info.dtype != self._pair.new.info.dtype

    def _sum(self, old: Array, change: Array) -> None:
        one, other = old.reshape(-1), change.reshape(-1)
        self._add([float(np.dot(*pair)) for pair in ((one, one), (one, other), (other, other))], old.size)

    def _add(self, sums: Sequence[float], entries: int) -> None:
        self._entries += entries
        self._sums = [one + other for one, other in zip(self._sums, sums, strict=True)]

    def _sample(self, old: Array, change: Array) -> None:
        sides = [side.info for side in (self._pair.old, self._pair.new)]
        if any(side.encoding is not None for side in sides):
            return
        after = old + change
        step = np.maximum(*(steps(after, side.dtype) for side in sides))
        self._steps += float(np.square(step, dtype=np.float64).sum())
        self._beyond += int(np.count_nonzero(np.abs(change) > np.float32(_HALF_A_STEP) * step))
        self._sampled += old.size

    def totals(self, pair: MatrixPair) -> _Totals:
        """Return the sums of the first product.

        Raises:
            CheckpointError: They are not finite.
        """
        before, dots, change = self._sums
        if not math.isfinite(before + dots + change):
            raise CheckpointError(
                f"{pair.new.directory / pair.new.info.shard}: tensor {pair.name}, or that of the base, holds NaN or "
                "infinite values, so nothing can be said of what was changed; use a checkpoint without them"
            )
        after = math.sqrt(max(0.0, before + 2 * dots + change))
        return _Totals(
            before_squared=before,
            dots=dots,
            change_squared=change,
            rounding=self._rounding(after),
            beyond=self._beyond / self._sampled if self._sampled else None,
        )

    def _rounding(self, after: float) -> float:
        if self._sampled:
            return math.sqrt(self._steps / 12 * self._entries / self._sampled)
        bits = min(bits_per_number(side.info) for side in (self._pair.old, self._pair.new) if side.info.encoding)
        return next(share for least, share in _QUANTISED if bits >= least) * after / ABOVE_ROUNDING
