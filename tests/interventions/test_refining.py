"""Refining on models that were trained to refuse: gentler than the direction's own edit, the same twice, or refused."""

import json
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from abliterate.directions import Direction
from abliterate.editing.strengths import read_strengths
from abliterate.errors import InterruptedRunError, ModelError, NoDirectionError, RefusalBehaviourError
from abliterate.extraction.options import ExtractionOptions, RepairOptions, Thresholds
from abliterate.extraction.repair import extract_repair
from abliterate.extraction.run import extract_direction
from abliterate.interventions import refining
from abliterate.interventions.own_directions import stream_means
from abliterate.interventions.refinement_options import RefinementOptions
from abliterate.interventions.refinement_report import FrontierPoint
from abliterate.interventions.refining import choose, refine_edit
from abliterate.models.options import ModelOptions
from abliterate.prompt_sets import prompt_hash
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
    assert report.chosen.n_to_answer >= 8
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


def test_interrupted_it_goes_on_with_the_points_that_it_has(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, direction = refusing_model("plain", directory), found_direction(directory)
    saved = tmp_path / "model"
    model.chat.model.save_pretrained(saved)
    model.chat.tokenizer.save_pretrained(saved)
    given = {
        "model": saved,
        "direction": direction,
        "harmful": str(model.harmful),
        "harmless": str(model.harmless),
        "model_options": ModelOptions(system_prompt=model.chat.system_prompt),
    }
    options = replace(OPTIONS, steps=4)
    refine_edit(**given, options=options).save(tmp_path / "whole")
    measured: list[float | None] = []
    point = refining._Measure.point

    def interrupted(self, edit, strengths, pressure):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(pressure)
        return point(self, edit, strengths, pressure)

    monkeypatch.setattr(refining._Measure, "point", interrupted)
    with pytest.raises(InterruptedRunError, match="the same command goes on from there"):
        refine_edit(**given, options=options, work_directory=tmp_path / "work")
    assert measured == [None, 0.3, 0.1]
    # Replies to harmful prompts are not written.
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["KEY.json", "lock", "values.jsonl"]
    again: list[float | None] = []
    monkeypatch.setattr(refining._Measure, "point", lambda self, *a: again.append(a[-1]) or point(self, *a))
    # Limits choose among the points and do not change them.
    strict = replace(options, max_refusals=0.0, max_kl=1e-12)
    with suppress(NoDirectionError):
        refine_edit(**given, options=strict, work_directory=tmp_path / "work", deliver=_fail)
    assert again[:2] == [0.03, 0.01]
    again.clear()
    refine_edit(**given, options=options, work_directory=tmp_path / "work").save(tmp_path / "resumed")
    assert not again
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not (tmp_path / "work").exists()


def _fail(_found: object) -> None:
    raise NoDirectionError("not wanted")


def test_where_all_points_leave_too_many_refusals_harder_ones_are_tried(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, direction = refusing_model("plain", directory), found_direction(directory)
    files = {"harmful": str(model.harmful), "harmless": str(model.harmless)}
    monkeypatch.setattr(refining, "PRESSURES", (1e-6,))
    report = refine_edit(model=model.chat, direction=direction, **files, options=OPTIONS).report
    assert [point.pressure for point in report.frontier] == [3.0, 1.0, 1e-6]
    assert report.frontier[-1].share_unanswered > refining.MAX_REFUSALS["remove"]
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


def test_false_refusals_go_and_true_ones_are_held(tmp_path: Path) -> None:
    model = refusing_model("wary", tmp_path)
    files = {"harmful": str(model.harmful), "harmless": str(model.harmless)}
    found = extract_repair(
        model=model.chat,
        **files,
        options=ExtractionOptions(n_train=48, n_val=24, thresholds=Thresholds(kl=5.0)),
        repair=RepairOptions(borderline=str(model.borderline)),
    )
    options = replace(OPTIONS, n_train=48, borderline=str(model.borderline))
    refined = refine_edit(model=model.chat, direction=found.direction, **files, options=options)
    report = refined.report
    assert report.goal == "repair"
    assert report.chosen.refused == report.chosen.n_to_refuse == 16
    assert report.chosen.unanswered <= 0.05 * report.chosen.n_to_answer
    assert report.chosen.kl < 0.05
    assert {prompt_hash(text) for text in model.borderline.read_text().splitlines()} <= set(refined.prompt_hashes)
    # Each layer's own direction has nothing of what tells harmful from harmless prompts there.
    rows = {name: model.chat.encode(Path(file).read_text().splitlines()) for name, file in files.items()}
    means = [stream_means(model.chat, rows[kind], position=-1) for kind in ("harmful", "harmless")]
    cosines = torch.nn.functional.cosine_similarity(refined.directions, means[0] - means[1], dim=1)
    assert float(cosines.abs().max()) < 0.2


def point(*, unanswered: int, kl: float) -> FrontierPoint:
    return FrontierPoint(
        pressure=1.0,
        attn=(1.0,),
        mlp=(1.0,),
        unanswered=unanswered,
        n_to_answer=20,
        metric=0.0,
        kl_first=kl,
        kl=kl,
        cross_entropy=1.0,
        base_cross_entropy=1.0,
        n_to_stay=20,
    )


def test_what_costs_too_many_true_refusals_is_not_chosen() -> None:
    points = [
        replace(point(unanswered=unanswered, kl=kl), refused=refused, n_to_refuse=20)
        for unanswered, kl, refused in ((0, 0.1, 15), (1, 0.2, 19))
    ]
    assert choose(points, max_refusals=0.1, max_kl=None, max_lost=0.1) is points[1]
    assert choose(points, max_refusals=0.1, max_kl=None, max_lost=0.3) is points[0]
    with pytest.raises(NoDirectionError, match=r"the most are 19 of 20; --max-lost 0\.05 accepts that"):
        choose(points, max_refusals=0.1, max_kl=None, max_lost=0.0)


def test_the_gentlest_that_leaves_few_enough_is_chosen() -> None:
    points = [point(unanswered=0, kl=0.3), point(unanswered=1, kl=0.1), point(unanswered=5, kl=0.02)]
    assert choose(points, max_refusals=0.05, max_kl=None) is points[1]
    assert choose(points, max_refusals=0.0, max_kl=None) is points[0]
    assert choose(points, max_refusals=1.0, max_kl=None) is points[2]
    assert choose(points, max_refusals=0.0, max_kl=0.2) is points[1]
    with pytest.raises(NoDirectionError, match=r"fewest refusals are 0 of 20, at KL 0\.300"):
        choose(points, max_refusals=0.0, max_kl=0.01)
    with pytest.raises(NoDirectionError, match=r"--max-refusals 0\.05 without --max-kl accepts that"):
        choose(points[1:], max_refusals=0.0, max_kl=None)
