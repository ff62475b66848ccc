"""What goes to stdout and what to stderr, and what a report becomes as JSON."""

import dataclasses
import enum
import io
import json
import math
import re
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from abliterate.cli.output import Output, accept_any_text, command_line, to_plain


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
    Output("plan", json_output=True).report(REPORT, tables=lambda: ["a table"])
    out, error = capsys.readouterr()
    assert (json.loads(out), error) == ({"schema": "abliterate.plan/1", **plain}, "")
    assert to_plain(math.inf) is None


def test_a_text_is_no_markup_and_its_line_is_not_broken(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    Output("plan").report(REPORT, tables=lambda: ["[bold]" + "word " * 20])
    assert capsys.readouterr().out == "[bold]" + "word " * 20 + "\n"


def test_what_others_wrote_cannot_act_on_the_terminal(capsys):
    table = Table("name")
    table.add_row("a\x1b[31mb")
    Output("plan").report(REPORT, tables=lambda: [table])
    Output("plan").note("c\x1b]0;title\x07d")
    out, error = capsys.readouterr()
    assert "\x1b" not in out + error
    assert "\\x1b[31mb" in out


def test_a_hash_is_whole_on_the_narrowest_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "24")
    table = Table("name", "sha256")
    table.add_row("a", "0123456789abcdef" * 4)
    Output("plan").report(REPORT, tables=lambda: [table])
    assert "0123456789abcdef" * 4 in re.sub(r"[^0-9a-f]", "", capsys.readouterr().out.partition("sha256")[2])


def test_notes_and_progress_go_to_stderr_unless_quiet(capsys):
    for quiet in (False, True):
        output = Output("plan", quiet=quiet)
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
    Output("plan", json_output=True).report(REPORT, tables=list)
    assert capsys.readouterr().out == ""


def test_the_command_can_be_typed_again(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/abliterate", "plan", "my model"])
    assert command_line() == "abliterate plan 'my model'"


class Log(io.TextIOWrapper):
    """Where a command's lines go when no terminal shows them."""

    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)

    @property
    def text(self) -> str:
        return self.buffer.getvalue().decode()  # type: ignore[attr-defined]


TIMES_LEFT = {n: f"{10 * (40 - n)} s" if 40 - n < 6 else f"{round(10 * (40 - n) / 60)} min" for n in range(3, 40, 3)}


def test_in_a_log_a_task_is_a_line_at_its_start_few_between_and_one_at_its_end(capsys, monkeypatch):
    seconds = [0.0]
    monkeypatch.setattr("abliterate.cli.output.time.monotonic", lambda: seconds[0])
    progress = Output("plan").progress
    with progress.task("Answering prompts", total=40) as advance:
        for _ in range(40):
            seconds[0] += 10
            advance(1)
    assert capsys.readouterr().err.splitlines() == [
        "Answering prompts: 40 to do",
        *(f"Answering prompts: {n} of 40 done, about {left} left" for n, left in TIMES_LEFT.items()),
        "Answering prompts: 40 done in 7 min",
    ]


def test_a_log_counts_bytes_as_such_and_says_where_a_task_stopped(capsys, monkeypatch):
    monkeypatch.setattr("abliterate.cli.output.time.monotonic", lambda: 0.0)
    with Output("plan").progress.task("Hashing", total=2_500_000_000, unit="bytes") as advance:
        advance(2_500_000_000)
    with Output("plan").progress.task("Loading", total=1) as advance:
        advance(1)
    with Output("plan").progress.task("Reading", total=None) as advance:
        advance(2)
    with pytest.raises(KeyboardInterrupt), Output("plan").progress.task("Writing", total=5_000_000, unit="bytes"):
        raise KeyboardInterrupt
    assert capsys.readouterr().err.splitlines() == [
        "Hashing: 2.5 GB to do",
        "Hashing: 2.5 GB done in 0 s",
        "Loading",
        "Loading: done in 0 s",
        "Reading",
        "Reading: 2 done in 0 s",
        "Writing: 5.0 MB to do",
        "Writing: stopped at 0.0 MB of 5.0 MB done in 0 s",
    ]


@pytest.mark.parametrize("variables", [{}, {"FORCE_COLOR": "1"}, {"TTY_COMPATIBLE": "1"}, {"COLUMNS": "20"}])
def test_a_log_holds_no_blank_line_no_control_code_and_no_broken_line(capsys, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    output = Output("plan")
    with output.progress.task("Recording the prompts of a set with a long name", total=2) as advance:
        advance(2)
    output.note("one note that is longer than a line of a narrow terminal")
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 3
    assert all(line.strip() for line in error.splitlines())
    assert "\x1b" not in error


def test_an_encoding_without_the_characters_takes_every_text(monkeypatch):
    table = Table("norm", title="|r·W|")
    table.add_row("≤ 1 \x1b[2J")
    for json_output, expected in ((False, "|r\\xb7W|"), (True, '"|r\\u00b7W|"')):
        out, error = Log("ascii"), Log("latin-1")
        monkeypatch.setattr("sys.stdout", out)
        monkeypatch.setattr("sys.stderr", error)
        accept_any_text()
        output = Output("plan", json_output=json_output)
        output.report({"name": "|r·W|"}, tables=lambda: [table])
        output.note("|r·W| ≤ 1")
        assert expected in out.text
        assert "\x1b" not in out.text
        assert error.buffer.getvalue() == b"|r\xb7W| \\u2264 1\n"  # type: ignore[attr-defined]
        if json_output:
            assert json.loads(out.text) == {"schema": "abliterate.plan/1", "name": "|r·W|"}


def test_texts_of_others_cannot_act_on_the_terminal_wherever_they_stand(capsys):
    output = Output("plan")
    output.report(REPORT, tables=lambda: [Text("a\x1b[31mb\u202e")])
    output.write("Spaces \u3000 and \u200d joiners stay; \x1b]52;c;x\x07\x9b \ud800 do not.\n")
    out = capsys.readouterr().out
    assert out == (
        "a\\x1b[31mb\\u202e\nSpaces \u3000 and \u200d joiners stay; \\x1b]52;c;x\\x07\\x9b \\ud800 do not.\n"
    )
