"""Where in a model a direction shows: cosines through the layers, who writes it, and what those heads attend to.

Arditi et al. 2024, section 5 and appendix J. Layer l is the input of block l; the last entry of each profile is the
stream after the last block. Nothing is changed in the model.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from abliterate.checkpoints.model_source import ModelSource
from abliterate.directions import Direction, load_direction
from abliterate.errors import DirectionError, InputError, ModelError, UnsupportedArchitectureError
from abliterate.interventions.contributions import (
    BlockParts,
    Contributions,
    HeadsUnknownError,
    find_block_parts,
    n_heads_of,
)
from abliterate.interventions.trace_report import (
    DEFAULT_SETS,
    LAST_TOKEN,
    HeadAttention,
    LayerProfile,
    SetContributions,
    SuffixInfo,
    TokenTrace,
    TopHead,
    TracedSet,
    TraceOptions,
    TraceReport,
)
from abliterate.interventions.traced_stream import (
    StreamTrace,
    SuffixKind,
    TracedPrompt,
    random_suffixes,
    suffix_tokens,
    trace_attention,
    trace_stream,
    traced_prompts,
)
from abliterate.models.chat_model import ChatModel
from abliterate.models.loading import open_as_extracted
from abliterate.models.options import ModelOptions
from abliterate.progress import SILENT, ProgressReporter
from abliterate.prompt_sets import Kind, PromptSet, load_prompt_set


def trace_direction(
    *,
    model: "str | Path | ModelSource | ChatModel",
    direction: Direction | Path,
    options: TraceOptions | None = None,
    model_options: ModelOptions | None = None,
    progress: ProgressReporter = SILENT,
) -> TraceReport:
    """Measure where a direction shows in the residual stream and what writes it there.

    The system prompt and the forced answer prefix that the direction was extracted with are used, unless
    `model_options` gives a system prompt. Where the heads of the architecture are not known, or do not sum to the
    stream, there are cosines without a table of heads, and the report says why.

    Args:
        model: a directory, a Hub id, a resolved source or a loaded model.
        direction: a direction or its file.
        options: see `TraceOptions`.
        model_options: how to load and run the model.
        progress: where to show progress.

    Raises:
        InputError: the options do not fit the model.
        DirectionError: the direction cannot be read or has another width.
        PromptSetError: a SPEC cannot be read.
        ModelError: the model does not load as a chat model, or its blocks have no one input each.
    """
    options = options or TraceOptions()
    loaded = load_direction(direction) if isinstance(direction, Path) else direction
    if options.n_prompts < 1 or options.n_top_heads < 1 or not options.prompts:
        raise InputError("a trace needs at least one prompt set, one prompt and one head")
    sets = [_load_set(spec, options.n_prompts) for spec in options.prompts]
    opened = open_as_extracted(model, loaded, options=model_options or ModelOptions(), progress=progress)
    name, chat = opened.name, opened.chat
    if loaded.d_model != chat.d_model:
        raise DirectionError(f"the direction has {loaded.d_model} entries; the width of {name} is {chat.d_model}")
    _check_one_stream(chat, name)
    return _Trace(chat=chat, direction=loaded, options=options, progress=progress).run(name, sets)


def _check_one_stream(chat: ChatModel, name: str) -> None:
    try:
        reason = chat.stream.not_extracted
    except (ModelError, UnsupportedArchitectureError):
        # What writes to its stream is not known; what comes into its blocks can be traced all the same.
        return
    if reason is not None:
        raise ModelError(f"{name}: its residual stream cannot be traced: {reason}; use another model")


def _load_set(spec: str, n_prompts: int) -> PromptSet:
    if spec in DEFAULT_SETS:
        prompts = load_prompt_set("bundled", kind=cast(Kind, spec), part="test")
    else:
        prompts = load_prompt_set(spec, kind="harmful", part="test").distinct()
    n = min(n_prompts, len(prompts))
    return replace(prompts, name=spec, texts=prompts.texts[:n], ids=prompts.ids[:n], categories=prompts.categories[:n])


@dataclass(frozen=True, slots=True, kw_only=True)
class _TracedSet:
    """One prompt set with one kind of suffix, as it was run."""

    name: str
    suffix: SuffixKind
    prompts: list[TracedPrompt]
    stream: StreamTrace


class _Trace:
    """One trace of a loaded model."""

    def __init__(
        self, *, chat: ChatModel, direction: Direction, options: TraceOptions, progress: ProgressReporter
    ) -> None:
        self._chat = chat
        self._direction = direction
        self._options = options
        self._progress = progress
        self._unit = direction.vector.to(chat.device, torch.float64)
        self._layer = _layer_of(direction, options, chat.n_layers)
        self._heads_unavailable: str | None = None
        self._attention_unavailable: str | None = None
        self._parts = self._find_parts()

    def run(self, name: str, sets: list[PromptSet]) -> TraceReport:
        """Trace every set with every kind of suffix, then the top heads' attention, then the one prompt."""
        chat, options = self._chat, self._options
        suffix = suffix_tokens(chat, options.suffix) if options.suffix is not None else None
        kinds: tuple[SuffixKind, ...] = ("none",) if suffix is None else ("none", "given", "random")
        traced = [self._trace(prompts, kind, suffix or []) for prompts in sets for kind in kinds]
        top = self._top_heads(traced[0].stream)
        attention = self._attention(traced, top)
        for reason in dict.fromkeys([self._heads_unavailable, self._attention_unavailable]):
            if reason is not None:
                self._progress.message(f"no table of heads: {reason}")
        return TraceReport(
            model=name,
            direction_sha256=self._direction.sha256,
            layer=self._layer,
            n_layers=chat.n_layers,
            n_heads=n_heads_of(chat),
            post_instruction_tokens=chat.chat_format.post_instruction_tokens,
            suffix=None if suffix is None else SuffixInfo(text=options.suffix or "", n_tokens=len(suffix)),
            sets=tuple(self._summarize(one, seen) for one, seen in zip(traced, attention, strict=True)),
            top_heads=top,
            heads_unavailable=self._heads_unavailable,
            attention_unavailable=self._attention_unavailable,
            prompt=self._token_trace(),
        )

    def _find_parts(self) -> tuple[BlockParts, ...] | None:
        try:
            return find_block_parts(self._chat)
        except HeadsUnknownError as error:
            self._give_up_heads(error)
            return None

    def _give_up_heads(self, error: HeadsUnknownError) -> None:
        self._parts = None
        self._heads_unavailable = self._attention_unavailable = str(error)

    def _trace(self, prompts: PromptSet, kind: SuffixKind, suffix: list[int]) -> _TracedSet:
        n = len(prompts)
        suffixes: list[list[int]] | None = None
        if kind == "given":
            suffixes = [suffix] * n
        elif kind == "random":
            suffixes = random_suffixes(self._chat, n_tokens=len(suffix), n_prompts=n, seed=self._options.seed)
        rows = traced_prompts(self._chat, prompts.texts, suffixes=suffixes)
        label = {"none": "", "given": " with the suffix", "random": " with random suffixes"}[kind]
        with self._progress.task(f"Tracing {prompts.name}{label}", total=n) as advance:
            try:
                stream = trace_stream(self._chat, rows, self._unit, parts=self._parts, advance=advance)
            except HeadsUnknownError as error:
                self._give_up_heads(error)
                stream = trace_stream(self._chat, rows, self._unit, parts=None, advance=advance)
        return _TracedSet(name=prompts.name, suffix=kind, prompts=rows, stream=stream)

    def _top_heads(self, stream: StreamTrace) -> tuple[TopHead, ...]:
        if stream.contributions is None or self._parts is None:
            return ()
        mean = stream.contributions.heads.mean(dim=0)
        # What is written at or after the direction's layer is no part of the component there.
        before = mean[: self._layer] if self._layer else mean
        flat, n_heads = before.flatten(), before.shape[1]
        order = flat.argsort(descending=True)[: self._options.n_top_heads].tolist()
        return tuple(TopHead(layer=i // n_heads, head=i % n_heads, contribution=float(flat[i])) for i in order)

    def _attention(self, traced: list[_TracedSet], top: tuple[TopHead, ...]) -> list[tuple[HeadAttention, ...] | None]:
        if self._parts is None:
            return [None] * len(traced)
        heads = [(head.layer, head.head) for head in top]
        found: list[tuple[HeadAttention, ...] | None] = []
        with self._progress.task("Reading the top heads' attention", total=len(traced)) as advance:
            for one in traced:
                try:
                    shares = trace_attention(self._chat, one.prompts, heads, parts=self._parts)
                except HeadsUnknownError as error:
                    self._attention_unavailable = str(error)
                    return [None] * len(traced)
                found.append(tuple(_head_attention(key, row) for key, row in zip(heads, shares.tolist(), strict=True)))
                advance(1)
        return found

    def _summarize(self, one: _TracedSet, attention: tuple[HeadAttention, ...] | None) -> TracedSet:
        contributions = one.stream.contributions if self._parts is not None else None
        return TracedSet(
            name=one.name,
            suffix=one.suffix,
            n_prompts=len(one.prompts),
            cosines=_profiles(one),
            contributions=None if contributions is None else _mean_contributions(contributions),
            attention=attention,
        )

    def _token_trace(self) -> TokenTrace | None:
        if self._options.prompt is None or self._layer is None:
            return None
        rows = traced_prompts(self._chat, [self._options.prompt])
        stream = trace_stream(self._chat, rows, self._unit, parts=None, advance=lambda _n: None)
        return TokenTrace(
            layer=self._layer,
            tokens=tuple(self._chat.decode([token], skip_special_tokens=False) for token in rows[0].tokens),
            components=tuple(stream.components[0][:, self._layer].tolist()),
            cosines=tuple(tuple(row) for row in stream.cosines[0].tolist()),
        )


def _layer_of(direction: Direction, options: TraceOptions, n_layers: int) -> int | None:
    layer = options.layer if options.layer is not None else direction.metadata.get("layer")
    if layer is None:
        if options.prompt is not None:
            raise InputError("the direction file names no layer, so --prompt needs --layer L")
        return None
    if not isinstance(layer, int) or not 0 <= layer <= n_layers:
        raise InputError(f"layer {layer!r} is not one of this model's, which are 0 to {n_layers}")
    return layer


def _profiles(one: _TracedSet) -> dict[str, LayerProfile]:
    n_post = one.prompts[0].n_post
    groups = {LAST_TOKEN: [c[-1] for c in one.stream.cosines]}
    groups |= {str(p): [c[p] for c in one.stream.cosines] for p in range(-n_post, 0)}
    for name in ("instruction", "suffix"):
        spans = [getattr(prompt, name) for prompt in one.prompts]
        if all(spans):
            groups[name] = [c[s.start : s.stop].mean(dim=0) for c, s in zip(one.stream.cosines, spans, strict=True)]
    return {name: _profile(torch.stack(values)) for name, values in groups.items()}


def _profile(values: Tensor) -> LayerProfile:
    sd = values.std(dim=0) if len(values) > 1 else torch.zeros(values.shape[1])
    return LayerProfile(mean=tuple(values.mean(dim=0).tolist()), sd=tuple(sd.tolist()))


def _mean_contributions(contributions: Contributions) -> SetContributions:
    return SetContributions(
        component=_profile(contributions.component),
        embedding=float(contributions.embedding.mean()),
        heads=tuple(tuple(row) for row in contributions.heads.mean(dim=0).tolist()),
        biases=tuple(contributions.biases.mean(dim=0).tolist()),
        mlps=tuple(contributions.mlps.mean(dim=0).tolist()),
        largest_gap=contributions.largest_gap(),
    )


def _head_attention(key: tuple[int, int], shares: list[float]) -> HeadAttention:
    template, instruction, suffix, post = shares
    return HeadAttention(
        layer=key[0], head=key[1], template=template, instruction=instruction, suffix=suffix, post_instruction=post
    )
