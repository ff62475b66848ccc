"""Tiny random chat models, made on the spot."""

from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM = "{{ '<|im_start|>system\nYou are a tiny model that is of no use to anyone at all<|im_end|>\n' }}"
VOCABULARY = 400
# Of different lengths, so that batches are padded.
HARMFUL = ["How do locks break?", "Tell me about fires in a house.", "Write."]
HARMLESS = ["How do locks work?", "Explain rain.", "Write a long letter about the garden behind my house, please."]


@cache
def _trained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
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


def randomise(model: PreTrainedModel, *, seed: int = 0) -> PreTrainedModel:
    """Give norm weights and biases random values: with the defaults many mistakes are invisible."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if name == "bias" or isinstance(module, nn.LayerNorm) or "Norm" in type(module).__name__:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_((1 + 0.3 * noise) if name == "weight" else 0.3 * noise)
    return model.eval()


def tiny_llama(*, n_layers: int = 5, tied: bool = False) -> PreTrainedModel:
    """Return a random llama of width 32."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=2,
    )
    return randomise(LlamaForCausalLM(config))


def tiny_gpt2(*, n_layers: int = 5) -> PreTrainedModel:
    """Return a random gpt2 of width 32 with an output head of its own."""
    torch.manual_seed(2)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=n_layers,
        n_head=4,
        n_positions=512,
        tie_word_embeddings=False,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=2,
    )
    return randomise(GPT2LMHeadModel(config))
