import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import abliterate.checkpoints.partial_run
from abliterate.checkpoints.file_ranges import hash_file
from abliterate.checkpoints.partial_run import Journal, PartialRun, partial_path, partial_run, read_journals
from abliterate.errors import CheckpointError, InputError, InterruptedRunError, Terminated, VerificationError

KEY = {"model": "a", "set of options": "b"}


class Messages:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def task(self, description: str, *, total: int | None, unit: str = "") -> Iterator[Any]:
        yield lambda _steps: None

    def message(self, text: str) -> None:
        self.lines.append(text)


def start(out: Path, *, resume: bool = False, key: dict[str, str] = KEY) -> tuple[PartialRun, list[str]]:
    messages = Messages()
    return PartialRun(out, key=key, resume=resume, workers=2, progress=messages), messages.lines


def finish(run: PartialRun, name: str, content: str) -> None:
    path = run.directory.path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    run.directory.journal.add(name, {"sha256": hash_file(path), "bytes": len(content), "more": [1.5]})


def interrupted(out: Path) -> None:
    """Leave what a run leaves that was killed: two finished files and half of a third."""
    run, _ = start(out)
    finish(run, "config.json", "{}")
    finish(run, "below/model.safetensors", "weights")
    (run.directory.path / "half").write_text("ha")
    run._folder._lock.release()


def names(path: Path) -> set[str]:
    return {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}


def test_it_appears_whole_and_with_nothing_of_its_own(tmp_path):
    run, messages = start(tmp_path / "new" / "out")
    finish(run, "config.json", "{}")
    assert not (tmp_path / "new" / "out").exists()
    run.publish()
    assert names(tmp_path) == {"new/out/config.json"}
    assert messages == []


def test_a_second_run_to_the_same_target_is_refused_until_the_first_is_over(tmp_path):
    run, _ = start(tmp_path / "out")
    with pytest.raises(InputError, match="another run is writing it"):
        start(tmp_path / "out", resume=True)
    finish(run, "config.json", "{}")
    run.publish()
    second, _ = start(tmp_path / "out")
    second.give_up(ValueError("x"))
    assert names(tmp_path) == {"out/config.json"}


def test_a_lock_on_a_directory_that_has_been_published_meanwhile_is_none(tmp_path, monkeypatch):
    flock, first = fcntl.flock, []

    def publish_first(descriptor: int, operation: int) -> None:
        if not first:
            first.append(True)
            (partial_path(tmp_path / "out")).rename(tmp_path / "out")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", publish_first)
    run, _ = start(tmp_path / "out")
    assert run.directory.path.is_dir()
    assert run._folder._lock.is_of(run.directory.path / ".abliterate" / "lock")


class TestResume:
    def test_what_is_whole_is_kept_and_the_rest_removed(self, tmp_path):
        interrupted(tmp_path / "out")
        run, messages = start(tmp_path / "out", resume=True)
        assert run.directory.kept.keys() == {"config.json", "below/model.safetensors"}
        assert run.directory.kept["config.json"]["more"] == [1.5]
        assert not (run.directory.path / "half").exists()
        assert "2 files are finished and were checked" in messages[0]
        # And a third run still knows of them.
        run._folder._lock.release()
        assert len(start(tmp_path / "out", resume=True)[0].directory.kept) == 2

    @pytest.mark.parametrize("damage", ["change", "cut", "remove"])
    def test_nothing_is_believed(self, tmp_path, damage):
        interrupted(tmp_path / "out")
        victim = partial_path(tmp_path / "out") / "below" / "model.safetensors"
        if damage == "remove":
            victim.unlink()
        else:
            victim.write_text({"change": "Weights", "cut": "weight"}[damage])
        run, _ = start(tmp_path / "out", resume=True)
        assert run.directory.kept.keys() == {"config.json"}
        assert not victim.exists()

    def test_work_from_something_else_is_begun_anew_and_said(self, tmp_path):
        interrupted(tmp_path / "out")
        run, messages = start(tmp_path / "out", resume=True, key=KEY | {"model": "another"})
        assert run.directory.kept == {}
        assert "is from another model, so it was removed and everything is written from the beginning" in messages[0]
        assert names(run.directory.path) == {
            f".abliterate/{name}" for name in ("lock", "files.json", "journal-0.jsonl")
        }

    def test_a_damaged_journal_is_an_error_that_says_what_to_do(self, tmp_path):
        interrupted(tmp_path / "out")
        journal = partial_path(tmp_path / "out") / ".abliterate" / "journal-0.jsonl"
        journal.write_bytes(b"garbage\n" + journal.read_bytes())
        for _ in range(2):  # the lock is given back
            with pytest.raises(InputError, match=r"journal-0\.jsonl, line 1: is damaged .* leave out --resume"):
                start(tmp_path / "out", resume=True)
        run, messages = start(tmp_path / "out")
        assert run.directory.kept == {}
        assert "left by an interrupted run, removed" in messages[0]

    def test_without_it_everything_is_begun_anew_and_said(self, tmp_path):
        interrupted(tmp_path / "out")
        run, messages = start(tmp_path / "out")
        assert run.directory.kept == {}
        assert "left by an interrupted run, removed; --resume would have gone on" in messages[0]

    def test_nothing_to_resume(self, tmp_path):
        run, messages = start(tmp_path / "out", resume=True)
        assert run.directory.kept == {}
        assert "nothing to resume" in messages[0]


class TestGivingUp:
    @pytest.mark.parametrize(
        ("error", "kind", "message"),
        [
            (KeyboardInterrupt(), InterruptedRunError, "interrupted"),
            (Terminated(), InterruptedRunError, "terminated"),
            (OSError(28, "No space left on device", "/x/y"), CheckpointError, "/x/y: No space left on device"),
        ],
    )
    def test_what_is_finished_is_kept_and_the_message_says_how_to_go_on(self, tmp_path, error, kind, message):
        run, _ = start(tmp_path / "out")
        finish(run, "config.json", "{}")
        final = run.give_up(error)
        assert isinstance(final, kind)
        assert message in str(final)
        assert "goes on from there with --resume" in str(final)
        assert start(tmp_path / "out", resume=True)[0].directory.kept.keys() == {"config.json"}

    def test_a_source_that_could_not_be_read_may_be_readable_again(self, tmp_path):
        run, _ = start(tmp_path / "out")
        finish(run, "config.json", "{}")
        error = CheckpointError("model: cannot be read")
        error.__cause__ = OSError(5, "Input/output error")
        assert "--resume" in str(run.give_up(error))
        assert run.directory.path.exists()

    @pytest.mark.parametrize("error", [VerificationError("wrong"), CheckpointError("NaN"), ValueError("a bug")])
    def test_what_would_fail_again_is_removed(self, tmp_path, error):
        run, _ = start(tmp_path / "new" / "out")
        finish(run, "config.json", "{}")
        assert run.give_up(error) is error
        assert list(tmp_path.iterdir()) == []


class TestPlace:
    def test_something_else_of_that_name_is_left_alone(self, tmp_path):
        path = partial_path(tmp_path / "out")
        path.mkdir()
        (path / "thesis.tex").write_text("x")
        with pytest.raises(InputError, match="is something else"):
            start(tmp_path / "out")
        assert names(path) == {"thesis.tex"}
        (tmp_path / "elsewhere").mkdir()
        partial_path(tmp_path / "linked").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(InputError, match="is something else"):
            start(tmp_path / "linked")

    def test_a_place_that_cannot_be_written_to(self, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(InputError, match="cannot be made"):
            start(tmp_path / "file" / "out")

    @pytest.mark.parametrize("shares", [False, True])
    def test_too_little_room_is_found_before_anything_is_written(self, tmp_path, monkeypatch, shares):
        monkeypatch.setattr(abliterate.checkpoints.partial_run, "can_share_blocks", lambda source, directory: shares)
        interrupted(tmp_path / "out")
        run, _ = start(tmp_path / "out", resume=True)
        run.check_space({"config.json": 10**18, "rest": 1000}, source=tmp_path, edited=10, stored=10**18)
        with pytest.raises(CheckpointError, match=r"1000000000\.00 GB are needed and .* GB are free") as raised:
            run.check_space({"rest": 10**18}, source=tmp_path, edited=10**18, stored=10**18)
        if shares:
            run.check_space({"rest": 10**18}, source=tmp_path, edited=10, stored=10**18)
        # What is finished is worth keeping until there is room.
        assert "--resume" in str(run.give_up(raised.value))
        assert run.directory.path.exists()


class TestJournal:
    def test_a_line_that_a_crash_cut_off_is_no_line(self, tmp_path):
        journal = Journal(tmp_path / "journal-0.jsonl", key=KEY)
        journal.add("a", {"bytes": 1})
        journal.add("b", {"bytes": 2})
        whole = (tmp_path / "journal-0.jsonl").read_bytes()
        for cut in range(len(whole)):
            (tmp_path / "journal-0.jsonl").write_bytes(whole[:cut])
            key, entries = read_journals(tmp_path, pattern="journal-*.jsonl")
            assert key in (None, KEY)
            assert entries.keys() in ({"a"}, set())
        (tmp_path / "journal-0.jsonl").write_bytes(whole + b"[]\n")
        assert read_journals(tmp_path, pattern="journal-*.jsonl")[1].keys() == {"a", "b"}

    def test_journals_of_several_processes_must_agree(self, tmp_path):
        for index, key in enumerate((KEY, KEY)):
            Journal(tmp_path / f"journal-{index}.jsonl", key=key).add(str(index), {})
        assert read_journals(tmp_path, pattern="journal-*.jsonl") == (
            KEY,
            {"0": {"name": "0"}, "1": {"name": "1"}},
        )
        (tmp_path / "journal-3.jsonl").write_text('{"key":')  # its process was killed before it began
        assert read_journals(tmp_path, pattern="journal-*.jsonl")[0] == KEY
        Journal(tmp_path / "journal-2.jsonl", key=KEY | {"model": "z"})
        assert read_journals(tmp_path, pattern="journal-*.jsonl") == (None, {})


def test_what_is_finished_is_kept_when_something_takes_the_name_meanwhile(tmp_path):
    out = tmp_path / "out"

    def overtaken() -> None:
        with partial_run(out, key=KEY, resume=False, workers=1, progress=Messages()) as run:
            finish(run, "config.json", "{}")
            out.mkdir()
            (out / "config.json").write_text("theirs")

    with pytest.raises(CheckpointError, match=r"appeared while .*is kept in .*goes on from there with --resume"):
        overtaken()
    assert names(out) == {"config.json"}
    assert (out / "config.json").read_text() == "theirs"
    (out / "config.json").unlink()
    out.rmdir()
    run, _ = start(out, resume=True)
    assert set(run.directory.kept) == {"config.json"}
    run.publish()
    assert names(out) == {"config.json"}
