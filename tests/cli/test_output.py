"""What goes to stdout and what to stderr, and what a report becomes as JSON."""

import dataclasses
import enum
import io
import json
import math
import re
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from abliterate.cli.output import Output, accept_any_text, command_line, show_table, to_plain


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


LONG = "a caption of many words, " * 8
NAME = "model.layers.10.post_attention_layernorm.weight"


def wide_table():
    table = Table("name", "count", "why", title="a title that is wider than its table " * 3, caption=LONG)
    table.add_row(NAME, "3", "[bold]because[/]")
    table.add_row("b", "", "so")
    return table


@pytest.mark.parametrize("columns", [24, 60, 120, None])
def test_a_table_that_finds_no_room_turns_into_lines_and_nothing_is_cut(capsys, monkeypatch, columns):
    if columns is None:
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", str(columns))
    Output("plan").report(REPORT, tables=lambda: [wide_table()])
    out = capsys.readouterr().out
    assert NAME in out  # in one line, so that a search finds it
    assert LONG.strip() in " ".join(out.split())
    assert "because" in out
    assert "bold" not in out
    assert "…" not in out
    lines = out.splitlines()
    assert max(len(line) for line in lines if NAME not in line) <= (columns or 120)
    if columns in {24, 60}:
        assert lines[lines.index(NAME) :][:5] == [NAME, "  count: 3", "  why: because", "b", "  why: so"]
    else:
        assert any("│ 3 " in line for line in lines)


def test_on_a_terminal_a_long_name_goes_on_in_the_next_line():
    console = Console(file=io.StringIO(), force_terminal=True, width=60, color_system=None)
    show_table(console, wide_table())
    rows = [line.split("│") for line in console.file.getvalue().splitlines() if "│" in line]
    assert NAME in "".join(row[1].strip() for row in rows)


def test_a_note_in_a_log_is_broken_between_words_alone(capsys):
    path = "/a" * 80
    Output("plan").note("a note of some words " * 8 + path)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert max(map(len, lines[:2])) <= 120
    assert lines[2] == f"  {path}"


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


def test_a_log_counts_bytes_as_such_and_says_where_a_task_stopped(capsys, monkeypatch):
    monkeypatch.setattr("abliterate.cli.stages.time.monotonic", lambda: 0.0)
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
