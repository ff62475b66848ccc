"""How much of a weight in hand lies along directions: |U W| and |W|. `stored_component` measures what lies in files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from abliterate.checkpoints.file_assembly import Scratch
from abliterate.formats.projection import Block, basis_for, blocks_along
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
