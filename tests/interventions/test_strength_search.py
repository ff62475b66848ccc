"""The pieces of the search against plain passes, and that it is deterministic and does what it is for."""

from dataclasses import replace

import pytest
import torch

from abliterate.extraction.refusal import refusal_metric
from abliterate.interventions.soft_edit import SoftEdit
from abliterate.interventions.strength_search import Search, compare, last_logits, log_odds, read_base, reply_logits
from abliterate.models.chat_model import ChatModel
from tests.support.tiny_models import random_direction

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14], [15, 16, 17, 18, 19]]
REPLIES = [[20, 21, 22], [23], [24, 25, 26, 27]]


def test_logits_at_the_replies_are_those_of_plain_passes(chat: ChatModel) -> None:
    rows = [[*prompt, *reply] for prompt, reply in zip(PROMPTS, REPLIES, strict=True)]
    with torch.no_grad():
        found = reply_logits(chat, rows, [len(reply) for reply in REPLIES])
        last = last_logits(chat, PROMPTS)
        for prompt, reply, row, logits, first in zip(PROMPTS, REPLIES, rows, found, last, strict=True):
            plain = chat.model(torch.tensor([row])).logits[0].float()
            torch.testing.assert_close(logits, plain[len(prompt) - 1 : -1], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(logits[0], first, rtol=1e-4, atol=1e-4)
            assert len(logits) == len(reply)


def test_what_all_rows_begin_with_is_run_once_and_changes_nothing(chat: ChatModel) -> None:
    shared = list(range(30, 42))
    rows = [[*shared, *prompt, *reply] for prompt, reply in zip(PROMPTS, REPLIES, strict=True)]
    n_cached = chat.shareable_prefix(rows, keep=[len(reply) + 1 for reply in REPLIES])
    assert n_cached in {0, len(shared)}
    directions = torch.stack([random_direction(seed=i) for i in range(chat.n_layers)]).double()
    edit = SoftEdit(chat, directions / directions.norm(dim=1, keepdim=True))
    gradients = []
    for whole in (True, False):
        strengths = torch.full((chat.n_layers, 2), 0.4, requires_grad=True)
        with edit.applied(strengths):
            if whole:
                found = reply_logits(chat, rows, [len(reply) for reply in REPLIES])
            else:
                plain = [chat.model(torch.tensor([row])).logits[0].float() for row in rows]
                found = [row[-len(reply) - 1 : -1] for row, reply in zip(plain, REPLIES, strict=True)]
        torch.cat(found).logsumexp(dim=-1).sum().backward()
        gradients.append(strengths.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_the_metric_is_the_published_one_and_has_a_gradient_where_that_is_cut_off() -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    wanted = refusal_metric(logits, token_ids=(3, 7))
    torch.testing.assert_close(log_odds(logits, (3, 7)).double(), wanted, rtol=1e-5, atol=1e-5)
    sure = torch.zeros(1, 40)
    sure[0, 3] = 100.0
    sure.requires_grad_(True)
    log_odds(sure, (3,)).sum().backward()
    assert float(sure.grad[0, 3]) == pytest.approx(1.0)


def test_nothing_is_lost_and_nothing_surprises_more_where_nothing_was_edited(chat: ChatModel) -> None:
    base = read_base(chat, PROMPTS, REPLIES)
    with torch.no_grad():
        pairs = compare(chat, base, range(3))
    for (kl, surprise), reply, predicted in zip(pairs, REPLIES, base.base, strict=True):
        assert kl.abs().max() < 1e-3
        by_hand = [-float(predicted[i, token]) for i, token in enumerate(reply)]
        assert surprise.tolist() == pytest.approx(by_hand, abs=2e-2)


def test_the_search_is_deterministic_and_lowers_the_metric_at_little_kl(llama_chat: ChatModel) -> None:
    for parameter in llama_chat.model.parameters():
        parameter.requires_grad_(False)
    rows = torch.stack([random_direction(seed=i) for i in range(llama_chat.n_layers)]).double()
    edit = SoftEdit(llama_chat, rows / rows.norm(dim=1, keepdim=True))
    with torch.no_grad():
        likely = int(last_logits(llama_chat, PROMPTS).mean(dim=0).argmax())
    search = Search(
        chat=llama_chat,
        edit=edit,
        to_answer=PROMPTS,
        to_stay=read_base(llama_chat, PROMPTS[1:], REPLIES[1:]),
        token_ids=(likely,),
    )
    found = [list(search.points((1.0, 0.01), steps=16, advance=lambda _n: None)) for _ in range(2)]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one[1], other[1])
    (_, strong), (_, weak) = found[0]

    def metric_and_kl(strengths: torch.Tensor) -> tuple[float, float]:
        with torch.no_grad(), edit.applied(strengths):
            metric = log_odds(last_logits(llama_chat, PROMPTS), (likely,)).mean()
            kl = torch.cat([kl for kl, _ in compare(llama_chat, search.to_stay, range(2))]).mean()
        return float(metric), float(kl)

    plain, pressed, eased = (metric_and_kl(each) for each in (torch.zeros_like(strong), strong, weak))
    assert pressed[0] < plain[0]
    assert eased[1] < pressed[1]
    # Each zero moves the target with it: pressed to less, it moves less.
    shifted = list(replace(search, zero=100.0).points((1.0,), steps=8, advance=lambda _n: None))
    assert not torch.equal(shifted[0][1], found[0][0][1])
