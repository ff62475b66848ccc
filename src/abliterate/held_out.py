"""Keeping the prompts a direction was found with out of its evaluation.

The direction file lists the hashes of the prompts it was extracted with; the record of an orthogonalized checkpoint
carries the direction's metadata along. So both are known without the prompts themselves.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterate.editing.record import RECORD_NAME, read_json_report
from abliterate.errors import PromptSetError
from abliterate.prompt_sets import PromptSet


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """A prompt set without the prompts used before, and how many those were."""

    prompts: PromptSet
    excluded: int


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
    path = directory / RECORD_NAME
    return frozenset(_hashes_in(read_json_report(path))) if path.is_file() else frozenset()


def hold_out(prompts: PromptSet, used: frozenset[str]) -> HeldOut:
    """Leave the prompts that were used out.

    Raises:
        PromptSetError: none is left.
    """
    left = prompts.without(used)
    if len(prompts) and not len(left):
        raise PromptSetError(
            f"{prompts.name}: the direction was found with every one of its {len(prompts)} prompts, so rates on them "
            "would say nothing; evaluate on other prompts"
        )
    return HeldOut(prompts=left, excluded=len(prompts) - len(left))


def _hashes_in(value: Any) -> Iterable[str]:
    """Find every `prompt_hashes` in a record, however deep: a checkpoint may rest on several directions and edits."""
    if isinstance(value, Mapping):
        yield from used_prompts(value)
        for item in value.values():
            yield from _hashes_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from _hashes_in(item)
