r"""Projecting a direction out of a weight: the arithmetic of weight orthogonalization, as pure functions.

A matrix that writes to the residual stream is edited so that nothing it writes has a component along r:

    W <- W - r (r^T W)                                 (arXiv 2406.11717, section 4.1; r is a unit vector)

With that, for every input x, r . (W x) = 0. The same holds for a bias (b <- b - r (r . b)) and for the rows
of an embedding. `residual_axis` says which axis of the stored tensor indexes the residual stream: 0 for a
Linear weight [out, in], 1 for GPT-2's Conv1D [in, out] and for an embedding [vocabulary, d_model].

Theorem (appendix E of the paper). Write the residual stream as a sum of writes. If *every* writer is edited
(embedding, positional embedding, attention out-projections, MLP out-projections, and the biases of all of
them), then every stream x of the edited model satisfies r . x = 0, and x = x' with x' the stream of the base
model whose every write is replaced by its part orthogonal to r, which is directional ablation of activations.
Both models then compute the same logits, under two conditions that the paper leaves unsaid:

1. The unembedding is untied. Where the output head shares the embedding's rows, editing the embedding edits
   the head too: the stream is still clean, but the logits are those of another head.
2. No norm stands between a writer and the stream (as in Gemma 2 or OLMo 2). With y = gamma * W x / rms(W x),
   r . (W x) = 0 does not give r . y = 0: neither the stream is clean nor are the logits equal.
"""

import math

import torch
from torch import Tensor

# Elements converted to float64 at a time when a norm is taken, so that a large embedding is never held in
# float64 whole: 32 MiB.
_BLOCK_ELEMENTS = 1 << 22


def project_out(weight: Tensor, *, direction: Tensor, residual_axis: int, strength: float = 1.0) -> Tensor:
    """Return W - strength * r (r^T W), with r the unit vector along `direction`.

    Args:
        weight: Weight, bias or embedding; the axis `residual_axis` has length d_model.
        direction: [d_model], any non-zero norm; only where it points matters.
        residual_axis: The axis of `weight` that indexes the residual stream.
        strength: Share of the component that is removed; 1 removes it, 2 reflects it.

    Returns:
        A new tensor of the shape and dtype of `weight`. The arithmetic is done in float32, or in float64 when
        `weight` is float64, and rounded once.
    """
    wide_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    unit = _unit(direction, weight.shape[residual_axis]).to(weight.device, wide_dtype)
    wide = weight.to(wide_dtype, copy=True)
    coefficients = torch.tensordot(unit, wide, dims=([0], [residual_axis]))
    if weight.dim() == 2 and residual_axis % 2 == 0:
        wide.addr_(unit, coefficients, alpha=-strength)
    elif weight.dim() == 2:
        wide.addr_(coefficients, unit, alpha=-strength)
    else:
        along_axis = [1] * weight.dim()
        along_axis[residual_axis] = -1
        wide.sub_(unit.view(along_axis) * coefficients.unsqueeze(residual_axis), alpha=strength)
    return wide.to(weight.dtype)


def component_norm(weight: Tensor, *, direction: Tensor, residual_axis: int) -> float:
    """Return |r^T W| / |W| (Frobenius norms, float64): how much of a weight lies along the direction.

    1 means that everything the weight writes points along r; for a random weight it is about 1/sqrt(d_model).
    An all-zero weight gives 0.
    """
    along, total = component_and_norm(weight, direction=direction, residual_axis=residual_axis)
    return along / total if total else 0.0


def component_and_norm(weight: Tensor, *, direction: Tensor, residual_axis: int) -> tuple[float, float]:
    """Return |r^T W| and |W|, Frobenius norms in float64. See `component_norm`."""
    d_model = weight.shape[residual_axis]
    unit = _unit(direction, d_model).to(weight.device)
    rows = weight.movedim(residual_axis, -1).reshape(-1, d_model)
    along_squared = total_squared = 0.0
    for block in torch.split(rows, max(1, _BLOCK_ELEMENTS // d_model)):
        wide = block.double()
        along_squared += float((wide @ unit).square().sum())
        total_squared += float(wide.square().sum())
    return along_squared**0.5, total_squared**0.5


def residue_bound(dtype: torch.dtype, *, d_model: int, elements: int, before: float, after: float) -> float:
    """Return the largest |r^T W'| that rounding can leave behind after `project_out` with strength 1.

    Three terms, by Cauchy-Schwarz over each column of W' (|r| = 1):

    * rounding W' to its dtype moves each entry by at most u |w'|, so u |W'| in all (u = 2^-8 for bfloat16,
      2^-11 for float16, 2^-24 for float32, 2^-53 for float64);
    * entries below the smallest normal number move by half the smallest step: that step/2 * sqrt(elements);
    * the coefficients r^T W come from sums of d_model terms in float32 (or float64): 4 sqrt(d_model) u |W|.

    Args:
        dtype: Dtype the weight is stored in.
        d_model: Length of the residual axis.
        elements: Number of entries of the weight.
        before: |W|, Frobenius norm before the edit.
        after: |W'|, Frobenius norm after it.
    """
    stored = torch.finfo(dtype)
    worked = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    rounding = stored.eps / 2 * after
    underflow = stored.tiny * stored.eps / 2 * elements**0.5
    arithmetic = 4 * d_model**0.5 * (worked.eps / 2) * before
    return float(rounding + underflow + arithmetic)


def _unit(direction: Tensor, d_model: int) -> Tensor:
    if tuple(direction.shape) != (d_model,):
        raise ValueError(f"direction has shape {list(direction.shape)}, the residual axis has length {d_model}")
    wide = direction.double()
    norm = float(wide.norm())
    if not math.isfinite(norm) or norm == 0.0:
        raise ValueError("direction must be finite and non-zero")
    return wide / norm
