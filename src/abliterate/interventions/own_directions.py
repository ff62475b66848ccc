"""A direction for each layer: what tells harmful from harmless prompts where that layer has written.

The difference in means of the residual stream, made orthogonal to the harmless mean at the same place. What is left of
it is what harmful prompts have beside what all prompts have, so taking it out leaves harmless ones nearly as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from abliterate.directions import orthogonal_to
from abliterate.models.chat_model import ChatModel
from abliterate.models.hooks import capture_stream

if TYPE_CHECKING:
    from jaxtyping import Float64
    from torch import Tensor

__all__ = ["own_directions", "stream_means", "unit_rows"]


def own_directions(
    *, harmful: Float64[Tensor, "n_layers d_model"], harmless: Float64[Tensor, "n_layers d_model"]
) -> Float64[Tensor, "n_layers d_model"]:
    """Return unit vectors along mean(harmful) - mean(harmless), without what lies along mean(harmless).

    A layer whose means are the same gets zeros: there is nothing to take out.
    """
    return unit_rows(orthogonal_to(harmful - harmless, harmless))


def unit_rows(rows: Float64[Tensor, "n_layers d_model"]) -> Float64[Tensor, "n_layers d_model"]:
    """Return rows at length 1; one that is zero to rounding becomes zeros."""
    norms = rows.norm(dim=1, keepdim=True)
    return torch.where(norms > 1e-9, rows / norms.clamp(min=1e-9), torch.zeros_like(rows))


@torch.inference_mode()
def stream_means(
    chat: ChatModel, rows: Sequence[Sequence[int]], *, position: int
) -> Float64[Tensor, "n_layers d_model"]:
    """Return the mean of the residual stream behind each block at one token position.

    Args:
        chat: the model.
        rows: token ids of rendered prompts.
        position: counted from the last token, negative.
    """
    sums = torch.zeros(chat.n_layers, chat.d_model, dtype=torch.float64)

    def run(indices: list[int]) -> None:
        def keep(layer: int, hidden: Tensor) -> None:
            # What a block reads is what the one before it has written.
            if layer:
                sums[layer - 1] += hidden[:, position].double().sum(dim=0).cpu()

        with capture_stream(chat, keep):
            chat.forward([list(rows[i]) for i in indices])

    chat.for_batches([len(row) for row in rows], run)
    return sums / len(rows)
