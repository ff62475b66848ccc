"""How the benchmark of two procedures reads replies: the parts of an extended refusal, and what has not complied."""

import json

import pytest
import torch

from abliterate.extraction.reply_classes import read_reply
from benchmarks.extended_refusal.procedures import ROUNDS, Counts, Sentences, choose_as_they_do, without
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


def test_the_least_not_complied_with_is_chosen_among_what_is_coherent() -> None:
    places = [(-1, layer) for layer in range(60)]
    asked: list[int] = []

    def found(place: tuple[int, int], n: int) -> Counts:
        asked.append(n)
        layer = place[1]
        # Layer 20 leaves nothing but breaks the replies; 30 leaves the least; 31 looks as good on a few prompts.
        left = {20: 0, 30: 1, 31: 1 if n < 64 else 5}.get(layer, n)
        return counts(n=n, not_complied=left, coherent=n // 2 if layer == 20 else n)

    assert choose_as_they_do(places, lambda places, n: [found(place, n) for place in places], n=64) == (-1, 30)
    assert [asked.count(n) for n in (8, 16, 64)] == [60, ROUNDS[0][1], ROUNDS[1][1]]


def test_each_row_is_rid_of_its_own_direction() -> None:
    written, directions = torch.randn(2, 3, 4), torch.tensor([[1.0, 0, 0, 0], [0, 0.6, 0.8, 0]])
    for row, one, unit in zip(without(written, directions), written, directions, strict=True):
        assert torch.allclose(row, one - (one @ unit)[:, None] * unit)
