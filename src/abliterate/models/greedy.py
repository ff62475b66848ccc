"""Greedy replies that begin where a pass over the prompts has ended, row by row, each for as long as it must.

`ChatModel.generate` runs every row of a batch to the batch's end, and the prompts anew. Here the keys and values of
the pass that recorded the prompts are continued, tokens that all prompts share are run once, and a row leaves the batch
as soon as it ends or its reader has seen enough.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from abliterate.models.chat_model import ChatModel, PrefixCache, empty_cache, stop_tokens

if TYPE_CHECKING:
    from transformers import Cache


def can_continue(chat: ChatModel, rows: Sequence[Sequence[int]], *, max_new_tokens: int) -> bool:
    """Tell whether replies to these prompts can continue a cache exactly: plain attention, no window passed."""
    longest = max(len(row) for row in rows) + max_new_tokens
    return empty_cache(chat.model.config, longest=longest) is not None


@dataclass(slots=True, kw_only=True)
class PromptPass:
    """A batch of prompts that was run: what its replies begin from.

    Attributes:
        logits: [n, vocab] at the last token of each prompt.
        past: keys and values of all tokens so far, padding included.
        mask: [n, n_tokens], 1 where there is no padding.
    """

    logits: Tensor
    past: "Cache"
    mask: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedyDecoder:
    """Generates greedy replies.

    Attributes:
        chat: the model, hooks and all.
        max_new_tokens: length limit of each reply.
        enough: tells from its tokens that a reply need not go on.
    """

    chat: ChatModel
    max_new_tokens: int
    enough: Callable[[Sequence[int]], bool] = lambda _tokens: False
    _stops: list[set[int]] = field(default_factory=list)

    @torch.inference_mode()
    def run_prompts(self, batch: list[list[int]], *, cache: PrefixCache | None, n_cached: int) -> PromptPass:
        """Run one batch of prompts, as `ChatModel.forward` does, and keep what replies begin from."""
        chat = self.chat
        ids, mask = chat.pad(batch)
        past: Any
        if cache is not None:
            past = cache.for_rows([0] * len(batch))
            mask = torch.cat([mask.new_ones(len(batch), n_cached), mask], dim=1)
        else:
            past = empty_cache(chat.model.config, longest=ids.shape[1] + self.max_new_tokens)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, n_cached:]
        out = chat.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=past,
            use_cache=True,
            logits_to_keep=chat.last_tokens(ids.shape[1]),
        )
        return PromptPass(logits=out.logits[:, -1], past=out.past_key_values, mask=mask)

    @torch.inference_mode()
    def reply(self, begun: PromptPass) -> list[list[int]]:
        """Return the replies as token ids, without the end token; `begun` is used up."""
        stops = self._stop_tokens()
        replies: list[list[int]] = [[] for _ in range(len(begun.logits))]
        alive, logits, past, mask = list(range(len(replies))), begun.logits, begun.past, begun.mask
        while True:
            tokens = logits.argmax(dim=-1)
            going = []
            for place, (index, token) in enumerate(zip(alive, tokens.tolist(), strict=True)):
                if token in stops:
                    continue
                replies[index].append(token)
                if len(replies[index]) < self.max_new_tokens and not self.enough(replies[index]):
                    going.append(place)
            if not going:
                return replies
            if len(going) < len(alive):
                kept = torch.tensor(going, device=tokens.device)
                alive, tokens, mask = [alive[place] for place in going], tokens[kept], mask[kept]
                past.batch_select_indices(kept)
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
            out = self.chat.model(
                input_ids=tokens[:, None],
                attention_mask=mask,
                position_ids=mask.sum(dim=1, keepdim=True) - 1,
                past_key_values=past,
                use_cache=True,
            )
            logits = out.logits[:, -1]

    def replies(
        self, rows: Sequence[Sequence[int]], *, advance: Callable[[int], None] = lambda _n: None
    ) -> list[list[int]]:
        """Return the replies to some prompts (token ids), in their order."""
        chat = self.chat
        if not can_continue(chat, rows, max_new_tokens=self.max_new_tokens):
            return chat.generate(rows, max_new_tokens=self.max_new_tokens, advance=advance)
        cache, n_cached = chat.share_prefix(rows)
        found: list[list[int]] = [[] for _ in rows]

        def run(indices: list[int]) -> None:
            batch = [list(rows[i][n_cached:]) for i in indices]
            for i, reply in zip(
                indices, self.reply(self.run_prompts(batch, cache=cache, n_cached=n_cached)), strict=True
            ):
                found[i] = reply
            advance(len(indices))

        chat.for_batches([len(row) - n_cached for row in rows], run)
        return found

    def _stop_tokens(self) -> set[int]:
        if not self._stops:
            self._stops.append(stop_tokens(self.chat))
        return self._stops[0]
