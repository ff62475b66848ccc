"""Scoring candidates on as many prompts as it takes to decide, where the published procedure does not apply.

A model whose prompts are filtered by its replies has no published scores to be equal to, and most of its candidates
fail by far. So every candidate is scored on a few validation prompts first, and on more only while the standard error
of its mean leaves open whether it passes (induce, then KL) or is the best (bypass, compared prompt by prompt). The few
that are left are scored on all prompts, and must pass on all. What a candidate does to a prompt varies much less than
the prompts themselves, so its mean is that of the unchanged model on all prompts and of what it changed on a few
(a control variate).
"""

from collections.abc import Callable, Mapping, Sequence
from math import inf, isnan, sqrt
from statistics import fmean, stdev

from abliterate.extraction.options import Thresholds
from abliterate.extraction.selection import Candidate, CandidateScore, ScoreName

STAGES = {4: 5.8, 8: 3.5, 16: 2.9}
"""After so many prompts a candidate is decided whose mean is so many standard errors from a threshold, or from the
leader: Student's t for 99.5 %, since the error is known from as few values. The last stage is all prompts."""
MIN_DEVIATION = 0.01
"""Values of a few prompts that happen to be equal are taken to spread by this much, in nats."""

Extend = Callable[[ScoreName, Sequence[Candidate], int], Mapping[Candidate, tuple[float, ...]]]
"""Scores some candidates on the first prompts, as many as are named; returns the values prompt by prompt."""


def race(
    candidates: Sequence[Candidate],
    *,
    thresholds: Thresholds,
    n_prompts: Mapping[ScoreName, int],
    extend: Extend,
    n_wanted: int,
    unchanged: Mapping[ScoreName, Sequence[float]] | None = None,
) -> tuple[dict[Candidate, CandidateScore], list[CandidateScore]]:
    """Score candidates until it is decided which pass and which of these have the lowest bypass.

    Args:
        candidates: (position, layer), those that can be chosen.
        thresholds: see `Thresholds`.
        n_prompts: how many prompts there are for each score.
        extend: see `Extend`.
        n_wanted: how many of the best to score on all prompts.
        unchanged: values in the unchanged model on all prompts, of the scores where they are known and not 0.

    Returns:
        The means, estimated where not all prompts were scored, and those that pass on all prompts, the best first.
    """
    values: dict[ScoreName, dict[Candidate, tuple[float, ...]]] = {"induce": {}, "kl": {}, "bypass": {}}

    def more(name: ScoreName, keys: Sequence[Candidate], n: int) -> None:
        if keys:
            values[name] |= extend(name, keys, n)

    def decided(name: ScoreName, keys: Sequence[Candidate], sign: int, threshold: float) -> list[Candidate]:
        """Return those whose mean, times `sign`, is at least the threshold's."""
        open_ones, passing = list(keys), []
        for n in _stages(n_prompts[name]):
            more(name, open_ones, n)
            still = []
            for key in open_ones:
                mean, error = _mean(values[name][key], (unchanged or {}).get(name))
                margin = sign * (mean - threshold)
                if n < n_prompts[name] and abs(margin) <= STAGES[n] * error:
                    still.append(key)
                elif margin >= 0:
                    passing.append(key)
            open_ones = still
        return [key for key in keys if key in passing]

    able = decided("induce", candidates, 1, thresholds.induce)
    able = decided("kl", able, -1, thresholds.kl)
    chosen: list[Candidate] = []
    while able and len(chosen) < n_wanted:
        best = _lowest(able, n_prompts["bypass"], more, values["bypass"], n_wanted - len(chosen))
        for name in ("induce", "kl"):
            more(name, best, n_prompts[name])
        chosen += [
            key
            for key in best
            if fmean(values["induce"][key]) >= thresholds.induce and fmean(values["kl"][key]) <= thresholds.kl
        ]
        able = [key for key in able if key not in best]
    scores = {
        key: CandidateScore(position=key[0], layer=key[1]).with_values(
            {name: _mean(found[key], (unchanged or {}).get(name))[0] for name, found in values.items() if key in found}
        )
        for key in candidates
    }
    return scores, sorted((scores[key] for key in chosen), key=lambda score: _or_inf(score.bypass))


def _lowest(
    keys: Sequence[Candidate],
    n_prompts: int,
    more: Callable[[ScoreName, Sequence[Candidate], int], None],
    values: Mapping[Candidate, tuple[float, ...]],
    n_wanted: int,
) -> list[Candidate]:
    """Return the candidates of lowest bypass on all prompts, at most `n_wanted`."""
    left = list(keys)
    for n in _stages(n_prompts):
        more("bypass", left, n)
        left.sort(key=lambda key: _or_inf(fmean(values[key])))
        # The last that is wanted is the one to beat.
        last = left[min(n_wanted, len(left)) - 1]
        if n < n_prompts:
            left = [key for key in left if not _is_above(values[key], values[last], errors=STAGES[n])]
    return left[:n_wanted]


def _is_above(values: Sequence[float], leader: Sequence[float], *, errors: float) -> bool:
    mean, error = _mean([a - b for a, b in zip(values, leader, strict=True)])
    return isnan(mean) or mean > errors * error


def _mean(values: Sequence[float], unchanged: Sequence[float] | None = None) -> tuple[float, float]:
    """Return a mean over all prompts, from its values on the first of them, and its standard error.

    Args:
        values: on the first prompts.
        unchanged: the unchanged model's, on all.
    """
    if unchanged is not None and len(values) < len(unchanged):
        mean, error = _mean([a - b for a, b in zip(values, unchanged, strict=False)])
        return fmean(unchanged) + mean, error
    if len(values) < 2:
        return fmean(values), inf
    return fmean(values), max(stdev(values), MIN_DEVIATION) / sqrt(len(values))


def _or_inf(value: float | None) -> float:
    return inf if value is None or isnan(value) else value


def _stages(n_prompts: int) -> list[int]:
    return [*(n for n in STAGES if n < n_prompts), n_prompts]
