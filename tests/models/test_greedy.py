"""Greedy replies that continue a pass over the prompts are those that `generate` gives."""

import pytest
import torch

from abliterate.models.chat_model import ChatModel, make_chat_model
from abliterate.models.greedy import GreedyDecoder, can_continue
from abliterate.models.hooks import ablate_direction
from tests.support.tiny_models import make_talkative_model, make_tokenizer, random_direction

PROMPTS = ["How do locks work?", "Explain rain.", "Write a long letter about the garden behind my house.", "Go."] * 3


def test_replies_are_those_of_generate(chat: ChatModel) -> None:
    rows = chat.encode(PROMPTS)
    decoder = GreedyDecoder(chat=chat, max_new_tokens=9)
    assert can_continue(chat, rows, max_new_tokens=9)
    counted: list[int] = []
    assert decoder.replies(rows, advance=counted.append) == chat.generate(rows, max_new_tokens=9)
    assert sum(counted) == len(rows)
    assert len({tuple(reply) for reply in decoder.replies(rows)}) > 1


def test_a_row_that_ends_leaves_the_others_as_they_are(chat: ChatModel) -> None:
    rows = chat.encode(PROMPTS)
    whole = chat.generate(rows, max_new_tokens=8)
    # The token that some replies begin with, or come to, ends them.
    chat.model.generation_config.eos_token_id = [whole[0][3], whole[2][0]]
    replies = GreedyDecoder(chat=chat, max_new_tokens=8).replies(rows)
    assert replies == chat.generate(rows, max_new_tokens=8)
    assert min(map(len, replies)) < max(map(len, replies))


def test_a_reader_that_has_seen_enough_stops_its_row_alone(chat: ChatModel) -> None:
    rows = chat.encode(PROMPTS)
    whole = chat.generate(rows, max_new_tokens=8)
    first = whole[0][0]
    decoder = GreedyDecoder(chat=chat, max_new_tokens=8, enough=lambda tokens: tokens[0] == first)
    for reply, full in zip(decoder.replies(rows), whole, strict=True):
        assert reply == (full[:1] if full[0] == first else full)


def test_hooks_act_on_every_token(llama_chat: ChatModel) -> None:
    rows = llama_chat.encode(PROMPTS)
    decoder = GreedyDecoder(chat=llama_chat, max_new_tokens=6)
    vector = random_direction(llama_chat.d_model) * 1.0
    with ablate_direction(llama_chat, vector):
        assert decoder.replies(rows) == llama_chat.generate(rows, max_new_tokens=6)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mistral", "sliding_window": 8},
        {"model_type": "mamba", "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2},
    ],
)
def test_where_a_cache_cannot_be_continued_generate_is_used(config: dict[str, object]) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = make_talkative_model(**{"seed": 1, "num_key_value_heads": 4, **sizes, **config})  # type: ignore[arg-type]
    chat = make_chat_model(model, make_tokenizer())
    rows = chat.encode(PROMPTS[:2])
    assert not can_continue(chat, rows, max_new_tokens=4)
    with torch.inference_mode():
        assert GreedyDecoder(chat=chat, max_new_tokens=4).replies(rows) == chat.generate(rows, max_new_tokens=4)
