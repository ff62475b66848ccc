"""Write the figures of docs/replies.md anew: how well our own sentences are told apart by what `evaluate` counts.

    python -m scripts.replies

The sentences lie in tests/data/replies, one file a language. What stands between `<!-- results: NAME -->` and
`<!-- end of results -->` is replaced; the prose around it is written by hand.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from abliterate.evaluation.statistics import wilson_interval
from abliterate.extraction.reply_classes import Reply, is_refusal, read_reply
from scripts.results import with_block

REPOSITORY = Path(__file__).parents[1]
DATA = REPOSITORY / "tests" / "data" / "replies"
DOCUMENT = REPOSITORY / "docs" / "replies.md"
TUNED, HELD_OUT, LAST = "tuned", "held out", "written last"
NAMES = {
    "ar": "Arabic", "de": "German", "en": "English", "es": "Spanish", "fr": "French", "hi": "Hindi", "it": "Italian",
    "ja": "Japanese", "ko": "Korean", "nl": "Dutch", "pl": "Polish", "pt": "Portuguese", "ru": "Russian",
    "sl": "Slovene", "tr": "Turkish", "zh": "Chinese",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentence:
    """One sentence of ours: its part, whether it is what is looked for, and its text."""

    part: str
    wanted: bool
    text: str
    kind: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """How many sentences were told right and wrong."""

    right: int
    wrong: int
    missed: int

    @property
    def precision(self) -> float:
        """Share of those that were told which are."""
        return self.right / max(1, self.right + self.wrong)

    @property
    def recall(self) -> float:
        """Share of those that are which were told."""
        return self.right / max(1, self.right + self.missed)

    def cells(self) -> tuple[str, str]:
        """Return precision and recall in words, with Wilson intervals."""
        return _share(self.right, self.right + self.wrong), _share(self.right, self.right + self.missed)


def _share(part: int, whole: int) -> str:
    if not whole:
        return "none told"
    low, high = wilson_interval(part, whole)
    return f"{part}/{whole}: {part / max(1, whole):.1%} [{low:.1%}, {high:.1%}]"


def sentences(language: str) -> list[Sentence]:
    """Return the sentences of a language, by what refuses."""
    lines = map(json.loads, (DATA / f"{language}.jsonl").read_text(encoding="utf-8").splitlines())
    return [Sentence(part=line["half"], wanted=line["refusal"], text=line["text"]) for line in lines]


def deflections() -> list[Sentence]:
    """Return the English sentences that deflect, give an overview, or answer."""
    lines = map(json.loads, (DATA / "deflections.jsonl").read_text(encoding="utf-8").splitlines())
    return [
        Sentence(part=line["half"], wanted=line["kind"] == "deflection", text=line["text"], kind=line["kind"])
        for line in lines
    ]


def refused(text: str) -> bool:
    """Tell whether a reply counts as a refusal."""
    return read_reply(text).refused


def strict(text: str) -> bool:
    """Tell whether a reply counts as one in the strict sense."""
    return read_reply(text).strict


def tell(found: Sequence[Sentence], rule: Callable[[str], bool]) -> Told:
    """Count what a rule tells right and wrong."""
    told = [(one.wanted, rule(one.text)) for one in found]
    return Told(right=told.count((True, True)), wrong=told.count((False, True)), missed=told.count((True, False)))


def part_of(language: str, part: str) -> list[Sentence]:
    """Return the sentences of one part of a language."""
    return [one for one in sentences(language) if one.part == part]


def of_all_languages(part: str) -> list[Sentence]:
    """Return the sentences of one part of all languages but English."""
    return [one for language in NAMES if language != "en" for one in part_of(language, part)]


def languages_table() -> str:
    """Return how well refusals are told in each language."""
    rows = [
        "| language | held out, precision | held out, recall | unusual, precision | unusual, recall |",
        "|---|---|---|---|---|",
    ]
    for language, name in NAMES.items():
        if language != "en":
            told = [tell(part_of(language, part), refused) for part in (HELD_OUT, LAST)]
            counts = [
                cell
                for one in told
                for cell in (f"{one.right}/{one.right + one.wrong}", f"{one.right}/{one.right + one.missed}")
            ]
            rows.append(f"| {name} | " + " | ".join(counts) + " |")
    together = [cell for part in (HELD_OUT, LAST) for cell in tell(of_all_languages(part), refused).cells()]
    published = [cell for part in (HELD_OUT, LAST) for cell in tell(of_all_languages(part), is_refusal).cells()]
    rows += [
        "| all | " + " | ".join(together) + " |",
        "| the twelve substrings alone | " + " | ".join(published) + " |",
    ]
    return "\n".join(rows)


def strict_table() -> str:
    """Return how well refusals are told among English sentences that mostly hold one of the substrings."""
    rows = ["| English sentences | rule | precision | recall |", "|---|---|---|---|"]
    for part in (HELD_OUT, LAST):
        for name, rule in (("published", refused), ("strict", strict)):
            rows.append(f"| {part} | {name} | " + " | ".join(tell(part_of("en", part), rule).cells()) + " |")
    return "\n".join(rows)


def deflections_table() -> str:
    """Return what is told a deflection among deflections, overviews and answers."""
    rows = ["| half | deflections told | overviews told | answers told |", "|---|---|---|---|"]
    for part in (TUNED, HELD_OUT):
        cells = []
        for kind in ("deflection", "overview", "answer"):
            replies = [_read(one) for one in deflections() if (one.part, one.kind) == (part, kind)]
            cells.append(f"{sum(reply.reply_class == 'deflection' for reply in replies)} of {len(replies)}")
        rows.append(f"| {part} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _read(sentence: Sentence) -> Reply:
    return read_reply(sentence.text)


def document() -> str:
    """Return docs/replies.md as it should be."""
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, block in (
        ("languages", languages_table()),
        ("strict", strict_table()),
        ("deflections", deflections_table()),
    ):
        text = with_block(text, name, block)
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
