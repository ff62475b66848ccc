"""Greedy replies that continue a pass over the prompts are those that `generate` gives."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from abliterate.errors import ModelError
from abliterate.models import greedy
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


@pytest.mark.parametrize("rows_at_once", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("window", [None, 256])
def test_rows_of_several_passes_are_decoded_together(
    rows_at_once: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = {"model_type": "mistral", "sliding_window": window} if window else {"model_type": "llama"}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    chat = make_chat_model(
        make_talkative_model(seed=1, num_key_value_heads=4, **sizes, **kind),  # type: ignore[arg-type]
        make_tokenizer(),
    )
    rows = chat.encode(PROMPTS)
    whole = chat.generate(rows, max_new_tokens=8)
    chat.model.generation_config.eos_token_id = [whole[0][3], whole[2][0]]
    expected = chat.generate(rows, max_new_tokens=8)
    # Passes of one row, so that rows enter at all times.
    monkeypatch.setitem(chat._limit, "forward", 1)
    monkeypatch.setitem(greedy.ROWS_AT_ONCE, "cpu", rows_at_once)
    sizes_seen: list[int] = []
    decoder = GreedyDecoder(chat=chat, max_new_tokens=8)
    assert can_continue(chat, rows, max_new_tokens=8)
    with _watched(chat, sizes_seen):
        assert decoder.replies(rows) == expected
    assert max(sizes_seen) <= rows_at_once
    if rows_at_once == 100:
        assert max(sizes_seen) > 4


def test_the_cache_of_all_rows_is_bounded(llama_chat: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = llama_chat.encode(PROMPTS)
    monkeypatch.setitem(llama_chat._limit, "forward", 1)
    monkeypatch.setattr(greedy, "CACHE_SHARE", 0.0)
    monkeypatch.setattr(greedy, "CACHE_BYTES", 0)
    seen: list[int] = []
    with _watched(llama_chat, seen):
        replies = GreedyDecoder(chat=llama_chat, max_new_tokens=6).replies(rows)
    assert replies == llama_chat.generate(rows, max_new_tokens=6)
    assert max(seen) == 1


def test_when_memory_runs_out_half_of_the_rows_wait(llama_chat: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = llama_chat.encode(PROMPTS)
    expected = llama_chat.generate(rows, max_new_tokens=6)
    seen: list[int] = []
    with _watched(llama_chat, seen, most=3):
        assert GreedyDecoder(chat=llama_chat, max_new_tokens=6).replies(rows) == expected
    assert max(seen) == 12
    assert min(seen) <= 3


def test_a_reply_that_does_not_fit_is_named(llama_chat: ChatModel) -> None:
    rows = llama_chat.encode(PROMPTS)
    with _watched(llama_chat, [], most=0), pytest.raises(ModelError, match="one reply alone does not fit"):
        GreedyDecoder(chat=llama_chat, max_new_tokens=6).replies(rows)


@contextmanager
def _watched(chat: ChatModel, seen: list[int], *, most: int = 10**9) -> Iterator[None]:
    """Note how many rows each decoding step runs; of more than `most` memory runs out, half-way through the blocks."""

    def look(_module: object, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[1] == 1:
            seen.append(len(hidden))
            if len(hidden) > most:
                raise torch.OutOfMemoryError("out of memory")

    handle = chat.blocks[-1].register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


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


@pytest.mark.parametrize("rows_at_once", [2, 100])
@pytest.mark.parametrize("continued", [True, False])
def test_variants_that_are_decoded_side_by_side_are_those_of_each_alone(
    chat: ChatModel, rows_at_once: int, continued: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(greedy.ROWS_AT_ONCE, "cpu", rows_at_once)
    if not continued:
        monkeypatch.setattr(greedy, "can_continue", lambda *_arguments, **_rest: False)
    rows = chat.encode(PROMPTS[:4])
    vectors = torch.stack([torch.zeros(chat.d_model), *(random_direction(chat.d_model, seed=i) for i in range(2))])
    expected = []
    for vector in vectors:
        with ablate_direction(chat, vector):
            expected.append(chat.generate(rows, max_new_tokens=6))
    assert expected[0] == chat.generate(rows, max_new_tokens=6)
    assert expected[0] != expected[1] != expected[2]
    # In an order in which neighbours are of different variants.
    asked = [(i, v) for i in range(len(rows)) for v in range(len(vectors))]
    decoder = GreedyDecoder(
        chat=chat, max_new_tokens=6, intervene=lambda variants: ablate_direction(chat, vectors[list(variants)])
    )
    received: dict[int, list[int]] = {}
    found = decoder.replies([rows[i] for i, _ in asked], variants=[v for _, v in asked], receive=received.__setitem__)
    assert found == [expected[v][i] for i, v in asked]
    assert received == dict(enumerate(found))


@pytest.mark.parametrize("rows_at_once", [2, 100])
def test_what_a_reply_weighs_is_what_reading_it_finds(
    chat: ChatModel, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(greedy.ROWS_AT_ONCE, "cpu", rows_at_once)
    rows = chat.encode(PROMPTS)
    whole = chat.generate(rows, max_new_tokens=8)
    chat.model.generation_config.eos_token_id = [whole[0][3], whole[2][0]]
    weighed: dict[int, float] = {}
    replies = GreedyDecoder(chat=chat, max_new_tokens=8, weigh=weighed.__setitem__).replies(rows)
    assert len({len(reply) for reply in replies}) > 1
    for i, (row, reply) in enumerate(zip(rows, replies, strict=True)):
        with torch.inference_mode():
            logits = chat.model(torch.tensor([[*row, *reply]])).logits[0, len(row) - 1 : -1]
        log_p = logits.log_softmax(-1)
        expected = -sum(float(log_p[k, token]) for k, token in enumerate(reply))
        assert weighed[i] == pytest.approx(expected, abs=1e-4)
