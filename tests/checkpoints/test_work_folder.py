"""What of a directory is the tool's, by its list, and that nothing else is removed."""

import os
from pathlib import Path

import pytest

from abliterate.checkpoints.work_folder import OWN, claim, claimed, files_in, foreign_files, lock_in, remove_own
from abliterate.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lock_in(tmp_path / "work" / OWN).release()
    return tmp_path / "work"


def names(path: Path) -> set[str]:
    return {file.relative_to(path).as_posix() for file in path.rglob("*")}


def test_only_what_is_on_the_list_is_removed(folder):
    claim(folder, dict.fromkeys(["config.json", "below/deep/a", "never-written"]))
    (folder / "below" / "deep").mkdir(parents=True)
    for name in ("config.json", ".config.json.partial-17", "below/deep/a"):
        (folder / name).write_text("ours")
    for name in ("below/b", "config.json.partial-17", ".other.partial-17", ".abliterate/notes"):
        (folder / name).write_text("theirs")
    (folder / "link").symlink_to(folder)
    assert foreign_files(folder) == [".other.partial-17", "below/b", "config.json.partial-17", "link"]
    remove_own(folder)
    assert names(folder) == {".other.partial-17", "below", "below/b", "config.json.partial-17", "link"} | {
        OWN,
        f"{OWN}/notes",
    }


def test_what_stays_is_kept_and_an_empty_directory_goes(folder):
    claim(folder, dict.fromkeys(["a", "b"]))
    (folder / "a").write_text("x")
    (folder / "b").write_text("x")
    remove_own(folder, keep=["a"], and_itself=False)
    assert files_in(folder).keys() == {"a"}
    remove_own(folder)
    assert not folder.exists()


def test_a_file_that_has_changed_since_it_was_listed_is_somebody_elses(folder):
    (folder / "a").write_text("x")
    (folder / "b").write_text("x")
    claim(folder, files_in(folder))
    assert foreign_files(folder) == []
    (folder / "a").write_text("more")
    os.replace(folder / "b", folder / "c")
    remove_own(folder)
    assert files_in(folder).keys() == {"a", "c"}


def test_without_a_list_nothing_is_the_tools_but_in_what_an_older_version_left(folder):
    (folder / "a").write_text("x")
    assert foreign_files(folder) == ["a"]
    (folder / OWN / "journal-0.jsonl").write_text("{}\n")
    assert claimed(folder) is None
    assert foreign_files(folder) == []
    remove_own(folder)
    assert not folder.exists()


def test_where_the_files_are_not_known_all_are_the_tools(folder):
    claim(folder, None)
    (folder / "below").mkdir()
    (folder / "below" / "a").write_text("x")
    assert foreign_files(folder) == []
    remove_own(folder)
    assert not folder.exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": 1}', '{"files": {"a": [1]}}'])
def test_a_damaged_list_is_one_line_and_nothing_is_removed(folder, content):
    (folder / OWN / "files.json").write_text(content)
    (folder / "a").write_text("x")
    with pytest.raises(InputError, match=r"files\.json: is damaged .*move .* away") as raised:
        remove_own(folder)
    assert "\n" not in str(raised.value)
    assert (folder / "a").exists()


def test_a_parent_that_is_gone_is_not_made_again(tmp_path):
    with pytest.raises(FileNotFoundError):
        claim(tmp_path / "gone", {})
    with pytest.raises(FileNotFoundError):
        lock_in(tmp_path / "gone" / OWN, parents=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("and_itself", [True, False])
def test_a_directory_made_for_a_file_that_was_never_written_goes(folder, and_itself):
    claim(folder, dict.fromkeys(["below/deep/never-written", "a"]))
    (folder / "below" / "deep").mkdir(parents=True)
    remove_own(folder, and_itself=and_itself)
    assert not (folder / "below").exists()
    assert folder.exists() != and_itself


def test_empty_directories_do_not_keep_a_folder_that_goes(folder):
    (folder / "a").write_text("x")
    (folder / "empty" / "in it").mkdir(parents=True)
    (folder / "theirs").mkdir()
    claim(folder, files_in(folder))
    (folder / "theirs" / "late").write_text("x")
    remove_own(folder)
    assert names(folder) == {"theirs", "theirs/late"}
    (folder / "theirs" / "late").unlink()
    lock_in(folder / OWN).release()
    remove_own(folder)
    assert not folder.exists()


def test_a_list_knows_names_that_cannot_be_shown(tmp_path: Path) -> None:
    """Found by the fuzzer of checkpoints: a base may hold a file with a line break in its name."""
    files = {"a\nb\x1b[31m.txt": None, "x" * 250: (1, 2, 3)}
    (tmp_path / OWN).mkdir()
    claim(tmp_path, files)
    assert claimed(tmp_path) == files
