"""Recording all prompts of an extraction and scoring its candidates: over several processes, saved as it goes.

An interrupted extraction goes on where it stopped (`SavedWork`): recordings are saved kind by kind, scores group by
group. Thresholds are no part of the key: they choose among scores and do not change them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Protocol

import torch
from torch import Tensor

from abliterate.checkpoints.saved_work import SavedWork
from abliterate.extraction.behaviour import PARTS, ReplyRun, ShortReply
from abliterate.extraction.options import Thresholds
from abliterate.extraction.racing import Certainty, race
from abliterate.extraction.scoring import record_streamed
from abliterate.extraction.selection import (
    Candidate,
    CandidateScore,
    PromptScores,
    ScoreName,
    score_exhaustively,
    score_lazily,
)
from abliterate.models.chat_model import ChatModel
from abliterate.models.hooks import Recording, record
from abliterate.models.streamed_model import StreamedChat
from abliterate.processes import Ranks
from abliterate.progress import SILENT, Advance, ProgressReporter
from abliterate.prompt_sets import ExtractionPrompts, PromptSet

ZERO_NORM = 1e-9
"""A candidate shorter than this share of the longest is a zero vector."""


def able_candidates(candidates: Tensor, *, thresholds: Thresholds) -> list[Candidate]:
    """Return the candidates that can be chosen: below the layer limit, and no zero vectors.

    Args:
        candidates: [n_pos, n_layers, d_model], un-normalised.
        thresholds: see `Thresholds`.
    """
    norms = candidates.norm(dim=-1)
    n_positions, n_layers = norms.shape
    return [
        (position, layer)
        for position in range(-n_positions, 0)
        for layer in range(min(n_layers, thresholds.layer_limit(n_layers)))
        if norms[position, layer] > ZERO_NORM * norms.max()
    ]


def saved_scores(saved: SavedWork, name: ScoreName, candidate: Candidate) -> PromptScores | None:
    """Return a candidate's saved scores of this name, or None unless all are there."""
    names: tuple[ScoreName, ...] = ("bypass", "kl") if name == "ablated" else (name,)
    found = {each: saved.value(_score_key(each, candidate)) for each in names}
    if any(values is None for values in found.values()):
        return None
    return {each: tuple(values) for each, values in found.items()}


def save_scores(saved: SavedWork, candidates: Sequence[Candidate], values: Sequence[PromptScores]) -> None:
    """Save the scores of one group of candidates, all or none."""
    saved.save_values(
        {
            _score_key(name, candidate): list(prompts)
            for candidate, scores in zip(candidates, values, strict=True)
            for name, prompts in scores.items()
        }
    )


def _score_key(name: ScoreName, candidate: Candidate) -> str:
    return f"{name} {candidate[0]} {candidate[1]}"


class RacingScorer(Protocol):
    """Computes scores of candidates on some of the prompts."""

    def enter(self, score: ScoreName, candidates: Sequence[Candidate]) -> None:
        """Expect to be asked for a score of these several times."""
        ...

    def groups(self, score: ScoreName, candidates: Sequence[Candidate], prompts: range) -> list[list[Candidate]]:
        """Divide candidates into the groups that `score` is best asked for one after another."""
        ...

    def score(self, score: ScoreName, candidates: Sequence[Candidate], prompts: range) -> list[PromptScores]:
        """Return the values of a score for each candidate on these prompts."""
        ...


class Scorer(Protocol):
    """Computes scores of candidates, prompt by prompt."""

    kl_at_once: int | None
    """For how many candidates to compute KL before looking; None: for all, together with bypass."""

    def n_prompts(self, score: ScoreName) -> int:
        """Return of how many prompts a score is the mean."""
        ...

    def groups(self, score: ScoreName, candidates: Sequence[Candidate]) -> list[list[Candidate]]:
        """Divide candidates into the groups that `score` is best asked for one after another."""
        ...

    def score(self, score: ScoreName, candidates: Sequence[Candidate]) -> list[PromptScores]:
        """Return the values of a score for each candidate, prompt by prompt."""
        ...

    def score_together(self, basis: Tensor) -> PromptScores:
        """Return bypass and KL, prompt by prompt, with what `basis` [k, d_model] spans ablated."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringRun:
    """One round of scoring.

    Attributes:
        scorer: computes scores.
        saved: where they are kept as they are computed.
        ranks: the processes that share the work.
        thresholds: see `Thresholds`.
        n_layers: number of decoder blocks.
        exhaustive: score every candidate below the layer limit, not only those the choice depends on.
        among: score these alone; None: all that can be chosen.
        enough: tells whether the candidates known to pass, the best first, are all that the choice needs.
        prompt_scores: filled with every score computed, by name and candidate, prompt by prompt.
    """

    scorer: Scorer
    saved: SavedWork
    thresholds: Thresholds
    n_layers: int
    ranks: Ranks = field(default_factory=Ranks)
    exhaustive: bool = False
    among: Sequence[Candidate] | None = None
    enough: Callable[[Sequence[CandidateScore]], bool] = bool
    progress: ProgressReporter = SILENT
    prompt_scores: dict[tuple[ScoreName, Candidate], tuple[float, ...]] = field(default_factory=dict)

    def score(self, candidates: Tensor) -> list[CandidateScore]:
        """Score what can be chosen, and return one entry per position and layer, in order.

        A zero vector (layer 0 mostly: the template's tokens are the same in all prompts) is no direction.

        Args:
            candidates: [n_pos, n_layers, d_model], un-normalised.
        """
        grid = [(p, layer) for p in range(-len(candidates), 0) for layer in range(self.n_layers)]
        able = able_candidates(candidates, thresholds=self.thresholds)
        if self.among is not None:
            able = [key for key in able if key in self.among]
        with self.progress.task("Scoring candidates", total=3 * len(able)) as advance:
            n_done = 0

            def compute(name: ScoreName, keys: Sequence[Candidate]) -> list[Mapping[ScoreName, float]]:
                def count(n: int) -> None:
                    nonlocal n_done
                    n_done += n
                    advance(n)

                return self._compute(name, keys, count)

            if self.exhaustive:
                scores = score_exhaustively(able, compute=compute)
            else:
                at_once = self.scorer.kl_at_once
                scores = score_lazily(
                    able,
                    thresholds=self.thresholds,
                    n_layers=self.n_layers,
                    compute=compute,
                    kl_at_once=None if at_once is None else max(at_once, self.ranks.count),
                    enough=self.enough,
                )
            advance(3 * len(able) - n_done)
        scored = {(score.position, score.layer): score for score in scores}
        return [scored.get(key, CandidateScore(position=key[0], layer=key[1])) for key in grid]

    def race(
        self,
        candidates: Tensor,
        scorer: RacingScorer,
        *,
        n_wanted: int,
        certainty: Certainty,
        unchanged: Sequence[float],
    ) -> tuple[list[CandidateScore], list[CandidateScore]]:
        """Score what can be chosen on as many prompts as it takes; see `racing`.

        Args:
            candidates: [n_pos, n_layers, d_model], un-normalised.
            scorer: `self.scorer`, which can be asked about some of the prompts.
            n_wanted: how many of the best to score on all prompts.
            certainty: how sure to be of what is decided on some prompts.
            unchanged: what induce is in the unchanged model, prompt by prompt.

        Returns:
            One entry per position and layer, and those that pass on all prompts, the best first.
        """
        able = able_candidates(candidates, thresholds=self.thresholds)
        names: tuple[ScoreName, ...] = ("induce", "kl", "bypass")
        with self.progress.task("Racing candidates", total=None) as advance:

            def extend(name: ScoreName, keys: Sequence[Candidate], n: int) -> dict[Candidate, tuple[float, ...]]:
                missing: dict[int, list[Candidate]] = {}
                for key in keys:
                    missing.setdefault(len(self.prompt_scores.get((name, key), ())), []).append(key)
                for start, group in sorted(missing.items()):
                    if start < n:
                        self._extend(name, group, range(start, n), scorer)
                        advance(len(group))
                return {key: self.prompt_scores[name, key][:n] for key in keys}

            scores, passing = race(
                able,
                thresholds=self.thresholds,
                n_prompts={name: self.scorer.n_prompts(name) for name in names},
                extend=extend,
                n_wanted=n_wanted,
                certainty=certainty,
                unchanged={"induce": unchanged},
            )
        grid = [(p, layer) for p in range(-len(candidates), 0) for layer in range(self.n_layers)]
        return [scores.get(key, CandidateScore(position=key[0], layer=key[1])) for key in grid], passing

    def _extend(self, name: ScoreName, keys: Sequence[Candidate], prompts: range, scorer: RacingScorer) -> None:
        # Processes that share the candidates would each compute what is kept for all.
        if prompts.start == 0 and self.ranks.count == 1:
            scorer.enter(name, keys)
        known = self.ranks.first_says([saved_scores(self.saved, name, key) for key in keys])
        for key, saved in zip(keys, known, strict=True):
            if saved is not None and len(saved[name]) >= prompts.stop:
                self.prompt_scores[name, key] = saved[name]
        left = [key for key in keys if len(self.prompt_scores.get((name, key), ())) < prompts.stop]
        groups = _at_least(self.ranks.count, scorer.groups(name, left, prompts)) if left else []
        computed = self.ranks.share(groups, lambda parts: [scorer.score(name, part, prompts) for part in parts])
        for group, values in zip(groups, computed, strict=True):
            for key, found in zip(group, values, strict=True):
                self.prompt_scores[name, key] = (*self.prompt_scores.get((name, key), ()), *found[name])
            if self.ranks.is_first:
                save_scores(self.saved, group, [{name: self.prompt_scores[name, key]} for key in group])

    def complete(self, scores: Sequence[CandidateScore], keys: Sequence[Candidate]) -> list[CandidateScore]:
        """Return the scores with bypass and KL of some candidates among them, where they are missing."""
        named = {(score.position, score.layer): score for score in scores}
        missing = [key for key in keys if named[key].bypass is None or named[key].kl is None]
        with self.progress.task("Scoring the nearest", total=2 * len(missing)) as advance:
            values = self._compute("ablated", missing, advance) if missing else []
        for key, found in zip(missing, values, strict=True):
            named[key] = named[key].with_values(found)
        return list(named.values())

    def scores_by_candidate(self) -> dict[Candidate, PromptScores]:
        """Return bypass, induce and KL, prompt by prompt, of every candidate that has all three, in their order."""
        names: tuple[ScoreName, ...] = ("bypass", "induce", "kl")
        keys = sorted({key for _, key in self.prompt_scores})
        return {
            key: {name: self.prompt_scores[name, key] for name in names}
            for key in keys
            if all((name, key) in self.prompt_scores for name in names)
        }

    def _compute(
        self, name: ScoreName, keys: Sequence[Candidate], advance: Callable[[int], None]
    ) -> list[Mapping[ScoreName, float]]:
        found: dict[Candidate, PromptScores] = {}
        groups = _at_least(self.ranks.count, self.scorer.groups(name, keys))
        for start in range(0, len(groups), self.ranks.count):
            group_of_each = groups[start : start + self.ranks.count]
            wanted = [key for group in group_of_each for key in group]
            # Only the first process reads and writes: the others may run where they cannot see its files.
            known = self.ranks.first_says([self._saved(name, key) for key in wanted])
            found |= {key: values for key, values in zip(wanted, known, strict=True) if values is not None}
            missing = [group for group in ([k for k in g if k not in found] for g in group_of_each) if group]
            computed = self.ranks.share(missing, lambda parts: [self.scorer.score(name, part) for part in parts])
            for group, values in zip(missing, computed, strict=True):
                found |= zip(group, values, strict=True)
                if self.ranks.is_first:
                    save_scores(self.saved, group, values)
            advance(len(wanted) * (2 if name == "ablated" else 1))
        self.prompt_scores.update({(each, key): v for key in keys for each, v in found[key].items()})
        return [{each: fmean(values) for each, values in found[key].items()} for key in keys]

    def _saved(self, name: ScoreName, key: Candidate) -> PromptScores | None:
        """Return saved scores, unless they are of some prompts only."""
        saved = saved_scores(self.saved, name, key)
        if saved is None or any(len(values) != self.scorer.n_prompts(each) for each, values in saved.items()):
            return None
        return saved


def _at_least(n: int, groups: list[list[Candidate]]) -> list[list[Candidate]]:
    while len(groups) < n and any(len(group) > 1 for group in groups):
        largest = max(groups, key=len)
        half = len(largest) // 2
        groups = [part for g in groups for part in ([g[:half], g[half:]] if g is largest else [g])]
    return groups


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordingRun:
    """One round of recording.

    Attributes:
        chat: the model.
        prompts: the prompts of all parts.
        saved: where recordings are kept as they are made.
        ranks: the processes that share the work.
        progress: where to show progress.
        replying: reads the reply to each prompt on the way; None: there are no replies.
        replies: filled with these, by part; not those of parts whose recordings were saved.
    """

    chat: ChatModel
    prompts: ExtractionPrompts
    saved: SavedWork
    ranks: Ranks
    progress: ProgressReporter
    replying: ReplyRun | None = None
    replies: dict[str, list[ShortReply]] = field(default_factory=dict)

    def record(self) -> dict[str, Recording]:
        """Return the recordings of all parts, those that are saved from there."""
        found = {name: self.ranks.first_says(self.saved.tensors(name)) for name in PARTS}
        # Kind by kind, so that each is saved as it is done. Streamed layers are read once for all parts. What is
        # recorded together is recorded anew together: in other batches it would be rounded otherwise.
        groups = [[name for name in PARTS if name.startswith(f"{kind}_")] for kind in ("harmful", "harmless")]
        if isinstance(self.chat, StreamedChat):
            groups = [list(PARTS)]
        for group in groups:
            if any(found[name] is None for name in group):
                found |= self._record(group)
        return {name: Recording(**tensors) for name, tensors in found.items() if tensors is not None}

    def _record(self, group: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        rows = {name: self.chat.encode(self._prompts(name).texts) for name in group}
        together = [row for name in group for row in rows[name]]
        if isinstance(self.chat, StreamedChat):
            recorded, replies = self._record_rows(together)
        else:
            names = " and ".join(self._prompts(name).name for name in group)
            with self.progress.task(f"Recording {names}", total=len(together)) as advance:
                recorded, replies = self._record_rows(together, advance)
        start, parts = 0, {}
        for name in group:
            end = start + len(rows[name])
            parts[name] = {key: tensor[start:end].clone() for key, tensor in recorded.items()}
            if self.replying is not None:
                self.replies[name] = [reply for reply in replies[start:end] if reply is not None]
            start = end
            if self.ranks.is_first:
                self.saved.save_tensors(name, parts[name])
        return parts

    def _record_rows(
        self, rows: list[list[int]], advance: Advance | None = None
    ) -> tuple[dict[str, Tensor], list[ShortReply | None]]:
        def compute(rows: Sequence[list[int]]) -> list[tuple[Tensor, Tensor, ShortReply | None]]:
            replies: list[ShortReply | None] = [None] * len(rows)

            count = None if advance is None else lambda n: advance(n * self.ranks.count)

            def receive(index: int, tokens: list[int]) -> None:
                assert self.replying is not None
                replies[index] = self.replying.classed(tokens)
                if count is not None:
                    count(1)

            if isinstance(self.chat, StreamedChat):
                recording = record_streamed(self.chat, rows)
            else:
                decoder = None if self.replying is None else self.replying.decoder
                # A prompt is done when its reply is, where there is one: that takes most of the time.
                counted = count if decoder is None else None
                recording = record(self.chat, rows, decoder=decoder, receive=receive, advance=counted)
            return list(zip(recording.activations, recording.logits, replies, strict=True))

        activations, logits, replies = zip(*self.ranks.share(rows, compute), strict=True)
        return {"activations": torch.stack(activations), "logits": torch.stack(logits)}, list(replies)

    def _prompts(self, name: str) -> PromptSet:
        prompts: PromptSet = getattr(self.prompts, name)
        return prompts
