"""One direction in all layers, or one of each: what the projections of many tensors have in common.

A writer behind a norm writes r as gamma * r (see `formats.projection`); an edit that knows that has gamma * r in its
change, one that does not has r itself. Both are tried, and what agrees better over all tensors was done.

The directions are the leading singular vectors of all that were found, each weighted by how well it is known; what
does not agree is left out and looked for again without it.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from abliterate.architectures.names import Role
from abliterate.directions import orthonormalize
from abliterate.formats.projection import NormFactor, effective_directions
from abliterate.inspection.directional import Projection

Scope = Literal["one", "per_layer", "several"]
# The cosine from which a tensor's direction is the common one, less what rounding may turn it by.
AGREES = 0.99
# This share of the tensors, by number, must agree for one direction; below, layers are looked at apart.
_MOST = 0.9
_WELL_KNOWN = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Projected:
    """A projection that was found in a writer.

    Attributes:
        name: The tensor in the model.
        role: What kind of writer it is.
        layer: Its block; None for embeddings.
        projection: What was found.
        norms: What its output passes on its way to the stream, innermost first.
    """

    name: str
    role: Role
    layer: int | None
    projection: Projection
    norms: tuple[NormFactor, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Consensus:
    """What the projections have in common.

    Attributes:
        vectors: [k, d_model] float64, orthonormal rows: directions of the stream.
        scope: one: the same in all tensors; per_layer: the same within each layer; several: neither.
        through_norms: Whether tensors behind norms were edited through them; None where none stands behind one.
        cosines: Tensor -> the cosine of the largest angle between its directions and the common ones.
        agreeing: Tensors that agree.
    """

    vectors: Tensor
    scope: Scope
    through_norms: bool | None
    cosines: dict[str, float]
    agreeing: frozenset[str]


def find_consensus(found: Sequence[Projected]) -> Consensus | None:
    """Return what projections along the stream have in common; None without any."""
    if not found:
        return None
    plain = _consensus(found, through=False)
    if not any(each.norms for each in found):
        return plain
    through = _consensus(found, through=True)
    mean = [sum(each.cosines.values()) / len(each.cosines) for each in (plain, through)]
    return through if mean[1] > mean[0] else plain


def as_written(vectors: Tensor, norms: Sequence[NormFactor]) -> Tensor:
    """Return directions of the stream as a writer behind norms writes them, [k, d_model], orthonormal rows."""
    return effective_directions(vectors, norms=norms)


def cosine_of(vectors: Tensor, others: Tensor) -> float:
    """Return the cosine of the largest angle between what two sets of orthonormal rows span."""
    if not len(vectors) or not len(others):
        return 0.0
    small, large = (vectors, others) if len(vectors) <= len(others) else (others, vectors)
    return float(torch.linalg.svdvals(small.double() @ large.double().T).min().clamp(max=1.0))


def _consensus(found: Sequence[Projected], *, through: bool) -> Consensus:
    k = torch.tensor([each.projection.vectors.shape[1] for each in found]).mode().values.item()
    members: Sequence[Projected] = found
    for _ in range(3):
        vectors = _common(members, int(k), through=through)
        cosines = {each.name: 0.0 for each in found}
        for each in found:
            written = as_written(vectors, each.norms if through else ())
            cosines[each.name] = cosine_of(written, each.projection.vectors.T)
        kept = [each for each in found if cosines[each.name] > _least(each)]
        if not kept or len(kept) == len(members):
            break
        members = kept
    agreeing = frozenset(each.name for each in found if cosines[each.name] > _least(each))
    scope: Scope = "one"
    if len(agreeing) < _MOST * len(found):
        scope = "per_layer" if _agrees_in_layers(found) else "several"
    has_norms = any(each.norms for each in found)
    return Consensus(
        vectors=vectors,
        scope=scope,
        through_norms=through if has_norms else None,
        cosines=cosines,
        agreeing=agreeing,
    )


def _least(each: Projected) -> float:
    return AGREES - 4 * each.projection.error**2


def _common(members: Sequence[Projected], k: int, *, through: bool) -> Tensor:
    rows = []
    for each in members:
        vectors = each.projection.vectors.T
        if through:
            # Where a norm takes the mean away, the part of r that it hides cannot be known, and is taken for nothing.
            for norm in each.norms:
                gamma = norm.gamma.double()
                vectors = torch.where(gamma != 0, vectors / gamma, 0.0)
            vectors = orthonormalize(vectors)[0]
        rows.append(vectors / (_WELL_KNOWN + each.projection.error))
    stacked = torch.cat(rows)
    right: Tensor = torch.linalg.svd(stacked, full_matrices=False)[2]
    return right[:k]


def _agrees_in_layers(found: Sequence[Projected]) -> bool:
    layers: dict[int, list[Projected]] = defaultdict(list)
    for each in found:
        if each.layer is not None:
            layers[each.layer].append(each)
    if len(layers) < 2:
        return False
    pairs = [(members[0], other) for members in layers.values() for other in members[1:]]
    if not pairs:
        # One tensor a layer, each with a direction of its own.
        return True
    apart = [
        cosine_of(one.projection.vectors.T, other.projection.vectors.T) < min(_least(one), _least(other))
        for one, other in pairs
    ]
    return sum(apart) <= (1 - _MOST) * len(pairs)
