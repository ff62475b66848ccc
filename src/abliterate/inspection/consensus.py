"""One direction in all layers, or one of each: what the projections of many tensors have in common.

A writer behind a norm writes r as gamma * r (see `formats.projection`); an edit that knows that has gamma * r in its
change, one that does not has r itself. Both are tried, and what agrees better over all tensors was done.

The directions are the leading singular vectors of all that were found, each weighted by how well it is known; what
does not agree is left out and looked for again without it.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from abliterate.architectures.names import Role
from abliterate.directions import orthonormal_basis
from abliterate.formats.stored_component import directions_behind
from abliterate.inspection.directional import Projection
from abliterate.inspection.numbers import Array

Scope = Literal["one", "per_layer", "several"]
# What a norm multiplies by, and whether it takes the mean away.
Norm = tuple[Array, bool]
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
    norms: tuple[Norm, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Consensus:
    """What the projections have in common.

    Attributes:
        vectors: [k, d_model] float64, orthonormal rows: directions of the stream; where each layer has its own, those
            that most tensors are near to.
        scope: one: the same in all tensors; per_layer: the same within each layer; several: neither.
        through_norms: Whether tensors behind norms were edited through them; None where none stands behind one.
        cosines: Tensor -> the cosine of the largest angle between its directions and the common ones, or its layer's.
        agreeing: Tensors that agree.
        by_layer: Where each layer has its own, those; under None what tensors outside of layers have.
    """

    vectors: Array
    scope: Scope
    through_norms: bool | None
    cosines: dict[str, float]
    agreeing: frozenset[str]
    by_layer: Mapping[int | None, Array] = field(default_factory=dict)

    def of(self, layer: int | None) -> Array:
        """Return the directions of a layer, as `vectors`."""
        return self.by_layer.get(layer, self.vectors)


def find_consensus(found: Sequence[Projected]) -> Consensus | None:
    """Return what projections along the stream have in common; None without any."""
    if not found:
        return None
    plain = _consensus(found, through=False)
    if not any(each.norms for each in found):
        return plain
    through = _consensus(found, through=True)
    # One direction in all says more than one of each layer, which a single tensor of a layer always has.
    fit = [(each.scope == "one", sum(each.cosines.values()) / len(each.cosines)) for each in (plain, through)]
    return through if fit[1] > fit[0] else plain


def as_written(vectors: Array, norms: Sequence[Norm]) -> Array:
    """Return directions of the stream as a writer behind norms writes them, [k, d_model], orthonormal rows."""
    return directions_behind(vectors, norms)


def cosine_of(vectors: Array, others: Array) -> float:
    """Return the cosine of the largest angle between what two sets of orthonormal rows span."""
    if not len(vectors) or not len(others):
        return 0.0
    small, large = (vectors, others) if len(vectors) <= len(others) else (others, vectors)
    return min(1.0, float(np.linalg.svd(small @ large.T, compute_uv=False).min()))


def _consensus(found: Sequence[Projected], *, through: bool) -> Consensus:
    counts = Counter(sorted(each.projection.vectors.shape[1] for each in found))
    k = counts.most_common(1)[0][0]
    members: Sequence[Projected] = found
    for _ in range(3):
        vectors = _common(members, k, through=through)
        cosines = _cosines(found, dict.fromkeys([each.layer for each in found], vectors), through=through)
        kept = [each for each in found if cosines[each.name] > _least(each)]
        if not kept or len(kept) == len(members):
            break
        members = kept
    scope: Scope = "one"
    by_layer: dict[int | None, Array] = {}
    if sum(cosines[each.name] > _least(each) for each in found) < _MOST * len(found):
        layers = _by_layer(found)
        own = {layer: _common(each, k, through=through) for layer, each in layers.items()}
        in_layers = _cosines(found, own, through=through)
        scope = "per_layer" if _agrees_in_layers(layers, in_layers) else "several"
        if scope == "per_layer":
            by_layer, cosines = own, in_layers
    return Consensus(
        vectors=vectors,
        scope=scope,
        through_norms=through if any(each.norms for each in found) else None,
        cosines=cosines,
        agreeing=frozenset(each.name for each in found if cosines[each.name] > _least(each)),
        by_layer=by_layer,
    )


def _cosines(found: Sequence[Projected], vectors: Mapping[int | None, Array], *, through: bool) -> dict[str, float]:
    """Return the cosine of each tensor's directions with those of its layer."""
    return {
        each.name: cosine_of(as_written(vectors[each.layer], each.norms if through else ()), each.projection.vectors.T)
        for each in found
    }


def _by_layer(found: Sequence[Projected]) -> dict[int | None, list[Projected]]:
    layers: dict[int | None, list[Projected]] = defaultdict(list)
    for each in found:
        layers[each.layer].append(each)
    return layers


def _least(each: Projected) -> float:
    return AGREES - 4 * each.projection.error**2


def _common(members: Sequence[Projected], k: int, *, through: bool) -> Array:
    rows = []
    for each in members:
        vectors = each.projection.vectors.T
        if through:
            # Where a norm takes the mean away, the part of r that it hides cannot be known, and is taken for nothing.
            for gamma, _ in each.norms:
                vectors = np.divide(vectors, gamma, where=gamma != 0, out=np.zeros_like(vectors))
            vectors = orthonormal_basis(vectors)[0]
        rows.append(vectors / (_WELL_KNOWN + each.projection.error))
    right: Array = np.linalg.svd(np.concatenate(rows), full_matrices=False)[2]
    return right[:k]


def _agrees_in_layers(layers: Mapping[int | None, Sequence[Projected]], cosines: Mapping[str, float]) -> bool:
    """Return whether nearly all tensors have the directions of their layer; of one a layer, each has its own."""
    inside = [members for layer, members in layers.items() if layer is not None]
    if len(inside) < 2:
        return False
    beside = sum(len(members) - 1 for members in inside)
    apart = sum(cosines[each.name] <= _least(each) for members in inside if len(members) > 1 for each in members)
    return apart <= (1 - _MOST) * beside
