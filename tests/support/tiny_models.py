"""Tiny real checkpoints with random weights, made from configs on the spot.

Norm weights and biases are random too: with the ones and zeros they are born with, a mistake about them would
not show.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

D_MODEL = 32
N_LAYERS = 3
VOCABULARY = 61

_SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 64},
}
_LLAMA_SIZES = {
    "hidden_size": D_MODEL,
    "intermediate_size": 80,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def make_tiny_model(
    model_type: str = "llama",
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **config: Any,
) -> PreTrainedModel:
    """Build a tiny random model of `model_type` in evaluation mode with eager attention."""
    sizes = _SIZES.get(model_type, _LLAMA_SIZES)
    settings = AutoConfig.for_model(model_type, **{**sizes, **_TOKENS, "tie_word_embeddings": tied, **config})
    model = AutoModelForCausalLM.from_config(settings, attn_implementation="eager", dtype=dtype)
    return randomize(model, seed=seed).eval()


def randomize(model: PreTrainedModel, *, seed: int = 0) -> PreTrainedModel:
    """Give every parameter random values, norms about 1 and all else about 0; tied ones stay tied."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            scale = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(float(is_norm) + scale * noise)
    return model


def save_tiny_model(
    path: Path,
    model_type: str = "llama",
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | int = "5GB",
    seed: int = 0,
    **config: Any,
) -> Path:
    """Save a tiny random checkpoint with `save_pretrained` and return its directory."""
    model = make_tiny_model(model_type, tied=tied, dtype=dtype, seed=seed, **config)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return path


def save_tiny_llama(path: Path, **options: Any) -> Path:
    """Save a tiny llama; options as for `save_tiny_model`."""
    return save_tiny_model(path, "llama", **options)


def save_tiny_gpt2(path: Path, **options: Any) -> Path:
    """Save a tiny gpt2; options as for `save_tiny_model`."""
    return save_tiny_model(path, "gpt2", **options)


def random_direction(d_model: int = D_MODEL, *, seed: int = 7) -> torch.Tensor:
    """Return a random unit vector, float64."""
    vector = torch.randn(d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return vector / vector.norm()
