"""Several processes that write one checkpoint: who they are, and how they tell one another things.

The command line hands in `ranks.Ranks`, which needs accelerate; alone, nothing is needed.
"""

from collections.abc import Mapping
from typing import Protocol, TypeVar

Value = TypeVar("Value")


class Processes(Protocol):
    """The processes that work together; each method is called by all of them at the same point."""

    @property
    def index(self) -> int:
        """This process's number, from 0; the first publishes."""
        ...

    @property
    def count(self) -> int:
        """How many there are."""
        ...

    def first_says(self, value: Value) -> Value:
        """Return the first process's value in every process."""
        ...

    def gather(self, value: Value) -> list[Value]:
        """Return every process's value in every process, by number."""
        ...


class Alone:
    """One process."""

    index = 0
    count = 1

    def first_says(self, value: Value) -> Value:
        """See `Processes.first_says`."""
        return value

    def gather(self, value: Value) -> list[Value]:
        """See `Processes.gather`."""
        return [value]


def share_by_size(sizes: Mapping[str, int], *, index: int, count: int) -> list[str]:
    """Return one process's part of some files, so that all have about the same number of bytes.

    Args:
        sizes: Name -> bytes; the same in every process.
        index: The process.
        count: How many there are.
    """
    shares: list[list[str]] = [[] for _ in range(count)]
    loads = [0] * count
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = loads.index(min(loads))
        shares[least].append(name)
        loads[least] += sizes[name]
    order = {name: position for position, name in enumerate(sizes)}
    return sorted(shares[index], key=order.__getitem__)
