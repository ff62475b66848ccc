"""Where output goes: the report (a table, or one JSON document) on stdout; everything else on stderr."""

import dataclasses
import enum
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
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
from rich.table import Table
from rich.text import Text

from abliterate.errors import InputError
from abliterate.files import check_writable, printable
from abliterate.processes import in_first_process
from abliterate.progress import SILENT, Advance, ProgressReporter

_UNLIMITED = 10_000


def command_line() -> str:
    """Return the command that is running, as it can be typed again."""
    return shlex.join(["abliterate", *sys.argv[1:]])


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OutputFile:
    """A file that a command writes.

    Attributes:
        path: The file; None where the option is not given.
        what: What it will hold, for messages.
        is_own: Tells whether a file holds that, so that it may be replaced.
        flag: The option that names it.
    """

    path: Path | None
    what: str
    is_own: Callable[[Path], bool]
    flag: str = "-o"


def check_outputs(*files: OutputFile, report: Path | None = None) -> None:
    """Check before hours of work that all outputs can be written, and replace nothing but what was written so before.

    Args:
        files: The files.
        report: What `--report` names.

    Raises:
        InputError: One cannot be written, is something else already, or is given twice.
    """
    taken: dict[str, str] = {}
    for file in files:
        if file.path is None:
            continue
        check_writable(file.path, flag=file.flag)
        if file.path.is_file() and not file.is_own(file.path):
            raise InputError(
                f"{file.path}: exists and is no {file.what}, so it is not replaced; choose another {file.flag}"
            )
        real = os.path.realpath(file.path)
        if real in taken and (file.path.is_file() or not file.path.exists()):
            raise InputError(f"{file.path}: is given for {taken[real]} and {file.flag}; choose another for one of them")
        taken[real] = file.flag
    if report is not None:
        check_writable(report, flag="--report", directory=True)


def holds_json(*keys: str) -> Callable[[Path], bool]:
    """Return what tells a JSON file, or one of JSON lines, whose (first) object has some keys."""

    def is_own(path: Path) -> bool:
        try:
            with path.open("rb") as file:
                first = file.readline()
                content = json.loads(first if first.rstrip().endswith(b"}") else first + file.read())
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(content, dict) and content.keys() >= set(keys)

    return is_own


@contextmanager
def writing(place: Path, flag: str = "--report") -> Iterator[None]:
    """Say in one line that what goes to a file or directory cannot be written.

    Args:
        place: The file or directory.
        flag: The option that names it.

    Raises:
        InputError: It cannot.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{error.filename or place}: cannot be written: {error.strerror or error}; choose another {flag}"
        ) from error


def to_plain(value: Any) -> Any:
    """Turn a report into values JSON can hold; a non-finite number becomes null. A `to_json` says how it is listed."""
    if hasattr(value, "to_json"):
        return to_plain(value.to_json())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class SafeConsole(Console):
    """A console on which texts of others, as in a config or a direction file, cannot act on the terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Render a text, what a terminal acts on written as escapes."""
        return super().render_str(printable(text), **options)


class Output:
    """One command's output: `report` writes the result to stdout, the rest goes to stderr."""

    def __init__(self, *, json_output: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        self.json_output = json_output
        self.quiet = quiet
        self.verbose = verbose
        self.stderr = SafeConsole(stderr=True, highlight=False)

    @classmethod
    def of(cls, context: typer.Context, *, json_output: bool) -> "Output":
        """Return the output of one command under the global options held by `context`."""
        return cls(json_output=json_output, **(context.obj or {}))

    def report(self, report: Any, *, tables: Callable[[], Sequence[Table | Text | str]]) -> None:
        """Write `report` as one JSON document, or as what `tables` returns, to stdout; of several processes, once."""
        if not in_first_process():
            return
        if self.json_output:
            # Elsewhere what the stream cannot write is written as JSON writes it.
            is_utf8 = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("_", "-") in {"utf-8", "utf8"}
            sys.stdout.write(json.dumps(to_plain(report), indent=2, ensure_ascii=not is_utf8) + "\n")
            return
        console = SafeConsole(highlight=False)
        if not console.is_terminal and "COLUMNS" not in os.environ:
            # A pipe or a file has no width: nothing is broken or cut.
            console = SafeConsole(highlight=False, width=_UNLIMITED)
        for part in tables():
            # Text is for scripts too: nothing in it is markup, and no line of it is broken.
            is_text = isinstance(part, str | Text)
            console.print(part, markup=not is_text, soft_wrap=is_text)

    def plain(self, report: Any) -> Any:
        """Return a report as values JSON can hold."""
        return to_plain(report)

    def note(self, text: str) -> None:
        """Write one line to stderr unless quiet."""
        if not self.quiet:
            self.stderr.print(text, markup=False)

    @property
    def progress(self) -> ProgressReporter:
        """A reporter that draws on stderr, or a silent one."""
        return SILENT if self.quiet or not in_first_process() else _BarProgress(self.stderr)


class _BarProgress:
    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def task(self, description: str, *, total: int | None, unit: str = "") -> Iterator[Advance]:
        columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn()]
        columns += [DownloadColumn(), TransferSpeedColumn()] if unit == "bytes" else [MofNCompleteColumn()]
        columns += [TextColumn("time left"), TimeRemainingColumn()]
        with Progress(*columns, console=self._console, transient=not self._console.is_terminal) as progress:
            task_id = progress.add_task(description, total=total)
            yield lambda steps: progress.update(task_id, advance=steps)

    def message(self, text: str) -> None:
        self._console.print(text, markup=False)
