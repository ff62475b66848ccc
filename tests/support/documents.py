"""Pages as their readers use them: blocks of commands are run in order, and what they print is held against the page.

A block of commands (```sh, ```python) runs, or the line before it says why it does not:

    <!-- not run: needs the Hub -->

The ```text block behind a block of commands is what those print, in shape: numbers are abstracted, `...` stands for
lines that were left out, and what must agree is the columns of tables, the labels of rows and the words of sentences.
Where that line ends in `<!-- some lines -->`, the lines are among those printed, in that order.
"""

import ast
import os
import re
import runpy
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

from tests.support.command_line import CommandLine

COMMANDS = ("sh", "python")
_FENCE = re.compile(r"(?ms)^([^\n]*)\n```(\w*)\n(.*?)^```$")
_NOT_RUN = re.compile(r"<!-- not run: (\S.*) -->$")
_SOME_LINES = re.compile(r"<!-- some lines -->$")
_INDENTED_COMMAND = re.compile(r"(?m)^ {4,}(?:[A-Z_]+=\S+ )*(?:abliterate|python3?|make|pip|git|torchrun|\S+\.sh) .*$")
# What is a place in one model is another one in another.
_ABSTRACT = (
    (re.compile(r"\bat (?:final norm|layer \d+)"), "at PLACE"),
    (re.compile(r"(?<![\w.])[-+]?\d[\d.,]*(?:e[-+]?\d+)?"), "#"),
    (re.compile(r"\d+"), "#"),
    (re.compile(r"━+|─+"), "-"),
    (re.compile(r"\s+"), " "),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One fenced block of a page.

    Attributes:
        line: where its first line is.
        language: what stands behind the fence.
        text: what is in it.
        reason: why it is not run, or None.
        some_lines: the lines are not all that is printed, nor beside each other.
    """

    line: int
    language: str
    text: str
    reason: str | None
    some_lines: bool


def blocks_of(text: str) -> list[Block]:
    """Return the fenced blocks of a page."""
    found = []
    for fence in _FENCE.finditer(f"\n{text}"):
        before, language, inside = fence.groups()
        reason = _NOT_RUN.search(before)
        found.append(
            Block(
                line=text[: fence.start(3) - 1].count("\n") + 1,
                language=language,
                text=inside,
                reason=None if reason is None else reason[1],
                some_lines=_SOME_LINES.search(before) is not None,
            )
        )
    return found


def commands_outside_blocks(text: str) -> list[str]:
    """Return the lines that show a command as indented code, where no mark can stand beside it."""
    return _INDENTED_COMMAND.findall(re.sub(r"(?ms)^```.*?^```$", "", text))


def shape(text: str) -> list[str]:
    """Return the lines of an output without its numbers and widths; empty ones are left out."""
    lines = []
    for line in text.splitlines():
        for pattern, stands in _ABSTRACT:
            line = pattern.sub(stands, line)
        if line.strip():
            lines.append(line.strip())
    return lines


def missing(shown: str, printed: str, *, some_lines: bool = False) -> str | None:
    """Return the first line of a page that was not printed where it should be, and what was, or None.

    Args:
        shown: what the page shows; a line `...` stands for any number of lines.
        printed: what the commands print.
        some_lines: any number of lines may have been left out between any two.
    """
    wanted, there = shape(shown), shape(printed)
    if some_lines:
        wanted = ["...", *(each for line in wanted for each in (line, "..."))]
    runs: list[list[str]] = [[]]
    for line in wanted:
        if line == "...":
            runs.append([])
        else:
            runs[-1].append(line)
    at = 0
    for i, run in enumerate(runs):
        last = i == len(runs) - 1
        # What comes first is at the beginning, what comes last at the end, and all else somewhere between.
        starts = range(len(there) - len(run), len(there) - len(run) + 1) if last and i else range(at, len(there) + 1)
        starts = range(at, at + 1) if i == 0 else starts
        match = next((start for start in starts if start >= at and there[start : start + len(run)] == run), None)
        if match is None:
            return _where_it_parts(run, there, starts)
        at = match + len(run)
    return None if at == len(there) else f"nothing more is shown, but printed: {there[at]}"


def _where_it_parts(run: Sequence[str], there: Sequence[str], starts: Sequence[int]) -> str:
    """Return the first line of a run that is not there, and what is, at the start from which most of its lines are."""

    def agreeing(start: int) -> int:
        pairs = zip(run, there[max(0, start) :], strict=False)
        return next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(run), len(there) - start))

    start = max(starts, key=agreeing)
    n = min(agreeing(start), len(run) - 1)
    printed = there[start + n] if 0 <= start + n < len(there) else "nothing"
    return f"shown: {run[n]}; printed: {printed}"


class NotKnownError(Exception):
    """A line of shell that the reader does not know how to run."""


@dataclass
class Reader:
    """Somebody who types what a page shows, in one directory, from the first block to the last.

    Attributes:
        call_main: runs `abliterate`.
        directory: where.
        names: what is typed for a placeholder, such as MODEL.
        options: what is typed behind a command beside what the page shows: sizes.
        variables: what blocks of Python have defined so far.
    """

    call_main: CommandLine
    directory: Path
    names: dict[str, str] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    variables: dict[str, Any] = field(default_factory=dict)

    def read(self, text: str) -> list[str]:
        """Run the blocks of a page and return what is wrong with it, a line a fault."""
        faults: list[str] = []
        printed: str | None = None
        for block in blocks_of(text):
            where = f"line {block.line}"
            if block.language in COMMANDS:
                printed = None
                if block.reason is not None:
                    continue
                try:
                    printed = self.run(block)
                except (AssertionError, NotKnownError) as failure:
                    return [*faults, f"{where}: {failure}"]
            elif block.language == "text" and block.reason is None:
                if printed is None:
                    faults.append(f"{where}: no command was run that could have printed this")
                    continue
                line = missing(block.text, printed, some_lines=block.some_lines)
                if line is not None:
                    faults.append(f"{where}: {line}")
        return faults

    def run(self, block: Block) -> str:
        """Run one block and return what it writes to stdout."""
        text = re.sub(r"\\\n\s*", " ", block.text) if block.language == "sh" else block.text
        for name, typed in self.names.items():
            text = re.sub(rf"(?<![\w/]){re.escape(name)}(?!\w)", typed, text)
        kept = Path.cwd()
        os.chdir(self.directory)
        try:
            if block.language == "python":
                return self._python(text)
            return "".join(self._command(line) for line in text.splitlines() if words_of(line))
        finally:
            os.chdir(kept)

    def _python(self, text: str) -> str:
        out = StringIO()
        with redirect_stdout(out):
            exec(compile(ast.parse(text), "a block of the page", "exec"), self.variables)
        return out.getvalue()

    def _command(self, line: str) -> str:
        program, *words = words_of(line)
        if program == "abliterate":
            words += shlex.split(self.options.get(words[0], ""))
            done = self.call_main(*words)
            assert done.exit_code == 0, f"`{line.strip()}` ends with {done.exit_code}: {done.stderr[-2000:]}"
            return done.stdout
        if program == "python" and words and words[0].endswith(".py"):
            out = StringIO()
            with redirect_stdout(out), mock.patch.object(sys, "argv", words):
                runpy.run_path(words[0], run_name="__main__")
            return out.getvalue()
        raise NotKnownError(f"`{line.strip()}`: mark the block `<!-- not run: REASON -->`, or teach the reader")


def words_of(line: str) -> Sequence[str]:
    """Return the words of a line of shell, none of a comment.

    Raises:
        NotKnownError: it is more than one simple command.
    """
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = list(lexer)
    if any(re.fullmatch(r"[();<>|&]+", word) for word in words) or re.search(r"[$`]", line):
        raise NotKnownError(f"`{line.strip()}` is more than one command: mark its block, or teach the reader")
    return words
