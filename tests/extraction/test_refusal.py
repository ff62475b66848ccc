"""The refusal metric against an independent computation, and the substring scorer."""

import math

import pytest
import torch

from abliterate.errors import RefusalBehaviourError
from abliterate.extraction.refusal import find_refusal_tokens, refusal_metric, require_both_behaviours
from abliterate.extraction.refusal_substrings import REFUSAL_SUBSTRINGS, is_refusal


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


@pytest.mark.parametrize(
    ("n_harmful", "n_harmless", "says"),
    [(2, 30, "does not refuse enough"), (30, 2, "refuses nearly everything"), (1, 1, "do not tell refusals")],
)
def test_too_few_prompts_left_says_what_the_model_does(n_harmful: int, n_harmless: int, says: str) -> None:
    with pytest.raises(RefusalBehaviourError, match=says) as caught:
        require_both_behaviours(
            n_harmful=n_harmful, n_harmless=n_harmless, total_harmful=32, total_harmless=32, minimum=8, part="training"
        )
    assert f"{n_harmful} of 32 harmful" in str(caught.value)
