"""What a loaded model does on prompts: its greedy replies, taken apart and classified, and kept on request.

`run` puts a base and an edited model beside each other with this; other stages measure a model under hooks.

Nothing is kept unless a folder is named for it, since replies to harmful prompts are among what is kept. One file
holds the replies of one model under one set of conditions; its name is a hash of all of them, weights included, so a
change of any makes a new file. Each line holds one reply as token ids, under the hash of its rendered prompt.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from abliterate.checkpoints.model_source import ModelSource
from abliterate.checkpoints.provenance import model_sha256, values_sha256
from abliterate.errors import InputError
from abliterate.evaluation.drift import Surprise, completion_surprise
from abliterate.evaluation.report import BUDGETS, Kind
from abliterate.extraction.reply_classes import Reply, read_completions
from abliterate.files import JsonLines, write_file
from abliterate.models.chat_format import find_chat_format
from abliterate.models.chat_model import ChatModel, conditions_of
from abliterate.models.greedy import GreedyDecoder
from abliterate.processes import ALONE, Ranks
from abliterate.progress import SILENT, Advance, ProgressReporter
from abliterate.prompt_sets import PromptSet

_MOST_TOKENS = 1 << 31
_AGAIN = "delete the file, and its replies are generated again"

Kept = TypeVar("Kept")


class KeptReplies(Generic[Kept]):
    """The replies of one model under one set of conditions, in a file.

    Args:
        directory: where the file lies; made if need be, readable by its owner alone.
        conditions: everything a reply depends on but what was asked, as values JSON can hold.
        parse: makes a reply of JSON; a TypeError, ValueError or KeyError means that it is none.
        rank: of the process, where several share the work: each writes a file of its own, and the first reads all.

    Raises:
        InputError: the folder or the file cannot be written.
    """

    def __init__(
        self, directory: Path, conditions: Mapping[str, Any], *, parse: Callable[[Any], Kept], rank: int = 0
    ) -> None:
        name = values_sha256(dict(conditions))[:32]
        self.path = directory / (f"{name}.{rank}.jsonl" if rank else f"{name}.jsonl")
        self.hits = 0
        self._lines = JsonLines(self.path, remedy=_AGAIN, mode=0o600)

        def read(line: Any) -> tuple[str, Kept]:
            if not isinstance(line["prompt"], str):
                raise TypeError("not a prompt's hash")
            return line["prompt"], parse(line["reply"])

        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._replies: dict[str, Kept] = dict(self._lines.resume(read))
            for other in sorted(directory.glob(f"{name}.*.jsonl")) if rank == 0 else ():
                self._replies |= dict(JsonLines(other, remedy=_AGAIN).read(read))
        except OSError as error:
            raise InputError(f"--cache {directory}: cannot be used: {error.strerror or error}") from error

    def get(self, asked: Sequence[Any]) -> Kept | None:
        """Return the reply to what was asked (token ids of a rendered prompt, or messages); None if it is not kept."""
        reply = self._replies.get(values_sha256(list(asked)))
        self.hits += reply is not None
        return reply

    def put(self, asked: Sequence[Any], reply: Kept) -> None:
        """Keep a reply; it is on the disk when this returns."""
        key = values_sha256(list(asked))
        self._replies[key] = reply
        self._lines.append({"prompt": key, "reply": reply})


class ReplyCache(KeptReplies[list[int]]):
    """Replies as token ids, each under its rendered prompt; see `KeptReplies`."""

    def __init__(self, directory: Path, conditions: Mapping[str, Any], *, rank: int = 0) -> None:
        super().__init__(directory, conditions, parse=_kept_tokens, rank=rank)


def reply_conditions(
    chat: ChatModel,
    source: ModelSource,
    *,
    max_new_tokens: int,
    steering: Mapping[str, Any] | None = None,
    progress: ProgressReporter = SILENT,
) -> dict[str, Any]:
    """Return all that a model's greedy reply depends on but its prompt: the conditions of a `ReplyCache`.

    Args:
        chat: the model, loaded.
        source: its files; they are read whole.
        max_new_tokens: length limit of each reply.
        steering: what hooks do, see `steering_key`; None: there are none.
        progress: where to show progress.
    """
    return {
        "model": model_sha256(source.path, progress=progress),
        "max_new_tokens": max_new_tokens,
        "steering": dict(steering) if steering is not None else None,
        **conditions_of(chat),
    }


def _kept_tokens(reply: Any) -> list[int]:
    # A tokenizer takes no other numbers, and decodes those that it does not know as nothing.
    if not isinstance(reply, list) or not all(type(token) is int and 0 <= token < _MOST_TOKENS for token in reply):
        raise TypeError("not a reply's tokens")
    return reply


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Replies of one model as token ids, in the order of the prompts.

    Attributes:
        rows: kind of prompts -> token ids of the rendered prompts.
        tokens: kind -> token ids of the replies, without the end token.
        max_new_tokens: the length limit they were generated under.
        nats: kind -> the negative log-likelihood of each reply in the model that gave it; None where it is not known,
            as of replies that were kept from before.
    """

    rows: dict[str, list[list[int]]]
    tokens: dict[str, list[list[int]]]
    max_new_tokens: int
    nats: Mapping[str, Sequence[float | None]] = field(default_factory=dict)

    @property
    def surprise(self) -> dict[str, Surprise]:
        """How unlikely the model found its own replies, of those kinds of which that is known."""
        found = {}
        for kind, nats in self.nats.items():
            known = tuple(each for each in nats if each is not None)
            if len(known) == len(nats):
                found[kind] = Surprise(nats=known, tokens=tuple(map(len, self.tokens[kind])))
        return found


def let_think(chat: ChatModel) -> ChatModel:
    """Return the same model with its template's thinking form, switched on where it is off by default.

    One that does not think stays as it is.

    Raises:
        ModelError: the template fails.
    """
    return replace(chat, chat_format=find_chat_format(chat.tokenizer, system_prompt=chat.system_prompt, thinks=True))


def answer_prompts(
    chat: ChatModel,
    prompts: Mapping[str, Sequence[str]],
    *,
    max_new_tokens: int,
    label: str = "model",
    cache: ReplyCache | None = None,
    ranks: Ranks = ALONE,
    progress: ProgressReporter = SILENT,
) -> Answers:
    """Generate a greedy reply to each prompt, batched by length.

    Args:
        chat: the model; hooks that are attached to it act.
        prompts: kind -> prompts.
        max_new_tokens: length limit of each reply.
        label: what to call the model in the progress bars.
        cache: replies that are there already, and where new ones are kept; None keeps none.
        ranks: the processes that share the prompts; all get all replies.
        progress: where to show progress.

    Raises:
        ModelError: one prompt alone does not fit into memory, or cannot be put to the model.
    """
    rows = {kind: chat.encode(texts) for kind, texts in prompts.items()}
    return answer_rows(
        chat,
        rows,
        prompts,
        max_new_tokens=max_new_tokens,
        label=label,
        cache=cache,
        ranks=ranks,
        progress=progress,
    )


def answer_rows(
    chat: ChatModel,
    rows: Mapping[str, list[list[int]]],
    prompts: Mapping[str, Sequence[str]],
    *,
    max_new_tokens: int,
    label: str = "model",
    cache: ReplyCache | None = None,
    ranks: Ranks = ALONE,
    progress: ProgressReporter = SILENT,
) -> Answers:
    """Generate a greedy reply to each rendered prompt; see `answer_prompts`.

    Args:
        chat: the model; hooks that are attached to it act.
        rows: kind -> token ids of the rendered prompts.
        prompts: kind -> the prompts, for messages.
        max_new_tokens: length limit of each reply.
        label: what to call the model in the progress bars.
        cache: replies that are there already, and where new ones are kept; None keeps none.
        ranks: the processes that share the prompts; all get all replies.
        progress: where to show progress.
    """
    # All of them first, so that what cannot be asked is found before anything is answered.
    for kind, texts in prompts.items():
        chat.check_tokens(rows[kind], texts, n_new=max_new_tokens)
    tokens: dict[str, list[list[int]]] = {}
    nats: dict[str, list[float | None]] = {}
    for kind, texts in prompts.items():
        weighed: dict[int, float] = {}
        with progress.task(f"Answering {kind} prompts ({label})", total=len(texts)) as advance:
            tokens[kind] = generate_replies(
                chat,
                rows[kind],
                max_new_tokens=max_new_tokens,
                cache=cache,
                ranks=ranks,
                advance=advance,
                weigh=weighed.__setitem__,
            )
        nats[kind] = [weighed.get(i) for i in range(len(texts))]
        _warn_of_template(chat, tokens[kind], f"{label}, {kind} prompts", progress)
    return Answers(rows=dict(rows), tokens=tokens, max_new_tokens=max_new_tokens, nats=nats)


def _warn_of_template(chat: ChatModel, replies: Sequence[Sequence[int]], what: str, progress: ProgressReporter) -> None:
    """Say so where replies hold what the template puts between turns: they went on past their own."""
    texts = [chat.decode(reply, skip_special_tokens=False) for reply in replies]
    held = {mark: sum(mark in text for text in texts) for mark in chat.chat_format.turn_texts}
    most = max(held, key=lambda mark: held[mark], default="")
    if held.get(most):
        progress.message(
            f"{what}: {held[most]} of {len(texts)} replies hold {most!r}, which the chat template puts between turns; "
            "they may run past their own turn, and what follows it counts as theirs"
        )


def measure_surprise(
    chat: ChatModel,
    answers: Answers,
    *,
    known: Mapping[str, Surprise] | None = None,
    progress: ProgressReporter = SILENT,
) -> dict[str, Surprise]:
    """Return how unlikely a model finds some replies, by kind: the base's view tells incoherent ones.

    Args:
        chat: the model that is asked.
        answers: the replies.
        known: kind -> what it was found to say already.
        progress: where to show progress.
    """
    found = dict(known or {})
    for kind, rows in answers.rows.items():
        if kind not in found:
            with progress.task(f"Reading {kind} replies (base)", total=len(rows)) as advance:
                found[kind] = completion_surprise(chat, rows, answers.tokens[kind], advance=advance)
    return found


def read_replies(
    chat: ChatModel,
    answers: Answers,
    *,
    surprise: Mapping[str, Surprise] | None = None,
    budgets: Sequence[int] = BUDGETS,
) -> dict[str, list[Reply]]:
    """Take replies apart and classify them, by kind.

    Args:
        chat: the model they come from, or another with the same tokenizer.
        answers: the replies.
        surprise: what the base finds of them; without it, only what is no text at all counts as incoherent.
        budgets: numbers of tokens; each reply is also read as if it had stopped there, where that is within the limit
            that it was generated under. Greedy replies begin alike whatever their limit, so nothing is generated.
    """

    def read(kind: str, replies: Sequence[Sequence[int]], limit: int) -> list[Reply]:
        # What the base finds of the whole reply holds for its beginning, too.
        found = [surprise[kind].per_token(i) for i in range(len(replies))] if surprise else None
        return read_completions(chat, replies, max_new_tokens=limit, nats_per_token=found)

    found = {}
    for kind, tokens in answers.tokens.items():
        whole = read(kind, tokens, answers.max_new_tokens)
        within: list[dict[int, bool]] = [{} for _ in whole]
        for budget in budgets:
            if budget <= answers.max_new_tokens:
                cut = read(kind, [reply[:budget] for reply in tokens], budget)
                for i, reply in enumerate(cut):
                    within[i][budget] = (reply if len(tokens[i]) > budget else whole[i]).refused
        found[kind] = [replace(reply, within=each) for reply, each in zip(whole, within, strict=True)]
    return found


def generate_replies(
    chat: ChatModel,
    rows: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    cache: ReplyCache | None = None,
    ranks: Ranks = ALONE,
    advance: Advance = lambda _n: None,
    weigh: Callable[[int, float], None] | None = None,
) -> list[list[int]]:
    """Generate greedy replies to rendered prompts (token ids), except those that a cache holds.

    Where several processes share the prompts, each keeps what it generates as it comes, and all get all replies.

    Args:
        chat: the model; hooks that are attached to it act.
        rows: token ids of the rendered prompts.
        max_new_tokens: length limit of each reply.
        cache: replies that are there already, and where new ones are kept; None keeps none.
        ranks: the processes that share the prompts.
        advance: called with the number of replies that are there.
        weigh: called with the index of each row whose reply was generated, and with that reply's negative
            log-likelihood; see `GreedyDecoder`.
    """
    weighed: dict[int, float] = {}
    measures = weigh is not None
    decoder = GreedyDecoder(chat=chat, max_new_tokens=max_new_tokens, weigh=weighed.__setitem__ if measures else None)
    own_kept = [None if cache is None else cache.get(row) for row in rows]
    # Each may hold what no other sees: processes run on several machines, and keep files of their own.
    kept = [next((one for one in each if one is not None), None) for each in zip(*ranks.gather(own_kept), strict=True)]
    # Where a prompt is there twice, its reply is generated once.
    places = {tuple(row): i for i, row in reversed(list(enumerate(rows)))}
    missing = [i for i, row in enumerate(rows) if kept[i] is None and places[tuple(row)] == i]
    advance(len(rows) - len(missing))

    def compute(own: Sequence[int]) -> list[tuple[list[int], float | None]]:
        def keep(index: int, reply: list[int]) -> None:
            if cache is not None:
                cache.put(rows[own[index]], reply)

        weighed.clear()
        new = decoder.replies([rows[i] for i in own], advance=lambda n: advance(n * ranks.count), receive=keep)
        return [(reply, weighed.get(index)) for index, reply in enumerate(new)]

    new = dict(zip(missing, ranks.share(missing, compute), strict=True)) if missing else {}
    found = []
    for i, known in enumerate(kept):
        reply, nats = (known, None) if known is not None else new[places[tuple(rows[i])]]
        if weigh is not None and nats is not None:
            weigh(i, nats)
        found.append(reply)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions:
    """Replies of one model to some prompts, by kind; `part` is the way that they were asked, None for the plain one."""

    model: str
    part: str | None
    prompts: Mapping[Kind, PromptSet]
    replies: Mapping[str, Sequence[Reply]]


def write_completions(path: Path, completions: Iterable[Completions]) -> None:
    """Write replies as JSON Lines, those to harmful prompts too.

    Raises:
        OSError: the file cannot be written.
    """
    lines = []
    for each in completions:
        for kind, chosen in each.prompts.items():
            for prompt_id, prompt, reply in zip(chosen.ids, chosen.texts, each.replies[kind], strict=True):
                line = {
                    "model": each.model,
                    "kind": kind,
                    **({"part": each.part} if each.part is not None else {}),
                    "id": prompt_id,
                    "prompt": prompt,
                    "class": reply.reply_class,
                    "completion": reply.answer,
                    "thinking": reply.thinking,
                }
                lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_file(path, "".join(lines))
