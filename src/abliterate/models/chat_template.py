"""The chat template: rendering with it, and tokens of what it gives.

Prompts are rendered with the model's own chat template. `chat_format` finds out what a template does; what marks
thoughts in the families that are known is listed here, for templates that do not show it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from abliterate.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKER = "QZXINSTRUCTIONQZX"


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateForm:
    """How a template is asked.

    Attributes:
        options: what it is told besides the messages, as ("enable_thinking", False).
        content_in_parts: whether it takes a message's content as a list of parts, as those of vision models do.
    """

    options: tuple[tuple[str, bool | str], ...] = ()
    content_in_parts: bool = False


PLAIN = TemplateForm()


def render(
    tokenizer: "PreTrainedTokenizerBase", prompt: str, *, system_prompt: str | None, form: TemplateForm = PLAIN
) -> str:
    """Return one user message as the chat template writes it, up to where the answer starts.

    Args:
        tokenizer: the one with the template.
        prompt: the instruction.
        system_prompt: the system message, or None for what the template does by default.
        form: how the template is asked.

    Raises:
        ModelError: the template fails.
    """
    return render_conversation(tokenizer, [{"role": "user", "content": prompt}], system_prompt=system_prompt, form=form)


def render_conversation(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Mapping[str, Any]],
    *,
    system_prompt: str | None,
    form: TemplateForm = PLAIN,
    up_to_answer: bool = True,
) -> str:
    """Return a conversation as the chat template writes it, up to where the next answer starts.

    Args:
        tokenizer: the one with the template.
        messages: `role` (user or assistant) and `content` of each, the last one the user's.
        system_prompt: the system message, or None for what the template does by default.
        form: how the template is asked.
        up_to_answer: add what stands before an answer; False leaves the conversation as it is.

    Raises:
        ModelError: the template fails.
    """
    conversation = [dict(message) for message in messages]
    if system_prompt is not None:
        conversation.insert(0, {"role": "system", "content": system_prompt})
    if form.content_in_parts:
        for message in conversation:
            if isinstance(message["content"], str):
                message["content"] = [{"type": "text", "text": message["content"]}]
    options: dict[str, Any] = dict(form.options)
    try:
        text = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=up_to_answer, tokenize=False, **options
        )
    except Exception as error:  # a template is a program of its own and may raise anything
        hint = "; it may not accept a system message" if system_prompt is not None else ""
        raise ModelError(f"the chat template fails: {' '.join(str(error).split())}{hint}") from error
    return str(text)


def tokenize(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Return the token ids of rendered text, with exactly one BOS where the tokenizer uses one."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return [bos, *ids] if adds_bos and ids[:1] != [bos] else ids


def token_texts(tokenizer: "PreTrainedTokenizerBase", text: str) -> tuple[str, ...]:
    """Return the text of each token of `text`."""
    return tuple(str(tokenizer.decode([token])) for token in tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkingMarkers:
    """How one family marks its thoughts.

    Attributes:
        opening: what a thinking part starts with; "" where the prompt has always opened it.
        closing: what ends it; the answer follows.
        shut: what ends at once, and without any thought, a part that was just opened.
    """

    opening: str
    closing: str
    shut: str


def _tags(name: str) -> ThinkingMarkers:
    return ThinkingMarkers(opening=f"<{name}>", closing=f"</{name}>", shut=f"\n\n</{name}>\n\n")


_FINAL_CHANNEL = "<|channel|>final<|message|>"
_SHUT_CHANNEL = f"<|message|><|end|><|start|>assistant{_FINAL_CHANNEL}"

KNOWN_MARKERS: tuple[ThinkingMarkers, ...] = (
    _tags("think"),  # Qwen, DeepSeek, GLM, Kimi K2, MiniMax, Nemotron, SmolLM3, Hunyuan, EXAONE 4 and many more
    _tags("thought"),  # EXAONE Deep
    ThinkingMarkers(opening="[THINK]", closing="[/THINK]", shut="[/THINK]"),  # Magistral, Ministral
    ThinkingMarkers(opening="<|channel|>analysis", closing=_FINAL_CHANNEL, shut=_SHUT_CHANNEL),  # gpt-oss
    ThinkingMarkers(opening="<|channel|>commentary", closing=_FINAL_CHANNEL, shut=_SHUT_CHANNEL),
    ThinkingMarkers(opening="<|channel>thought", closing="<channel|>", shut="\n<channel|>"),  # Gemma 4
    ThinkingMarkers(opening="<seed:think>", closing="</seed:think>", shut="</seed:think>\n"),  # Seed-OSS
    ThinkingMarkers(opening="<|START_THINKING|>", closing="<|END_THINKING|>", shut="<|END_THINKING|>"),  # Command A
    ThinkingMarkers(opening="◁think▷", closing="◁/think▷", shut="◁/think▷"),  # Kimi-VL, Kimi-Dev
    ThinkingMarkers(opening="<|inner_prefix|>", closing="<|inner_suffix|>", shut="<|inner_suffix|>"),  # Apertus
)


def ends_with_opening(text: str, markers: tuple[ThinkingMarkers, ...]) -> ThinkingMarkers | None:
    """Return the markers whose thinking part is open at the end of a text, or None."""
    end = text.rstrip()
    return next((one for one in markers if one.opening and end.endswith(one.opening)), None)
