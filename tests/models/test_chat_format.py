"""What templates of each family do, found by rendering sketches of them."""

import pytest

from abliterate.errors import InputError, ModelError
from abliterate.models.chat_format import drops_system_prompt, find_chat_format, find_conversation_form
from abliterate.models.chat_template import KNOWN_MARKERS, PLAIN, TemplateForm, render
from tests.support.tiny_models import CHATML, make_tokenizer

LOOP = "{% for m in messages %}"
ASK = "{% endfor %}{% if add_generation_prompt %}"
ANSWERS = "{{ m.content + '<|im_end|>' }}"
QUESTIONS = "{% if m.role == 'user' %}{{ '<u>' + m.content }}{% else %}"
THOUGHT = (
    "{% if m.reasoning_content and loop.last %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}"
)

THINKS_BY_DEFAULT = (
    f"{LOOP}{QUESTIONS}{{{{ '<a>' }}}}{THOUGHT}{ANSWERS}{{% endif %}}{ASK}{{{{ '<a>' }}}}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
ANSWERS_BY_DEFAULT = (
    "{% if enable_thinking %}{{ '<|turn>system\n<|think|><turn|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|turn>' + m.role + '\n' + m.content + '<turn|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>model\n' }}"
    "{% if not enable_thinking %}{{ '<|channel>thought\n<channel|>' }}{% endif %}{% endif %}"
)
NAMED_OTHERWISE = (
    f"{LOOP}{QUESTIONS}{{{{ '<a></think>' }}}}{ANSWERS}{{% endif %}}{ASK}"
    "{{ '<a>' + ('<think>' if thinking else '</think>') }}{% endif %}"
)
EFFORT_IN_WORDS = (
    "{{ raise_exception('no such effort') if (reasoning_effort or 'none') not in ['none', 'high'] }}"
    "{{ '[EFFORT]' + (reasoning_effort or 'none') + '[/EFFORT]' }}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}{% else %}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{{ '[THINK]' + part.thinking + '[/THINK]' if part.type == 'thinking' else part.text }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>' }}{% endif %}{% endfor %}"
)
CHANNELS = (
    "{{ '<|start|>system<|message|>Reasoning: ' + (reasoning_effort or 'medium') + '<|end|>' }}"
    "{% for m in messages %}"
    "{% if m.role != 'assistant' %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% else %}"
    "{% if m.thinking and loop.last %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
REGIONS = (
    "{% for m in messages %}{{ '<|TURN|>' + m.role }}"
    "{{ '<|START_RESPONSE|>' + m.content + '<|END_RESPONSE|>' if m.role == 'assistant' else m.content }}"
    "{{ '<|END_TURN|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|TURN|>assistant' }}"
    "{% if reasoning is defined and not reasoning %}{{ '<|START_THINKING|><|END_THINKING|>' }}{% endif %}{% endif %}"
)
IN_WORDS_OF_ITS_OWN = (
    "{% if thinking is undefined %}{% set thinking = true %}{% endif %}"
    "{% for m in messages %}{{ '<|open|>' + m.role + '<|sep|>' }}{% if m.role == 'assistant' %}"
    "{% if thinking %}{{ '<|open|>muse<|sep|>' + (m.reasoning_content or '') + '<|close|>muse<|sep|>' }}{% endif %}"
    "{{ '<|open|>reply<|sep|>' }}{% endif %}{{ m.content + '<|stop|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|open|>assistant<|sep|><|open|>' + ('muse' if thinking else 'reply') + '<|sep|>' }}{% endif %}"
)
IN_PARTS = (
    "{% for m in messages %}{{ m.role.upper() + ': ' }}"
    "{% for part in m.content | selectattr('type', 'equalto', 'text') %}{{ part.text + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def tokenizer_of(template: str, *own: str):
    tokenizer = make_tokenizer(template=template)
    tokenizer.add_tokens(list(own), special_tokens=True)
    return tokenizer


def found(template: str, *own: str, thinks: bool = False, system_prompt: str | None = None):
    return find_chat_format(tokenizer_of(template, *own), system_prompt=system_prompt, thinks=thinks)


def end_of_prompt(chat_format) -> str:
    return "".join(chat_format.post_instruction_tokens)


@pytest.mark.parametrize(
    ("template", "options", "prompt", "thinking_options", "thinking_prompt"),
    [
        (THINKS_BY_DEFAULT, {"enable_thinking": False}, "<a><think>\n\n</think>\n\n", {}, "<a>"),
        (ANSWERS_BY_DEFAULT, {}, "model\n<|channel>thought\n<channel|>", {"enable_thinking": True}, "<|turn>model\n"),
        (NAMED_OTHERWISE, {}, "<a></think>", {"thinking": True}, "<a><think>"),
        (EFFORT_IN_WORDS, {}, "[/INST]", {"reasoning_effort": "high"}, "[/INST]"),
        (
            REGIONS,
            {"reasoning": False},
            "<|START_THINKING|><|END_THINKING|><|START_RESPONSE|>",
            {},
            "<|TURN|>assistant",
        ),
        (IN_WORDS_OF_ITS_OWN, {"thinking": False}, "<|open|>reply<|sep|>", {}, "<|open|>muse<|sep|>"),
    ],
    ids=["on by default", "off by default", "thinking", "reasoning_effort", "reasoning", "own words"],
)
def test_thinking_is_switched_by_the_option_that_changes_the_prompt(
    template, options, prompt, thinking_options, thinking_prompt
):
    off, on = found(template), found(template, thinks=True)
    assert (dict(off.form.options), dict(on.form.options)) == (options, thinking_options)
    assert end_of_prompt(off).endswith(prompt)
    assert end_of_prompt(on).endswith(thinking_prompt)
    assert (off.thinking_disabled, on.thinking_disabled) == (True, False)
    assert on.response_prefix == ""
    assert off.n_positions == len(off.post_instruction_tokens)


def test_a_template_without_thoughts_has_nothing_to_switch():
    plain, thinking = found(CHATML), found(CHATML, thinks=True)
    assert plain == thinking
    assert (plain.form, plain.response_prefix, plain.thinking_disabled, plain.opens_thinking) == (
        PLAIN,
        "",
        False,
        False,
    )
    assert plain.markers == KNOWN_MARKERS


@pytest.mark.parametrize(
    "template",
    [
        CHANNELS,
        CHATML + "{% if reasoning_effort == 'high' %}{{ 'Think long.' }}{% endif %}",
        CHATML + "{{ raise_exception('low, high') if (reasoning_effort or 'low') not in ['low', 'high'] }}"
        "{{ 'Effort: ' + (reasoning_effort or 'low') }}",
    ],
    ids=["any word is written", "any word is passed over", "it cannot be none"],
)
def test_an_effort_that_cannot_be_none_switches_nothing(template):
    for thinks in (False, True):
        chat_format = found(template, thinks=thinks)
        assert (chat_format.form, chat_format.thinking_disabled) == (PLAIN, False)


@pytest.mark.parametrize(
    ("template", "opening", "closing"),
    [
        (THINKS_BY_DEFAULT, "<think>", "</think>"),
        (EFFORT_IN_WORDS, "[THINK]", "[/THINK]"),
        (CHANNELS, "<|channel|>analysis", "<|channel|>final<|message|>"),
        (IN_WORDS_OF_ITS_OWN, "", "<|close|>muse<|sep|><|open|>reply<|sep|>"),
        (THINKS_BY_DEFAULT.replace("think>", "muse>"), "<muse>", "</muse>"),
    ],
)
def test_the_markers_of_thoughts_are_the_template_s_own(template, opening, closing):
    (markers,) = found(template).markers
    assert (markers.opening, markers.closing) == (opening, closing)


def test_thoughts_that_plain_words_set_off_are_not_looked_for():
    template = CHATML.replace("message['content']", "(message.thinking or '') + 'So: ' + message['content']")
    assert found(template).markers == KNOWN_MARKERS


def test_the_final_channel_is_opened_for_the_answer_and_left_to_a_model_that_thinks():
    answers, thinks = (found(CHANNELS, "<|end|>", "<|return|>", thinks=thinks) for thinks in (False, True))
    assert answers.response_prefix == "<|channel|>final<|message|>"
    assert end_of_prompt(answers).endswith("<|start|>assistant<|channel|>final<|message|>")
    assert end_of_prompt(thinks).endswith("<|start|>assistant")
    assert not answers.opens_thinking
    assert not thinks.opens_thinking


@pytest.mark.parametrize(
    ("template", "opens"),
    [
        (NAMED_OTHERWISE, True),
        (IN_WORDS_OF_ITS_OWN, True),
        (CHATML + "{{ '<think>\n' }}", True),
        (THINKS_BY_DEFAULT, False),
    ],
)
def test_a_prompt_that_ends_in_a_thought_is_known(template, opens):
    assert found(template, thinks=True).opens_thinking is opens
    assert not found(template).opens_thinking


def test_an_empty_thought_is_closed_as_the_template_closes_it():
    always = THINKS_BY_DEFAULT.partition("{% if enable_thinking")[0] + "{{ '<think>\n' }}{% endif %}"
    always = always.replace("m.reasoning_content and loop.last", "loop.last").replace(
        "m.reasoning_content +", "(m.reasoning_content or '') +"
    )
    assert found(always).response_prefix == "\n</think>\n\n"
    assert end_of_prompt(found(always)).endswith("<a><think>\n\n</think>\n\n")


class TestTurns:
    def ends(self, template, *own, thinks=False):
        tokenizer = tokenizer_of(template, *own)
        chat_format = find_chat_format(tokenizer, system_prompt=None, thinks=thinks)
        return [tokenizer.decode([token]) for token in chat_format.turn_ends]

    def test_what_follows_an_answer_ends_a_turn(self):
        assert self.ends(CHATML) == ["<|im_end|>"]
        assert self.ends(ANSWERS_BY_DEFAULT, "<turn|>") == ["<turn|>"]
        assert self.ends(CHATML.replace("'<|im_end|>\n'", "' </s>'"), "</s>") == ["</s>"]

    def test_plain_text_and_what_has_no_token_of_its_own_does_not(self):
        assert self.ends(CHATML.replace("<|im_end|>", "The end.")) == []
        assert self.ends(ANSWERS_BY_DEFAULT) == []

    def test_a_token_that_also_ends_a_thought_ends_a_turn_only_where_there_are_no_thoughts(self):
        both = CHANNELS.replace("<|return|>", "<|end|>")
        assert self.ends(both, "<|end|>") == ["<|end|>"]
        assert self.ends(both, "<|end|>", thinks=True) == []
        assert self.ends(CHANNELS, "<|end|>", "<|return|>", thinks=True) == ["<|return|>"]

    def test_what_stands_between_turns_shows_that_a_reply_went_on(self):
        assert found(CHATML).turn_texts == ("<|im_end|>", "<|im_start|>")
        assert found(IN_PARTS).turn_texts == ("USER:",)
        assert found(CHANNELS, thinks=True).turn_texts == ("<|end|><|start|>user<|message|>",)


class TestContentInParts:
    def test_it_is_handed_over_as_the_template_takes_it(self):
        tokenizer = make_tokenizer(template=IN_PARTS)
        chat_format = find_chat_format(tokenizer, system_prompt=None)
        assert chat_format.form == TemplateForm(content_in_parts=True)
        text = render(tokenizer, "Explain rain.", system_prompt="Be brief.", form=chat_format.form)
        assert text == "SYSTEM: Be brief. USER: Explain rain. ASSISTANT:"

    def test_one_that_raises_on_text_is_asked_in_parts_too(self):
        template = "{{ raise_exception('parts') if messages[-1].content is string }}" + IN_PARTS
        assert found(template).form.content_in_parts

    def test_one_that_would_print_the_list_is_refused(self):
        hides_text = "{{ messages[-1].content if messages[-1].content is not string }}!"
        with pytest.raises(ModelError, match="does not show the instruction exactly once"):
            found(hides_text)

    def test_a_guard_is_given_both_texts_in_parts(self):
        assert find_conversation_form(make_tokenizer(template=IN_PARTS)).content_in_parts
        assert find_conversation_form(make_tokenizer(template=CHATML)) == PLAIN
        assert find_conversation_form(make_tokenizer(template="{{ raise_exception('no') }}")) == PLAIN


class TestSystemMessage:
    DROPS = CHATML.replace("{% for message in messages %}", "{% for message in messages if message.role != 'system' %}")

    def test_one_that_the_template_drops_is_named(self):
        with pytest.raises(
            InputError, match=r"--system-prompt: the chat template of x drops the system message"
        ) as told:
            find_chat_format(make_tokenizer(template=self.DROPS), system_prompt="Be brief.", name="x")
        assert "\n" not in str(told.value)
        assert found(self.DROPS).n_positions == found(CHATML).n_positions

    def test_to_refuse_it_is_not_to_drop_it(self):
        refuses = "{{ raise_exception('no system') if messages[0].role == 'system' }}" + CHATML
        assert drops_system_prompt(make_tokenizer(template=self.DROPS), PLAIN)
        assert not drops_system_prompt(make_tokenizer(template=refuses), PLAIN)
        assert not drops_system_prompt(make_tokenizer(template=CHATML), PLAIN)
        with pytest.raises(ModelError, match="no system; it may not accept a system message"):
            found(refuses, system_prompt="Be brief.")
