"""Candidates judged by whole replies."""

from pathlib import Path

import pytest
import torch

from abliterate.extraction.behaviour import ReplyRun
from abliterate.extraction.candidates import candidate_directions
from abliterate.extraction.options import DirectionRecipe
from abliterate.extraction.screening import (
    Confirmation,
    ReplyScorer,
    Screener,
    alike,
    order_confirmed,
    propose,
    separations,
)
from abliterate.extraction.selection import CandidateScore
from abliterate.models.chat_model import with_response_prefix
from abliterate.models.hooks import record
from abliterate.processes import Ranks
from abliterate.progress import SILENT
from tests.support.refusing_models import HARMFUL_VERBS, HARMLESS_VERBS, prompts_of, refusing_model


def test_whole_replies_score_a_candidate_as_they_are(tmp_path: Path) -> None:
    chat = with_response_prefix(refusing_model("late", tmp_path).chat, "That is a matter")
    train = {name: chat.encode(prompts_of(verbs)[:40]) for name, verbs in _KINDS.items()}
    rows = {name: chat.encode(prompts_of(verbs)[40:52]) for name, verbs in _KINDS.items()}
    recordings = {name: record(chat, rows) for name, rows in train.items()}
    candidates = candidate_directions(
        harmful=recordings["harmful"].activations,
        harmless=recordings["harmless"].activations,
        recipe=DirectionRecipe(),
    )
    # At its own length no direction makes this model refuse; at eight times that some do.
    candidates = 8 * candidates
    screener = Screener(
        replies=ReplyRun(chat=chat, ranks=Ranks()),
        candidates=candidates,
        harmful_rows=rows["harmful"],
        harmless_rows=rows["harmless"],
    )
    scorer = ReplyScorer(screener=screener, base_harmless_logits=chat.last_logits(rows["harmless"]))
    keys = [(position, layer) for position in (-5, -3, -2, -1) for layer in (1, 2)]
    found = {key: scorer.score("ablated", [key])[0] | scorer.score("induce", [key])[0] for key in keys}
    best = min(keys, key=lambda key: sum(found[key]["bypass"]))
    assert {value for key in keys for value in found[key]["bypass"]} == {-1.0, 1.0}
    # Side by side, at two layers, as one by one.
    confirmed = screener.confirm(keys, progress=SILENT)
    assert [(one.position, one.layer) for one in confirmed] == keys
    for one in confirmed:
        alone = found[one.position, one.layer]
        assert one.unanswered == sum(value > 0 for value in alone["bypass"])
        assert one.induced == sum(value > 0 for value in alone["induce"])
        assert (one.n_harmful, one.n_harmless) == (12, 12)
    assert len({one.unanswered for one in confirmed}) > 1
    assert len({one.induced for one in confirmed}) > 2
    unit = candidates[best] / candidates[best].norm()
    together = scorer.score_together(unit[None])
    assert together["bypass"] == found[best]["bypass"]
    assert together["kl"] == pytest.approx(found[best]["kl"], abs=1e-5)
    # A vector of zeros is no direction: the replies stay what they are.
    assert set(scorer.score_together(torch.zeros_like(unit)[None])["bypass"]) == {1.0}
    separation = separations(candidates, keys, **recordings)
    assert max(separation.values()) > 1
    assert propose(separation, 2)[0] == max(separation, key=lambda key: separation[key])


_KINDS = {"harmful": HARMFUL_VERBS, "harmless": HARMLESS_VERBS}


def test_one_candidate_a_layer_is_proposed_before_a_second() -> None:
    separation = {(-1, 1): 3.0, (-2, 1): 2.9, (-1, 2): 1.0, (-2, 2): 0.5}
    assert propose(separation, 3) == [(-1, 1), (-1, 2), (-2, 1)]
    assert propose(separation, 2, first=[(-2, 2)]) == [(-2, 2), (-1, 1)]


def test_confirmed_candidates_come_first_the_best_by_replies_ahead() -> None:
    passing = [CandidateScore(position=-1, layer=i, bypass=float(i)) for i in range(4)]
    found = [
        Confirmation(position=-1, layer=i, unanswered=bad, n_harmful=9, induced=induced, n_harmless=9)
        for i, bad, induced in ((0, 2, 9), (1, 0, 3), (2, 0, 5))
    ]
    assert [score.layer for score in order_confirmed(passing, found)] == [2, 1, 0, 3]
    assert order_confirmed(passing, []) == passing


def test_alike_is_within_two_standard_errors_of_the_differences() -> None:
    best = torch.zeros(16).tolist()
    assert alike(best, [0.1, -0.1] * 8)
    assert not alike(best, [0.1, 0.2] * 8)
    assert alike(best, [-1.0] * 16)
