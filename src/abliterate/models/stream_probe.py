"""A look at the residual stream of a loaded model before anything is computed: do hooks see it as it is?

Two short prompts are run a few times. What must hold for a direction to be extracted is checked on the model itself,
so that a model whose blocks do more than add to the stream is refused by name in seconds, and not found out afterwards.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from abliterate.models.chat_model import ChatModel
from abliterate.models.hooks import (
    ablate_direction,
    ablate_in_block,
    capture_stream,
    finish_with_last_tokens,
    start_at_block,
)
from abliterate.models.stream import no_extraction

_PROMPTS = ("Name a color.", "What is a river? Say it in one sentence.")
_TOKENS = 16
"""So many tokens of each are run at most: a template may put a page before them."""
_STARTS = 4
"""At so many blocks at most a pass is started, to compare it with the plain one."""
_ROUNDINGS = 64
"""So many times the number format's precision may a value be off that is computed in another order."""
# What a block raises that needs more of those before it than the stream: their keys, their states, their choices.
_NEEDS_MORE = (TypeError, KeyError, AttributeError, IndexError, ValueError, RuntimeError)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamProbe:
    """What was found about a model's blocks.

    Attributes:
        returned: of each block how many values it returns; 0 for one that is not in a tuple.
        starts_at_blocks: a pass may start at any block, given that block's input.
        mlp_by_token: the last block's MLP may be run for the last tokens alone where only their logits are read.
        reads_embedding: something beside the first block reads what starts the stream.
    """

    returned: tuple[int, ...]
    starts_at_blocks: bool
    mlp_by_token: bool
    reads_embedding: bool


@torch.inference_mode()
def probe_stream(chat: ChatModel, rows: Sequence[Sequence[int]] | None = None) -> StreamProbe:
    """Check that a direction can be extracted from a model and ablated in it.

    Args:
        chat: the model.
        rows: token ids of two short prompts of one length; None: two of our own.

    Raises:
        ModelError: its blocks are not run once each, or an ablation leaves some of the direction in the stream.
        UnsupportedArchitectureError: its type is refused by name.
    """
    kind = str(chat.model.config.model_type)
    if chat.stream.not_extracted is not None:
        raise no_extraction(kind, chat.stream.not_extracted)
    batch = [list(row) for row in rows or _short_rows(chat)]
    inputs, returned, logits = _plain_pass(chat, batch)
    # Blocks that read images are passed over where there is none.
    layers = [layer for layer, _ in inputs]
    if layers[:1] != [0] or layers[-2:] != [chat.n_layers - 1, chat.n_layers] or sorted(set(layers)) != layers:
        raise no_extraction(kind, f"its {chat.n_layers} blocks are not each run once, in order")
    expected = (len(batch), len(batch[0]), chat.d_model)
    wrong = next((hidden for _, hidden in inputs if hidden.shape != expected), None)
    if wrong is not None:
        raise no_extraction(kind, f"a block's input has the shape {list(wrong.shape)}, not [prompts, tokens, d_model]")
    ablated = _check_ablation(chat, batch, [hidden for _, hidden in inputs[1:]], kind)
    starts = _starts_at_blocks(chat, batch, dict(inputs), returned, logits)
    return StreamProbe(
        returned=returned,
        starts_at_blocks=starts,
        mlp_by_token=_has_mlp_by_token(chat, batch, inputs[-2][1] if starts else None, returned, logits),
        reads_embedding=not _is_close(_ablated_in_blocks(chat, batch), ablated),
    )


def _short_rows(chat: ChatModel) -> list[list[int]]:
    # Of one length: padding is not what is looked at.
    rows = chat.encode(_PROMPTS)
    length = min(_TOKENS, *(len(row) for row in rows))
    return [row[-length:] for row in rows]


def _plain_pass(chat: ChatModel, batch: list[list[int]]) -> tuple[list[tuple[int, Tensor]], tuple[int, ...], Tensor]:
    counts: dict[int, int] = {}

    def count(layer: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            counts[layer] = len(output) if isinstance(output, tuple) else 0

        return hook

    inputs: list[tuple[int, Tensor]] = []
    handles = [block.register_forward_hook(count(layer)) for layer, block in enumerate(chat.blocks)]
    try:
        with capture_stream(chat, lambda layer, hidden: inputs.append((layer, hidden))):
            logits = chat.forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    return inputs, tuple(counts.get(layer, 0) for layer in range(chat.n_layers)), logits


def _check_ablation(chat: ChatModel, batch: list[list[int]], outputs: Sequence[Tensor], kind: str) -> Tensor:
    direction = _random_direction(chat)
    unit = direction / direction.norm()
    seen: list[Tensor] = []

    def look(_module: Any, _args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    with ablate_direction(chat, direction):
        # At each block's own output: what the next one receives is cleaned.
        handles = [block.register_forward_hook(look) for block in chat.blocks]
        try:
            logits = chat.forward(batch)
        finally:
            for handle in handles:
                handle.remove()
    # Some models compute their stream in float32 whatever they are loaded in.
    precision = max(torch.finfo(torch.float32).eps, *(torch.finfo(hidden.dtype).eps for hidden in seen))
    for layer, hidden in enumerate(seen):
        left, plain = _share(hidden, unit), _share(outputs[layer], unit)
        rounding = _ROUNDINGS * precision * ((1 + layer) / chat.d_model) ** 0.5
        # Written so that a NaN does not pass.
        if not left <= min(max(rounding, 1e-3 * plain), 0.5 * plain):
            raise no_extraction(
                kind,
                f"after an ablation {left:.1e} of a random direction is left behind block {layer} ({plain:.1e} "
                "without), so something else writes to its residual stream",
            )
    return logits


def _random_direction(chat: ChatModel) -> Tensor:
    return torch.randn(chat.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _ablated_in_blocks(chat: ChatModel, batch: list[list[int]]) -> Tensor:
    """Return the logits with a direction ablated in the blocks alone, and not where the stream starts."""
    with ExitStack() as stack:
        for layer in range(chat.n_layers):
            stack.enter_context(ablate_in_block(chat, layer, _random_direction(chat)))
        return chat.forward(batch)


def _is_close(found: Tensor, expected: Tensor) -> bool:
    precision = max(torch.finfo(expected.dtype).eps, torch.finfo(torch.float32).eps)
    return float((found - expected).double().abs().max()) <= _ROUNDINGS * precision * float(
        expected.double().abs().max()
    )


def _share(hidden: Tensor, unit: Tensor) -> float:
    wide = hidden.double().cpu()
    return float(((wide @ unit).abs() / wide.norm(dim=-1).clamp(min=1e-300)).max())


def _starts_at_blocks(
    chat: ChatModel, batch: list[list[int]], inputs: Mapping[int, Tensor], returned: Sequence[int], logits: Tensor
) -> bool:
    n_layers = chat.n_layers
    starts = sorted({round(i * (n_layers - 1) / _STARTS) for i in range(1, _STARTS + 1)} - {0})
    for layer in (layer for layer in starts if layer in inputs):
        try:
            with start_at_block(chat, inputs[layer], layer=layer, returned=returned):
                found = chat.forward(batch)
        except _NEEDS_MORE:
            return False
        if not _is_close(found, logits):
            return False
    return True


def _has_mlp_by_token(
    chat: ChatModel, batch: list[list[int]], hidden: Tensor | None, returned: Sequence[int], logits: Tensor
) -> bool:
    """Tell whether a pass that starts at the last block, or at the first where `hidden` is None, may end in part."""
    with ExitStack() as stack:
        if hidden is not None:
            stack.enter_context(start_at_block(chat, hidden, layer=chat.n_layers - 1, returned=returned))
        n_modules = stack.enter_context(finish_with_last_tokens(chat, 1))
        if not n_modules:
            return False
        try:
            return _is_close(chat.forward(batch), logits)
        except _NEEDS_MORE:
            return False
