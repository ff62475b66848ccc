"""Products of two matrices with few vectors V, all of them in one pass over the rows; D = W' - W.

W V and D V, and (D V)^T W and (D V)^T D, in which each block of rows takes part when its D V is known. They are what a
change of low rank is told by, see `change`.
"""

from types import ModuleType

import numpy as np

from abliterate.formats.segments import FUSED, bits_of, compiled_module
from abliterate.inspection.numbers import Array, MatrixPair


def fused_products() -> ModuleType | None:
    """Return `inspection.fused_products`; None where it cannot be had."""
    return compiled_module("abliterate.inspection.fused_products")


class Products:
    """Such products, all float32.

    Args:
        pair: The matrices, [m, n].
        vectors: V, [n, p].
        axis: On which axis vectors are looked for: of 0 what lies along (D V) is wanted, of 1 what lies along V.

    Attributes:
        across: W V and D V, [m, p]; W V only of axis 1.
        along: (D V)^T W and (D V)^T D, [p, n]; only of axis 0.
        can_be_fused: Whether both are stored as `fused_products` takes them.
    """

    def __init__(self, pair: MatrixPair, vectors: Array, *, axis: int) -> None:
        """Begin with nothing."""
        (rows, columns), p = pair.shape, vectors.shape[1]
        self.across = np.zeros((2, rows, p), np.float32)
        self.along = np.zeros((2 if axis == 0 else 0, p, columns), np.float32)
        sides = (pair.old.info, pair.new.info)
        self.can_be_fused = sides[0].dtype == sides[1].dtype and all(
            side.encoding is None and side.dtype in FUSED for side in sides
        )
        self._vectors, self._turned = vectors, np.ascontiguousarray(vectors.T)
        self._dtype, self._memory = pair.new.info.dtype, np.empty((0, 0, 0), np.float32)

    def add(self, part: slice, old: Array, change: Array) -> None:
        """Take some rows, as numbers."""
        found = np.matmul(change, self._vectors, out=self.across[1][part])
        if not len(self.along):
            np.matmul(old, self._vectors, out=self.across[0][part])
            return
        for sums, rows in zip(self.along, (old, change), strict=True):
            sums += found.T @ rows

    def add_stored(self, part: slice, old: Array, new: Array, kernels: ModuleType) -> list[float]:
        """Take some rows, as they are stored; return |W|^2, W . D and |D|^2 of them."""
        if not self._memory.size:
            self._memory = np.zeros((2, kernels.ROWS, old.shape[1]), np.float32)
        sums = np.zeros(3)
        kernels.add_rows(
            bits_of(old, dtype=self._dtype),
            bits_of(new, dtype=self._dtype),
            self._turned,
            self._memory,
            self.across[:, part],
            self.along,
            sums,
        )
        found: list[float] = sums.tolist()
        return found
