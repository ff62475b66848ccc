"""What is asked, and what a base and a model said to it, counted: the part of a report that needs replies alone.

Where the replies come from does not matter here: `run` has them of models in this process, `served` of a server.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from abliterate.evaluation.held_out import HeldOut, hold_out
from abliterate.evaluation.parts import Part, choose_parts, report_part
from abliterate.evaluation.replies import Completions
from abliterate.evaluation.report import (
    KINDS,
    EvaluationOptions,
    Kind,
    count_by_category,
    count_replies,
    refusal_change,
)
from abliterate.extraction.reply_classes import Reply
from abliterate.progress import SILENT, ProgressReporter
from abliterate.prompt_sets import PromptSet, load_prompt_set, prompt_hash

Replies = Mapping[str, list[Reply]]
"""Kind of prompts -> one reply a prompt, in their order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The prompts of an evaluation, held-out ones alone.

    Attributes:
        held_out: kind -> the plain prompts, and how many were left out.
        parts: the same asked in other ways.
    """

    held_out: dict[Kind, HeldOut]
    parts: tuple[Part, ...]

    @property
    def prompts(self) -> dict[Kind, PromptSet]:
        """Kind -> the plain prompts."""
        return {kind: held.prompts for kind, held in self.held_out.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What one model replied: to the plain prompts, and in each part by its name."""

    plain: Replies
    parts: Mapping[str, Replies]


def load_prompts(options: EvaluationOptions) -> dict[Kind, PromptSet]:
    """Return the prompts of each kind; what cannot be read shows before a model is fetched.

    Raises:
        PromptSetError: a SPEC cannot be read.
    """
    return {kind: load_prompt_set(getattr(options, kind), kind=kind, part="test") for kind in KINDS}


def choose_prompts(
    sets: Mapping[Kind, PromptSet],
    options: EvaluationOptions,
    *,
    used: frozenset[str],
    progress: ProgressReporter = SILENT,
) -> Asked:
    """Return what `evaluate` asks.

    Args:
        sets: what `load_prompts` has read.
        options: which parts.
        used: hashes of prompts that a direction was found with; they are left out.
        progress: told what is left out.

    Raises:
        InputError: there is no such part.
        PromptSetError: all prompts of a set were used.
    """
    held_out = {kind: hold_out(chosen, used) for kind, chosen in sets.items()}
    for kind, held in held_out.items():
        if held.repeated:
            progress.message(f"{kind}: {held.repeated} prompts left out, since they repeat another one")
        if held.excluded:
            progress.message(f"{kind}: {held.excluded} prompts left out, since the direction was found with them")
    plain = {kind: held.prompts for kind, held in held_out.items()}
    return Asked(held_out=held_out, parts=choose_parts(options, plain, used))


def count(asked: Asked, model: Said, base: Said | None) -> dict[str, Any]:
    """Return the fields of an `EvaluationReport` that are counts of replies, and which prompts they are of."""
    prompts = asked.prompts
    plain_base = base.plain if base else None
    return {
        "rates": {kind: count_replies(replies) for kind, replies in model.plain.items()},
        "base_rates": {kind: count_replies(found) for kind, found in plain_base.items()} if plain_base else None,
        "changes": {
            kind: refusal_change(plain_base[kind], replies) for kind, replies in model.plain.items() if plain_base
        },
        "parts": {
            part.name: report_part(
                part,
                model.parts[part.name],
                base.parts[part.name] if base else None,
                plain=prompts,
                plain_model=model.plain,
                plain_base=plain_base,
            )
            for part in asked.parts
        },
        "categories": {
            kind: count_by_category(chosen.categories, model.plain[kind], plain_base[kind] if plain_base else None)
            for kind, chosen in prompts.items()
        },
        "outcomes": {
            kind: {
                prompt_hash(text): reply.reply_class
                for text, reply in zip(chosen.texts, model.plain[kind], strict=True)
            }
            for kind, chosen in prompts.items()
        },
        "excluded": {kind: held.excluded for kind, held in asked.held_out.items()},
        "repeated": {kind: held.repeated for kind, held in asked.held_out.items()},
        "prompt_sets": {
            kind: {"name": chosen.name, "n": len(chosen), "sha256": chosen.sha256} for kind, chosen in prompts.items()
        },
    }


def completions_of(asked: Asked, said: Mapping[str, Said | None]) -> Iterator[Completions]:
    """Yield the replies for a file of completions.

    Args:
        asked: the prompts.
        said: what to call each model -> what it said; None where it was not asked.
    """
    for label, side in said.items():
        if side is not None:
            yield Completions(model=label, part=None, prompts=asked.prompts, replies=side.plain)
            for part in asked.parts:
                yield Completions(model=label, part=part.name, prompts=part.prompts, replies=side.parts[part.name])
