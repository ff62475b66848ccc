"""Choosing one direction among the candidates, as the authors' published code does.

A candidate (position, layer) passes when none of its scores is NaN, `layer < int(n_layers * (1 - prune_layers))`,
`kl <= kl_threshold` and `induce >= induce_threshold`. Of those that pass, the one with the lowest bypass score is
chosen; of equal ones the first in the order of positions -n .. -1, layers 0 .. L-1. (The paper writes `l < 0.8 L`;
the published choices need the floor, see tests/golden.)
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from abliterate.extraction.options import Thresholds

NOT_SCORED = None

Candidate = tuple[int, int]
"""(position, layer)"""
ScoreName = Literal["induce", "bypass", "kl", "ablated"]
"""What can be asked for; "ablated" asks for bypass and KL together."""
PromptScores = Mapping[ScoreName, tuple[float, ...]]
"""A candidate's scores by name, prompt by prompt; a score is their mean."""
ComputeScores = Callable[[ScoreName, Sequence[Candidate]], Sequence[Mapping[ScoreName, float]]]
"""Computes scores of some candidates; returns for each the values by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateScore:
    """The scores of one candidate; None stands for a score that was not needed.

    Attributes:
        position: post-instruction position, negative.
        layer: block whose input the candidate was read from.
        bypass: mean refusal metric on harmful validation prompts under ablation (lower is better).
        induce: mean refusal metric on harmless validation prompts with the candidate added (higher is better).
        kl: mean KL(base || ablated), in nats, of the first answer token on harmless validation prompts.
    """

    position: int
    layer: int
    bypass: float | None = NOT_SCORED
    induce: float | None = NOT_SCORED
    kl: float | None = NOT_SCORED

    def with_values(self, values: Mapping[ScoreName, float]) -> "CandidateScore":
        """Return the same candidate with some of its scores known."""
        return replace(
            self,
            bypass=values.get("bypass", self.bypass),
            induce=values.get("induce", self.induce),
            kl=values.get("kl", self.kl),
        )


def failed_thresholds(score: CandidateScore, thresholds: Thresholds, n_layers: int) -> list[str]:
    """Return which conditions a candidate fails, each as a short phrase; empty when it passes.

    A score that was not computed fails nothing here.
    """
    failed = []
    values = (score.bypass, score.induce, score.kl)
    if any(value is not None and math.isnan(value) for value in values):
        failed.append("a score is NaN")
    limit = thresholds.layer_limit(n_layers)
    if score.layer >= limit:
        failed.append(f"layer {score.layer} >= {limit}")
    if score.induce is not None and score.induce < thresholds.induce:
        failed.append(f"induce {score.induce:.3f} < {thresholds.induce:g}")
    if score.kl is not None and score.kl > thresholds.kl:
        failed.append(f"KL {score.kl:.3f} > {thresholds.kl:g}")
    return failed


def passing_candidates(
    scores: Iterable[CandidateScore], *, thresholds: Thresholds, n_layers: int
) -> list[CandidateScore]:
    """Return the fully scored candidates that pass, the best (lowest bypass) first."""
    passing = [
        score
        for score in scores
        if score.bypass is not None
        and score.induce is not None
        and score.kl is not None
        and not failed_thresholds(score, thresholds, n_layers)
    ]
    return sorted(passing, key=lambda score: score.bypass if score.bypass is not None else math.inf)


def rounded_up(value: float) -> float:
    """Return a limit that a message suggests: the value with three decimals, rounded up so that it is within."""
    # The value itself is rounded: 1 - 19 / 20 is a little above 0.05.
    return math.ceil(round(1000 * value, 6)) / 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Nearest:
    """A candidate that fails, and how far it is from passing.

    Attributes:
        candidate: its scores.
        failed: what it fails, in words.
        beyond: by how much it is beyond each threshold that it fails, in the threshold's own unit.
        distance: the sum of these, made comparable: induce as a share of the gap between harmful and harmless prompts
            in the unchanged model, KL as the logarithm of its ratio to the threshold, layers as a share of all.
    """

    candidate: CandidateScore
    failed: tuple[str, ...]
    beyond: Mapping[str, float]
    distance: float


def nearest_candidates(
    scores: Iterable[CandidateScore], *, thresholds: Thresholds, n_layers: int, gap: float = 1.0, n: int = 5
) -> list[Nearest]:
    """Return the candidates closest to passing, the closest first; those that have all scores come first.

    Args:
        scores: of all candidates.
        thresholds: see `Thresholds`.
        n_layers: number of decoder blocks.
        gap: mean refusal metric on harmful minus that on harmless prompts, in the unchanged model.
        n: how many.
    """
    found = [
        _nearness(score, thresholds=thresholds, n_layers=n_layers, gap=gap)
        for score in scores
        if score.induce is not None
    ]

    def key(one: Nearest) -> tuple[bool, float, float]:
        score = one.candidate
        unknown = score.bypass is None or score.kl is None
        bypass = math.inf if score.bypass is None or math.isnan(score.bypass) else score.bypass
        return unknown, one.distance, bypass

    return sorted(found, key=key)[:n]


def _nearness(score: CandidateScore, *, thresholds: Thresholds, n_layers: int, gap: float) -> Nearest:
    beyond: dict[str, float] = {}
    distance = 0.0
    limit = thresholds.layer_limit(n_layers)
    if score.layer >= limit:
        beyond["layer"] = score.layer - limit + 1
        distance += beyond["layer"] / n_layers
    if score.induce is not None and score.induce < thresholds.induce:
        beyond["induce"] = thresholds.induce - score.induce
        distance += beyond["induce"] / (gap if gap > 0 else 1.0)
    if score.kl is not None and score.kl > thresholds.kl:
        beyond["kl"] = score.kl - thresholds.kl
        distance += math.log(score.kl / thresholds.kl) if thresholds.kl > 0 else score.kl
    if any(value is not None and math.isnan(value) for value in (score.bypass, score.induce, score.kl)):
        distance = math.inf
    failed = tuple(failed_thresholds(score, thresholds, n_layers))
    return Nearest(candidate=score, failed=failed, beyond=beyond, distance=distance)


def best_by_each_score(scores: Iterable[CandidateScore]) -> dict[ScoreName, CandidateScore]:
    """Return the candidates of lowest bypass, highest induce and lowest KL among those that have the score."""
    known = list(scores)
    signs: tuple[tuple[ScoreName, int], ...] = (("bypass", 1), ("induce", -1), ("kl", 1))
    found: dict[ScoreName, CandidateScore] = {}
    for name, sign in signs:
        having = [one for one in known if getattr(one, name) is not None and not math.isnan(getattr(one, name))]
        if having:
            found[name] = min(having, key=lambda one: sign * getattr(one, name))
    return found


def score_lazily(
    candidates: Sequence[Candidate],
    *,
    thresholds: Thresholds,
    n_layers: int,
    compute: ComputeScores,
    kl_at_once: int | None = 1,
    enough: Callable[[Sequence[CandidateScore]], bool] = bool,
) -> list[CandidateScore]:
    """Compute only the scores that the choice depends on; choosing from them equals choosing from all scores.

    Every candidate below the layer limit gets its induce score, those that reach the threshold their bypass
    score, and KL is computed in the order of bypass until one candidate passes, or as many as are asked for.

    Args:
        candidates: (position, layer) in the order that breaks ties.
        thresholds: see `Thresholds`.
        n_layers: number of decoder blocks.
        compute: computes scores of some candidates.
        kl_at_once: for how many candidates KL is computed before looking whether one passes; None: together with
            bypass, for all that induce.
        enough: tells whether the candidates that are known to pass, the best first, are all that is needed.
    """
    scores = {key: CandidateScore(position=key[0], layer=key[1]) for key in candidates}

    def add(name: ScoreName, keys: Sequence[Candidate]) -> None:
        for key, values in zip(keys, compute(name, keys) if keys else [], strict=True):
            scores[key] = scores[key].with_values(values)

    limit = thresholds.layer_limit(n_layers)
    add("induce", [key for key in candidates if key[1] < limit])
    able = [k for k, score in scores.items() if score.induce is not None and score.induce >= thresholds.induce]
    if kl_at_once is None:
        add("ablated", able)
        return list(scores.values())
    add("bypass", able)
    ordered = sorted(
        (k for k in able if not math.isnan(scores[k].bypass or 0.0)), key=lambda k: scores[k].bypass or 0.0
    )
    for start in range(0, len(ordered), kl_at_once):
        keys = ordered[start : start + kl_at_once]
        add("kl", keys)
        if enough(passing_candidates(scores.values(), thresholds=thresholds, n_layers=n_layers)):
            break
    return list(scores.values())


def score_exhaustively(candidates: Sequence[Candidate], *, compute: ComputeScores) -> list[CandidateScore]:
    """Compute all three scores of all candidates."""
    induced, ablated = compute("induce", candidates), compute("ablated", candidates)
    return [
        CandidateScore(position=position, layer=layer, induce=added["induce"], bypass=both["bypass"], kl=both["kl"])
        for (position, layer), added, both in zip(candidates, induced, ablated, strict=True)
    ]
