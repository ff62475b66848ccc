"""What a long run keeps: read back under the same key, gone under another, never shared by two processes."""

from pathlib import Path

import pytest
import torch

from abliterate.checkpoints.saved_work import SavedWork, saved_work, work_directory
from abliterate.errors import InputError, InterruptedRunError, ModelError, Terminated
from abliterate.processes import Ranks


class Messages:
    """Collects what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def task(self, description, *, total, unit=""):
        from abliterate.progress import SILENT

        return SILENT.task(description, total=total)

    def message(self, text: str) -> None:
        self.said.append(text)


def test_it_lies_beside_the_output() -> None:
    assert work_directory(Path("a/r.safetensors")) == Path("a/r.safetensors.work")


def test_nothing_is_written_where_there_is_no_directory() -> None:
    work = SavedWork(None, key={})
    work.save_tensors("x", {"t": torch.ones(2)})
    work.save_values({"a": 1})
    assert (work.directory, work.tensors("x"), work.value("a")) == (None, None, 1)
    work.discard()
    work.release()


def test_a_changed_input_starts_anew_and_says_so(tmp_path: Path) -> None:
    messages = Messages()
    work = SavedWork(tmp_path / "w", key={"model": "a", "filter": True}, progress=messages)
    work.save_tensors("x", {"t": torch.ones(2)})
    work.save_values({"bypass": [1.0, 2.0], "kl": {"a": None}})
    work.release()
    again = SavedWork(tmp_path / "w", key={"model": "a", "filter": True}, progress=messages)
    again.release()
    assert torch.equal(again.tensors("x")["t"], torch.ones(2))
    assert (again.value("bypass"), again.value("kl")) == ([1.0, 2.0], {"a": None})
    assert again.value("induce") is None
    anew = SavedWork(tmp_path / "w", key={"model": "b", "filter": True}, progress=messages)
    assert anew.tensors("x") is None
    assert anew.value("bypass") is None
    assert messages.said[1].startswith("starting anew: model changed")


def test_a_signal_says_what_is_kept(tmp_path: Path) -> None:
    work = tmp_path / "w"

    def interrupted() -> None:
        with saved_work(work, key={"model": "b"}) as saved:
            saved.save_values({"a": 1})
            raise Terminated

    with pytest.raises(InterruptedRunError, match=f"kept in {work}: the same command") as stopped:
        interrupted()
    assert stopped.value.exit_code == 143
    with pytest.raises(KeyboardInterrupt), saved_work(None, key={}):
        raise KeyboardInterrupt
    with saved_work(work, key={"model": "b"}) as again:
        assert again.value("a") == 1
    assert not work.exists()


def test_a_failure_keeps_what_is_there_unless_it_would_fail_again(tmp_path: Path) -> None:
    work = tmp_path / "w"
    with pytest.raises(ModelError), saved_work(work, key={}) as saved, saved.useless_after(InputError):
        raise ModelError("no memory")
    assert (work / "KEY.json").is_file()
    with pytest.raises(InputError), saved_work(work, key={}) as saved:
        # What is delivered may be refused, and what was computed is right.
        raise InputError("no room")
    assert (work / "KEY.json").is_file()
    with pytest.raises(InputError), saved_work(work, key={}) as saved, saved.useless_after(InputError):
        raise InputError("too few prompts")
    assert not work.exists()


def test_the_first_process_alone_keeps_and_tells_the_others_what_it_found(tmp_path: Path) -> None:
    second = Ranks(index=1, count=2, exchange=lambda own: [{"a": 1}, *own])
    with saved_work(tmp_path / "w", key={}, ranks=second) as saved:
        saved.save_values({"b": 2})
        assert (saved.directory, saved.value("a"), saved.value("b")) == (None, 1, 2)
        assert not (tmp_path / "w").exists()


def test_a_line_that_was_cut_short_is_dropped(tmp_path: Path) -> None:
    work = SavedWork(tmp_path / "w", key={})
    work.save_values({"a": 1.0})
    with (tmp_path / "w" / "values.jsonl").open("a") as file:
        file.write('{"b": [2.0')
    work.release()
    again = SavedWork(tmp_path / "w", key={})
    assert again.value("b") is None
    again.save_values({"a": 2.0, "c": 3.0})
    again.release()
    third = SavedWork(tmp_path / "w", key={})
    assert (third.value("a"), third.value("c")) == (2.0, 3.0)


def test_a_damaged_line_before_the_last_is_an_error(tmp_path: Path) -> None:
    work = SavedWork(tmp_path / "w", key={})
    work.save_values({"a": 1.0})
    work.save_values({"b": float("nan")})
    work.release()
    values = tmp_path / "w" / "values.jsonl"
    assert values.read_text() == '{"a": 1.0}\n{"b": NaN}\n'
    values.write_text(values.read_text().replace('"a": 1.0', '"a"'))
    with pytest.raises(InputError, match=r"values\.jsonl, line 1: is damaged .*; delete the file"):
        SavedWork(tmp_path / "w", key={})


def test_two_processes_do_not_work_in_one_directory(tmp_path: Path) -> None:
    first = SavedWork(tmp_path / "w", key={"a": 1})
    first.save_tensors("x", {"t": torch.ones(2)})
    for key in ({"a": 1}, {"a": 2}):
        with pytest.raises(InputError, match="another run is working there; wait for that one"):
            SavedWork(tmp_path / "w", key=key)
    assert torch.equal(first.tensors("x")["t"], torch.ones(2))
    first.release()
    anew = SavedWork(tmp_path / "w", key={"a": 2})
    assert anew.tensors("x") is None
    anew.discard()
    assert not (tmp_path / "w").exists()


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds no interim results"):
        SavedWork(tmp_path, key={})
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
