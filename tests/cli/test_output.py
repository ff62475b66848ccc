"""What goes to stdout and what to stderr, and what a report becomes as JSON."""

import dataclasses
import enum
import json
import math
from pathlib import Path

from rich.table import Table

from abliterate.cli.output import Output, command_line, to_plain


class Colour(enum.StrEnum):
    RED = "red"


@dataclasses.dataclass(frozen=True)
class Inner:
    value: float


@dataclasses.dataclass(frozen=True)
class Report:
    path: Path
    colour: Colour
    parts: tuple[Inner, ...]
    counts: dict[int, int]


REPORT = Report(path=Path("a/b"), colour=Colour.RED, parts=(Inner(math.nan), Inner(0.5)), counts={3: 1})


def test_a_report_becomes_plain_values_and_what_json_cannot_hold_becomes_null(capsys):
    plain = {"path": "a/b", "colour": "red", "parts": [{"value": None}, {"value": 0.5}], "counts": {"3": 1}}
    assert to_plain(REPORT) == plain
    Output(json_output=True).report(REPORT, tables=lambda: ["a table"])
    out, error = capsys.readouterr()
    assert (json.loads(out), error) == (plain, "")
    assert to_plain(math.inf) is None


def test_a_text_is_no_markup_and_its_line_is_not_broken(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    Output().report(REPORT, tables=lambda: ["[bold]" + "word " * 20])
    assert capsys.readouterr().out == "[bold]" + "word " * 20 + "\n"


def test_what_others_wrote_cannot_act_on_the_terminal(capsys):
    table = Table("name")
    table.add_row("a\x1b[31mb")
    Output().report(REPORT, tables=lambda: [table])
    Output().note("c\x1b]0;title\x07d")
    out, error = capsys.readouterr()
    assert "\x1b" not in out + error
    assert "\\x1b[31mb" in out


def test_notes_and_progress_go_to_stderr_unless_quiet(capsys):
    for quiet in (False, True):
        output = Output(quiet=quiet)
        output.note("a note")
        output.progress.message("a message")
        with output.progress.task("Working", total=2) as advance:
            advance(2)
        out, error = capsys.readouterr()
        assert out == ""
        assert [words in error for words in ("a note", "a message")] == [not quiet] * 2


def test_of_several_processes_the_first_reports(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    Output(json_output=True).report(REPORT, tables=list)
    assert capsys.readouterr().out == ""


def test_the_command_can_be_typed_again(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/abliterate", "plan", "my model"])
    assert command_line() == "abliterate plan 'my model'"
