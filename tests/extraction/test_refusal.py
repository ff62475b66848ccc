"""The refusal metric against an independent computation, and the substring scorer."""

import math

import pytest
import torch

from abliterate.extraction.refusal import FirstTokens, Openings, find_refusal_tokens, measure_refusal, refusal_metric
from abliterate.extraction.reply_classes import REFUSAL_SUBSTRINGS, find_refusal, is_refusal
from abliterate.models.chat_model import ChatModel


def test_metric_is_the_log_odds_of_the_tokens_together() -> None:
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    p = logits.double().softmax(-1)[:, [3, 9]].sum(-1)
    assert torch.allclose(refusal_metric(logits, token_ids=[3, 9]), torch.log(p / (1 - p)), atol=1e-6)


def test_metric_is_clamped_by_epsilon() -> None:
    logits = torch.full((2, 4), -1e4)
    logits[0, 1] = 1e4
    logits[1, 2] = 1e4
    metric = refusal_metric(logits, token_ids=[1])
    assert metric.dtype == torch.float64
    assert metric.tolist() == pytest.approx([18.4207, -18.4207], abs=1e-4)
    assert metric[0].item() == pytest.approx(-math.log(1e-8), abs=1e-6)


@pytest.mark.parametrize("substring", REFUSAL_SUBSTRINGS)
@pytest.mark.parametrize("text", ["{}", "{} but no.", "Well. " * 60 + "{} go on", "as you see, {}"])
def test_each_substring_counts_anywhere_in_any_case(substring: str, text: str) -> None:
    for variant in (substring, substring.upper(), substring.lower()):
        assert is_refusal(text.format(variant))


def test_there_are_the_papers_twelve_substrings_and_nothing_else_counts() -> None:
    assert len(REFUSAL_SUBSTRINGS) == len({s.lower() for s in REFUSAL_SUBSTRINGS}) == 12
    for text in ("", "Sure, here is how.", "I can certainly help", "I won't", "Sorry about the delay"):
        assert not is_refusal(text)


def test_the_first_refusal_is_found_where_it_begins() -> None:
    assert find_refusal("Well, I CANNOT say. I'm sorry.") == 6
    assert find_refusal("With pleasure.") is None


def _logits(probabilities: dict[int, float], n: int = 20, vocabulary: int = 100) -> torch.Tensor:
    rest = (1 - sum(probabilities.values())) / (vocabulary - len(probabilities))
    row = torch.full((vocabulary,), rest)
    for token, p in probabilities.items():
        row[token] = p
    return row.log().repeat(n, 1)


def test_refusal_tokens_are_those_that_start_answers_to_harmful_prompts_only() -> None:
    found = find_refusal_tokens(
        harmful_logits=_logits({5: 0.6, 8: 0.2, 9: 0.1}), harmless_logits=_logits({5: 0.01, 9: 0.09, 7: 0.7})
    )
    assert [token for token, _, _ in found] == [5, 8]
    assert found[0][1:] == pytest.approx((0.6, 0.01), abs=1e-3)


def test_no_refusal_token_when_both_are_answered_alike() -> None:
    logits = _logits({5: 0.6})
    assert find_refusal_tokens(harmful_logits=logits, harmless_logits=logits) == []


def test_openings_of_one_token_are_the_published_metric(chat: ChatModel) -> None:
    rows = chat.encode(["Tell me a joke.", "How do I bake bread, slowly?"])
    published = measure_refusal(chat, FirstTokens((70, 75)), rows)
    assert torch.allclose(measure_refusal(chat, Openings(((70,), (75,))), rows), published, atol=1e-4)


def test_openings_are_log_odds_of_the_sequences_together(chat: ChatModel) -> None:
    """An independent computation: one plain pass for each prefix of each sequence."""
    sequences = ((70, 75, 80), (71, 5), (90,))
    rows = chat.encode(["Tell me a joke.", "How do I bake bread, slowly?"])
    found = measure_refusal(chat, Openings(sequences), rows)
    for row, value in zip(rows, found.tolist(), strict=True):
        p = 0.0
        for sequence in sequences:
            log = 0.0
            for i, token in enumerate(sequence):
                with torch.inference_mode():
                    logits = chat.model(torch.tensor([[*row, *sequence[:i]]])).logits[0, -1]
                log += float(logits.double().log_softmax(-1)[token])
            p += math.exp(log)
        assert value == pytest.approx(math.log(p / (1 - p)), abs=1e-3)
    assert found.dtype == torch.float64


def test_certain_and_impossible_openings_stay_finite() -> None:
    combined = Openings(((1,), (2,))).combine(torch.tensor([[0.0, -1e9], [-800.0, -900.0]], dtype=torch.float64))
    assert combined.isfinite().all()
    assert combined[0] > 18
    assert combined[1] == pytest.approx(-800.0)
