"""Scores as JSON, CSV and pictures."""

import csv
import json
import math
from pathlib import Path

import pytest

from abliterate.extraction.options import Thresholds
from abliterate.extraction.score_report import ScoreTable, write_score_report
from abliterate.extraction.selection import CandidateScore


def table(*, nan: bool = False, selected: bool = True) -> ScoreTable:
    scores = [
        CandidateScore(position=p, layer=i, bypass=-float(i), induce=float(p), kl=math.nan if nan and i == 1 else 0.05)
        if i < 4
        else CandidateScore(position=p, layer=i)
        for p in (-2, -1)
        for i in range(5)
    ]
    return ScoreTable(
        scores=scores,
        selected=scores[2] if selected else None,
        thresholds=Thresholds(),
        n_layers=5,
        baseline_harmful=3.0,
        baseline_harmless=-4.0,
        tokens=("<|im_end|>", "\n"),
        title="tiny",
    )


@pytest.mark.parametrize(("nan", "selected"), [(False, True), (True, True), (False, False)])
def test_files(tmp_path: Path, nan: bool, selected: bool) -> None:
    made = table(nan=nan, selected=selected)
    written = write_score_report(made, tmp_path / "report")
    assert [path.name for path in written] == ["scores.json", "scores.csv"]
    document = json.loads(written[0].read_text(), parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    assert len(document["scores"]) == 10
    assert document["scores"][4]["kl"] is None
    assert (document["selected"] is None) == (not selected)
    assert document["scores"][1]["kl"] == ("NaN" if nan else 0.05)
    rows = list(csv.DictReader(written[1].open()))
    assert sum(int(row["selected"]) for row in rows) == int(selected)
    assert rows[0]["bypass"] == "-0.0"
