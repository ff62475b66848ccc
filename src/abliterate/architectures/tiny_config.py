"""A tiny version of a config.json: the same architecture, a few layers and a few dozen channels.

Sizes are recognised by their names, as configs have no other way of telling a width from a count. Every distinct
kind of layer is kept once, in order, so that a hybrid model stays one. Nothing is promised for a config that
names its sizes in a way of its own: then the model cannot be built or is too large, and whoever asked is told.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

_MIN_LAYERS = 3
# A config that says more lies; going through its layers one by one would not end.
_MAX_LAYERS = 10_000

_SIZES_AND_NAMES = """
64: hidden_size n_embd d_model emb_dim embedding_dim dim embed_dim lru_width word_embed_proj_dim mamba_d_ssm
    attention_hidden_size projection_dim out_hidden_size text_hidden_size vision_output_dim proj_hidden_size
    ple_embed_dim ngram_vocab_size_base
96: intermediate_size n_inner ffn_dim ffn_hidden_size intermediate_size_mlp dense_intermediate_size d_ff dff dim_ff
    d_inner decoder_ffn_dim encoder_ffn_dim prefix_dense_intermediate_size feed_forward_size
48: moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size expert_ffn_hidden_size
    shared_intermediate_size moe_shared_expert_intermediate_size moe_latent_size pixel_shuffle_dim
    alignment_intermediate_size projector_input_dim projector_output_dim
32: attention_head_dim vision_head_hidden_size image_size max_num_tiles
16: head_dim v_head_dim kv_lora_rank q_lora_rank kv_channels linear_key_head_dim linear_value_head_dim
    index_head_dim linear_head_dim swa_head_dim global_head_dim mamba_d_state state_size ssm_state_size mamba_d_head
    adapter_rank o_lora_rank mamba_dt_rank time_step_rank gated_norm_rank d_rel laurel_rank
    hidden_size_per_layer_input router_hidden_size swa_v_head_dim dim_head d_head qk_head_dim hc_lowrank
    indexer_head_dim
8: qk_rope_head_dim qk_nope_head_dim rotary_dim mamba_chunk_size chunk_size index_topk index_block_size block_size
    block_multiple_of sliding_window ffn_round_up_to_multiple_of attention_chunk_size local_attention window_size
    attention_window_size patch_size mamba_num_heads mamba_n_heads indexer_budget
4: num_attention_heads n_head n_heads num_heads linear_num_heads index_n_heads swa_num_attention_heads
    linear_num_key_heads linear_num_value_heads num_query_groups attention_heads num_experts n_routed_experts
    num_local_experts moe_num_experts n_experts encoder_attention_heads decoder_attention_heads
    num_encoder_attention_heads num_decoder_attention_heads indexer_compress_ratio
2: num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k top_k_experts
    num_global_key_value_heads swa_num_key_value_heads kv_n_heads zero_expert_num vision_layers depth encoder_layers
    num_encoder_layers num_global_layers n_layers_per_attn_res_block indexer_n_heads split_ngram_parts
1: n_shared_experts num_shared_experts moe_num_shared_experts topk_group n_group num_expert_group mamba_n_groups
    n_groups mamba_ngroups o_groups first_k_dense_replace num_dense_layers moe_layer_start_index attn_layer_offset
    expert_layer_offset temporal_patch_size num_kv_shared_layers
256: max_position_embeddings n_positions max_seq_len n_ctx seq_length model_max_length max_sequence_length
128: vocab_size vocab_size_per_layer_input
"""
_SIZES = {
    name: int(size) for size, names in re.findall(r"(?m)^(\d+):([^:]*)$", _SIZES_AND_NAMES) for name in names.split()
}
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers")
_LAYER_INDEX_LISTS = frozenset(
    {"moe_layers", "full_attn_idxs", "mlp_only_layers", "hybrid_layer_ids", "attn_layer_indices"}
)
# The same, counted from 1.
_LAYER_NUMBER_LISTS = frozenset({"ple_layer_ids"})
# For each layer the one whose keys and values it takes; itself, or an earlier one that is its own.
_SOURCE_LISTS = frozenset({"kv_source_layers"})
_PERIODS = frozenset({"attn_layer_period", "expert_layer_period"})
_STATE_SPACE_HEADS = (
    ("mamba_d_ssm", "mamba_expand", "mamba_n_heads", "mamba_d_head"),
    ("", "expand", "num_heads", "head_dim"),
)
_SAME_AS_BEFORE = (("num_key_value_heads", "num_attention_heads"), ("linear_num_value_heads", "linear_num_key_heads"))


def shrink_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config like `config` in every choice, with its sizes made tiny.

    Args:
        config: The content of config.json. Nested configs (text, vision, attention) are shrunk too.
    """
    layers = _kept_layers(config)
    shrunk = {name: _shrink(name, value, layers, _depth(config)) for name, value in config.items()}
    for part, whole in _SAME_AS_BEFORE:
        if part in config and config[part] == config.get(whole):
            shrunk[part] = shrunk[whole]
    if "qk_rope_head_dim" in shrunk:
        # Multi-head latent attention: the rotated part is the head that position embeddings know of, but where they
        # are told what part of it to rotate.
        parts = ("qk_rope_head_dim", "qk_nope_head_dim")
        is_whole = isinstance(config.get("head_dim"), int) and config["head_dim"] == sum(
            config.get(p) or 0 for p in parts
        )
        shrunk["head_dim"] = sum(shrunk[part] for part in parts) if is_whole else shrunk["qk_rope_head_dim"]
    _fit_rotary_sections(shrunk)
    _fit_state_space_heads(shrunk)
    return shrunk


def _fit_state_space_heads(shrunk: dict[str, Any]) -> None:
    # The heads of a Mamba 2 mixer share its inner width evenly; the width is a size of its own or a multiple.
    for width, expand, heads, head in _STATE_SPACE_HEADS:
        if not all(type(shrunk.get(name)) is int for name in (heads, head)):
            continue
        if type(shrunk.get(width)) is int:
            shrunk[width] = shrunk[heads] * shrunk[head]
        elif type(shrunk.get(expand)) is int and type(shrunk.get("hidden_size")) is int:
            shrunk[heads] = max(1, shrunk[expand] * shrunk["hidden_size"] // shrunk[head])


def _fit_rotary_sections(shrunk: dict[str, Any]) -> None:
    # Multimodal position embeddings share the rotated half of a head out among time, height and width.
    rope, width, heads = (shrunk.get(name) for name in ("rope_parameters", "hidden_size", "num_attention_heads"))
    if not isinstance(rope, dict) or "mrope_section" not in rope or not width or not heads:
        return
    half = int((shrunk.get("head_dim") or width // heads) * rope.get("partial_rotary_factor", 1.0)) // 2
    third = half // 3
    shrunk["rope_parameters"] = {**rope, "mrope_section": [half - 2 * third, third, third]}


def _shrink(name: str, value: Any, layers: Sequence[int] | None, depth: int | None) -> Any:
    if isinstance(value, Mapping):
        if layers and value and all(str(key).isdigit() for key in value) and name != "id2label":
            return {str(layers.index(int(k))): shrink_config(v) for k, v in value.items() if int(k) in layers}
        return shrink_config(value) if name.endswith("config") else value
    if isinstance(value, (list, tuple)):
        if layers and name in _LAYER_INDEX_LISTS:
            return [layers.index(item) for item in value if item in layers]
        if layers and name in _LAYER_NUMBER_LISTS:
            return [layers.index(item - 1) + 1 for item in value if item - 1 in layers]
        if layers and name in _SOURCE_LISTS and len(value) == depth:
            return [layers.index(value[layer]) if value[layer] in layers else value[layer] for layer in layers]
        if name in _SIZES:
            value = [min(_SIZES[name], size) if type(size) is int else size for size in value]
        return [value[layer] for layer in layers] if layers and len(value) == depth else value
    if type(value) is not int or value <= 0:
        return value
    if name in _DEPTHS:
        return len(layers) if layers else value if value <= _MAX_LAYERS else _MIN_LAYERS
    if name in _PERIODS:
        return 2
    if name.endswith("token_id"):
        return min(value, 3)
    return min(_SIZES.get(name, value), value)


def _depth(config: Mapping[str, Any]) -> int | None:
    depth = next((config[name] for name in _DEPTHS if name in config), None)
    return depth if type(depth) is int and 0 < depth <= _MAX_LAYERS else None


def _kept_layers(config: Mapping[str, Any]) -> list[int] | None:
    """Return the first layer of each kind, and more of the first ones where there are few kinds."""
    depth = _depth(config)
    if depth is None:
        return None
    # Lists of layers hold numbers; what differs in them tells no kinds apart.
    others = _LAYER_INDEX_LISTS | _LAYER_NUMBER_LISTS | _SOURCE_LISTS
    lists = [v for k, v in config.items() if isinstance(v, (list, tuple)) and len(v) == depth and k not in others]
    indices = [config[name] for name in sorted(_LAYER_INDEX_LISTS) if isinstance(config.get(name), list)]
    numbers = [config[name] for name in sorted(_LAYER_NUMBER_LISTS) if isinstance(config.get(name), list)]
    indices += [[number - 1 for number in each if type(number) is int] for each in numbers]
    sources = [config[k] for k in sorted(_SOURCE_LISTS) if isinstance(config.get(k), list) and len(config[k]) == depth]
    first_of_kind: dict[str, int] = {}
    for layer in range(depth):
        own = [items[layer] == layer for items in sources]
        kind = repr([[items[layer] for items in lists], [layer in items for items in indices], own])
        first_of_kind.setdefault(kind, layer)
    kept = set(first_of_kind.values())
    kept |= {
        items[layer] for items in sources for layer in kept if type(items[layer]) is int and 0 <= items[layer] < depth
    }
    for layer in range(depth):
        if len(kept) >= _MIN_LAYERS:
            break
        kept.add(layer)
    return sorted(kept)
