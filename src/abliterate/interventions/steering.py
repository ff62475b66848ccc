"""A direction at work in a loaded model: which intervention, at which layer, with which dose.

`hooks` holds the hooks themselves; here a direction file says where they act and how strongly.
"""

from __future__ import annotations

import random
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from abliterate.directions import Direction, vector_sha256
from abliterate.errors import InputError
from abliterate.models.chat_model import ChatModel
from abliterate.models.hooks import ablate_direction, add_direction, record, set_component
from abliterate.progress import SILENT, ProgressReporter
from abliterate.prompt_sets import BUNDLED, load_prompt_set, sample_prompts

if TYPE_CHECKING:
    from jaxtyping import Float64

N_REFERENCE_PROMPTS = 128
"""Prompts behind each reference mean of affine editing, from the bundled training parts."""
REFERENCE_SEED = 42


def default_coefficient(intervention: str, coefficient: float | None) -> float | None:
    """Return the dose in force: 1 for `add` and 0 for `affine` unless one is given; None where it plays no part."""
    if intervention not in {"add", "affine"}:
        return None
    if coefficient is not None:
        return coefficient
    return 1.0 if intervention == "add" else 0.0


def steer(
    chat: ChatModel,
    direction: Direction,
    *,
    intervention: str,
    coefficient: float | None = None,
    progress: ProgressReporter = SILENT,
) -> AbstractContextManager[int]:
    """Return the context manager in which an intervention acts on the model.

    Args:
        chat: the model.
        direction: what to ablate, add or set.
        intervention: `ablate` removes the direction everywhere; `add` adds `coefficient` times its mean difference at
            its layer; `affine` sets the component along it, at each layer, to (1 - coefficient) times the harmless
            mean and `coefficient` times the harmful mean of that layer.
        coefficient: the dose; None is 1 for `add` and 0 for `affine`.
        progress: where to show progress.

    Raises:
        InputError: the direction does not fit the model, or lacks what the intervention needs.
    """
    if direction.d_model != chat.d_model:
        raise InputError(f"the direction has {direction.d_model} entries; the model's width is {chat.d_model}")
    dose = default_coefficient(intervention, coefficient)
    if intervention == "ablate":
        return ablate_direction(chat, direction.vector)
    assert dose is not None
    if intervention == "affine":
        components = reference_components(chat, direction, towards_harmful=dose, progress=progress)
        return set_component(chat, direction.vector, components)
    layer = direction.metadata.get("layer")
    if direction.mean_difference is None or not isinstance(layer, int):
        raise InputError("--intervention add needs a direction file with its mean difference and layer")
    return add_direction(chat, direction.mean_difference, layer=layer, coefficient=dose)


def steering_key(direction: Direction, *, intervention: str, coefficient: float | None) -> dict[str, Any]:
    """Return all that `steer` takes from its arguments, as plain values for the key of a cache.

    Args:
        direction: see `steer`.
        intervention: see `steer`.
        coefficient: see `steer`.
    """
    added = direction.mean_difference
    return {
        "intervention": intervention,
        "coefficient": default_coefficient(intervention, coefficient),
        "vector": direction.sha256,
        "mean_difference": None if added is None else vector_sha256(added),
        "layer": direction.metadata.get("layer"),
        "position": direction.metadata.get("position"),
    }


def reference_components(
    chat: ChatModel, direction: Direction, *, towards_harmful: float = 0.0, progress: ProgressReporter = SILENT
) -> list[float]:
    """Return the component along a direction that affine editing holds, one value a layer, in the stream's units.

    The means are taken over training prompts, at the direction's token position (the last one if it names none), of
    the model as it is: nothing is taken from the prompts it is evaluated on.

    Args:
        chat: the model, without hooks.
        direction: the direction.
        towards_harmful: 0 for the harmless mean, 1 for the harmful one, anything between or beyond.
        progress: where to show progress.
    """
    harmless = _mean_components(chat, direction, "harmless", progress)
    if not towards_harmful:
        return [float(value) for value in harmless]
    harmful = _mean_components(chat, direction, "harmful", progress)
    return [float(value) for value in harmless + towards_harmful * (harmful - harmless)]


def _mean_components(
    chat: ChatModel, direction: Direction, kind: str, progress: ProgressReporter
) -> Float64[Tensor, " n_layers"]:
    everything = load_prompt_set(BUNDLED, kind="harmful" if kind == "harmful" else "harmless", part="train")
    prompts = sample_prompts(everything, N_REFERENCE_PROMPTS, rng=random.Random(REFERENCE_SEED))
    position = direction.metadata.get("position")
    position = position if isinstance(position, int) and -chat.chat_format.n_positions <= position < 0 else -1
    rows = chat.encode(prompts.texts)
    with progress.task(f"Recording {prompts.name}", total=len(rows)) as advance:
        activations = record(chat, rows, advance=advance).activations[:, position]
    mean: Tensor = activations.to(torch.float64).mean(dim=0) @ direction.vector.to(torch.float64)
    return mean
