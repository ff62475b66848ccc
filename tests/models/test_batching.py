"""Batches: every row once, within the limits, and no plan is cheaper."""

import itertools
import random

from abliterate.models.machine import BatchLimits, plan_batches


def cost(batches: list[list[int]], lengths: list[int], limits: BatchLimits) -> int:
    return sum(len(batch) * max(lengths[i] for i in batch) + limits.overhead for batch in batches)


def test_every_row_once_longest_first_within_the_limits() -> None:
    rng = random.Random(3)
    for _ in range(300):
        lengths = [rng.randint(1, 30) for _ in range(rng.randint(1, 60))]
        rows = rng.choice([None, 1, 5])
        limits = BatchLimits(tokens=rng.choice([10, 40, 500]), rows=rows, overhead=rng.choice([0, 8, 100]))
        batches = plan_batches(lengths, limits=limits)
        assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
        longest = [lengths[batch[0]] for batch in batches]
        assert longest == sorted(longest, reverse=True)
        for batch in batches:
            padded = len(batch) * max(lengths[i] for i in batch)
            assert padded <= limits.tokens or len(batch) == 1
            assert rows is None or len(batch) <= rows


def test_no_other_division_of_sorted_rows_is_cheaper() -> None:
    rng = random.Random(4)
    for _ in range(200):
        lengths = sorted((rng.randint(1, 12) for _ in range(rng.randint(1, 8))), reverse=True)
        limits = BatchLimits(tokens=10_000, overhead=rng.choice([0, 3, 10]))
        found = cost(plan_batches(lengths, limits=limits), lengths, limits)
        rows = list(range(len(lengths)))
        for cuts in itertools.chain(*(itertools.combinations(rows[1:], n) for n in range(len(rows)))):
            bounds = [0, *cuts, len(rows)]
            other = [rows[a:b] for a, b in itertools.pairwise(bounds)]
            assert found <= cost(other, lengths, limits)


def test_without_overhead_there_is_no_padding() -> None:
    lengths = [7, 3, 7, 3, 5, 3]
    batches = plan_batches(lengths, limits=BatchLimits(tokens=100))
    assert sorted(map(sorted, batches)) == [[0, 2], [1, 3, 5], [4]]
    assert plan_batches([], limits=BatchLimits(tokens=10)) == []
