"""Model types that are refused by name, and why no edit of their weights is known to be exact."""

from collections.abc import Mapping

UNKNOWN = "its residual writers are not known to be complete"

_TYPES_BY_REASON = {
    "its norms act on the residual stream itself, after each addition, and turn the direction back into it": (
        "openai-gpt bert bert-generation big_bird camembert data2vec-text electra ernie roberta roformer rembert roc_bert "
        "xlm xlnet xlm-roberta xmod"
    ),
    "it adds each sub-layer's output to its normalised input, so the norm mixes the direction back into the stream": "minimax",
    "it multiplies the residual stream by learned numbers, one for each channel, which turns it towards the direction": "doge zaya",
    "a gate multiplies each channel after the projection, so no edit of the projection keeps the direction out": "rwkv",
    "a convolution of each channel follows the projection, so no edit of the projection keeps the direction out": (
        "inkling inkling2 inkling_text inkling2_text inkling_mm_model"
    ),
    "its LAuReL branch returns the normalised stream and its AltUp streams are mixed, neither of which a weight edit can undo": (
        "gemma3n gemma3n_text"
    ),
    "an n-gram embedding with a convolution and a gated residual write to the stream, which a weight edit cannot undo": (
        "qwen4_exp qwen4_exp_text"
    ),
    "its position embeddings are computed, not stored, so they keep writing along the direction": "ctrl xglm",
    "its layers differ in where they put the norms, under names that do not tell which, and it was not found exact": "olmo_hybrid",
    "it is an encoder-decoder, whose decoder reads a second residual stream": (
        "bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart prophetnet trocr whisper t5 t5gemma2 udop "
        "pix2struct florence2 vision-encoder-decoder pp_formulanet"
    ),
    "it predicts drafts for another model from that model's residual stream": "gemma4_assistant gemma4_unified_assistant",
}
REFUSED: Mapping[str, str] = {
    model_type: reason for reason, model_types in _TYPES_BY_REASON.items() for model_type in model_types.split()
}


def refusal(model_type: object) -> str:
    """Return why a model type without a row is refused."""
    return REFUSED.get(str(model_type), UNKNOWN)
