"""What is left of directions in any checkpoint: in files alone, whoever made them and however they are stored.

Each tensor that writes to the residual stream is decoded and measured, through the norms behind it, and beside it the
same tensor of a base, where one is given: what a quantisation made of an edited model gives back is the share of the
base's component that it has again.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from abliterate.architectures.writers import Role, StreamMap, map_checkpoint
from abliterate.checkpoints.checkpoint import Checkpoint
from abliterate.checkpoints.hub import ModelSource
from abliterate.directions import load_direction, orthonormalize
from abliterate.editing.checks import RemovedDirections, measure_survivors
from abliterate.editing.projection import Component
from abliterate.errors import InputError
from abliterate.formats.gguf_checkpoint import open_weights
from abliterate.formats.quantized import plain_view
from abliterate.progress import SILENT, ProgressReporter


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorReading:
    """What one writer has of the directions.

    Attributes:
        name: The tensor, as transformers calls it.
        role: embed, attn or mlp.
        layer: Its block; None for embeddings.
        dtype: What it is stored in.
        component: |U W|/|W|.
        base_component: The same of the base; None without one.
        left: |U W| as a share of the base's; None without one.
    """

    name: str
    role: Role
    layer: int | None
    dtype: str
    component: float
    base_component: float | None
    left: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleReading:
    """What all writers of a role have of the directions, taken together.

    Attributes:
        role: embed, attn or mlp.
        tensors: How many there are.
        dtypes: What they are stored in.
        component: |U W|/|W|, each norm over all of them.
        largest: The largest of one of them.
        left: |U W| over all of them as a share of the base's; None without one.
        most_left: The largest share of one of them.
    """

    role: Role
    tensors: int
    dtypes: tuple[str, ...]
    component: float
    largest: float
    left: float | None
    most_left: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectionReport:
    """What is left of directions in a model.

    Attributes:
        model: The model, as it was named.
        base: What it is held against; None: nothing.
        model_type: As in config.json.
        k: How many directions.
        random: |U W|/|W| of a matrix of random numbers, for comparison.
        left: |U W| over all writers as a share of the base's; None without one.
        roles: By role.
        tensors: Each writer, in file order.
    """

    model: str
    base: str | None
    model_type: str
    k: int
    random: float
    left: float | None
    roles: tuple[RoleReading, ...]
    tensors: tuple[TensorReading, ...]


def inspect_model(
    *,
    model: ModelSource,
    directions: Sequence[Path],
    base: ModelSource | None = None,
    progress: ProgressReporter = SILENT,
) -> InspectionReport:
    """Measure what the writers of a model have of directions.

    Args:
        model: The model.
        directions: Direction files, whose span is looked for.
        base: What its writers are held against, such as the model before it was edited.
        progress: Shown the bytes read.

    Raises:
        InputError: The base has another number of writers, or writers of another shape.
        DirectionError: A direction is malformed, or has another width than the model.
        CheckpointError: A file cannot be read, or the model is of a type that is not known.
    """
    view, stream = _open(model)
    vectors = torch.stack([load_direction(each, d_model=stream.d_model).vector for each in directions])
    removed = RemovedDirections(subspace=orthonormalize(vectors)[0])
    original = None if base is None else _open(base)[0]
    if original is not None and base is not None:
        _check_base(view, original, stream, model=model, base=base)
    infos = {tensor.name: tensor for tensor in view.tensors()}
    total = sum(infos[writer.tensor_name].end - infos[writer.tensor_name].start for writer in stream.writers)
    with progress.task(f"Reading {model.name}", total=total, unit="bytes") as advance:
        found = list(measure_survivors(view, base=original, writers=stream.writers, removed=removed, advance=advance))
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
    return InspectionReport(
        model=model.name,
        base=None if base is None else base.name,
        model_type=stream.model_type,
        k=removed.rank,
        random=math.sqrt(removed.rank / stream.d_model),
        left=_left(found),
        roles=tuple(_role(role, tensors, found) for role in roles),
        tensors=tensors,
    )


def _open(source: ModelSource) -> tuple[Checkpoint, StreamMap]:
    view = plain_view(open_weights(source.path))
    return view, map_checkpoint(view, partial=True)


def _check_base(
    view: Checkpoint, original: Checkpoint, stream: StreamMap, *, model: ModelSource, base: ModelSource
) -> None:
    ours, theirs = ({tensor.name: tensor.shape for tensor in each.tensors()} for each in (view, original))
    for writer in stream.writers:
        name = writer.tensor_name
        if theirs.get(name) != ours[name]:
            shape = "is not there" if name not in theirs else f"is {list(theirs[name])}"
            raise InputError(
                f"{base.name}: cannot be the base of {model.name}: {name}, which is {list(ours[name])} there, {shape} "
                "here; name the model that it was made from with --base"
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
