"""Reading the residual stream of traced prompts: cosines at every token, contributions and attention at the last.

The tokens of a rendered prompt are told apart: template, instruction, suffix, post-instruction. A suffix stands right
after the instruction, inside the user's message. It is put there as tokens, so that a random suffix has exactly as
many.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from abliterate.errors import InputError
from abliterate.interventions.contributions import (
    BlockParts,
    Contributions,
    HeadsUnknownError,
    capture_contributions,
    check_decomposition,
)
from abliterate.models.chat_model import ChatModel
from abliterate.models.chat_template import MARKER, render, tokenize
from abliterate.models.hooks import capture_stream

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
        form=chat.chat_format.form,
    )
    return len(tokenize(chat.tokenizer, text.partition(MARKER)[0]))


TINY = 1e-300


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamTrace:
    """A direction in the residual stream of some prompts; float64 on the CPU.

    Layers are each block's input and, last, the stream after the last block.

    Attributes:
        cosines: of each prompt, [n_tokens, n_layers + 1].
        components: r . x of each prompt, [n_tokens, n_layers + 1].
        contributions: at the last token; None where they were not asked for.
    """

    cosines: tuple[Tensor, ...]
    components: tuple[Tensor, ...]
    contributions: Contributions | None


@torch.inference_mode()
def trace_stream(
    chat: ChatModel,
    prompts: Sequence[TracedPrompt],
    unit: Tensor,
    *,
    parts: tuple[BlockParts, ...] | None,
    advance: Callable[[int], None],
) -> StreamTrace:
    """Run the prompts once and read the direction off the stream.

    Args:
        chat: the model.
        prompts: what to run.
        unit: the direction, [d_model] float64 on the model's device, unit norm.
        parts: the blocks' writers, for contributions; None for cosines alone.
        advance: called with the number of prompts done.

    Raises:
        HeadsUnknownError: the contributions do not sum to the stream.
    """
    cosines: list[Tensor] = [torch.empty(0)] * len(prompts)
    components: list[Tensor] = [torch.empty(0)] * len(prompts)
    batches: list[tuple[list[int], Contributions]] = []

    def run(indices: list[int]) -> None:
        read: list[Tensor] = []
        lengths: list[Tensor] = []

        def keep(_layer: int, hidden: Tensor) -> None:
            wide = hidden.double()
            read.append((wide @ unit).cpu())
            lengths.append(wide.norm(dim=-1).cpu())

        watch = capture_contributions(chat, parts, unit) if parts is not None else nullcontext(None)
        with capture_stream(chat, keep), watch as take:
            chat.forward([list(prompts[i].tokens) for i in indices])
        component, length = torch.stack(read, dim=-1), torch.stack(lengths, dim=-1)
        for line, i in enumerate(indices):
            n = len(prompts[i].tokens)
            components[i] = component[line, -n:]
            cosines[i] = component[line, -n:] / length[line, -n:].clamp(min=TINY)
        if take is not None:
            found = take(component[:, -1])
            check_decomposition(found, norms=length[:, -1], chat=chat)
            batches.append((indices, found))
        advance(len(indices))

    chat.for_batches([len(prompt.tokens) for prompt in prompts], run)
    return StreamTrace(
        cosines=tuple(cosines),
        components=tuple(components),
        contributions=Contributions.join(batches) if batches else None,
    )


def trace_attention(
    chat: ChatModel,
    prompts: Sequence[TracedPrompt],
    heads: Sequence[tuple[int, int]],
    *,
    parts: tuple[BlockParts, ...],
) -> Tensor:
    """Return how much of some heads' attention goes from the last token to each part of the prompt.

    Args:
        chat: the model.
        prompts: what to run.
        heads: (layer, head) of each.
        parts: the blocks' attention modules.

    Returns:
        [n_heads, 4] float64, means over the prompts: to the template before the instruction, the instruction, the
        suffix, the post-instruction tokens. Each row sums to 1, less where the head has an attention sink.

    Raises:
        HeadsUnknownError: the architecture does not give its attention weights.
    """
    sums = torch.zeros(len(heads), 4, dtype=torch.float64)

    def run(indices: list[int]) -> None:
        batch = [list(prompts[i].tokens) for i in indices]
        with _capture_attention(parts, {layer for layer, _ in heads}) as weights:
            chat.forward(batch)
        for line, index in enumerate(indices):
            for i, (layer, head) in enumerate(heads):
                if layer not in weights:
                    raise HeadsUnknownError(f"{chat.model.config.model_type} does not give its attention weights")
                sums[i] += _by_part(weights[layer][line, head], prompts[index])

    with _eager_attention(chat):
        chat.for_batches([len(prompt.tokens) for prompt in prompts], run)
    return sums / max(1, len(prompts))


def _by_part(weights: Tensor, prompt: TracedPrompt) -> Tensor:
    """Sum attention weights [width], padded on the left, over the parts of one prompt."""
    row = weights[-len(prompt.tokens) :]
    parts = (
        range(prompt.instruction.start),
        prompt.instruction,
        prompt.suffix,
        range(len(prompt.tokens) - prompt.n_post, len(prompt.tokens)),
    )
    return torch.stack([row[part.start : part.stop].sum() for part in parts])


@contextmanager
def _capture_attention(parts: tuple[BlockParts, ...], layers: set[int]) -> Iterator[dict[int, Tensor]]:
    """Yield the attention weights [batch, heads, width] from the last token, by layer, after a forward pass."""
    weights: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            if isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], Tensor):
                weights[layer] = output[1][:, :, -1].double().cpu()

        return hook

    handles = []
    try:
        handles += [parts[layer].attention.register_forward_hook(keep(layer)) for layer in layers]
        yield weights
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _eager_attention(chat: ChatModel) -> Iterator[None]:
    """Compute attention in the way that keeps its weights."""
    before = chat.model.config._attn_implementation
    chat.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        chat.model.set_attn_implementation(before)
