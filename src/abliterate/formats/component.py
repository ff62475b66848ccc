"""How much of a weight lies along directions: |U W| and |W|, of a tensor in hand or of one that is read row by row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from abliterate.checkpoints.file_assembly import Scratch
from abliterate.formats.projection import Block, basis_for, bits_of, blocks_along, can_be_fused, fused_kernels
from abliterate.formats.stored_component import Component

if TYPE_CHECKING:
    from jaxtyping import Float


def component_norm(
    weight: Float[Tensor, "*shape"], *, directions: Float[Tensor, "k d_model"], residual_axis: int
) -> float:
    """Return |U W| / |W| (Frobenius norms, float64): how much of a weight lies along the directions.

    1 means that everything the weight writes lies in their span; a random weight has about sqrt(k/d_model).
    An all-zero weight gives 0.
    """
    return component_and_norm(weight, directions=directions, residual_axis=residual_axis).share


def component_and_norm(
    weight: Float[Tensor, "*shape"], *, directions: Float[Tensor, "k d_model"], residual_axis: int
) -> Component:
    """Return |U W| and |W|, Frobenius norms in float64. See `component_norm`."""
    basis = basis_for(directions, weight, residual_axis)
    memory = Block(weight, residual_axis, Scratch(), wide=torch.float64)
    along_squared = total_squared = 0.0
    for block in blocks_along(weight, residual_axis):
        wide = memory.exact(block)
        along_squared += float((basis @ wide).square().sum())
        total_squared += float(torch.linalg.vector_norm(wide)) ** 2
    return Component(along_squared**0.5, total_squared**0.5)


class ComponentMeter:
    """Measures |U W| and |W| of a tensor that is given row by row in the order of its file.

    Its sums do not depend on how the rows are dealt out, as long as that is done in the same way each time.

    Args:
        directions: U, orthonormal rows.
        shape: Shape of the tensor.
        residual_axis: The axis of it that indexes the residual stream.
        fused: See `projection.project_out`.
    """

    def __init__(
        self,
        directions: Float[Tensor, "k d_model"],
        *,
        shape: Sequence[int],
        residual_axis: int,
        fused: bool = False,
    ) -> None:
        self._basis = directions.double().contiguous()
        self._kernels = fused_kernels() if fused else None
        trailing = torch.Size(shape)[residual_axis % len(shape) + 1 :].numel()
        self._is_last = residual_axis % len(shape) == len(shape) - 1
        self.row_length = directions.shape[1] if self._is_last else trailing
        self._row = 0
        self._sums = torch.zeros(len(directions), trailing, dtype=torch.float64)
        self._along_squared = self._total_squared = 0.0

    def add(self, rows: Float[Tensor, "n row_length"], *, scratch: Scratch) -> None:
        """Take the next rows: vectors, or what one output of the writer reads."""
        if self._kernels is not None and can_be_fused(rows):
            self._add_fused(self._kernels, rows)
            return
        flat = scratch.take("measured", rows.numel(), dtype=torch.float64, device=rows.device)
        wide = flat.view(rows.shape).copy_(rows)
        self._total_squared += float(torch.dot(flat, flat))
        if self._is_last:
            self._along_squared += float((wide @ self._basis.T).square().sum())
            return
        for part, basis in self._parts(wide):
            self._sums.addmm_(basis, part)

    def _add_fused(self, kernels: ModuleType, rows: Float[Tensor, "n row_length"]) -> None:
        if self._is_last:
            along_squared, total_squared = kernels.measure_vectors(bits_of(rows), self._basis.numpy())
            self._along_squared += along_squared
            self._total_squared += total_squared
            return
        for part, basis in self._parts(rows):
            self._total_squared += kernels.measure_rows(bits_of(part), basis.contiguous().numpy(), self._sums.numpy())

    def _parts(
        self, rows: Float[Tensor, "n row_length"]
    ) -> Iterator[tuple[Float[Tensor, "m row_length"], Float[Tensor, "k m"]]]:
        """Yield rows of one matrix with what U is in them; the sums of a matrix that is whole are counted."""
        d_model = self._basis.shape[1]
        while len(rows):
            part = rows[: d_model - self._row]
            yield part, self._basis[:, self._row : self._row + len(part)]
            self._row += len(part)
            rows = rows[len(part) :]
            if self._row == d_model:
                self._along_squared += float(self._sums.square().sum())
                self._sums.zero_()
                self._row = 0

    def result(self) -> Component:
        """Return |U W| and |W| of all rows so far."""
        return Component(self._along_squared**0.5, self._total_squared**0.5)
