"""The published runs come out exactly, and the lazy way chooses what the exhaustive way chooses."""

import json
import math
import random

import pytest

from abliterate.extraction.options import Thresholds
from abliterate.extraction.selection import (
    CandidateScore,
    best_by_each_score,
    failed_thresholds,
    nearest_candidates,
    passing_candidates,
    score_lazily,
)
from tests.support.paths import GOLDEN

LAYERS = {
    "gemma-2b-it": 18,
    "llama-2-7b-chat-hf": 32,
    "meta-llama-3-8b-instruct": 32,
    "qwen-1_8b-chat": 24,
    "yi-6b-chat": 32,
}
PASSING = {
    "gemma-2b-it": 13,
    "llama-2-7b-chat-hf": 5,
    "meta-llama-3-8b-instruct": 25,
    "qwen-1_8b-chat": 12,
    "yi-6b-chat": 7,
}


def published_scores(name: str, file: str = "direction_evaluations.json") -> list[CandidateScore]:
    rows = json.loads((GOLDEN / name / file).read_text())
    return [
        CandidateScore(
            position=row["position"],
            layer=row["layer"],
            bypass=row["refusal_score"],
            induce=row["steering_score"],
            kl=row["kl_div_score"],
        )
        for row in rows
    ]


def lazily(
    scores: list[CandidateScore], n_layers: int, thresholds: Thresholds, **settings
) -> tuple[list[CandidateScore], int]:
    table = {(s.position, s.layer): s for s in scores}
    calls = 0

    def compute(name: str, keys: list[tuple[int, int]]) -> list[dict[str, float]]:
        nonlocal calls
        names = ("bypass", "kl") if name == "ablated" else (name,)
        calls += len(names) * len(keys)
        return [{n: getattr(table[key], n) for n in names} for key in keys]

    found = score_lazily(list(table), thresholds=thresholds, n_layers=n_layers, compute=compute, **settings)
    return passing_candidates(found, thresholds=thresholds, n_layers=n_layers), calls


@pytest.mark.parametrize("name", LAYERS)
def test_published_choices_and_filtered_sets(name: str) -> None:
    passing = passing_candidates(published_scores(name), thresholds=Thresholds(), n_layers=LAYERS[name])
    chosen = json.loads((GOLDEN / name / "direction_metadata.json").read_text())
    assert (passing[0].position, passing[0].layer) == (chosen["pos"], chosen["layer"])
    assert len(passing) == PASSING[name]
    expected = {(s.position, s.layer) for s in published_scores(name, "direction_evaluations_filtered.json")}
    assert {(s.position, s.layer) for s in passing} == expected


def test_the_floor_in_the_layer_limit_matters() -> None:
    scores = [s for s in published_scores("yi-6b-chat") if s.induce >= 0 and s.kl <= 0.1]
    literal = [s for s in scores if s.layer < 0.8 * 32]
    assert Thresholds().layer_limit(32) == 25
    assert min(literal, key=lambda s: s.bypass).layer == 25  # what the paper's l < 0.8 L would choose


@pytest.mark.parametrize("name", LAYERS)
def test_lazy_choice_on_published_scores(name: str) -> None:
    scores = published_scores(name)
    passing, calls = lazily(scores, LAYERS[name], Thresholds())
    assert passing[0] == passing_candidates(scores, thresholds=Thresholds(), n_layers=LAYERS[name])[0]
    assert calls < 3 * len(scores) / 2


def test_lazy_choice_on_random_scores() -> None:
    rng = random.Random(5)
    for _ in range(500):
        n_layers, n_positions = rng.randint(2, 12), rng.randint(1, 4)

        def draw(low: float, high: float) -> float:
            return math.nan if rng.random() < 0.03 else round(rng.uniform(low, high), 1)

        scores = [
            CandidateScore(position=p, layer=i, bypass=draw(-3, 3), induce=draw(-2, 2), kl=draw(0, 0.3))
            for p in range(-n_positions, 0)
            for i in range(n_layers)
        ]
        thresholds = Thresholds(kl=0.1, induce=0.0, prune_layers=rng.choice([0.0, 0.2, 0.5]))
        expected = passing_candidates(scores, thresholds=thresholds, n_layers=n_layers)
        for kl_at_once in (1, 3, None):
            passing, _ = lazily(scores, n_layers, thresholds, kl_at_once=kl_at_once)
            assert passing[:1] == expected[:1]


def test_nan_in_any_score_fails() -> None:
    for name in ("bypass", "induce", "kl"):
        values = {"bypass": -1.0, "induce": 1.0, "kl": 0.0} | {name: math.nan}
        score = CandidateScore(position=-1, layer=0, **values)
        assert failed_thresholds(score, Thresholds(), 10) == ["a score is NaN"]
        assert not passing_candidates([score], thresholds=Thresholds(), n_layers=10)


def test_each_threshold_is_named() -> None:
    score = CandidateScore(position=-1, layer=8, bypass=0.0, induce=-1.0, kl=0.5)
    assert failed_thresholds(score, Thresholds(), 10) == ["layer 8 >= 8", "induce -1.000 < 0", "KL 0.500 > 0.1"]


def test_nearest_candidates_are_ordered_by_how_far_they_are_from_passing() -> None:
    near = CandidateScore(position=-1, layer=1, bypass=-1.0, induce=-0.1, kl=0.11)
    far = CandidateScore(position=-1, layer=2, bypass=-5.0, induce=1.0, kl=0.9)
    farthest = CandidateScore(position=-1, layer=9, bypass=-5.0, induce=-9.0, kl=0.9)
    broken = CandidateScore(position=-1, layer=3, bypass=math.nan, induce=1.0, kl=0.2)
    unknown = CandidateScore(position=-1, layer=4, induce=1.0)
    unscored = CandidateScore(position=-1, layer=5)
    given = [farthest, unknown, broken, far, unscored, near]
    nearest = nearest_candidates(given, thresholds=Thresholds(), n_layers=10, gap=10.0)
    assert [one.candidate for one in nearest] == [near, far, farthest, broken, unknown]
    assert nearest[0].failed == ("induce -0.100 < 0", "KL 0.110 > 0.1")
    assert nearest[0].beyond == pytest.approx({"induce": 0.1, "kl": 0.01})
    assert nearest[0].distance == pytest.approx(0.1 / 10 + math.log(1.1))
    assert nearest[2].beyond == pytest.approx({"layer": 2, "induce": 9.0, "kl": 0.8})
    best = best_by_each_score(given)
    assert (best["bypass"], best["induce"], best["kl"]) == (farthest, far, near) or best["bypass"].bypass == -5.0


def test_a_wide_gap_between_harmful_and_harmless_makes_a_shortfall_of_induce_small() -> None:
    short = CandidateScore(position=-1, layer=1, bypass=0.0, induce=-1.0, kl=0.0)
    over = CandidateScore(position=-1, layer=2, bypass=0.0, induce=1.0, kl=0.2)
    for gap, first in ((10.0, short), (1.0, over)):
        nearest = nearest_candidates([short, over], thresholds=Thresholds(), n_layers=10, gap=gap)
        assert nearest[0].candidate == first


def test_of_equal_candidates_the_first_is_chosen() -> None:
    scores = [CandidateScore(position=p, layer=1, bypass=-2.0, induce=1.0, kl=0.0) for p in (-3, -2, -1)]
    assert passing_candidates(scores, thresholds=Thresholds(), n_layers=4)[0].position == -3
