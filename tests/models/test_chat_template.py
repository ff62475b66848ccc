"""What a template puts around an instruction, and templates that cannot be used."""

import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from abliterate.errors import ModelError, TemplateLimitError
from abliterate.models import chat_template
from abliterate.models.chat_format import find_chat_format
from abliterate.models.chat_template import (
    TemplateForm,
    processor_template,
    render,
    render_conversation,
    serve,
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


DOUBLE = "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
GROW = "{% set n = namespace(x=['a'], y=['a']) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
HOSTILE = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "one operation that takes for ever": "{{ 10 ** (10 ** 10) }}",
    "a list that holds itself many times": GROW + "{{ n.x }}",
    "a memory-hungry text": "{{ 'a' * 10 ** 10 }}",
    "a memory-hungry filter": "{{ 'a' | center(10 ** 10) }}",
    "a text that doubles": DOUBLE,
    "a long text": "{{ 'a' * 2 * 10 ** 7 }}",
    "a template that is huge": "x" * 1_000_001,
}


@pytest.fixture
def short_patience(monkeypatch):
    monkeypatch.setattr(chat_template, "_MAX_SECONDS", 1.0)


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE)
def test_a_template_that_takes_too_much_is_one_error_in_bounded_time(template, short_patience):
    tokenizer = make_tokenizer(template=template)
    with pytest.raises(TemplateLimitError, match="do not trust this checkpoint") as raised:
        find_chat_format(tokenizer, system_prompt=None)
    assert "\n" not in str(raised.value)
    # It does not take down what renders other templates.
    assert render(make_tokenizer(template=CHATML), "Hi", system_prompt=None).endswith("assistant\n")


def test_many_slow_renderings_are_too_slow_too(monkeypatch):
    monkeypatch.setattr(chat_template, "_MAX_SECONDS_EACH", 0.0)
    monkeypatch.setattr(chat_template, "_MAX_SECONDS", 1.5)
    slow = make_tokenizer(template="{% for a in range(50) %}{% for b in range(9999) %}{% endfor %}{% endfor %}")

    def render_often() -> None:
        for _ in range(10_000):
            render(slow, "Hi", system_prompt=None)

    with pytest.raises(TemplateLimitError):
        render_often()


@pytest.mark.parametrize(
    "template",
    [
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
        "{% for a in [1] %}" * 150 + "x" + "{% endfor %}" * 150,
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception('no') }}",
        "{{ 1 / 0 }}",
        "{{ '\\ud800' }}",
        "{{ x ",
    ],
)
def test_a_template_that_fails_is_an_error_and_the_next_is_rendered_by_the_same_process(template):
    sound = make_tokenizer(template=CHATML)
    render(sound, "Hi", system_prompt=None)
    process = chat_template._RENDERER._process
    with pytest.raises(ModelError, match="the chat template fails: "):
        render(make_tokenizer(template=template), "Hi", system_prompt=None)
    assert render(sound, "Hi", system_prompt=None).endswith("assistant\n")
    assert chat_template._RENDERER._process is process


@pytest.mark.parametrize("prompt", ["Hi", "", "\U0001f600 \u2028\x00", "x" * 300_000])
@pytest.mark.parametrize("bos_token", [None, "<s>"])
def test_what_is_rendered_is_what_the_tokenizer_itself_renders(prompt, bos_token):
    template = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ messages | tojson }}|{{ add_generation_prompt }}|"
    tokenizer = make_tokenizer(template=template + "{{ thinking }}{{ tools is none }}" + CHATML, bos_token=bos_token)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<a>", "<b>"]})
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": prompt}]
    for up_to_answer in (True, False):
        expected = tokenizer.apply_chat_template(
            messages, add_generation_prompt=up_to_answer, tokenize=False, thinking=True
        )
        form = TemplateForm(options=(("thinking", True),))
        found = render_conversation(tokenizer, messages, system_prompt=None, form=form, up_to_answer=up_to_answer)
        assert found == expected


def test_a_tokenizer_with_its_own_way_of_rendering_is_asked_itself():
    class Own(type(make_tokenizer())):
        def apply_chat_template(self, conversation, **options):
            return f"{conversation[0]['content']} {options}"

    tokenizer = make_tokenizer()
    tokenizer.__class__ = Own
    text = render(tokenizer, "Hi", system_prompt=None)
    assert text == "Hi {'tokenize': False, 'add_generation_prompt': True}"


def test_what_renders_has_no_token_and_no_key(monkeypatch):
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "SOME_KEY"):
        monkeypatch.setenv(name, "canary")
    assert "canary" not in chat_template._plain_environment().values()
    chat_template._RENDERER.stop()
    render(make_tokenizer(template=CHATML), "Hi", system_prompt=None)
    environment = Path(f"/proc/{chat_template._RENDERER._process.pid}/environ")
    if environment.exists():
        assert b"canary" not in environment.read_bytes()


def test_what_does_not_start_is_one_error(monkeypatch):
    chat_template._RENDERER.stop()
    for executable in ("/nowhere/python", "/bin/false"):
        monkeypatch.setattr(sys, "executable", executable)
        with pytest.raises(ModelError, match="renders templates") as raised:
            render(make_tokenizer(template=CHATML), "Hi", system_prompt=None)
        assert not isinstance(raised.value, TemplateLimitError)
    monkeypatch.undo()
    assert render(make_tokenizer(template=CHATML), "Hi", system_prompt=None)


def test_questions_are_answered_line_by_line(monkeypatch):
    monkeypatch.setattr(chat_template, "_limit_memory", lambda: None)
    asked = [
        {"chat_template": "{{ messages[0].content }}"},
        {"chat_template": "{{ 1 / 0 }}"},
        {"chat_template": "{{ 'a' * 20000000 }}"},
    ]
    conversations = {"conversations": [[{"role": "user", "content": "Hi"}]]}
    answers = io.BytesIO()
    serve(io.BytesIO(b"".join(json.dumps(each | conversations).encode() + b"\n" for each in asked)), answers)
    ready, *found = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert ready == {}
    assert found[:2] == [{"text": "Hi"}, {"error": "division by zero"}]
    assert re.fullmatch("writes more than 20[0-9],[0-9]{3} characters", found[2]["limit"])


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="no alarms")
def test_it_ends_itself_where_nobody_is_left_to_kill_it(monkeypatch):
    code = (
        "import abliterate.models.chat_template as t; t._MAX_SECONDS = 0.2\n"
        "with t._alarm(0.2): 'a' in ('b' * 10 ** 9); 10 ** (10 ** 10)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=60)
    assert ended.returncode == -signal.SIGALRM


def test_a_processor_has_the_template_where_the_tokenizer_has_none(tmp_path):
    assert processor_template(tmp_path) is None
    (tmp_path / "processor_config.json").write_text('{"chat_template": "one"}')
    assert processor_template(tmp_path) == "one"
    for broken in ("[", "[1]", '{"chat_template": 3}', '{"chat_template": ""}', "[" * 100_000):
        (tmp_path / "chat_template.json").write_text(broken)
        assert processor_template(tmp_path) == "one"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "two"}')
    assert processor_template(tmp_path) == "two"
