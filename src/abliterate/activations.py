"""Recording the residual stream: `resid_pre[l]`, the input of block l, at the tokens that are needed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abliterate.interventions import capture_inputs
from abliterate.model import ChatModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What one pass over some prompts left.

    Attributes:
        activations: [n_prompts, n_pos, n_layers, d_model] in the model's dtype on the CPU: resid_pre at the
            post-instruction tokens, in the order of the positions -n_pos .. -1.
        logits: [n_prompts, vocab] float32 on the CPU, at the last token.
    """

    activations: Tensor
    logits: Tensor


@torch.inference_mode()
def record(
    chat: ChatModel, rows: Sequence[Sequence[int]], *, advance: Callable[[int], None] | None = None
) -> Recording:
    """Run the prompts once and keep resid_pre at the post-instruction tokens and the last logits.

    Args:
        chat: the model.
        rows: token ids of the rendered prompts.
        advance: called with the number of prompts done.
    """
    n_positions = chat.chat_format.n_positions
    cache, n_cached = chat.share_prefix(rows, keep=n_positions)
    activations = torch.zeros(len(rows), n_positions, chat.n_layers, chat.d_model, dtype=chat.model.dtype)
    logits: list[Tensor] = [torch.empty(0)] * len(rows)

    def run(indices: list[int]) -> None:
        def keep(layer: int, hidden: Tensor) -> None:
            activations[indices, :, layer] = hidden[:, -n_positions:].cpu()

        with capture_inputs(chat, keep):
            result = chat.forward([list(rows[i][n_cached:]) for i in indices], cache=cache, n_cached=n_cached)
        for i, row in zip(indices, result.float().cpu(), strict=True):
            logits[i] = row
        if advance is not None:
            advance(len(indices))

    chat.for_batches([len(row) - n_cached for row in rows], run)
    return Recording(activations=activations, logits=torch.stack(logits))


def difference_in_means(*, harmful: Tensor, harmless: Tensor) -> Tensor:
    """Return mean(harmful) - mean(harmless), the candidate directions, un-normalised.

    Args:
        harmful: [n_harmful, n_pos, n_layers, d_model].
        harmless: [n_harmless, n_pos, n_layers, d_model].

    Returns:
        [n_pos, n_layers, d_model], float64 (Arditi et al. 2024, equation 1; accumulated in float64 as published).
    """
    return harmful.to(torch.float64).mean(dim=0) - harmless.to(torch.float64).mean(dim=0)
