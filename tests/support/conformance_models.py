"""What the tiny model of each type needs beyond its shrunken default config: one line where it needs anything."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BIASES = {
    "add_bias_linear",
    "attention_bias",
    "attention_out_bias",
    "bias",
    "conv_bias",
    "linear_bias",
    "lm_head_bias",
    "mamba_proj_bias",
    "mlp_bias",
    "norm_bias",
    "projectors_bias",
    "qkv_bias",
    "use_bias",
}

_MOE = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
_HEAD = {"head_dim": 16}
_HYBRID = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_expand": 2}

_INKLING = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
_QWEN4 = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "indexed_attention", "linear_attention", "indexed_attention"],
    "ple_layer_ids": [1, 3],
    "number_of_conv_states": 3,
    "ple_embed_dim": 64,
    "ngram_vocab_size_base": 50,
    "heads_per_ngram": 2,
    "eos_token_id": 3,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}

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
    "inkling_text": _INKLING,
    "lfm2": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "llama4_text": {"num_hidden_layers": 4, "layer_types": None, "no_rope_layers": [1, 1, 0, 1], "moe_layers": [1, 3]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "longcat_flash": {"zero_expert_num": 0},
    "ministral": _HEAD,
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": _QWEN4,
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
    "glm5_next": {"text_config": {"index_topk": 8, "index_kpool": 4}},
    "glm_ocr": _SECTIONS,
    "glmga": _SECTIONS,
    "hunyuan_vl": {"text_config": {"head_dim": 16, "rope_parameters": {"mrope_section": [2, 2, 2, 2]}}},
    "inkling_mm_model": {"text_config": _INKLING},
    "mllama": {"vision_config": {"intermediate_layers_indices": [0, 1], "vision_output_dim": 192}},
    "paddleocr_vl": _SECTIONS,
    "qwen2_5_omni_thinker": _SECTIONS,
    "qwen2_5_vl": _SECTIONS,
    "qwen2_vl": _SECTIONS,
    "qwen4_exp": {"text_config": _QWEN4},
    "step3p7": {"text_config": {"sliding_window": 8}},
}

_SHARED_KEYS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

# Settings that change which tensors a model type has, by a name of our own: model type and changes.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon, new decoder": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, sequential, alibi": ("falcon", {"parallel_attn": False, "alibi": True}),
    "gemma4 with experts": (
        "gemma4_text",
        {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48},
    ),
    "gemma4 with shared keys": (
        "gemma4_text",
        {"num_kv_shared_layers": 2, "num_hidden_layers": 4, "layer_types": _SHARED_KEYS},
    ),
    "gpt_bigcode, many heads of keys": ("gpt_bigcode", {"multi_query": False}),
    "gpt_neox, sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "granitemoehybrid, dense": ("granitemoehybrid", {"num_local_experts": 0, "num_experts_per_tok": 0}),
    "granitemoeshared with a shared MLP": ("granitemoeshared", {"shared_intermediate_size": 48}),
    "llama without biases": ("llama", {"attention_bias": False, "mlp_bias": False}),
    "mllama with cross-attention": ("mllama", {"text_config": {"cross_attention_layers": [1]}}),
    "nemotron_h with latent experts": ("nemotron_h", {"moe_latent_size": 32}),
    "phi3, tied": ("phi3", {"tie_word_embeddings": True}),
    "qwen3_moe with a dense layer": ("qwen3_moe", {"mlp_only_layers": [1]}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "zamba2 with adapters": ("zamba2", {"use_shared_attention_adapter": True, "num_mem_blocks": 1}),
}


def _mllama_inputs(model: Any) -> dict[str, Tensor]:
    vision = model.config.vision_config
    shape = (3, 1, vision.max_num_tiles, 3, vision.image_size, vision.image_size)
    pixels = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    tiles = torch.ones(3, 1, vision.max_num_tiles, dtype=torch.int64)
    return {
        "pixel_values": pixels,
        "aspect_ratio_ids": torch.ones(3, 1, dtype=torch.int64),
        "aspect_ratio_mask": tiles,
        "cross_attention_mask": torch.ones(3, 20, 1, vision.max_num_tiles, dtype=torch.int64),
    }


# Computed in float32 in part, whatever the model is loaded in.
FLOAT32 = {
    *("falcon_mamba", "hy_v3", "hy_v4", "inkling2", "inkling2_text", "inkling_mm_model", "inkling_text", "mamba"),
    "mamba2",
}
# These do not run in float64.
FLOAT32_ALONE = {"inkling2", "inkling2_text"}
# Of types whose stream no edit cleans whole: what makes the part that remains do nothing, or nothing but scale the
# stream, by parameters' names, so that an edit must be exact then.
NEUTRAL: dict[str, float] = {
    "attn_sconv.conv1d.weight": 0.0,
    "mlp_sconv.conv1d.weight": 0.0,
    "post_attention_convolution.conv1d.weight": 0.0,
    "post_mlp_convolution.conv1d.weight": 0.0,
    "ple.conv1d.weight": 0.0,
    # What LAuReL adds is the stream, scaled, where this norm scales all channels alike.
    "input_layernorm.weight": 1.0,
}
# Their towers need a package that is not there, so the text model is saved in the layout of the whole.
IN_LAYOUT_OF = {"gemma3n": "gemma3n_text"}
# They hold their streams in the first axis, where a direction for each row finds none; no candidate is scored there.
STREAMS_FIRST = {"gemma3n", "gemma3n_text"}

# What a type needs beside tokens to use all of its writers.
INPUTS: dict[str, Callable[[Any], dict[str, Tensor]]] = {"mllama": _mllama_inputs}
