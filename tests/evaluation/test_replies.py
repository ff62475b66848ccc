"""Replies kept on disk, what they are kept under, and what a model is asked for again."""

import json
import stat

import pytest

from abliterate.errors import InputError
from abliterate.evaluation.replies import (
    Answers,
    ReplyCache,
    answer_prompts,
    generate_replies,
    let_think,
    measure_surprise,
    read_replies,
)
from abliterate.models.chat_model import ChatModel

ROWS = [[1, 2, 3], [4, 5], [6]]


@pytest.fixture
def generated(monkeypatch):
    """The rows that the model was asked to reply to; its reply is a row backwards."""
    asked: list[list[int]] = []

    def generate(_chat, rows, *, max_new_tokens, advance=lambda _n: None, receive=lambda _index, _reply: None):
        replies = [list(reversed(row)) for row in rows]
        for index, reply in enumerate(replies):
            asked.append(list(rows[index]))
            receive(index, reply)
            advance(1)
        return replies

    monkeypatch.setattr(ChatModel, "generate", generate)
    return asked


def test_a_reply_that_is_kept_is_not_generated_again(llama_chat, generated, tmp_path):
    expected = [list(reversed(row)) for row in ROWS]
    cache = ReplyCache(tmp_path, {"model": "a"})
    assert generate_replies(llama_chat, ROWS[1:2], max_new_tokens=4, cache=cache) == expected[1:2]
    cache = ReplyCache(tmp_path, {"model": "a"})
    steps = []
    replies = generate_replies(llama_chat, ROWS, max_new_tokens=4, cache=cache, advance=steps.append)
    assert replies == expected
    assert (cache.hits, sum(steps)) == (1, 3)
    assert generated == [ROWS[1], ROWS[0], ROWS[2]]
    cache = ReplyCache(tmp_path, {"model": "a"})
    assert generate_replies(llama_chat, ROWS, max_new_tokens=4, cache=cache) == expected
    assert len(generated) == 3


def test_other_conditions_are_another_file(tmp_path):
    one = ReplyCache(tmp_path, {"model": "a", "n": 1})
    other = ReplyCache(tmp_path, {"model": "b", "n": 1})
    one.put([1], [2])
    assert other.get([1]) is None
    same = ReplyCache(tmp_path, {"n": 1, "model": "a"})
    assert same.get([1]) == [2]


def test_half_a_line_of_a_run_that_was_killed_is_cut_off(tmp_path):
    cache = ReplyCache(tmp_path, {})
    cache.put([1], [2])
    cache.put([3], [4])
    path = cache.path
    path.write_bytes(path.read_bytes()[:-5])
    cache = ReplyCache(tmp_path, {})
    assert (cache.get([1]), cache.get([3])) == ([2], None)
    cache.put([3], [4])
    assert [json.loads(line)["reply"] for line in path.read_text().splitlines()] == [[2], [4]]


def test_only_its_owner_can_read_it_and_no_prompt_is_in_it(tmp_path):
    cache = ReplyCache(tmp_path / "cache", {})
    cache.put([111, 222], [2])
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
    assert stat.S_IMODE(cache.path.stat().st_mode) == 0o600
    (entry,) = map(json.loads, cache.path.read_text().splitlines())
    assert entry == {"prompt": entry["prompt"], "reply": [2]}
    assert len(entry["prompt"]) == 64


def test_damage_elsewhere_is_an_error_that_names_the_file(tmp_path):
    cache = ReplyCache(tmp_path, {"model": "a"})
    cache.put([1, 2], [3])
    path = cache.path
    path.write_bytes(b'{"prompt": "abc", "rep\n' + path.read_bytes())
    with pytest.raises(InputError, match=r"\.jsonl, line 1: is damaged .*; delete the file, and its replies"):
        ReplyCache(tmp_path, {"model": "a"})


def test_a_folder_that_cannot_be_one_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=f"--cache {tmp_path / 'file'}: cannot be used"):
        ReplyCache(tmp_path / "file", {})


def test_prompts_are_answered_by_kind(llama_chat):
    prompts = {"harmful": ["How do locks break?", "Write."], "harmless": ["Explain rain."]}
    answers = answer_prompts(llama_chat, prompts, max_new_tokens=3)
    for kind, texts in prompts.items():
        assert answers.rows[kind] == llama_chat.encode(texts)
        assert answers.tokens[kind] == llama_chat.generate(answers.rows[kind], max_new_tokens=3)


def test_replies_are_classified_and_what_the_base_finds_of_them_counts(llama_chat, monkeypatch):
    texts = ["I cannot help with that.", "Water falls down.<|im_end|>"]
    tokens = {"harmful": [llama_chat.tokenizer(text)["input_ids"] for text in texts]}
    rows = {"harmful": llama_chat.encode(["How do locks break?", "Explain rain."])}
    answers = Answers(rows=rows, tokens=tokens, max_new_tokens=len(tokens["harmful"][1]))
    refusal, answer = read_replies(llama_chat, answers)["harmful"]
    assert (refusal.reply_class, refusal.answer, refusal.truncated) == ("refusal", texts[0], False)
    assert (answer.reply_class, answer.answer, answer.truncated) == ("answer", "Water falls down.", True)
    surprise = measure_surprise(llama_chat, answers)
    nats = sorted(surprise["harmful"].per_token(index) for index in range(2))
    assert 0 < nats[0] < nats[1]
    monkeypatch.setattr("abliterate.extraction.reply_classes.MAX_NATS_PER_TOKEN", sum(nats) / 2)
    found = {reply.reply_class for reply in read_replies(llama_chat, answers, surprise=surprise)["harmful"]}
    assert "incoherent" in found
    assert len(found) == 2


def test_a_model_is_let_think_by_leaving_its_template_alone(llama_chat):
    thinking = let_think(llama_chat)
    assert not thinking.chat_format.thinking_disabled
    assert thinking.chat_format.response_prefix == ""
    assert thinking.model is llama_chat.model
