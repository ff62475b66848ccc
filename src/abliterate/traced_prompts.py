"""Rendered prompts whose tokens are told apart: template, instruction, suffix, post-instruction.

A suffix stands right after the instruction, inside the user's message. It is put there as tokens, so that a random
suffix has exactly as many.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from abliterate.errors import InputError
from abliterate.models.chat_model import ChatModel
from abliterate.models.chat_template import MARKER, render, tokenize

SuffixKind = Literal["none", "given", "random"]
PRINTABLE = range(0x20, 0x7F)


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedPrompt:
    """The token ids of one rendered prompt; spans count from its first token.

    Attributes:
        tokens: all token ids.
        instruction: the instruction's tokens.
        suffix: the suffix's tokens, empty where there is none.
        n_post: how many post-instruction tokens follow.
    """

    tokens: tuple[int, ...]
    instruction: range
    suffix: range
    n_post: int


def traced_prompts(
    chat: ChatModel, texts: Sequence[str], *, suffixes: Sequence[Sequence[int]] | None = None
) -> list[TracedPrompt]:
    """Render prompts and find their spans.

    Args:
        chat: the model.
        texts: the instructions.
        suffixes: token ids for each prompt, or None for no suffix.
    """
    n_post = chat.chat_format.n_positions
    start = _template_length(chat)
    prompts = []
    for i, row in enumerate(chat.encode(texts)):
        suffix = list(suffixes[i]) if suffixes is not None else []
        end = len(row) - n_post
        prompts.append(
            TracedPrompt(
                tokens=(*row[:end], *suffix, *row[end:]),
                instruction=range(min(start, end), end),
                suffix=range(end, end + len(suffix)),
                n_post=n_post,
            )
        )
    return prompts


def suffix_tokens(chat: ChatModel, suffix: str) -> list[int]:
    """Return the token ids of a suffix, set off from the instruction by a space.

    Raises:
        InputError: the suffix is empty.
    """
    if not suffix.strip():
        raise InputError("--suffix is empty; give the text that is appended to each prompt")
    ids: list[int] = chat.tokenizer(" " + suffix, add_special_tokens=False)["input_ids"]
    return ids


def random_suffixes(chat: ChatModel, *, n_tokens: int, n_prompts: int, seed: int) -> list[list[int]]:
    """Return a fresh random suffix of `n_tokens` tokens for each prompt, the same for the same seed.

    Tokens are drawn from those of the vocabulary that are not special and, where there are such, printable ASCII.
    """
    special = set(chat.tokenizer.all_special_ids) | set(chat.tokenizer.added_tokens_decoder)
    vocabulary = min(len(chat.tokenizer), int(cast(Any, chat.model.get_input_embeddings()).num_embeddings))
    texts = {i: chat.decode([i], skip_special_tokens=False) for i in range(vocabulary) if i not in special}
    pool = [i for i, text in texts.items() if text.strip() and all(ord(c) in PRINTABLE for c in text)] or list(texts)
    rng = random.Random(seed)
    return [[rng.choice(pool) for _ in range(n_tokens)] for _ in range(n_prompts)]


def _template_length(chat: ChatModel) -> int:
    """Return how many tokens the template puts before the instruction."""
    text = render(
        chat.tokenizer,
        MARKER,
        system_prompt=chat.system_prompt,
        thinking_disabled=chat.chat_format.thinking_disabled,
    )
    return len(tokenize(chat.tokenizer, text.partition(MARKER)[0]))
