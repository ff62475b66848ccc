"""Products of two matrices with few vectors V, all of them in one pass over the rows; D = W' - W.

W V and D V, and (D V)^T W and (D V)^T D, in which each block of rows takes part when its D V is known. They are what a
change of low rank is told by, see `change`.
"""

from types import ModuleType

import torch
from torch import Tensor

from abliterate.formats.projection import tensor_bits
from abliterate.formats.segments import FUSED, compiled_module
from abliterate.inspection.numbers import MatrixPair


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

    def __init__(self, pair: MatrixPair, vectors: Tensor, *, axis: int) -> None:
        """Begin with nothing."""
        (rows, columns), p = pair.shape, vectors.shape[1]
        self.across = torch.zeros(2, rows, p)
        self.along = torch.zeros(2 if axis == 0 else 0, p, columns)
        sides = (pair.old.info, pair.new.info)
        self.can_be_fused = sides[0].dtype == sides[1].dtype and all(
            side.encoding is None and side.dtype in FUSED for side in sides
        )
        self._vectors, self._turned = vectors, vectors.T.contiguous()
        self._memory: Tensor | None = None

    def add(self, part: slice, old: Tensor, change: Tensor) -> None:
        """Take some rows, as numbers."""
        found = torch.mm(change, self._vectors, out=self.across[1][part])
        if not len(self.along):
            torch.mm(old, self._vectors, out=self.across[0][part])
            return
        for sums, rows in zip(self.along, (old, change), strict=True):
            sums.addmm_(found.T, rows)

    def add_stored(self, part: slice, old: Tensor, new: Tensor, kernels: ModuleType) -> list[float]:
        """Take some rows, as they are stored; return |W|^2, W . D and |D|^2 of them."""
        if self._memory is None:
            self._memory = torch.zeros(2, kernels.ROWS, old.shape[1])
        sums = torch.zeros(3, dtype=torch.float64)
        kernels.add_rows(
            tensor_bits(old),
            tensor_bits(new),
            self._turned.numpy(),
            self._memory.numpy(),
            self.across[:, part].numpy(),
            self.along.numpy(),
            sums.numpy(),
        )
        return [float(each) for each in sums]
