"""Where a model's files lie: in a directory or GGUF file here, or on the Hub, whose client is imported only then."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterate.checkpoints.checkpoint import CONFIG_NAME, GGUF_SUFFIX, is_gguf
from abliterate.errors import InputError
from abliterate.progress import SILENT, ProgressReporter

_ADAPTER_CONFIG_NAME = "adapter_config.json"
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where a model's files lie.

    Attributes:
        path: The directory that holds them.
        name: The Hub id, or the directory as it was given, `~` expanded.
        revision: The commit the Hub id resolved to; None for a local directory.
    """

    path: Path
    name: str
    revision: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """What a base model's card says that a model made from it must repeat; None where it says nothing."""

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    base_model: str | None = None


def resolve_model(model: str, *, revision: str | None = None, progress: ProgressReporter = SILENT) -> ModelSource:
    """Find a model's files: a local directory or GGUF file as it is, a Hub id downloaded into the Hub cache.

    Args:
        model: A directory that holds `config.json`, a GGUF file or a directory with one, or a Hub id. What exists wins.
        revision: Branch, tag or commit of a Hub id.
        progress: Told of the download where the Hub's client draws no bars of its own.

    Raises:
        InputError: `model` looks like a path and is not there, or is no model directory.
        HubError: The Hub does not have it, does not give it, or cannot be reached.
    """
    local = find_local_model(model, revision=revision)
    if local is not None:
        return local
    from abliterate.checkpoints.hub import download_model

    return download_model(model, revision=revision, progress=progress)


def as_source(model: "str | Path | ModelSource") -> ModelSource:
    """Return a source as it is, and that of a directory or Hub id; see `resolve_model`."""
    return model if isinstance(model, ModelSource) else resolve_model(str(model))


def find_local_model(model: str, *, revision: str | None = None) -> ModelSource | None:
    """Return the source of a model that is a directory or a GGUF file; None where `model` can only be a Hub id.

    Raises:
        InputError: `model` looks like a path and is not there, or is no model directory.
    """
    local = Path(model).expanduser()
    if model.strip() and local.is_dir():
        if revision is not None:
            raise InputError(f"--revision {revision}: {model} is a local directory; only Hub models have revisions")
        if not (local / CONFIG_NAME).is_file() and (local / _ADAPTER_CONFIG_NAME).is_file():
            raise InputError(
                f"{model}: is an adapter and no model; merge it into its base (peft's `merge_and_unload`, then "
                "`save_pretrained`), or orthogonalize the base without --format adapter"
            )
        if gguf := _only_gguf(local):
            return ModelSource(path=gguf, name=os.path.expanduser(model), revision=None)
        if not (local / CONFIG_NAME).is_file():
            raise InputError(
                f"{model}: no config.json in this directory; give a transformers model directory, a GGUF file, or a "
                "Hub id"
            )
        return ModelSource(path=local, name=os.path.expanduser(model), revision=None)
    if is_gguf(local):
        if revision is not None:
            raise InputError(f"--revision {revision}: {model} is a local file; only Hub models have revisions")
        return ModelSource(path=local, name=os.path.expanduser(model), revision=None)
    if local.is_file():
        raise InputError(
            f"{model}: this is a file, and no GGUF file; give the directory that holds config.json, or a Hub id"
        )
    if model.endswith(GGUF_SUFFIX):
        raise InputError(f"{model}: no such file; check the path (of a Hub model, download the GGUF file first)")
    if _looks_like_a_path(model):
        raise InputError(f"{model}: no such directory; check the path (a Hub id has the form OWNER/NAME)")
    return None


def _only_gguf(directory: Path) -> Path | None:
    """Return the GGUF file that is all the weights of a directory; None where there are others, or none at all.

    Raises:
        InputError: There are several, and no other weights.
    """
    found = sorted(directory.glob(f"*{GGUF_SUFFIX}"))
    if not found or any(any(directory.glob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin")):
        return None
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:4]) + (", ..." if len(found) > 4 else "")
        raise InputError(f"{directory}: holds {len(found)} GGUF files ({names}); name one of them")
    return found[0]


def _looks_like_a_path(model: str) -> bool:
    return not model.strip() or model[0] in "./~" or model.endswith("/") or model.count("/") > 1 or "\\" in model


def read_card_facts(card: Path) -> CardFacts | None:
    """Read the front matter of a local model card; None when there is no card or no readable front matter."""
    found = read_front_matter(card)
    return None if found is None else card_facts(found)


def read_front_matter(card: Path) -> dict[str, Any] | None:
    """Read what stands before the text of a local model card, as YAML; {} without any, None where it cannot be read."""
    if not card.is_file():
        return None
    import yaml  # type: ignore[import-untyped]

    try:
        found = _FRONT_MATTER.match(card.read_text(encoding="utf-8"))
        content = yaml.safe_load(found[1]) if found else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    if content is None:
        return {}
    return content if isinstance(content, dict) else None


def card_facts(front_matter: Mapping[str, Any]) -> CardFacts:
    """Return what a card's front matter says, where it says it in one line of text."""

    def text(key: str) -> str | None:
        value = front_matter.get(key)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        return value if isinstance(value, str) and value.strip() and value.isprintable() else None

    return CardFacts(
        license=text("license"),
        license_name=text("license_name"),
        license_link=text("license_link"),
        base_model=text("base_model"),
    )
