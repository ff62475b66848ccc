"""What a template puts around an instruction, and templates that cannot be used."""

import pytest

from abliterate.errors import ModelError
from abliterate.models.chat_format import find_chat_format
from abliterate.models.chat_template import (
    render,
    render_conversation,
    token_texts,
    tokenize,
)
from tests.support.tiny_models import CHATML, make_tokenizer

THINKING = CHATML + "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}"
QUESTION = "{{ messages[-1]['content'] }}"


def test_an_instruction_is_rendered_up_to_where_the_answer_starts():
    tokenizer = make_tokenizer(template=CHATML)
    text = render(tokenizer, "Explain rain.", system_prompt=None)
    assert text == "<|im_start|>user\nExplain rain.<|im_end|>\n<|im_start|>assistant\n"
    with_system = render(tokenizer, "Explain rain.", system_prompt="Be brief.")
    assert with_system == f"<|im_start|>system\nBe brief.<|im_end|>\n{text}"


def test_a_conversation_keeps_its_turns_in_order():
    turns = [("user", "One."), ("assistant", "Two."), ("user", "Three.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text = render_conversation(make_tokenizer(template=CHATML), messages, system_prompt=None)
    assert [text.index(content) for _, content in turns] == sorted(text.index(content) for _, content in turns)
    assert text.endswith("Three.<|im_end|>\n<|im_start|>assistant\n")
    assert messages[0] == {"role": "user", "content": "One."}


def test_tokens_after_the_instruction_are_counted():
    tokenizer = make_tokenizer(template=CHATML)
    found = find_chat_format(tokenizer, system_prompt=None)
    assert "".join(found.post_instruction_tokens) == "<|im_end|>\n<|im_start|>assistant\n"
    assert found.n_positions == len(found.post_instruction_tokens)
    assert (found.response_prefix, found.thinking_disabled) == ("", False)
    assert token_texts(tokenizer, "<|im_end|>a") == ("<|im_end|>", "a")


def test_a_template_with_a_form_without_thought_is_asked_for_it():
    found = find_chat_format(make_tokenizer(template=THINKING), system_prompt=None)
    assert (found.response_prefix, found.thinking_disabled) == ("", True)


def test_a_thought_that_the_template_opens_is_closed():
    found = find_chat_format(make_tokenizer(template=CHATML + "{{ '<think>\n' }}"), system_prompt=None)
    assert found.response_prefix == "\n\n</think>\n\n"
    assert "".join(found.post_instruction_tokens).endswith("<think>\n\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("template", "system_prompt", "message"),
    [
        (QUESTION, None, "puts no token after the instruction"),
        ("nothing", None, "does not show the instruction exactly once"),
        (QUESTION + QUESTION + "!", None, "does not show the instruction exactly once"),
        ("{{ raise_exception('no\nsystem') }}", "Be brief.", "fails: no system; it may not accept a system message"),
    ],
)
def test_templates_that_cannot_be_used(template, system_prompt, message):
    with pytest.raises(ModelError, match=message) as raised:
        find_chat_format(make_tokenizer(template=template), system_prompt=system_prompt)
    assert "\n" not in str(raised.value)


def test_a_token_of_beginning_is_there_once_where_the_tokenizer_uses_one():
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(bos_token="<s>")
    assert tokenizer.bos_token_id not in tokenize(tokenizer, "a")
    adds = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = adds
    for text in ("a", "<s>a"):
        assert tokenize(tokenizer, text).count(tokenizer.bos_token_id) == 1
