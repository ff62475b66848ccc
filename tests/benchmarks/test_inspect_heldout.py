"""Held-out pairs of `inspect`: the script tells right from wrong."""

import dataclasses

import pytest

from benchmarks.inspect_heldout import CASES, WIDTHS, Maker, main, problems
from tests.support.changed_models import inspect_case


def test_a_pair_is_told_right_and_what_is_not_is_said(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--only", "no such pair"])
    assert main(["--seed", "7", "--only", "projected, MLP only,"]) == 0
    assert "2 right of 2, seed 7" in capsys.readouterr().out
    case = next(made for made in (case(Maker(seed=70, width=96)) for case in CASES) if "MLP only, 96" in made.name)
    found = inspect_case(case, tmp_path)
    assert problems(case, found) == []
    wrong = dataclasses.replace(case, exact=True, k=2, strength=(0.5, 1.0), rank=3, vectors=case.vectors.flip(1))
    assert [each.split()[0] for each in problems(wrong, found)] == [
        "verdict",
        "directions",
        "strength",
        "rank",
        "cosine",
    ]


def test_every_pair_has_weights_of_its_own():
    made = [case(Maker(seed=index, width=WIDTHS[0])) for index, case in enumerate(CASES)]
    assert len({case.name for case in made}) == len(made)
