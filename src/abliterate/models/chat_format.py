"""What a chat template does, found by rendering with it.

Everything the template puts after the instruction is a *post-instruction token*; these are counted from the end (-1 is
the last token before the answer). What else a model's answers need to be asked for and understood is found the same
way, from the template itself, with texts that stand out in what it renders:

    content         whether it takes text, or a list of parts
    switches        which of the known options changes the prompt, and so switches thinking on or off
    thoughts        what it puts around the reasoning of an assistant's message
    answers         what it puts between its prompt and an answer: an empty thought, the opening of a final channel
    turns           what it puts after an answer, and before the next message
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from abliterate.errors import InputError, ModelError
from abliterate.models.chat_template import (
    KNOWN_MARKERS,
    MARKER,
    PLAIN,
    TemplateForm,
    ThinkingMarkers,
    ends_with_opening,
    render_conversation,
    token_texts,
    tokenize,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER, _THOUGHT, _NEXT, _SYSTEM = "QZXANSWERQZX", "QZXTHOUGHTQZX", "QZXNEXTQZX", "QZXSYSTEMQZX"
_SWITCHES: tuple[tuple[str, bool | str, bool | str], ...] = (
    ("enable_thinking", False, True),
    ("thinking", False, True),
    ("reasoning", False, True),
    ("reasoning_effort", "none", "high"),
)
"""Options that templates read, each with what switches thinking off and on; the first that changes a prompt counts."""
_MARK = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z][A-Z_]*\]|◁[^◁▷\s]{1,20}▷")
_CUT_MARK = re.compile(r"[<\[◁][^>\]▷]*$")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFormat:
    """What the chat template puts around an instruction and around an answer.

    Attributes:
        n_positions: how many post-instruction tokens there are.
        post_instruction_tokens: their texts, in order.
        response_prefix: what is forced after the template, so that the next token starts the answer.
        thinking_disabled: whether the template's own non-thinking form is used.
        form: how the template is asked.
        markers: what may mark the thinking part of a reply; the template's own where it shows them.
        opens_thinking: whether the prompt ends in a thinking part, so that a reply starts with thoughts.
        turn_ends: tokens that the template puts after an answer.
        turn_texts: what stands between turns in the template; in a reply it shows that the model went on.
    """

    n_positions: int
    post_instruction_tokens: tuple[str, ...]
    response_prefix: str = ""
    thinking_disabled: bool = False
    form: TemplateForm = PLAIN
    markers: tuple[ThinkingMarkers, ...] = KNOWN_MARKERS
    opens_thinking: bool = False
    turn_ends: tuple[int, ...] = ()
    turn_texts: tuple[str, ...] = ()


def find_chat_format(
    tokenizer: "PreTrainedTokenizerBase", *, system_prompt: str | None, name: str = "the model", thinks: bool = False
) -> ChatFormat:
    """Find what the template puts around an instruction and an answer.

    Args:
        tokenizer: the one with the template.
        system_prompt: the system message, or None for what the template does by default.
        name: what to call the model in messages.
        thinks: switch thinking on, where the template can, and leave it to the model to end it; else thinking is
            switched off, or a thinking part that the template opens is closed.

    Raises:
        ModelError: the template fails, hides the instruction, or puts nothing after it.
        InputError: it drops the system message.
    """
    template = _Template(tokenizer, system_prompt)
    base = template.find_form(name)
    if system_prompt is not None and drops_system_prompt(tokenizer, base):
        raise InputError(
            f"--system-prompt: the chat template of {name} drops the system message; put its text into the prompts"
        )
    off, on = template.find_switch(base)
    form = (on if thinks else off) or base
    prompt = template.write(form)
    suffix = prompt.partition(MARKER)[2]
    if not suffix:
        raise ModelError(f"{name}: the chat template puts no token after the instruction; nothing can be read there")
    own = template.find_markers(on or base)
    markers = (own,) if own is not None else KNOWN_MARKERS
    prefix = "" if thinks else template.find_answer_prefix(form, template.write(on or base), markers)
    texts = token_texts(tokenizer, suffix + prefix)
    # What stands between a thought and an answer ends no turn, unless there are no thoughts.
    thoughts = template.find_thought(on or base)[1] if thinks or not (off or prefix) else ""
    return ChatFormat(
        n_positions=len(texts),
        post_instruction_tokens=texts,
        response_prefix=prefix,
        thinking_disabled=off is not None and not thinks,
        form=form,
        markers=markers,
        opens_thinking=not prefix and template.opens_thinking(form, prompt, markers),
        turn_ends=template.find_turn_ends(form, thoughts),
        turn_texts=template.find_turn_texts(form, thoughts),
    )


def conversation_row(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Mapping[str, Any]],
    *,
    chat_format: ChatFormat,
    system_prompt: str | None,
) -> list[int]:
    """Return the token ids of a conversation, up to where the next answer starts.

    Args:
        tokenizer: the one with the template.
        messages: `role` (user or assistant) and `content` of each, the last one the user's.
        chat_format: how the template is asked, and what is put behind what it writes.
        system_prompt: the system message, or None for what the template does by default.

    Raises:
        ModelError: the template fails.
        TemplateLimitError: it takes too long, too much memory, or writes too much.
    """
    text = render_conversation(tokenizer, messages, system_prompt=system_prompt, form=chat_format.form)
    return tokenize(tokenizer, text + chat_format.response_prefix)


def find_conversation_form(tokenizer: "PreTrainedTokenizerBase") -> TemplateForm:
    """Return how content is handed over to a template that takes a message and an answer, as those of guards do."""
    messages = [_user(MARKER), {"role": "assistant", "content": _ANSWER}]
    for form in (PLAIN, TemplateForm(content_in_parts=True)):
        try:
            text = render_conversation(tokenizer, messages, system_prompt=None, form=form)
        except ModelError:
            continue
        if MARKER in text and _ANSWER in text and "{'type'" not in text:
            return form
    return PLAIN


def drops_system_prompt(tokenizer: "PreTrainedTokenizerBase", form: TemplateForm) -> bool:
    """Tell whether a system message leaves no trace in what the template writes; to refuse it is not to drop it."""
    try:
        return _SYSTEM not in render_conversation(tokenizer, [_user(MARKER)], system_prompt=_SYSTEM, form=form)
    except ModelError:
        return False


def _shared_start(one: str, other: str) -> str:
    pairs = zip(one, other, strict=False)
    return "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


@dataclass(frozen=True, slots=True)
class _Template:
    """A template, and the questions that are put to it."""

    tokenizer: "PreTrainedTokenizerBase"
    system_prompt: str | None

    def write(self, form: TemplateForm, *after: Mapping[str, Any], up_to_answer: bool = True) -> str:
        """Render an instruction and what comes after it."""
        return render_conversation(
            self.tokenizer,
            [_user(MARKER), *after],
            system_prompt=self.system_prompt,
            form=form,
            up_to_answer=up_to_answer,
        )

    def attempt(self, form: TemplateForm, *after: Mapping[str, Any], up_to_answer: bool = False) -> str:
        """Render the same; "" where the template refuses or does not show the instruction once."""
        try:
            text = self.write(form, *after, up_to_answer=up_to_answer)
        except ModelError:
            return ""
        return text if text.count(MARKER) == 1 else ""

    def find_form(self, name: str) -> TemplateForm:
        """Return how content is handed over: as text, or where that shows nothing, in parts."""
        plain, parts = PLAIN, TemplateForm(content_in_parts=True)
        if self.attempt(plain, up_to_answer=True):
            return plain
        in_parts = self.attempt(parts, up_to_answer=True)
        # A template that knows no parts prints the list as it is.
        if in_parts and "{'type'" not in in_parts:
            return parts
        self.write(plain)
        raise ModelError(f"{name}: the chat template does not show the instruction exactly once")

    def find_switch(self, base: TemplateForm) -> tuple[TemplateForm | None, TemplateForm | None]:
        """Return how thinking is switched off and on, if any known option changes the prompt; else None twice."""
        default = self.write(base)
        for option, off, on in _SWITCHES:
            values = (off, on)
            forms = [replace(base, options=((option, value),)) for value in values]
            prompts = [self.attempt(form, up_to_answer=True) for form in forms]
            # Where a value changes nothing it is what the template does by default.
            without, with_it = (
                base if prompt == default else form for form, prompt in zip(forms, prompts, strict=True)
            )
            if all(prompts) and without != with_it and self._knows(base, option, off, prompts[0]):
                return without, with_it
        return None, None

    def _knows(self, base: TemplateForm, option: str, off: bool | str, prompt: str) -> bool:
        """Tell whether a template knows the word that switches off; some write, or pass over, any they are given."""
        if isinstance(off, bool):
            return True
        made_up = self.attempt(replace(base, options=((option, _ANSWER),)), up_to_answer=True)
        return _ANSWER not in made_up and made_up != prompt

    def find_thought(self, form: TemplateForm) -> tuple[str, str]:
        """Return what stands between the instruction and a thought, and between thought and answer; "" if unknown."""
        fields = dict.fromkeys(("reasoning_content", "thinking", "reasoning"), _THOUGHT)
        parts = [{"type": "thinking", "thinking": _THOUGHT}, {"type": "text", "text": _ANSWER}]
        for message in (
            {"role": "assistant", "content": _ANSWER, **fields},
            {"role": "assistant", "content": parts},
        ):
            text = self.attempt(form, message).partition(MARKER)[2]
            before, found, after = text.partition(_THOUGHT)
            between, answered, rest = after.partition(_ANSWER)
            if found and answered and _THOUGHT not in between + rest:
                return before, between
        return "", ""

    def find_markers(self, form: TemplateForm) -> ThinkingMarkers | None:
        """Return what the template puts around thoughts; None where it shows none, or marks them with plain words."""
        before, between = self.find_thought(form)
        for known in KNOWN_MARKERS:
            if known.opening in before and known.closing in between:
                return known
        # The part before the thought that is there without a thought too belongs to the turn.
        turns = (self.attempt(form, up_to_answer=True), self._answered(form)[1])
        shared = min((_shared_start(before, turn.partition(MARKER)[2]) for turn in turns if turn), key=len, default="")
        opening = before[len(_CUT_MARK.sub("", shared)) :].strip()
        closing = between.strip()
        if not self._holds_mark(closing) or (opening and not self._holds_mark(opening)):
            return None
        return ThinkingMarkers(opening=opening, closing=closing, shut=between)

    def find_answer_prefix(self, form: TemplateForm, thinking_prompt: str, markers: tuple[ThinkingMarkers, ...]) -> str:
        """Return what the template puts between its prompt and an answer, if there is a marker in it.

        Args:
            form: without thinking, where there is such a form.
            thinking_prompt: the prompt with thinking; without it may be the same and an empty thought.
            markers: of thinking.
        """
        prompt = self.write(form)
        starts = [text.partition(_ANSWER)[0] for text in self._answered(form) if _ANSWER in text]
        shown = [start for start in starts if start.startswith(prompt)]
        if not shown and prompt.startswith(thinking_prompt):
            # In a conversation the empty thought is left out.
            shown, prompt = [start for start in starts if start.startswith(thinking_prompt)], thinking_prompt
        for start in shown:
            if self._holds_mark(start[len(prompt) :]):
                return start[len(prompt) :]
        # A template that opens a thinking part itself leaves it to us to close it.
        opened = ends_with_opening(prompt.partition(MARKER)[2], markers + KNOWN_MARKERS)
        return opened.shut if opened else ""

    def opens_thinking(self, form: TemplateForm, prompt: str, markers: tuple[ThinkingMarkers, ...]) -> bool:
        """Tell whether a prompt ends where the template puts a thought."""
        suffix = prompt.partition(MARKER)[2]
        if ends_with_opening(suffix, markers):
            return True
        before, _ = self.find_thought(form)
        return self._holds_mark(before) and before.strip() == suffix.strip()

    def find_turn_ends(self, form: TemplateForm, thoughts: str) -> tuple[int, ...]:
        """Return the tokens of the vocabulary's own that follow an answer, but for those after a thought."""
        for text in self._answered(form):
            tail = text.partition(_ANSWER)[2].partition(_NEXT)[0]
            for token in self._tokens(tail):
                shown = str(self.tokenizer.decode([token]))
                if self._is_own(token, tail) and shown not in thoughts:
                    return (token,)
                if shown.strip():
                    break
        return ()

    def find_turn_texts(self, form: TemplateForm, thoughts: str) -> tuple[str, ...]:
        """Return the markers between an answer and the next message that end no thought; if there is none, all."""
        tail = self._answered(form)[1].partition(_ANSWER)[2]
        between, found, _ = tail.partition(_NEXT)
        if not found or not between.strip():
            return ()
        added = [token for token in self._tokens(between) if self._is_own(token, between)]
        texts = [str(self.tokenizer.decode([token])) for token in added] + _MARK.findall(between)
        return tuple(dict.fromkeys(text for text in texts if text not in thoughts)) or (between.strip(),)

    def _answered(self, form: TemplateForm) -> tuple[str, str]:
        """Return what the template writes with an answer at the end, and with a message after it."""
        answer = {"role": "assistant", "content": _ANSWER}
        return self.attempt(form, answer), self.attempt(form, answer, _user(_NEXT))

    def _tokens(self, text: str) -> Sequence[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _holds_mark(self, text: str) -> bool:
        return bool(_MARK.search(text)) or any(self._is_own(token, text) for token in self._tokens(text))

    def _is_own(self, token: int, text: str) -> bool:
        """Tell whether a token was given a place of its own in the vocabulary, and is no stand-in for other text."""
        shown = str(self.tokenizer.decode([token]))
        return shown in text and (token in self.tokenizer.added_tokens_decoder or bool(_MARK.fullmatch(shown)))
