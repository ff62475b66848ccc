"""Candidates of an audit: how they are found, ordered, resampled and spanned."""

import numpy as np
import pytest
import torch

from abliterate.checkpoints.saved_work import SavedWork
from abliterate.evaluation.candidate_ranking import CandidateFinder
from abliterate.extraction.options import Thresholds
from abliterate.extraction.refusal import FirstTokens
from abliterate.extraction.reply_classes import read_reply
from abliterate.models.chat_model import ChatModel
from abliterate.models.hooks import ablate_direction
from abliterate.models.stream_probe import probe_stream
from abliterate.progress import SILENT
from abliterate.prompt_sets import ExtractionPrompts, split_for_extraction

ANYTHING = Thresholds(kl=1e9, induce=-1e9)


@pytest.fixture(scope="module")
def prompts() -> ExtractionPrompts:
    return split_for_extraction("bundled", "bundled", n_train=10, n_val=6, seed=1)


def make_finder(chat: ChatModel, prompts: ExtractionPrompts, thresholds: Thresholds = ANYTHING) -> CandidateFinder:
    return CandidateFinder(
        chat=chat,
        probe=probe_stream(chat),
        prompts=prompts,
        thresholds=thresholds,
        saved=SavedWork(None, key={}),
        progress=SILENT,
    )


@pytest.fixture
def finder(llama_chat: ChatModel, prompts: ExtractionPrompts) -> CandidateFinder:
    return make_finder(llama_chat, prompts)


def states(chat: ChatModel, texts: tuple[str, ...], position: int, layer: int) -> torch.Tensor:
    """An independent way to the stream: `output_hidden_states`, prompt by prompt."""
    rows = []
    for row in chat.encode(texts):
        with torch.inference_mode():
            out = chat.model(torch.tensor([row]), output_hidden_states=True)
        rows.append(out.hidden_states[layer][0, position].double())
    return torch.stack(rows)


def test_candidates_and_their_separation(
    finder: CandidateFinder, llama_chat: ChatModel, prompts: ExtractionPrompts
) -> None:
    summary = finder.screen(n_candidates=4, max_new_tokens=3)
    one = summary.screened[0]
    train = [
        states(llama_chat, p.texts, one.position, one.layer) for p in (prompts.harmful_train, prompts.harmless_train)
    ]
    difference = train[0].mean(0) - train[1].mean(0)
    assert torch.allclose(finder.candidates[one.position, one.layer], difference, atol=1e-4)
    unit = difference / difference.norm()
    a, b = (
        (states(llama_chat, p.texts, one.position, one.layer) @ unit).numpy()
        for p in (prompts.harmful_validation, prompts.harmless_validation)
    )
    expected = (a.mean() - b.mean()) / np.sqrt((a.var() + b.var()) / 2)
    assert one.separation == pytest.approx(expected, rel=1e-3)


def test_the_answers_of_a_screened_candidate_are_counted_under_its_ablation(
    finder: CandidateFinder, llama_chat: ChatModel, prompts: ExtractionPrompts
) -> None:
    summary = finder.screen(n_candidates=3, max_new_tokens=4)
    rows = llama_chat.encode(prompts.harmful_validation.texts)
    for one in summary.screened:
        with ablate_direction(llama_chat, finder.candidates[one.position, one.layer]):
            replies = llama_chat.generate(rows, max_new_tokens=4)
        answered = sum(read_reply(llama_chat.decode(reply)).reply_class == "answer" for reply in replies)
        assert (one.answered, one.n_prompts) == (answered, len(rows))
    assert [one.answered for one in summary.screened] == sorted((o.answered for o in summary.screened), reverse=True)


def test_zero_vectors_and_late_layers_are_no_candidates(finder: CandidateFinder, llama_chat: ChatModel) -> None:
    n_positions = llama_chat.chat_format.n_positions
    summary = finder.screen(n_candidates=1000, max_new_tokens=1)
    assert summary.n_candidates == len(summary.screened) == 3 * n_positions
    assert {one.layer for one in summary.screened} == {1, 2, 3}
    assert len({(one.position, one.layer) for one in summary.screened}) == summary.n_candidates


def test_without_a_telling_first_token_nothing_is_said_to_pass(finder: CandidateFinder) -> None:
    summary = finder.screen(n_candidates=3, max_new_tokens=1)
    assert summary.refusal_tokens == ()
    assert (summary.n_passing, summary.share_passing, summary.filtered) == (None, None, False)
    assert all(one.kl is None for one in summary.screened)


def test_with_one_the_candidates_that_pass_are_counted_and_proposed_first(
    llama_chat: ChatModel, prompts: ExtractionPrompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    from abliterate.extraction.scoring import CandidateScorer

    token = llama_chat.tokenizer("I", add_special_tokens=False)["input_ids"][0]
    monkeypatch.setattr(
        "abliterate.evaluation.candidate_ranking.find_refusal_tokens", lambda **_kwargs: [(token, 1.0, 0.0)]
    )
    scorer = CandidateScorer(
        chat=llama_chat,
        candidates=make_finder(llama_chat, prompts).candidates,
        harmful_rows=llama_chat.encode(prompts.harmful_validation.texts),
        harmless_rows=llama_chat.encode(prompts.harmless_validation.texts),
        measure=FirstTokens((token,)),
    )
    grid = [(p, layer) for p in range(-llama_chat.chat_format.n_positions, 0) for layer in (1, 2, 3)]
    kl = {key: scorer.kl(*key) for key in grid}
    # Between two of them: one that is equal to a score would depend on its rounding in a batch.
    threshold = sum(sorted(kl.values())[len(grid) // 2 :][:2]) / 2
    finder = make_finder(llama_chat, prompts, Thresholds(kl=threshold, induce=-1e9))
    summary = finder.screen(n_candidates=4, max_new_tokens=2)
    passing = {key: scorer.bypass(*key) for key in grid if kl[key] <= threshold}
    assert summary.n_passing == len(passing)
    assert summary.share_passing == len(passing) / len(grid)
    assert summary.refusal_tokens == ("I",)
    lowest = sorted(passing, key=lambda key: passing[key])[:2]
    assert set(lowest) <= {(one.position, one.layer) for one in summary.screened}


def test_subspaces_are_orthonormal_nested_and_hold_the_best(finder: CandidateFinder) -> None:
    best = (-1, 2)
    first = finder.candidates[best] / finder.candidates[best].norm()
    previous = None
    for rank in (2, 4, 8):
        basis = finder.subspace(best, rank)
        assert basis.shape == (rank, 32)
        assert torch.allclose(basis @ basis.T, torch.eye(rank, dtype=basis.dtype), atol=1e-10)
        assert float((basis @ first).norm()) == pytest.approx(1, abs=1e-10)
        if previous is not None:
            assert torch.allclose(previous @ basis.T @ basis, previous, atol=1e-10)
        previous = basis


def test_the_subspace_holds_more_of_the_candidates_than_a_random_one(finder: CandidateFinder) -> None:
    rows = torch.stack([finder.candidates[key] / finder.candidates[key].norm() for key in finder._grid])
    basis = finder.subspace((-1, 2), 4)
    random, _ = torch.linalg.qr(torch.randn(32, 4, dtype=rows.dtype, generator=torch.Generator().manual_seed(0)))
    assert (rows @ basis.T).pow(2).sum() > 2 * (rows @ random).pow(2).sum()


def test_stability_under_resampling(finder: CandidateFinder) -> None:
    key = (-1, 2)
    found = finder.stability(key, n_resamples=300, seed=0)
    assert found == finder.stability(key, n_resamples=300, seed=0)
    assert found != finder.stability(key, n_resamples=300, seed=1)
    rng = np.random.default_rng(0)
    harmful, harmless = (a[:, -1, 2].double().numpy() for a in (finder._harmful, finder._harmless))
    whole = harmful.mean(0) - harmless.mean(0)
    cosines = []
    for _ in range(2000):
        difference = harmful[rng.integers(10, size=10)].mean(0) - harmless[rng.integers(10, size=10)].mean(0)
        cosines.append(difference @ whole / np.linalg.norm(difference) / np.linalg.norm(whole))
    assert found.mean_cosine == pytest.approx(np.mean(cosines), abs=0.03)
    assert found.low_cosine == pytest.approx(np.quantile(cosines, 0.05), abs=0.08)
