"""What is left of directions in any checkpoint: in files alone, whoever made them and however they are stored.

Each tensor that writes to the residual stream is decoded and measured, through the norms behind it, and beside it the
same tensor of a base, where one is given: what a quantisation made of an edited model gives back is the share of the
base's component that it has again.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from abliterate.architectures.writers import Role, StreamMap
from abliterate.checkpoints.checkpoint import Checkpoint
from abliterate.directions import orthonormal_basis
from abliterate.editing.checks import measure_survivors
from abliterate.editing.plan import RemovedDirections
from abliterate.formats.stored_component import Component
from abliterate.inspection.numbers import Array
from abliterate.inspection.report import RoleReading, TensorReading
from abliterate.progress import SILENT, ProgressReporter


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentReading:
    """What is left of directions in a model.

    Attributes:
        k: How many directions.
        random: |U W|/|W| of a matrix of random numbers, for comparison.
        left: |U W| over all writers as a share of the base's; None without one.
        roles: By role.
        tensors: Each writer, in file order.
    """

    k: int
    random: float
    left: float | None
    roles: tuple[RoleReading, ...]
    tensors: tuple[TensorReading, ...]


def read_component(
    *,
    view: Checkpoint,
    stream: StreamMap,
    vectors: Array,
    original: Checkpoint | None = None,
    base_names: Mapping[str, str] | None = None,
    progress: ProgressReporter = SILENT,
) -> ComponentReading:
    """Measure what the writers of a model have of directions.

    Args:
        view: The model, what is stored in few bits seen as the numbers that it means.
        stream: What its tensors are.
        vectors: Directions, whose span is looked for.
        original: What its writers are held against, seen in the same way.
        base_names: Name of a writer -> what the base calls it, where that differs.
        progress: Shown the bytes read.

    Raises:
        CheckpointError: A file cannot be read.
    """
    removed = RemovedDirections(subspace=orthonormal_basis(vectors)[0])
    infos = {tensor.name: tensor for tensor in view.tensors()}
    total = sum(infos[writer.tensor_name].end - infos[writer.tensor_name].start for writer in stream.writers)
    with progress.task("Measuring the directions", total=total, unit="bytes") as advance:
        measured = measure_survivors(
            view, base=original, writers=stream.writers, made_from=base_names, removed=removed, advance=advance
        )
        found = list(measured)
    tensors = tuple(
        TensorReading(
            name=writer.tensor_name,
            role=writer.role,
            layer=writer.layer,
            dtype=infos[writer.tensor_name].stored_dtype,
            component=now.share,
            base_component=None if before is None else before.share,
            left=None if before is None else now.survivor_of(before),
        )
        for writer, (before, now) in zip(stream.writers, found, strict=True)
    )
    roles = tuple(dict.fromkeys(tensor.role for tensor in tensors))
    return ComponentReading(
        k=removed.rank,
        random=math.sqrt(removed.rank / stream.d_model),
        left=_left(found),
        roles=tuple(_role(role, tensors, found) for role in roles),
        tensors=tensors,
    )


Pair = tuple[Component | None, Component]


def _left(found: Sequence[Pair]) -> float | None:
    before = [pair[0].along for pair in found if pair[0] is not None]
    if not before:
        return None
    whole = math.hypot(*before)
    return math.hypot(*(now.along for _, now in found)) / whole if whole else 0.0


def _role(role: Role, tensors: Sequence[TensorReading], found: Sequence[Pair]) -> RoleReading:
    members: list[Any] = [(tensor, pair) for tensor, pair in zip(tensors, found, strict=True) if tensor.role == role]
    along, norm = (math.hypot(*(getattr(pair[1], key) for _, pair in members)) for key in ("along", "norm"))
    left = [tensor.left for tensor, _ in members if tensor.left is not None]
    return RoleReading(
        role=role,
        tensors=len(members),
        dtypes=tuple(sorted({tensor.dtype for tensor, _ in members})),
        component=along / norm if norm else 0.0,
        largest=max(tensor.component for tensor, _ in members),
        left=_left([pair for _, pair in members]),
        most_left=max(left) if left else None,
    )
