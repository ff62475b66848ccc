"""An extraction that is killed goes on where it stopped and ends in the same bytes; changed input starts anew."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from abliterate.checkpoints.saved_work import SavedWork
from abliterate.errors import InterruptedRunError, NoDirectionError
from abliterate.extraction.options import ExtractionOptions, Thresholds
from abliterate.extraction.run import extract_direction
from abliterate.models import chat_model
from abliterate.models.chat_model import ChatModel
from abliterate.models.options import ModelOptions
from tests.support.paths import REPOSITORY
from tests.support.refusing_models import refusing_model

ANYTHING = Thresholds(kl=1e9, induce=-1e9)
OPTIONS = ExtractionOptions(
    n_train=8, n_val=4, filter="none", refusal_tokens=("I",), thresholds=ANYTHING, exhaustive=True
)
KILLED = """
import os, signal, sys
from pathlib import Path
from abliterate.extraction.run import extract_direction
from abliterate.models.options import ModelOptions
from abliterate.checkpoints.saved_work import SavedWork
from tests.extraction.test_resuming import OPTIONS

def dying(method):
    def call(self, *args):
        method(self, *args)
        dying.left -= 1
        if dying.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return call

dying.left = int(sys.argv[3])
SavedWork.save_values = dying(SavedWork.save_values)
SavedWork.save_tensors = dying(SavedWork.save_tensors)
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


@pytest.mark.parametrize(
    ("n_saved", "streamed"), [(1, False), (2, False), (3, False), (6, False), (2, True), (4, True), (5, True)]
)
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
        # A kind is recorded anew unless both of its parts were saved.
        assert sum("Recording" in task for task in messages.tasks) == max(0, 2 - n_saved // 2)
    resumed.direction.save(tmp_path / "resumed")
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "undisturbed").read_bytes()
    assert not work.exists()


@pytest.mark.parametrize("n_saved", [1, 3, 6, 8, 11])
def test_a_race_that_is_interrupted_ends_in_the_same_bytes(tmp_path: Path, monkeypatch, n_saved: int) -> None:
    """What candidates were scored on before the interruption is not scored again; what all share is run as it was."""
    # So that the few tokens which these prompts share are worth keeping.
    monkeypatch.setattr(chat_model, "MIN_SHARED_PREFIX", 2)
    model = refusing_model("spread", tmp_path)
    for part in (model.chat.model, model.chat.tokenizer):
        part.save_pretrained(tmp_path / "model")
    options = ExtractionOptions(n_train=32, n_val=16, thresholds=Thresholds(kl=1.0))
    given = {"model": tmp_path / "model", "harmful": str(model.harmful), "harmless": str(model.harmless)}
    undisturbed = extract_direction(**given, options=options)
    assert undisturbed.report.raced
    undisturbed.direction.save(tmp_path / "undisturbed")
    save, computed = SavedWork.save_values, []

    def counting(saved: SavedWork, values) -> None:
        save(saved, values)
        computed.append(set(values))
        if len(computed) == n_saved:
            raise KeyboardInterrupt

    monkeypatch.setattr(SavedWork, "save_values", counting)
    with pytest.raises(InterruptedRunError, match="the same command goes on from there"):
        extract_direction(**given, options=options, work_directory=tmp_path / "work")
    resumed = extract_direction(**given, options=options, work_directory=tmp_path / "work")
    resumed.direction.save(tmp_path / "resumed")
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "undisturbed").read_bytes()
    assert len(computed) > n_saved


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
