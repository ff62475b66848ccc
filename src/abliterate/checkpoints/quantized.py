"""A quantised checkpoint seen as what its numbers mean: each pair of codes and scales as one plain tensor.

The pairs are found by their names and dtypes, tensor by tensor, and the format by config.json; whatever is not known
to be read rightly is refused. Nothing is decoded here.

What a quantised checkpoint looks like once every number is stored plain, in bfloat16: headers, index and config.

The same shards under the same names; in each the tensors that are not quantised as they were, and in the place of codes
the numbers that they mean. Scales are gone, and config.json says nothing of quantisation.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from abliterate.checkpoints.checkpoint import CONFIG_NAME, Checkpoint
from abliterate.checkpoints.quantized_formats import QuantizedLayout
from abliterate.checkpoints.safetensors_file import Encoding, Shard, TensorInfo, new_header
from abliterate.errors import CheckpointError, QuantizedCheckpointError

QuantizedPolicy = Literal["refuse", "requantize", "dequantize"]
QUANTIZED_POLICIES: tuple[QuantizedPolicy, ...] = ("refuse", "requantize", "dequantize")

CONFIG_KEYS = ("quantization_config", "compression_config")

_FP8_METHODS = {"fp8", "mxfp8"}
_E4M3 = {None, "e4m3", "e4m3fn", "float8_e4m3fn"}
_GROUP = 32
_ACTIVATION_SCALES = ("activation_scale", "input_scale", "qscale_act")


def quantization_of(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """Return the method that a config names and what it says of it, or None where it names none."""
    for key in CONFIG_KEYS:
        found = config.get(key)
        if found:
            content = found if isinstance(found, dict) else {}
            return str(content.get("quant_method", "unknown")), content
    return None


def is_handled(config: Mapping[str, Any]) -> bool:
    """Return whether the format that a config names can be decoded and written again."""
    found = quantization_of(config)
    if found is None:
        return False
    method, content = found
    if method == "compressed-tensors":
        return content.get("format") == "float-quantized"
    return method == "mxfp4" or (method in _FP8_METHODS and content.get("fmt") in _E4M3)


def base_in_words(config: Mapping[str, Any]) -> str:
    """Return which model to use instead of a quantised one, as far as its config says."""
    for key in ("base_model", "base_model_name_or_path", "_name_or_path"):
        name = config.get(key)
        if isinstance(name, str) and name:
            return f"use the model it was quantised from (config.json names {name} as {key})"
    return "use the model it was quantised from"


def plain_view(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint in which each pair of codes and scales is one plain tensor, and the config says so.

    Of the tensors that it lists those with an `encoding` are read decoded; its shards keep their headers.

    Raises:
        QuantizedCheckpointError: The format is not one that is handled, or codes have no scales that fit them.
    """
    found = quantization_of(checkpoint.config)
    if found is None:
        return checkpoint
    if not is_handled(checkpoint.config):
        raise QuantizedCheckpointError(
            f"{checkpoint.path / CONFIG_NAME}: the quantisation method {found[0]} is not one that can be decoded and "
            f"written again (fp8 and mxfp4 are, and float-quantized of compressed-tensors); "
            f"{base_in_words(checkpoint.config)}"
        )
    tensors = {tensor.name: tensor for tensor in checkpoint.tensors()}
    pairs = {name: pair for name, info in tensors.items() if (pair := _pair(info, tensors)) is not None}
    hidden = {scales.name for _, scales in pairs.values()}
    hidden |= {f"{_stem(name)}.{each}" for name in pairs for each in _ACTIVATION_SCALES}

    def seen(info: TensorInfo) -> TensorInfo:
        if info.name not in pairs:
            return info
        return _decoded(info, *pairs[info.name], content=found[1], path=checkpoint.path)

    shards = tuple(
        replace(shard, tensors=tuple(seen(info) for info in shard.tensors if info.name not in hidden))
        for shard in checkpoint.shards
    )
    _check_names(checkpoint, shards)
    config = {key: value for key, value in checkpoint.config.items() if key not in CONFIG_KEYS}
    return replace(checkpoint, config=config, shards=shards)


def _pair(info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> tuple[str, TensorInfo] | None:
    """Return the plain name of what `info` holds the codes of, and its scales; None where it holds none."""
    if info.dtype == "U8" and info.name.endswith("_blocks"):
        plain = info.name.removesuffix("_blocks")
        scales = tensors.get(f"{plain}_scales")
        return None if scales is None else (plain, scales)
    if info.dtype != "F8_E4M3":
        return None
    stem = _stem(info.name)
    names = [f"{info.name}_scale_inv", f"{info.name}_scale"]
    names += [f"{stem}.scale", f"{stem}.qscale_weight"] if stem != info.name else []
    return next(((info.name, tensors[name]) for name in names if name in tensors), None)


def _stem(name: str) -> str:
    return name.removesuffix(".weight")


def _decoded(codes: TensorInfo, name: str, scales: TensorInfo, *, content: Mapping[str, Any], path: Path) -> TensorInfo:
    def refuse(reason: str) -> QuantizedCheckpointError:
        return QuantizedCheckpointError(
            f"{path / codes.shard}: tensor {codes.name} ({codes.dtype} {list(codes.shape)}) has scales {scales.name} "
            f"({scales.dtype} {list(scales.shape)}), {reason}; use the model it was quantised from"
        )

    power_of_two = scales.dtype in {"U8", "F8_E8M0"} or content.get("scale_fmt") == "ue8m0"
    if scales.dtype not in {"F32", "BF16", "F16", "U8", "F8_E8M0"}:
        raise refuse("of a dtype that is not known")
    if codes.dtype == "U8":
        if scales.dtype != "U8" or codes.shape[:-1] != scales.shape or codes.shape[-1:] != (_GROUP // 2,):
            raise refuse("which are not one for 32 numbers of a row")
        layout = QuantizedLayout(number="fp4", block=(1, _GROUP), power_of_two=True)
        *leading, rows, groups, _ = codes.shape
        turned = bool(leading)
        matrix = (groups * _GROUP, rows) if turned else (rows, groups * _GROUP)
        encoding = Encoding(codes=codes, scales=scales, layout=layout, turned=turned)
        return replace(codes, name=name, dtype="BF16", shape=(*leading, *matrix), encoding=encoding)
    block = _block_of(codes.shape, scales.shape, content)
    if block is None:
        raise refuse("whose blocks are not those that config.json names")
    layout = QuantizedLayout(number="fp8", block=block, power_of_two=power_of_two)
    encoding = Encoding(codes=codes, scales=scales, layout=layout)
    return replace(codes, name=name, dtype="BF16", encoding=encoding)


def _block_of(codes: tuple[int, ...], scales: tuple[int, ...], content: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return how many rows and columns share a scale; None where that cannot be told."""
    if len(codes) not in {2, 3}:
        return None
    *leading, rows, columns = codes
    found = list(scales)
    if found[: len(leading)] != leading:
        return (rows, columns) if not leading and found in ([], [1]) else None
    found = found[len(leading) :]
    found += [1] * (2 - len(found))
    given = content.get("weight_block_size") or [None, None]
    block = []
    for size, n_scales, wanted in zip((rows, columns), found, given, strict=False):
        if n_scales == 1:
            block.append(size)
        elif n_scales == size:
            block.append(1)
        elif isinstance(wanted, int) and wanted > 0 and -(-size // wanted) == n_scales:
            block.append(wanted)
        else:
            return None
    return (block[0], block[1]) if len(block) == len(found) == 2 else None


def _check_names(checkpoint: Checkpoint, shards: tuple[Shard, ...]) -> None:
    names = [tensor.name for shard in shards for tensor in shard.tensors]
    if len(names) != len(set(names)):
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"{checkpoint.path}: tensor {twice} is there plain and quantised; download it again")


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
