"""What a config.json says about the text model of a checkpoint: its architecture, sizes, experts and ties."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterate.architectures.table import (
    ARCHITECTURES,
    REFUSED,
    SIZE,
    TEXT_SECTIONS,
    WRAPPERS,
    Architecture,
    Condition,
    Wrapper,
    refusal,
)
from abliterate.architectures.vocabulary import DEPTH_KEYS, DEPTH_LISTS, EXPERT_KEYS, SIZE_KEYS
from abliterate.checkpoints.checkpoint import CONFIG_NAME
from abliterate.errors import CheckpointError, UnsupportedArchitectureError
from abliterate.files import shown

MOST_LAYERS = 10_000
"""No model has so many; a config that says more is damaged, and nothing is built by it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextModel:
    """The text model of a checkpoint, as its config describes it.

    Attributes:
        model_type: As at the top of config.json.
        row: The text model's architecture.
        section: Keys that lead from config.json's top to the text model's part of it.
        d_model: Width of the residual stream; None if the config leaves it to its class.
        n_layers: Number of decoder blocks; None likewise.
        n_experts: Number of routed experts of a layer; None if the config names none.
        tied_embeddings: Whether the output head shares the token embedding's rows by what the config says; a head of
            its own that is stored beside another embedding is not tied all the same.
        has_towers: Parts for images or sound may lie beside the text model.
        verified: The model type is in the table, and so is that of its text model.
    """

    model_type: str
    row: Architecture
    section: tuple[str, ...]
    d_model: int | None
    n_layers: int | None
    n_experts: int | None
    tied_embeddings: bool
    has_towers: bool
    verified: bool = True


def read_text_model(
    *, config: Mapping[str, Any], path: Path, unverified: bool = False, partial: bool = False
) -> TextModel:
    """Read what config.json says about the text model.

    Args:
        config: The content of config.json.
        path: Where the checkpoint lies, for messages.
        unverified: Accept a model type that is neither in the table nor refused by name, by the rules common to all.
        partial: Accept a model type of whose stream no edit of weights can clean all.

    Raises:
        UnsupportedArchitectureError: The model type is refused, or one of its settings is.
        CheckpointError: A size is missing or no positive integer.
    """
    row, section = _row_and_section(config, path, unverified=unverified)
    if row.remains is not None and not partial:
        raise UnsupportedArchitectureError(
            f"{path / CONFIG_NAME}: model type {shown(config.get('model_type'))} cannot be orthogonalized: "
            f"{row.remains}; docs/architectures.md lists the types that can, and --partial edits all that an edit can "
            "clean and measures what is left"
        )
    text = _at(config, section)
    size_keys = [key for key in SIZE_KEYS if key in text]
    if not section and not size_keys:
        size_keys = ["hidden_size"]
    model_type = str(config.get("model_type"))
    wrapper = WRAPPERS.get(model_type)
    outer = _outer(config, wrapper)[0]
    model = TextModel(
        model_type=model_type,
        row=row,
        section=section,
        d_model=_size(text, size_keys[0], path) if size_keys else None,
        n_layers=_depth(text, row, path, required=not section),
        n_experts=_expert_count(text),
        tied_embeddings=_tie(outer, text, row, wrapper, path),
        has_towers=row.towers or bool(section) or model_type in WRAPPERS,
        verified=row.model_type in ARCHITECTURES and (model_type in ARCHITECTURES or model_type in WRAPPERS),
    )
    _check_conditions(text, model, path)
    return model


def read_loaded_row(*, config: Mapping[str, Any], d_model: int, name: str) -> tuple[Architecture, bool]:
    """Return the row of a loaded model's text model, and whether towers may lie beside it.

    A type that is in neither table is given the rules common to all: code of its own that runs was allowed to.

    Args:
        config: The loaded model's config, as in config.json.
        d_model: Width of the residual stream.
        name: What to call the model in messages.

    Raises:
        UnsupportedArchitectureError: The model type is refused by name, or one of its settings is.
    """
    top = str(config.get("model_type"))
    wrapper = WRAPPERS.get(top)
    config = _outer(config, wrapper)[0]
    sections = (
        [key for key in TEXT_SECTIONS if isinstance(config.get(key), Mapping)] if top not in ARCHITECTURES else []
    )
    text = config[sections[0]] if sections else config
    text_type = str(text.get("model_type", wrapper.text_type if wrapper else top))
    refused = next((kind for kind in (top, text_type) if kind in REFUSED), None)
    if refused is not None:
        raise UnsupportedArchitectureError(
            f"{name}: in a model of type {refused!r} a direction cannot be ablated: {refusal(refused)}; "
            "use another model"
        )
    row = ARCHITECTURES.get(text_type) or _by_common_rules(text_type)
    for condition, value in _broken_conditions(text, row, d_model):
        raise UnsupportedArchitectureError(
            f"{name}: in a model of type {text_type!r} with {condition.key} = {shown(value)} a direction cannot be "
            f"ablated: {condition.reason}; use another model"
        )
    return row, row.towers or bool(sections) or wrapper is not None


def pipeline_tag(config: Mapping[str, Any]) -> str:
    """Return what the Hub calls the task of a model with this config, by what it takes besides text."""
    keys = {*config, *(config.get("thinker_config") or {})}
    sees = any(key.startswith(("vision_", "visual", "image_token")) for key in keys)
    hears = any(key.startswith("audio_") for key in keys)
    if sees:
        return "any-to-any" if hears else "image-text-to-text"
    return "audio-text-to-text" if hears else "text-generation"


def _by_common_rules(text_type: str) -> Architecture:
    return Architecture(model_type=text_type, post_norm=True, single=True, latent_experts=True, positions=True)


def _row_and_section(
    config: Mapping[str, Any], path: Path, *, unverified: bool
) -> tuple[Architecture, tuple[str, ...]]:
    top = config.get("model_type")
    wrapper = WRAPPERS.get(top) if isinstance(top, str) else None
    config, within = _outer(config, wrapper)
    is_unknown = unverified and isinstance(top, str) and top not in ARCHITECTURES
    is_wrapper = is_unknown or (isinstance(top, str) and top in WRAPPERS)
    for key in TEXT_SECTIONS if is_wrapper else ():
        if not isinstance(config.get(key), (Mapping, type(None))):
            raise _wrong_value(key, config[key], "an object", path)
    sections = [key for key in TEXT_SECTIONS if isinstance(config.get(key), Mapping)]
    if wrapper is not None:
        section = tuple(sections[:1])
        text_type = _at(config, section).get("model_type", wrapper.text_type) if section else wrapper.text_type
    else:
        section = tuple(sections[:1]) if is_unknown else ()
        text_type = _at(config, section).get("model_type", top)
    row = ARCHITECTURES.get(text_type) if isinstance(text_type, str) else None
    refused = [name for name in (top, text_type) if str(name) in REFUSED]
    is_accepted = row is None and unverified and isinstance(top, str)
    if not refused and (is_accepted or (is_unknown and wrapper is None)):
        _refuse_own_code(config, section, path)
    if row is not None and not refused:
        return row, within + section
    if is_accepted and not refused:
        # Every rule is open to it: what they find is proved, or not, on a tiny twin.
        return _by_common_rules(str(text_type)), within + section
    name = refused[0] if refused else (top if wrapper is None else text_type)
    hint = "" if refused else ", and --unverified tries the edit on a tiny model of this one first"
    if hint and _own_code(config, section):
        hint = "; its code comes with the checkpoint (auto_map) and is never run, so --unverified cannot try it either"
    raise UnsupportedArchitectureError(
        f"{path / CONFIG_NAME}: model type {shown(name)} cannot be orthogonalized: {refusal(name)}; "
        f"docs/architectures.md lists the types that can{hint}"
    )


def _refuse_own_code(config: Mapping[str, Any], section: tuple[str, ...], path: Path) -> None:
    if _own_code(config, section):
        raise UnsupportedArchitectureError(
            f"{path / CONFIG_NAME}: its auto_map names Python code that comes with the checkpoint, which is never run, "
            "so an unknown model type cannot be tried; use a release that transformers itself can load"
        )


def _tie(
    config: Mapping[str, Any], text: Mapping[str, Any], row: Architecture, wrapper: Wrapper | None, path: Path
) -> bool:
    def says(section: Mapping[str, Any], default: bool) -> bool:
        value = section.get("tie_word_embeddings")
        if value is not None and not isinstance(value, bool):
            raise _wrong_value("tie_word_embeddings", value, "true or false", path)
        return default if value is None else value

    if wrapper is None:
        return not row.never_tied and says(config, row.tied)
    places = {
        "top": (says(config, wrapper.tied),),
        "text": (says(text, row.tied),),
        "either": (says(config, wrapper.tied), says(text, row.tied)),
        "never": (),
    }
    return any(places[wrapper.tie])


def _own_code(config: Mapping[str, Any], section: tuple[str, ...]) -> bool:
    return bool(config.get("auto_map") or _at(config, section).get("auto_map"))


def _outer(config: Mapping[str, Any], wrapper: Wrapper | None) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """Return the part of a config that is the wrapper's, and the keys that lead to it."""
    within = None if wrapper is None else wrapper.within
    part = config.get(within) if within else None
    return (part, (within,)) if within and isinstance(part, Mapping) else (config, ())


def _at(config: Mapping[str, Any], section: tuple[str, ...]) -> Mapping[str, Any]:
    for key in section:
        config = config[key]
    return config


def _size(text: Mapping[str, Any], key: str, path: Path) -> int:
    value = text.get(key)
    if type(value) is not int or value <= 0:
        raise _wrong_value(key, value, "a positive integer", path)
    return value


def _wrong_value(key: str, value: Any, expected: str, path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path / CONFIG_NAME}: {key} is {shown(value)}, expected {expected}; take config.json from the model's "
        "original release"
    )


def _depth(text: Mapping[str, Any], row: Architecture, path: Path, *, required: bool) -> int | None:
    keys = (row.depth_key,) if row.depth_key else DEPTH_KEYS
    for key in keys:
        if key in text:
            depth = _size(text, key, path)
            if depth > MOST_LAYERS:
                raise _wrong_value(key, depth, f"at most {MOST_LAYERS}", path)
            return depth
    for key in DEPTH_LISTS:
        if isinstance(text.get(key), list):
            return len(text[key])
    return _size(text, keys[0], path) if required else None


def _expert_count(text: Mapping[str, Any]) -> int | None:
    for name in EXPERT_KEYS:
        value: Any = text
        for key in name.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if type(value) is int and value > 0:
            return value
    return None


def _broken_conditions(
    text: Mapping[str, Any], row: Architecture, d_model: int | None
) -> Iterator[tuple[Condition, Any]]:
    for condition in row.conditions:
        value = text.get(condition.key)
        if value not in [d_model if allowed is SIZE else allowed for allowed in condition.exact]:
            yield condition, value


def _check_conditions(text: Mapping[str, Any], model: TextModel, path: Path) -> None:
    for condition, value in _broken_conditions(text, model.row, model.d_model):
        raise UnsupportedArchitectureError(
            f"{path / CONFIG_NAME}: model type {model.row.model_type!r} with {condition.key} = {shown(value)} "
            f"cannot be orthogonalized: {condition.reason}; use another model"
        )
