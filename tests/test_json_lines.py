"""A file of JSON lines: one torn line is no line, other damage is an error, U+2028 is a character like others."""

import os
from pathlib import Path
from typing import Any

import pytest

from abliterate.errors import InputError
from abliterate.files import JsonLines

VALUES = [{"a": 1}, ["b\u2028c\u2029d\x85e", 0.5], {"f": None}]


def same(value: Any) -> Any:
    return value


@pytest.fixture
def lines(tmp_path: Path) -> JsonLines:
    file = JsonLines(tmp_path / "x.jsonl", remedy="compute it again", mode=0o600)
    for value in VALUES:
        file.append(value)
    return file


def test_what_was_written_is_read_back(lines: JsonLines) -> None:
    assert lines.read(same) == VALUES
    assert lines.path.read_bytes() == (b'{"a": 1}\n["b\\u2028c\\u2029d\\u0085e", 0.5]\n{"f": null}\n')
    assert lines.path.stat().st_mode & 0o777 == 0o600


def test_line_breaks_of_unicode_inside_a_string_are_no_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"completion": "one\u2028two\u2029three\x85four"}\n{"completion": "five"}\n', encoding="utf-8")
    assert [line["completion"] for line in JsonLines(path).read(dict)] == ["one\u2028two\u2029three\x85four", "five"]


def test_cut_anywhere_it_holds_the_lines_before_and_goes_on(lines: JsonLines) -> None:
    whole = lines.path.read_bytes()
    for cut in range(len(whole)):
        lines.path.write_bytes(whole[:cut])
        n_whole = whole[:cut].count(b"\n")
        assert lines.read(same) == VALUES[:n_whole]
        assert lines.path.stat().st_size == cut
        assert lines.resume(same) == VALUES[:n_whole]
        lines.append("next")
        assert lines.read(same) == [*VALUES[:n_whole], "next"]


@pytest.mark.parametrize("torn", [b'{"g": 1, "h\n', b"\0\0\0\0\n", b"\xff\xfe\n", b"[1]\n", b"[" * 100_000 + b"\n"])
def test_a_torn_last_line_that_kept_its_line_feed(lines: JsonLines, torn: bytes) -> None:
    def no_short_list(value: Any) -> Any:
        if value == [1]:
            raise ValueError("too short")
        return value

    whole = lines.path.read_bytes()
    lines.path.write_bytes(whole + torn)
    assert lines.read(no_short_list) == VALUES
    assert lines.resume(no_short_list) == VALUES
    assert lines.path.read_bytes() == whole


@pytest.mark.parametrize("behind", [b'{"next": 1}\n', b'{"torn'])
def test_damage_elsewhere_is_an_error_that_names_line_and_remedy(lines: JsonLines, behind: bytes) -> None:
    damaged = lines.path.read_bytes() + b'{"g": \n' + behind
    lines.path.write_bytes(damaged)
    for read in (lines.read, lines.resume):
        with pytest.raises(InputError, match=r"x\.jsonl, line 4: is damaged \(.*\); compute it again"):
            read(same)
    assert lines.path.read_bytes() == damaged


def test_no_file_is_an_empty_one(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "x.jsonl", mode=0o640)
    assert lines.read(same) == []
    assert not lines.path.exists()
    before = os.umask(0o077)
    try:
        assert lines.resume(same) == []
    finally:
        os.umask(before)
    assert lines.path.stat().st_mode & 0o777 == 0o600
    lines.append(1)
    lines.start()
    assert lines.path.read_bytes() == b""


def test_a_line_that_finds_no_room_leaves_the_file_as_it_was(lines: JsonLines, monkeypatch: pytest.MonkeyPatch) -> None:
    before, write, calls = lines.path.read_bytes(), os.write, []

    def little_room(descriptor: int, data: Any) -> int:
        calls.append(None)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[:4])

    monkeypatch.setattr(os, "write", little_room)
    with pytest.raises(OSError, match="No space"):
        lines.append({"long": "line"})
    monkeypatch.undo()
    assert lines.path.read_bytes() == before
    lines.append("next")
    assert lines.read(same) == [*VALUES, "next"]
