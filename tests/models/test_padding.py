"""Rows beside longer ones, and behind a cache that they share, give what they give alone: on every model type."""

import random

import pytest
import torch

from abliterate.architectures.table import ARCHITECTURES, feels_gaps, feels_padding
from abliterate.evaluation.drift import completion_surprise
from abliterate.models.chat_model import empty_cache
from abliterate.models.greedy import GreedyDecoder
from abliterate.models.machine import BatchLimits, plan_batches
from tests.support.conformance import PARTIAL_TYPES, TEXT_TYPES, WRAPPER_TYPES
from tests.support.differential import NOT_RUN, NOTHING, ROWS, difference, make

SOMETHING = 1e-3
TYPES = sorted({*TEXT_TYPES, *WRAPPER_TYPES, *PARTIAL_TYPES} - {*NOT_RUN})


@pytest.mark.parametrize("model_type", TYPES)
def test_what_a_row_gives_does_not_depend_on_the_rows_beside_it(model_type: str) -> None:
    chat = make(model_type)
    config = chat.model.config
    alone = torch.cat([chat.forward([row]) for row in ROWS])
    assert difference(chat.last_logits(ROWS), alone) < NOTHING
    padded = difference(chat.forward(ROWS), alone)
    if not feels_padding(config):
        assert padded < NOTHING
    elif model_type in ARCHITECTURES:  # the layers that feel it may be missing in a wrapper's tiny model
        assert padded > SOMETHING
    if feels_padding(config) or feels_gaps(config):
        assert empty_cache(config, longest=30) is None
        assert chat.shareable_prefix(ROWS) == 0


@pytest.mark.parametrize("model_type", ["gpt_neo", "mpt", "paligemma"])
def test_where_gaps_are_felt_a_shared_cache_would_be_wrong(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = make(model_type)
    alone = torch.cat([chat.forward([row]) for row in ROWS])
    monkeypatch.setattr("abliterate.models.chat_model.feels_gaps", lambda _config: False)
    assert difference(chat.last_logits(ROWS), alone) > SOMETHING


@pytest.mark.parametrize("model_type", ["recurrent_gemma", "xlstm", "paligemma", "deepseek_v4", "mpt", "nemotron_h"])
def test_replies_and_surprise_are_those_of_each_row_alone(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("abliterate.models.greedy.stop_tokens", lambda _chat: set())
    monkeypatch.setattr("abliterate.models.chat_model.stop_tokens", lambda _chat: set())
    chat = make(model_type)
    decoder = GreedyDecoder(chat=chat, max_new_tokens=6)
    replies = decoder.replies(ROWS)
    assert replies == [decoder.replies([row])[0] for row in ROWS]
    # The costs of these rows are equal, and their lengths are not.
    rows, completions = [ROWS[0][:16], ROWS[1][:12]], [[9, 8], [9, 8, 7]]
    together = completion_surprise(chat, rows, completions).nats
    for row, completion, nats in zip(rows, completions, together, strict=True):
        assert nats == pytest.approx(completion_surprise(chat, [row], [completion]).nats[0], abs=1e-4)


def test_rows_of_one_batch_are_of_one_width_where_they_must_be() -> None:
    rng = random.Random(5)
    for _ in range(100):
        widths = [rng.randint(1, 9) for _ in range(rng.randint(1, 40))]
        costs = [width + 4 * rng.randint(0, 2) for width in widths]
        limits = BatchLimits(tokens=50, overhead=30, equal=True)
        batches = plan_batches(costs, limits=limits, widths=widths)
        assert sorted(i for batch in batches for i in batch) == list(range(len(widths)))
        assert all(len({widths[i] for i in batch}) == 1 for batch in batches)
