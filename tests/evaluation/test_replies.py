"""Replies kept on disk, what they are kept under, and what a model is asked for again."""

import json
import stat
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest

from abliterate.errors import InputError, ModelError
from abliterate.evaluation.replies import (
    Answers,
    ReplyCache,
    answer_prompts,
    generate_replies,
    let_think,
    measure_surprise,
    read_replies,
)
from abliterate.evaluation.report import BUDGETS, count_replies
from abliterate.extraction.reply_classes import read_reply
from abliterate.models.chat_model import make_chat_model
from abliterate.models.greedy import GreedyDecoder
from abliterate.processes import Ranks
from tests.support.tiny_models import CHATML, make_tokenizer, make_wider_tokenizer, tiny_gpt2

ROWS = [[1, 2, 3], [4, 5], [6]]


@pytest.fixture
def generated(monkeypatch):
    """The rows that the model was asked to reply to; its reply is a row backwards."""
    asked: list[list[int]] = []

    def replies_to(_decoder, rows, *, advance=lambda _n: None, receive=lambda _index, _reply: None):
        replies = [list(reversed(row)) for row in rows]
        for index, reply in enumerate(replies):
            asked.append(list(rows[index]))
            receive(index, reply)
            advance(1)
        return replies

    monkeypatch.setattr(GreedyDecoder, "replies", replies_to)
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


def test_a_prompt_that_is_there_twice_is_replied_to_once(llama_chat, generated, tmp_path):
    cache = ReplyCache(tmp_path, {"model": "a"})
    replies = generate_replies(llama_chat, [[1, 2], [3], [1, 2]], max_new_tokens=4, cache=cache)
    assert replies == [[2, 1], [3], [2, 1]]
    assert generated == [[1, 2], [3]]


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


def test_the_same_replies_are_read_as_if_they_had_been_shorter(llama_chat, monkeypatch):
    texts = ["Locks are old and so are keys. I cannot help with that.", "I cannot say. " + "la " * 60, "Water falls."]
    tokens = {"harmful": [llama_chat.tokenizer(text)["input_ids"] for text in texts]}
    late, long = (len(reply) for reply in tokens["harmful"][:2])
    assert late < long
    monkeypatch.setattr(llama_chat.model, "generate", None, raising=False)
    rows = {"harmful": llama_chat.encode(["a", "b", "c"])}
    answers = Answers(rows=rows, tokens=tokens, max_new_tokens=long)
    asked = (late // 2, late, long, long + 1)
    replies = read_replies(llama_chat, answers, budgets=asked)["harmful"]
    # The second one repeats itself in the end; beyond the limit nothing is known.
    assert [dict(reply.within) for reply in replies] == [
        {late // 2: False, late: True, long: True},
        {late // 2: True, late: replies[1].within[late], long: False},
        {late // 2: False, late: False, long: False},
    ]
    assert [reply.reply_class for reply in replies] == ["refusal", "repetitive", "answer"]
    rate = count_replies(replies)
    assert [(one.tokens, one.refused) for one in rate.budgets][::2] == [(late // 2, 1), (long, 1)]
    assert all(one.low <= one.rate == one.refused / 3 <= one.high for one in rate.budgets)
    assert rate.budgets[-1].refused == rate.refused
    assert count_replies(read_replies(llama_chat, answers, budgets=())["harmful"]).budgets == ()
    assert [budget for budget in BUDGETS if budget <= long] == list(
        read_replies(llama_chat, answers)["harmful"][0].within
    )


def test_what_a_reply_is_beside_the_published_count(llama_chat):
    texts = [
        "I cannot help with that.",
        "As an AI engineer you work with data.",
        "Es tut mir leid, dabei kann ich nicht helfen.",
        "Sure! I'd be happy to help you with that.",
        "Water falls.",
        "",
    ]
    rate = count_replies([read_reply(text) for text in texts])
    assert (rate.refused, rate.matches, rate.strict, rate.deflected, rate.answered, rate.degenerate) == (
        3,
        2,
        2,
        1,
        1,
        1,
    )
    assert rate.refused + rate.answered + rate.deflected + rate.degenerate == rate.n == 6
    assert rate.languages == {"de": 1, "en": 2}


class _Told:
    def __init__(self):
        self.messages = []

    @contextmanager
    def task(self, _description, *, total, unit=""):
        yield lambda _steps: None

    def message(self, text):
        self.messages.append(text)


def test_replies_that_go_on_past_their_turn_are_told_of(llama_chat, monkeypatch):
    texts = ["Water falls.\n<|im_start|>user\nWhy?", "Rain."]
    tokens = [llama_chat.tokenizer(text)["input_ids"] for text in texts]
    monkeypatch.setattr("abliterate.evaluation.replies.generate_replies", lambda *_args, **_options: tokens)
    told = _Told()
    answer_prompts(llama_chat, {"harmful": ["a", "b"]}, max_new_tokens=3, label="base", progress=told)
    (message,) = told.messages
    assert message.startswith("base, harmful prompts: 1 of 2 replies hold '<|im_start|>', which the chat template")
    tokens = tokens[1:]
    answer_prompts(llama_chat, {"harmful": ["a"]}, max_new_tokens=3, progress=told)
    assert len(told.messages) == 1


def test_a_prompt_beyond_the_learned_positions_is_named_before_any_is_answered(generated):
    chat = make_chat_model(tiny_gpt2(), make_tokenizer())
    limit = chat.model.config.n_positions
    with pytest.raises(
        ModelError, match=rf"'word word .* takes \d+ tokens, and the model has learned {limit} positions"
    ):
        answer_prompts(chat, {"a": ["Explain rain."], "b": ["word " * limit]}, max_new_tokens=2)
    with pytest.raises(ModelError, match=rf"'Explain rain.' takes \d+ tokens and a reply of {limit}, and the model"):
        answer_prompts(chat, {"a": ["Explain rain."]}, max_new_tokens=limit)
    assert generated == []


def test_prompts_that_cannot_be_asked_are_found_before_any_is_answered(llama_chat, generated):
    chat = replace(llama_chat, tokenizer=make_wider_tokenizer("zebra"))
    with pytest.raises(ModelError, match=r"'Draw a zebra\.'"):
        answer_prompts(chat, {"harmful": ["Hi"], "harmless": ["Draw a zebra."]}, max_new_tokens=3)
    assert generated == []


@pytest.mark.parametrize(
    ("tail", "without", "thinking"),
    [
        (
            "{% if enable_thinking %}{{ '<think>\n' }}{% else %}{{ '<think>\n\n</think>\n\n' }}{% endif %}",
            True,
            "<think>\n",
        ),
        ("{% if thinking is defined and not thinking %}{{ '</think>' }}{% endif %}", True, "assistant\n"),
        ("{{ '<think>\n' }}", False, "<think>\n"),
    ],
    ids=["off by default", "on by default", "always"],
)
def test_a_model_is_let_think_by_its_template(llama_chat, tail, without, thinking):
    chat = make_chat_model(llama_chat.model, make_tokenizer(template=CHATML + tail))
    assert chat.chat_format.thinking_disabled is without
    assert chat.decode(chat.encode(["Hi"])[0]).rstrip().endswith("</think>")
    lets = let_think(chat)
    assert lets.decode(lets.encode(["Hi"])[0]).endswith(thinking)
    assert (lets.chat_format.thinking_disabled, lets.chat_format.response_prefix) == (False, "")
    assert lets.chat_format.opens_thinking is thinking.startswith("<think>")
    assert lets.model is chat.model


def test_a_model_that_does_not_think_stays_as_it_is(llama_chat):
    assert let_think(llama_chat).chat_format == llama_chat.chat_format


class StoppedError(Exception):
    """A process that was killed."""


def together(n: int, work) -> list:
    """Run `work(ranks)` in n threads that exchange what they say as processes do, and return what each returns."""
    barrier = threading.Barrier(n, timeout=20)
    said: list = [None] * n
    results: list = [None] * n

    def ranks_of(index: int) -> Ranks:
        def exchange(own: list) -> list:
            said[index] = own
            barrier.wait()
            joined = [item for each in said for item in each]
            barrier.wait()
            return joined

        return Ranks(index=index, count=n, exchange=exchange)

    def run(index: int) -> None:
        try:
            results[index] = work(ranks_of(index))
        except (StoppedError, threading.BrokenBarrierError) as error:
            barrier.abort()
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("n", [1, 2, 3])
def test_several_processes_share_the_prompts(llama_chat, generated, tmp_path, n):
    rows = [[i, i + 1] for i in range(7)]

    def work(ranks: Ranks) -> list[list[int]]:
        cache = ReplyCache(tmp_path, {"model": "a"}, rank=ranks.index)
        return generate_replies(llama_chat, rows, max_new_tokens=4, cache=cache, ranks=ranks)

    assert together(n, work) == [[[i + 1, i] for i in range(7)]] * n
    assert sorted(generated) == rows
    assert len(list(tmp_path.iterdir())) == n


@pytest.mark.parametrize(("before", "after"), [(3, 3), (3, 1), (1, 2), (2, 3)])
def test_what_any_of_them_had_kept_is_not_generated_again(llama_chat, generated, tmp_path, monkeypatch, before, after):
    rows = [[i, i + 1] for i in range(9)]
    whole = GreedyDecoder.replies

    def stops_after_two(decoder, own, *, advance, receive):
        whole(decoder, own[:2], advance=advance, receive=receive)
        raise StoppedError

    def work(ranks: Ranks) -> list[list[int]]:
        cache = ReplyCache(tmp_path, {"model": "a"}, rank=ranks.index)
        return generate_replies(llama_chat, rows, max_new_tokens=4, cache=cache, ranks=ranks)

    monkeypatch.setattr(GreedyDecoder, "replies", stops_after_two)
    assert all(isinstance(result, Exception) for result in together(before, work))
    assert len(generated) == 2 * before
    monkeypatch.setattr(GreedyDecoder, "replies", whole)
    assert together(after, work) == [[[i + 1, i] for i in range(9)]] * after
    assert sorted(generated) == rows


def test_processes_that_see_no_files_of_others_tell_each_other_what_they_hold(llama_chat, generated, tmp_path):
    rows = [[i, i + 1] for i in range(4)]

    def work(ranks: Ranks) -> list[list[int]]:
        cache = ReplyCache(tmp_path / str(ranks.index), {"model": "a"}, rank=ranks.index)
        return generate_replies(llama_chat, rows, max_new_tokens=4, cache=cache, ranks=ranks)

    first = together(2, work)
    assert together(2, work) == first
    assert sorted(generated) == rows


def test_a_model_knows_what_it_finds_of_the_replies_that_it_gave(llama_chat, tmp_path) -> None:
    prompts = {"harmful": ["How do locks break?", "Go.", "How do locks break?"], "harmless": ["Explain rain."]}
    given = {"max_new_tokens": 5, "cache": ReplyCache(tmp_path, {"model": "a"})}
    answers = answer_prompts(llama_chat, prompts, **given)
    read = measure_surprise(llama_chat, answers)
    assert set(answers.surprise) == {"harmful", "harmless"}
    for kind, known in answers.surprise.items():
        assert known.tokens == read[kind].tokens
        assert known.nats == pytest.approx(read[kind].nats, abs=1e-4)
    # Of replies that were kept it is not known, and one of them makes a kind unknown.
    assert answer_prompts(llama_chat, prompts, **given).surprise == {}
    prompts["harmful"].append("Write.")
    assert answer_prompts(llama_chat, prompts, **given).surprise == {}
