"""The bootstrap against plain loops."""

import math

import numpy as np
import pytest
import torch

from abliterate.extraction.candidates import measure_robustness, resample_weights, resampled_cosines, resampled_winners
from abliterate.extraction.options import DirectionRecipe, Thresholds
from abliterate.extraction.selection import CandidateScore, passing_candidates


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(n: int, *, n_resamples: int, generator: torch.Generator) -> np.ndarray:
    return torch.randint(n, (n_resamples, n), generator=generator).numpy()


def test_weights_count_the_draws() -> None:
    weights = resample_weights(7, n_resamples=50, generator=generator())
    draws = drawn(7, n_resamples=50, generator=generator())
    for row, draw in zip(weights, draws, strict=True):
        np.testing.assert_allclose(row.numpy(), np.bincount(draw, minlength=7) / 7, atol=1e-15)
    assert (weights == 0).any()


@pytest.mark.parametrize("variant", ["difference", "projected"])
def test_cosines_are_those_of_directions_made_of_the_drawn_prompts(variant) -> None:
    harmful = torch.randn(9, 6, generator=generator(1)) + 1
    harmless = torch.randn(8, 6, generator=generator(2)) - 1
    recipe = DirectionRecipe(variant=variant)
    found = resampled_cosines(harmful=harmful, harmless=harmless, recipe=recipe, n_resamples=40, generator=generator(5))
    rng = generator(5)
    draws = [drawn(n, n_resamples=40, generator=rng) for n in (9, 8)]

    def direction(bad: np.ndarray, good: np.ndarray) -> np.ndarray:
        difference, mean = bad.mean(0) - good.mean(0), good.mean(0)
        return difference if variant == "difference" else difference - (difference @ mean) / (mean @ mean) * mean

    bad, good = harmful.double().numpy(), harmless.double().numpy()
    whole = direction(bad, good)
    for i in range(40):
        one = direction(bad[draws[0][i]], good[draws[1][i]])
        assert float(found[i]) == pytest.approx(one @ whole / np.linalg.norm(one) / np.linalg.norm(whole), abs=1e-12)
    assert found.std() > 1e-3


def test_prompts_that_are_all_alike_turn_nothing() -> None:
    row = torch.randn(1, 6, generator=generator(1))
    found = resampled_cosines(
        harmful=row.expand(5, 6), harmless=-row.expand(4, 6) + 1, recipe=DirectionRecipe(winsorize=0.2),
        n_resamples=10, generator=generator(),
    )  # fmt: skip
    assert torch.allclose(found, torch.ones(10, dtype=torch.float64))


def random_scores(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    keys = [(position, layer) for position in (-2, -1) for layer in range(4)]
    return {
        key: {
            "bypass": tuple(rng.normal(0, 1, 5) - key[1]),
            "induce": tuple(rng.normal(0, 2, 6)),
            "kl": tuple(abs(rng.normal(0, 0.15, 6))),
        }
        for key in keys
    }


@pytest.mark.parametrize("seed", range(8))
def test_winners_are_what_the_selection_chooses_from_each_draw(seed: int) -> None:
    scores, thresholds = random_scores(seed), Thresholds(kl=0.12, induce=-0.2, prune_layers=0.25)
    if seed == 0:
        scores[-1, 2] |= {"bypass": (math.nan,) * 5}
        scores[-1, 1] |= {"kl": (math.nan,) * 6}
        scores[-2, 2] = scores[-2, 1]  # a tie
    found = resampled_winners(scores, thresholds=thresholds, n_layers=4, n_resamples=60, generator=generator(seed))
    rng = generator(seed)
    draws = [drawn(n, n_resamples=60, generator=rng) for n in (5, 6)]
    expected: dict = {}
    for harmful, harmless in zip(*draws, strict=True):
        means = [
            CandidateScore(
                position=key[0],
                layer=key[1],
                bypass=float(np.mean([prompts["bypass"][i] for i in harmful])),
                induce=float(np.mean([prompts["induce"][i] for i in harmless])),
                kl=float(np.mean([prompts["kl"][i] for i in harmless])),
            )
            for key, prompts in scores.items()
        ]
        passing = passing_candidates(means, thresholds=thresholds, n_layers=4)
        chosen = (passing[0].position, passing[0].layer) if passing else None
        expected[chosen] = expected.get(chosen, 0) + 1
    assert dict(found) == expected
    assert all(key is None or key[1] < 3 for key in found)


def test_the_same_seed_measures_the_same_and_shares_add_up_to_one() -> None:
    def measure(seed: int):
        return measure_robustness(
            harmful=torch.randn(9, 6, generator=generator(1)),
            harmless=torch.randn(8, 6, generator=generator(2)),
            recipe=DirectionRecipe(),
            scores=random_scores(3),
            thresholds=Thresholds(kl=0.12, induce=-0.2),
            n_layers=4,
            n_resamples=200,
            seed=seed,
        )

    found = measure(0)
    assert found == measure(0) != measure(1)
    assert found.low_cosine < found.mean_cosine < found.high_cosine
    assert sum(winner.share for winner in found.winners) + found.share_none == pytest.approx(1)
    shares = [winner.share for winner in found.winners]
    assert shares == sorted(shares, reverse=True)
    assert len(shares) > 1
