"""An extraction that is killed goes on where it stopped and ends in the same bytes; changed input starts anew."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from abliterate.errors import InputError, InterruptedRunError, NoDirectionError, Terminated
from abliterate.extraction.options import ExtractionOptions, Thresholds
from abliterate.extraction.run import extract_direction
from abliterate.extraction.shared_runs import SavedWork, kept_in, working_in
from abliterate.models.chat_model import ChatModel
from abliterate.models.options import ModelOptions
from tests.support.paths import REPOSITORY

ANYTHING = Thresholds(kl=1e9, induce=-1e9)
OPTIONS = ExtractionOptions(
    n_train=8, n_val=4, filter="none", refusal_tokens=("I",), thresholds=ANYTHING, exhaustive=True
)
KILLED = """
import os, signal, sys
from pathlib import Path
from abliterate.extraction.run import extract_direction
from abliterate.models.options import ModelOptions
from abliterate.extraction.shared_runs import SavedWork
from tests.extraction.test_saved_work import OPTIONS

def dying(method):
    def call(self, *args):
        method(self, *args)
        dying.left -= 1
        if dying.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return call

dying.left = int(sys.argv[3])
SavedWork.save_scores = dying(SavedWork.save_scores)
SavedWork.save_recording = dying(SavedWork.save_recording)
model, work, _, streamed = sys.argv[1:]
ways = ModelOptions(stream_layers=streamed == "True")
extract_direction(model=Path(model), options=OPTIONS, model_options=ways, work_directory=Path(work))
"""


class Messages:
    """Collects what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.tasks: list[str] = []

    def task(self, description, *, total, unit=""):
        from abliterate.progress import SILENT

        self.tasks.append(description)
        return SILENT.task(description, total=total)

    def message(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize(("n_saved", "streamed"), [(2, False), (4, False), (6, False), (2, True), (4, True), (5, True)])
def test_killed_and_resumed_gives_the_same_bytes(
    llama_directory: Path, tmp_path: Path, n_saved: int, streamed: bool
) -> None:
    given = {"model": llama_directory, "options": OPTIONS, "model_options": ModelOptions(stream_layers=streamed)}
    extract_direction(**given).direction.save(tmp_path / "undisturbed")
    work = tmp_path / "work"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(llama_directory), str(work), str(n_saved), str(streamed)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(["src", "."])},
        cwd=REPOSITORY,
        check=False,
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL
    assert (work / "KEY.json").is_file()
    messages = Messages()
    resumed = extract_direction(**given, work_directory=work, progress=messages)
    assert messages.said[0].startswith("continuing")
    if not streamed:
        assert sum("Recording" in task for task in messages.tasks) == max(0, 4 - n_saved)
    resumed.direction.save(tmp_path / "resumed")
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "undisturbed").read_bytes()
    assert not work.exists()


def test_streamed_layers_go_on_where_they_stopped(llama_directory: Path, tmp_path: Path, monkeypatch) -> None:
    from abliterate.extraction.scoring import StreamedScorer

    streamed = ModelOptions(stream_layers=True)
    given = {"model": llama_directory, "options": OPTIONS, "model_options": streamed}
    extract_direction(**given).direction.save(tmp_path / "undisturbed")
    score = StreamedScorer.score

    def interrupted(self, name, candidates):
        if name == "ablated":
            raise KeyboardInterrupt
        return score(self, name, candidates)

    monkeypatch.setattr(StreamedScorer, "score", interrupted)
    with pytest.raises(InterruptedRunError, match="the same command goes on from there"):
        extract_direction(**given, work_directory=tmp_path / "work")
    monkeypatch.setattr(StreamedScorer, "score", score)
    messages = Messages()
    extract_direction(**given, work_directory=tmp_path / "work", progress=messages).direction.save(tmp_path / "resumed")
    # One reading for the first tokens, one for bypass and KL; what was recorded and added is there.
    assert messages.said[-1] == "the weights were read 2 times"
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "undisturbed").read_bytes()


def test_other_thresholds_go_on_with_the_same_scores(llama_directory: Path, tmp_path: Path, monkeypatch) -> None:
    import dataclasses

    from abliterate.extraction.scoring import CandidateScorer

    strict = dataclasses.replace(OPTIONS, thresholds=Thresholds(kl=1e-9, induce=-1e9))
    with pytest.raises(NoDirectionError):
        extract_direction(model=llama_directory, options=strict, work_directory=tmp_path / "work")

    def never(self, name, candidates):
        raise AssertionError("computed again")

    monkeypatch.setattr(CandidateScorer, "score", never)
    extract_direction(model=llama_directory, options=OPTIONS, work_directory=tmp_path / "work")


def test_a_changed_input_starts_anew_and_says_so(tmp_path: Path) -> None:
    messages = Messages()
    work = SavedWork(tmp_path / "w", key={"model": "a", "filter": True}, progress=messages)
    work.save_recording("x", {"t": torch.ones(2)})
    work.save_scores([(-1, 3)], [{"bypass": (1.0, 2.0), "kl": (0.5,)}])
    work.release()
    again = SavedWork(tmp_path / "w", key={"model": "a", "filter": True}, progress=messages)
    again.release()
    assert torch.equal(again.recording("x")["t"], torch.ones(2))
    assert again.scores("ablated", (-1, 3)) == {"bypass": (1.0, 2.0), "kl": (0.5,)}
    assert again.scores("induce", (-1, 3)) is None
    anew = SavedWork(tmp_path / "w", key={"model": "b", "filter": True}, progress=messages)
    assert anew.recording("x") is None
    assert anew.scores("bypass", (-1, 3)) is None
    assert messages.said[1].startswith("starting anew: model changed")


def test_another_rendering_of_the_same_prompts_starts_anew(llama_directory: Path, tmp_path: Path, monkeypatch) -> None:
    """A template may write today's date."""
    strict = replace(OPTIONS, thresholds=Thresholds(kl=1e-9, induce=-1e9))
    encode = ChatModel.encode
    messages = Messages()
    for date in (1, 2):
        monkeypatch.setattr(ChatModel, "encode", lambda chat, texts, d=date: [[d, *row] for row in encode(chat, texts)])
        with pytest.raises(NoDirectionError):
            extract_direction(
                model=llama_directory, options=strict, work_directory=tmp_path / "work", progress=messages
            )
    assert any(said.startswith("starting anew: rendered prompts changed") for said in messages.said)


def test_a_signal_says_what_is_kept(tmp_path: Path) -> None:
    work = tmp_path / "w"
    SavedWork(work, key={"model": "b"}).release()
    with pytest.raises(InterruptedRunError, match=f"kept in {work}: the same command") as stopped, kept_in(work):
        raise Terminated
    assert stopped.value.exit_code == 143
    for nothing in (None, tmp_path / "other"):
        with pytest.raises(KeyboardInterrupt), kept_in(nothing):
            raise KeyboardInterrupt


def test_a_line_that_was_cut_short_is_dropped(tmp_path: Path) -> None:
    work = SavedWork(tmp_path / "w", key={})
    work.save_scores([(-1, 3)], [{"induce": (1.0,)}])
    with (tmp_path / "w" / "scores.jsonl").open("a") as file:
        file.write('[[-1, 4, {"induce": [2.0')
    work.release()
    again = SavedWork(tmp_path / "w", key={})
    assert again.scores("induce", (-1, 4)) is None
    again.save_scores([(-1, 5)], [{"induce": (3.0,)}])
    again.release()
    third = SavedWork(tmp_path / "w", key={})
    assert third.scores("induce", (-1, 3)) == {"induce": (1.0,)}
    assert third.scores("induce", (-1, 5)) == {"induce": (3.0,)}


def test_a_damaged_line_before_the_last_is_an_error(tmp_path: Path) -> None:
    work = SavedWork(tmp_path / "w", key={})
    work.save_scores([(-1, 3)], [{"induce": (1.0,)}])
    work.save_scores([(-1, 4)], [{"induce": (float("nan"),)}])
    work.release()
    scores = tmp_path / "w" / "scores.jsonl"
    assert scores.read_text() == '[[-1, 3, {"induce": [1.0]}]]\n[[-1, 4, {"induce": [NaN]}]]\n'
    scores.write_text(scores.read_text().replace("[[-1, 3", "[[-1"))
    with pytest.raises(InputError, match=r"scores\.jsonl, line 1: is damaged .*; delete the file"):
        SavedWork(tmp_path / "w", key={})


def test_two_processes_do_not_work_in_one_directory(tmp_path: Path) -> None:
    first = SavedWork(tmp_path / "w", key={"a": 1})
    first.save_recording("x", {"t": torch.ones(2)})
    for key in ({"a": 1}, {"a": 2}):
        with pytest.raises(InputError, match="another extraction is working there; wait for that one"):
            SavedWork(tmp_path / "w", key=key)
    assert torch.equal(first.recording("x")["t"], torch.ones(2))
    first.release()
    anew = SavedWork(tmp_path / "w", key={"a": 2})
    assert anew.recording("x") is None
    anew.discard()
    assert not (tmp_path / "w").exists()


def test_where_nothing_is_kept_others_are_kept_out_too(tmp_path: Path) -> None:
    with working_in(tmp_path / "w"):
        with pytest.raises(InputError, match="another extraction is working there"):
            SavedWork(tmp_path / "w", key={})
    assert not (tmp_path / "w").exists()
    saved = SavedWork(tmp_path / "w", key={"a": 1})
    saved.save_recording("x", {"t": torch.ones(2)})
    saved.release()
    with working_in(tmp_path / "w"):
        pass
    assert SavedWork(tmp_path / "w", key={"a": 1}).recording("x") is not None


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds no interim results"):
        SavedWork(tmp_path, key={})
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
