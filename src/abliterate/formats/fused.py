"""`projection.project_out` and the meter of `stored_component`, compiled: few passes, over numbers in the cache.

Every step is one IEEE operation and every sum has an order, that of `projection`, so the same bytes come out with this
and without. Only the sums of the meter, which are of float64, are in no order.

Importing it compiles nothing. The first call does, for some seconds, and what comes of it is kept beside this file or
in the user's cache folder (https://numba.readthedocs.io/en/stable/developer/caching.html).
"""

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from abliterate.formats.segments import CHUNK_ROWS, N_LANES

# Columns that are worked on together: what comes out does not depend on it.
_WIDTH = 1024


def _widen(stored):
    """Return a stored number as float32: bfloat16 is uint16 here and float16 int16, both as their bits."""
    raise TypeError("it is compiled into what calls it, for each type as `_widen_of` says")


def _narrow(number, like):
    """Return a float32 as what `like` is, rounded to the nearest, ties to even; NaN may become another number."""
    raise TypeError("it is compiled into what calls it, for each type as `_narrow_of` says")


# Numbers of 32 bits become 64 wherever two of them meet, so each result is cut back.
@overload(_widen)
def _widen_of(stored):
    if stored == types.float32:
        return lambda stored: stored
    if stored == types.uint16:
        return lambda stored: np.uint32(np.uint32(stored) << 16).view(np.float32)

    def widen_half(stored):
        bits = np.uint32(np.uint16(stored))
        magnitude = np.uint32((bits & 0x7FFF) << 13)
        # Its exponent is 112 less than float32 would have it, and all ones where the number is none.
        finite = np.float32(magnitude.view(np.float32) * np.float32(2.0**112)).view(np.uint32)
        found = finite if bits & 0x7C00 != 0x7C00 else np.uint32(magnitude | 0x7F800000)
        return np.uint32((bits & 0x8000) << 16 | found).view(np.float32)

    return widen_half


@overload(_narrow)
def _narrow_of(number, like):
    if like == types.float32:
        return lambda number, like: number
    if like == types.uint16:

        def narrow_bfloat(number, like):
            bits = np.float32(number).view(np.uint32)
            return np.uint16(np.uint32(bits + 0x7FFF + (bits >> 16 & 1)) >> 16)

        return narrow_bfloat

    def narrow_half(number, like):
        bits = np.float32(number).view(np.uint32)
        magnitude = np.uint32(bits & 0x7FFFFFFF)
        normal = np.uint32(np.uint32(magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13)
        # The step of float32 at a half is that of float16 below its least normal number, so this rounds to it.
        small = np.uint32(np.float32(magnitude.view(np.float32) + np.float32(0.5)).view(np.uint32) - 0x3F000000)
        none = np.uint32(0x7C00) if magnitude <= 0x7F800000 else np.uint32(0x7E00)
        half = small if magnitude < 0x38800000 else normal
        half = none if magnitude >= 0x47800000 else half
        return np.int16(np.uint16(half | (bits >> 16 & 0x8000)))

    return narrow_half


def _compiled(*flags: str) -> Any:
    return njit(nogil=True, cache=True, error_model="numpy", fastmath=set(flags))


@_compiled()
def _feed_back(inverse, error, strengths):
    """Set `strengths` to (U_S U_S^T)^-1 times `error`."""
    k, n = error.shape
    for r in range(k):
        for j in range(n):
            strength = 0.0
            for q in range(k):
                strength += inverse[r, q] * error[q, j]
            strengths[r, j] = strength


@_compiled()
def _take_away(stored, shares, coefficients, exact):
    """Set `exact` to some numbers of a row, less what the directions take away; `shares` is U of the row."""
    for j in range(len(stored)):
        exact[j] = _widen(stored[j])
    for r in range(len(shares)):
        share, coefficient = shares[r], coefficients[r]
        for j in range(len(stored)):
            exact[j] -= share * coefficient[j]


@_compiled()
def project_columns(matrix, edited, directions, bounds, inverses, strength, is_scaled, least_left, sums):
    """Project directions out of the columns of a matrix, [d_model, n]; see `projection.project_out`.

    Args:
        matrix: float32, or the bits of bfloat16 (unsigned) or float16 (signed).
        edited: Where the result goes; `matrix` itself will do.
        directions: U, [k, d_model] float32.
        bounds: Where each segment of the residual axis begins, and the end of the last.
        inverses: For each segment, (U_S U_S^T)^-1 with S the axis from there on, [segments, k, k] float64.
        strength: Share of the component that is removed.
        is_scaled: Whether the columns get their norms back.
        least_left: A column of which less than this share is left keeps the norm it has.
        sums: |U W|^2 and |W|^2 are added to it, [2] float64.
    """
    k, d_model = directions.shape
    exact = np.empty(_WIDTH, np.float32)
    wanted = np.empty(_WIDTH, np.float32)
    rounded = np.empty(_WIDTH, matrix.dtype)
    for first in range(0, matrix.shape[1], _WIDTH):
        n = min(_WIDTH, matrix.shape[1] - first)
        terms = np.empty((k, n), np.float32)
        square_terms = np.empty(n, np.float32)
        before = np.zeros((k, n))
        squares = np.zeros(n)
        for top in range(0, d_model, CHUNK_ROWS):
            terms[:] = 0
            square_terms[:] = 0
            for i in range(top, min(top + CHUNK_ROWS, d_model)):
                stored = matrix[i, first : first + n]
                for j in range(n):
                    number = _widen(stored[j])
                    exact[j] = number
                    square_terms[j] += number * number
                for r in range(k):
                    share, along = directions[r, i], terms[r]
                    for j in range(n):
                        along[j] += share * exact[j]
            before += terms
            squares += square_terms
        for j in range(n):
            sums[1] += squares[j]
            for r in range(k):
                sums[0] += before[r, j] * before[r, j]
        coefficients = (strength * before).astype(np.float32)
        scale = np.ones(n, np.float32)
        if is_scaled:
            left = np.zeros(n)
            for top in range(0, d_model, CHUNK_ROWS):
                square_terms[:] = 0
                for i in range(top, min(top + CHUNK_ROWS, d_model)):
                    _take_away(matrix[i, first : first + n], directions[:, i], coefficients, exact)
                    for j in range(n):
                        square_terms[j] += exact[j] * exact[j]
                left += square_terms
            for j in range(n):
                norm_left, norm = np.sqrt(left[j]), np.sqrt(squares[j])
                if norm_left > least_left * norm:
                    scale[j] = norm / norm_left
        error = np.zeros((k, n))
        strengths = np.zeros((k, n), np.float32)
        for segment in range(len(bounds) - 1):
            if segment:
                _feed_back(inverses[segment], error, strengths)
            for top in range(bounds[segment], bounds[segment + 1], CHUNK_ROWS):
                terms[:] = 0
                for i in range(top, min(top + CHUNK_ROWS, bounds[segment + 1])):
                    _take_away(matrix[i, first : first + n], directions[:, i], coefficients, exact)
                    if is_scaled:
                        for j in range(n):
                            exact[j] *= scale[j]
                    for j in range(n):
                        wanted[j] = exact[j]
                    for r in range(k if segment else 0):
                        share, fed = directions[r, i], strengths[r]
                        for j in range(n):
                            wanted[j] -= share * fed[j]
                    for j in range(n):
                        rounded[j] = _narrow(wanted[j], rounded[j])
                        exact[j] = _widen(rounded[j]) - exact[j]
                    for r in range(k):
                        share, off = directions[r, i], terms[r]
                        for j in range(n):
                            off[j] += share * exact[j]
                    target = edited[i, first : first + n]
                    for j in range(n):
                        target[j] = rounded[j]
                error += terms


@_compiled()
def _lane_sum(shares, numbers, lanes, halves):
    """Return the sum of `shares` times `numbers`, both [n]."""
    lanes[:] = 0
    for top in range(0, len(numbers), N_LANES):
        n = min(N_LANES, len(numbers) - top)
        some_shares, some = shares[top : top + n], numbers[top : top + n]
        for lane in range(n):
            lanes[lane] += some_shares[lane] * some[lane]
    half = N_LANES // 2
    for lane in range(half):
        halves[lane] = np.float64(lanes[lane]) + np.float64(lanes[half + lane])
    while half > 1:
        half //= 2
        for lane in range(half):
            halves[lane] += halves[half + lane]
    return halves[0]


@_compiled()
def project_vectors(matrix, edited, directions, bounds, inverses, strength, is_scaled, least_left, sums):
    """Project directions out of the rows of a matrix, [n, d_model]; otherwise as `project_columns`."""
    k, d_model = directions.shape
    exact = np.empty(d_model, np.float32)
    wanted = np.empty(d_model, np.float32)
    rounded = np.empty(d_model, matrix.dtype)
    lanes = np.empty(N_LANES, np.float32)
    halves = np.empty(N_LANES // 2)
    before = np.empty((k, 1))
    error = np.empty((k, 1))
    strengths = np.empty((k, 1), np.float32)
    for row in range(len(matrix)):
        stored = matrix[row]
        for i in range(d_model):
            exact[i] = _widen(stored[i])
        squares = _lane_sum(exact, exact, lanes, halves)
        sums[1] += squares
        for r in range(k):
            before[r, 0] = _lane_sum(directions[r], exact, lanes, halves)
            sums[0] += before[r, 0] * before[r, 0]
        for r in range(k):
            shares, coefficient = directions[r], np.float32(strength * before[r, 0])
            for i in range(d_model):
                exact[i] -= shares[i] * coefficient
        if is_scaled:
            norm_left, norm = np.sqrt(_lane_sum(exact, exact, lanes, halves)), np.sqrt(squares)
            if norm_left > least_left * norm:
                scale = np.float32(norm / norm_left)
                for i in range(d_model):
                    exact[i] *= scale
        error[:] = 0.0
        strengths[:] = 0
        for segment in range(len(bounds) - 1):
            start, end = bounds[segment], bounds[segment + 1]
            number, want, round_to = exact[start:end], wanted[start:end], rounded[start:end]
            if segment:
                _feed_back(inverses[segment], error, strengths)
            for i in range(len(want)):
                want[i] = number[i]
            for r in range(k if segment else 0):
                shares, fed = directions[r, start:end], strengths[r, 0]
                for i in range(len(want)):
                    want[i] -= shares[i] * fed
            for i in range(len(want)):
                round_to[i] = _narrow(want[i], round_to[i])
                number[i] = _widen(round_to[i]) - number[i]
            for r in range(k):
                error[r, 0] += _lane_sum(directions[r, start:end], number, lanes, halves)
        target = edited[row]
        for i in range(d_model):
            target[i] = rounded[i]


@_compiled("reassoc", "nsz")
def measure_vectors(vectors, directions):
    """Return |U W|^2 and |W|^2 of vectors, [n, d_model]; `directions` is U, [k, d_model] float64."""
    along_squared = total_squared = 0.0
    for row in range(len(vectors)):
        vector = vectors[row]
        for i in range(len(vector)):
            number = np.float64(_widen(vector[i]))
            total_squared += number * number
        for r in range(len(directions)):
            shares = directions[r]
            along = 0.0
            for i in range(len(vector)):
                along += shares[i] * np.float64(_widen(vector[i]))
            along_squared += along * along
    return along_squared, total_squared


@_compiled()
def measure_rows(rows, directions, sums):
    """Add U W of some rows, [m, n], to `sums`, [k, n], and return their |W|^2; `directions` is U of them, [k, m]."""
    total_squared = 0.0
    squares = np.empty(_WIDTH)
    for first in range(0, rows.shape[1], _WIDTH):
        n = min(_WIDTH, rows.shape[1] - first)
        squares[:] = 0.0
        for i in range(len(rows)):
            row = rows[i, first : first + n]
            for j in range(n):
                number = np.float64(_widen(row[j]))
                squares[j] += number * number
            for r in range(len(directions)):
                share, along = directions[r, i], sums[r, first : first + n]
                for j in range(n):
                    along[j] += share * np.float64(_widen(row[j]))
        for j in range(n):
            total_squared += squares[j]
    return total_squared
