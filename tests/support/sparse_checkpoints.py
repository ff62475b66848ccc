"""Checkpoints of any size that take no room: real headers over files that are one hole, so every number is zero."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What `make_sparse_checkpoint` writes a tensor as: name -> shape, in bfloat16.
Shapes = Iterator[tuple[str, tuple[int, ...]]]


def moe_config(
    *, hidden: int, layers: int, experts: int, intermediate: int, heads: int, vocabulary: int
) -> dict[str, Any]:
    """Return the config of a qwen3_moe, one tensor for each expert's matrices."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_experts": experts,
        "num_local_experts": experts,
        "num_experts_per_tok": min(8, experts),
        "moe_intermediate_size": intermediate,
        "intermediate_size": intermediate,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 12),
        "head_dim": 128 if hidden >= 1024 else 8,
        "vocab_size": vocabulary,
        "max_position_embeddings": 262144,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def moe_shapes(config: dict[str, Any]) -> Shapes:
    """Yield the tensors of such a model in file order."""
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        yield at + "input_layernorm.weight", (hidden,)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            yield f"{at}self_attn.{name}_proj.weight", (rows, hidden)
        yield at + "self_attn.o_proj.weight", (hidden, q)
        yield at + "self_attn.q_norm.weight", (config["head_dim"],)
        yield at + "self_attn.k_norm.weight", (config["head_dim"],)
        yield at + "post_attention_layernorm.weight", (hidden,)
        yield at + "mlp.gate.weight", (config["num_experts"], hidden)
        for expert in range(config["num_experts"]):
            yield f"{at}mlp.experts.{expert}.gate_proj.weight", (inner, hidden)
            yield f"{at}mlp.experts.{expert}.up_proj.weight", (inner, hidden)
            yield f"{at}mlp.experts.{expert}.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def make_sparse_checkpoint(directory: Path, config: dict[str, Any], *, shard_bytes: int) -> int:
    """Write a checkpoint of zeros and return its bytes.

    Args:
        directory: Where; it is made.
        config: Of `moe_config`.
        shard_bytes: No shard takes more, but one that holds a single tensor.
    """
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in moe_shapes(config):
        if shards[-1] and filled + _nbytes(shape) > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += _nbytes(shape)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    weight_map, total = {}, 0
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(tensors, name)
        total += _write_shard(directory / name, tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _nbytes(shape: tuple[int, ...]) -> int:
    size = 2
    for length in shape:
        size *= length
    return size


def _write_shard(path: Path, tensors: dict[str, tuple[int, ...]]) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in tensors.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + _nbytes(shape)]}
        position += _nbytes(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    return position
