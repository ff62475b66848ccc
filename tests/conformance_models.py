"""Tiny real models of every model type, by shrinking the default config; per type, only what that does not get right."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

_MOE = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
_HEAD = {"head_dim": 16}
_HYBRID = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_expand": 2}

# Applied to the shrunken config; `a.b` reaches into a nested config.
EXTRAS: dict[str, dict[str, Any]] = {
    "bamba": {**_HYBRID, "attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "hidden_size": 64},
    },
    "deepseek_v2": _MOE,
    "dots1": {**_MOE, "first_k_dense_replace": 1},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "granitemoehybrid": {**_HYBRID, "layer_types": ["mamba", "attention", "mamba"]},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "hunyuan_v1_dense": _HEAD,
    "hunyuan_v1_moe": {**_HEAD, "num_experts": 4, "moe_topk": 2},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "llama4_text": {"num_hidden_layers": 4, "layer_types": None, "no_rope_layers": [1, 1, 0, 1], "moe_layers": [1, 3]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "longcat_flash": {"zero_expert_num": 0},
    "ministral": _HEAD,
    "nemotron": {"num_key_value_heads": 2},
    "xlstm": {"chunk_size": 16, "qk_dim_factor": 1.0},
    "zamba": {
        "attention_hidden_size": 128,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "zamba2": {
        "attention_hidden_size": 128,
        "mamba_headdim": 16,
        "n_mamba_heads": 8,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "hybrid_layer_ids": [1, 3],
    },
}

# Three axes of position share the rotated half of a head.
_SECTIONS = {"text_config": {"rope_parameters": {"mrope_section": [4, 2, 2]}}}

WRAPPER_EXTRAS: dict[str, dict[str, Any]] = {
    "glm46v": _SECTIONS,
    "glm4v": _SECTIONS,
    "glm4v_moe": {"text_config": {"rope_parameters": {"mrope_section": [2, 1, 1]}}},
    "glm_ocr": _SECTIONS,
    "glmga": _SECTIONS,
    "hunyuan_vl": {"text_config": {"head_dim": 16}},
    "paddleocr_vl": _SECTIONS,
    "qwen2_5_omni_thinker": _SECTIONS,
    "qwen2_5_vl": _SECTIONS,
    "qwen2_vl": _SECTIONS,
    "step3p7": {"text_config": {"sliding_window": 8}},
}

INPUTS: dict[str, Callable[[Any], dict[str, Tensor]]] = {}
