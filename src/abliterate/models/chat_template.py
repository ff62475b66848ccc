"""The chat template: what it puts around an instruction, and rendering with it.

Prompts are rendered with the model's own chat template. Everything the template puts after the instruction is a
*post-instruction token*; these are counted from the end (-1 is the last token before the answer).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from abliterate.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKER = "QZXINSTRUCTIONQZX"
THOUGHT_CLOSERS = {"<think>": "\n\n</think>\n\n", "<thought>": "\n\n</thought>\n\n", "[THINK]": "[/THINK]"}
"""How a thinking part starts, and what ends it at once, without any thought."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFormat:
    """What the chat template puts around an instruction.

    Attributes:
        n_positions: how many post-instruction tokens there are.
        post_instruction_tokens: their texts, in order.
        response_prefix: what is forced after the template, so that the next token starts the answer.
        thinking_disabled: whether the template's own non-thinking form is used.
    """

    n_positions: int
    post_instruction_tokens: tuple[str, ...]
    response_prefix: str = ""
    thinking_disabled: bool = False


def render(
    tokenizer: "PreTrainedTokenizerBase", prompt: str, *, system_prompt: str | None, thinking_disabled: bool
) -> str:
    """Return one user message as the chat template writes it, up to where the answer starts.

    Args:
        tokenizer: the one with the template.
        prompt: the instruction.
        system_prompt: the system message, or None for what the template does by default.
        thinking_disabled: ask the template for its non-thinking form.

    Raises:
        ModelError: the template fails.
    """
    return render_conversation(
        tokenizer,
        [{"role": "user", "content": prompt}],
        system_prompt=system_prompt,
        thinking_disabled=thinking_disabled,
    )


def render_conversation(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Mapping[str, str]],
    *,
    system_prompt: str | None,
    thinking_disabled: bool,
) -> str:
    """Return a conversation as the chat template writes it, up to where the next answer starts.

    Args:
        tokenizer: the one with the template.
        messages: `role` (user or assistant) and `content` of each, the last one the user's.
        system_prompt: the system message, or None for what the template does by default.
        thinking_disabled: ask the template for its non-thinking form.

    Raises:
        ModelError: the template fails.
    """
    conversation = [dict(message) for message in messages]
    if system_prompt is not None:
        conversation.insert(0, {"role": "system", "content": system_prompt})
    options: dict[str, Any] = {"enable_thinking": False} if thinking_disabled else {}
    try:
        text = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False, **options)
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


def find_chat_format(
    tokenizer: "PreTrainedTokenizerBase", *, system_prompt: str | None, name: str = "the model"
) -> ChatFormat:
    """Find what the template puts around an instruction, by rendering one.

    Raises:
        ModelError: the template fails, hides the instruction, or puts nothing after it.
    """
    plain = render(tokenizer, MARKER, system_prompt=system_prompt, thinking_disabled=False)
    rendered = render(tokenizer, MARKER, system_prompt=system_prompt, thinking_disabled=True)
    if rendered.count(MARKER) != 1:
        raise ModelError(f"{name}: the chat template does not show the instruction exactly once")
    suffix = rendered.partition(MARKER)[2]
    if not suffix:
        raise ModelError(f"{name}: the chat template puts no token after the instruction; nothing can be read there")
    # A template that opens the thinking part itself leaves it to us to close it.
    closing = next((text for opener, text in THOUGHT_CLOSERS.items() if suffix.rstrip().endswith(opener)), "")
    texts = token_texts(tokenizer, suffix + closing)
    return ChatFormat(
        n_positions=len(texts),
        post_instruction_tokens=texts,
        response_prefix=closing,
        thinking_disabled=rendered != plain,
    )
