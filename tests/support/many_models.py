"""Tiny random chat models of many kinds: plain, sliding-window, mixture-of-experts and linear attention."""

from typing import Any

from abliterate.models.chat_model import ChatModel, make_chat_model
from tests.support.chat_models import VOCABULARY, make_tokenizer
from tests.support.tiny_models import make_tiny_model

_COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "max_position_embeddings": 512}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "gpt2": ("gpt2", {"n_positions": 512}),
    "gemma2": ("gemma2", {"sliding_window": 256, "query_pre_attn_scalar": 8}),
    "gemma2-short-window": ("gemma2", {"sliding_window": 16, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", {"sliding_window": 256, "query_pre_attn_scalar": 8}),
    "gemma3-short-window": ("gemma3_text", {"sliding_window": 16, "query_pre_attn_scalar": 8}),
    "mixture of experts": ("qwen3_moe", _MOE),
    "linear attention": (
        "qwen3_next",
        {
            **_MOE,
            "num_hidden_layers": 4,
            "full_attention_interval": 2,
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
}
CACHED = {"llama", "gpt2", "gemma2", "gemma3", "mixture of experts"}
"""Kinds where the cache of a shared prefix is exact."""


def make_many(kind: str) -> ChatModel:
    """Return a tiny random chat model of this kind."""
    model_type, config = KINDS[kind]
    common = {"vocab_size": VOCABULARY} if model_type == "gpt2" else _COMMON
    model = make_tiny_model(model_type, **{**common, **config})
    return make_chat_model(model, make_tokenizer())
