"""Refining on models that were trained to refuse: gentler than the direction's own edit, the same twice, or refused."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from abliterate.directions import Direction
from abliterate.editing.strengths import read_strengths
from abliterate.errors import ModelError, NoDirectionError, RefusalBehaviourError
from abliterate.extraction.options import ExtractionOptions, Thresholds
from abliterate.extraction.run import extract_direction
from abliterate.refinement import run
from abliterate.refinement.options import RefinementOptions
from abliterate.refinement.report import FrontierPoint
from abliterate.refinement.run import choose, refine_edit
from tests.support.refusing_models import refusing_model

OPTIONS = RefinementOptions(n_train=24, n_val=16, steps=24, reply_tokens=6)


@cache
def found_direction(directory: Path) -> Direction:
    model = refusing_model("plain", directory)
    options = ExtractionOptions(n_train=32, n_val=16, thresholds=Thresholds(kl=5.0))
    files = {"harmful": str(model.harmful), "harmless": str(model.harmless)}
    return extract_direction(model=model.chat, **files, options=options).directions[0]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("refining")


def test_it_is_gentler_than_the_direction_and_the_same_twice(directory: Path, tmp_path: Path) -> None:
    model, direction = refusing_model("plain", directory), found_direction(directory)
    files = {"harmful": str(model.harmful), "harmless": str(model.harmless)}
    found = [refine_edit(model=model.chat, direction=direction, **files, options=OPTIONS) for _ in range(2)]
    report = found[0].report
    assert report.chosen.unanswered == 0
    assert report.chosen.n_harmful >= 8
    assert report.plain.unanswered == 0
    assert report.chosen.kl < report.plain.kl
    assert report.chosen.cross_entropy < report.plain.cross_entropy
    assert [point.pressure for point in report.frontier] == [0.3, 0.1, 0.03, 0.01]
    assert report.refusal_tokens == ("I",)

    for name, each in zip(("one.json", "other.json"), found, strict=True):
        each.save(tmp_path / name)
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "other.json").read_bytes()
    strengths = read_strengths(tmp_path / "one.json")
    assert (strengths.attn, strengths.mlp) == (report.chosen.attn, report.chosen.mlp)
    assert strengths.direction_sha256 == direction.sha256
    assert len(json.loads((tmp_path / "one.json").read_text())["frontier"]) == 4


def test_where_all_points_leave_too_many_refusals_harder_ones_are_tried(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, direction = refusing_model("plain", directory), found_direction(directory)
    files = {"harmful": str(model.harmful), "harmless": str(model.harmless)}
    monkeypatch.setattr(run, "PRESSURES", (1e-6,))
    report = refine_edit(model=model.chat, direction=direction, **files, options=OPTIONS).report
    assert [point.pressure for point in report.frontier] == [3.0, 1.0, 1e-6]
    assert report.frontier[-1].share_unanswered > OPTIONS.max_refusals
    assert report.chosen.unanswered == 0


def test_a_bare_direction_takes_the_tokens_of_the_replies(directory: Path) -> None:
    model, direction = refusing_model("plain", directory), found_direction(directory)
    bare = replace(direction, metadata={})
    files = {"harmful": str(model.harmful), "harmless": str(model.harmless)}
    report = refine_edit(model=model.chat, direction=bare, **files, options=replace(OPTIONS, steps=4)).report
    assert report.refusal_tokens == ("I",)


def test_refusals_that_first_tokens_do_not_tell_are_refused(directory: Path) -> None:
    direction = found_direction(directory)
    late = refusing_model("late", directory)
    files = {"harmful": str(late.harmful), "harmless": str(late.harmless)}
    with pytest.raises(ModelError, match="first tokens begin 0% of this model's refusals"):
        refine_edit(model=late.chat, direction=direction, **files, options=replace(OPTIONS, reply_tokens=16))


def test_a_model_that_answers_has_nothing_to_refine(directory: Path) -> None:
    model, direction = refusing_model("plain", directory), found_direction(directory)
    files = {"harmful": str(model.harmless), "harmless": str(model.harmful)}
    with pytest.raises(RefusalBehaviourError, match="by its replies the model refuses 0 of"):
        refine_edit(model=model.chat, direction=direction, **files, options=OPTIONS)


def point(*, unanswered: int, kl: float) -> FrontierPoint:
    return FrontierPoint(
        pressure=1.0,
        attn=(1.0,),
        mlp=(1.0,),
        unanswered=unanswered,
        n_harmful=20,
        metric=0.0,
        kl_first=kl,
        kl=kl,
        cross_entropy=1.0,
        base_cross_entropy=1.0,
        n_harmless=20,
    )


def test_the_gentlest_that_leaves_few_enough_is_chosen() -> None:
    points = [point(unanswered=0, kl=0.3), point(unanswered=1, kl=0.1), point(unanswered=5, kl=0.02)]
    assert choose(points, max_refusals=0.05, max_kl=None) is points[1]
    assert choose(points, max_refusals=0.0, max_kl=None) is points[0]
    assert choose(points, max_refusals=1.0, max_kl=None) is points[2]
    assert choose(points, max_refusals=0.0, max_kl=0.2) is points[1]
    with pytest.raises(NoDirectionError, match=r"fewest refusals are 0 of 20, at KL 0\.300"):
        choose(points, max_refusals=0.0, max_kl=0.01)
    with pytest.raises(NoDirectionError, match=r"--max-refusals 0\.050 without --max-kl accepts that"):
        choose(points[1:], max_refusals=0.0, max_kl=None)
