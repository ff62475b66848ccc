r"""Projecting directions out of a weight: the arithmetic of weight orthogonalization, as pure functions.

A matrix that writes to the residual stream is edited so that nothing it writes has a component along r:

    W <- W - r (r^T W)                                 (arXiv 2406.11717, section 4.1; r is a unit vector)

With that, for every input x, r . (W x) = 0. The same holds for a bias (b <- b - r (r . b)) and for the rows
of an embedding. `residual_axis` says which axis of the stored tensor indexes the residual stream: 0 for a
Linear weight [out, in], 1 for GPT-2's Conv1D [in, out] and for an embedding [vocabulary, d_model]; fused
experts have one axis more. Several directions are projected out together, W <- W - U^T (U W), with the
orthonormal rows of U [k, d_model] as a basis of what they span.

A norm between the writer and the stream, y = gamma * x / rms(x), scales each entry. r . y = 0 holds for
x = W z exactly when (gamma * r) . (W z) = 0, so U spans gamma * r in the place of r. A LayerNorm takes the mean
away before it scales, so there the mean of gamma * r is taken away. `effective_directions` follows a chain of norms.

Theorem (appendix E of the paper). Write the residual stream as a sum of writes. If *every* writer is edited
(embedding, positional embedding, attention out-projections, MLP out-projections, and the biases of all of
them), then every stream x of the edited model satisfies r . x = 0. If besides no norm stands between a writer
and the stream, x = x' with x' the stream of the base model whose every write is replaced by its part orthogonal
to r, which is directional ablation of activations; and if the unembedding is untied, both models compute the
same logits. Where the output head shares the embedding's rows, editing the embedding edits the head too.

Rounding. A stored dtype has a grid, and where W is large the change of an entry is less than half a step and
rounds back: in bfloat16 at d_model 4096 about 1 % of the component survives. So what rounding left is fed back:
T <- T - U^T (U Q), Q <- round(T), a few times, and the Q with the smallest |U Q| is kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Elements that are held in the arithmetic's wide dtype at a time, so that memory is bounded by a block and
# not by the tensor: 2 MiB of float32, which stays in cache with its scratch.
_BLOCK_ELEMENTS = 1 << 19

# Feedback stops when what is left of the component is this share of what a random weight of the same norm has, or
# when a round takes away less than a quarter. Three or four rounds in bfloat16, one in float16, none in most blocks
# of float32 and float64, where this is about the accuracy of the arithmetic itself.
_TOLERANCES = {torch.bfloat16: 4e-4, torch.float16: 1e-4, torch.float32: 5e-7, torch.float64: 1e-15}
_MAX_ROUNDS = 8
_LEAST_GAIN = 0.25

# A fibre of which less than this share is left has lost its direction to rounding: its norm is not restored.
_LEAST_LEFT = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class NormFactor:
    """What a norm multiplies by, [d_model] (1 + weight where the norm does that), and whether it is a LayerNorm."""

    gamma: Tensor
    centered: bool = False


def orthonormalize(vectors: Tensor, *, tolerance: float = 1e-12) -> tuple[Tensor, tuple[int, ...]]:
    """Return an orthonormal basis of what some vectors span, and which of the vectors it leaves out.

    Args:
        vectors: [n, d_model]; their lengths do not matter.
        tolerance: A vector is left out if the sine of its angle to the span of those before is less.

    Returns:
        [k, d_model] float64 with k <= n, each row turned like its vector, and the indices left out.

    Raises:
        ValueError: The vectors are not finite or not [n, d_model].
    """
    if vectors.dim() != 2 or not bool(torch.isfinite(vectors).all()):
        raise ValueError(f"directions must be finite and [n, d_model]; found {list(vectors.shape)}")
    basis = torch.empty(0, vectors.shape[1], dtype=torch.float64, device=vectors.device)
    left_out = []
    for index, vector in enumerate(vectors.double()):
        length = vector.norm()
        unit = vector / length if length > 0 else vector
        # Twice, because one pass leaves rounding of the size of the part that it takes away.
        rest = unit - basis.T @ (basis @ unit)
        rest = rest - basis.T @ (basis @ rest)
        if float(rest.norm()) > tolerance:
            basis = torch.cat([basis, (rest / rest.norm()).unsqueeze(0)])
        else:
            left_out.append(index)
    return basis, tuple(left_out)


def effective_directions(directions: Tensor, *, norms: Sequence[NormFactor]) -> Tensor:
    """Return U, the orthonormal directions that a writer's output must not have for the stream to be clean of R.

    Args:
        directions: R, [k, d_model], what the stream shall not have.
        norms: The norms between the writer and the stream, innermost first; without any, U spans what R spans.

    Returns:
        [k', d_model] float64; k' < k only if the norms take a direction away by themselves.
    """
    vectors = directions.double()
    for norm in reversed(norms):
        vectors = vectors * norm.gamma.double()
        if norm.centered:
            vectors = vectors - vectors.mean(dim=1, keepdim=True)
    return orthonormalize(vectors)[0]


def project_out(
    weight: Tensor,
    *,
    directions: Tensor,
    residual_axis: int,
    strength: float = 1.0,
    preserve_norms: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Return W - strength * U^T (U W), rounded with feedback, with U an orthonormal basis of `directions`.

    Args:
        weight: Weight, bias or embedding; the axis `residual_axis` has length d_model.
        directions: [k, d_model]; only what they span matters.
        residual_axis: The axis of `weight` that indexes the residual stream.
        strength: Share of the component that is removed; 1 removes it, 2 reflects it.
        preserve_norms: Scale each vector along `residual_axis` (a column of a Linear weight, what one input
            writes; a token's row of an embedding; a whole bias) back to the norm it had. Scaling such a
            vector as a whole keeps it orthogonal to U; scaling the other way, each output by a factor of
            its own, would put the direction back. One that lay along U altogether stays as the edit left it.
        out: Where to write the result, contiguous; `weight` itself will do. None makes a new tensor.

    Returns:
        A tensor of the shape and dtype of `weight`. Blocks of `block_width` vectors are edited one by one, so a
        tensor that is cut between such blocks gives the same bytes piece by piece. The arithmetic is done in
        float32, or in float64 when `weight` is float64.

    Raises:
        ValueError: The directions are not finite, or not of the axis' length.
    """
    basis = _basis_for(directions, weight, residual_axis)
    edited = torch.empty_like(weight, memory_format=torch.contiguous_format) if out is None else out
    scratch = _Scratch(weight, residual_axis)
    blocks = zip(_blocks(weight, residual_axis), _blocks(edited, residual_axis), strict=True)
    for old, new in blocks:
        if not len(basis):
            new.copy_(old)
        else:
            _project_block(old, new, basis, scratch, strength=strength, preserve_norms=preserve_norms)
    return edited


def block_width(d_model: int) -> int:
    """Return how many vectors along the residual axis are edited together."""
    return max(1, _BLOCK_ELEMENTS // d_model)


def component_norm(weight: Tensor, *, directions: Tensor, residual_axis: int) -> float:
    """Return |U W| / |W| (Frobenius norms, float64): how much of a weight lies along the directions.

    1 means that everything the weight writes lies in their span; a random weight has about sqrt(k/d_model).
    An all-zero weight gives 0.
    """
    along, total = component_and_norm(weight, directions=directions, residual_axis=residual_axis)
    return along / total if total else 0.0


def component_and_norm(weight: Tensor, *, directions: Tensor, residual_axis: int) -> tuple[float, float]:
    """Return |U W| and |W|, Frobenius norms in float64. See `component_norm`."""
    basis = _basis_for(directions, weight, residual_axis)
    scratch = _Scratch(weight, residual_axis, wide=torch.float64)
    along_squared = total_squared = 0.0
    for block in _blocks(weight, residual_axis):
        wide = scratch.exact(block)
        along_squared += float((basis @ wide).square().sum())
        total_squared += float(torch.linalg.vector_norm(wide)) ** 2
    return along_squared**0.5, total_squared**0.5


class ComponentMeter:
    """Measures |U W| and |W| of a tensor that is given row by row in the order of its file, in float64.

    Its sums do not depend on how the rows are dealt out, as long as that is done in the same way each time.

    Args:
        directions: U, [k, d_model], orthonormal rows.
        shape: Shape of the tensor.
        residual_axis: The axis of it that indexes the residual stream.
    """

    def __init__(self, directions: Tensor, *, shape: Sequence[int], residual_axis: int) -> None:
        self._basis = directions.double()
        trailing = torch.Size(shape)[residual_axis % len(shape) + 1 :].numel()
        self._is_last = trailing == 1
        self.row_length = directions.shape[1] if self._is_last else trailing
        self._row = 0
        self._sums = torch.zeros(len(directions), trailing, dtype=torch.float64)
        self._along_squared = self._total_squared = 0.0

    def add(self, rows: Tensor) -> None:
        """Take the next rows, [n, `row_length`] of any dtype: vectors, or what one output of the writer reads."""
        wide = rows.double()
        flat = wide.flatten()
        self._total_squared += float(torch.dot(flat, flat))
        if self._is_last:
            self._along_squared += float((wide @ self._basis.T).square().sum())
            return
        d_model = self._basis.shape[1]
        while len(wide):
            part = wide[: d_model - self._row]
            self._sums.addmm_(self._basis[:, self._row : self._row + len(part)], part)
            self._row += len(part)
            wide = wide[len(part) :]
            if self._row == d_model:
                self._along_squared += float(self._sums.square().sum())
                self._sums.zero_()
                self._row = 0

    def result(self) -> tuple[float, float]:
        """Return |U W| and |W| of all rows so far."""
        return self._along_squared**0.5, self._total_squared**0.5


def residue_bound(dtype: torch.dtype, *, d_model: int, elements: int, before: float, after: float) -> float:
    """Return the largest |U W'| that rounding can leave behind after `project_out` with strength 1.

    Three terms, by Cauchy-Schwarz over each column of W' (the rows of U are orthonormal). Feedback keeps the
    best of several roundings, the plain one among them, so it can leave no more:

    * rounding W' to its dtype moves each entry by at most u |w'|, so u |W'| in all (u = 2^-8 for bfloat16,
      2^-11 for float16, 2^-24 for float32, 2^-53 for float64);
    * entries below the smallest normal number move by half the smallest step: that step/2 * sqrt(elements);
    * the coefficients U W come from sums of d_model terms in float32 (or float64): 4 sqrt(d_model) u |W|.

    Args:
        dtype: Dtype the weight is stored in.
        d_model: Length of the residual axis.
        elements: Number of entries of the weight.
        before: |W|, Frobenius norm before the edit.
        after: |W'|, Frobenius norm after it.
    """
    stored = torch.finfo(dtype)
    worked = torch.finfo(_wide(dtype))
    rounding = stored.eps / 2 * after
    underflow = stored.tiny * stored.eps / 2 * elements**0.5
    arithmetic = 4 * d_model**0.5 * (worked.eps / 2) * before
    return float(rounding + underflow + arithmetic)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _basis_for(directions: Tensor, weight: Tensor, residual_axis: int) -> Tensor:
    d_model = weight.shape[residual_axis]
    if directions.dim() != 2 or directions.shape[1] != d_model:
        raise ValueError(f"directions have shape {list(directions.shape)}, the residual axis has length {d_model}")
    return orthonormalize(directions)[0].to(weight.device)


def _blocks(weight: Tensor, residual_axis: int) -> Iterator[Tensor]:
    """Yield views [d_model, n] that cover a tensor; its vectors along the residual axis are their columns."""
    d_model = weight.shape[residual_axis]
    width = block_width(d_model)
    axis = residual_axis % weight.dim()
    trailing = weight.shape[axis + 1 :].numel()
    # Where the residual axis is the last, all vectors along it lie in one matrix; else in one per leading index.
    whole = weight.reshape(-1, d_model).T.unsqueeze(0) if trailing == 1 else weight.reshape(-1, d_model, trailing)
    for matrix in whole:
        for first in range(0, matrix.shape[1], width):
            yield matrix[:, first : first + width]


class _Scratch:
    """Buffers for one block after another, laid out as the tensor is; making new ones costs more than the arithmetic.

    The arithmetic sees nothing but these, so the bytes that come out do not depend on where a block lay.
    """

    def __init__(self, weight: Tensor, residual_axis: int, *, wide: torch.dtype | None = None) -> None:
        self._is_last = weight.shape[residual_axis % weight.dim() + 1 :].numel() == 1
        self._made: dict[str, Tensor] = {}
        self._stored = weight.dtype
        self._wide = _wide(weight.dtype) if wide is None else wide
        self._device = weight.device

    def _buffer(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        d_model, n = shape
        if name not in self._made or self._made[name].numel() < shape.numel():
            self._made[name] = torch.empty(shape.numel(), dtype=dtype, device=self._device)
        flat = self._made[name][: shape.numel()]
        return flat.view(n, d_model).T if self._is_last else flat.view(d_model, n)

    def exact(self, block: Tensor) -> Tensor:
        """Return a block [d_model, n] in the wide dtype."""
        return self._buffer("exact", block.shape, self._wide).copy_(block)

    def rounded(self, exact: Tensor, *, slot: int) -> tuple[Tensor, Tensor]:
        """Return `exact` in the stored dtype, kept until its slot is used again, and that in the wide dtype."""
        stored = self._buffer(f"rounded {slot}", exact.shape, self._stored).copy_(exact)
        return stored, self._buffer("widened", exact.shape, self._wide).copy_(stored)


def _project_block(
    old: Tensor, new: Tensor, basis: Tensor, scratch: _Scratch, *, strength: float, preserve_norms: bool
) -> None:
    wide = _wide(old.dtype)
    directions = basis.to(wide)
    exact = scratch.exact(old)
    before = directions @ exact
    norms = torch.linalg.vector_norm(exact, dim=0) if preserve_norms else None
    wanted = (1 - strength) * before
    exact.addmm_(directions.T, before, alpha=-strength)
    if norms is not None:
        left = torch.linalg.vector_norm(exact, dim=0)
        scale = torch.where(left > _LEAST_LEFT * norms, norms / left, 1.0)
        exact *= scale
        wanted *= scale
    new.copy_(_rounded_with_feedback(exact, scratch, directions, wanted))


def _rounded_with_feedback(exact: Tensor, scratch: _Scratch, directions: Tensor, wanted: Tensor) -> Tensor:
    """Round `exact` [d_model, n] to Q in the stored dtype so that U Q comes closest to `wanted` [k, n]; changes it."""
    slot = 0
    best, widened = scratch.rounded(exact, slot=slot)
    random_share = (len(directions) / exact.shape[0]) ** 0.5
    goal = _TOLERANCES[best.dtype] * random_share * float(torch.linalg.vector_norm(exact))
    error = directions @ widened - wanted
    best_size = float(torch.linalg.vector_norm(error))
    for _ in range(_MAX_ROUNDS):
        if best_size <= goal:
            break
        exact.addmm_(directions.T, error, alpha=-1.0)
        rounded, widened = scratch.rounded(exact, slot=1 - slot)
        error = directions @ widened - wanted
        size = float(torch.linalg.vector_norm(error))
        if not size < best_size:
            break
        has_converged = size > (1 - _LEAST_GAIN) * best_size
        best, best_size, slot = rounded, size, 1 - slot
        if has_converged:
            break
    return best
