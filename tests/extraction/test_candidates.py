"""Ways to make candidates, against plain computations in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterate.extraction.candidates import (
    MIN_INDEPENDENT_SHARE,
    candidate_directions,
    combine_means,
    independent_candidates,
    winsorized,
)
from abliterate.extraction.options import DirectionRecipe
from abliterate.models.hooks import difference_in_means


@pytest.fixture
def recorded() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (2, 3, 16)  # positions, layers, width
    common = 50 * torch.randn(shape, generator=generator)
    return {
        name: common + shift + torch.randn((n, *shape), generator=generator).pow(3)
        for name, n, shift in (("harmful", 21, 0.3), ("harmless", 17, 0.0))
    }


def test_the_default_is_the_difference_in_means(recorded) -> None:
    found = candidate_directions(**recorded, recipe=DirectionRecipe())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, difference_in_means(**recorded), rtol=0, atol=1e-12)


def test_the_projected_variant_by_hand(recorded) -> None:
    found = candidate_directions(**recorded, recipe=DirectionRecipe(variant="projected"))
    for position in range(2):
        for layer in range(3):
            a, b = (recorded[k][:, position, layer].double().numpy().mean(0) for k in ("harmful", "harmless"))
            difference, unit = a - b, b / np.linalg.norm(b)
            by_hand = (np.eye(16) - np.outer(unit, unit)) @ difference
            np.testing.assert_allclose(found[position, layer].numpy(), by_hand, atol=1e-12)
            cosine = abs(found[position, layer].numpy() @ unit) / np.linalg.norm(by_hand)
            assert cosine < 1e-15
            assert abs(difference @ unit) / np.linalg.norm(difference) > 1e-3


def test_two_passes_leave_less_than_one_where_the_means_nearly_coincide_in_direction() -> None:
    generator = torch.Generator().manual_seed(0)
    harmless = torch.randn(64, generator=generator, dtype=torch.float64)
    harmful = 2 * harmless + 1e-9 * torch.randn(64, generator=generator, dtype=torch.float64)
    unit = harmless / harmless.norm()
    once = harmful - harmless - ((harmful - harmless) @ unit) * unit
    twice = combine_means(harmful=harmful, harmless=harmless, variant="projected")
    assert abs(float(twice @ unit / twice.norm())) < 1e-15 < 1e-8 < abs(float(once @ unit / once.norm()))


def test_equal_means_and_a_zero_harmless_mean_are_no_trouble() -> None:
    same = torch.ones(4, dtype=torch.float64)
    assert combine_means(harmful=same, harmless=same, variant="projected").abs().max() == 0
    zero = torch.zeros(4, dtype=torch.float64)
    assert torch.equal(combine_means(harmful=same, harmless=zero, variant="projected"), same)


@settings(deadline=None, max_examples=30)
@given(q=st.floats(0, 0.49), n=st.integers(1, 30), seed=st.integers(0, 99))
def test_winsorised_values_are_those_clipped_at_numpys_quantiles(q: float, n: int, seed: int) -> None:
    values = torch.randn(n, 2, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    low, high = np.quantile(values.numpy(), [q, 1 - q], axis=0)
    np.testing.assert_allclose(winsorized(values, q).numpy(), np.clip(values.numpy(), low, high), atol=1e-12)


def test_wide_activations_are_winsorised_in_parts() -> None:
    values = torch.randn(20, 3, 5000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    low, high = np.quantile(values.numpy(), [0.1, 0.9], axis=0)
    np.testing.assert_allclose(winsorized(values, 0.1).numpy(), np.clip(values.numpy(), low, high), atol=1e-12)


def test_an_outlier_does_not_turn_a_winsorised_mean(recorded) -> None:
    spoiled = {name: values.clone() for name, values in recorded.items()}
    spoiled["harmful"][0, :, :, 5] = 1e6

    def cosine(recipe: DirectionRecipe) -> float:
        one, other = (candidate_directions(**r, recipe=recipe)[0, 1] for r in (recorded, spoiled))
        return float(torch.nn.functional.cosine_similarity(one, other, dim=0))

    assert cosine(DirectionRecipe(winsorize=0.1)) > 0.9
    assert abs(cosine(DirectionRecipe())) < 0.9


def test_zero_clips_nothing(recorded) -> None:
    plain = candidate_directions(**recorded, recipe=DirectionRecipe())
    torch.testing.assert_close(candidate_directions(**recorded, recipe=DirectionRecipe(winsorize=0.0)), plain)


def test_independent_candidates_are_the_first_that_stand_apart() -> None:
    e = torch.eye(6, dtype=torch.float64)
    grid = torch.stack([torch.stack([e[0], 5 * e[0] + 2 * e[1], e[1] + e[0], e[1], e[2]])])
    keys = [(-1, layer) for layer in range(5)]
    # The second stands 22 degrees off the first, the third 45; the fourth lies in the plane of the first and third.
    assert independent_candidates(grid, keys, rank=3) == [(-1, 0), (-1, 2), (-1, 4)]
    assert independent_candidates(grid, keys, rank=1) == [(-1, 0)]
    assert independent_candidates(grid, keys[::-1], rank=2) == [(-1, 4), (-1, 3)]
    assert independent_candidates(grid, keys, rank=9) == [(-1, 0), (-1, 2), (-1, 4)]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), rank=st.integers(1, 6))
def test_each_chosen_one_has_its_share_outside_the_span_of_the_others_before_it(seed: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    grid = torch.randn(3, 1, 8, generator=generator, dtype=torch.float64) + 0.7 * torch.randn(
        3, 6, 8, generator=generator, dtype=torch.float64
    )
    keys = [(position, layer) for position in range(-3, 0) for layer in range(6)]
    chosen = independent_candidates(grid, keys, rank=rank)
    assert chosen[0] == keys[0]
    for i in range(1, len(chosen)):
        before = np.stack([grid[key].numpy() for key in chosen[:i]])
        unit = (grid[chosen[i]] / grid[chosen[i]].norm()).numpy()
        weights = np.linalg.lstsq(before.T, unit, rcond=None)[0]
        assert np.linalg.norm(unit - before.T @ weights) >= MIN_INDEPENDENT_SHARE - 1e-9
