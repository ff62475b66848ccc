"""What a quantised checkpoint looks like once every number is stored plain, in bfloat16: headers, index and config.

The same shards under the same names; in each the tensors that are not quantised as they were, and in the place of codes
the numbers that they mean. Scales are gone, and config.json says nothing of quantisation.
"""

from dataclasses import replace
from typing import Any

from abliterate.checkpoint import Checkpoint
from abliterate.quantized_view import CONFIG_KEYS
from abliterate.safetensors_file import Shard, TensorInfo, new_header


def dequantized_layout(view: Checkpoint) -> Checkpoint:
    """Return the layout of a checkpoint once it is dequantised, with the offsets that its tensors will have.

    Args:
        view: What `quantized_view.plain_view` returned.
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
