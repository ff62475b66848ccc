"""Judging candidates by whole replies: to confirm a choice, and where no score from forward passes tells refusals.

Each candidate costs two rounds of generation, so few are looked at: the best by score, or those that part harmful from
harmless prompts best.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

import torch
from torch import Tensor

from abliterate.extraction.behaviour import ReplyRun, ShortReply
from abliterate.extraction.scoring import kl_divergence
from abliterate.extraction.selection import Candidate, CandidateScore, PromptScores, ScoreName
from abliterate.models.chat_model import ChatModel
from abliterate.models.hooks import Recording, ablate_direction, ablate_subspace, add_direction
from abliterate.progress import SILENT, ProgressReporter

N_CANDIDATES = 12
"""So many candidates are judged by replies where nothing else tells refusals."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmation:
    """What the model's replies are under one candidate, on validation prompts that are filtered.

    Attributes:
        position: post-instruction position, negative.
        layer: block whose input it was read from.
        unanswered: harmful prompts without an answer when it is ablated; the unchanged model refuses them all.
        n_harmful: how many there are.
        induced: harmless prompts that are refused when it is added; the unchanged model answers them all.
        n_harmless: how many there are.
    """

    position: int
    layer: int
    unanswered: int
    n_harmful: int
    induced: int
    n_harmless: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Screener:
    """Generates replies with candidates ablated or added.

    Attributes:
        replies: how replies are generated and read.
        candidates: [n_pos, n_layers, d_model], un-normalised.
        harmful_rows: token ids of the harmful validation prompts.
        harmless_rows: token ids of the harmless ones.
    """

    replies: ReplyRun
    candidates: Tensor
    harmful_rows: Sequence[Sequence[int]]
    harmless_rows: Sequence[Sequence[int]]

    def ablated(self, key: Candidate) -> list[ShortReply]:
        """Return the replies to the harmful prompts with a candidate ablated."""
        return self._read(ablate_direction(self.replies.chat, self.candidates[key]), self.harmful_rows)

    def added(self, key: Candidate) -> list[ShortReply]:
        """Return the replies to the harmless prompts with a candidate added at its own layer."""
        return self._read(add_direction(self.replies.chat, self.candidates[key], layer=key[1]), self.harmless_rows)

    def without(self, basis: Tensor) -> list[ShortReply]:
        """Return the replies to the harmful prompts with what `basis` [k, d_model] spans ablated."""
        return self._read(ablate_subspace(self.replies.chat, basis), self.harmful_rows)

    def confirm(self, keys: Sequence[Candidate], *, progress: ProgressReporter) -> list[Confirmation]:
        """Return what each candidate does to the replies, in the order of `keys`; all are decoded side by side."""
        chat, n = self.replies.chat, len(keys)
        vectors = torch.stack([self.candidates[key] for key in keys])
        # Of each variant what is ablated, and what is added, at which layer: a zero vector does nothing.
        ablated, added = torch.cat([vectors, 0 * vectors]), torch.cat([0 * vectors, vectors])
        layers = torch.tensor([layer for _, layer in keys] * 2)

        @contextmanager
        def intervene(variants: Sequence[int]) -> Iterator[None]:
            index = torch.tensor(list(variants))
            with ExitStack() as stack:
                stack.enter_context(ablate_direction(chat, ablated[index]))
                for layer in sorted({layer for _, layer in keys}):
                    at_layer = (layers[index] == layer)[:, None] * added[index]
                    stack.enter_context(add_direction(chat, at_layer, layer=layer))
                yield

        asked = [(row, v) for v in range(n) for row in self.harmful_rows]
        asked += [(row, n + v) for v in range(n) for row in self.harmless_rows]
        replies = self.replies.read(
            [row for row, _ in asked],
            progress=progress,
            task="Confirming by replies",
            variants=[variant for _, variant in asked],
            intervene=intervene,
        )
        of_variant = [[r for r, (_, of) in zip(replies, asked, strict=True) if of == v] for v in range(2 * n)]
        return [
            Confirmation(
                position=key[0],
                layer=key[1],
                unanswered=sum(not reply.answered for reply in of_variant[v]),
                n_harmful=len(self.harmful_rows),
                induced=sum(reply.refused for reply in of_variant[n + v]),
                n_harmless=len(self.harmless_rows),
            )
            for v, key in enumerate(keys)
        ]

    def _read(self, hooks: AbstractContextManager[int], rows: Sequence[Sequence[int]]) -> list[ShortReply]:
        with hooks:
            return self.replies.read(rows, progress=SILENT)


def order_confirmed(passing: Sequence[CandidateScore], found: Sequence[Confirmation]) -> list[CandidateScore]:
    """Return candidates with those that were confirmed first, the best of them by their replies.

    Fewest harmful prompts unanswered, then most harmless ones refused, then the order there was.
    """
    by_key = {(one.position, one.layer): one for one in found}
    confirmed = [score for score in passing if (score.position, score.layer) in by_key]
    rest = [score for score in passing if (score.position, score.layer) not in by_key]

    def key(score: CandidateScore) -> tuple[int, int]:
        one = by_key[score.position, score.layer]
        return one.unanswered, -one.induced

    return [*sorted(confirmed, key=key), *rest]


def alike(best: Sequence[float], other: Sequence[float]) -> bool:
    """Tell whether another candidate's score, prompt by prompt, is above the best one's by no more than noise.

    Noise is two standard errors of the mean of the differences.
    """
    differences = [b - a for a, b in zip(best, other, strict=True)]
    if len(differences) < 2:
        return fmean(differences) <= 0
    return fmean(differences) <= 2 * stdev(differences) / sqrt(len(differences))


class ReplyScorer:
    """Scores candidates by whole replies: the last resort, where no forward pass tells refusals from answers.

    Bypass is -1 for each harmful prompt that is answered and 1 for each that is not; induce is 1 for each harmless
    prompt that is refused and -1 for each that is not; KL is the published score.

    Args:
        screener: generates the replies.
        base_harmless_logits: the unchanged model's at the harmless prompts' last tokens, [n_harmless, vocab].
    """

    kl_at_once: int | None = 1

    def __init__(self, *, screener: Screener, base_harmless_logits: Tensor) -> None:
        self._screener = screener
        self._base = base_harmless_logits

    @property
    def _chat(self) -> ChatModel:
        return self._screener.replies.chat

    def n_prompts(self, score: ScoreName) -> int:
        """Return of how many prompts a score is the mean."""
        return len(self._screener.harmful_rows if score == "bypass" else self._screener.harmless_rows)

    def groups(self, score: ScoreName, candidates: Sequence[Candidate]) -> list[list[Candidate]]:  # noqa: ARG002
        """Return candidates one by one."""
        return [[key] for key in candidates]

    def score(self, score: ScoreName, candidates: Sequence[Candidate]) -> list[PromptScores]:
        """Return the values of a score for each candidate, prompt by prompt."""
        wanted: tuple[ScoreName, ...] = ("bypass", "kl") if score == "ablated" else (score,)
        compute: Mapping[ScoreName, Callable[[Candidate], tuple[float, ...]]] = {
            "induce": lambda key: _signs(reply.refused for reply in self._screener.added(key)),
            "bypass": lambda key: _signs(not reply.answered for reply in self._screener.ablated(key)),
            "kl": lambda key: self._kl(ablate_direction(self._chat, self._screener.candidates[key])),
        }
        return [{name: compute[name](key) for name in wanted} for key in candidates]

    def score_together(self, basis: Tensor) -> PromptScores:
        """Return bypass and KL, prompt by prompt, with what `basis` [k, d_model] spans ablated."""
        bypass = _signs(not reply.answered for reply in self._screener.without(basis))
        return {"bypass": bypass, "kl": self._kl(ablate_subspace(self._chat, basis))}

    def _kl(self, hooks: AbstractContextManager[int]) -> tuple[float, ...]:
        with hooks:
            logits = self._chat.last_logits(self._screener.harmless_rows)
        return tuple(kl_divergence(self._base, logits).tolist())


def _signs(values: Iterable[bool]) -> tuple[float, ...]:
    return tuple(1.0 if value else -1.0 for value in values)


def separations(
    candidates: Tensor, keys: Sequence[Candidate], *, harmful: Recording, harmless: Recording
) -> dict[Candidate, float]:
    """Return how far each candidate parts the two kinds of prompts.

    That is the difference of the mean components along it, in pooled standard deviations (Cohen's d).

    Args:
        candidates: [n_pos, n_layers, d_model], un-normalised.
        keys: which of them.
        harmful: recording of prompts the candidates were not made of.
        harmless: the same, harmless.
    """
    found = {}
    for position, layer in keys:
        unit = candidates[position, layer] / candidates[position, layer].norm()
        a, b = (recorded.activations[:, position, layer].double() @ unit for recorded in (harmful, harmless))
        pooled = ((a.var(correction=0) + b.var(correction=0)) / 2).sqrt().clamp(min=1e-12)
        found[position, layer] = float((a.mean() - b.mean()) / pooled)
    return found


def propose(separation: Mapping[Candidate, float], n: int, *, first: Sequence[Candidate] = ()) -> list[Candidate]:
    """Return `n` candidates to look at: those named, then those that separate best, one a layer before a second."""
    chosen = list(first[:n])
    ordered = sorted(separation, key=lambda key: -separation[key])
    best_of_layer = [key for i, key in enumerate(ordered) if key[1] not in {k[1] for k in ordered[:i]}]
    for key in [*best_of_layer, *ordered]:
        if len(chosen) < n and key not in chosen:
            chosen.append(key)
    return chosen
