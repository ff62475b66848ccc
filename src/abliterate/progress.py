"""How library code tells how far it is, without knowing what shows it.

The command line passes a reporter that draws bars on stderr; the default is silent.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]


class ProgressReporter(Protocol):
    """Something that can show the progress of one task after another."""

    def task(self, description: str, *, total: int | None, unit: str = "") -> AbstractContextManager[Advance]:
        """Open a task of `total` steps; the yielded callable adds steps done. `unit="bytes"` shows a rate."""
        ...

    def message(self, text: str) -> None:
        """Show one line that stays."""
        ...


class SilentProgress:
    """A reporter that shows nothing."""

    @contextmanager
    def task(
        self,
        description: str,  # noqa: ARG002
        *,
        total: int | None,  # noqa: ARG002
        unit: str = "",  # noqa: ARG002
    ) -> Iterator[Advance]:
        """See `ProgressReporter.task`."""
        yield lambda _steps: None

    def message(self, text: str) -> None:
        """See `ProgressReporter.message`."""


SILENT: ProgressReporter = SilentProgress()
