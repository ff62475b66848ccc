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
T <- T - U^T (U Q), Q <- round(T). What one such round leaves is so little that few entries need to be rounded
otherwise to take it away, so the next ones feed it back to an eighth of the axis each, S, at an eighth of the cost:
T_S <- T_S - U_S^T (U_S U_S^T)^-1 (U Q). Of all roundings that with the smallest |U Q| is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from abliterate.checkpoints.file_assembly import Scratch
from abliterate.directions import orthonormalize

if TYPE_CHECKING:
    from jaxtyping import Float, Float64

# Elements that are held in the arithmetic's wide dtype at a time, so that memory is bounded by a block and
# not by the tensor: 2 MiB of float32, which stays in cache with its scratch.
_BLOCK_ELEMENTS = 1 << 19

# Feedback stops when what is left of the component is this share of what a random weight of the same norm has, or
# when a round of the whole axis takes away less than a quarter. A round and two parts in bfloat16, a round and one in
# float16, none in most blocks of float32 and float64, where this is about the accuracy of the arithmetic itself.
_TOLERANCES = {torch.bfloat16: 4e-4, torch.float16: 1e-4, torch.float32: 5e-7, torch.float64: 1e-15}
_MAX_ROUNDS = 8
_LEAST_GAIN = 0.25

# A part of the axis takes what is fed back only if it has at least a quarter of its share of every direction: less
# would have to move its entries by far more than rounding does.
_N_PARTS = 8
_LEAST_SHARE = 0.25

# A fibre of which less than this share is left has lost its direction to rounding: its norm is not restored.
_LEAST_LEFT = 1e-3


class Component(NamedTuple):
    """How much of a tensor lies along directions U; Frobenius norms.

    Attributes:
        along: |U W|.
        norm: |W|.
    """

    along: float
    norm: float

    @property
    def share(self) -> float:
        """|U W| / |W|, and 0 where W is 0."""
        return self.along / self.norm if self.norm else 0.0

    def survivor_of(self, before: Component) -> float:
        """Return |U W'| / |U W|, W' being this tensor and W what it was `before`; 0 where there was nothing."""
        return self.along / before.along if before.along else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NormFactor:
    """What a norm multiplies by (1 + weight where the norm does that), and whether it is a LayerNorm."""

    gamma: Float[Tensor, " d_model"]
    centered: bool = False


def effective_directions(
    directions: Float[Tensor, "k d_model"], *, norms: Sequence[NormFactor]
) -> Float64[Tensor, "k_left d_model"]:
    """Return U, the orthonormal directions that a writer's output must not have for the stream to be clean of R.

    Args:
        directions: R, what the stream shall not have.
        norms: The norms between the writer and the stream, innermost first; without any, U spans what R spans.

    Returns:
        U; it has fewer rows than R only if the norms take a direction away by themselves.
    """
    vectors = directions.double()
    for norm in reversed(norms):
        vectors = vectors * norm.gamma.double()
        if norm.centered:
            vectors = vectors - vectors.mean(dim=1, keepdim=True)
    return orthonormalize(vectors)[0]


def project_out(
    weight: Float[Tensor, "*shape"],
    *,
    directions: Float[Tensor, "k d_model"],
    residual_axis: int,
    strength: float = 1.0,
    preserve_norms: bool = False,
    out: Float[Tensor, "*shape"] | None = None,
    scratch: Scratch | None = None,
    before: NormSums | None = None,
) -> Float[Tensor, "*shape"]:
    """Return W - strength * U^T (U W), rounded with feedback, with U an orthonormal basis of `directions`.

    Args:
        weight: Weight, bias or embedding; the axis `residual_axis` has length d_model.
        directions: Only what they span matters.
        residual_axis: The axis of `weight` that indexes the residual stream.
        strength: Share of the component that is removed; 1 removes it, 2 reflects it.
        preserve_norms: Scale each vector along `residual_axis` (a column of a Linear weight, what one input
            writes; a token's row of an embedding; a whole bias) back to the norm it had. Scaling such a
            vector as a whole keeps it orthogonal to U; scaling the other way, each output by a factor of
            its own, would put the direction back. One that lay along U altogether stays as the edit left it.
        out: Where to write the result, contiguous; `weight` itself will do. None makes a new tensor.
        scratch: Memory to work in, for a caller that calls often.
        before: Is told |U W| and |W|, with the accuracy of the arithmetic.

    Returns:
        A tensor of the shape and dtype of `weight`. Blocks of `block_width` vectors are edited one by one, so a
        tensor that is cut between such blocks gives the same bytes piece by piece. The arithmetic is done in
        float32, or in float64 when `weight` is float64.

    Raises:
        ValueError: The directions are not finite, or not of the axis' length.
    """
    basis = _basis_for(directions, weight, residual_axis)
    edited = torch.empty_like(weight, memory_format=torch.contiguous_format) if out is None else out
    wide = _wide(weight.dtype)
    memory = _Block(weight, residual_axis, scratch or Scratch(), wide=wide)
    spans = _spans(basis.to(wide))
    blocks = zip(_blocks(weight, residual_axis), _blocks(edited, residual_axis), strict=True)
    for old, new in blocks:
        if not len(basis):
            new.copy_(old)
        else:
            _project_block(old, new, spans, memory, strength=strength, preserve_norms=preserve_norms, sums=before)
    return edited


class NormSums:
    """|U W| and |W| of a tensor, Frobenius norms, as sums over its blocks.

    Attributes:
        along_squared: |U W|^2 of the blocks so far.
        total_squared: |W|^2 of them.
    """

    def __init__(self) -> None:
        self.along_squared = self.total_squared = 0.0

    def add(self, along: Float[Tensor, "k n"], block: Float[Tensor, "d_model n"]) -> None:
        """Count a block, of which `along` is U times it."""
        flat = (block if block.is_contiguous() else block.T).reshape(-1)
        self.along_squared += float(along.square().sum(dtype=torch.float64))
        self.total_squared += float(torch.dot(flat, flat))


def block_width(d_model: int) -> int:
    """Return how many vectors along the residual axis are edited together."""
    return max(1, _BLOCK_ELEMENTS // d_model)


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
    basis = _basis_for(directions, weight, residual_axis)
    memory = _Block(weight, residual_axis, Scratch(), wide=torch.float64)
    along_squared = total_squared = 0.0
    for block in _blocks(weight, residual_axis):
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
        dtype: Of the arithmetic: float64, or float32 where a component of the size of |W| is measured.
    """

    def __init__(
        self,
        directions: Float[Tensor, "k d_model"],
        *,
        shape: Sequence[int],
        residual_axis: int,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self._basis = directions.to(dtype)
        trailing = torch.Size(shape)[residual_axis % len(shape) + 1 :].numel()
        self._is_last = trailing == 1
        self.row_length = directions.shape[1] if self._is_last else trailing
        self._row = 0
        self._sums = torch.zeros(len(directions), trailing, dtype=dtype)
        self._along_squared = self._total_squared = 0.0

    def add(self, rows: Float[Tensor, "n row_length"], *, scratch: Scratch) -> None:
        """Take the next rows: vectors, or what one output of the writer reads."""
        flat = scratch.take("measured", rows.numel(), dtype=self._basis.dtype, device=rows.device)
        wide = flat.view(rows.shape).copy_(rows)
        self._total_squared += float(torch.dot(flat, flat))
        if self._is_last:
            self._along_squared += float((wide @ self._basis.T).square().sum(dtype=torch.float64))
            return
        d_model = self._basis.shape[1]
        while len(wide):
            part = wide[: d_model - self._row]
            self._sums.addmm_(self._basis[:, self._row : self._row + len(part)], part)
            self._row += len(part)
            wide = wide[len(part) :]
            if self._row == d_model:
                self._along_squared += float(self._sums.square().sum(dtype=torch.float64))
                self._sums.zero_()
                self._row = 0

    def result(self) -> Component:
        """Return |U W| and |W| of all rows so far."""
        return Component(self._along_squared**0.5, self._total_squared**0.5)


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


def _basis_for(
    directions: Float[Tensor, "n d_model"], weight: Float[Tensor, "*shape"], residual_axis: int
) -> Float64[Tensor, "k d_model"]:
    d_model = weight.shape[residual_axis]
    if directions.dim() != 2 or directions.shape[1] != d_model:
        raise ValueError(f"directions have shape {list(directions.shape)}, the residual axis has length {d_model}")
    return orthonormalize(directions)[0].to(weight.device)


def _blocks(weight: Float[Tensor, "*shape"], residual_axis: int) -> Iterator[Float[Tensor, "d_model n"]]:
    """Yield views that cover a tensor; its vectors along the residual axis are their columns."""
    d_model = weight.shape[residual_axis]
    width = block_width(d_model)
    axis = residual_axis % weight.dim()
    trailing = weight.shape[axis + 1 :].numel()
    # Where the residual axis is the last, all vectors along it lie in one matrix; else in one per leading index.
    whole = weight.reshape(-1, d_model).T.unsqueeze(0) if trailing == 1 else weight.reshape(-1, d_model, trailing)
    for matrix in whole:
        for first in range(0, matrix.shape[1], width):
            yield matrix[:, first : first + width]


class _Block:
    """The memory for a block of a tensor, laid out as the tensor is.

    The arithmetic sees nothing but this, so the bytes that come out do not depend on where a block lay.
    """

    def __init__(
        self, weight: Float[Tensor, "*shape"], residual_axis: int, scratch: Scratch, *, wide: torch.dtype
    ) -> None:
        self._is_last = weight.shape[residual_axis % weight.dim() + 1 :].numel() == 1
        self._stored, self._wide, self._device, self._scratch = weight.dtype, wide, weight.device, scratch

    def exact(self, block: Float[Tensor, "d_model n"]) -> Float[Tensor, "d_model n"]:
        """Return a block in the wide dtype."""
        return self._memory("exact", block.shape, self._wide).copy_(block)

    def rounded(
        self, exact: Float[Tensor, "rows n"], *, slot: int
    ) -> tuple[Float[Tensor, "rows n"], Float[Tensor, "rows n"]]:
        """Return `exact` in the stored dtype, and that in the wide one; both last until their slot is used again."""
        stored = self._memory(f"rounded {slot}", exact.shape, self._stored).copy_(exact)
        return stored, self._memory(f"widened {slot}", exact.shape, self._wide).copy_(stored)

    def _memory(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Float[Tensor, "rows n"]:
        d_model, n = shape
        flat = self._scratch.take(name, shape.numel(), dtype=dtype, device=self._device)
        return flat.view(n, d_model).T if self._is_last else flat.view(d_model, n)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Span:
    """Rows of the residual axis that take what is fed back.

    Attributes:
        rows: Which.
        directions: U_S, what the directions are in these rows.
        inverse: U_S^T (U_S U_S^T)^-1: times k numbers, the least change of these rows that changes U W by those.
    """

    rows: slice
    directions: Float[Tensor, "k rows"]
    inverse: Float[Tensor, "rows k"]


def _spans(directions: Float[Tensor, "k d_model"]) -> tuple[_Span, ...]:
    """Return the whole axis, and then the parts of it that hold enough of `directions`, the one with the most first."""
    length = directions.shape[1] // _N_PARTS
    parts = directions[:, : _N_PARTS * length].reshape(-1, _N_PARTS, length).transpose(0, 1)
    grams = parts @ parts.mT
    least = torch.linalg.eigvalsh(grams).amin(dim=1).tolist() if len(directions) else []
    usable = [index for index, share in enumerate(least) if share >= _LEAST_SHARE / _N_PARTS]
    return (
        _Span(rows=slice(None), directions=directions, inverse=directions.T),
        *(
            _Span(
                rows=slice(index * length, (index + 1) * length),
                directions=parts[index],
                inverse=torch.linalg.solve(grams[index], parts[index]).T,
            )
            for index in sorted(usable, key=lambda index: -least[index])
        ),
    )


def _project_block(
    old: Float[Tensor, "d_model n"],
    new: Float[Tensor, "d_model n"],
    spans: tuple[_Span, ...],
    memory: _Block,
    *,
    strength: float,
    preserve_norms: bool,
    sums: NormSums | None,
) -> None:
    directions = spans[0].directions
    exact = memory.exact(old)
    before = directions @ exact
    if sums is not None:
        sums.add(before, exact)
    norms = torch.linalg.vector_norm(exact, dim=0) if preserve_norms else None
    wanted = (1 - strength) * before
    exact.addmm_(directions.T, before, alpha=-strength)
    if norms is not None:
        left = torch.linalg.vector_norm(exact, dim=0)
        scale = torch.where(left > _LEAST_LEFT * norms, norms / left, 1.0)
        exact *= scale
        wanted *= scale
    new.copy_(_rounded_with_feedback(exact, memory, spans, wanted))


def _rounded_with_feedback(
    exact: Float[Tensor, "d_model n"], memory: _Block, spans: tuple[_Span, ...], wanted: Float[Tensor, "k n"]
) -> Float[Tensor, "d_model n"]:
    """Round `exact` to Q in the stored dtype so that U Q comes closest to `wanted`; changes it."""
    whole = spans[0]
    slot = 0
    best, widened = memory.rounded(exact, slot=slot)
    random_share = (len(whole.directions) / len(exact)) ** 0.5
    goal = _TOLERANCES[best.dtype] * random_share * float(torch.linalg.vector_norm(exact))
    error = whole.directions @ widened - wanted
    size = float(torch.linalg.vector_norm(error))
    for span in (*spans, *[whole] * (_MAX_ROUNDS - 1)):
        if size <= goal:
            break
        part = exact[span.rows].addmm_(span.inverse, error, alpha=-1.0)
        rounded, rewidened = memory.rounded(part, slot=1 - slot)
        left = error + span.directions @ rewidened - span.directions @ widened[span.rows]
        left_size = float(torch.linalg.vector_norm(left))
        has_converged = span is whole and not left_size <= (1 - _LEAST_GAIN) * size
        if left_size < size:
            error, size = left, left_size
            if span is whole:
                best, widened, slot = rounded, rewidened, 1 - slot
            else:
                best[span.rows], widened[span.rows] = rounded, rewidened
        if has_converged:
            break
    return best
