"""`products.Products.add`, compiled: what is read of two matrices is widened, subtracted and multiplied in the cache.

Its sums are those of the same written with numpy, in another order. See `formats.fused`, which also says when it is
compiled.
"""

from typing import Any

import numpy as np
from numba import njit

from abliterate.formats.fused import _widen

# Rows whose products are added together, and columns that are worked on together.
ROWS, _WIDTH = 4, 1024


def _compiled(*flags: str) -> Any:
    return njit(nogil=True, cache=True, error_model="numpy", fastmath=set(flags))


@_compiled("reassoc", "contract", "nsz")
def add_rows(old, new, vectors, memory, across, along, sums):
    """Add the products of some rows of W and W'; D = W' - W.

    Args:
        old: W of these rows, [m, n]: float32, or the bits of bfloat16 (unsigned) or float16 (signed).
        new: W', likewise.
        vectors: V^T, [p, n] float32.
        memory: [2, ROWS, n] float32, for the function's own use.
        across: Where W V (unless `along` is wanted) and D V of these rows go, [2, m, p] float32.
        along: (D V)^T W and (D V)^T D, [2, p, n] float32, are added to it; of length 0: they are not wanted.
        sums: |W|^2, W . D and |D|^2 are added to it, [3] float64.
    """
    m, n = old.shape
    p = len(vectors)
    products = np.zeros((2, p, ROWS))
    for top in range(0, m, ROWS):
        count = min(ROWS, m - top)
        products[:] = 0.0
        for row in range(count):
            for first in range(0, n, _WIDTH):
                end = min(n, first + _WIDTH)
                before, after = old[top + row, first:end], new[top + row, first:end]
                number, change = memory[0, row, first:end], memory[1, row, first:end]
                squares = dots = changes = np.float32(0)
                for j in range(len(number)):
                    one = np.float32(_widen(before[j]))
                    other = np.float32(_widen(after[j]) - one)
                    number[j], change[j] = one, other
                    squares += one * one
                    dots += one * other
                    changes += other * other
                sums[0] += squares
                sums[1] += dots
                sums[2] += changes
                for r in range(p):
                    share = vectors[r, first:end]
                    of_change = np.float32(0)
                    for j in range(len(number)):
                        of_change += share[j] * change[j]
                    products[1, r, row] += of_change
                if len(along) == 0:
                    for r in range(p):
                        share = vectors[r, first:end]
                        of_number = np.float32(0)
                        for j in range(len(number)):
                            of_number += share[j] * number[j]
                        products[0, r, row] += of_number
            for r in range(p):
                across[0, top + row, r] = products[0, r, row]  # 0 where it was not wanted
                across[1, top + row, r] = products[1, r, row]
        if len(along) > 0:
            # What is left in the memory of rows that are not there counts nothing.
            for first in range(0, n, _WIDTH):
                end = min(n, first + _WIDTH)
                for side in range(2):
                    a, b = memory[side, 0, first:end], memory[side, 1, first:end]
                    c, d = memory[side, 2, first:end], memory[side, 3, first:end]
                    for r in range(p):
                        w, x, y, z = (
                            np.float32(products[1, r, 0]),
                            np.float32(products[1, r, 1]),
                            np.float32(products[1, r, 2]),
                            np.float32(products[1, r, 3]),
                        )
                        sum_of = along[side, r, first:end]
                        for j in range(len(sum_of)):
                            sum_of[j] += (w * a[j] + x * b[j]) + (y * c[j] + z * d[j])
