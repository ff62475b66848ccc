"""Intervals, paired tests and agreement against scipy and against direct computations."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, mannwhitneyu, norm

from abliterate.evaluation.statistics import (
    auc_change,
    auc_value,
    cohens_kappa,
    mcnemar_p_value,
    paired_change,
    wilson_interval,
)

SCORES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=25)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (3, 10), (97, 144), (1, 1000)])
def test_wilson_interval_equals_scipys(k: int, n: int) -> None:
    expected = binomtest(k, n).proportion_ci(method="wilson")
    assert wilson_interval(k, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_wilson_interval_of_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


@given(st.integers(1, 5000))
def test_wilson_interval_ends_where_shares_do(n: int) -> None:
    assert wilson_interval(0, n)[0] == 0.0
    assert wilson_interval(n, n)[1] == 1.0


@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_equals_scipys_exact_binomial_test(lost: int, gained: int) -> None:
    expected = binomtest(lost, lost + gained, 0.5).pvalue if lost + gained else 1.0
    assert mcnemar_p_value(lost, gained) == pytest.approx(expected, rel=1e-9)
    assert mcnemar_p_value(lost, gained) == mcnemar_p_value(gained, lost)


def test_mcnemar_of_counts_too_large_for_a_float() -> None:
    assert mcnemar_p_value(1000, 1100) == pytest.approx(binomtest(1000, 2100, 0.5).pvalue, rel=1e-9)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60))
def test_paired_change_counts_every_pair_once(pairs: list[tuple[bool, bool]]) -> None:
    before, after = [a for a, _ in pairs], [b for _, b in pairs]
    change = paired_change(before, after)
    assert change.both + change.only_before + change.only_after + change.neither == change.n == len(pairs)
    assert change.both + change.only_before == sum(before)
    assert change.both + change.only_after == sum(after)
    if pairs:
        assert change.difference == pytest.approx(sum(after) / len(pairs) - sum(before) / len(pairs))


def test_unpaired_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="argument"):
        paired_change([True], [])


def test_kappa_of_the_textbook_table() -> None:
    """20 both yes, 5 and 10 split, 15 both no: agreement 0.7, by chance 0.5, kappa 0.4."""
    first = [True] * 25 + [False] * 25
    second = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    found = cohens_kappa(first, second)
    assert (found.n, found.agreed) == (50, 35)
    assert found.kappa == pytest.approx(0.4)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_kappa_equals_its_definition(pairs: list[tuple[bool, bool]]) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    n = len(pairs)
    observed = sum(a == b for a, b in pairs) / n
    p, q = sum(first) / n, sum(second) / n
    chance = p * q + (1 - p) * (1 - q)
    found = cohens_kappa(first, second)
    if found.kappa is None:
        assert chance == pytest.approx(1)
    else:
        assert found.kappa == pytest.approx((observed - chance) / (1 - chance))
        assert found.kappa <= 1


def test_kappa_is_undefined_when_both_say_the_same_of_all() -> None:
    assert cohens_kappa([True] * 5, [True] * 5).kappa is None
    assert cohens_kappa([], []).kappa is None
    assert cohens_kappa([True] * 5, [False] * 5).kappa == 0


@given(SCORES, SCORES)
def test_auc_is_the_u_of_mann_and_whitney_over_all_pairs(higher: list[float], lower: list[float]) -> None:
    found = auc_value(higher, lower)
    u = mannwhitneyu(higher, lower).statistic
    assert found.auc == pytest.approx(u / (len(higher) * len(lower)))
    assert 0 <= found.low <= found.auc <= found.high <= 1
    mirrored = auc_value(lower, higher)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((found.low, found.high), abs=1e-9)


@pytest.mark.parametrize("auc", [0.5, 0.8, 0.97, 1.0])
def test_the_ends_of_the_interval_solve_newcombes_equation(auc: float) -> None:
    higher = [1.0] * round(100 * auc) + [-1.0] * round(100 * (1 - auc))
    found = auc_value(higher, [0.0] * 80)
    assert found.auc == pytest.approx(auc)
    for end in {found.low, found.high} - {0.0, 1.0}:
        more = 89 * (1 - end) / (2 - end) + 89 * end / (1 + end)
        error = (end * (1 - end) * (1 + more) / 8000) ** 0.5
        assert abs(auc - end) == pytest.approx(1.959963984540054 * error, rel=1e-6)


@given(
    st.lists(st.tuples(*[st.integers(-4, 4).map(float)] * 2), min_size=2, max_size=12),
    st.lists(st.tuples(*[st.integers(-4, 4).map(float)] * 2), min_size=2, max_size=12),
)
def test_delongs_variance_of_a_difference_against_all_pairs(higher, lower) -> None:
    def wins(i: int):
        return np.array([[(h[i] > low[i]) + 0.5 * (h[i] == low[i]) for low in lower] for h in higher])

    gain = wins(1) - wins(0)
    rows, columns = gain.mean(axis=1), gain.mean(axis=0)
    variance = rows.var(ddof=1) / len(rows) + columns.var(ddof=1) / len(columns)
    change = auc_change(*((tuple([h[i] for h in higher]), tuple([low[i] for low in lower])) for i in (0, 1)))
    assert change.difference == pytest.approx(gain.mean(), abs=1e-12)
    assert (change.high - change.low) / 2 == pytest.approx(1.959963984540054 * variance**0.5, abs=1e-9)
    if variance > 1e-12:
        assert change.p_value == pytest.approx(2 * norm.sf(abs(gain.mean()) / variance**0.5), abs=1e-9)
