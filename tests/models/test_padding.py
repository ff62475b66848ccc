"""Rows beside longer ones, and behind a cache that they share, give what they give alone: on every model type."""

import random

import pytest
import torch
from torch import Tensor

from abliterate.architectures.table import ARCHITECTURES, feels_gaps, feels_padding
from abliterate.evaluation.drift import completion_surprise
from abliterate.models.batching import BatchLimits, plan_batches
from abliterate.models.chat_model import ChatModel, empty_cache
from abliterate.models.greedy import GreedyDecoder
from tests.support.conformance import PARTIAL_TYPES, TEXT_TYPES, WRAPPER_TYPES, as_chat, build_model

# Long enough for a cache, of two lengths, alike at the start.
_START = [31, 7, 52, 19, 44, 23, 11, 38, 27]
ROWS = [[*_START, 9, 41, 16, 58, 33, 21, 48, 13, 29, 35, 6], [*_START, 55, 12, 40, 26]]
NOTHING, SOMETHING = 1e-4, 1e-3
# Their towers, which no text needs, read a config that the tiny one does not have.
TYPES = sorted({*TEXT_TYPES, *WRAPPER_TYPES, *PARTIAL_TYPES} - {"qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"})


# Theirs is attention to the best tokens of an index, here to all of them, as for prompts of ordinary length.
INDEXED = {"deepseek_v32": "index_topk", "glm_moe_dsa": "index_topk", "hy_v4": "index_topk"}


def make(model_type: str) -> ChatModel:
    changes = {INDEXED[model_type]: 64} if model_type in INDEXED else {}
    # In float64 a row of a mask that holds nothing but its minimum becomes NaN in some models.
    return as_chat(build_model(model_type, **changes).float())


def difference(found: Tensor, expected: Tensor) -> float:
    one, other = (logits.double().log_softmax(dim=-1) for logits in (found, expected))
    assert not one.isnan().any()
    return float((one - other).abs().max())


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
