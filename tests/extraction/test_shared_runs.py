"""Scoring and recording in parts: the same values whatever is saved and however many processes share the work."""

import threading
from collections.abc import Sequence
from contextlib import contextmanager

import pytest
import torch

from abliterate.checkpoints.saved_work import SavedWork
from abliterate.extraction.behaviour import ReplyRun
from abliterate.extraction.options import Thresholds
from abliterate.extraction.shared_runs import PARTS, RecordingRun, ScoringRun, save_scores, saved_scores
from abliterate.models.hooks import record
from abliterate.processes import Ranks
from abliterate.progress import SILENT
from abliterate.prompt_sets import split_for_extraction

N_LAYERS = 5
CANDIDATES = torch.randn(2, N_LAYERS, 8, generator=torch.Generator().manual_seed(0))


class CountingScorer:
    """Gives each candidate values that tell it from every other, and remembers what it was asked for."""

    kl_at_once = None

    def __init__(self, *, one_group: bool = False) -> None:
        self.one_group = one_group
        self.asked: list[tuple[str, list[tuple[int, int]]]] = []

    def n_prompts(self, _score):
        return 2

    def groups(self, score, candidates):
        return [list(candidates)] if self.one_group else [[candidate] for candidate in candidates]

    def score(self, score, candidates):
        self.asked.append((score, list(candidates)))
        values = [(10.0 * layer, position) for position, layer in candidates]
        if score == "ablated":
            return [{"bypass": value, "kl": (0.0, 0.5)} for value in values]
        return [{score: value} for value in values]


def run(scorer, saved=None, ranks=None, **options):
    return ScoringRun(
        scorer=scorer,
        saved=saved or SavedWork(None, key={}),
        thresholds=Thresholds(kl=1.0, induce=-1e9),
        n_layers=N_LAYERS,
        ranks=ranks or Ranks(),
        **options,
    )


def test_every_candidate_has_a_row_and_late_or_zero_ones_have_no_score():
    candidates = CANDIDATES.clone()
    candidates[0, 0] = 0
    scorer = CountingScorer()
    scoring = run(scorer, exhaustive=True)
    scores = scoring.score(candidates)
    assert [(score.position, score.layer) for score in scores] == [(p, layer) for p in (-2, -1) for layer in range(5)]
    # Of five layers the last fifth is too late.
    able = [(-2, 1), (-2, 2), (-2, 3), (-1, 0), (-1, 1), (-1, 2), (-1, 3)]
    assert [(score.position, score.layer) for score in scores if score.bypass is not None] == able
    for score in scores:
        if score.bypass is not None:
            assert score.bypass == score.induce == (10 * score.layer + score.position) / 2
            assert score.kl == 0.25
    assert scoring.scores_by_candidate()[-1, 3] == {"bypass": (30.0, -1), "induce": (30.0, -1), "kl": (0.0, 0.5)}
    assert scoring.scores_by_candidate().keys() == set(able)


def test_what_is_saved_is_not_computed_again(tmp_path):
    whole = run(CountingScorer(), exhaustive=True).score(CANDIDATES)

    class Dying(CountingScorer):
        def score(self, score, candidates):
            if len(self.asked) == 5:
                raise KeyboardInterrupt
            return super().score(score, candidates)

    with pytest.raises(KeyboardInterrupt):
        run(Dying(), SavedWork(tmp_path / "work", key={"a": 1}), exhaustive=True).score(CANDIDATES)
    scorer = CountingScorer()
    assert run(scorer, SavedWork(tmp_path / "work", key={"a": 1}), exhaustive=True).score(CANDIDATES) == whole
    assert len(scorer.asked) == 2 * 2 * 4 - 5
    scorer = CountingScorer()
    assert run(scorer, SavedWork(tmp_path / "work", key={"a": 1}), exhaustive=True).score(CANDIDATES) == whole
    assert scorer.asked == []


class TakingTurns(Ranks):
    """Processes that are threads of one, and so take turns at the model: their hooks on it would meet."""

    turn = threading.Lock()

    def share(self, items, compute):
        def alone(part):
            with self.turn:
                return compute(part)

        return super().share(items, alone)


class Meeting:
    """Two or more threads in the place of processes: each waits for the values of all."""

    def __init__(self, count: int) -> None:
        self.count, self.values, self.barrier = count, [None] * count, threading.Barrier(count, timeout=60)

    def ranks(self, index: int) -> Ranks:
        def exchange(own):
            self.values[index] = own
            self.barrier.wait()
            joined = [value for part in self.values for value in part]
            self.barrier.wait()
            return joined

        return TakingTurns(index=index, count=self.count, exchange=exchange)

    def results(self, work) -> list:
        found = [None] * self.count

        def one(index: int) -> None:
            found[index] = work(self.ranks(index))

        threads = [threading.Thread(target=one, args=(index,)) for index in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_one_large_group_and_all_know_the_scores(count):
    whole = run(CountingScorer(), exhaustive=True).score(CANDIDATES)
    scorers: list[CountingScorer] = []

    def work(ranks: Ranks):
        scorer = CountingScorer(one_group=True)
        scorers.append(scorer)
        return run(scorer, ranks=ranks, exhaustive=True).score(CANDIDATES)

    assert Meeting(count).results(work) == [whole] * count
    asked = [key for scorer in scorers for name, keys in scorer.asked if name == "induce" for key in keys]
    assert sorted(asked) == sorted((p, layer) for p in (-2, -1) for layer in range(4))
    assert all(scorer.asked for scorer in scorers)


@pytest.fixture
def prompts():
    return split_for_extraction("bundled", "bundled", n_train=5, n_val=3, seed=1)


def record_all(chat, prompts, saved, ranks=None):
    return RecordingRun(chat=chat, prompts=prompts, saved=saved, ranks=ranks or Ranks(), progress=SILENT).record()


def texts_of(prompts, part: str) -> Sequence[str]:
    return getattr(prompts, part).texts


def test_each_part_is_recorded_and_saved(llama_chat, prompts, tmp_path):
    found = record_all(llama_chat, prompts, SavedWork(tmp_path / "work", key={}))
    assert list(found) == list(PARTS)
    for part, recording in found.items():
        expected = record(llama_chat, llama_chat.encode(texts_of(prompts, part)))
        # In other batches other roundings.
        torch.testing.assert_close(recording.activations, expected.activations, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(recording.logits, expected.logits, atol=1e-3, rtol=1e-4)
    assert {path.stem for path in (tmp_path / "work").glob("*.safetensors")} == set(PARTS)


class Counting:
    """A reporter that adds up what each task has done."""

    def __init__(self):
        self.done = {}

    @contextmanager
    def task(self, description, *, total, unit=""):
        self.done[description] = [0, total]

        def advance(steps):
            self.done[description][0] += steps
            assert self.done[description][0] <= total

        yield advance

    def message(self, text):
        raise AssertionError(text)


@pytest.mark.parametrize("replying", [False, True])
def test_a_prompt_counts_once_and_with_its_reply_where_it_has_one(llama_chat, prompts, replying):
    progress = Counting()
    run = ReplyRun(chat=llama_chat, ranks=Ranks(), max_new_tokens=4) if replying else None
    saved = SavedWork(None, key={})
    recording = RecordingRun(
        chat=llama_chat, prompts=prompts, saved=saved, ranks=Ranks(), progress=progress, replying=run
    )
    recording.record()
    assert sorted(progress.done.values()) == [[8, 8], [8, 8]]


def test_a_part_that_is_saved_is_taken_as_it_is(llama_chat, prompts, tmp_path):
    first = record_all(llama_chat, prompts, SavedWork(tmp_path / "work", key={}))
    marked = {"activations": first["harmful_train"].activations + 1, "logits": first["harmful_train"].logits}
    SavedWork(tmp_path / "work", key={}).save_tensors("harmful_train", marked)
    (tmp_path / "work" / "harmless_train.safetensors").unlink()
    again = record_all(llama_chat, prompts, SavedWork(tmp_path / "work", key={}))
    assert torch.equal(again["harmful_train"].activations, marked["activations"])
    assert torch.equal(again["harmless_train"].activations, first["harmless_train"].activations)


def test_processes_record_a_share_each_and_all_have_the_whole(llama_chat, prompts):
    whole = record_all(llama_chat, prompts, SavedWork(None, key={}))

    def work(ranks: Ranks):
        return record_all(llama_chat, prompts, SavedWork(None, key={}), ranks)

    for found in Meeting(2).results(work):
        for part in PARTS:
            # In other batches other roundings.
            torch.testing.assert_close(found[part].activations, whole[part].activations, atol=1e-3, rtol=1e-4)


def test_scores_are_saved_by_candidate_and_read_back_when_all_are_there(tmp_path):
    work = SavedWork(tmp_path / "work", key={})
    save_scores(work, [(-1, 3), (-1, 4)], [{"bypass": (1.0, 2.0), "kl": (0.5,)}, {"bypass": (3.0,)}])
    work.release()
    again = SavedWork(tmp_path / "work", key={})
    assert saved_scores(again, "ablated", (-1, 3)) == {"bypass": (1.0, 2.0), "kl": (0.5,)}
    assert saved_scores(again, "bypass", (-1, 4)) == {"bypass": (3.0,)}
    assert saved_scores(again, "ablated", (-1, 4)) is None
    assert saved_scores(again, "induce", (-1, 3)) is None
    again.release()
