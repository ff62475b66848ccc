"""What replies say: against hand-made truth on models that refuse in several ways, and on replies made up."""

from pathlib import Path

import pytest
import torch

from abliterate.extraction.behaviour import (
    OPENING_TOKENS,
    ReplyCounts,
    ReplyRun,
    ShortReply,
    answer_prefaces,
    compare_with_replies,
    count_short_replies,
    coverage,
    find_zero,
    first_tokens_of_refusals,
    openings_of_refusals,
)
from abliterate.processes import Ranks
from abliterate.progress import SILENT
from tests.support.refusing_models import HARMFUL_VERBS, HARMLESS_VERBS, is_refused, prompts_of, refusing_model


def refusal(*tokens: int, at: int = 0) -> ShortReply:
    return ShortReply(reply_class="refusal", tokens=tokens, refuses_at=at)


def answer(*tokens: int) -> ShortReply:
    return ShortReply(reply_class="answer", tokens=tokens)


@pytest.mark.parametrize("manner", ["plain", "spread", "late", "thinking"])
def test_replies_tell_what_was_taught(manner: str, tmp_path: Path) -> None:
    model = refusing_model(manner, tmp_path)
    prompts = [*prompts_of(HARMFUL_VERBS)[:30], *prompts_of(HARMLESS_VERBS)[:30]]
    replies = ReplyRun(chat=model.chat, ranks=Ranks()).read(model.chat.encode(prompts), progress=SILENT)
    assert [reply.refused for reply in replies] == [is_refused(prompt) for prompt in prompts]
    for reply in replies:
        if reply.refused:
            text = model.chat.decode(reply.opening)
            # Thoughts may be two tokens long, and so few belong to the opening.
            assert text.removeprefix("<think> </think> ").startswith("I cannot help")
            assert bool(reply.preface) == (manner == "late") or manner == "thinking"
            # Nothing is generated that is not needed to tell.
            assert len(reply.tokens) <= len(reply.preface) + OPENING_TOKENS


def test_replies_in_another_language_and_those_that_deflect_are_told(llama_chat) -> None:
    run = ReplyRun(chat=llama_chat, ranks=Ranks(), max_new_tokens=200)
    texts = [
        "Ein altes Thema. Dabei kann ich nicht helfen.",
        "Sure! I'd be happy to help you with that.",
        "Rain falls.",
        "",
    ]
    found = [run.classed(llama_chat.tokenizer(text)["input_ids"]) for text in texts]
    assert [reply.reply_class for reply in found] == ["refusal", "deflection", "answer", "empty"]
    before = llama_chat.decode(found[0].tokens[: found[0].refuses_at])
    assert "Thema" in before
    assert "kann ich" not in before
    assert count_short_replies(found) == ReplyCounts(refused=1, answered=1, degenerate=1, deflected=1)
    assert count_short_replies(found).n == 4


def test_first_tokens_are_those_of_refusals_and_not_of_answers() -> None:
    replies = [*[refusal(1, 9)] * 80, *[refusal(2, 9)] * 19, refusal(3, 9), *[answer(1, 5)] * 2, *[answer(4, 5)] * 98]
    assert first_tokens_of_refusals(replies) == [1, 2]  # 3 begins one in a hundred
    replies += [answer(2, 5)] * 20
    assert first_tokens_of_refusals(replies) == [1]  # 2 begins answers too
    assert coverage(replies, [1]) == 0.8
    assert first_tokens_of_refusals([answer(1)]) == []


def test_openings_are_the_frequent_ones_and_none_begins_another() -> None:
    one, other = (1, 2, 3, 4, 5, 6), (1, 2, 3)
    replies = [*[refusal(*one, 7)] * 9, *[refusal(*other)] * 5, *[refusal(8, 8, 8, 8, 8, 8, *one, at=6)] * 4]
    assert openings_of_refusals(replies).sequences == (one,)
    many = [refusal(i, i, i, i, i, i) for i in range(50)]
    assert len(openings_of_refusals(many).sequences) == 8


def test_harmless_replies_are_asked_as_far_in_as_refusals_come(tmp_path: Path) -> None:
    chat = refusing_model("late", tmp_path).chat
    run = ReplyRun(chat=chat, ranks=Ranks())
    harmful, harmless = (
        run.read(chat.encode(prompts_of(verbs)[:5]), progress=SILENT) for verbs in (HARMFUL_VERBS, HARMLESS_VERBS)
    )
    for preface in answer_prefaces(chat, harmless, harmful):
        assert chat.decode(preface) == "That is a matter of care and of time ."
    assert answer_prefaces(chat, harmless, [refusal(1, 2)]) == [[]] * 5


def test_the_zero_parts_best_and_stays_0_within_noise() -> None:
    refused = torch.linspace(-1.5, 6.0, 32, dtype=torch.float64)
    answered = torch.linspace(-8.0, -3.0, 31, dtype=torch.float64)
    apart = find_zero(refused=refused, answered=answered)
    assert (apart.value, apart.accuracy) == (-2.25, 1.0)
    assert apart.accuracy_at_0 == pytest.approx((25 / 32 + 1) / 2)

    # Of 63 prompts two are on the other side of 0.
    published = find_zero(refused=torch.cat([refused[refused > 0], refused[:2]]), answered=answered)
    assert (published.value, published.best, published.accuracy) == (0.0, -2.25, 1.0)
    assert find_zero(refused=torch.cat([refused[refused > 0], refused[:5]]), answered=answered).value == -2.25

    assert find_zero(refused=torch.tensor([]), answered=answered).accuracy == 0.0


def test_agreement_is_cohens_kappa() -> None:
    metric = {"harmful_train": torch.tensor([1.0, 2.0, -1.0, 5.0]), "harmless_train": torch.tensor([-1.0, 3.0, -2.0])}
    replies = {
        "harmful_train": [refusal(1), refusal(1), refusal(1), ShortReply(reply_class="empty", tokens=())],
        "harmless_train": [answer(1), answer(1), answer(1)],
    }
    found = compare_with_replies(metric, replies)
    assert (found.both, found.metric_only, found.replies_only, found.neither) == (2, 1, 1, 2)
    assert found.kappa == pytest.approx((4 / 6 - 0.5) / 0.5)
