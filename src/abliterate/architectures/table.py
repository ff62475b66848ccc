"""What is known of each architecture, as data: which tensors write to the residual stream, and what cannot be exact.

Names are those on disk, within a decoder block and without `.weight`; `*` stands for a number. One vocabulary serves
all, because a name that writes in one architecture writes in every other that is listed here; what sets a model type
apart is its row in `ARCHITECTURES`. A type without a row, or a name without an entry, is refused by `residual_writers`.
To add an architecture: a row, the names that are new, and its tiny model in `tests/support/conformance_models.py`,
where the conformance suite proves that all of its writers are found and that each of them is needed.

Model types that are refused by name, and why no edit of their weights is known to be exact.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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
self_attn: o_proj out_proj dense attn_out wo     self_attn.*: o_proj          attn: c_proj out_proj o_proj Wo wo_b
attn.attention: out_proj        attention: dense wo          self_attention: dense
self_attention.experts: output_linear            linear_attn: out_proj        mamba: out_proj
mamba_decoder.mamba: out_proj   mixer: out_proj o_proj       conv: out_proj   mlstm_layer: out_proj
temporal_block: o_proj linear_out                norm_attn_norm.attn: out_proj
cross_attn: o_proj
"""
MLP_OUT = """
: fc2 per_layer_projection      mlp: down_proj c_proj fc2 fc_out dense_4h_to_h Wo ff_out output_linear
mlp.experts: down_proj fc2      mlp.experts.*: down_proj     mlp.shared_expert: down_proj
mlp.shared_experts: down_proj   mlp.shared_mlp: down_proj    mlps.*: down_proj
feed_forward: down_proj w2      feed_forward.experts: down_proj                feed_forward.experts.*: down_proj w2
feed_forward.shared_expert: down_proj            block_sparse_moe: down_proj output_linear
block_sparse_moe.experts: down_proj              block_sparse_moe.experts.*: w2
block_sparse_moe.shared_experts: down_proj       ffn: down_proj proj_down      ffn.experts.*: w2
ffn.experts.mlp: w2             ffn.shared_experts: w2       moe: down_proj    share_expert: down_proj
mixer: down_proj fc2_latent_proj                 mixer.experts: down_proj      mixer.experts.*: down_proj
mixer.shared_experts: down_proj mlp_block: down_proj         shared_mlp: output_linear
experts.*: w2                   experts: down_proj           shared_experts: w2 down_proj
"""
# A fused stack of experts keeps its bias under a name of its own.
BIAS_OF = {
    "attention.dense_bias": "attention.dense",
    "mlp.experts.down_proj_bias": "mlp.experts.down_proj",
    "mlp": "mlp.output_linear",
    "self_attention.experts": "self_attention.experts.output_linear",
}
# Stored with another orientation than everything else of its architecture.
AXES = {"ffn.experts.mlp.w2": 1}
# Beside a stack of experts, the tensor whose shape [experts, in, 2 * out] or [experts, 2 * out, in] tells its layout.
FUSED_READERS = {
    "down_proj": "gate_up_proj",
    "fc2": "fc1",
    "output_linear": "input_linear",
}

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
cross_attn_attn_gate cross_attn_mlp_gate
"""
READERS = _names(_READERS)
# By their whole name: Gemma 4's router; the shared block of Zamba, whose output only `linear` reads.
READER_PATHS = _names(
    """
    router.proj router.scale router.per_expert_scale
    shared_transf.self_attn.o_proj shared_transf.feed_forward.down_proj shared_transformer.self_attn.o_proj
    shared_transformer.feed_forward.down_proj shared_transformer.feed_forward.gate_up_proj_adapter_list.*.*
    shared_transformer.self_attn.linear_q_adapter_list.*.* shared_transformer.self_attn.linear_k_adapter_list.*.*
    shared_transformer.self_attn.linear_v_adapter_list.*.*
    """
)
_NORMS = """
norm norm_1 norm_2 ln_1 ln_2 ln_f input_layernorm input_layer_norm post_attention_layernorm
pre_feedforward_layernorm pre_ff_layernorm pre_mlp_layernorm attention_layernorm feedforward_layernorm attn_norm
mlp_norm ffn_norm operator_norm channel_pre_norm temporal_pre_norm norm_ffn norm_mlstm multihead_norm layer_norm1
layer_norm2 self_attn_layer_norm final_layer_norm q_norm k_norm q_layernorm k_layernorm query_layernorm
key_layernorm q_a_layernorm kv_a_layernorm kv_norm dt_layernorm b_layernorm c_layernorm o_norm attn_sub_norm
ffn_sub_norm input_layernorm.* ln_attn ln_mlp pre_feedforward_layernorm_2 attention_norm ff_norm
post_attention_layernorm.* q_input_norm k_input_norm
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
SIDE_POST_NORMS = {"per_layer_projection": "post_per_layer_input_norm"}
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
HEADS = frozenset({"lm_head", "embed_out", "head", "output"})
# Outside the layers, and not writing: final norms, heads and what mixes the streams of hyper-connections by scalars.
OUTSIDE_READERS = _names(
    """
    norm norm_f ln_f out_norm final_norm final_layernorm final_layer_norm layer_norm embedding_norm lm_head.dense
    lm_head.norm score classifier hc_head.hc_base hc_head.hc_fn hc_head.hc_scale hc_pre.hc_head.hc_head_base
    hc_pre.hc_head.hc_head_fn hc_pre.hc_head.hc_head_scale hc_head_base hc_head_fn hc_head_scale
    embed_tokens_per_layer per_layer_model_projection per_layer_projection_norm decoder lerope.alpha
    """
)

# In a checkpoint with images or sound: parts that work on those, and put their result in the place of token embeddings.
TOWER = re.compile(
    r"(vision|visual|vit|image|video|audio|sam)(_.*|$)|.*_(tower|projector|adapter)|aligner|connector|projector|merger|patch_merger|"
    r"mm_.*|.*_mm_.*|embed_(vision|audio)|multi_modal_projector.*|patch_merge_mlp|mlp1|mlp_AR|speech_.*|.*_embed_tokens|deepstack.*|embed_tokens_extend"
)
# Layers that predict tokens further ahead; they read the stream and do not write to it.
PREDICTION = re.compile(r"mtp.*|.*mtp_.*|eagle.*|nextn.*")

SIZE_KEYS = ("hidden_size", "n_embd", "d_model")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """What a config value must be for the edit to be exact.

    Attributes:
        key: Name in the text model's config.
        exact: The values that are fine; `SIZE` among them stands for d_model, None for a missing value.
        reason: Why another value is not.
    """

    key: str
    exact: tuple[Any, ...]
    reason: str


SIZE = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What sets one text model type apart from the common rules.

    Attributes:
        model_type: As in config.json, or in its text section.
        tied_by_default: `tie_word_embeddings` where the config does not say; the config class's own default.
        post_norm: Norms may stand between a sub-layer and the stream.
        plus_one: Those norms multiply by 1 + weight.
        positions: It has position embeddings of its own, added to those of the tokens.
        conv1d: Matrices are stored [in, out], so the stream is on axis 1.
        single: A layer may be one sub-layer (a mixer alone), so that one writer is enough.
        fused_axis: The stream's axis in a stack of experts whose shape does not tell it.
        latent_experts: Experts may end in a latent space, and another matrix leads from there to the stream.
        depth_key: The config's name of the number of layers, where it is none of `DEPTH_KEYS`.
        stacks: How many lists of layers there are.
        towers: It has vision or audio towers though its config has no text section.
        conditions: What the config must say.
    """

    model_type: str
    tied_by_default: bool = False
    post_norm: bool = False
    plus_one: bool = False
    positions: bool = False
    conv1d: bool = False
    single: bool = False
    fused_axis: int = 1
    latent_experts: bool = False
    depth_key: str | None = None
    stacks: int = 1
    towers: bool = False
    conditions: tuple[Condition, ...] = ()


_COMMON = """
apertus arcee axk2 bailing_hybrid bamba bitnet codegen cwm dbrx deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4
diffllama dots1 exaone_moe falcon_h1 flint glm glm4_moe glm4_moe_lite glm_moe_dsa gpt_neox gptj granite granitemoe
granitemoe_swa granitemoehybrid granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 internlm3
iquestcoder jais2 jamba kimi_linear laguna llama mellum mimo_v2_flash minimax_m2 minimax_m3_vl_text ministral
ministral3 mistral mixtral nanochat nemotron olmo olmoe persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe
qwen3_5_moe_text qwen3_5_text qwen3_next seed_oss solar_open stablelm xlstm
"""
_COMMON_TIED = """
cohere cohere2 cohere2_moe cohere_compass_text ernie4_5 ernie4_5_moe falcon gemma gpt_neox_japanese granite_swa
jetmoe lfm2 lfm2_moe minicpm3 mpt recurrent_gemma smollm3 starcoder2 vaultgemma youtu modernbert-decoder
"""
# Text models that occur inside a wrapper only.
_WRAPPED = """
qwen2_vl_text qwen2_5_vl_text qwen3_vl_text qwen2_5_omni_text qwen3_omni_moe_text glm4v_moe_text mllama_text_model
mistral_large4_text step3p5 hunyuan_vl_text paddleocr_vl_text granite_docling_text
"""
_POST_NORM = "glm4v_text glm_ocr_text afmoe axk1 beam exaone4 flex_olmo glm4 hyperclovax kolibri1 olmo2 olmo3"
_POSITIONS_TIED = "biogpt gpt_bigcode gpt_neo"
_POST_NORM_TIED = "gemma4_text gemma4_unified_text lfm3"

_ROWS = (
    *(Architecture(model_type=name) for name in _COMMON.split()),
    *(Architecture(model_type=name, tied_by_default=True) for name in _COMMON_TIED.split()),
    *(Architecture(model_type=name, post_norm=True) for name in _POST_NORM.split()),
    *(Architecture(model_type=name, post_norm=True, tied_by_default=True) for name in _POST_NORM_TIED.split()),
    *(Architecture(model_type=name) for name in _WRAPPED.split()),
    Architecture(model_type="qwen3_vl_moe_text", fused_axis=2),
    Architecture(model_type="gemma2", post_norm=True, plus_one=True, tied_by_default=True),
    Architecture(model_type="gemma3_text", post_norm=True, plus_one=True, tied_by_default=True),
    *(Architecture(model_type=name, positions=True, tied_by_default=True) for name in _POSITIONS_TIED.split()),
    Architecture(model_type="gpt2", positions=True, conv1d=True, tied_by_default=True),
    Architecture(model_type="gpt-sw3", positions=True, conv1d=True, tied_by_default=True),
    Architecture(model_type="gpt_oss", fused_axis=2),
    Architecture(model_type="llama4_text", fused_axis=2),
    Architecture(model_type="aria_text", fused_axis=2),
    Architecture(model_type="mamba", single=True, tied_by_default=True),
    Architecture(model_type="falcon_mamba", single=True, tied_by_default=True),
    Architecture(model_type="mamba2", single=True),
    Architecture(model_type="nemotron_h", single=True, latent_experts=True),
    Architecture(model_type="zamba", single=True, tied_by_default=True),
    Architecture(model_type="zamba2", single=True, tied_by_default=True),
    Architecture(model_type="hrm_text", depth_key="num_layers_per_stack", stacks=2),
    Architecture(model_type="phi4_multimodal", towers=True),
    Architecture(
        model_type="bloom",
        tied_by_default=True,
        conditions=(
            Condition(
                key="apply_residual_connection_post_layernorm",
                exact=(False, None),
                reason="it adds each sub-layer's output to its normalised input",
            ),
        ),
    ),
    Architecture(
        model_type="opt",
        tied_by_default=True,
        positions=True,
        conditions=(
            Condition(
                key="do_layer_norm_before", exact=(True, None), reason="its norms act on the residual stream itself"
            ),
            Condition(
                key="word_embed_proj_dim",
                exact=(SIZE, None),
                reason="a projection stands between its embeddings and the residual stream",
            ),
        ),
    ),
    Architecture(
        model_type="longcat_flash",
        conditions=(
            Condition(
                key="zero_expert_num",
                exact=(0,),
                reason="its identity experts copy the normalised residual stream back into it",
            ),
        ),
    ),
)
ARCHITECTURES: Mapping[str, Architecture] = {row.model_type: row for row in _ROWS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrapper:
    """A model type whose config keeps the text model in a section of its own, beside towers for images or sound.

    Attributes:
        model_type: As in config.json.
        text_type: The text model's type where its section does not say.
        tied_by_default: `tie_word_embeddings` where the config does not say; it is read at the top.
    """

    model_type: str
    text_type: str
    tied_by_default: bool = False


TEXT_SECTIONS = ("text_config", "llm_config", "language_config")

_WRAPPERS = """
aria:aria_text exaone4_5:exaone4 fuyu:persimmon glm46v:glm4v_text glm4v:glm4v_text glm4v_moe:glm4v_moe_text
glm_ocr:glm_ocr_text glmga:glm4v_text idefics2:mistral idefics3:llama llama4:llama4_text llava:llama
llava_next:llama llava_next_video:llama llava_onevision:qwen2 minicpmv4_6:qwen3_5_text minicpmv4_7:qwen3_5_text
minimax_m3_vl:minimax_m3_vl_text mistral_large4:mistral_large4_text mllama:mllama_text_model qianfan_ocr:qwen3
qwen2_5_omni_thinker:qwen2_5_omni_text qwen2_5_vl:qwen2_5_vl_text qwen2_vl:qwen2_vl_text qwen3_5:qwen3_5_text
qwen3_5_moe:qwen3_5_moe_text qwen3_omni_moe_thinker:qwen3_omni_moe_text qwen3_vl:qwen3_vl_text
qwen3_vl_moe:qwen3_vl_moe_text smolvlm:llama step3p7:step3p5 video_llama_3:qwen2 video_llava:llama vipllava:llama
"""
_WRAPPERS_TIED = """
aya_vision:cohere2 cohere2_vision:cohere2 deepseek_vl:llama gemma3:gemma3_text gemma4:gemma4_text
gemma4_unified:gemma4_unified_text got_ocr2:qwen2 granite_docling:granite_docling_text hunyuan_vl:hunyuan_vl_text
hyperclovax_vision_v2:hyperclovax internvl:qwen2 kimi_k25:deepseek_v3 lfm2_vl:lfm2 lfm3_vl:lfm3 lighton_ocr:qwen3
minicpm_ocr:qwen3_5_text mistral3:mistral ovis2:qwen2 paddleocr_vl:paddleocr_vl_text paligemma:gemma
pp_chart2table:qwen2
"""
WRAPPERS: Mapping[str, Wrapper] = {
    wrapper: Wrapper(model_type=wrapper, text_type=text, tied_by_default=tied)
    for tied, rows in ((False, _WRAPPERS), (True, _WRAPPERS_TIED))
    for wrapper, text in (row.split(":") for row in rows.split())
}

# What the token embedding is called where only the tied head is stored, so that its name cannot be read off the files.
UNSTORED_EMBEDDINGS = {
    **dict.fromkeys(("gpt2", "gpt-sw3", "gpt_bigcode", "gpt_neo", "codegen", "gptj", "mpt"), "wte"),
    **dict.fromkeys(("bloom", "falcon"), "word_embeddings"),
    **dict.fromkeys(("gpt_neox", "gpt_neox_japanese"), "embed_in"),
}


UNKNOWN = "its residual writers are not known to be complete"

_READ_TWICE = "it is an encoder-decoder, whose decoder reads a second residual stream"
_TYPES_BY_REASON = {
    "its norms act on the residual stream itself, after each addition, and turn the direction back into it": """
        openai-gpt bert bert-generation big_bird camembert data2vec-text electra ernie roberta roformer rembert
        roc_bert xlm xlnet xlm-roberta xmod git
    """,
    "it adds each sub-layer's output to its normalised input, and the norm mixes the direction back in": "minimax",
    "it multiplies each channel of the residual stream by a learned number, which turns it": "doge zaya",
    "a gate multiplies each channel after the projection, so no edit of the projection is enough": "rwkv",
    "a convolution of each channel follows the projection, so no edit of the projection is enough": """
        inkling inkling2 inkling_text inkling2_text inkling_mm_model
    """,
    "its LAuReL branch adds the normalised stream to itself, which no edit of a weight can undo": """
        gemma3n gemma3n_text
    """,
    "its n-gram embedding writes through a convolution and a gate, which no edit of a weight can undo": """
        qwen4_exp qwen4_exp_text
    """,
    "its position embeddings are computed, not stored, so they keep writing along the direction": "ctrl xglm",
    "its layers differ in where their norms stand, and the names do not tell": "olmo_hybrid",
    _READ_TWICE: """
        bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart prophetnet trocr whisper
        t5gemma2 udop pix2struct florence2 vision-encoder-decoder pp_formulanet
    """,
    "it predicts drafts from another model's residual stream": "gemma4_assistant gemma4_unified_assistant",
}
REFUSED: Mapping[str, str] = {
    model_type: reason for reason, model_types in _TYPES_BY_REASON.items() for model_type in model_types.split()
}


def refusal(model_type: object) -> str:
    """Return why a model type without a row is refused."""
    return REFUSED.get(str(model_type), UNKNOWN)
