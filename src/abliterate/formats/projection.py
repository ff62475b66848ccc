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
rounds back: in bfloat16 at d_model 4096 about 1 % of the component survives. So the axis is rounded segment by
segment, each with half of what U has left, and what the segments so far have put back, E = sum of U_S (Q_S - T_S),
the rest S takes away by the least change that does: T_S - U_S^T (U_S U_S^T)^-1 E. That moves an entry by about half a
step at most where U is spread. What the last segment, a few entries, puts back is what survives.

All sums have an order: terms are added in the wide dtype in chunks (of rows, or along a vector of numbers at a fixed
distance), chunks in float64. So what comes out does not depend on how a tensor is cut between its vectors, and
`fused`, which does the same in compiled code, gives the same bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from abliterate.checkpoints.file_assembly import Scratch
from abliterate.directions import orthonormalize
from abliterate.formats.segments import (
    CHUNK_ROWS,
    LEAST_LEFT,
    N_LANES,
    NormSums,
    Segments,
    bits_of,
    cut_in_segments,
    kernels_for,
    project_stored,
)
from abliterate.formats.stored_component import directions_behind

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float, Float64

# Elements that are held in the arithmetic's wide dtype at a time, so that memory is bounded by a block and
# not by the tensor: 4 MiB of float32.
_BLOCK_ELEMENTS = 1 << 20

# The dtypes that plain weights have, as safetensors names them.
_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}


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
    seen = [(norm.gamma.detach().double().cpu().numpy(), norm.centered) for norm in norms]
    found = directions_behind(directions.detach().double().cpu().numpy(), seen)
    return torch.from_numpy(found).to(directions.device)


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
    fused: bool = False,
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
        fused: Whether it is worth loading `fused`, which takes a second and, once on a machine, ten: several times as
            fast on the CPU for all but float64. Where it cannot be had, this makes no difference.

    Returns:
        A tensor of the shape and dtype of `weight`. Each vector is edited by itself, so a tensor that is cut between
        vectors gives the same bytes piece by piece. The arithmetic is done in float32, or in float64 when `weight` is
        float64.

    Raises:
        ValueError: The directions are not finite, or not of the axis' length.
    """
    basis = basis_for(directions, weight, residual_axis)
    edited = torch.empty_like(weight, memory_format=torch.contiguous_format) if out is None else out
    if not len(basis):
        return edited.copy_(weight)
    wide = _wide(weight.dtype)
    segments = cut_in_segments(basis.cpu().numpy(), dtype=_NAMES[weight.dtype])
    options = _Options(strength=strength, preserve_norms=preserve_norms)
    sums = NormSums() if before is None else before
    kernels = _kernels(weight, edited) if fused else None
    if kernels is not None:
        _project_fused(kernels, weight, edited, residual_axis, segments, options, sums)
        return edited
    memory = Block(weight, residual_axis, scratch or Scratch(), wide=wide)
    for old, new in zip(blocks_along(weight, residual_axis), blocks_along(edited, residual_axis), strict=True):
        _project_block(old, new, segments, memory, options, sums)
    return edited


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def basis_for(
    directions: Float[Tensor, "n d_model"], weight: Float[Tensor, "*shape"], residual_axis: int
) -> Float64[Tensor, "k d_model"]:
    """Return U, an orthonormal basis of what directions span, where the weight is.

    Raises:
        ValueError: See `project_out`.
    """
    d_model = weight.shape[residual_axis]
    if directions.dim() != 2 or directions.shape[1] != d_model:
        raise ValueError(f"directions have shape {list(directions.shape)}, the residual axis has length {d_model}")
    return orthonormalize(directions)[0].to(weight.device)


def blocks_along(weight: Float[Tensor, "*shape"], residual_axis: int) -> Iterator[Float[Tensor, "d_model n"]]:
    """Yield views that cover a tensor; its vectors along the residual axis are their columns."""
    d_model = weight.shape[residual_axis]
    # Elsewhere memory is plentiful, and it is the number of operations that costs.
    width = max(1, (_BLOCK_ELEMENTS if weight.device.type == "cpu" else 64 * _BLOCK_ELEMENTS) // d_model)
    trailing = weight.shape[residual_axis % weight.dim() + 1 :].numel()
    # Where the residual axis is the last, all vectors along it lie in one matrix; else in one per leading index.
    is_last = _is_last(weight, residual_axis)
    for matrix in weight.reshape(-1, d_model).T.unsqueeze(0) if is_last else weight.reshape(-1, d_model, trailing):
        for first in range(0, matrix.shape[1], width):
            yield matrix[:, first : first + width]


class Block:
    """The memory for a block of a tensor, laid out as the tensor is, and the sums over its rows.

    Args:
        weight: The tensor.
        residual_axis: The axis of it that indexes the residual stream.
        scratch: Where the memory comes from.
        wide: Dtype of the arithmetic.
    """

    def __init__(
        self, weight: Float[Tensor, "*shape"], residual_axis: int, scratch: Scratch, *, wide: torch.dtype
    ) -> None:
        self._is_last = _is_last(weight, residual_axis)
        self._stored, self._wide, self._device, self._scratch = weight.dtype, wide, weight.device, scratch

    def exact(self, block: Float[Tensor, "d_model n"]) -> Float[Tensor, "d_model n"]:
        """Return a block in the wide dtype."""
        return self._memory("exact", block.shape, self._wide).copy_(block)

    def like(self, rows: Float[Tensor, "rows n"], *, name: str) -> Float[Tensor, "rows n"]:
        """Return memory for as many numbers in the wide dtype, which lasts until the name is used again."""
        return self._memory(name, rows.shape, self._wide)

    def rounded(self, exact: Float[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
        """Return `exact` in the stored dtype."""
        return self._memory("rounded", exact.shape, self._stored).copy_(exact)

    def sum(self, terms: Float[Tensor, "rows n"]) -> Float64[Tensor, " n"]:
        """Return the sum over the rows, in the order that is told above."""
        n_rows, n = terms.shape
        if self._is_last:
            padded = torch.nn.functional.pad(terms.T, (0, -n_rows % N_LANES)).view(n, -1, N_LANES)
            lanes = padded[:, 0].clone()
            for index in range(1, padded.shape[1]):
                lanes += padded[:, index]
            halves = lanes.double()
            while halves.shape[1] > 1:
                half = halves.shape[1] // 2
                halves = halves[:, :half] + halves[:, half:]
            return halves[:, 0]
        padded = torch.nn.functional.pad(terms, (0, 0, 0, -n_rows % CHUNK_ROWS)).view(-1, CHUNK_ROWS, n)
        chunks = padded[:, 0].clone()
        for index in range(1, CHUNK_ROWS):
            chunks += padded[:, index]
        total = torch.zeros(n, dtype=torch.float64, device=terms.device)
        for chunk in chunks:
            total += chunk
        return total

    def along(self, directions: Float[Tensor, "k rows"], rows: Float[Tensor, "rows n"]) -> Float64[Tensor, "k n"]:
        """Return `directions` times `rows`, the sums in their order."""
        terms = self.like(rows, name="terms")
        return torch.stack([self.sum(torch.mul(rows, each.unsqueeze(1), out=terms)) for each in directions])

    def _memory(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Float[Tensor, "rows n"]:
        d_model, n = shape
        flat = self._scratch.take(name, shape.numel(), dtype=dtype, device=self._device)
        return flat.view(n, d_model).T if self._is_last else flat.view(d_model, n)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    """See `project_out`."""

    strength: float
    preserve_norms: bool


def _project_block(
    old: Float[Tensor, "d_model n"],
    new: Float[Tensor, "d_model n"],
    segments: Segments,
    memory: Block,
    options: _Options,
    sums: NormSums,
) -> None:
    directions = torch.from_numpy(segments.directions).to(old.device)
    inverses = torch.from_numpy(segments.inverses).to(old.device)
    exact = memory.exact(old)
    squares = memory.sum(torch.mul(exact, exact, out=memory.like(exact, name="terms")))
    before = memory.along(directions, exact)
    sums.add(float(before.square().sum()), float(squares.sum()))
    _take_away(exact, directions, options.strength * before, memory)
    if options.preserve_norms:
        norms = squares.sqrt()
        left = memory.sum(torch.mul(exact, exact, out=memory.like(exact, name="terms"))).sqrt()
        exact *= torch.where(left > LEAST_LEFT * norms, norms / left, 1.0).to(exact.dtype)
    error = torch.zeros_like(before)
    for index, (start, end) in enumerate(itertools.pairwise(segments.bounds)):
        shares, wanted = directions[:, start:end], exact[start:end]
        if index:
            wanted = memory.like(wanted, name="wanted").copy_(wanted)
            _take_away(wanted, shares, _times(inverses[index], error), memory)
        rounded = memory.rounded(wanted)
        new[start:end] = rounded
        if end < len(exact):
            off = memory.like(wanted, name="off").copy_(rounded)
            error += memory.along(shares, off.sub_(exact[start:end]))


def _take_away(
    numbers: Float[Tensor, "rows n"],
    directions: Float[Tensor, "k rows"],
    strengths: Float64[Tensor, "k n"],
    memory: Block,
) -> None:
    """Subtract U^T times `strengths`, one direction after the other."""
    for direction, strength in zip(directions, strengths.to(numbers.dtype), strict=True):
        terms = memory.like(numbers, name="terms")
        numbers -= torch.mul(direction.unsqueeze(1), strength, out=terms)


def _times(matrix: Float64[Tensor, "k k"], columns: Float64[Tensor, "k n"]) -> Float64[Tensor, "k n"]:
    """Return a product whose terms are added in their order."""
    total = torch.zeros_like(columns)
    for index, column in enumerate(columns):
        total += matrix[:, index, None] * column
    return total


def tensor_bits(weight: Float[Tensor, "*shape"]) -> np.ndarray[tuple[int, ...], np.dtype[Any]]:
    """Return a weight on the CPU as compiled code takes it; see `segments.bits_of`."""
    # numpy has no bfloat16: as integers of its size both go over.
    seen = weight.view(torch.int16) if weight.element_size() == 2 else weight
    return bits_of(seen.numpy(), dtype=_NAMES[weight.dtype])


def _kernels(*weights: Float[Tensor, "*shape"]) -> ModuleType | None:
    """Return the compiled code if it takes tensors such as these."""
    if all(each.is_contiguous() and each.numel() and each.device.type == "cpu" for each in weights):
        return kernels_for(_NAMES[weights[0].dtype])
    return None


def _project_fused(
    kernels: ModuleType,
    weight: Float[Tensor, "*shape"],
    edited: Float[Tensor, "*shape"],
    residual_axis: int,
    segments: Segments,
    options: _Options,
    before: NormSums,
) -> None:
    project_stored(
        kernels,
        tensor_bits(weight),
        tensor_bits(edited),
        segments=segments,
        residual_axis=residual_axis,
        strength=options.strength,
        preserve_norms=options.preserve_norms,
        before=before,
    )


def _is_last(weight: Float[Tensor, "*shape"], residual_axis: int) -> bool:
    return residual_axis % weight.dim() == weight.dim() - 1
