import os
from collections.abc import Callable
from pathlib import Path

import pytest

import abliterate.checkpoints.atomic_directory
from abliterate.checkpoints.atomic_directory import check_output_directory, published_directory
from abliterate.errors import CheckpointError, InputError


def publish(
    output: Path,
    content: str,
    *,
    error: BaseException | None = None,
    overwrite: bool = True,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    with published_directory(output, overwrite=overwrite) as partial:
        (partial / "config.json").write_text(content)
        meanwhile()
        if error is not None:
            raise error


def tree(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): file.read_text() for file in sorted(path.rglob("*")) if file.is_file()}


def test_it_appears_with_its_parents_when_it_is_whole(tmp_path):
    out = tmp_path / "a" / "b" / "out"
    with published_directory(out, overwrite=False) as partial:
        (partial / "config.json").write_text("{}")
        assert not out.exists()
        assert partial.parent == out.parent
    assert tree(tmp_path) == {"a/b/out/config.json": "{}"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_it_replaces_the_older_one_as_a_whole(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(abliterate.checkpoints.atomic_directory, "_rename_at", lambda *_: False)
    out = tmp_path / "out"
    publish(out, "old")
    (out / "stale.txt").write_text("x")
    (out / "empty").mkdir()
    publish(out, "new")
    assert tree(tmp_path) == {"out/config.json": "new"}
    assert not (out / "empty").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x"), SystemExit(1)])
def test_a_body_that_fails_leaves_nothing_and_the_older_one_as_it_was(tmp_path, old, error):
    out = tmp_path / "a" / "out"
    if old:
        publish(out, "old")
    before = tree(tmp_path)
    with pytest.raises(type(error)):
        publish(out, "new", error=error)
    assert tree(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["a"] if old else [])


def test_a_full_disk_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match=r"No space left on device; .*out was left as it was") as error:
        publish(tmp_path / "out", "new", error=OSError(28, "No space left on device"))
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_two_directories_change_places_at_once(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert abliterate.checkpoints.atomic_directory._rename_at(tmp_path / "one", tmp_path / "other", 2)
    assert tree(tmp_path) == {"one/other": "", "other/one": ""}
    with pytest.raises(FileNotFoundError):
        abliterate.checkpoints.atomic_directory._rename_at(tmp_path / "one", tmp_path / "none", 2)


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("appears", ["checkpoint", "empty", "file"])
def test_what_appears_meanwhile_is_not_replaced(tmp_path, monkeypatch, can_exchange, appears):
    if not can_exchange:
        monkeypatch.setattr(abliterate.checkpoints.atomic_directory, "_rename_at", lambda *_: False)
    out = tmp_path / "out"

    def meanwhile() -> None:
        if appears == "file":
            out.write_text("theirs")
            return
        out.mkdir()
        if appears == "checkpoint":
            (out / "config.json").write_text("theirs")

    with pytest.raises(CheckpointError, match="appeared while this run was going on") as error:
        publish(out, "mine", overwrite=False, meanwhile=meanwhile)
    assert "\n" not in str(error.value)
    assert tree(tmp_path) == {"checkpoint": {"out/config.json": "theirs"}, "file": {"out": "theirs"}}.get(appears, {})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_with_overwrite_too_only_a_checkpoint_that_appears_meanwhile_is_replaced(tmp_path):
    out = tmp_path / "out"

    def meanwhile() -> None:
        out.mkdir()
        (out / "thesis.tex").write_text("x")

    with pytest.raises(CheckpointError, match="no checkpoint"):
        publish(out, "mine", meanwhile=meanwhile)
    assert tree(tmp_path) == {"out/thesis.tex": "x"}


def test_a_failed_rename_brings_the_older_one_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    publish(out, "old")
    rename = Path.rename

    def fail_to_publish(self: Path, target: Path) -> Path:
        if self.name.endswith(".new"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_to_publish)
    monkeypatch.setattr(abliterate.checkpoints.atomic_directory, "_rename_at", lambda *_: False)
    with pytest.raises(CheckpointError, match="Input/output error"):
        publish(out, "new")
    assert tree(tmp_path) == {"out/config.json": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be made"):
        publish(tmp_path / "file" / "out", "new")


def test_a_published_directory_has_ordinary_permissions(tmp_path):
    publish(tmp_path / "out", "new")
    (tmp_path / "plain").mkdir()
    assert os.stat(tmp_path / "out").st_mode == os.stat(tmp_path / "plain").st_mode


def test_what_is_not_there_may_be_made(tmp_path):
    check_output_directory(tmp_path / "out", overwrite=False)
    check_output_directory(tmp_path / "a" / "b" / "out", overwrite=False)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written: Not a directory; choose another place"):
        check_output_directory(tmp_path / "file" / "below" / "out", overwrite=False)


@pytest.mark.parametrize("files", [[], ["config.json", "stale.txt"]])
def test_only_with_overwrite_an_empty_directory_or_a_checkpoint_is_replaced(tmp_path, files):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match="--overwrite"):
        check_output_directory(tmp_path, overwrite=False)
    check_output_directory(tmp_path, overwrite=True)


def test_what_was_named_by_mistake_is_not_replaced(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name, message in (
        ("precious", "no checkpoint"),
        ("file", "not a directory"),
        ("link", "not a directory"),
        ("dangling", "not a directory"),
    ):
        with pytest.raises(InputError, match=message):
            check_output_directory(tmp_path / name, overwrite=True)
