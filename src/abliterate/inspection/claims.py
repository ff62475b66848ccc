"""What comes along with a model and says what was done to it, held against the bytes: its record and its card.

The record of `orthogonalize` names every edited tensor, the directions and the options; where there is a base, each of
those can be held against what was found. What other tools write beside a model has no form that could be read, but for
the card's front matter.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from abliterate.checkpoints.model_source import card_facts, read_front_matter
from abliterate.editing.options import EditOptions
from abliterate.editing.record import RECORD_NAME, AbliterationRecord, check_sizes, decode_subspace, read_record
from abliterate.errors import AbliterateError, InputError
from abliterate.files import in_one_line, printable
from abliterate.formats.gguf_checkpoint import config_sha256
from abliterate.inspection.consensus import cosine_of
from abliterate.inspection.findings import Finding
from abliterate.inspection.numbers import Array
from abliterate.inspection.report import RecordReading
from abliterate.inspection.verdict import STRENGTH_TOLERANCE, Judgement

CARD_NAME = "README.md"
_EDIT_WORDS = ("abliterat", "uncensor", "orthogonal", "decensor", "heretic", "merge", "finetun", "fine-tun", "quant")
_LEAST_COSINE = 0.99
_MOST_NAMED = 3


def read_claims(directory: Path) -> tuple[AbliterationRecord | None, RecordReading]:
    """Return the record beside a model, where there is one that can be read, and what it and the card say.

    Args:
        directory: That of the model.
    """
    record, problems = None, []
    if (directory / RECORD_NAME).is_file():
        try:
            record = read_record(directory)
            check_sizes(record)
        except AbliterateError as error:
            problems.append(in_one_line(error))
    card = read_front_matter(directory / CARD_NAME) or {}
    return record, RecordReading(
        record=RECORD_NAME if (directory / RECORD_NAME).is_file() else None,
        problems=tuple(problems),
        claims=_claims(record) if record is not None else {},
        base_model=card_facts(card).base_model,
        tags=_tags(card),
    )


def recorded_directions(record: AbliterationRecord | None) -> Array | None:
    """Return the rows that a record says were projected out; None where it says none that can be read."""
    try:
        found = None if record is None else record.content.get("subspace")
        return decode_subspace(found) if isinstance(found, dict) else None
    except InputError:
        return None


def hold_against(
    record: AbliterationRecord,
    *,
    base: Path,
    names: Collection[str],
    findings: Sequence[Finding],
    judgement: Judgement,
) -> tuple[str, ...]:
    """Return where a record does not describe what was found beside a base, a line each.

    Args:
        record: The record.
        base: Where the base lies.
        names: All tensors of the model.
        findings: What became of each tensor.
        judgement: What was done.
    """
    try:
        options = EditOptions.of_record(record.content.get("options") or {})
    except InputError as error:
        return (in_one_line(error),)
    problems = []
    said = record.content["base"].get("config_file_sha256")
    if said is not None and said != config_sha256(base):
        problems.append("the base that it names has another config.json than the one given")
    problems += _tensors(record, names, findings, judgement)
    problems += _options(record, options, findings, judgement)
    return tuple(problems)


def _tensors(
    record: AbliterationRecord, known: Collection[str], findings: Sequence[Finding], judgement: Judgement
) -> list[str]:
    entries = {str(entry.get("name")): entry for entry in record.content.get("tensors") or ()}
    edited = {finding.pair.new.name for finding in findings if finding.is_edited} | set(judgement.added)
    silent = {name for name, entry in entries.items() if entry.get("kind") == "untied" or _had_nothing(entry)}
    lines = []
    for names, what in (
        (sorted(edited - entries.keys()), "does not name {}, which is changed"),
        (sorted((entries.keys() & set(known)) - edited - silent), "names {} as edited, which is not"),
        (sorted(entries.keys() - set(known)), "names {}, which is not there"),
    ):
        if names:
            more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
            lines.append(what.format(f"{len(names)} of the tensors ({', '.join(names[:_MOST_NAMED])}{more})"))
    return lines


def _had_nothing(entry: Mapping[str, Any]) -> bool:
    return entry.get("component_before") in (None, 0)


def _options(
    record: AbliterationRecord, options: EditOptions, findings: Sequence[Finding], judgement: Judgement
) -> list[str]:
    problems = []
    rows = recorded_directions(record)
    consensus = judgement.consensus
    by_layer = options.strengths is not None and options.strengths.directions is not None
    if options.add is None and consensus is None and any(finding.is_edited for finding in findings):
        problems.append("says that directions were projected out, and the change is no projection")
    if options.add is None and consensus is not None and rows is not None and not by_layer:
        cosine = cosine_of(rows, consensus.vectors)
        if len(rows) != len(consensus.vectors) or cosine < _LEAST_COSINE:
            problems.append(
                f"its {len(rows)} directions are not the {len(consensus.vectors)} that were projected out (cosine "
                f"{cosine:.3f})"
            )
    if options.add is None and options.strengths is None:
        for finding in findings:
            found = judgement.strengths.get(finding.pair.new.name)
            if found is not None and abs(found - options.strength) > STRENGTH_TOLERANCE + 0.05 * options.strength:
                problems.append(
                    f"says strength {options.strength:g}, and {finding.pair.new.name} was edited with {found:.3f}"
                )
                break
    if consensus is not None and options.preserve_norms != judgement.restored_norms:
        what = "were kept, and they were not" if options.preserve_norms else "were not kept, and they were"
        problems.append(f"says that lengths {what}")
    return problems


def _claims(record: AbliterationRecord) -> dict[str, Any]:
    content = record.content
    options = content.get("options") or {}
    return {
        "base": content["base"].get("model"),
        "revision": content["base"].get("revision"),
        "tool": (content.get("tool") or {}).get("abliterate"),
        "created": content.get("created"),
        "directions": [each.get("sha256") for each in content["directions"]],
        "strength": options.get("strength"),
        "tensors": len(content.get("tensors") or ()),
        "shards": len(content.get("shards") or ()),
    }


def _tags(card: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the tags of a card's front matter that speak of an edit."""
    tags = card.get("tags")
    named = [printable(tag) for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []
    return tuple(tag for tag in named if any(word in tag.lower() for word in _EDIT_WORDS))
