"""A quantised checkpoint seen as what its numbers mean, and as it looks with every number stored plain.

The formats (`format_NAME.py`, see `encoding`) find their tensors by names and dtypes and are recognised in config.json;
what is not known to be read rightly is refused. In the plain layout the shards keep their names, codes become bfloat16
numbers, scales are gone, and config.json says nothing of quantisation. Nothing is decoded here.
"""

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from abliterate import formats
from abliterate.checkpoints.checkpoint import CONFIG_NAME, Checkpoint
from abliterate.checkpoints.encoding import Encoding, EncodingError, QuantizedFormat
from abliterate.checkpoints.safetensors_file import Shard, TensorInfo, new_header
from abliterate.errors import CheckpointError, QuantizedCheckpointError
from abliterate.files import in_one_line

# MLX writes the third, beside the first or alone.
CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")


def quantization_of(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """Return the method that a config names and what it says of it, or None where it names none."""
    for key in CONFIG_KEYS:
        found = config.get(key)
        if found:
            content = found if isinstance(found, dict) else {}
            method = "mlx" if {"group_size", "bits"} <= content.keys() and "quantization" in config else "unknown"
            return in_one_line(str(content.get("quant_method", method))), content
    return None


@functools.cache
def quantized_formats() -> tuple[QuantizedFormat, ...]:
    """Return the `FORMATS` of each module `format_NAME` of this package, by name of the module."""
    names = sorted(each.name for each in pkgutil.iter_modules(formats.__path__))
    modules = (importlib.import_module(f"{formats.__name__}.{name}") for name in names if name.startswith("format_"))
    return tuple(each for module in modules for each in module.FORMATS)


def is_handled(config: Mapping[str, Any]) -> bool:
    """Return whether the format that a config names can be decoded and written again."""
    found = quantization_of(config)
    if found is None:
        return False
    return any(each.is_named_by(*found) for each in quantized_formats())


def base_in_words(config: Mapping[str, Any]) -> str:
    """Return which model to use instead of a quantised one, as far as its config says."""
    found = quantization_of(config)
    if found is not None and found[0] == "mlx":
        return "MLX alone reads this layout; use the release it was converted from"
    for key in ("base_model", "base_model_name_or_path", "_name_or_path"):
        name = config.get(key)
        if isinstance(name, str) and name:
            return f"use the model it was quantised from (config.json names {in_one_line(name)} as {key})"
    return "use the model it was quantised from"


def plain_view(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint in which codes and scales are seen as one plain tensor, and whose config says the same.

    Of the tensors that it lists, those with an `encoding` are decoded as they are read; its shards keep their headers.

    Raises:
        QuantizedCheckpointError: The format is not one that is handled, or codes have no scales that fit them.
    """
    found = quantization_of(checkpoint.config)
    if found is None:
        return checkpoint
    if not is_handled(checkpoint.config):
        raise QuantizedCheckpointError(
            f"{checkpoint.path / CONFIG_NAME}: the quantisation method {found[0]} is not one that can be decoded and "
            f"written again ({_handled_in_words()}); "
            f"{base_in_words(checkpoint.config)}"
        )
    tensors = {tensor.name: tensor for tensor in checkpoint.tensors()}
    encoded = {
        name: each for name, info in tensors.items() if (each := _encoded(info, tensors, found[1], checkpoint.path))
    }
    encodings: list[Encoding] = [each.encoding for each in encoded.values() if each.encoding is not None]
    hidden = {stored.name for encoding in encodings for stored in encoding.companions}
    hidden |= {name for encoding in encodings for name in encoding.unused}
    shards = tuple(
        replace(shard, tensors=tuple(encoded.get(info.name, info) for info in shard.tensors if info.name not in hidden))
        for shard in checkpoint.shards
    )
    _check_names(checkpoint, shards)
    config = {key: value for key, value in checkpoint.config.items() if key not in CONFIG_KEYS}
    return replace(checkpoint, config=config, shards=shards)


def _encoded(
    info: TensorInfo, tensors: Mapping[str, TensorInfo], content: Mapping[str, Any], path: Path
) -> TensorInfo | None:
    try:
        found = (each.find(info, tensors, content) for each in quantized_formats())
        return next((each for each in found if each is not None), None)
    except EncodingError as error:
        raise QuantizedCheckpointError(f"{path / info.shard}: {error}; use the model it was quantised from") from error


def _handled_in_words() -> str:
    return ", ".join(name for each in quantized_formats() for name in each.names) + " are"


def _check_names(checkpoint: Checkpoint, shards: tuple[Shard, ...]) -> None:
    names = [tensor.name for shard in shards for tensor in shard.tensors]
    if len(names) != len(set(names)):
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"{checkpoint.path}: tensor {twice} is there plain and quantised; download it again")


def dequantized_layout(view: Checkpoint) -> Checkpoint:
    """Return the layout of a checkpoint once it is dequantised, with the offsets that its tensors will have.

    Args:
        view: What `plain_view` returned.
    """
    shards = tuple(_plain(shard) for shard in view.shards)
    return replace(view, shards=shards, index=None if view.index is None else _index(view.index, shards))


def dequantized_config_changes(config: dict[str, Any]) -> dict[str, Any]:
    """Return what config.json loses, as `checkpoint.with_changes` takes it."""
    return {key: None for key in CONFIG_KEYS if key in config}


def plain_info(info: TensorInfo) -> TensorInfo:
    """Return what is stored of a tensor once it is dequantised; its offsets are those of what it is read from."""
    return replace(info, encoding=None)


def _plain(shard: Shard) -> Shard:
    header = new_header(shard.metadata, [plain_info(info) for info in shard.tensors])
    position, tensors = len(header), []
    for info in shard.tensors:
        size = info.end - info.start if info.encoding is None else info.plain_bytes
        tensors.append(replace(plain_info(info), start=position, end=position + size))
        position += size
    return replace(shard, header_bytes=header, tensors=tuple(tensors))


def _index(index: dict[str, Any], shards: tuple[Shard, ...]) -> dict[str, Any]:
    metadata = dict(index.get("metadata") or {})
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    if isinstance(metadata.get("total_size"), int):
        metadata["total_size"] = sum(tensor.end - tensor.start for tensor in tensors)
    metadata.pop("total_parameters", None)
    weight_map = dict(sorted((tensor.name, tensor.shard) for tensor in tensors))
    return {**index, **({"metadata": metadata} if "metadata" in index else {}), "weight_map": weight_map}
