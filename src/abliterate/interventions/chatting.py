"""A conversation with a model, its direction ablated, added or left alone, beside its base if wanted.

Replies are greedy and nothing is written anywhere unless `/save` asks for it.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from abliterate.directions import Direction
from abliterate.errors import DirectionError, InputError
from abliterate.files import write_json
from abliterate.models.chat_format import conversation_row, drops_system_prompt
from abliterate.models.chat_model import ChatModel
from abliterate.models.hooks import ablate_direction, add_direction

Side = Literal["base", "edited"]
Intervention = Literal["none", "ablate", "add"]
SHOW_TEXT = Callable[[Side, str], None]

COMMANDS: Mapping[str, tuple[str, str]] = {
    "/ablate": ("", "ablate the direction"),
    "/add": ("C", "add C times the mean difference at its layer; -1 bypasses refusal, +1 induces it"),
    "/off": ("", "leave the model alone"),
    "/both": ("", "answer with base and edited, side by side; again for edited alone"),
    "/system": ("[TEXT]", "set the system message; without TEXT what the chat template does"),
    "/clear": ("", "forget the conversation"),
    "/save": ("FILE", "write the conversation as JSON"),
    "/help": ("", "show these commands"),
    "/quit": ("", "end"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One message and what was answered.

    Attributes:
        user: the message.
        intervention: what hooks did to the edited model.
        coefficient: of the addition; None for the other interventions.
        system_prompt: the system message, or None for what the template does.
        replies: by side, `base` or `edited`.
        interrupted: whether the reply was cut short by Ctrl-C.
    """

    user: str
    intervention: Intervention
    coefficient: float | None
    system_prompt: str | None
    replies: dict[str, str]
    interrupted: bool


class ChatSession:
    """The state of one conversation.

    Args:
        model: the model that is edited.
        base: another model to compare with, or None to compare with `model` left alone.
        direction: what `/ablate` and `/add` use, or None.
        max_new_tokens: the longest reply.

    Raises:
        DirectionError: the direction has another width than the model.
    """

    def __init__(
        self, *, model: ChatModel, base: ChatModel | None, direction: Direction | None, max_new_tokens: int
    ) -> None:
        if direction is not None and direction.d_model != model.d_model:
            raise DirectionError(f"the direction has {direction.d_model} entries; the model's width is {model.d_model}")
        self._model = model
        self._base = base
        self._direction = direction
        self._max_new_tokens = max_new_tokens
        self._intervention: Intervention = "none"
        self._coefficient: float | None = None
        self._both = False
        self.system_prompt = model.system_prompt
        self.turns: list[Turn] = []
        self._kept_from = 0

    @property
    def sides(self) -> tuple[Side, ...]:
        """Which models answer, in order."""
        return ("base", "edited") if self._both else ("edited",)

    def command(self, line: str) -> str:
        """Carry out one `/command` (but `/quit`) and return what to tell the user.

        Raises:
            InputError: there is no such command, or it cannot be carried out as things are.
            DirectionError: the direction file lacks what the command needs.
        """
        name, _, argument = line.strip().partition(" ")
        argument = argument.strip()
        actions: dict[str, Callable[[str], str]] = {
            "/ablate": lambda _a: self._switch("ablate", None),
            "/add": self._add,
            "/off": lambda _a: self._switch("none", None),
            "/both": lambda _a: self._toggle_both(),
            "/system": self._set_system,
            "/clear": lambda _a: self._clear(),
            "/save": self._save,
            "/help": lambda _a: help_text(),
        }
        if name not in actions:
            raise InputError(
                f"there is no command {name}; /help shows them, and //... sends a message that starts with /"
            )
        return actions[name](argument)

    def reply(self, user: str, show: SHOW_TEXT) -> Turn:
        """Answer one message; `show` gets the text of each side as it comes.

        An interrupt (Ctrl-C) ends the reply; what came of it is kept, and the turn says so.

        Raises:
            InputError: the conversation no longer fits into the model's context.
            ModelError: the chat template fails.
        """
        replies: dict[str, str] = {}
        interrupted = False
        rows = {side: self._row(side, user) for side in self.sides}
        for side, row in rows.items():
            stream = _TextStream(self._chat(side), lambda text, side=side: show(side, text))  # type: ignore[misc]
            try:
                with self._edit(side):
                    self._chat(side).generate([row], max_new_tokens=self._max_new_tokens, streamer=stream)
            except KeyboardInterrupt:
                interrupted = True
            stream.flush()
            replies[side] = stream.text
            if interrupted:
                break
        turn = Turn(
            user=user,
            intervention=self._intervention,
            coefficient=self._coefficient,
            system_prompt=self.system_prompt,
            replies=replies,
            interrupted=interrupted,
        )
        self.turns.append(turn)
        return turn

    def document(self) -> dict[str, Any]:
        """Return the whole conversation as plain values."""
        return {
            "model": str(self._model.model.config._name_or_path),
            "base": str(self._base.model.config._name_or_path) if self._base is not None else None,
            "direction_sha256": self._direction.sha256 if self._direction is not None else None,
            "max_new_tokens": self._max_new_tokens,
            "turns": [asdict(turn) for turn in self.turns],
        }

    def _chat(self, side: Side) -> ChatModel:
        return self._base if side == "base" and self._base is not None else self._model

    def _edit(self, side: Side) -> AbstractContextManager[Any]:
        if side == "base" or self._direction is None or self._intervention == "none":
            return nullcontext()
        if self._intervention == "ablate":
            return ablate_direction(self._model, self._direction.vector)
        dose, layer = _dose_of(self._direction)
        return add_direction(self._model, dose, layer=layer, coefficient=self._coefficient or 0.0)

    def _row(self, side: Side, user: str) -> list[int]:
        chat = self._chat(side)
        messages: list[dict[str, str]] = []
        for turn in self.turns[self._kept_from :]:
            # A turn that this side did not answer stands in its history with the other's reply.
            answer = turn.replies[side] if side in turn.replies else next(iter(turn.replies.values()))
            messages += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": user})
        row = conversation_row(chat.tokenizer, messages, chat_format=chat.chat_format, system_prompt=self.system_prompt)
        limit = getattr(chat.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if limit is not None and len(row) + self._max_new_tokens > limit:
            raise InputError(
                f"{len(row)} tokens of conversation and a reply of {self._max_new_tokens} exceed the model's context "
                f"of {limit}; /clear starts anew, --max-new-tokens shortens replies"
            )
        return row

    def _switch(self, intervention: Intervention, coefficient: float | None) -> str:
        if intervention != "none" and self._direction is None:
            raise InputError(f"/{intervention} needs a direction; start with --direction FILE")
        self._intervention, self._coefficient = intervention, coefficient
        if intervention == "none":
            if self._base is None:
                self._both = False
            return "the model is left alone"
        return "the direction is ablated" if intervention == "ablate" else f"{coefficient:+g} x the direction is added"

    def _add(self, argument: str) -> str:
        try:
            coefficient = float(argument)
        except ValueError:
            raise InputError(f"/add {argument}: give a number, as in /add -1") from None
        if self._direction is not None:
            _dose_of(self._direction)
        return self._switch("add", coefficient)

    def _toggle_both(self) -> str:
        if not self._both and self._base is None and self._intervention == "none":
            raise InputError("there is nothing to compare; use /ablate or /add first, or start with --base MODEL")
        self._both = not self._both
        return "base and edited answer" if self._both else "the edited model answers alone"

    def _set_system(self, argument: str) -> str:
        chats = [chat for chat in (self._model, self._base) if chat is not None]
        if argument and any(drops_system_prompt(chat.tokenizer, chat.chat_format.form) for chat in chats):
            raise InputError("/system: the chat template drops the system message; say it in a message of your own")
        self.system_prompt = argument or None
        return f"system message: {argument}" if argument else "system message: what the chat template does"

    def _clear(self) -> str:
        self._kept_from = len(self.turns)
        return "the conversation is forgotten"

    def _save(self, argument: str) -> str:
        if not argument:
            raise InputError("/save needs a file, as in /save conversation.json")
        path = Path(argument).expanduser()
        try:
            write_json(path, self.document())
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
        return f"{len(self.turns)} turns written to {path}"


def help_text() -> str:
    """Return the commands and what they do, one a line."""
    usages = {f"{name} {argument}".strip(): text for name, (argument, text) in COMMANDS.items()}
    width = max(map(len, usages))
    return "\n".join(f"{usage:<{width}}  {text}" for usage, text in usages.items())


def _dose_of(direction: Direction) -> tuple[Any, int]:
    layer = direction.metadata.get("layer")
    if direction.mean_difference is None or not isinstance(layer, int):
        raise DirectionError("/add needs a direction file with its mean difference and layer, as `extract` writes it")
    return direction.mean_difference, layer


class _TextStream:
    """Turns the tokens of one reply into text as they come; transformers calls `put` and `end`.

    Text is held back while its last character is incomplete, since the next token may complete it.
    """

    def __init__(self, chat: ChatModel, show: Callable[[str], None]) -> None:
        self._chat = chat
        self._show = show
        self._tokens: list[int] = []
        self._prompt_seen = False
        self.text = ""

    def put(self, tokens: Any) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._tokens += tokens.flatten().tolist()
        self._emit(self._chat.decode(self._tokens))

    def end(self) -> None:
        self.flush()

    def flush(self) -> None:
        """Show what was held back."""
        self._emit(self._chat.decode(self._tokens), final=True)

    def _emit(self, text: str, *, final: bool = False) -> None:
        if len(text) > len(self.text) and (final or not text.endswith("\ufffd")):
            new, self.text = text[len(self.text) :], text
            self._show(new)
