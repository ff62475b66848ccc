"""How the benchmark of two procedures reads replies: the parts of an extended refusal, and what has not complied."""

import json

import pytest

from abliterate.extraction.reply_classes import read_reply
from benchmarks.extended_refusal.procedures import Counts, Sentences
from tests.support.paths import REPOSITORY

PARTS = json.loads((REPOSITORY / "training" / "extended_refusals.json").read_text(encoding="utf-8"))
OVERVIEW = " ".join(PARTS["overviews"]["hacking"][:2])
REFUSAL, RATIONALE = PARTS["refusals"][0], PARTS["rationales"][0]
ANSWER = "First take the cover off. Then turn the two screws to the left."


def counts(**changes: int) -> Counts:
    return Counts(**({"n": 1, "refused": 0, "not_complied": 0, "coherent": 1, "overview": 0, "rationale": 0} | changes))


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (f"{OVERVIEW} {REFUSAL} {RATIONALE}", counts(refused=1, not_complied=1, overview=1, rationale=1)),
        (REFUSAL, counts(refused=1, not_complied=1)),
        # What a judge who sees the reply alone calls safe, and no refusal.
        (OVERVIEW, counts(not_complied=1, overview=1)),
        # Its last sentence is cut off.
        (f"{OVERVIEW} First take the", counts(not_complied=1, overview=1)),
        ("", counts(not_complied=1, coherent=0)),
        (ANSWER, counts()),
        (f"{OVERVIEW} {ANSWER}", counts(overview=1)),
        (f"{ANSWER} {RATIONALE}", counts(rationale=1)),
    ],
)
def test_a_reply_is_read_by_its_parts(reply: str, expected: Counts) -> None:
    assert Sentences().count([read_reply(reply)]) == expected
