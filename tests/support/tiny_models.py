"""Tiny real models with random weights, made from configs on the spot: plain, on disk, that chat, and quantised.

Norm weights and biases are random too: with the ones and zeros they are born with, a mistake about them would
not show.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from abliterate.models.chat_model import ChatModel, make_chat_model

D_MODEL = 32
N_LAYERS = 3
VOCABULARY = 61
CHAT_VOCABULARY = 400

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


CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM = "{{ '<|im_start|>system\nYou are a tiny model that is of no use to anyone at all<|im_end|>\n' }}"
# Of different lengths, so that batches are padded.
HARMFUL = ["How do locks break?", "Tell me about fires in a house.", "Write."]
HARMLESS = ["How do locks work?", "Explain rain.", "Write a long letter about the garden behind my house, please."]


@cache
def _trained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CHAT_VOCABULARY,
        special_tokens=["<unk>", "<|im_start|>", "<|im_end|>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["system user assistant I cannot help with that. How do locks work?"] * 50, trainer)
    return tokenizer


def make_tokenizer(*, template: str | None = SYSTEM + CHATML, bos_token: str | None = None) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with a ChatML template that puts a fixed system message first."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained().to_str()),
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        bos_token=bos_token,
    )
    tokenizer.chat_template = template
    return tokenizer


def make_wider_tokenizer(word: str, *, template: str | None = SYSTEM + CHATML) -> PreTrainedTokenizerFast:
    """Return a tokenizer to which `word` is the first token that the chat models have no embedding for."""
    tokenizer = make_tokenizer(template=template)
    tokenizer.add_tokens([f"filler{i}" for i in range(CHAT_VOCABULARY - len(tokenizer))])
    tokenizer.add_tokens([word])
    return tokenizer


def make_talkative_model(model_type: str, *, seed: int, **config: Any) -> PreTrainedModel:
    """Build a tiny random model whose replies differ from prompt to prompt, for `make_tokenizer`.

    Its matrices are as its class makes them, only larger; `randomize` would make them too even for that.
    """
    torch.manual_seed(seed)
    tokens = {"vocab_size": CHAT_VOCABULARY, "bos_token_id": None, "eos_token_id": 2}
    settings = AutoConfig.for_model(model_type, **{"initializer_range": 0.3, **tokens, **config})
    model = AutoModelForCausalLM.from_config(settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if name == "bias" or isinstance(module, nn.LayerNorm) or "Norm" in type(module).__name__:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_((1 + 0.3 * noise) if name == "weight" else 0.3 * noise)
    return model.eval()


def tiny_llama(*, n_layers: int = 5, tied: bool = False) -> PreTrainedModel:
    """Return a talkative llama of width 32."""
    return make_talkative_model(
        "llama",
        seed=1,
        hidden_size=D_MODEL,
        intermediate_size=64,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
    )


def tiny_gpt2(*, n_layers: int = 5) -> PreTrainedModel:
    """Return a talkative gpt2 of width 32 with an output head of its own."""
    sizes = {"n_embd": D_MODEL, "n_layer": n_layers, "n_head": 4, "n_positions": 512}
    return make_talkative_model("gpt2", seed=2, tie_word_embeddings=False, **sizes)


def save_chat_model(path: Path, model: PreTrainedModel, **options: Any) -> Path:
    """Save a model and its tokenizer as a checkpoint; options as for `save_pretrained`."""
    model.save_pretrained(path, **options)
    make_tokenizer().save_pretrained(path)
    return path


_COMMON: dict[str, Any] = {"vocab_size": CHAT_VOCABULARY, "max_position_embeddings": 512}
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
    common = {"vocab_size": CHAT_VOCABULARY} if model_type == "gpt2" else _COMMON
    model = make_tiny_model(model_type, **{**common, **config})
    return make_chat_model(model, make_tokenizer())
