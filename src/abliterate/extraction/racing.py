"""Scoring candidates on as many prompts as it takes to decide.

Most candidates fail by far. So every candidate is scored on a few validation prompts first, and on more only while the
standard error of its mean leaves open whether it passes (induce, then KL) or is the best (bypass, compared prompt by
prompt). The few that are left are scored on all prompts, and must pass on all. How sure it takes to be is said by a
`Certainty`: where the published rule chooses, a choice that is another than that of all scores is out of the question.
What a candidate does to a prompt varies much less than the prompts themselves, so its mean is that of the unchanged
model on all prompts and of what it changed on a few (a control variate). How much its values vary cannot be told from
two of them, but those of many candidates can tell: its variance counts beside theirs together, as in the moderated
t-statistic (Smyth 2004, eq. 3).
"""

from collections.abc import Callable, Mapping, Sequence
from math import inf, isfinite, isnan, sqrt
from statistics import fmean
from typing import Literal

from abliterate.extraction.options import Thresholds
from abliterate.extraction.selection import Candidate, CandidateScore, ScoreName

STAGES = (4, 8, 12, 16, 24)
"""After so many prompts it is looked which candidates are decided. The last stage is all prompts."""
EARLIEST = 2
"""A stage before these where the unchanged model's values are known: without them, two prompts that happen to be alike
make all candidates look as if they varied little."""
OTHERS_WEIGHT = 4
"""The variance of all candidates together counts as much as that of so many degrees of freedom of one."""
Certainty = Literal["99.5 %", "99.99 %"]
STUDENT_T: Mapping[Certainty, Sequence[float]] = {
    "99.5 %": (
        *(63.66, 9.92, 5.84, 4.60, 4.03, 3.71, 3.50, 3.36, 3.25, 3.17, 3.11, 3.05, 3.01, 2.98),
        *(2.95, 2.92, 2.90, 2.88, 2.86, 2.85, 2.83, 2.82, 2.81, 2.80, 2.79, 2.78, 2.77),
    ),
    "99.99 %": (
        *(3183.1, 70.70, 22.20, 13.03, 9.68, 8.02, 7.06, 6.44, 6.01, 5.69, 5.45, 5.26, 5.11, 4.99),
        *(4.88, 4.79, 4.71, 4.65, 4.59, 4.54, 4.49, 4.45, 4.41, 4.38, 4.35, 4.32, 4.30),
    ),
}
"""A candidate is decided whose mean is so many standard errors from a threshold, or from the leader: this quantile of
Student's t, by degrees of freedom from 1."""
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
    certainty: Certainty,
    unchanged: Mapping[ScoreName, Sequence[float]] | None = None,
) -> tuple[dict[Candidate, CandidateScore], list[CandidateScore]]:
    """Score candidates until it is decided which pass and which of these have the lowest bypass.

    Args:
        candidates: (position, layer), those that can be chosen.
        thresholds: see `Thresholds`.
        n_prompts: how many prompts there are for each score.
        extend: see `Extend`.
        n_wanted: how many of the best to score on all prompts.
        certainty: how sure to be of what is decided on some prompts.
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
        open_ones, passing, known = list(keys), [], (unchanged or {}).get(name)
        for n in _stages(n_prompts[name], early=known is not None):
            more(name, open_ones, n)
            means = _means([values[name][key] for key in open_ones], known, certainty=certainty)
            still = []
            for key, (mean, noise) in zip(open_ones, means, strict=True):
                margin = sign * (mean - threshold)
                if n < n_prompts[name] and abs(margin) <= noise:
                    still.append(key)
                elif margin >= 0:
                    passing.append(key)
            open_ones = still
        return [key for key in keys if key in passing]

    able = decided("induce", candidates, 1, thresholds.induce)
    able = decided("kl", able, -1, thresholds.kl)
    chosen: list[Candidate] = []
    while able and len(chosen) < n_wanted:
        best = _lowest(able, n_prompts["bypass"], more, values["bypass"], n_wanted - len(chosen), certainty)
        if not best:
            break
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
            {
                name: _means([found[key]], (unchanged or {}).get(name), certainty=certainty)[0][0]
                for name, found in values.items()
                if key in found
            }
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
    certainty: Certainty,
) -> list[Candidate]:
    """Return the candidates of lowest bypass on all prompts, at most `n_wanted`; none where none is a number."""
    left = list(keys)
    for n in _stages(n_prompts):
        more("bypass", left, n)
        left.sort(key=lambda key: _or_inf(fmean(values[key])))
        # The last that is wanted is the one to beat.
        last = left[min(n_wanted, len(left)) - 1]
        if n < n_prompts:
            differences = [[a - b for a, b in zip(values[key], values[last], strict=True)] for key in left]
            ahead = _means(differences, certainty=certainty)
            left = [key for key, (mean, noise) in zip(left, ahead, strict=True) if not (isnan(mean) or mean > noise)]
        if not left:
            break
    return [key for key in left if not isnan(fmean(values[key]))][:n_wanted]


def _means(
    values: Sequence[Sequence[float]], unchanged: Sequence[float] | None = None, *, certainty: Certainty
) -> list[tuple[float, float]]:
    """Return the means over all prompts of some candidates, from their values on the first of them, and their noise.

    Args:
        values: on the first prompts, as many of each candidate.
        unchanged: the unchanged model's, on all.
        certainty: how sure to be that a mean is off by no more.

    Returns:
        of each candidate its mean, and by how much that may be off.
    """
    n, base = len(values[0]) if values else 0, 0.0
    if unchanged is not None and n < len(unchanged):
        base, values = fmean(unchanged), [[a - b for a, b in zip(own, unchanged, strict=False)] for own in values]
    means = [fmean(own) for own in values]
    if n < 2:
        return [(base + mean, inf) for mean in means]
    variances = [
        max(sum((each - mean) ** 2 for each in own) / (n - 1), MIN_DEVIATION**2)
        for own, mean in zip(values, means, strict=True)
    ]
    known = [each for each in variances if isfinite(each)]
    weight, together = min(OTHERS_WEIGHT, max(0, len(known) - 1) * (n - 1)), fmean(known or [0.0])
    freedom = weight + n - 1
    quantiles = STUDENT_T[certainty]
    t = quantiles[min(freedom, len(quantiles)) - 1]
    return [
        (base + mean, t * sqrt((weight * together + (n - 1) * own) / freedom / n))
        for mean, own in zip(means, variances, strict=True)
    ]


def _or_inf(value: float | None) -> float:
    return inf if value is None or isnan(value) else value


def _stages(n_prompts: int, *, early: bool = False) -> list[int]:
    return [*(n for n in ((EARLIEST, *STAGES) if early else STAGES) if n < n_prompts), n_prompts]
