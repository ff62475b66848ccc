"""A conversation as a library: what is said to the model, what is edited, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from abliterate.directions import Direction, make_direction
from abliterate.errors import DirectionError, InputError
from abliterate.interventions.chatting import COMMANDS, ChatSession, Side, help_text
from abliterate.models.chat_model import ChatModel, make_chat_model
from abliterate.models.chat_template import render
from abliterate.models.hooks import ablate_direction, add_direction
from tests.support.tiny_models import make_tokenizer, tiny_gpt2

N = 6


@pytest.fixture
def direction() -> Direction:
    vector = 20 * torch.randn(32, generator=torch.Generator().manual_seed(4))
    return make_direction(mean_difference=vector, metadata={"layer": 2})


@pytest.fixture
def session(llama_chat: ChatModel, direction: Direction) -> ChatSession:
    return ChatSession(model=llama_chat, base=None, direction=direction, max_new_tokens=N)


def quietly(_side: Side, _text: str) -> None:
    pass


def plain_reply(chat: ChatModel, row: list[int]) -> str:
    return chat.decode(chat.generate([row], max_new_tokens=N)[0])


def test_the_first_reply_is_what_generate_gives_and_is_streamed_whole(
    session: ChatSession, llama_chat: ChatModel
) -> None:
    shown: list[str] = []
    turn = session.reply("Explain rain.", lambda side, text: shown.append(side + ":" + text))
    assert turn.replies == {"edited": plain_reply(llama_chat, llama_chat.encode(["Explain rain."])[0])}
    assert "".join(text.removeprefix("edited:") for text in shown) == turn.replies["edited"]
    assert len(shown) > 1
    assert (turn.intervention, turn.coefficient, turn.interrupted) == ("none", None, False)


def test_the_history_is_rendered_with_the_template(session: ChatSession, llama_chat: ChatModel) -> None:
    first = session.reply("Explain rain.", quietly)
    second = session.reply("And snow?", quietly)
    history = [
        {"role": "user", "content": "Explain rain."},
        {"role": "assistant", "content": first.replies["edited"]},
        {"role": "user", "content": "And snow?"},
    ]
    text = llama_chat.tokenizer.apply_chat_template(history, add_generation_prompt=True, tokenize=False)
    row = llama_chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert second.replies["edited"] == plain_reply(llama_chat, row)
    session.command("/clear")
    assert session.reply("Explain rain.", quietly).replies == first.replies
    assert len(session.turns) == 3


def test_ablate_add_and_off_are_the_interventions(
    session: ChatSession, llama_chat: ChatModel, direction: Direction
) -> None:
    row = llama_chat.encode(["Explain rain."])[0]
    assert direction.mean_difference is not None
    with ablate_direction(llama_chat, direction.vector):
        ablated = plain_reply(llama_chat, row)
    with add_direction(llama_chat, direction.mean_difference, layer=2, coefficient=-1.5):
        added = plain_reply(llama_chat, row)
    plain = plain_reply(llama_chat, row)
    assert len({ablated, added, plain}) == 3
    for command, expected in (("/ablate", ablated), ("/add -1.5", added), ("/off", plain)):
        session.command("/clear")
        session.command(command)
        assert session.reply("Explain rain.", quietly).replies["edited"] == expected
    assert [(t.intervention, t.coefficient) for t in session.turns] == [
        ("ablate", None),
        ("add", -1.5),
        ("none", None),
    ]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama_chat.model.modules())


def test_both_answers_with_base_and_edited_each_with_its_own_history(
    session: ChatSession, llama_chat: ChatModel
) -> None:
    session.command("/ablate")
    session.command("/both")
    first = session.reply("Explain rain.", quietly)
    second = session.reply("And snow?", quietly)
    assert list(first.replies) == list(second.replies) == ["base", "edited"]
    assert first.replies["base"] != first.replies["edited"]
    alone = ChatSession(model=llama_chat, base=None, direction=None, max_new_tokens=N)
    assert alone.reply("Explain rain.", quietly).replies["edited"] == first.replies["base"]
    assert alone.reply("And snow?", quietly).replies["edited"] == second.replies["base"]
    session.command("/both")
    assert list(session.reply("More?", quietly).replies) == ["edited"]


def test_a_base_of_its_own(llama_chat: ChatModel) -> None:
    base = make_chat_model(tiny_gpt2(), make_tokenizer())
    session = ChatSession(model=llama_chat, base=base, direction=None, max_new_tokens=N)
    session.command("/both")
    replies = session.reply("Explain rain.", quietly).replies
    assert replies["base"] == plain_reply(base, base.encode(["Explain rain."])[0])
    assert replies["edited"] == plain_reply(llama_chat, llama_chat.encode(["Explain rain."])[0])


def test_the_system_message(session: ChatSession, llama_chat: ChatModel) -> None:
    plain = session.reply("Explain rain.", quietly).replies["edited"]
    session.command("/clear")
    session.command("/system You answer in verse, always, and at length.")
    spoken = session.reply("Explain rain.", quietly)
    assert spoken.system_prompt == "You answer in verse, always, and at length."
    text = render(llama_chat.tokenizer, "Explain rain.", system_prompt=spoken.system_prompt)
    row = llama_chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert spoken.replies["edited"] == plain_reply(llama_chat, row)
    session.command("/system")
    session.command("/clear")
    assert session.reply("Explain rain.", quietly).replies["edited"] == plain


def test_an_interrupt_keeps_what_came_and_leaves_the_model_as_it_was(
    session: ChatSession, llama_chat: ChatModel
) -> None:
    shipped = llama_chat.model.generation_config
    shown: list[str] = []

    def stop_after_two(_side: Side, text: str) -> None:
        shown.append(text)
        if len(shown) == 2:
            raise KeyboardInterrupt

    session.command("/ablate")
    turn = session.reply("Explain rain.", stop_after_two)
    assert turn.interrupted
    assert turn.replies["edited"] == "".join(shown)
    assert llama_chat.model.generation_config is shipped
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama_chat.model.modules())
    assert not session.reply("And snow?", quietly).interrupted


def test_incomplete_characters_are_held_back(session: ChatSession) -> None:
    from abliterate.interventions.chatting import _TextStream

    chat = session._model
    ids = chat.tokenizer("a \u00e9 \u96e8", add_special_tokens=False)["input_ids"]
    shown: list[str] = []
    stream = _TextStream(chat, shown.append)
    for token in [0, *ids]:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(shown) == "a \u00e9 \u96e8"
    assert not any("\ufffd" in text for text in shown)


def test_save_writes_the_conversation_and_nothing_else_does(session: ChatSession, tmp_path: Path) -> None:
    session.reply("Explain rain.", quietly)
    assert list(tmp_path.iterdir()) == []
    session.command(f"/save {tmp_path / 'talk.json'}")
    assert json.loads((tmp_path / "talk.json").read_text()) == json.loads(json.dumps(session.document()))
    assert session.document()["turns"][0]["user"] == "Explain rain."
    with pytest.raises(InputError, match="cannot be written"):
        session.command(f"/save {tmp_path / 'talk.json' / 'below.json'}")


def test_help_names_every_command(session: ChatSession) -> None:
    assert [line.split()[0] for line in help_text().splitlines()] == list(COMMANDS)
    assert session.command("/help") == help_text()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/dance", "no command /dance"),
        ("/ablated", "no command /ablated"),
        ("/add", "give a number"),
        ("/add much", "give a number"),
        ("/both", "nothing to compare"),
        ("/save", "needs a file"),
    ],
)
def test_commands_that_cannot_be_carried_out(session: ChatSession, line: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        session.command(line)


def test_what_a_direction_is_needed_for(llama_chat: ChatModel) -> None:
    without = ChatSession(model=llama_chat, base=None, direction=None, max_new_tokens=N)
    for line in ("/ablate", "/add 1"):
        with pytest.raises(InputError, match="--direction"):
            without.command(line)
    bare = make_direction(mean_difference=torch.ones(32))
    session = ChatSession(model=llama_chat, base=None, direction=bare, max_new_tokens=N)
    with pytest.raises(DirectionError, match="mean difference and layer"):
        session.command("/add 1")
    with pytest.raises(DirectionError, match="8 entries"):
        ChatSession(
            model=llama_chat, base=None, direction=make_direction(mean_difference=torch.ones(8)), max_new_tokens=N
        )


def test_a_conversation_that_no_longer_fits_is_said(llama_chat: ChatModel) -> None:
    session = ChatSession(model=llama_chat, base=None, direction=None, max_new_tokens=500)
    with pytest.raises(InputError, match="context of 512; /clear"):
        session.reply("Explain rain.", quietly)
    assert session.turns == []


def test_a_template_without_system_messages_says_so(llama_chat: ChatModel) -> None:
    from abliterate.errors import ModelError

    template = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template += "<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}\n"
    chat = replace(llama_chat, tokenizer=make_tokenizer(template=template))
    session = ChatSession(model=chat, base=None, direction=None, max_new_tokens=N)
    session.command("/system Be brief.")
    with pytest.raises(ModelError, match="may not accept a system message"):
        session.reply("Explain rain.", quietly)


def test_a_template_that_drops_system_messages_is_named(llama_chat: ChatModel) -> None:
    template = "{% for m in messages if m['role'] == 'user' %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    chat = replace(llama_chat, tokenizer=make_tokenizer(template=template))
    session = ChatSession(model=chat, base=llama_chat, direction=None, max_new_tokens=N)
    with pytest.raises(InputError, match="/system: the chat template drops the system message"):
        session.command("/system Be brief.")
    assert session.system_prompt is None
    assert "what the chat template does" in session.command("/system")
