"""The three scores of a candidate direction: bypass, induce and KL (Arditi et al. 2024, section 2.3, appendix C).

Nothing is approximated: the same forward passes as the published procedure, with the tokens that all prompts share
run once per candidate, several candidates in one batch, the last MLP and logits at the last token only, and activation
addition restarted at its own block.

Where layers are streamed the values are the same, from a fixed number of readings: one records all prompts, one adds
every candidate at its own layer, one ablates every candidate that is left; see `streamed_model`.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import groupby
from statistics import fmean as mean
from typing import Any

import torch
from torch import Tensor

from abliterate.extraction.refusal import RefusalMeasure, in_parts, measure_refusal, refusal_metric
from abliterate.extraction.selection import Candidate, PromptScores, ScoreName
from abliterate.models.chat_model import ChatModel, PrefixCache
from abliterate.models.hooks import (
    Recording,
    ablate_direction,
    ablate_subspace,
    add_direction,
    capture_inputs,
    finish_with_last_tokens,
    start_at_block,
)
from abliterate.models.stream_probe import StreamProbe, probe_stream
from abliterate.models.streamed_model import StreamedChat, Variant

KL_EPSILON = 1e-6
"""Added inside both logarithms of the KL divergence (the published code's value)."""
BATCHES_PER_GROUP = 4
"""Candidates are run in groups that fill so many batches: enough rows of like length to batch without padding."""
KEPT_BATCHES = 2
"""So many batches' tokens may have their keys and values kept for a score."""


def kl_divergence(base_logits: Tensor, logits: Tensor) -> Tensor:
    """Return KL(base || other) of next-token distributions, in nats, float64.

    Args:
        base_logits: [..., vocab].
        logits: [..., vocab].
    """
    found = [
        _kl(torch.softmax(base.to(torch.float64), dim=-1), torch.softmax(other.to(torch.float64), dim=-1))
        for base, other in zip(in_parts(base_logits), in_parts(logits), strict=True)
    ]
    return torch.cat(found).reshape(logits.shape[:-1])


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (torch.log(p + KL_EPSILON) - torch.log(q + KL_EPSILON))).sum(dim=-1)


def _measurable(logits: Tensor) -> Tensor:
    """Return logits where float64 is had: on the GPU that computed them, which saves the journey, or on the CPU."""
    return logits if logits.is_cuda else logits.float().cpu()


class CandidateScorer:
    """Computes scores of candidates on the validation prompts.

    Args:
        chat: the model.
        candidates: [n_pos, n_layers, d_model], un-normalised; positions -n_pos .. -1.
        harmful_rows: token ids of the harmful validation prompts, after which refusing is asked for.
        harmless_rows: token ids of the harmless validation prompts, for KL and induce.
        measure: how refusing is asked for.
        inducing_rows: what induce is asked after instead of the harmless prompts; None: those.
        probe: what was found about the model's blocks; None to find out.
    """

    kl_at_once: int | None = 1

    def __init__(
        self,
        *,
        chat: ChatModel,
        candidates: Tensor,
        harmful_rows: Sequence[Sequence[int]],
        harmless_rows: Sequence[Sequence[int]],
        measure: RefusalMeasure,
        inducing_rows: Sequence[Sequence[int]] | None = None,
        probe: StreamProbe | None = None,
    ) -> None:
        self._chat = chat
        self._candidates = candidates
        self._measure = measure
        asked = measure.ask(harmless_rows if inducing_rows is None else inducing_rows)
        self._probe = probe or probe_stream(chat)
        self._stream = _RecordedInputs(chat, asked, self._probe, keep=measure.n_logits)
        plain = asked == [list(row) for row in harmless_rows]
        self.base_harmless_logits = self._stream.logits if plain else _measurable(chat.last_logits(harmless_rows))
        asked = measure.ask(harmful_rows)
        self._n_harmful = len(asked)
        self._n_asked = max(1, len(asked) // max(1, len(harmful_rows)))
        self._n_inducing = len(harmless_rows if inducing_rows is None else inducing_rows)
        rows = [*asked, *harmless_rows]
        n_cached = chat.shareable_prefix(rows, keep=measure.n_logits)
        self._prefix = list(rows[0][:n_cached])
        self._rows = [list(row[n_cached:]) for row in rows]
        self._ablated_prefixes = _Prefixes(self._run_ablated_prefix)
        self._added_prefixes = _Prefixes(self._run_added_prefix)

    def enter(self, score: ScoreName, candidates: Sequence[Candidate]) -> None:
        """Expect to be asked for a score of these several times: the tokens that prompts share are run but once.

        They are run for these together, whichever of them are asked for: a run that goes on where another stopped
        rounds as that did.
        """
        prefixes, length = self._prefixes(score), max(1, len(self._prefix))
        if (prefixes.n_kept + len(candidates)) * length > KEPT_BATCHES * self._chat.tokens_per_batch:
            return
        if score == "induce":
            for group in self.groups(score, candidates):
                prefixes.keep(group)
        else:
            for start in range(0, len(candidates), self._largest_group):
                prefixes.keep(candidates[start : start + self._largest_group])

    def _prefixes(self, score: ScoreName) -> "_Prefixes":
        return self._added_prefixes if score == "induce" else self._ablated_prefixes

    def groups(
        self, score: ScoreName, candidates: Sequence[Candidate], prompts: range | None = None
    ) -> list[list[Candidate]]:
        """Divide candidates into the groups that `score` is best asked for one after another."""
        if score == "induce":
            by_layer = sorted(candidates, key=lambda key: -key[1])
            return [list(group) for _, group in groupby(by_layer, key=lambda key: key[1])]
        n_tokens = sum(len(self._rows[i]) for i in self._indices(score, prompts))
        size = max(1, min(self._largest_group, -(-BATCHES_PER_GROUP * self._chat.tokens_per_batch // n_tokens)))
        return [list(candidates[start : start + size]) for start in range(0, len(candidates), size)]

    def n_prompts(self, score: ScoreName) -> int:
        """Return of how many prompts a score is the mean."""
        return {"bypass": self._n_harmful // self._n_asked, "induce": self._n_inducing}.get(
            score, len(self._rows) - self._n_harmful
        )

    def score(
        self, score: ScoreName, candidates: Sequence[Candidate], prompts: range | None = None
    ) -> list[PromptScores]:
        """Return the values of a score for each candidate, prompt by prompt.

        Args:
            score: which; "ablated" stands for bypass and KL together, which share the candidate's prefix.
            candidates: of which candidates.
            prompts: on which prompts; None: on all.
        """
        if score == "induce":
            return self._induce(candidates, prompts)
        indices = self._indices(score, prompts)
        # Where more than the last logits are asked for, harmless prompts are a pass of their own.
        parts = [indices]
        if score == "ablated" and self._measure.n_logits > 1:
            parts = [self._indices("bypass"), self._indices("kl")]
        values = torch.zeros(len(candidates), len(self._rows), dtype=torch.float64)
        for part in parts:
            self._ablated(candidates, part, values)
        found: list[PromptScores] = []
        for bypass, kl in zip(*self._split(values, prompts), strict=True):
            scores: dict[ScoreName, tuple[float, ...]] = {}
            if score != "kl":
                scores["bypass"] = tuple(bypass)
            if score != "bypass":
                scores["kl"] = tuple(kl)
            found.append(scores)
        return found

    def _split(self, values: Tensor, prompts: range | None = None) -> tuple[list[list[float]], list[list[float]]]:
        n, chosen = self._n_harmful, slice(None) if prompts is None else slice(prompts.start, prompts.stop)
        return self._measure.combine(values[:, :n])[:, chosen].tolist(), values[:, n:][:, chosen].tolist()

    def _ablated(self, candidates: Sequence[Candidate], indices: range, values: Tensor) -> None:
        """Fill in, of each candidate, the values [n_candidates, n_rows] of some rows."""
        n_logits = self._measure.n_logits if indices.start < self._n_harmful else 1

        def receive(variants: Tensor, rows: Tensor, logits: Tensor) -> None:
            places = rows + indices.start
            harmful, harmless = places < self._n_harmful, places >= self._n_harmful
            if harmful.any():
                metric = self._measure.read(logits[harmful], places[harmful])
                values[variants[harmful], places[harmful]] = metric.cpu()
            if harmless.any():
                base = self.base_harmless_logits[places[harmless] - self._n_harmful]
                values[variants[harmless], places[harmless]] = kl_divergence(base, logits[harmless]).cpu()

        self._run_ablated(candidates, [self._rows[i] for i in indices], receive, n_logits=n_logits)

    def score_together(self, basis: Tensor) -> PromptScores:
        """Return bypass and KL, prompt by prompt, with several directions ablated at once.

        Args:
            basis: [k, d_model], orthonormal rows that span them.
        """
        rows, n = [self._prefix + row for row in self._rows], self._n_harmful
        values = torch.empty(1, len(rows), dtype=torch.float64)
        with ablate_subspace(self._chat, basis):
            if self._measure.n_logits == 1:
                logits = self._chat.last_logits(rows)
                values[0, :n] = self._measure.read(logits[:n], torch.arange(n))
                values[0, n:] = kl_divergence(self.base_harmless_logits, logits[n:])
            else:
                values[0, :n] = measure_refusal(self._chat, self._measure, rows[:n])
                values[0, n:] = kl_divergence(self.base_harmless_logits, self._chat.last_logits(rows[n:]))
        bypass, kl = self._split(values)
        return {"bypass": tuple(bypass[0]), "kl": tuple(kl[0])}

    def bypass(self, position: int, layer: int) -> float:
        """Return the mean refusal metric on the harmful prompts with the candidate ablated everywhere."""
        return mean(self.score("bypass", [(position, layer)])[0]["bypass"])

    def kl(self, position: int, layer: int) -> float:
        """Return the mean KL(base || ablated) of the first answer token on the harmless prompts, in nats."""
        return mean(self.score("kl", [(position, layer)])[0]["kl"])

    def induce(self, position: int, layer: int) -> float:
        """Return the mean refusal metric on the harmless prompts with the candidate added at its own layer."""
        return mean(self.score("induce", [(position, layer)])[0]["induce"])

    @property
    def _largest_group(self) -> int:
        return max(1, self._chat.tokens_per_batch // max(1, len(self._prefix)))

    def _indices(self, score: ScoreName, prompts: range | None = None) -> range:
        first = self._n_harmful if score == "kl" else 0
        if prompts is not None:
            n = self._n_asked if score == "bypass" else 1
            return range(first + prompts.start * n, first + prompts.stop * n)
        return range(first, self._n_harmful if score == "bypass" else len(self._rows))

    def _vectors(self, candidates: Sequence[Candidate]) -> Tensor:
        return torch.stack([self._candidates[position, layer] for position, layer in candidates])

    def _induce(self, candidates: Sequence[Candidate], prompts: range | None) -> list[PromptScores]:
        found: dict[Candidate, tuple[float, ...]] = {}
        for group in self.groups("induce", candidates):
            metric = self._stream.metric_with_addition(
                self._vectors(group),
                layer=group[0][1],
                cache=self._added_prefixes.of(group),
                measure=self._measure,
                prompts=prompts,
            )
            found |= {key: tuple(row) for key, row in zip(group, metric.tolist(), strict=True)}
        return [{"induce": found[key]} for key in candidates]

    def _run_ablated_prefix(self, candidates: Sequence[Candidate]) -> PrefixCache | None:
        if not self._prefix:
            return None
        with ablate_direction(self._chat, self._vectors(candidates)):
            return self._chat.run_prefix(self._prefix, n_variants=len(candidates))

    def _run_added_prefix(self, candidates: Sequence[Candidate]) -> PrefixCache | None:
        return self._stream.prefix_with_addition(self._vectors(candidates), layer=candidates[0][1])

    def _run_ablated(
        self,
        candidates: Sequence[Candidate],
        rows: list[list[int]],
        receive: Callable[[Tensor, Tensor, Tensor], None],
        *,
        n_logits: int,
    ) -> None:
        chat, cache, vectors = self._chat, self._ablated_prefixes.of(candidates), self._vectors(candidates)
        n_rows, n_cached = len(rows), len(self._prefix)

        def run(pairs: list[int]) -> None:
            variants, places = torch.tensor(pairs) // n_rows, torch.tensor(pairs) % n_rows
            with ablate_direction(chat, vectors[variants]), _tail(chat, self._probe, n_logits):
                logits = chat.forward(
                    [rows[i] for i in places],
                    cache=cache,
                    n_cached=n_cached,
                    variants=variants.tolist(),
                    n_logits=n_logits,
                )
            receive(variants, places, _measurable(logits))

        chat.for_batches([len(row) + chat.cached_share(n_cached) for row in rows] * len(vectors), run)


def _tail(chat: ChatModel, probe: StreamProbe, n_logits: int) -> AbstractContextManager[object]:
    return finish_with_last_tokens(chat, n_logits) if probe.mlp_by_token else nullcontext()


class _Prefixes:
    """Keys and values of the tokens that all prompts share, under candidates.

    Args:
        run: computes them, a row for each candidate; None where none are shared.
    """

    def __init__(self, run: Callable[[Sequence[Candidate]], PrefixCache | None]) -> None:
        self._run = run
        self._fields: dict[Candidate, tuple[Candidate, ...]] = {}
        self._kept: dict[tuple[Candidate, ...], PrefixCache | None] = {}

    @property
    def n_kept(self) -> int:
        """Of how many candidates they are kept."""
        return len(self._fields)

    def keep(self, candidates: Sequence[Candidate]) -> None:
        """Run those of some candidates together, when one is first asked for, and keep them."""
        field = tuple(key for key in candidates if key not in self._fields)
        self._fields |= dict.fromkeys(field, field)

    def of(self, candidates: Sequence[Candidate]) -> PrefixCache | None:
        """Return those of some candidates, in their order."""
        if any(key not in self._fields for key in candidates):
            return self._run(candidates)
        rows: list[tuple[PrefixCache, int]] = []
        for key in candidates:
            field = self._fields[key]
            if field not in self._kept:
                self._kept[field] = self._run(field)
            cache = self._kept[field]
            if cache is None:
                return None
            rows.append((cache, field.index(key)))
        return _gathered(rows)


def _gathered(rows: Sequence[tuple[PrefixCache, int]]) -> PrefixCache:
    """Return a cache made of rows of others, whose layers have but one row where all are alike."""
    first = rows[0][0]
    gathered: Any = copy.copy(first.cache)
    gathered.layers = [copy.copy(layer) for layer in first.cache.layers]
    for i, layer in enumerate(gathered.layers):
        if layer.is_initialized and layer.keys.numel():
            of_each: list[tuple[Any, int]] = [(cache.cache.layers[i], row) for cache, row in rows]
            layer.keys = torch.stack([each.keys[min(row, len(each.keys) - 1)] for each, row in of_each])
            layer.values = torch.stack([each.values[min(row, len(each.values) - 1)] for each, row in of_each])
    return PrefixCache(cache=gathered, n_tokens=first.n_tokens)


class _RecordedInputs:
    """The residual stream of some prompts at every block's input, so that a pass can start at any block.

    Attributes:
        logits: [n, vocab] of the unchanged model.
    """

    def __init__(self, chat: ChatModel, rows: Sequence[Sequence[int]], probe: StreamProbe, *, keep: int) -> None:
        self._chat = chat
        self._probe = probe
        self._prefix_hidden: dict[int, Tensor] = {}
        with capture_inputs(chat, self._prefix_hidden.__setitem__):
            self._cache, self._n_cached = chat.share_prefix(rows, keep=keep)
        self._prefix = list(rows[0][: self._n_cached])
        self._rows = [list(row[self._n_cached :]) for row in rows]
        width = max(len(row) for row in self._rows)
        # In the order of the rows, padded on the left; what stands at the padding is never attended to.
        shape = (len(rows), width, chat.d_model)
        self._inputs = [torch.zeros(shape, dtype=chat.model.dtype) for _ in chat.blocks]
        self.logits = torch.empty(0)

        def run(indices: list[int]) -> None:
            def keep(layer: int, hidden: Tensor) -> None:
                self._inputs[layer][indices, width - hidden.shape[1] :] = hidden.cpu()

            with capture_inputs(chat, keep):
                result = chat.forward([self._rows[i] for i in indices], cache=self._cache, n_cached=self._n_cached)
            result = _measurable(result)
            if not len(self.logits):
                self.logits = result.new_empty(len(rows), result.shape[-1])
            self.logits[indices] = result

        chat.for_batches([len(row) for row in self._rows], run)

    def prefix_with_addition(self, vectors: Tensor, *, layer: int) -> PrefixCache | None:
        """Return keys and values of the shared tokens, if there are any, with each of some vectors added as below."""
        if self._cache is None:
            return None
        with self._from_block(layer, self._prefix_hidden[layer].expand(len(vectors), -1, -1), vectors):
            cache = self._chat.run_prefix(self._prefix, n_variants=len(vectors))
        # The blocks that were skipped have cached nothing; theirs is the unchanged model's.
        if cache is not None and self._probe.starts_at_blocks:
            cache.cache.layers[:layer] = self._cache.cache.layers[:layer]
        return cache

    def metric_with_addition(
        self,
        vectors: Tensor,
        *,
        layer: int,
        cache: PrefixCache | None,
        measure: RefusalMeasure,
        prompts: range | None = None,
    ) -> Tensor:
        """Return the log-odds of refusing with a vector added to the input of block `layer` at all positions.

        Args:
            vectors: [n_vectors, d_model].
            layer: the block.
            cache: of these vectors; see `prefix_with_addition`.
            measure: what the rows ask for.
            prompts: of which prompts; None: of all.

        Returns:
            [n_vectors, n_prompts] float64.
        """
        chat, first, n_rows = self._chat, 0, len(self._rows)
        if prompts is not None:
            n_asked = len(measure.ask([[]]))
            first, n_rows = prompts.start * n_asked, len(prompts) * n_asked
        metric = torch.empty(len(vectors), n_rows, dtype=torch.float64)

        def run(pairs: list[int]) -> None:
            variants, places = torch.tensor(pairs) // n_rows, first + torch.tensor(pairs) % n_rows
            batch = [self._rows[i] for i in places]
            hidden = self._inputs[layer][places, -max(len(row) for row in batch) :].to(chat.device)
            with self._from_block(layer, hidden, vectors[variants]), _tail(chat, self._probe, measure.n_logits):
                logits = chat.forward(
                    batch,
                    cache=cache,
                    n_cached=self._n_cached,
                    variants=variants.tolist(),
                    n_logits=measure.n_logits,
                )
            metric[variants, places - first] = measure.read(_measurable(logits), places).cpu()

        lengths = [len(row) + chat.cached_share(self._n_cached) for row in self._rows[first : first + n_rows]]
        chat.for_batches(lengths * len(vectors), run)
        return measure.combine(metric)

    @contextmanager
    def _from_block(self, layer: int, hidden: Tensor, vectors: Tensor) -> Iterator[None]:
        with ExitStack() as stack:
            if self._probe.starts_at_blocks:
                returned = self._probe.returned
                stack.enter_context(start_at_block(self._chat, hidden, layer=layer, returned=returned))
            stack.enter_context(add_direction(self._chat, vectors, layer=layer))
            yield


@torch.inference_mode()
def record_streamed(chat: StreamedChat, rows: Sequence[Sequence[int]]) -> Recording:
    """Run the prompts once, as `hooks.record` does; reads the weights once.

    Args:
        chat: the model.
        rows: token ids of the rendered prompts.
    """
    n_positions = chat.chat_format.n_positions
    activations = torch.zeros(len(rows), n_positions, chat.n_layers, chat.d_model, dtype=chat.model.dtype)

    def keep(layer: int, indices: list[int], hidden: Tensor) -> None:
        activations[indices, :, layer] = hidden[:, -n_positions:].cpu()

    last = chat.last_hidden(rows, [Variant()], watch=keep, what="Recording, layer by layer")
    return Recording(activations=activations, logits=next(chat.logits(last)))


class StreamedScorer:
    """Computes scores of candidates on the validation prompts; each call of `score` reads the weights once.

    Args:
        chat: the model.
        candidates: [n_pos, n_layers, d_model], un-normalised; positions -n_pos .. -1.
        harmful_rows: token ids of the harmful validation prompts.
        harmless_rows: token ids of the harmless validation prompts.
        base_harmless_logits: the unchanged model's, [n_harmless, vocab].
        token_ids: the refusal tokens.
    """

    kl_at_once: int | None = None

    def __init__(
        self,
        *,
        chat: StreamedChat,
        candidates: Tensor,
        harmful_rows: Sequence[Sequence[int]],
        harmless_rows: Sequence[Sequence[int]],
        base_harmless_logits: Tensor,
        token_ids: Sequence[int],
    ) -> None:
        self._chat = chat
        self._candidates = candidates
        self._harmful_rows = harmful_rows
        self._harmless_rows = harmless_rows
        self._base = base_harmless_logits
        self._token_ids = token_ids

    def n_prompts(self, score: ScoreName) -> int:
        """Return of how many prompts a score is the mean."""
        return len(self._harmful_rows if score == "bypass" else self._harmless_rows)

    def groups(self, score: ScoreName, candidates: Sequence[Candidate]) -> list[list[Candidate]]:  # noqa: ARG002
        """Return all candidates as one group: they share one reading of the weights."""
        return [list(candidates)]

    def score(self, score: ScoreName, candidates: Sequence[Candidate]) -> list[PromptScores]:
        """Return the values of a score for each candidate, prompt by prompt; all but induce gives bypass and KL."""
        vectors = [self._candidates[key] for key in candidates]
        if score == "induce":
            added = [Variant(start=key[1], added=v) for key, v in zip(candidates, vectors, strict=True)]
            last = self._chat.last_hidden(self._harmless_rows, added, what="Induce, layer by layer")
            return [{"induce": self._metric(logits)} for logits in self._chat.logits(last)]
        return self._ablated([(vector / vector.norm())[None] for vector in vectors], "Bypass and KL, layer by layer")

    def score_together(self, basis: Tensor) -> PromptScores:
        """Return bypass and KL, prompt by prompt, with what `basis` [k, d_model] spans ablated."""
        return self._ablated([basis], "All together, layer by layer")[0]

    def _ablated(self, bases: Sequence[Tensor], what: str) -> list[PromptScores]:
        rows, n = [*self._harmful_rows, *self._harmless_rows], len(self._harmful_rows)
        last = self._chat.last_hidden(rows, [Variant(ablated=basis) for basis in bases], what=what)
        found: list[PromptScores] = []
        for logits in self._chat.logits(last):
            kl = kl_divergence(self._base, logits[n:])
            found.append({"bypass": self._metric(logits[:n]), "kl": tuple(kl.tolist())})
        return found

    def _metric(self, logits: Tensor) -> tuple[float, ...]:
        return tuple(refusal_metric(logits, token_ids=self._token_ids).tolist())
