"""How the tasks of a command are shown: bars on a terminal, lines in a log, and at the end what took how long."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from abliterate.progress import Advance

SECONDS_BETWEEN_LINES = 30.0
"""So long a log waits from one line about a task to the next, unless `--progress-interval` says otherwise."""
LINE_WIDTH = 120
"""Columns of a line where there is no terminal that has a width of its own."""
_WORTH_A_SUMMARY = 10.0


@dataclass(slots=True, kw_only=True)
class Stages:
    """What a command has done, task by task, in the order of their beginnings; the time of equal names is added.

    Attributes:
        seconds: the time of each task.
        started: when the command began.
        running: how many tasks go on now.
        changed: when a task began or ended last.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=lambda: time.monotonic())
    running: int = 0
    changed: float = field(default_factory=lambda: time.monotonic())

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time that passes to that of a task."""
        self.seconds.setdefault(name, 0.0)
        started = self.changed = time.monotonic()
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self.changed = time.monotonic()
            self.seconds[name] += self.changed - started

    @property
    def idle(self) -> float:
        """Seconds since the last task ended; 0 while one goes on."""
        return 0.0 if self.running else time.monotonic() - self.changed

    def pause(self) -> str:
        """Return what a log says where a command is between two tasks, as while libraries are imported."""
        before = f"after {next(reversed(self.seconds))}" if self.seconds else "starting"
        return f"{before[0].upper()}{before[1:]}: {duration(self.idle)} so far"

    def summary(self) -> list[str]:
        """Return what took how long, and the most memory that was taken, a line each; nothing of a short command."""
        total = time.monotonic() - self.started
        if total < _WORTH_A_SUMMARY or not self.seconds:
            return []
        width = min(max(map(len, self.seconds)), LINE_WIDTH - 20)
        lines = [f"  {name:<{width}}  {duration(seconds):>8}" for name, seconds in self.seconds.items()]
        return ["Stages:", *lines, f"  {'in all':<{width}}  {duration(total):>8}; {_peak_memory()}"]


def _peak_memory() -> str:
    """Return the most memory that this process has taken, and of a GPU where one was used."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    words = f"peak memory {peak / 1e9:.1f} GB"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        words += f", of the GPU {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
    return words


@contextmanager
def telling_of_pauses(write: Callable[[str], None], stages: Stages, interval: float) -> Iterator[None]:
    """Write a line to a log every `interval` seconds in which no task goes on."""
    ended = threading.Event()

    def tell() -> None:
        told = 0.0
        while not ended.wait(min(interval, 1.0)):
            told = told if stages.idle >= told else 0.0
            if stages.idle - told >= interval:
                told = stages.idle
                write(stages.pause())

    clock = threading.Thread(target=tell, daemon=True)
    clock.start()
    try:
        yield
    finally:
        ended.set()
        clock.join()


class BarProgress:
    """For a terminal: a bar for each task, with the time left."""

    def __init__(self, console: Console, stages: Stages) -> None:
        self._console = console
        self._stages = stages

    @contextmanager
    def task(self, description: str, *, total: int | None, unit: str = "") -> Iterator[Advance]:
        """See `ProgressReporter.task`."""
        columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn()]
        columns += [DownloadColumn(), TransferSpeedColumn()] if unit == "bytes" else [MofNCompleteColumn()]
        columns += [TextColumn("time left"), TimeRemainingColumn()]
        with self._stages.timed(description), Progress(*columns, console=self._console) as progress:
            task_id = progress.add_task(description, total=total)
            yield lambda steps: progress.update(task_id, advance=steps)

    def message(self, text: str) -> None:
        """See `ProgressReporter.message`."""
        self._console.print(text, markup=False)


class LineProgress:
    """For a log: a line at the start of each task, one at its end, and one every so often between.

    Args:
        write: Writes a line.
        stages: What is done is added here.
        interval: Seconds from one line about a task to the next, whether anything of it was done or not.
    """

    def __init__(self, write: Callable[[str], None], stages: Stages, interval: float = SECONDS_BETWEEN_LINES) -> None:
        self._write = write
        self._stages = stages
        self._interval = interval

    @contextmanager
    def task(self, description: str, *, total: int | None, unit: str = "") -> Iterator[Advance]:
        """See `ProgressReporter.task`."""
        task = _LoggedTask(description, total=total, unit=unit, write=self._write)
        ended = threading.Event()
        clock = threading.Thread(target=task.tell, args=(ended, self._interval), daemon=True)
        clock.start()
        how = "stopped at "
        try:
            with self._stages.timed(description):
                yield task.advance
            how = ""
        finally:
            ended.set()
            clock.join()
            task.end(how)

    def message(self, text: str) -> None:
        """See `ProgressReporter.message`."""
        self._write(text)


class _LoggedTask:
    def __init__(self, description: str, *, total: int | None, unit: str, write: Callable[[str], None]) -> None:
        self._description = description
        self._total = total
        self._unit = unit
        self._write = write
        self._done = 0
        # Files are written by several threads, and the clock is one more.
        self._lock = threading.Lock()
        self._started = time.monotonic()
        write(description if self._is_one else f"{description}: {self._amount(total or 0)} to do")

    def advance(self, steps: int) -> None:
        with self._lock:
            self._done += steps

    def tell(self, ended: threading.Event, interval: float) -> None:
        """Write a line every `interval` seconds until the task has ended."""
        while not ended.wait(interval):
            with self._lock:
                line = self.state(time.monotonic() - self._started)
            self._write(line)

    def state(self, seconds: float) -> str:
        """Return how far the task is after so many seconds: counts, rate, and time left."""
        if self._is_one or not self._done or seconds <= 0:
            done = "" if self._is_one and not self._done else f"{self._count()}, "
            return f"{self._description}: {done}{duration(seconds)} so far"
        line = f"{self._description}: {self._count()}"
        if self._total is not None and self._done >= self._total:
            return f"{line}, finishing, {duration(seconds)} so far"
        line += f", {self._rate(seconds)}"
        if self._total is not None:
            line += f", about {duration(seconds / self._done * (self._total - self._done))} left"
        return line

    def end(self, how: str = "") -> None:
        seconds = time.monotonic() - self._started
        with self._lock:
            rate = "" if self._is_one or not self._done or seconds < 1 else f", {self._rate(seconds)}"
            line = f"{self._description}: {how}{self._count()} in {duration(seconds)}{rate}"
        self._write(line)

    @property
    def _is_one(self) -> bool:
        """Whether there is nothing to count."""
        return self._total is None or (self._total == 1 and self._unit != "bytes")

    def _count(self) -> str:
        if self._is_one and self._done == self._total:
            return "done"
        if self._total is None or self._done >= self._total:
            return f"{self._amount(self._done)} done"
        return f"{self._amount(self._done)} of {self._amount(self._total)} done"

    def _rate(self, seconds: float) -> str:
        rate = self._done / seconds
        if self._unit == "bytes":
            return f"{self._amount(round(rate))}/s"
        return f"{rate:.1f} a second" if rate >= 1 else f"{1 / rate:.1f} s each"

    def _amount(self, n: int) -> str:
        if self._unit != "bytes":
            return str(n)
        return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Return a time in words."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
