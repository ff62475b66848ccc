"""Where output goes: the report (a table, or one JSON document) on stdout; everything else on stderr."""

import dataclasses
import enum
import json
import math
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
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
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from abliterate.errors import InputError
from abliterate.files import check_writable, printable
from abliterate.processes import in_first_process
from abliterate.progress import SILENT, Advance, ProgressReporter

if TYPE_CHECKING:
    from abliterate.release.gates import Comparison, GateResult

_UNLIMITED = 10_000
SECONDS_BETWEEN_LINES = 30.0
"""So long at least a log waits from one line about a task to the next."""
SCHEMAS: Mapping[str, int] = {
    "audit": 1,
    "chat": 1,
    "convert": 1,
    "demo": 1,
    "evaluate": 1,
    "extract": 1,
    "extract.not_found": 1,
    "extract.repair": 1,
    "inspect": 1,
    "orthogonalize": 1,
    "orthogonalize.hooks": 1,
    "plan": 1,
    "prompts": 1,
    "prompts.set": 1,
    "push": 1,
    "refine": 1,
    "revert": 1,
    "trace": 1,
    "verify": 1,
}
"""The number of each document that `--json` prints, by its name: that of the command, and behind a dot what this can
print in place of its usual document. docs/schemas/README.md says when a number rises."""


def accept_any_text() -> None:
    """Let stdout and stderr take every text: what their encoding has no character for is written as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


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


def starts_with(*beginnings: str) -> Callable[[Path], bool]:
    """Return what tells a file that is empty or begins in one of some ways."""

    def is_own(path: Path) -> bool:
        try:
            with path.open("rb") as file:
                content = file.read(1000)
        except OSError:
            return False
        return not content or content.startswith(tuple(each.encode() for each in beginnings))

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
    """A console on which texts of others, as in a config, a direction file or a reply, cannot act on the terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Render a text, what a terminal acts on written as escapes."""
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render anything; what texts in it hold for a terminal is written as escapes."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


class Output:
    """One command's output: `report` writes the result to stdout, the rest goes to stderr."""

    def __init__(self, command: str, *, json_output: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        self.command = command
        self.json_output = json_output
        self.quiet = quiet
        self.verbose = verbose
        self.stderr = SafeConsole(stderr=True, highlight=False)

    @classmethod
    def of(cls, context: typer.Context, *, json_output: bool) -> "Output":
        """Return the output of one command under the global options held by `context`."""
        return cls(context.info_name or "", json_output=json_output, **(context.obj or {}))

    def report(
        self, report: Any, *, tables: Callable[[], Sequence[Table | Text | str]], document: str | None = None
    ) -> None:
        """Write a report as one JSON document, or as tables, to stdout; of several processes, once.

        Args:
            report: What was found; of a document its first key, `schema`, says what else is in it (see `SCHEMAS`).
            tables: Returns it as tables and lines.
            document: Which document of the command it is; None: its usual one.
        """
        if not in_first_process():
            return
        if self.json_output:
            name = self.command if document is None else f"{self.command}.{document}"
            content = {"schema": f"abliterate.{name}/{SCHEMAS[name]}", **to_plain(report)}
            # An escape of Python's would be none of JSON's.
            is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
            sys.stdout.write(json.dumps(content, indent=2, ensure_ascii=not is_unicode) + "\n")
            return
        console = SafeConsole(highlight=False)
        if not console.is_terminal and "COLUMNS" not in os.environ:
            # A pipe or a file has no width: nothing is broken or cut.
            console = SafeConsole(highlight=False, width=_UNLIMITED)
        for part in tables():
            if isinstance(part, Table):
                # A name or a hash that finds no room goes on in the next line, whole.
                for column in part.columns:
                    column.overflow = "fold"
            # Text is for scripts too: nothing in it is markup, and no line of it is broken.
            is_text = isinstance(part, str | Text)
            console.print(part, markup=not is_text, soft_wrap=is_text)

    def plain(self, report: Any) -> Any:
        """Return a report as values JSON can hold."""
        return to_plain(report)

    def note(self, text: str) -> None:
        """Write one line to stderr unless quiet."""
        if not self.quiet:
            self.stderr.print(text, markup=False, soft_wrap=True)

    def write(self, text: str) -> None:
        """Write a piece of text to stdout at once, as it comes; a terminal acts on nothing in it."""
        sys.stdout.write(printable(text))
        sys.stdout.flush()

    @property
    def progress(self) -> ProgressReporter:
        """A reporter that draws bars on a terminal and writes lines to a log, both on stderr; or a silent one."""
        if self.quiet or not in_first_process():
            return SILENT
        # Some environments call for colours where there is no terminal; bars would fill their logs.
        draws = self.stderr.is_terminal and self.stderr.file.isatty() and not self.stderr.is_dumb_terminal
        return _BarProgress(self.stderr) if draws else _LineProgress(self.note)


def gate_tables(comparisons: "Sequence[Comparison]", results: "Sequence[GateResult]") -> list[Table | str]:
    """Return what an earlier report says beside this one, and what each gate found."""
    tables: list[Table | str] = []
    if comparisons:
        table = Table("prompts", "earlier", "now", "difference", "in both", "p (McNemar)", title="Against REPORT")
        for one in comparisons:
            paired = ("0", "") if one.paired is None else (str(one.paired.n), f"{one.paired.p_value:.2g}")
            table.add_row(one.kind, f"{one.earlier_rate:.1%}", f"{one.rate:.1%}", f"{one.difference:+.1%}", *paired)
        tables.append(table)
    for result in results:
        found = result.found if isinstance(result.found, str) else f"{result.found:.4g}"
        tables.append(f"gate {result.gate}: {found}, {'fails' if result.failed else 'passes'}")
    return tables


class _BarProgress:
    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def task(self, description: str, *, total: int | None, unit: str = "") -> Iterator[Advance]:
        columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn()]
        columns += [DownloadColumn(), TransferSpeedColumn()] if unit == "bytes" else [MofNCompleteColumn()]
        columns += [TextColumn("time left"), TimeRemainingColumn()]
        with Progress(*columns, console=self._console) as progress:
            task_id = progress.add_task(description, total=total)
            yield lambda steps: progress.update(task_id, advance=steps)

    def message(self, text: str) -> None:
        self._console.print(text, markup=False)


class _LineProgress:
    """For a log: a line at the start of each task and one at its end, and few between."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.message = write

    @contextmanager
    def task(self, description: str, *, total: int | None, unit: str = "") -> Iterator[Advance]:
        task = _LoggedTask(description, total=total, unit=unit, write=self.message)
        try:
            yield task.advance
        except BaseException:
            task.end("stopped at ")
            raise
        task.end()


class _LoggedTask:
    def __init__(self, description: str, *, total: int | None, unit: str, write: Callable[[str], None]) -> None:
        self._description = description
        self._total = total
        self._unit = unit
        self._write = write
        self._done = 0
        # Files are written by several threads.
        self._lock = threading.Lock()
        self._started = self._written = time.monotonic()
        write(description if self._is_one else f"{description}: {self._amount(total or 0)} to do")

    def advance(self, steps: int) -> None:
        with self._lock:
            self._done += steps
            now = time.monotonic()
            if now - self._written < SECONDS_BETWEEN_LINES:
                return
            self._written = now
            line = f"{self._description}: {self._count()}"
            if self._total is not None and 0 < self._done < self._total:
                line += f", about {_duration((now - self._started) / self._done * (self._total - self._done))} left"
            self._write(line)

    def end(self, how: str = "") -> None:
        with self._lock:
            self._write(f"{self._description}: {how}{self._count()} in {_duration(time.monotonic() - self._started)}")

    @property
    def _is_one(self) -> bool:
        """Whether there is nothing to count."""
        return self._total is None or (self._total == 1 and self._unit != "bytes")

    def _count(self) -> str:
        if self._is_one and self._done == self._total:
            return "done"
        if self._total is None or self._done == self._total:
            return f"{self._amount(self._done)} done"
        return f"{self._amount(self._done)} of {self._amount(self._total)} done"

    def _amount(self, n: int) -> str:
        if self._unit != "bytes":
            return str(n)
        return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
