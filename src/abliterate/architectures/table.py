"""What is known of each model type: one row, and everything that sets the type apart is in it.

A type without a row is refused by `config`. To add an architecture: a row here, the names that are new in `vocabulary`,
and what its tiny model needs in `tests/support/conformance_models.py`, where the conformance suite proves that all of
its writers are found, that each of them is needed, and that hooks ablate what the files' edit removes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, cast

SIZE = object()
"""Stands for d_model among the values of a condition."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What sets one text model type apart from the common rules.

    Attributes:
        model_type: As in config.json, or in its text section.
        tied: `tie_word_embeddings` where the config does not say; the config class's own default.
        never_tied: Its model ties nothing, whatever the config says.
        post_norm: Norms may stand between a sub-layer and the stream.
        plus_one: Those norms multiply by 1 + weight.
        positions: It has position embeddings of its own, added to those of the tokens.
        conv1d: Matrices are stored [in, out], so the stream is on axis 1.
        single: A layer may be one sub-layer (a mixer alone), so that one writer is enough.
        fused_axis: The stream's axis in a stack of experts whose shape does not tell it.
        latent_experts: Experts may end in a latent space, and another matrix leads from there to the stream.
        depth_key: The config's name of the number of layers, where it is not a common one.
        stacks: How many lists of layers there are.
        towers: It has vision or audio towers though its config has no text section.
        embedding: What the token embedding is called where only the tied head is stored, so that the files do not tell.
        out_proj_bypassed: A fast path reads `out_proj`'s weight past its module, so that PEFT does not adapt it.
        feels_padding: Padding before a row changes what the row gives (a recurrent layer takes it in, or tokens are
            compressed by their places), so rows are run beside others of their length only.
        feels_gaps: Padding between tokens that are cached and a row does (positions are counted through it), so rows
            share no cache of what they begin with.
        not_extracted: Why its blocks have no one input each, so that no direction can be extracted; None where one can.
        conditions: What the config must say.
        remains: Why no edit of weights can clean all of the stream, so that the type is accepted with --partial only;
            None where an edit of all writers is exact.
        remains_in: The modules within a block that keep writing then.
    """

    model_type: str
    tied: bool = False
    never_tied: bool = False
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
    embedding: str = "embed_tokens"
    out_proj_bypassed: bool = False
    feels_padding: bool = False
    feels_gaps: bool = False
    not_extracted: str | None = None
    conditions: tuple[Condition, ...] = ()
    remains: str | None = None
    remains_in: tuple[str, ...] = ()


_ROWS = """
afmoe                 post_norm
apertus
arcee
aria_text             fused_axis=2
axk1                  post_norm
axk2
bailing_hybrid        never_tied
bamba                 feels_padding
beam                  post_norm
biogpt                tied positions
bitnet
bloom                 tied embedding=word_embeddings
codegen               embedding=wte
cohere                tied
cohere2               tied
cohere2_moe           tied
cohere_compass_text   tied
cwm
dbrx
deepseek_v2
deepseek_v3
deepseek_v32
deepseek_v4           feels_padding
diffllama
dots1
ernie4_5              tied
ernie4_5_moe          tied
exaone4               post_norm
exaone_moe
falcon                tied embedding=word_embeddings
falcon_h1             out_proj_bypassed feels_padding
falcon_mamba          tied single out_proj_bypassed feels_padding
flex_olmo             post_norm
flint
gemma                 tied
gemma2                tied post_norm plus_one
gemma3_text           tied post_norm plus_one
gemma3n_text          tied post_norm
gemma4_text           tied post_norm
gemma4_unified_text   tied post_norm
glm
glm4                  post_norm
glm4_moe
glm4_moe_lite
glm4v_moe_text
glm4v_text            post_norm
glm5_next_text
glm_moe_dsa
glm_ocr_text          post_norm
gpt-sw3               tied positions conv1d embedding=wte
gpt2                  tied positions conv1d embedding=wte
gpt_bigcode           tied positions embedding=wte
gpt_neo               tied positions embedding=wte feels_gaps
gpt_neox              embedding=embed_in
gpt_neox_japanese     tied embedding=embed_in
gpt_oss               fused_axis=2
gptj                  embedding=wte
granite
granite_docling_text
granite_swa           tied
granitemoe
granitemoe_swa
granitemoehybrid      feels_padding
granitemoeshared
helium
hrm_text              depth_key=num_layers_per_stack stacks=2
hunyuan_v1_dense
hunyuan_v1_moe
hunyuan_vl_text       tied
hy_v3
hy_v4
hyperclovax           post_norm
inkling2_text         never_tied
inkling_text          never_tied
internlm3
iquestcoder
jais2
jamba                 feels_padding
jetmoe                tied
kimi_k2
kimi_linear           never_tied
kolibri1              post_norm
laguna
lfm2                  tied feels_padding
lfm2_moe              tied feels_padding
lfm3                  tied post_norm feels_padding
llama
llama4_text           fused_axis=2
longcat_flash
mamba                 tied single out_proj_bypassed feels_padding
mamba2                single out_proj_bypassed feels_padding
mellum
mimo_v2_flash
minicpm3              tied
minimax_m2
minimax_m3_vl_text
ministral
ministral3
mistral
mistral4
mistral_large4_text   feels_padding
mixtral
mllama_text_model
modernbert-decoder    tied
mpt                   tied embedding=wte feels_gaps
muse_glimmer_text     post_norm plus_one
nanochat
nemotron
nemotron_h            never_tied single latent_experts out_proj_bypassed feels_padding
olmo
olmo2                 post_norm
olmo3                 post_norm
olmoe
opt                   tied positions
paddleocr_vl_text     tied
persimmon
phi
phi3
phi4_multimodal       towers
phimoe
qwen2
qwen2_5_omni_text
qwen2_5_vl_text
qwen2_moe
qwen2_vl_text
qwen3
qwen3_5_moe_text
qwen3_5_text
qwen3_moe
qwen3_next
qwen3_omni_moe_text
qwen3_vl_moe_text     fused_axis=2
qwen3_vl_text
qwen4_exp_text
recurrent_gemma       tied feels_padding
seed_oss
smollm3               tied
solar_open
stablelm
starcoder2            tied
step3p5
vaultgemma            tied
xlstm                 never_tied feels_padding
youtu                 tied
zamba                 tied single feels_padding
zamba2                tied single feels_padding
"""

# What does not fit into a word of a row.
_FOUR_STREAMS = "it has four residual streams, which each block mixes anew, so no block has one input"
_CONVOLUTION: Mapping[str, Any] = {
    "remains": "a convolution of each channel follows the projection, so no edit of the projection is enough",
    "remains_in": ("attn_sconv", "mlp_sconv", "post_attention_convolution", "post_mlp_convolution"),
}
_IN_SENTENCES: Mapping[str, Mapping[str, Any]] = {
    "bloom": {
        "conditions": (
            Condition(
                key="apply_residual_connection_post_layernorm",
                exact=(False, None),
                reason="it adds each sub-layer's output to its normalised input",
            ),
        ),
    },
    "deepseek_v4": {"not_extracted": _FOUR_STREAMS},
    "gemma3n_text": {
        "not_extracted": _FOUR_STREAMS,
        "remains": "its LAuReL branch adds the normalised stream to itself, which no edit of a weight can undo",
        "remains_in": ("laurel",),
    },
    "glm5_next_text": {"not_extracted": _FOUR_STREAMS},
    "hrm_text": {
        "not_extracted": "its blocks run several times for each token, so none of them has one input",
    },
    "hy_v4": {"not_extracted": _FOUR_STREAMS},
    "inkling2_text": {
        "not_extracted": "each of its blocks reads a mixture of all sums of blocks before it, so none has one input",
        **_CONVOLUTION,
    },
    "inkling_text": _CONVOLUTION,
    "longcat_flash": {
        "conditions": (
            Condition(
                key="zero_expert_num",
                exact=(0,),
                reason="its identity experts copy the normalised residual stream back into it",
            ),
        ),
    },
    "opt": {
        "conditions": (
            Condition(
                key="do_layer_norm_before", exact=(True, None), reason="its norms act on the residual stream itself"
            ),
            Condition(
                key="word_embed_proj_dim",
                exact=(SIZE, None),
                reason="a projection stands between its embeddings and the residual stream",
            ),
        ),
    },
    "qwen4_exp_text": {
        "not_extracted": _FOUR_STREAMS,
        "remains": "its n-gram embedding writes through a convolution and a gate, which no edit of a weight can undo",
        "remains_in": ("ple.conv1d",),
    },
}
_FIELDS = {field.name: field.default for field in fields(Architecture)}


def _row(line: str) -> Architecture:
    model_type, *words = line.split()
    values: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        values[name] = (int(value) if isinstance(_FIELDS[name], int) else value) if value else True
    return Architecture(model_type=model_type, **values, **_IN_SENTENCES.get(model_type, {}))


ARCHITECTURES: Mapping[str, Architecture] = {row.model_type: row for row in map(_row, _ROWS.strip().splitlines())}


Tie = Literal["top", "text", "either", "never"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrapper:
    """A model type whose config keeps the text model in a section of its own, beside towers for images or sound.

    Attributes:
        model_type: As in config.json.
        text_type: The text model's type where its section does not say.
        tied: `tie_word_embeddings` where the top of the config does not say.
        tie: Where a tie is declared: at the top alone, in the text section alone, in either of them (the top's
            false then does not undo the section's true), or nowhere, because the model never ties.
        within: The section that holds all of it, where it is a part of a larger model.
        feels_gaps: As of an `Architecture`: a prompt's tokens see one another, and those behind a cache do not.
    """

    model_type: str
    text_type: str
    tied: bool = False
    tie: Tie = "top"
    within: str | None = None
    feels_gaps: bool = False


TEXT_SECTIONS = ("text_config", "llm_config", "language_config")

_WRAPPER_ROWS = """
aria                    aria_text
aya_vision              cohere2               tied
cohere2_vision          cohere2               tied
deepseek_vl             llama                 tied
exaone4_5               exaone4
fuyu                    persimmon
gemma3                  gemma3_text           tied
gemma3n                 gemma3n_text          tied
gemma4                  gemma4_text           tied
gemma4_unified          gemma4_unified_text   tied
glm46v                  glm4v_text
glm4v                   glm4v_text            tie=either
glm4v_moe               glm4v_moe_text        tie=either
glm5_next               glm5_next_text
glm_ocr                 glm_ocr_text          tie=either
glmga                   glm4v_text
got_ocr2                qwen2                 tied
granite_docling         granite_docling_text  tied
hunyuan_vl              hunyuan_vl_text       tied tie=either
hyperclovax_vision_v2   hyperclovax           tied
idefics2                mistral
idefics3                llama
inkling2                inkling2_text         tie=never
inkling_mm_model        inkling_text          tie=never
internvl                qwen2                 tied
kimi_k25                deepseek_v3           tied
lfm2_vl                 lfm2                  tied
lfm3_vl                 lfm3                  tied
lighton_ocr             qwen3                 tied
llama4                  llama4_text           tie=text
llava                   llama                 tie=either
llava_next              llama
llava_next_video        llama                 tie=either
llava_onevision         qwen2                 tie=either
minicpm_ocr             qwen3_5_text          tied
minicpmv4_6             qwen3_5_text
minicpmv4_7             qwen3_5_text
minimax_m3_vl           minimax_m3_vl_text    tie=either
mistral3                mistral               tied
mistral_large4          mistral_large4_text
mllama                  mllama_text_model     tie=never
muse_glimmer            muse_glimmer_text
ovis2                   qwen2                 tied
paddleocr_vl            paddleocr_vl_text     tied tie=either
paligemma               gemma                 tied feels_gaps
pp_chart2table          qwen2                 tied
qianfan_ocr             qwen3
qwen2_5_omni            qwen2_5_omni_text     within=thinker_config
qwen2_5_omni_thinker    qwen2_5_omni_text
qwen2_5_vl              qwen2_5_vl_text       tie=either
qwen2_vl                qwen2_vl_text         tie=either
qwen3_5                 qwen3_5_text
qwen3_5_moe             qwen3_5_moe_text
qwen3_omni_moe          qwen3_omni_moe_text   within=thinker_config
qwen3_omni_moe_thinker  qwen3_omni_moe_text
qwen3_vl                qwen3_vl_text
qwen4_exp               qwen4_exp_text
qwen3_vl_moe            qwen3_vl_moe_text
smolvlm                 llama
step3p7                 step3p5
video_llama_3           qwen2                 tie=either
video_llava             llama
vipllava                llama
"""


def _wrapper(line: str) -> Wrapper:
    model_type, text_type, *words = line.split()
    values = {name: value or True for name, _, value in (word.partition("=") for word in words)}
    return Wrapper(model_type=model_type, text_type=text_type, **cast(Any, values))


WRAPPERS: Mapping[str, Wrapper] = {row.model_type: row for row in map(_wrapper, _WRAPPER_ROWS.strip().splitlines())}


def feels_padding(config: Any) -> bool:
    """Return whether rows of a model give other results beside longer ones.

    Args:
        config: The model's, as transformers holds it.
    """
    return any(row.feels_padding for name in _types(config) if (row := ARCHITECTURES.get(name)))


def feels_gaps(config: Any) -> bool:
    """Return whether rows of a model that go on from a cache that they share give other results.

    Args:
        config: The model's, as transformers holds it.
    """
    known: list[Mapping[str, Architecture | Wrapper]] = [cast(Any, ARCHITECTURES), cast(Any, WRAPPERS)]
    return any(row.feels_gaps for rows in known for name in _types(config) if (row := rows.get(name)))


def _types(config: Any) -> set[str]:
    return {str(config.model_type), str(config.get_text_config(decoder=True).model_type)}


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
    """Return why a model type without a row is refused, or one with a row is not edited exactly."""
    name = str(model_type)
    row = ARCHITECTURES.get(WRAPPERS[name].text_type if name in WRAPPERS else name)
    return (row.remains if row else None) or REFUSED.get(name, UNKNOWN)
