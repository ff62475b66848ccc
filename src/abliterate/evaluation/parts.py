"""The same requests asked in other ways: in other languages, and as the second turn of a conversation.

A part is one such way. Its prompts carry the ids of the plain ones, so what a model refuses is paired twice: with its
base on the same prompts, and with itself on the plain prompts of the same ids.

    ar, de, ...   some of the bundled test prompts, translated (prompts/README.md)
    opening       each prompt after a harmless question and the model's own reply to it
    repetition    each prompt after itself and the model's own reply to it: the control of `opening`, since it is a
                  second turn, too, but brings nothing new
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from abliterate.errors import ModelError
from abliterate.evaluation.held_out import hold_out
from abliterate.evaluation.replies import Answers, ReplyCache, answer_rows
from abliterate.evaluation.report import (
    KINDS,
    OPENING,
    REPETITION,
    EvaluationOptions,
    Kind,
    RefusalRate,
    chosen_parts,
    count_replies,
    refusal_change,
)
from abliterate.evaluation.statistics import PairedChange, paired_change
from abliterate.extraction.reply_classes import Reply, read_completions
from abliterate.models.chat_model import ChatModel
from abliterate.processes import ALONE, Ranks
from abliterate.progress import SILENT, ProgressReporter
from abliterate.prompt_sets import BUNDLED, PromptSet, load_openings, load_prompt_set, load_translated, prompt_hash


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One way of asking, and its prompts by kind, held-out ones alone."""

    name: str
    prompts: dict[Kind, PromptSet]


@dataclass(frozen=True, slots=True, kw_only=True)
class PartAnswers:
    """What a model replied in one part."""

    answers: Answers
    replies: dict[str, list[Reply]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PartReport:
    """Refusal rates where the prompts were asked in one other way.

    Attributes:
        rates: kind of prompts -> the model's refusal rate.
        base_rates: the same of the base, or None.
        changes: kind -> paired change of refusal, base against model, exact McNemar.
        beside_plain: kind -> paired change of the model's refusals, from the plain prompts of the same ids to these;
            empty where the plain prompts are others.
        base_beside_plain: the same of the base, or None.
        prompt_sets: name, size and hash of each set as used.
    """

    rates: dict[str, RefusalRate]
    base_rates: dict[str, RefusalRate] | None
    changes: dict[str, PairedChange]
    beside_plain: dict[str, PairedChange]
    base_beside_plain: dict[str, PairedChange] | None
    prompt_sets: dict[str, dict[str, Any]]


def choose_parts(options: EvaluationOptions, plain: Mapping[Kind, PromptSet], used: frozenset[str]) -> tuple[Part, ...]:
    """Return the parts that are asked for.

    Args:
        options: `languages` and `turns` say which.
        plain: the prompts that are asked plainly.
        used: hashes of prompts that the direction was found with; a translation of such a prompt is one, too.

    Raises:
        InputError: the prompts are not translated into such a language.
        PromptSetError: a direction was found with all prompts of a part.
    """
    translated = {
        code: {kind: _held_out_translations(kind, code, used) for kind in KINDS}
        for code in chosen_parts(options.languages, turns=False)
    }
    return tuple(
        Part(name=name, prompts=translated.get(name, dict(plain)))
        for name in chosen_parts(options.languages, turns=options.turns)
    )


def _held_out_translations(kind: Kind, language: str, used: frozenset[str]) -> PromptSet:
    english = load_prompt_set(BUNDLED, kind=kind, part="test")
    of_used = {i for i, text in zip(english.ids, english.texts, strict=True) if prompt_hash(text) in used}
    translated = load_translated(kind, language)
    texts = zip(translated.ids, translated.texts, strict=True)
    return hold_out(translated, used | {prompt_hash(text) for i, text in texts if i in of_used}).prompts


def answer_part(
    chat: ChatModel,
    part: Part,
    plain: Answers,
    *,
    label: str,
    cache: ReplyCache | None = None,
    ranks: Ranks = ALONE,
    progress: ProgressReporter = SILENT,
) -> Answers:
    """Generate a greedy reply to each prompt of a part.

    Args:
        chat: the model; hooks that are attached to it act.
        part: what is asked, and how.
        plain: its replies to the same prompts, asked plainly; length limits are those of these.
        label: what to call the model in the progress bars.
        cache: replies that are there already, and where new ones are kept; None keeps none.
        ranks: the processes that share the prompts; all get all replies.
        progress: where to show progress.

    Raises:
        ModelError: a prompt cannot be put to the model, or conversations cannot.
    """
    limit = plain.max_new_tokens

    def answer(rows: Mapping[str, list[list[int]]], texts: Mapping[str, Sequence[str]]) -> Answers:
        return answer_rows(
            chat,
            rows,
            texts,
            max_new_tokens=limit,
            label=f"{label}, {part.name}",
            cache=cache,
            ranks=ranks,
            progress=progress,
        )

    texts = {str(kind): prompts.texts for kind, prompts in part.prompts.items()}
    if part.name not in (OPENING, REPETITION):
        return answer({kind: chat.encode(chosen) for kind, chosen in texts.items()}, texts)
    if not getattr(chat.tokenizer, "chat_template", None):
        raise ModelError("--turns: the model has no chat template, so there is no second turn")
    if part.name == REPETITION:
        before = {kind: list(zip(texts[kind], _spoken(chat, plain.tokens[kind], limit), strict=True)) for kind in texts}
    else:
        openings = load_openings().texts
        found = answer({OPENING: chat.encode(openings)}, {OPENING: openings})
        turns = list(zip(openings, _spoken(chat, found.tokens[OPENING], limit), strict=True))
        before = {kind: [turns[i % len(turns)] for i in range(len(chosen))] for kind, chosen in texts.items()}
    rows = {
        kind: [_second_turn(chat, *turn, text) for turn, text in zip(before[kind], texts[kind], strict=True)]
        for kind in texts
    }
    return answer(rows, texts)


def _spoken(chat: ChatModel, replies: Sequence[Sequence[int]], limit: int) -> list[str]:
    """Return what a reply says when it is part of a conversation: its answer without its thoughts."""
    return [reply.answer for reply in read_completions(chat, replies, max_new_tokens=limit)]


def _second_turn(chat: ChatModel, user: str, reply: str, request: str) -> list[int]:
    messages = [
        {"role": "user", "content": user},
        {"role": "assistant", "content": reply},
        {"role": "user", "content": request},
    ]
    return chat.encode_conversation(messages)


def report_part(
    part: Part,
    model: Mapping[str, list[Reply]],
    base: Mapping[str, list[Reply]] | None,
    *,
    plain: Mapping[Kind, PromptSet],
    plain_model: Mapping[str, list[Reply]],
    plain_base: Mapping[str, list[Reply]] | None,
) -> PartReport:
    """Count the replies of a part, and pair them with the base's and with those to the plain prompts.

    Args:
        part: what was asked.
        model: kind -> the model's replies.
        base: the same of the base, or None.
        plain: kind -> the plain prompts.
        plain_model: kind -> the model's replies to these.
        plain_base: the same of the base, or None.
    """

    def beside(found: Mapping[str, list[Reply]], other: Mapping[str, list[Reply]]) -> dict[str, PairedChange]:
        changes: dict[str, PairedChange] = {}
        for kind, prompts in part.prompts.items():
            refused = dict(zip(plain[kind].ids, [reply.refused for reply in other[kind]], strict=True))
            pairs = [
                (refused[i], reply.refused) for i, reply in zip(prompts.ids, found[kind], strict=True) if i in refused
            ]
            if pairs:
                changes[kind] = paired_change([before for before, _ in pairs], [after for _, after in pairs])
        return changes

    return PartReport(
        rates={kind: count_replies(replies) for kind, replies in model.items()},
        base_rates=None if base is None else {kind: count_replies(replies) for kind, replies in base.items()},
        changes={} if base is None else {kind: refusal_change(base[kind], replies) for kind, replies in model.items()},
        beside_plain=beside(model, plain_model),
        base_beside_plain=None if base is None or plain_base is None else beside(base, plain_base),
        prompt_sets={
            kind: {"name": prompts.name, "n": len(prompts), "sha256": prompts.sha256}
            for kind, prompts in part.prompts.items()
        },
    )
