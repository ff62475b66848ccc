"""Counts turned into numbers that can be trusted: intervals, paired change, agreement.

Everything here is exact or closed-form arithmetic on counts and ranks; no sampling and no seed.
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.959963984540054
"""The 97.5 % point of the standard normal distribution: two-sided 95 % intervals."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedChange:
    """The same prompts answered twice, and a yes-or-no property of the two answers.

    Attributes:
        n: number of prompts.
        both: prompts with the property before and after.
        only_before: prompts that lost it.
        only_after: prompts that gained it.
        neither: prompts without it both times.
        difference: share after - share before.
        p_value: of the exact two-sided McNemar test; 1 when nothing changed.
    """

    n: int
    both: int
    only_before: int
    only_after: int
    neither: int
    difference: float
    p_value: float

    @property
    def share_before(self) -> float:
        """The share with the property before."""
        return (self.both + self.only_before) / self.n if self.n else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far two raters of the same items agree.

    Attributes:
        n: number of items both rated.
        agreed: items rated alike.
        kappa: Cohen's kappa; None where it is not defined, since both raters gave one and the same rating to all.
    """

    n: int
    agreed: int
    kappa: float | None


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Return the Wilson 95 % interval of a proportion (Wilson 1927); (0, 1) when there is nothing to count."""
    if n == 0:
        return 0.0, 1.0
    p, z = successes / n, Z_95
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # At the ends it is exact, and rounding would leave a trace of it.
    return centre - half if successes else 0.0, centre + half if successes < n else 1.0


def mcnemar_p_value(only_before: int, only_after: int) -> float:
    """Return the exact two-sided p-value of McNemar's test.

    Under the null hypothesis each changed item is as likely to change one way as the other, so the smaller count is
    binomial with p = 1/2 (McNemar 1947). The sum is taken in whole numbers; only the last division rounds.
    """
    n, smaller = only_before + only_after, min(only_before, only_after)
    tail = sum(math.comb(n, k) for k in range(smaller + 1))
    p_value: float = 2 * tail / 2**n
    return min(1.0, p_value)


def paired_change(before: Sequence[bool], after: Sequence[bool]) -> PairedChange:
    """Compare a property of the same items before and after.

    Args:
        before: one value an item.
        after: the values of the same items in the same order.

    Raises:
        ValueError: the lengths differ.
    """
    pairs = list(zip(before, after, strict=True))
    lost, gained = pairs.count((True, False)), pairs.count((False, True))
    return PairedChange(
        n=len(pairs),
        both=pairs.count((True, True)),
        only_before=lost,
        only_after=gained,
        neither=pairs.count((False, False)),
        difference=(gained - lost) / len(pairs) if pairs else 0.0,
        p_value=mcnemar_p_value(lost, gained),
    )


def cohens_kappa(first: Sequence[bool], second: Sequence[bool]) -> Agreement:
    """Return the agreement of two raters beyond chance (Cohen 1960).

    Args:
        first: one rating an item.
        second: the other rater's ratings of the same items in the same order.

    Raises:
        ValueError: the lengths differ.
    """
    n = len(first)
    agreed = sum(a == b for a, b in zip(first, second, strict=True))
    yes_first, yes_second = sum(first), sum(second)
    # In whole numbers (all shares times n squared), so that "all alike" is recognised exactly.
    by_chance = yes_first * yes_second + (n - yes_first) * (n - yes_second)
    kappa = None if by_chance == n * n else (n * agreed - by_chance) / (n * n - by_chance)
    return Agreement(n=n, agreed=agreed, kappa=kappa)


@dataclass(frozen=True, slots=True, kw_only=True)
class AucValue:
    """How often a score is higher for one kind of item than for the other, ties counted half.

    Attributes:
        n_higher: number of items that should score higher.
        n_lower: number of the others.
        auc: the area under the ROC curve; 0.5 is chance.
        low: lower end of the 95 % interval.
        high: upper end.
    """

    n_higher: int
    n_lower: int
    auc: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AucChange:
    """The change of an AUC between two scores of the same items.

    Attributes:
        difference: after - before.
        low: lower end of the 95 % interval of the difference.
        high: upper end.
        p_value: of DeLong's two-sided test; 1 where the two do not differ in any item's place.
    """

    difference: float
    low: float
    high: float
    p_value: float


def auc_value(higher: Sequence[float], lower: Sequence[float]) -> AucValue:
    """Return the AUC with Newcombe's interval (2006, method 5), which holds at 1, too.

    Args:
        higher: scores of the items that should score higher; at least one.
        lower: scores of the others; at least one.
    """
    m, n = len(higher), len(lower)
    auc = math.fsum(_places(higher, lower)) / m
    return AucValue(
        n_higher=m, n_lower=n, auc=auc, low=_auc_bound(auc, m, n, to=0.0), high=_auc_bound(auc, m, n, to=1.0)
    )


def auc_change(
    before: tuple[Sequence[float], Sequence[float]], after: tuple[Sequence[float], Sequence[float]]
) -> AucChange:
    """Compare the AUC of two scores of the same items (DeLong, DeLong and Clarke-Pearson 1988).

    Args:
        before: scores of the items that should score higher, and of the others.
        after: other scores of the same items in the same order.

    Raises:
        ValueError: the lengths differ.
    """
    shifts = []
    for side in (0, 1):
        # How the share of the other side that an item beats (or loses to) has changed.
        old, new = (_places(s[side], s[1 - side]) for s in (before, after))
        shifts.append([(a - b) * (1 if side == 0 else -1) for a, b in zip(new, old, strict=True)])
    difference = math.fsum(shifts[0]) / len(shifts[0])
    variance = sum(_variance(each) / len(each) for each in shifts)
    half = Z_95 * math.sqrt(variance)
    p_value = math.erfc(abs(difference) / math.sqrt(2 * variance)) if variance else float(not difference)
    return AucChange(difference=difference, low=difference - half, high=difference + half, p_value=p_value)


def _places(items: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return for each item the share of the others that it scores higher than, ties counted half."""
    order = sorted(others)
    return [(bisect.bisect_left(order, x) + bisect.bisect_right(order, x)) / (2 * len(order)) for x in items]


def _variance(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


def _auc_bound(auc: float, m: int, n: int, *, to: float) -> float:
    """Return the AUC towards `to` that lies as far off as its own standard error allows, by bisection."""

    def is_within(theta: float) -> bool:
        spread = (m + n) / 2 - 1
        variance = theta * (1 - theta) * (1 + spread * (1 - theta) / (2 - theta) + spread * theta / (1 + theta))
        return (auc - theta) ** 2 <= Z_95**2 * variance / (m * n)

    inside, outside = auc, to
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if is_within(middle) else (inside, middle)
    return inside
