"""GGUF files made of tiny models, by the package gguf and by what its format asks of each architecture."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tests.support.tiny_models import CHAT_VOCABULARY, make_tiny_model, make_tokenizer

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
}
Q8_0, F16, BF16, F32, Q4_0 = (
    gguf.GGMLQuantizationType.Q8_0,
    gguf.GGMLQuantizationType.F16,
    gguf.GGMLQuantizationType.BF16,
    gguf.GGMLQuantizationType.F32,
    gguf.GGMLQuantizationType.Q4_0,
)


_COMMON: dict[str, Any] = {
    "intermediate_size": 64,
    "vocab_size": CHAT_VOCABULARY,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "pad_token_id": 2,
}
_MORE: dict[str, dict[str, Any]] = {"gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 16, "tied": True}}


def tiny(model_type: str = "llama", **config: Any) -> PreTrainedModel:
    """Return a tiny random model of a type in `ARCHITECTURES`."""
    return make_tiny_model(model_type, **{**_COMMON, **_MORE.get(model_type, {}), **config})


def write(directory: Path, model: PreTrainedModel | None = None, **options: Any) -> Path:
    """Write `model.gguf`; options as for `write_gguf`."""
    return write_gguf(directory / "model.gguf", model or tiny(), make_tokenizer(), **options)


def logits(model: Any) -> torch.Tensor:
    """Return a model's logits on some tokens, attention computed the plain way."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return torch.as_tensor(model(torch.arange(4, 40)[None]).logits)


def permuted(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Put the rows of a llama's query or key into the order in which GGUF rotates them: pairs beside each other."""
    halves = weight.reshape(n_heads, 2, weight.shape[0] // n_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def as_stored(name: str, weight: np.ndarray, config: Any) -> np.ndarray:
    """Return a weight of transformers as GGUF has it."""
    if config.model_type == "llama" and ".self_attn.q_proj." in name:
        return permuted(weight, config.num_attention_heads)
    if config.model_type == "llama" and ".self_attn.k_proj." in name:
        return permuted(weight, config.num_key_value_heads)
    if config.model_type == "gemma2" and name.endswith("norm.weight"):
        return weight + 1
    return weight


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    kind: gguf.GGMLQuantizationType = F32,
    leave_out: str | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    change: Callable[[gguf.GGUFWriter], None] = lambda _writer: None,
    architecture: str | None = None,
) -> Path:
    """Write a model as a GGUF file.

    Args:
        path: where.
        model: in float32, of a type in `ARCHITECTURES`.
        tokenizer: a byte-level one, whose template goes along.
        kind: how matrices are stored; vectors are in float32.
        leave_out: a tensor that is not written, by its name in GGUF.
        extra: tensors that are written besides.
        change: adds to the metadata.
        architecture: what the file claims to be, if not what it is.
    """
    config: Any = model.config
    n_layers = config.num_hidden_layers
    writer = gguf.GGUFWriter(path, architecture or str(gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]]))
    writer.add_name("tiny")
    writer.add_block_count(n_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
        writer.add_sliding_window(config.sliding_window)
    else:
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(head_dim)
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    change(writer)
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], n_layers)
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        if stored == leave_out:
            continue
        _add(writer, stored, as_stored(name, tensor.numpy(), config), kind)
    for name, values in (extra or {}).items():
        _add(writer, name, values, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: gguf.GGMLQuantizationType) -> None:
    as_kind = kind if values.ndim > 1 else F32
    data = np.ascontiguousarray(values, dtype=np.float32)
    writer.add_tensor(name, data if as_kind == F32 else stored_as(as_kind, data, seed=len(name)), raw_dtype=as_kind)


# Where the halves are that scale a block, of types that the package does not quantise to.
_HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_XS": (0,)}


def stored_as(kind: gguf.GGMLQuantizationType, values: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Return values in blocks of a type; of a type that nothing quantises to here, others of about their size."""
    try:
        return gguf.quantize(values, kind)
    except NotImplementedError:
        blocks = random_blocks(kind, values.shape[0], values.shape[1], seed=seed)
        numbers = gguf.dequantize(blocks, kind)
        return random_blocks(kind, *values.shape, seed=seed, factor=0.001 * float(values.std() / numbers.std()))


def random_blocks(
    kind: gguf.GGMLQuantizationType, rows: int, columns: int, *, seed: int = 0, factor: float = 0.001
) -> np.ndarray:
    """Return rows of blocks, bytes [rows, bytes of a row]: codes and factors random, halves all the same."""
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(seed).integers(0, 256, (rows, columns // size, nbytes), dtype=np.uint8)
    if kind.name == "MXFP4":
        blocks[..., 0] = 120
    else:
        half = np.array([factor], dtype=np.float16).view(np.uint8)
        for at in _HALVES.get(kind.name, (0, 2) if kind.name.endswith("_1") else (0,)):
            blocks[..., at : at + 2] = half
    return blocks.reshape(rows, -1)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, n_tokens: int) -> None:
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = {added["content"] for added in content["added_tokens"]}
    unused = [f"[PAD{index}]" for index in range(len(tokens), n_tokens)]
    types = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*tokens, *unused])
    writer.add_token_types([*types, *[gguf.TokenType.UNUSED] * len(unused)])
    writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def dequantised(path: Path) -> dict[str, torch.Tensor]:
    """Return the weights in a GGUF file by the package gguf alone."""
    return {
        tensor.name: torch.from_numpy(np.copy(gguf.dequantize(tensor.data, tensor.tensor_type)))
        for tensor in gguf.GGUFReader(path).tensors
    }
