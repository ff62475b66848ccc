"""Where output goes: the report (a table, or one JSON document) on stdout; everything else on stderr."""

import dataclasses
import enum
import json
import math
import os
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from abliterate.cli.stages import (
    LINE_WIDTH,
    SECONDS_BETWEEN_LINES,
    BarProgress,
    LineProgress,
    Stages,
    telling_of_pauses,
)
from abliterate.errors import InputError
from abliterate.files import check_writable, printable
from abliterate.processes import in_first_process
from abliterate.progress import SILENT, ProgressReporter

if TYPE_CHECKING:
    from abliterate.release.gates import Comparison, GateResult

SCHEMAS: Mapping[str, int] = {
    "audit": 1,
    "chat": 1,
    "convert": 1,
    "demo": 1,
    "error": 1,
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
print in place of its usual document. `error` is what any of them prints where an error left it without a report.
docs/schemas/README.md says when a number rises."""
_LONGEST_WHOLE = 24
_documents: list[str] = []


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


def write_document(name: str, content: Mapping[str, Any]) -> None:
    """Write one JSON document to stdout, and remember that there is one.

    Args:
        name: Its name in `SCHEMAS`.
        content: Its keys but for the first, `schema`.
    """
    _documents.append(name)
    marked = {"schema": f"abliterate.{name}/{SCHEMAS[name]}", **content}
    # An escape of Python's would be none of JSON's.
    is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    sys.stdout.write(json.dumps(marked, indent=2, ensure_ascii=not is_unicode) + "\n")


def forget_documents() -> None:
    """Begin anew: nothing is on stdout yet."""
    _documents.clear()


def write_error(kind: str, message: str, *, exit_code: int) -> None:
    """Write an error as a document, unless the command has written its report before."""
    if not _documents:
        write_document("error", {"error": kind, "message": message, "exit_code": exit_code})


class SafeConsole(Console):
    """A console on which texts of others, as in a config, a direction file or a reply, cannot act on the terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Render a text, what a terminal acts on written as escapes."""
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render anything; what texts in it hold for a terminal is written as escapes."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How a command speaks, as options before it and after it say together.

    Attributes:
        quiet: Nothing but errors on stderr.
        verbose: Library logs and tracebacks on stderr.
        json_output: One JSON document on stdout.
        interval: Seconds after which a log has a line about a task that goes on.
        stages: What the command has done so far.
    """

    quiet: bool = False
    verbose: bool = False
    json_output: bool = False
    interval: float = SECONDS_BETWEEN_LINES
    stages: Stages = dataclasses.field(default_factory=Stages)


class Output:
    """One command's output: `report` writes the result to stdout, the rest goes to stderr."""

    def __init__(
        self, command: str, *, json_output: bool = False, quiet: bool = False, manner: Manner | None = None
    ) -> None:
        self.command = command
        self._manner = manner or Manner(quiet=quiet)
        self.json_output = json_output or self._manner.json_output
        self.quiet = self._manner.quiet
        self.stderr = SafeConsole(stderr=True, highlight=False)

    @classmethod
    def of(cls, context: typer.Context, *, json_output: bool) -> "Output":
        """Return the output of one command under the global options held by `context`."""
        return cls(context.info_name or "", json_output=json_output, manner=context.obj)

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
            write_document(self.command if document is None else f"{self.command}.{document}", to_plain(report))
            return
        console = SafeConsole(highlight=False)
        if not console.is_terminal and "COLUMNS" not in os.environ:
            console = SafeConsole(highlight=False, width=LINE_WIDTH)
        for part in tables():
            if isinstance(part, Table):
                show_table(console, part)
            else:
                # Text is for scripts too: nothing in it is markup, and no line of it is broken.
                console.print(part, markup=False, soft_wrap=True)

    def plain(self, report: Any) -> Any:
        """Return a report as values JSON can hold."""
        return to_plain(report)

    def note(self, text: str) -> None:
        """Write one line to stderr unless quiet; in a log, which has no width, a long one goes on in the next."""
        if self.quiet:
            return
        for line in [text] if self.stderr.is_terminal else in_lines(text):
            self.stderr.print(line, markup=False, soft_wrap=True)

    def write(self, text: str) -> None:
        """Write a piece of text to stdout at once, as it comes; a terminal acts on nothing in it."""
        sys.stdout.write(printable(text))
        sys.stdout.flush()

    @property
    def progress(self) -> ProgressReporter:
        """A reporter that draws bars on a terminal and writes lines to a log, both on stderr; or a silent one."""
        if self.quiet or not in_first_process():
            return SILENT
        stages = self._manner.stages
        if self._draws:
            return BarProgress(self.stderr, stages)
        return LineProgress(self.note, stages, self._manner.interval)

    @property
    def _draws(self) -> bool:
        # Some environments call for colours where there is no terminal; bars would fill their logs.
        return self.stderr.is_terminal and self.stderr.file.isatty() and not self.stderr.is_dumb_terminal

    def telling_of_pauses(self) -> AbstractContextManager[None]:
        """Let a log say so where the command is long between two tasks."""
        if self.quiet or not in_first_process() or self._draws:
            return nullcontext()
        return telling_of_pauses(self.note, self._manner.stages, self._manner.interval)

    def summary(self) -> None:
        """Write what took how long, unless quiet or short."""
        if in_first_process():
            for line in self._manner.stages.summary():
                self.note(line)


def in_lines(text: str) -> list[str]:
    """Return a text as lines of a log: at most `LINE_WIDTH` columns, and no word, such as a path, is broken."""
    return textwrap.wrap(text, LINE_WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def show_table(console: Console, table: Table) -> None:
    """Print a table, its title and its caption, none of them cut and no word of them broken that has room.

    A title or caption is as wide as the console, not as its table. A table that does not find room turns into lines:
    a block a row, with a line a cell.
    """
    title, caption = table.title, table.caption
    table.title = table.caption = None
    if title:
        console.print(Text(str(title), style="italic"))
    if _finds_room(console, table):
        for column in table.columns:
            column.no_wrap, column.overflow = False, "fold"
        console.print(table)
    else:
        _print_rows(console, table)
    if caption:
        console.print(Text(str(caption), style="dim italic"))


def _finds_room(console: Console, table: Table) -> bool:
    # On a terminal a name that is longer goes on in the next line; what is not a terminal may be searched for it.
    most = _LONGEST_WHOLE if console.is_terminal else sys.maxsize
    width = 1 + 3 * len(table.columns)
    for column in table.columns:
        texts = [_text_of(console, cell) for cell in (column.header, *column.cells)]
        width += min(max((cell_len(word) for text in texts for word in text.plain.split()), default=0), most)
    return width <= console.width


def _print_rows(console: Console, table: Table) -> None:
    rows = zip(*(column.cells for column in table.columns), strict=True)
    for first, *others in rows:
        console.print(_text_of(console, first), soft_wrap=True)
        for column, cell in zip(table.columns[1:], others, strict=True):
            if (text := _text_of(console, cell)).plain:
                console.print(Text.assemble("  ", _text_of(console, column.header), ": ", text), soft_wrap=True)


def _text_of(console: Console, cell: RenderableType) -> Text:
    return cell if isinstance(cell, Text) else console.render_str(str(cell))


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
