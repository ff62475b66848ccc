"""Greedy replies that begin where a pass over the prompts has ended, row by row, each for as long as it must.

`ChatModel.generate` runs every row of a batch to the batch's end, and the prompts anew. Here the keys and values of
the pass that recorded the prompts are continued, tokens that all prompts share are run once, rows of several passes are
decoded together, and a row leaves as soon as it ends or its reader has seen enough.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from abliterate.errors import ModelError
from abliterate.models.chat_model import ChatModel, PrefixCache, empty_cache, stop_tokens
from abliterate.models.chat_template import ThinkingMarkers
from abliterate.models.machine import is_out_of_memory

ROWS_AT_ONCE = {"cpu": 128, "cuda": 1024}
"""So many rows are decoded together at most: what keeps a device busy."""
CACHE_SHARE, CACHE_BYTES = 0.25, 2**30
"""The keys and values of all rows take at most this share of the memory that the weights take, or so many bytes."""

Intervene = Callable[[Sequence[int]], AbstractContextManager[object]]
"""Attaches hooks for a pass, given the variant of each of its rows; one alone stands for all rows."""


def can_continue(chat: ChatModel, rows: Sequence[Sequence[int]], *, max_new_tokens: int) -> bool:
    """Tell whether replies to these prompts can continue a cache exactly: plain attention, no window passed."""
    longest = max(len(row) for row in rows) + max_new_tokens
    return empty_cache(chat.model.config, longest=longest) is not None


@dataclass(slots=True, kw_only=True)
class PromptPass:
    """A batch of prompts that was run: what its replies begin from.

    Attributes:
        logits: [n, vocab] at the last token of each prompt.
        past: a transformers cache: keys and values of all tokens so far, padding included.
        mask: [n, n_tokens], 1 where there is no padding.
    """

    logits: Tensor
    past: Any
    mask: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedyDecoder:
    """Generates greedy replies.

    Attributes:
        chat: the model, hooks and all.
        max_new_tokens: length limit of each reply.
        enough: tells from its tokens that a reply need not go on.
        intervene: what to attach for rows that are to be run in several variants side by side.
        weigh: called with the index of each prompt and the negative log-likelihood of its reply in nats, the end token
            left out, before the reply is handed over; not where transformers generates it. None: it is not computed.
    """

    chat: ChatModel
    max_new_tokens: int
    enough: Callable[[Sequence[int]], bool] = lambda _tokens: False
    intervene: Intervene = lambda _variants: nullcontext()
    weigh: Callable[[int, float], None] | None = None
    _stops: list[set[int]] = field(default_factory=list)

    @torch.inference_mode()
    def run_prompts(
        self,
        batch: list[list[int]],
        *,
        cache: PrefixCache | None,
        n_cached: int,
        variants: Sequence[int] | None = None,
    ) -> PromptPass:
        """Run one batch of prompts, as `ChatModel.forward` does, and keep what replies begin from."""
        chat = self.chat
        ids, mask = chat.pad(batch)
        variants = [0] * len(batch) if variants is None else variants
        past: Any
        if cache is not None:
            past = cache.for_rows(variants)
            mask = torch.cat([mask.new_ones(len(batch), n_cached), mask], dim=1)
        else:
            past = empty_cache(chat.model.config, longest=ids.shape[1] + self.max_new_tokens)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, n_cached:]
        with self.intervene(variants):
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
    def replies(
        self,
        rows: Sequence[Sequence[int]],
        *,
        variants: Sequence[int] | None = None,
        advance: Callable[[int], None] = lambda _n: None,
        receive: Callable[[int, list[int]], None] = lambda _index, _reply: None,
    ) -> list[list[int]]:
        """Return the replies to some prompts, in their order.

        Args:
            rows: token ids.
            variants: of each row what `intervene` is given, from 0; None: 0 of all.
            advance: called with the number of replies that have ended.
            receive: called with the index of each prompt and its reply, as soon as that has ended.
        """
        chat = self.chat
        variants = [0] * len(rows) if variants is None else variants
        found: list[list[int]] = [[] for _ in rows]

        def keep(index: int, reply: list[int]) -> None:
            found[index] = reply
            receive(index, reply)
            advance(1)

        if not can_continue(chat, rows, max_new_tokens=self.max_new_tokens):
            for variant in sorted(set(variants)):
                own = [i for i, each in enumerate(variants) if each == variant]
                with self.intervene([variant]):
                    self._generate(own, rows, keep)
            return found
        cache, n_cached = None, chat.shareable_prefix(rows)
        if n_cached:
            every = range(max(variants) + 1)
            with self.intervene(every):
                cache = chat.run_prefix(rows[0][:n_cached], n_variants=len(every))
        pool = ReplyPool(self, keep, variants=variants)

        def run(indices: list[int]) -> None:
            batch, of_each = [list(rows[i][n_cached:]) for i in indices], [variants[i] for i in indices]
            pool.enter(indices, self.run_prompts(batch, cache=cache, n_cached=n_cached, variants=of_each))

        chat.for_batches([len(row) - n_cached for row in rows], run)
        pool.finish()
        return found

    def _generate(
        self, own: Sequence[int], rows: Sequence[Sequence[int]], keep: Callable[[int, list[int]], None]
    ) -> None:
        """Have transformers generate the replies to some of the rows."""
        self.chat.generate(
            [rows[i] for i in own],
            max_new_tokens=self.max_new_tokens,
            receive=lambda place, reply: keep(own[place], reply),
        )

    @property
    def stops(self) -> set[int]:
        """The tokens that end a reply."""
        if not self._stops:
            self._stops.append(stop_tokens(self.chat))
        return self._stops[0]


class ReplyPool:
    """Replies that are decoded side by side: rows enter as their prompts are run, and leave as they end.

    A matrix product over few rows is bound by reading the weights, so rows of several passes are decoded together: at
    most `ROWS_AT_ONCE` of them (or `batch_size`), whose keys and values take at most a share of the weights' memory.
    When memory runs out, half of the rows wait.

    Args:
        decoder: says how replies end.
        receive: called with the index of each prompt and its reply, as soon as it has ended.
        variants: of each prompt what the decoder's `intervene` is given; None: 0 of all.
    """

    def __init__(
        self,
        decoder: GreedyDecoder,
        receive: Callable[[int, list[int]], None],
        *,
        variants: Sequence[int] | None = None,
    ) -> None:
        self._decoder = decoder
        self._variants = variants
        self._chat = decoder.chat
        self._receive = receive
        self._most = self._chat.batch_size or ROWS_AT_ONCE.get(self._chat.device.type, ROWS_AT_ONCE["cuda"])
        weights = sum(each.nbytes for each in self._chat.model.parameters())
        self._most_bytes = max(CACHE_SHARE * weights, CACHE_BYTES)
        self._rows: _Rows | None = None
        self._waiting: list[_Rows] = []

    @torch.inference_mode()
    def enter(self, indices: Sequence[int], begun: PromptPass) -> None:
        """Take in the rows of a pass, which is used up; decode while there is no room for them."""
        rows = _Rows(indices=[], replies=[], nats=[], tokens=begun.mask.new_empty(0), past=begun.past, mask=begun.mask)
        rows.indices, rows.replies, rows.nats = list(indices), [[] for _ in indices], [0.0] * len(indices)
        entering = self._after(rows, begun.logits)
        while entering is not None:
            if self._rows is None or self._fits(self._rows, entering):
                self._rows = entering if self._rows is None else self._rows.joined(entering)
                return
            self._step()

    @torch.inference_mode()
    def finish(self) -> None:
        """Decode until all replies have ended."""
        while self._rows is not None:
            self._step()

    def _fits(self, rows: "_Rows", more: "_Rows") -> bool:
        n = len(rows.indices) + len(more.indices)
        width = max(rows.mask.shape[1], more.mask.shape[1]) + self._decoder.max_new_tokens
        return n <= self._most and n * width * rows.bytes_per_token <= self._most_bytes

    def _step(self) -> None:
        """Run the last token of each row; let those leave that end, and those in that wait."""
        rows = self._rows
        if rows is None:
            return
        try:
            variants = [0 if self._variants is None else self._variants[i] for i in rows.indices]
            with self._decoder.intervene(variants):
                logits, past, mask = rows.run(self._chat)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if len(rows.indices) == 1:
                raise ModelError("one reply alone does not fit into memory; try a smaller --dtype") from error
            self._most = half = len(rows.indices) // 2
            places = list(range(len(rows.indices)))
            self._waiting.append(rows.selected(places[half:]))
            self._rows = rows.selected(places[:half])
            return
        rows.past, rows.mask = past, mask
        self._rows = self._after(rows, logits)
        while self._waiting and (self._rows is None or self._fits(self._rows, self._waiting[-1])):
            waiting = self._waiting.pop()
            self._rows = waiting if self._rows is None else self._rows.joined(waiting)

    def _after(self, rows: "_Rows", logits: Tensor) -> "_Rows | None":
        """Add the next token to each row, hand over the replies that end, and return the rows that go on."""
        decoder, tokens, going = self._decoder, logits.argmax(dim=-1), []
        nats = _surprise(logits, tokens) if decoder.weigh is not None else [0.0] * len(tokens)
        for place, token in enumerate(tokens.tolist()):
            reply = rows.replies[place]
            if token not in decoder.stops:
                reply.append(token)
                rows.nats[place] += nats[place]
                if len(reply) < decoder.max_new_tokens and not decoder.enough(reply):
                    going.append(place)
                    continue
            if decoder.weigh is not None:
                decoder.weigh(rows.indices[place], rows.nats[place])
            self._receive(rows.indices[place], reply)
        rows.tokens = tokens
        if not going:
            return None
        return rows if len(going) == len(rows.indices) else rows.selected(going)


def _surprise(logits: Tensor, tokens: Tensor) -> list[float]:
    """Return the negative log-likelihood of tokens [n] by logits [n, vocab], in nats."""
    # Row by row, as a copy of all in float32 would be as large as all that a step takes.
    return [float(row.float().logsumexp(dim=-1) - row[token]) for row, token in zip(logits, tokens, strict=True)]


@dataclass(slots=True, kw_only=True)
class _Rows:
    """Rows that decode together.

    Attributes:
        indices: of which prompt each is.
        replies: the tokens of each so far.
        nats: the negative log-likelihood of these.
        tokens: [n], the last of each, which were not run yet.
        past: keys and values of all tokens before.
        mask: [n, n_tokens], of these 1 where there is no padding, which stands on the left.
    """

    indices: list[int]
    replies: list[list[int]]
    nats: list[float]
    tokens: Tensor
    past: Any
    mask: Tensor

    def run(self, chat: ChatModel) -> tuple[Tensor, Any, Tensor]:
        """Run the last tokens; return the logits, [n, vocab], and what `past` and `mask` are now."""
        mask = torch.cat([self.mask, self.mask.new_ones(len(self.indices), 1)], dim=1)
        out = chat.model(
            input_ids=self.tokens[:, None],
            attention_mask=mask,
            position_ids=mask.sum(dim=1, keepdim=True) - 1,
            past_key_values=_copied(self.past),
            use_cache=True,
        )
        return out.logits[:, -1], out.past_key_values, mask

    def selected(self, places: Sequence[int]) -> "_Rows":
        """Return some of the rows."""
        index = torch.tensor(places, device=self.mask.device)
        past = _copied(self.past)
        past.batch_select_indices(index)
        rows = _Rows(
            indices=[self.indices[place] for place in places],
            replies=[self.replies[place] for place in places],
            nats=[self.nats[place] for place in places],
            tokens=self.tokens[index],
            past=past,
            mask=self.mask[index],
        )
        return rows.of_length(rows.length) if rows.length < rows.mask.shape[1] else rows

    def joined(self, other: "_Rows") -> "_Rows":
        """Return these rows and others, padded on the left to the same length."""
        longest = max(self.length, other.length)
        first, second = self.of_length(longest), other.of_length(longest)
        for layer, more in zip(first.past.layers, second.past.layers, strict=True):
            if layer.is_initialized and layer.keys.numel():
                layer.keys = torch.cat([layer.keys, more.keys])
                layer.values = torch.cat([layer.values, more.values])
        return _Rows(
            indices=first.indices + second.indices,
            replies=first.replies + second.replies,
            nats=first.nats + second.nats,
            tokens=torch.cat([first.tokens, second.tokens]),
            past=first.past,
            mask=torch.cat([first.mask, second.mask]),
        )

    @property
    def length(self) -> int:
        """How many columns there are from the first that is not padding in every row."""
        used = self.mask.any(dim=0)
        return len(used) - int(used.int().argmax())

    def of_length(self, length: int) -> "_Rows":
        """Return the rows with their last columns alone, or with padding on the left where there are fewer."""
        past = _copied(self.past)
        for layer in past.layers:
            if layer.is_initialized and layer.keys.numel():
                layer.keys, layer.values = (_of_length(each, length) for each in (layer.keys, layer.values))
                if hasattr(layer, "cumulative_length"):
                    layer.cumulative_length = length
        return replace(self, past=past, mask=_of_length(self.mask, length, dim=1))

    @property
    def bytes_per_token(self) -> int:
        """The memory that keys and values of one token of one row take."""
        n_tokens = max(1, self.mask.numel())
        layers = [layer for layer in self.past.layers if layer.is_initialized]
        return sum(int(each.nbytes) for layer in layers for each in (layer.keys, layer.values)) // n_tokens


def _copied(past: Any) -> Any:
    """Return a cache that can be written to: its layers' tensors are replaced, never changed."""
    found = copy.copy(past)
    found.layers = [copy.copy(layer) for layer in past.layers]
    return found


def _of_length(tensor: Tensor, length: int, dim: int = -2) -> Tensor:
    """Return the last entries of a dimension, with zeros on the left where there are fewer."""
    missing = length - tensor.shape[dim]
    if missing <= 0:
        return tensor.narrow(dim, -missing, length)
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor.new_zeros(shape), tensor], dim=dim)


def find_response_prefix(chat: ChatModel, prompts: Sequence[str]) -> str:
    """Return the text that starts every one of the model's own answers, with a thinking part closed; else "".

    Args:
        chat: the model.
        prompts: harmful and harmless prompts together.
    """
    rows = chat.encode(prompts)
    starts = chat.generate(rows, max_new_tokens=1)
    thoughts = _thoughts_begun(chat, starts)
    if len(set(map(tuple, starts))) > 1 and not thoughts:
        return ""
    # An opening may be spelled out, each letter a token.
    spelled = [len(chat.tokenizer(one.opening, add_special_tokens=False)["input_ids"]) for one in thoughts]
    answers = chat.generate(rows, max_new_tokens=max([4, *spelled]))
    decoded = [chat.decode(answer, skip_special_tokens=False) for answer in answers]
    for one in thoughts:
        if all(text.lstrip().startswith(one.opening) for text in decoded):
            return one.opening + one.shut
    shared = list(itertools.takewhile(lambda column: len(set(column)) == 1, zip(*answers, strict=False)))
    return chat.decode([column[0] for column in shared[:4]], skip_special_tokens=False)


def _thoughts_begun(chat: ChatModel, starts: Sequence[Sequence[int]]) -> list[ThinkingMarkers]:
    # A first token may be the first byte of a letter.
    texts = [chat.decode(start, skip_special_tokens=False).lstrip().rstrip("\ufffd") for start in starts]
    known = [one for one in chat.chat_format.markers if one.opening]
    return [one for one in known if all(t.startswith(one.opening) or one.opening.startswith(t) for t in texts)]
