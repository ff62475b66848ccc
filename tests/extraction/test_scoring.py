"""The three scores against plain forward passes without cache, batching or restarts."""

import pytest
import torch
from torch import Tensor

from abliterate.extraction import scoring
from abliterate.extraction.refusal import EPSILON, FirstTokens, refusal_metric
from abliterate.extraction.scoring import CandidateScorer, kl_divergence
from abliterate.extraction.selection import ScoreName
from abliterate.models.chat_model import ChatModel
from abliterate.models.hooks import ablate_direction, add_direction
from tests.support.tiny_models import HARMFUL, HARMLESS

TOKENS = [70, 75]


def logits_of(chat: ChatModel, rows: list[list[int]]) -> Tensor:
    with torch.inference_mode():
        return torch.stack([chat.model(torch.tensor([row])).logits[0, -1] for row in rows])


@pytest.fixture
def candidates(chat: ChatModel) -> Tensor:
    shape = (chat.chat_format.n_positions, chat.n_layers, chat.d_model)
    made = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    made[:, 0] = 0
    return made


@pytest.fixture
def scorer(chat: ChatModel, candidates: Tensor) -> CandidateScorer:
    return CandidateScorer(
        chat=chat,
        candidates=candidates,
        harmful_rows=chat.encode(HARMFUL),
        harmless_rows=chat.encode(HARMLESS),
        measure=FirstTokens(tuple(TOKENS)),
    )


def test_scores_equal_plain_passes(chat: ChatModel, candidates: Tensor, scorer: CandidateScorer) -> None:
    harmful, harmless = chat.encode(HARMFUL), chat.encode(HARMLESS)
    base = logits_of(chat, harmless)
    for position, layer in [(-1, 1), (-2, 3), (-1, 4)]:
        vector = candidates[position, layer]
        with ablate_direction(chat, vector):
            bypass = refusal_metric(logits_of(chat, harmful), token_ids=TOKENS).mean()
            kl = kl_divergence(base, logits_of(chat, harmless)).mean()
        with add_direction(chat, vector, layer=layer):
            induce = refusal_metric(logits_of(chat, harmless), token_ids=TOKENS).mean()
        assert scorer.bypass(position, layer) == pytest.approx(float(bypass), abs=1e-4)
        assert scorer.kl(position, layer) == pytest.approx(float(kl), abs=1e-4)
        assert scorer.induce(position, layer) == pytest.approx(float(induce), abs=1e-4)


def test_zero_vectors_at_layer_zero_score_as_the_unchanged_model(chat: ChatModel, scorer: CandidateScorer) -> None:
    harmful = refusal_metric(logits_of(chat, chat.encode(HARMFUL)), token_ids=TOKENS).mean()
    harmless = refusal_metric(logits_of(chat, chat.encode(HARMLESS)), token_ids=TOKENS).mean()
    assert scorer.bypass(-1, 0) == pytest.approx(float(harmful), abs=1e-4)
    assert scorer.induce(-1, 0) == pytest.approx(float(harmless), abs=1e-4)
    assert scorer.kl(-1, 0) == pytest.approx(0, abs=1e-6)


def test_scoring_leaves_the_model_as_it_was(chat: ChatModel, scorer: CandidateScorer) -> None:
    rows = chat.encode(HARMLESS)
    before = logits_of(chat, rows)
    scorer.induce(-1, 2)
    scorer.bypass(-1, 2)
    scorer.kl(-1, 2)
    assert torch.equal(logits_of(chat, rows), before)
    assert scorer.induce(-1, 2) == scorer.induce(-1, 2)


def test_kl_is_that_of_the_base_to_the_other() -> None:
    base, other = torch.randn(4, 30), torch.randn(4, 30)
    p, q = base.double().softmax(-1), other.double().softmax(-1)
    expected = (p * (p / q).log()).sum(-1)
    assert torch.allclose(kl_divergence(base, other), expected, atol=1e-4)
    assert not torch.allclose(kl_divergence(other, base), expected, atol=1e-2)
    assert torch.allclose(kl_divergence(base, base), torch.zeros(4, dtype=torch.float64))


def test_probabilities_taken_a_row_at_a_time_are_those_of_all() -> None:
    base, other = torch.randn(3, 2, 30), torch.randn(3, 2, 30)
    p, q = (logits.double().softmax(-1) for logits in (base, other))
    kl = (p * ((p + scoring.KL_EPSILON).log() - (q + scoring.KL_EPSILON).log())).sum(-1)
    assert torch.allclose(kl_divergence(base, other), kl, rtol=0, atol=1e-15)
    refusal = p[..., [4, 7]].sum(-1)
    metric = (refusal + EPSILON).log() - (1 - refusal + EPSILON).log()
    assert torch.allclose(refusal_metric(base, token_ids=[4, 7]), metric, rtol=0, atol=1e-14)
    assert refusal_metric(base[0, 0], token_ids=[4]).shape == ()
    assert kl_divergence(base[:0], base[:0]).shape == (0, 2)


@pytest.mark.parametrize("name", ["induce", "kl", "bypass"])
def test_what_prompts_share_is_run_once_for_those_that_are_expected_again(
    chat: ChatModel, candidates: Tensor, name: ScoreName, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {kind: chat.encode(texts) for kind, texts in (("harmful_rows", HARMFUL), ("harmless_rows", HARMLESS))}
    given = {"chat": chat, "candidates": candidates, "measure": FirstTokens((5, 9)), **rows}
    keys = [(-1, 1), (-2, 1), (-2, 3), (-1, 4), (-1, 3)]
    plain = CandidateScorer(**given).score(name, keys)
    run, variants = ChatModel.run_prefix, []

    def counting(chat, prefix, *, n_variants=1):
        variants.append(n_variants)
        return run(chat, prefix, n_variants=n_variants)

    scorer = CandidateScorer(**given)
    monkeypatch.setattr(ChatModel, "run_prefix", counting)
    scorer.enter(name, keys[:3])
    scorer.enter(name, keys)
    of_first = scorer.score(name, [keys[0]], range(2))[0]
    assert of_first[name] == pytest.approx(plain[0][name][:2], abs=1e-6)
    for found, expected in zip(scorer.score(name, keys), plain, strict=True):
        assert found[name] == pytest.approx(expected[name], abs=1e-6)
    assert scorer.score(name, keys[3:], range(1, 3))[0][name] == pytest.approx(plain[3][name][1:3], abs=1e-6)
    # A layer's candidates together, or all together, and the one that came in later by itself.
    assert sorted(variants) == ([1, 1, 1, 2] if name == "induce" else [2, 3])


def test_nothing_is_kept_that_takes_too_much_memory(
    chat: ChatModel, scorer: CandidateScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [(-1, 1), (-2, 1), (-2, 3), (-1, 4)]
    monkeypatch.setitem(chat._limit, "forward", 1)
    run, variants = ChatModel.run_prefix, []

    def counting(chat, prefix, *, n_variants=1):
        variants.append(n_variants)
        return run(chat, prefix, n_variants=n_variants)

    monkeypatch.setattr(ChatModel, "run_prefix", counting)
    scorer.enter("kl", keys)
    for _ in range(2):
        scorer.score("kl", keys[:2])
    assert variants == [2, 2]
