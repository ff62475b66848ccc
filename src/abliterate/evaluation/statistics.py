"""Counts turned into numbers that can be trusted: intervals, paired change, agreement.

Everything here is exact or closed-form arithmetic on counts; no sampling and no seed.
"""

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
    return max(0.0, centre - half), min(1.0, centre + half)


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
