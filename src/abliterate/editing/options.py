"""How a checkpoint is written."""

import os
from dataclasses import dataclass

import torch

from abliterate.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOptions:
    """How a checkpoint is written; nothing but the device, by its rounding, changes what is written.

    Attributes:
        workers: Threads; None: as many as the cores this process may use.
        device: Where the arithmetic is done, as torch names it.
        resume: Go on with what an interrupted run has left.

    Raises:
        InputError: A number of workers that is none, or a device that is not there.
    """

    workers: int | None = None
    device: str = "cpu"
    resume: bool = False

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise InputError(f"workers is {self.workers}; give 1 or more")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"--device {self.device} is not there; use cpu, cuda, cuda:N or mps") from error

    @property
    def n_workers(self) -> int:
        """The number of threads."""
        if self.workers is not None:
            return self.workers
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
