"""A cached prefix changes nothing: on many kinds of models, for logits, recorded activations and scores."""

from statistics import fmean as mean

import pytest
import torch
from torch import Tensor

from abliterate.extraction.refusal import FirstTokens, refusal_metric
from abliterate.extraction.scoring import CandidateScorer, kl_divergence
from abliterate.models.chat_model import ChatModel
from abliterate.models.hooks import ablate_direction, add_direction, record
from tests.support.tiny_models import CACHED, KINDS, make_many

PROMPTS = [
    "How do locks work?",
    "Explain rain.",
    "Write a long letter about the garden behind my house, please.",
    "How do keys work?",
    "Tell me a story.",
]
TOKENS = [70, 75]
# The tiny model with linear attention is ill-conditioned: one unit in the last place of its embeddings moves its logits
# by up to 1.7e-4, as measured with AVX-512.
TOLERANCES = {"linear attention": 1e-3}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tolerance(kind: str) -> float:
    return TOLERANCES.get(kind, 1e-4)


@pytest.fixture
def chat(kind: str) -> ChatModel:
    return make_many(kind)


@torch.inference_mode()
def plain_logits(chat: ChatModel, rows: list[list[int]]) -> Tensor:
    return torch.stack([chat.model(torch.tensor([row])).logits[0, -1].float() for row in rows])


def test_logits_with_a_cached_prefix_equal_uncached_ones(chat: ChatModel, kind: str, tolerance: float) -> None:
    rows = chat.encode(PROMPTS)
    cache, n_cached = chat.share_prefix(rows)
    assert (cache is not None) == (kind in CACHED)
    assert (n_cached > 8) == (kind in CACHED)
    assert torch.allclose(chat.last_logits(rows), plain_logits(chat, rows), atol=tolerance)


def test_a_window_shorter_than_a_row_would_be_wrong_with_padding() -> None:
    """The rule that leaves such models uncached is needed: forced, the cache gives other logits."""
    chat = make_many("gemma2-short-window")
    rows = chat.encode(PROMPTS)
    model = make_many("gemma2").model
    assert model.config.sliding_window == 256
    wide = make_many("gemma2")
    assert not torch.allclose(plain_logits(chat, rows), plain_logits(wide, rows), atol=1e-2)
    assert chat.shareable_prefix(rows) == 0
    assert wide.shareable_prefix(rows) > 8


def test_recorded_activations_equal_output_hidden_states(chat: ChatModel, tolerance: float) -> None:
    rows = chat.encode(PROMPTS)
    recording = record(chat, rows)
    n_positions = chat.chat_format.n_positions
    for i, row in enumerate(rows):
        with torch.inference_mode():
            out = chat.model(torch.tensor([row]), output_hidden_states=True)
        expected = torch.stack(out.hidden_states[: chat.n_layers], dim=2)[0, -n_positions:]
        assert torch.allclose(recording.activations[i].float(), expected, atol=tolerance)
        assert torch.allclose(recording.logits[i], out.logits[0, -1], atol=tolerance)


def test_scores_of_candidates_in_one_batch_equal_plain_passes(chat: ChatModel, tolerance: float) -> None:
    harmful, harmless = chat.encode(PROMPTS[:3]), chat.encode(PROMPTS[2:])
    shape = (chat.chat_format.n_positions, chat.n_layers, chat.d_model)
    candidates = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    scorer = CandidateScorer(
        chat=chat,
        candidates=candidates,
        harmful_rows=harmful,
        harmless_rows=harmless,
        measure=FirstTokens(tuple(TOKENS)),
    )
    keys = [(-1, 1), (-2, 2), (-3, 1), (-1, 2)]
    induced, both = scorer.score("induce", keys), scorer.score("ablated", keys)
    bypassed, diverged = scorer.score("bypass", keys), scorer.score("kl", keys)
    base = plain_logits(chat, harmless)
    for i, (position, layer) in enumerate(keys):
        vector = candidates[position, layer]
        with ablate_direction(chat, vector):
            bypass = float(refusal_metric(plain_logits(chat, harmful), token_ids=TOKENS).mean())
            kl = float(kl_divergence(base, plain_logits(chat, harmless)).mean())
        with add_direction(chat, vector, layer=layer):
            induce = float(refusal_metric(plain_logits(chat, harmless), token_ids=TOKENS).mean())
        assert mean(induced[i]["induce"]) == pytest.approx(induce, abs=tolerance)
        for scores in (both[i], bypassed[i]):
            assert mean(scores["bypass"]) == pytest.approx(bypass, abs=tolerance)
        for scores in (both[i], diverged[i]):
            assert mean(scores["kl"]) == pytest.approx(kl, abs=tolerance)
