"""Small files appear whole or not at all, with the permissions and through the links that plain writing would use."""

import gc
import json
import os
from contextlib import suppress
from pathlib import Path

import pytest

from abliterate.errors import InputError
from abliterate.files import check_writable, in_one_line, parse_json, uncollected, write_csv, write_file, write_json


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_it_is_written_with_the_directories_that_lead_to_it(tmp_path: Path) -> None:
    write_file(tmp_path / "a" / "b" / "c.txt", "één\r\ntwo\n")
    assert (tmp_path / "a" / "b" / "c.txt").read_bytes() == "één\r\ntwo\n".encode()
    write_file(tmp_path / "a" / "b" / "c.txt", b"\0")
    assert (tmp_path / "a" / "b" / "c.txt").read_bytes() == b"\0"
    assert names(tmp_path / "a" / "b") == ["c.txt"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_what_the_umask_leaves_and_an_older_one_what_it_had(
    tmp_path: Path, umask: int, mode: int
) -> None:
    (tmp_path / "old").write_text("x")
    (tmp_path / "old").chmod(0o640)
    before = os.umask(umask)
    try:
        write_file(tmp_path / "new", "y")
        write_file(tmp_path / "old", "y")
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == mode
    assert (tmp_path / "old").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_failure_leaves_the_older_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "x").write_text("old")
    monkeypatch.setattr(*((os, "fsync") if fails == "fsync" else (Path, "replace")), fail)
    with pytest.raises(OSError, match="No space"):
        write_file(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old"
    assert names(tmp_path) == ["x"]


def test_a_name_of_the_greatest_length_finds_room(tmp_path: Path) -> None:
    write_file(tmp_path / ("n" * 255), "x")
    assert names(tmp_path) == ["n" * 255]


def test_links_are_followed_and_what_is_no_regular_file_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_file(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to-pipe").symlink_to("pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        for name in ("pipe", "to-pipe"):
            write_file(tmp_path / name, "through it")
            assert os.read(reader, 100) == b"through it"
    finally:
        os.close(reader)
    with pytest.raises(IsADirectoryError):
        write_file(tmp_path, "x")
    assert names(tmp_path) == ["link", "pipe", "real", "to-pipe"]


def test_what_can_be_written_is_known_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = names(tmp_path)
    for name in ("file", "new", "a/b/new", "link", "pipe"):
        check_writable(tmp_path / name, flag="-o")
    for name in (".", "a/b"):
        check_writable(tmp_path / name, flag="--report", directory=True)
    for name, directory, message in (
        (".", False, "is a directory; give -o a file"),
        ("file/new", False, "Not a directory; choose another -o"),
        ("n" * 256, False, "File name too long; choose another -o"),
        ("file", True, "is no directory; give -o a directory"),
        ("file/new", True, "Not a directory; choose another -o"),
    ):
        with pytest.raises(InputError, match=message):
            check_writable(tmp_path / name, flag="-o", directory=directory)
    assert names(tmp_path) == before
    assert (tmp_path / "file").read_text() == "mine"


def test_documents_and_tables(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": "é", "b": [1.5, float("nan")]})
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert text.startswith('{\n  "a": "é",')
    assert text.endswith("}\n")
    assert json.loads(text) == {"a": "é", "b": [1.5, None]}
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "y.json", float("nan"), allow_nan=False)
    write_csv(tmp_path / "x.csv", ("a", "b"), [(1, None), ("x,y", 0.5)])
    assert (tmp_path / "x.csv").read_bytes() == b'a,b\r\n1,\r\n"x,y",0.5\r\n'
    assert names(tmp_path) == ["x.csv", "x.json"]


@pytest.mark.parametrize(
    ("says", "line"),
    [
        ("no such\n  file.", "no such file"),
        ("a red \x1b[31m word", "a red \\x1b[31m word"),
        ("n" * 300, "n" * 300),
        ("n" * 301, "n" * 297 + "..."),
    ],
)
def test_what_a_library_says_becomes_part_of_a_line(says: str, line: str) -> None:
    assert in_one_line(ValueError(says)) == line


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[" * 64 + "]" * 64, None),
        ("[" * 65 + "]" * 65, "nests more than 64 levels"),
        ('{"a": [' * 32 + "1" + "]}" * 32, None),
        ('{"b": 1, "c": ' + '{"a": [' * 32 + "1" + "]}" * 32 + "}", "nests more than 64 levels"),
        ("9" * 400, None),
        ("-" + "9" * 399, None),
        ("-" + "9" * 400, "has 401 digits"),
        ('["' + "9" * 500 + '", 12]', None),
        ('{"a": 1, "%s": 2}' % ("b" * 1000), None),
        ('{"a": 1, "%s": 2}' % ("b" * 1001), "a name has 1001 characters"),
        ('{"a": 1, "b\u200b": 2}', "cannot be shown"),
        ('{"%s": 1, "a": 2, "a": 3}' % ("b" * 1000), "'a' occurs twice"),
        ('["\\u00e9", "\\\\ud800"]', None),
        ('["\\ud800"]', "half of a surrogate pair"),
        ('{"a": {"b": ["x", "\\udc00"]}}', "half of a surrogate pair"),
        ('["\\ud83d\\ude00"]', None),
        ("[1.5, 1e999]", "is not finite"),
        ("[NaN]", "is not JSON"),
    ],
    ids=lambda value: value[:30] if value else "fine",
)
def test_json_of_others_is_taken_or_refused_to_the_letter(text: str, problem: str | None) -> None:
    if problem is None:
        assert parse_json(text.encode()) == json.loads(text)
        return
    with pytest.raises(ValueError, match=problem):
        parse_json(text.encode())


@pytest.mark.parametrize("was_enabled", [True, False])
def test_the_collector_is_as_it_was_whatever_happens(was_enabled: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if was_enabled else gc.disable)()
        seen = []
        with suppress(InputError), uncollected():
            seen.append(gc.isenabled())
            raise InputError("x")
        assert [*seen, gc.isenabled()] == [False, was_enabled]
    finally:
        (gc.enable if before else gc.disable)()
