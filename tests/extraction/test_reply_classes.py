"""Refusals early and late, and what is neither refusal nor answer."""

import random

import pytest

from abliterate.extraction.reply_classes import (
    REFUSAL_SUBSTRINGS,
    classify_answer,
    is_refusal,
    read_completions,
    read_reply,
    split_thinking,
)
from abliterate.models.chat_model import ChatModel, make_chat_model
from abliterate.models.chat_template import KNOWN_MARKERS, ThinkingMarkers
from tests.support.tiny_models import CHATML, make_tokenizer

OVERVIEW = (
    "Locks have protected houses for thousands of years, and the way they work says much about the people who made "
    "them. A pin tumbler lock, for instance, holds a row of small pins that only the right key lifts to the right "
    "height. Museums show wooden ones from ancient palaces beside the steel cylinders of today. Whoever studies them "
    "learns about craft, trade and trust. "
)

CHINESE = "今天天气很好我们去公园散步吧路上可以看到很多花还有小鸟在树上唱歌" * 2 + "然后在湖边喝茶聊天直到太阳下山"
SYMBOLS = "a " + " ".join("".join(random.Random(i).choices("{}[]();-=+*/<>!?#%&", k=5)) for i in range(15))


@pytest.mark.parametrize("substring", REFUSAL_SUBSTRINGS)
@pytest.mark.parametrize(
    "frame",
    ["{} help with that.", "{}", OVERVIEW + "That said, {} go further.", OVERVIEW * 2 + "In the end: {}"],
    ids=["early", "alone", "late", "at the very end"],
)
def test_the_published_rule_early_and_late(substring: str, frame: str) -> None:
    for variant in (substring, substring.upper(), substring.lower()):
        text = frame.format(variant)
        assert is_refusal(text)
        assert read_reply(text).reply_class == "refusal"
        without = frame.format(variant.replace("I", "We").replace("i", "we").replace("A", "O").replace("a", "o"))
        assert not is_refusal(without)
        assert read_reply(without).reply_class == "answer"


@pytest.mark.parametrize("apostrophe", ["'", "\u2018", "\u2019", "\u02bc"])
def test_an_apostrophe_is_one_however_it_is_written(apostrophe: str) -> None:
    assert read_reply(f"I{apostrophe}m sorry, but I can{apostrophe}t help with that.").reply_class == "refusal"
    assert read_reply(f"Here{apostrophe}s how a lock works.").reply_class == "answer"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I'm sorry, no.", "refusal"),
        ("Here is a recipe for soup.", "answer"),
        ("yes", "answer"),
        ("", "empty"),
        (" \n...!!", "empty"),
        ("the the the the " * 8, "repetitive"),
        ("I cannot " * 20, "repetitive"),
        ("好的" * 60, "repetitive"),
        (CHINESE, "answer"),
        (SYMBOLS, "incoherent"),
        ("some words that no encoding could read are \ufffd " + "\ufffd and \ufffd, then more of " * 4, "incoherent"),
        ("for (i = 0; i < n; i++) { total += price[i] * count[i]; } return total / n; // the mean price", "answer"),
        ("यह एक सरल वाक्य है और इसमें कोई समस्या नहीं है, क्योंकि सब कुछ ठीक चल रहा है और मौसम अच्छा है।", "answer"),
    ],
)  # fmt: skip
def test_classes(text: str, expected: str) -> None:
    assert classify_answer(text) == expected


@pytest.mark.parametrize("text", ["I'm sorry, but apples seven under.", "Sure, apples seven under."])
def test_what_surprises_the_base_is_neither_refusal_nor_answer(text: str) -> None:
    assert classify_answer(text, nats_per_token=9.0) == "incoherent"
    assert classify_answer(text, nats_per_token=3.0) in {"refusal", "answer"}


def test_bundled_prose_is_no_degenerate_reply() -> None:
    from abliterate.prompt_sets import load_plain_texts

    assert {classify_answer(text) for text in load_plain_texts("bundled").texts} == {"answer"}


@pytest.mark.parametrize(
    ("text", "thinking", "answer", "unfinished"),
    [
        ("Plain.", "", "Plain.", False),
        ("<think>I cannot.</think>Sure.", "I cannot.", "Sure.", False),
        ("I cannot, hm.</think>\n\nSure.", "I cannot, hm.", "Sure.", False),
        ("\n<think>\nand then I cannot", "and then I cannot", "", True),
        ("[THINK]a[/THINK]b", "a", "b", False),
        ("The tag <think> opens a thought.", "", "The tag <think> opens a thought.", False),
        ("<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Yes", None, "Yes", False),
    ],
)
def test_thinking_and_answer_are_told_apart(text: str, thinking: str | None, answer: str, unfinished: bool) -> None:
    found = split_thinking(text)
    assert found[1:] == (answer, unfinished)
    if thinking is not None:
        assert found[0] == thinking
    else:
        assert "hm" in found[0]


@pytest.mark.parametrize("markers", KNOWN_MARKERS, ids=lambda markers: markers.opening)
def test_thoughts_of_every_known_family_are_no_answer(markers: ThinkingMarkers) -> None:
    text = f"{markers.opening}I cannot, or can I?{markers.closing}Here is how."
    for own in (KNOWN_MARKERS, (markers,)):
        assert split_thinking(text, markers=own) == ("I cannot, or can I?", "Here is how.", False)
        assert split_thinking(f"\n{markers.opening}\nI cannot", markers=own) == ("I cannot", "", True)
    others = [one for one in KNOWN_MARKERS if one.closing != markers.closing]
    assert split_thinking(text, markers=others) == ("", text, False)


def test_a_reply_to_a_prompt_that_opened_a_thought_starts_with_thoughts() -> None:
    assert split_thinking("I cannot, hm", opened=True) == ("I cannot, hm", "", True)
    assert split_thinking("hm</think>Yes.", opened=True) == ("hm", "Yes.", False)
    endless = read_reply("I cannot do this, or", opened=True, truncated=True)
    assert (endless.reply_class, endless.thinking_unfinished, endless.refused) == ("empty", True, False)
    unnamed = (ThinkingMarkers(opening="", closing="<end>", shut="<end>"),)
    assert split_thinking("Plain.", markers=unnamed) == ("", "Plain.", False)


def test_completions_are_read_by_the_markers_of_their_own_template(llama_chat: ChatModel) -> None:
    template = CHATML.replace(
        "message['content']", "('<muse>' + message.thinking + '</muse>' if message.thinking else '')"
    )
    template = template.replace("else '')", "else '') + message['content']")
    chat = make_chat_model(llama_chat.model, make_tokenizer(template=template))
    texts = ["<muse>I cannot?</muse>Here is how.<|im_end|>", "<muse>I cannot", "I\u2019m sorry."]
    tokens = [chat.tokenizer(text)["input_ids"] for text in texts]
    replies = read_completions(chat, tokens, max_new_tokens=len(tokens[0]), nats_per_token=[None, None, 9.0])
    assert [reply.answer for reply in replies] == ["Here is how.", "", "I\u2019m sorry."]
    assert [reply.thinking_unfinished for reply in replies] == [False, True, False]
    assert [reply.truncated for reply in replies] == [True, False, False]
    assert [reply.reply_class for reply in replies] == ["answer", "empty", "incoherent"]


def test_a_refusal_in_thought_is_no_refusal_and_a_thought_without_end_no_answer() -> None:
    thought = read_reply(
        "<think>I cannot do this, or can I?</think>Here is how.<|im_end|>", special_tokens=["<|im_end|>"]
    )
    assert (thought.reply_class, thought.matches, thought.answer) == ("answer", False, "Here is how.")
    endless = read_reply("<think>I cannot do this, or", truncated=True)
    assert (endless.reply_class, endless.thinking_unfinished, endless.refused) == ("empty", True, False)
