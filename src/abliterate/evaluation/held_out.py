"""Prompts that were used to find a direction stay out of its evaluation.

The direction file lists the hashes of the prompts that it was found with, and the record of an orthogonalized
checkpoint carries them along, so they are left out without being known.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterate.editing.record import RECORD_NAME
from abliterate.errors import PromptSetError
from abliterate.files import read_json_report
from abliterate.prompt_sets import PromptSet


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """A prompt set without the prompts used before, and how many those were; and how many repeated another one."""

    prompts: PromptSet
    excluded: int
    repeated: int = 0


def used_prompts(metadata: Mapping[str, Any]) -> frozenset[str]:
    """Return the prompt hashes that a direction's metadata lists; none for a direction of another origin."""
    hashes = metadata.get("prompt_hashes")
    return frozenset(str(value) for value in hashes) if isinstance(hashes, list) else frozenset()


def used_for_checkpoint(directory: Path) -> frozenset[str]:
    """Return the hashes of the prompts behind an orthogonalized checkpoint, its earlier edits included.

    A directory without a record is no orthogonalized checkpoint, and nothing was used for it.

    Raises:
        InputError: the record cannot be read.
    """
    return frozenset(_hashes_in(record_of(directory)))


def record_of(directory: Path) -> dict[str, Any]:
    """Return the record of an orthogonalized checkpoint; empty where there is none.

    Raises:
        InputError: it cannot be read.
    """
    path = directory / RECORD_NAME
    return read_json_report(path) if path.is_file() else {}


def hold_out(prompts: PromptSet, used: frozenset[str]) -> HeldOut:
    """Leave out the prompts that were used, and those that repeat another one: they say nothing new.

    Raises:
        PromptSetError: none is left.
    """
    once = prompts.distinct()
    left = once.without(used)
    if len(prompts) and not len(left):
        raise PromptSetError(
            f"{prompts.name}: the direction was found with every one of its {len(prompts)} prompts, so rates on them "
            "would say nothing; evaluate on other prompts"
        )
    return HeldOut(prompts=left, excluded=len(once) - len(left), repeated=len(prompts) - len(once))


def _hashes_in(value: Any) -> Iterable[str]:
    """Find every `prompt_hashes` in a record, however deep: a checkpoint may rest on several directions and edits."""
    if isinstance(value, Mapping):
        yield from used_prompts(value)
        for item in value.values():
            yield from _hashes_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from _hashes_in(item)
