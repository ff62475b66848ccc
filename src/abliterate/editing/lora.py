r"""The edit of a weight as two small matrices: what a LoRA adapter adds to it when it is merged.

    W' - W = -s U^T (U W)

U [k, d_model] has orthonormal rows (one of them, for one direction), so the change has rank k: the factors are U and
C = -s U W [k, n], with n the number of vectors along the residual axis. They are exact up to the rounding of C; merging
adds U^T C to W and rounds the sum once, without the feedback of `projection.project_out`.

The layout is that of PEFT. A weight [out, in] gets lora_A [k, in] and lora_B [out, k] and becomes W + B A. Of a stack
[E, out, in] of experts, lora_A [E * k, in] has expert after expert, and lora_B [out, k * E] rank after rank. An
embedding has lora_embedding_A [k, vocabulary] and lora_embedding_B [d_model, k].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from abliterate.directions import orthonormalize
from abliterate.formats.stored_component import Component

if TYPE_CHECKING:
    from jaxtyping import Float

# Elements that are held in the arithmetic's wide dtype at a time: 4 MiB of float32.
_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedWeight:
    """What a weight is once the factors are merged into it; Frobenius norms in float64.

    Attributes:
        before: |U W| and |W|.
        after: |U W'| and |W'|, W' rounded to the dtype of W.
        change_error: |U^T C + s U^T (U W)|, by how much the factors are not the edit of this weight.
    """

    before: Component
    after: Component
    change_error: float


def coefficients(
    weight: Float[Tensor, "*shape"],
    *,
    directions: Float[Tensor, "k d_model"],
    residual_axis: int,
    strength: float = 1.0,
) -> Float[Tensor, "experts k n"]:
    """Return C = -strength * U W for each matrix of a weight.

    Args:
        weight: [a, b], or experts [E, a, b]; the axis `residual_axis` has length d_model.
        directions: U, orthonormal rows.
        residual_axis: The axis of `weight` that indexes the residual stream; not the first of three.
        strength: Share of the component that is removed.

    Returns:
        C of each expert (one for a single matrix), in float64 if `weight` is, else in float32.

    Raises:
        ValueError: The weight has one axis or more than three.
    """
    wide = _wide(weight.dtype)
    basis = directions.to(wide)
    found = [
        torch.cat([-strength * (basis @ block.to(wide)) for block in _blocks(matrix)], dim=1)
        for matrix in _matrices(weight, residual_axis)
    ]
    return torch.stack(found)


def pack_factors(
    found: Float[Tensor, "experts k n"], directions: Float[Tensor, "k d_model"], *, rank: int, residual_on_b: bool
) -> tuple[Float[Tensor, "experts_rank a"], Float[Tensor, "b experts_rank"]]:
    """Return lora_A and lora_B as PEFT stores them.

    Args:
        found: C.
        directions: U.
        rank: The adapter's rank, k or more; what is missing is filled up with zeros.
        residual_on_b: Whether the residual stream is what lora_B writes (an out-projection) or what lora_A reads (a
            weight stored the other way round).
    """
    experts, k, _ = found.shape
    spanned = directions.to(found.dtype).expand(experts, -1, -1)
    missing = (0, 0, 0, rank - k)
    wide_a, wide_b = (found, spanned) if residual_on_b else (spanned, found)
    first, second = (torch.nn.functional.pad(each, missing) for each in (wide_a, wide_b))
    second = second.permute(2, 1, 0).reshape(-1, rank * experts)
    return first.reshape(experts * rank, -1).contiguous(), second.contiguous()


def unpack_factors(
    first: Float[Tensor, "experts_rank a"],
    second: Float[Tensor, "b experts_rank"],
    *,
    experts: int,
    residual_on_b: bool,
) -> tuple[Float[Tensor, "experts rank n"], Float[Tensor, "experts rank d_model"]]:
    """Return C and U of each expert out of lora_A and lora_B; the inverse of `pack_factors`."""
    rank = first.shape[0] // experts
    wide_a = first.reshape(experts, rank, -1)
    wide_b = second.reshape(second.shape[0], rank, experts).permute(2, 1, 0)
    return (wide_a, wide_b) if residual_on_b else (wide_b, wide_a)


def merge_factors(
    weight: Float[Tensor, "*shape"],
    found: Float[Tensor, "experts rank n"],
    spanned: Float[Tensor, "experts rank d_model"],
    *,
    directions: Float[Tensor, "k d_model"],
    residual_axis: int,
    strength: float = 1.0,
    rounds_change: bool = False,
) -> MergedWeight:
    """Merge factors into a weight as PEFT does, block by block, and measure what comes out.

    Args:
        weight: As for `coefficients`.
        found: C, as read from the adapter.
        spanned: Its U.
        directions: The U it is meant to be, orthonormal rows.
        residual_axis: As for `coefficients`.
        strength: Share of the component that is to be removed.
        rounds_change: Whether the change is rounded to the weight's dtype before it is added, as PEFT does for
            embeddings and for parameters of modules that it does not know.
    """
    wide = _wide(weight.dtype)
    basis = orthonormalize(directions)[0]
    sums = torch.zeros(5, dtype=torch.float64)
    for matrix, change, span in zip(_matrices(weight, residual_axis), found.to(wide), spanned.to(wide), strict=True):
        start = 0
        for block in _blocks(matrix):
            part = change[:, start : start + block.shape[1]]
            start += block.shape[1]
            change_made = span.T @ part
            before = basis @ block.double()
            error = change_made.double() + strength * (basis.T @ before)
            if rounds_change:
                change_made = change_made.to(weight.dtype).to(wide)
            merged = (block.to(wide) + change_made).to(weight.dtype).double()
            after = basis @ merged
            for index, value in enumerate((before, block.double(), after, merged, error)):
                sums[index] += value.square().sum()
    along, norm, along_after, norm_after, change_error = sums.sqrt().tolist()
    return MergedWeight(
        before=Component(along, norm), after=Component(along_after, norm_after), change_error=change_error
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _matrices(weight: Float[Tensor, "*shape"], residual_axis: int) -> list[Float[Tensor, "d_model n"]]:
    """Return views, one for each matrix of a stack."""
    if weight.dim() not in {2, 3}:
        raise ValueError(f"a weight of {weight.dim()} axes has no low-rank change in PEFT's layout")
    turned = weight.transpose(-1, -2) if residual_axis % weight.dim() == weight.dim() - 1 else weight
    return [turned] if weight.dim() == 2 else list(turned)


def _blocks(matrix: Float[Tensor, "d_model n"]) -> Iterator[Float[Tensor, "d_model width"]]:
    width = max(1, _BLOCK_ELEMENTS // matrix.shape[0])
    for first in range(0, matrix.shape[1], width):
        yield matrix[:, first : first + width]
