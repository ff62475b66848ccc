"""The vocabulary: what tensors are called on disk and in loaded models, and which of them write to the residual stream.

Names are those within a decoder block and without `.weight`; `*` stands for a number. One vocabulary serves all model
types, because a name that writes in one writes in every other of the `table`. A name without an entry is refused.
"""

import re


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


LAYER_LISTS = ("layers", "h", "blocks", "block")
# What may stand before the list of layers or an embedding. Anything else is not the text model's stack.
PREFIX_PARTS = _names(
    """
    model transformer backbone decoder encoder language_model text_model llm thinker gpt_neox gpt_neox_japanese
    biogpt H_module L_module
    """
)

ATTENTION_OUT = """
self_attn: o_proj out_proj dense attn_out wo o_b_proj                        self_attn.*: o_proj
attn: c_proj out_proj o_proj Wo wo_b wo_ud
attn.attention: out_proj        attention: dense wo          self_attention: dense
self_attention.experts: output_linear            linear_attn: out_proj        mamba: out_proj
mamba_decoder.mamba: out_proj   mixer: out_proj o_proj       conv: out_proj   mlstm_layer: out_proj
temporal_block: o_proj linear_out                norm_attn_norm.attn: out_proj
cross_attn: o_proj
"""
MLP_OUT = """
: fc2 per_layer_projection      mlp: down_proj c_proj fc2 fc_out dense_4h_to_h Wo ff_out output_linear w2_md
mlp.experts: down_proj fc2 w2_weight              mlp.experts.*: down_proj     mlp.shared_expert: down_proj
mlp.shared_experts: down_proj shared_w2_weight    mlp.shared_mlp: down_proj    mlps.*: down_proj
feed_forward: down_proj w2      feed_forward.experts: down_proj                feed_forward.experts.*: down_proj w2
feed_forward.shared_expert: down_proj            block_sparse_moe: down_proj output_linear
block_sparse_moe.experts: down_proj              block_sparse_moe.experts.*: w2
block_sparse_moe.shared_experts: down_proj       ffn: down_proj proj_down      ffn.experts.*: w2
ffn.experts.mlp: w2             ffn.shared_experts: w2       moe: down_proj    share_expert: down_proj
mixer: down_proj fc2_latent_proj                 mixer.experts: down_proj      mixer.experts.*: down_proj
mixer.shared_experts: down_proj mlp_block: down_proj         shared_mlp: output_linear
experts.*: w2 down_proj         experts: down_proj           shared_experts: w2 down_proj
laurel: linear_right            ple: value_proj
"""
# A fused stack of experts keeps its bias under a name of its own.
BIAS_OF = {
    "attention.dense_bias": "attention.dense",
    "mlp.experts.down_proj_bias": "mlp.experts.down_proj",
    "mlp": "mlp.output_linear",
    "self_attention.experts": "self_attention.experts.output_linear",
}
# A bias that its module hands on beside what it returns: the module within the block, and which output it is.
HANDED_ON = {"attention.dense_bias": ("attention", 2)}
# Stored with another orientation than everything else of its architecture.
AXES = {"ffn.experts.mlp.w2": 1}
# Behind a sub-layer, a convolution of each channel, from which what it wrote reaches the stream.
CONVOLUTIONS = {"attn": ("attn_sconv", "post_attention_convolution"), "mlp": ("mlp_sconv", "post_mlp_convolution")}
# Writers within a module that adds more to what they wrote: its output is what reaches the stream.
BRANCHES = {"laurel.linear_right": "laurel", "ple.value_proj": "ple"}
# Beside a stack of experts, the tensor whose shape [experts, in, 2 * out] or [experts, 2 * out, in] tells its layout.
FUSED_READERS = {
    "down_proj": "gate_up_proj",
    "fc2": "fc1",
    "output_linear": "input_linear",
    "w2_weight": "w13_weight",
    "shared_w2_weight": "shared_w13_weight",
}
# Parameters of experts that transformers merges as it loads them, and the parts of each expert on disk.
MERGED_EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}

# Names inside a block that do not write to the stream: its readers, its gates, its norms, its buffers.
_READERS = """
q_proj k_proj v_proj qkv_proj gqkv_proj kv_proj c_attn query_key_value Wqkv g_proj f_proj b_proj f_a_proj f_b_proj
g_a_proj g_b_proj q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj wq wk wv wq_a wq_b wkv wkv_a_with_mqa wkv_b wo_a
q_conv1d k_conv1d v_conv1d weights_proj wgate gate_proj up_proj gate_up_proj gate_up_proj_bias c_fc fc1 fc_in
dense_h_to_4h Wi w1 w3 v1 ff_proj input_linear up_gate_proj gate wg router layer classifier shared_expert_gate
linear_gate fc1_latent_proj proj_up proj_up_gate in_proj in_proj_a in_proj_b in_proj_ba in_proj_qkv in_proj_qkvz
in_proj_z x_proj x_proj_weight dt_proj dt_proj_weight dt_proj_bias conv conv1d conv_1d A_log D dt_bias linear
linear_x linear_y input_gate_weight input_gate_bias recurrent_gate_weight recurrent_gate_bias recurrent_param q k v
igate_preact fgate_preact ogate_preact ape W_up W_down per_layer_input_gate tid2eid sinks attn_sink
attention_sink_bias softmax_offset learnable_sink_param e_score_correction_bias expert_bias gate_bias lambda_k1
lambda_k2 lambda_q1 lambda_q2 alpha_n alpha_p beta eps layer_scalar rotary_emb.inv_freq inv_freq masked_bias attn
attention hc_attn_base hc_attn_fn hc_attn_scale hc_ffn_base hc_ffn_fn hc_ffn_scale hc_base hc_fn hc_scale
cross_attn_attn_gate cross_attn_mlp_gate index_kpool_compress_ape index_kpool_compress_gate r_proj wq_du wk_dv wv_dv
wr_du w13_dn w13_weight w13_weight_scale shared_w13_weight global_scale k_sconv v_sconv attn_sconv mlp_sconv gate_attn
attn_sink_proj sink_proj static_weight static_w weight_proj linear_left correct_output_scale correction_coefs
prediction_coefs modality_router key_proj input_mix_weight_down input_mix_weight_up block_inject_weight index_qk_proj
"""
READERS = _names(_READERS)
# By their whole name: Gemma 4's router; the shared block of Zamba, whose output only `linear` reads; what Inkling's
# attention and its mixture of earlier blocks read by; what looks Qwen 4's n-grams up.
READER_PATHS = _names(
    """
    router.proj router.scale router.per_expert_scale
    shared_transf.self_attn.o_proj shared_transf.feed_forward.down_proj shared_transformer.self_attn.o_proj
    shared_transformer.feed_forward.down_proj shared_transformer.feed_forward.gate_up_proj_adapter_list.*.*
    shared_transformer.self_attn.linear_q_adapter_list.*.* shared_transformer.self_attn.linear_k_adapter_list.*.*
    shared_transformer.self_attn.linear_v_adapter_list.*.*
    self_attn.rel_logits_proj.proj attn.rel_logits_proj.proj self_attn.q_l2_clip.scale attn.q_l2_clip.scale
    self_attn.rel_l2_clip.scale attn.rel_l2_clip.scale attention_input.query mlp_input.query
    ple.ple_embedding.ngram_embedding ple.ple_embedding.ngram_embedding.shard_* ple.ple_embedding.layer_multipliers
    ple.ple_embedding.ngram_heads_offsets ple.ple_embedding.ngram_heads_vocab_sizes
    """
)
_NORMS = """
norm norm_1 norm_2 ln_1 ln_2 ln_f input_layernorm input_layer_norm post_attention_layernorm
pre_feedforward_layernorm pre_ff_layernorm pre_mlp_layernorm attention_layernorm feedforward_layernorm attn_norm
mlp_norm ffn_norm operator_norm channel_pre_norm temporal_pre_norm norm_ffn norm_mlstm multihead_norm layer_norm1
layer_norm2 self_attn_layer_norm final_layer_norm q_norm k_norm q_layernorm k_layernorm query_layernorm
key_layernorm q_a_layernorm kv_a_layernorm kv_norm dt_layernorm b_layernorm c_layernorm o_norm attn_sub_norm
ffn_sub_norm input_layernorm.* ln_attn ln_mlp pre_feedforward_layernorm_2 attention_norm ff_norm
post_attention_layernorm.* q_input_norm k_input_norm v_input_norm q_input_layernorm k_input_layernorm
v_input_layernorm router_norm hc_norm norm_key norm_query norm_conv
"""
NORMS = _names(_NORMS)

# Norms after a sub-layer, between its output and the stream; the first name that a layer has counts.
ATTENTION_POST_NORMS = ("post_self_attn_layernorm", "post_attn_norm", "post_norm1", "post_operator_norm")
# In most architectures this name is the MLP's pre-norm; it follows attention where the MLP has norms of its own.
SHARED_NORM = "post_attention_layernorm"
MLP_OWN_NORMS = ("post_feedforward_layernorm", "pre_mlp_layernorm")
MLP_POST_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm", "post_ffn_norm", "post_norm2")
# Gemma 4 normalises its dense MLP and its experts apart, adds them, and normalises the sum.
DENSE_POST_NORM, EXPERT_POST_NORM = "post_feedforward_layernorm_1", "post_feedforward_layernorm_2"
SIDE_POST_NORMS = {"per_layer_projection": "post_per_layer_input_norm", "laurel.linear_right": "post_laurel_norm"}
POST_NORMS = frozenset(
    (*ATTENTION_POST_NORMS, *MLP_POST_NORMS, DENSE_POST_NORM, EXPERT_POST_NORM, *SIDE_POST_NORMS.values())
)

TOKEN_EMBEDDINGS = _names(
    """
    embed_tokens wte word_embeddings tok_embeddings embed_in embeddings embed token_embeddings
    embeddings.tok_embeddings
    """
)
POSITION_EMBEDDINGS = frozenset({"wpe", "embed_positions", "position_embeddings"})
# A vector that starts the stream, or is added to it, once.
STREAM_STARTS = frozenset({"z_L_init"})
EMBEDDING_NORMS = frozenset({"word_embeddings_layernorm", "embeddings.norm"})
# Those that take no mean away first.
EMBEDDING_RMS_NORMS = frozenset({"embed_norm", "embed_tokens.embed_norm"})
# Outside the layers: what makes the other streams of the first, and brings them together before the final norm.
OUTSIDE_WRITERS = frozenset({"altup_projections.*", "altup_unembed_projections.*"})
HEADS = frozenset({"lm_head", "embed_out", "head", "output", "unembed"})
# Outside the layers, and not writing: final norms, heads and what mixes the streams of hyper-connections by scalars.
OUTSIDE_READERS = _names(
    """
    norm norm_f ln_f out_norm final_norm final_layernorm final_layer_norm layer_norm embedding_norm lm_head.dense
    lm_head.norm score classifier hc_head.hc_base hc_head.hc_fn hc_head.hc_scale hc_pre.hc_head.hc_head_base
    hc_pre.hc_head.hc_head_fn hc_pre.hc_head.hc_head_scale hc_head_base hc_head_fn hc_head_scale
    embed_tokens_per_layer per_layer_model_projection per_layer_projection_norm decoder lerope.alpha
    attn_res.attn_queries.* attn_res.mlp_queries.* attn_res.output_query final_input.query
    hyper_connection_mixer.hc_norm hyper_connection_mixer.input_mix_weight_down
    hyper_connection_mixer.input_mix_weight_up
    """
)

# In a checkpoint with images or sound: parts that work on those, and put their result in the place of token embeddings,
# and parts that speak, which read what the text model puts out.
TOWER = re.compile(
    r"(vision|visual|vit|image|video|audio|sam)(_.*|$)|.*_(tower|projector|adapter)|aligner|connector|projector|merger|patch_merger|"
    r"mm_.*|.*_mm_.*|embed_(vision|audio)|multi_modal_projector.*|patch_merge_mlp|mlp1|mlp_AR|speech_.*|.*_embed_tokens|deepstack.*|embed_tokens_extend|talker|token2wav|code2wav"
)
# Layers that predict tokens further ahead; they read the stream and do not write to it.
PREDICTION = re.compile(r"mtp.*|.*mtp_.*|eagle.*|nextn.*")

# BLOOM's first releases have the first, which counts even beside another; xLSTM's the last.
SIZE_KEYS = ("n_embed", "hidden_size", "n_embd", "d_model", "embedding_dim")
DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
# A list with an entry for each layer, where the number itself is not written down.
DEPTH_LISTS = ("layers_block_type", "layer_types")
EXPERT_KEYS = (
    "num_experts",
    "n_routed_experts",
    "num_local_experts",
    "moe_num_experts",
    "n_experts",
    "ffn_config.moe_num_experts",
)
