"""Several processes that share the work of one command, as `torchrun` and, on GPUs, `accelerate launch` start them.

`find_ranks` joins those that a launcher started, through accelerate; a `Ranks` made without arguments is one process
alone.
"""

import atexit
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """The processes that work together; `share`, `first_says` and `gather` are called by all at the same point.

    Attributes:
        index: this process's number, from 0; the first writes, reports and publishes.
        count: how many there are.
        exchange: takes this process's list and returns those of all, joined, by number.
    """

    index: int = 0
    count: int = 1
    exchange: Callable[[list[Any]], list[Any]] = list

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.index == 0

    def share(self, items: Sequence[Item], compute: Callable[[Sequence[Item]], Sequence[Result]]) -> list[Result]:
        """Compute this process's part of `items` and return the results of all, in the order of `items`.

        Args:
            items: the same in every process; process i computes those at i, i + count, ...
            compute: returns one result per item.
        """
        own = list(compute(items[self.index :: self.count])) if len(items) > self.index else []
        results: list[Any] = [None] * len(items)
        for index, part in enumerate(self.gather(own)):
            results[index :: self.count] = part
        return results

    def first_says(self, value: Item) -> Item:
        """Return the first process's value in every process."""
        return self.gather(value)[0]

    def gather(self, value: Item) -> list[Item]:
        """Return the values of all processes, in every process, by number."""
        return self.exchange([value])


ALONE = Ranks()
"""One process that shares with no other."""


def in_first_process() -> bool:
    """Tell, without joining the others, whether this process is the one that writes and reports."""
    return int(os.environ.get("WORLD_SIZE", "1")) < 2 or os.environ.get("RANK", "0") == "0"


def find_ranks(*, device: str = "auto") -> Ranks:
    """Join the other processes if a launcher started several, until this one ends; gloo on a CPU, nccl on GPUs.

    Args:
        device: where the command computes; what the processes tell one another goes the same way.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Ranks()
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    # Without leaving, a process that has done its work is now and then aborted by the threads of its connections.
    atexit.register(state.destroy_process_group)
    return Ranks(
        index=state.process_index, count=state.num_processes, exchange=lambda values: gather_object(by_itself(values))
    )


def by_itself(value: Any) -> Any:
    """Return lists, tuples and dictionaries of tensors with none that is part of a larger one.

    Pickled, a row of a recording would take the whole recording along, each row anew.
    """
    import torch

    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: by_itself(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(by_itself(each) for each in value)
    return value
