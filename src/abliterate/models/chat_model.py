"""A loaded chat model: its decoder blocks, batched forward passes, and greedy generation.

Rows of different lengths are divided into batches with little padding and a bounded number of tokens. Tokens that many
rows share at their start are run once, and their keys and values kept.
"""

import copy
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from abliterate.architectures.table import feels_gaps, feels_padding
from abliterate.checkpoints.provenance import versions
from abliterate.errors import ModelError
from abliterate.files import shown
from abliterate.models.chat_format import ChatFormat, conversation_row, find_chat_format
from abliterate.models.chat_template import token_texts
from abliterate.models.machine import BatchLimits, is_out_of_memory, plan_batches, widen_products
from abliterate.models.options import ModelOptions
from abliterate.models.stream import ResidualStream, find_blocks, find_stream, learned_positions

if TYPE_CHECKING:
    from transformers import Cache, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixCache:
    """Keys and values of one prefix in one or more variants (as under different interventions).

    Attributes:
        cache: a transformers cache with one batch row per variant, or one row in layers where all are alike; it is
            never changed.
        n_tokens: length of the prefix.
    """

    cache: "Cache"
    n_tokens: int

    def for_rows(self, variants: Sequence[int]) -> "Cache":
        """Return a cache for a batch whose row i continues variant `variants[i]`; it may be written to."""
        past = copy.copy(self.cache)
        past.layers = [_rows(layer, variants) for layer in self.cache.layers]
        return past


def empty_cache(config: "PretrainedConfig", *, longest: int) -> "Cache | None":
    """Return a cache to run a prefix into, or None where continuing one would not be exact.

    Padding stands between the prefix and a shorter row. Plain attention masks it; recurrent layers would take it in,
    a sliding window counts it, which matters as soon as a row is longer than the window, and so do some positions.

    Args:
        config: the model's.
        longest: tokens of the longest row, prefix included.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    if feels_padding(config) or feels_gaps(config):
        return None
    cache = DynamicCache(config=config)
    if not cache.layers or any(type(layer) not in {DynamicLayer, DynamicSlidingWindowLayer} for layer in cache.layers):
        return None
    windows = [layer.sliding_window for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]
    return None if any(longest > window for window in windows) else cache


def shared_prefix_length(rows: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all rows have in common at the start, leaving at least one token to each."""
    shortest = min(len(row) for row in rows)
    for i in range(shortest - 1):
        if any(row[i] != rows[0][i] for row in rows):
            return i
    return max(0, shortest - 1)


def _rows(layer: Any, variants: Sequence[int]) -> Any:
    chosen = copy.copy(layer)
    if layer.is_initialized and layer.keys.numel():
        # Updating a layer concatenates into new memory, so that views of the shared row are safe here.
        if layer.keys.shape[0] == 1:
            chosen.keys = layer.keys.expand(len(variants), -1, -1, -1)
            chosen.values = layer.values.expand(len(variants), -1, -1, -1)
        else:
            index = torch.tensor(list(variants), device=layer.keys.device)
            chosen.keys, chosen.values = layer.keys[index], layer.values[index]
    return chosen


MIN_SHARED_PREFIX = 8
TOKENS_PER_BATCH = {"cpu": 1536, "cuda": 65536}
BATCH_OVERHEAD = {"cpu": 32, "cuda": 1024}
"""What starting a batch costs, in tokens of computation: launching its operations, reading the weights."""
CACHED_TOKENS_PER_TOKEN = 8
"""So many cached tokens cost a row about the memory and time of one that is computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatModel:
    """A causal language model with a chat template, ready for hooks.

    Attributes:
        model: the transformers model, in evaluation mode.
        tokenizer: its tokenizer.
        blocks: the decoder blocks, in order; the input of `blocks[l]` is `resid_pre[l]`.
        d_model: width of the residual stream.
        chat_format: see `ChatFormat`.
        system_prompt: the system message, or None for what the template does by default.
        batch_size: prompts per forward pass, or None to size batches by tokens.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    blocks: tuple[nn.Module, ...]
    d_model: int
    chat_format: ChatFormat
    system_prompt: str | None = None
    batch_size: int | None = None
    _limit: dict[str, int] = field(default_factory=dict)
    _stream: list[ResidualStream] = field(default_factory=list)

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return len(self.blocks)

    @property
    def stream(self) -> ResidualStream:
        """What each block writes to the residual stream.

        Raises:
            ModelError: it is not known.
            UnsupportedArchitectureError: the model's type is refused by name.
        """
        if not self._stream:
            name = str(self.model.config.model_type)
            self._stream.append(find_stream(self.model, self.blocks, d_model=self.d_model, name=name))
        return self._stream[0]

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        device = self.model.device
        # What accelerate has put aside is on the meta device until it is run, on the CPU if there is no GPU.
        return torch.device("cpu") if device.type == "meta" else device

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Render prompts with the chat template and return token ids, each with exactly one BOS if there is one.

        Without a template, prompts are tokenized as they are.

        Raises:
            ModelError: the template fails, or the tokenizer gives ids beyond the model's embedding.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            rows = [list(self.tokenizer(prompt)["input_ids"]) for prompt in prompts]
        else:
            rows = [self.encode_conversation([{"role": "user", "content": one}]) for one in prompts]
        self.check_tokens(rows, prompts)
        return rows

    def encode_conversation(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the token ids of a conversation, up to where the next answer starts; see `conversation_row`."""
        return conversation_row(
            self.tokenizer, messages, chat_format=self.chat_format, system_prompt=self.system_prompt
        )

    def check_tokens(self, rows: Sequence[Sequence[int]], texts: Sequence[str], *, n_new: int = 0) -> None:
        """Refuse token ids and positions that the model has no embedding for.

        Args:
            rows: token ids.
            texts: what each of them is the text of, for the message.
            n_new: how many tokens may follow each row.

        Raises:
            ModelError: the tokenizer gives such an id, too many, or none.
        """
        n_rows, n_positions = self.n_embeddings, learned_positions(self.model)
        for row, text in zip(rows, texts, strict=True):
            if not row:
                raise ModelError(f"the tokenizer makes no token of {text[:60]!r}; it is another model's or incomplete")
            if n_positions is not None and len(row) + n_new > n_positions:
                more = f" and a reply of {n_new}" if n_new else ""
                raise ModelError(
                    f"{text[:60]!r} takes {len(row)} tokens{more}, and the model has learned {n_positions} positions; "
                    "leave it out, or ask for shorter replies"
                )
            beyond = next((token for token in row if n_rows is not None and token >= n_rows), None)
            if beyond is not None:
                shown = self.decode([beyond], skip_special_tokens=False)
                raise ModelError(
                    f"the tokenizer makes token {beyond} ({shown!r}) of {text[:60]!r}, and the model's embedding has "
                    f"{n_rows} rows; it is the tokenizer of another model, or the embedding was not resized for it"
                )

    @property
    def n_embeddings(self) -> int | None:
        """How many tokens the model has an embedding for; None where that does not show."""
        try:
            embedding = self.model.get_input_embeddings()
        except NotImplementedError:
            return None
        n: int | None = getattr(embedding, "num_embeddings", None)
        return n

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of some tokens."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens))

    def share_prefix(
        self, rows: Sequence[Sequence[int]], *, keep: int | Sequence[int] = 1
    ) -> tuple[PrefixCache | None, int]:
        """Run the tokens that all rows share at the start once; return their cache and how many they are.

        Where continuing the cache would not be exact, or too few tokens are shared, the cache is None.

        Args:
            rows: token ids.
            keep: how many tokens of each row to leave out of the cache at least; one number for all, or one a row.
        """
        n_shared = self.shareable_prefix(rows, keep=keep)
        return (self.run_prefix(rows[0][:n_shared]), n_shared) if n_shared else (None, 0)

    def shareable_prefix(self, rows: Sequence[Sequence[int]], *, keep: int | Sequence[int] = 1) -> int:
        """Return how many tokens at the start of all rows are worth a cache that is exact; 0 if there is none."""
        kept = [keep] * len(rows) if isinstance(keep, int) else keep
        n_shared = min(shared_prefix_length(rows), min(len(row) - n for row, n in zip(rows, kept, strict=True)))
        if n_shared < MIN_SHARED_PREFIX:
            return 0
        return n_shared if empty_cache(self.model.config, longest=max(len(row) for row in rows)) is not None else 0

    def last_logits(self, rows: Sequence[Sequence[int]], *, advance: Callable[[int], None] | None = None) -> Tensor:
        """Return the logits [n, vocab] (float32, CPU) at the last token of each row, in the order of `rows`.

        A shared prefix is run once and reused as a key-value cache; the result equals the uncached one to rounding.
        """
        cache, n_cached = self.share_prefix(rows)
        logits: list[Tensor | None] = [None] * len(rows)

        def run(indices: list[int]) -> None:
            result = self.forward([list(rows[i][n_cached:]) for i in indices], cache=cache, n_cached=n_cached)
            for i, row in zip(indices, result.float().cpu(), strict=True):
                logits[i] = row
            if advance is not None:
                advance(len(indices))

        self.for_batches([len(row) - n_cached for row in rows], run)
        return torch.stack([row for row in logits if row is not None])

    @torch.inference_mode()
    def forward(
        self,
        batch: list[list[int]],
        *,
        cache: PrefixCache | None = None,
        n_cached: int = 0,
        variants: Sequence[int] | None = None,
        n_logits: int = 1,
    ) -> Tensor:
        """Run one left-padded batch and return its logits at the last token, [n, vocab].

        Args:
            batch: token ids; with a cache, those after the cached tokens.
            cache: keys and values of the tokens before the batch's; it is not changed.
            n_cached: how many tokens the cache holds.
            variants: for each row which variant of the cache it continues; None: the first.
            n_logits: at how many of the last tokens; above 1 the result is [n, n_logits, vocab].
        """
        return self._forward(batch, cache=cache, n_cached=n_cached, variants=variants, n_logits=n_logits)

    def _forward(
        self,
        batch: list[list[int]],
        *,
        cache: PrefixCache | None,
        n_cached: int,
        variants: Sequence[int] | None = None,
        n_logits: int = 1,
    ) -> Tensor:
        ids, mask = self.pad(batch)
        past = None
        if cache is not None:
            past = cache.for_rows([0] * len(batch) if variants is None else variants)
            mask = torch.cat([mask.new_ones(len(batch), n_cached), mask], dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, n_cached:]
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=past,
            use_cache=past is not None,
            logits_to_keep=self.last_tokens(ids.shape[1], n_logits),
        )
        logits: Tensor = out.logits[:, -1] if n_logits == 1 else out.logits[:, -n_logits:]
        return logits

    @torch.inference_mode()
    def generate(
        self,
        rows: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        advance: Callable[[int], None] | None = None,
        receive: Callable[[int, list[int]], None] | None = None,
        streamer: Any = None,
    ) -> list[list[int]]:
        """Return greedy completions as token ids, without the end token and what follows it.

        The model's shipped generation settings (sampling, repetition penalty) are not used. `receive` gets the index
        and the completion of each row as soon as its batch is done; a `streamer` (see transformers) the tokens of a
        single row as they come.
        """
        from transformers import GenerationConfig

        model = cast(Any, self.model)
        stops = stop_tokens(self)
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(stops) or None,
            pad_token_id=self.pad_token_id,
        )
        completions: list[list[int]] = [[] for _ in rows]

        def run(indices: list[int]) -> None:
            ids, mask = self.pad([list(rows[i]) for i in indices])
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, streamer=streamer)
            for i, row in zip(indices, out[:, ids.shape[1] :].tolist(), strict=True):
                completions[i] = list(itertools.takewhile(lambda token: token not in stops, row))
                if receive is not None:
                    receive(i, completions[i])
            if advance is not None:
                advance(len(indices))

        # `generate` fills what a given configuration leaves open from the model's own, so that one is set aside.
        shipped, model.generation_config = model.generation_config, GenerationConfig()
        try:
            self.for_batches([len(row) + max_new_tokens for row in rows], run, generating=True)
        finally:
            model.generation_config = shipped
        return completions

    def last_tokens(self, n_tokens: int, n_logits: int = 1) -> int | Tensor:
        """Return which tokens' logits a pass over `n_tokens` is asked for: the last ones'.

        Where the last blocks share their keys, a plain number would have them computed for those tokens alone;
        positions have not.
        """
        shares_keys = getattr(self.model.config.get_text_config(decoder=True), "num_kv_shared_layers", 0)
        return torch.arange(n_tokens - n_logits, n_tokens, device=self.device) if shares_keys else n_logits

    @property
    def pad_token_id(self) -> int:
        """The padding token, or any token where there is none that the model knows: padding is masked."""
        n_rows = self.n_embeddings
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None and (n_rows is None or token < n_rows):
                return int(token)
        return 0

    def pad(self, batch: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Pad rows on the left; return ids and attention mask, [n, longest] each."""
        width = max(len(row) for row in batch)
        ids = torch.full((len(batch), width), self.pad_token_id)
        mask = torch.zeros((len(batch), width), dtype=torch.long)
        for i, row in enumerate(batch):
            if row:
                ids[i, width - len(row) :] = torch.tensor(row)
                mask[i, width - len(row) :] = 1
        return ids.to(self.device), mask.to(self.device)

    def for_batches(
        self,
        lengths: Sequence[int],
        run: Callable[[list[int]], None],
        *,
        generating: bool = False,
        widths: Sequence[int] | None = None,
    ) -> None:
        """Call `run` with the indices of one batch after another, longest rows first.

        Batches hold rows of like length and a bounded number of tokens, or `batch_size` rows. When memory runs out,
        the bound is halved, for what follows too. `widths` says how many tokens rows have whose cost is another.

        Raises:
            ModelError: a single row does not fit.
        """
        key = "generate" if generating else "forward"
        widths = lengths if widths is None else widths
        pending = plan_batches(lengths, limits=self.batch_limits(key), widths=widths)
        while pending:
            batch = pending[0]
            try:
                run(batch)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if len(batch) == 1:
                    raise ModelError("one prompt alone does not fit into memory; try a smaller --dtype") from error
                self._limit[key] = len(batch) * max(lengths[i] for i in batch) // 2
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                left = sorted(i for batch in pending for i in batch)
                costs, tokens = ([values[i] for i in left] for values in (lengths, widths))
                plan = plan_batches(costs, limits=self.batch_limits(key), widths=tokens)
                pending = [[left[i] for i in batch] for batch in plan]
                continue
            pending = pending[1:]

    @staticmethod
    def cached_share(n_cached: int) -> int:
        """Return what a cache of some tokens costs each row of a batch, in tokens of computation."""
        return n_cached // CACHED_TOKENS_PER_TOKEN

    @property
    def tokens_per_batch(self) -> int:
        """How many tokens one forward pass takes at most, padding included."""
        return self._limit.get("forward", TOKENS_PER_BATCH.get(self.device.type, TOKENS_PER_BATCH["cuda"]))

    def batch_limits(self, key: str = "forward") -> BatchLimits:
        """Return how large batches may be; `key` is forward or generate."""
        kind = self.device.type if self.device.type in TOKENS_PER_BATCH else "cuda"
        # A decoded token of a row is computed alone: twice as many rows keep the device as busy.
        tokens = TOKENS_PER_BATCH[kind] * (2 if key == "generate" else 1)
        if self.batch_size is not None:
            tokens = sys.maxsize
        return BatchLimits(
            tokens=self._limit.get(key, tokens),
            rows=self.batch_size,
            overhead=BATCH_OVERHEAD[kind],
            equal=feels_padding(self.model.config),
        )

    @torch.inference_mode()
    def run_prefix(self, prefix: Sequence[int], *, n_variants: int = 1) -> PrefixCache | None:
        """Return the keys and values of a row of tokens, or None where no cache of them would be exact.

        Args:
            prefix: token ids.
            n_variants: how many times to run it, in one batch, whose rows an intervention may tell apart.
        """
        return self._run_prefix(prefix, n_variants)

    def _run_prefix(self, prefix: Sequence[int], n_variants: int = 1) -> PrefixCache | None:
        cache = empty_cache(self.model.config, longest=len(prefix))
        if cache is None:
            return None
        ids = torch.tensor([list(prefix)] * n_variants, device=self.device)
        self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=self.last_tokens(len(prefix)))
        return PrefixCache(cache=cache, n_tokens=len(prefix))

    def differentiable_logits(self, rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[Tensor]:
        """Return the logits at the last tokens of the rows of one batch, [length, vocab] of each; gradients flow.

        Tokens that all rows begin with are run once.

        Args:
            rows: token ids.
            lengths: at how many of the last tokens of each row.
        """
        if len(rows) > 1 and self.batch_limits().equal:
            return [self.differentiable_logits([row], [n])[0] for row, n in zip(rows, lengths, strict=True)]
        n_cached = self.shareable_prefix(rows, keep=lengths)
        cache = self._run_prefix(rows[0][:n_cached]) if n_cached else None
        batch = [list(row[n_cached:]) for row in rows]
        logits = self._forward(batch, cache=cache, n_cached=n_cached, n_logits=max(lengths))
        if max(lengths) == 1:
            return [row[None] for row in logits]
        return [row[-length:] for row, length in zip(logits, lengths, strict=True)]


def make_chat_model(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    name: str = "the model",
    options: ModelOptions | None = None,
    needs_template: bool = True,
) -> ChatModel:
    """Wrap a loaded model, which is put into evaluation mode: find its decoder blocks and its chat template's shape.

    Raises:
        ModelError: there is no chat template and one is needed, or the decoder blocks cannot be found.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if needs_template and not has_template:
        raise ModelError(f"{name} has no chat template; use its instruction-tuned version")
    options = options or ModelOptions()
    model.eval()
    widen_products(model)
    text_config = model.config.get_text_config(decoder=True)
    n_layers = int(text_config.num_hidden_layers)
    return ChatModel(
        model=model,
        tokenizer=tokenizer,
        blocks=find_blocks(model, n_layers, name),
        d_model=int(text_config.hidden_size),
        chat_format=find_chat_format(tokenizer, system_prompt=options.system_prompt, name=name)
        if has_template
        else ChatFormat(n_positions=0, post_instruction_tokens=()),
        batch_size=options.batch_size,
        system_prompt=options.system_prompt,
    )


def with_response_prefix(chat: ChatModel, response_prefix: str) -> ChatModel:
    """Return the same model with `response_prefix` forced at the start of each answer."""
    if not response_prefix:
        return chat
    texts = chat.chat_format.post_instruction_tokens + token_texts(chat.tokenizer, response_prefix)
    chat_format = replace(
        chat.chat_format,
        n_positions=len(texts),
        post_instruction_tokens=texts,
        response_prefix=chat.chat_format.response_prefix + response_prefix,
    )
    return replace(chat, chat_format=chat_format)


def stop_tokens(chat: ChatModel) -> set[int]:
    """Return the tokens that end an answer: those that are configured so, and what the template ends a turn with.

    Raises:
        ModelError: what is configured is no token.
    """
    configured = getattr(chat.model.generation_config, "eos_token_id", None)
    ids = [each for each in (configured if isinstance(configured, list) else [configured]) if each is not None]
    if not all(type(each) is int and each >= 0 for each in ids):
        raise ModelError(
            f"the model's eos_token_id is {shown(configured)}, and a token's number is needed; mend it in "
            "generation_config.json or config.json"
        )
    return {int(i) for i in [*ids, chat.tokenizer.eos_token_id, *chat.chat_format.turn_ends] if i is not None}


def conditions_of(chat: ChatModel) -> dict[str, Any]:
    """Return what replies and numbers depend on besides files, prompts and hooks, as plain values for a cache's key."""
    return {
        "dtype": str(chat.model.dtype),
        "device": chat.device.type,
        "ends": sorted(stop_tokens(chat)),
        "versions": versions("abliterate", "python", "torch", "transformers"),
    }
