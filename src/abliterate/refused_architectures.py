"""Model types that are refused by name, and why no edit of their weights is known to be exact."""

from collections.abc import Mapping

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
