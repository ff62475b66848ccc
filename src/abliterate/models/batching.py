"""Batches: rows of like length together, with little padding and a bounded number of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """How large a batch may be, and what starting one costs.

    Attributes:
        tokens: most tokens of one batch, padding included; a single longer row is a batch of its own.
        rows: most rows of one batch, or None.
        overhead: cost of one more batch, in tokens of computation.
        equal: rows of one batch have one width: the model would take padding in.
    """

    tokens: int
    rows: int | None = None
    overhead: int = 0
    equal: bool = False

    def most_rows(self, length: int) -> int:
        """Return how many rows of this length fit into one batch."""
        fitting = max(1, self.tokens // max(1, length))
        return fitting if self.rows is None else min(fitting, self.rows)


def plan_batches(
    lengths: Sequence[int], *, limits: BatchLimits, widths: Sequence[int] | None = None
) -> list[list[int]]:
    """Return batches of row indices, longest rows first, of least cost: padded tokens plus overhead per batch.

    Rows are cut where their length changes, by dynamic programming over the distinct lengths; a part that is larger
    than one batch is divided evenly.

    Args:
        lengths: what each row costs, in tokens.
        limits: see `BatchLimits`.
        widths: tokens of each row, where what it costs is something else.
    """
    batches = _plan(lengths, limits)
    if not limits.equal:
        return batches
    width = (lengths if widths is None else widths).__getitem__
    return [list(rows) for batch in batches for _, rows in groupby(sorted(batch, key=width, reverse=True), key=width)]


def _plan(lengths: Sequence[int], limits: BatchLimits) -> list[list[int]]:
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    cuts = [i for i in range(len(order)) if i == 0 or lengths[order[i]] != lengths[order[i - 1]]]
    cuts.append(len(order))
    best: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, len(cuts)):
        best.append(
            min((best[start][0] + _cost(lengths[order[cuts[start]]], cuts[end] - cuts[start], limits), start)
                for start in range(end))
        )  # fmt: skip
    chosen = [len(cuts) - 1]
    while chosen[-1] > 0:
        chosen.append(best[chosen[-1]][1])
    batches = []
    for start, end in pairwise(cuts[i] for i in reversed(chosen)):
        n_parts = _n_batches(lengths[order[start]], end - start, limits)
        bounds = [start + (end - start) * part // n_parts for part in range(n_parts + 1)]
        batches += [order[low:high] for low, high in pairwise(bounds)]
    return batches


def _n_batches(longest: int, n_rows: int, limits: BatchLimits) -> int:
    return -(-n_rows // limits.most_rows(longest))


def _cost(longest: int, n_rows: int, limits: BatchLimits) -> float:
    return n_rows * longest + _n_batches(longest, n_rows, limits) * limits.overhead


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell whether an error says that memory ran out."""
    said = str(error).lower()
    # In order: the GPU's; the CPU's on Windows; the CPU's elsewhere.
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in said or "can't allocate memory" in said
