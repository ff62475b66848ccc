"""The mathematics takes and returns what its signatures say: shapes by jaxtyping, which nothing checks at run time."""

import inspect
from collections.abc import Callable
from typing import Any, get_args, get_origin, get_type_hints

import jaxtyping
import numpy as np
import pytest
import torch

from abliterate.directions import make_direction, orthonormalize
from abliterate.editing.lora import coefficients, merge_factors, pack_factors, unpack_factors
from abliterate.extraction.candidates import (
    candidate_directions,
    combine_means,
    independent_candidates,
    resample_weights,
    resampled_cosines,
    winsorized,
)
from abliterate.extraction.options import DirectionRecipe
from abliterate.formats.component import component_and_norm, component_norm
from abliterate.formats.projection import NormFactor, effective_directions, project_out
from abliterate.models.hooks import difference_in_means

K, D_MODEL, N, EXPERTS, N_POS, N_LAYERS = 2, 12, 7, 3, 4, 5


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Read the annotations of a function, with the names that its module imports for type checkers alone."""
    return get_type_hints(function, localns=vars(jaxtyping) | {"Tensor": torch.Tensor, "np": np})


def has_form(value: Any, hint: Any) -> bool:
    """Return whether a tensor, or each of a tuple, is what its annotation says; all else passes."""
    if isinstance(value, tuple) and get_origin(hint) is tuple and Ellipsis not in get_args(hint):
        return all(has_form(part, each) for part, each in zip(value, get_args(hint), strict=True))
    if isinstance(value, torch.Tensor | np.ndarray):
        return isinstance(value, hint)
    return True


def checked(function: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """Call a function, each size being the same wherever its signature names it."""
    hints = hints_of(function)
    bound = inspect.signature(function).bind(*args, **named)
    with jaxtyping.jaxtyped("context"):
        for name, value in bound.arguments.items():
            assert has_form(value, hints[name]), (function.__name__, name, hints[name])
        result = function(*args, **named)
        assert has_form(result, hints["return"]), (function.__name__, "return", hints["return"])
    return result


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


@pytest.fixture
def basis() -> torch.Tensor:
    return checked(orthonormalize, random(K + 1, D_MODEL), at_most=K)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "axis"), [((D_MODEL,), 0), ((N, D_MODEL), 1), ((EXPERTS, D_MODEL, N), 1)])
def test_projection(basis, shape, axis, dtype):
    weight = random(*shape, dtype=dtype)
    seen = checked(effective_directions, basis, norms=[NormFactor(gamma=random(D_MODEL), centered=True)])
    for directions in (basis, seen):
        new = checked(project_out, weight, directions=directions, residual_axis=axis, out=torch.empty_like(weight))
        assert new.dtype == dtype
        checked(component_norm, weight, directions=directions, residual_axis=axis)
        checked(component_and_norm, weight, directions=directions, residual_axis=axis)


@pytest.mark.parametrize(("shape", "axis"), [((D_MODEL, N), 0), ((N, D_MODEL), 1), ((EXPERTS, D_MODEL, N), 1)])
@pytest.mark.parametrize("residual_on_b", [True, False])
def test_factors(basis, shape, axis, residual_on_b):
    weight, experts = random(*shape), EXPERTS if len(shape) == 3 else 1
    found = checked(coefficients, weight, directions=basis, residual_axis=axis)
    assert found.shape == (experts, K, N)
    pair = checked(pack_factors, found, basis, rank=K + 1, residual_on_b=residual_on_b)
    again, spanned = checked(unpack_factors, *pair, experts=experts, residual_on_b=residual_on_b)
    checked(merge_factors, weight, again, spanned, directions=basis, residual_axis=axis)


@pytest.mark.parametrize("variant", ["difference", "projected"])
def test_candidates(variant):
    recorded = {"harmful": random(6, N_POS, N_LAYERS, D_MODEL), "harmless": random(8, N_POS, N_LAYERS, D_MODEL)}
    recipe = DirectionRecipe(variant=variant, winsorize=0.1)
    candidates = checked(candidate_directions, **recorded, recipe=recipe)
    assert candidates.shape == checked(difference_in_means, **recorded).shape == (N_POS, N_LAYERS, D_MODEL)
    checked(winsorized, recorded["harmful"], 0.1)
    checked(combine_means, harmful=candidates, harmless=-candidates, variant=variant)
    checked(independent_candidates, candidates, [(0, 1), (1, 2)], rank=2)
    one = {kind: values[:, 0, 0] for kind, values in recorded.items()}
    generator = torch.Generator().manual_seed(0)
    assert checked(resample_weights, 6, n_resamples=9, generator=generator).shape == (9, 6)
    checked(resampled_cosines, **one, recipe=recipe, n_resamples=9, generator=generator)
    scores = dict.fromkeys(("bypass", "induce", "kl"), random(N_POS, N_LAYERS))
    checked(make_direction, mean_difference=candidates[0, 0], candidates=candidates, scores=scores)
    checked(make_direction, mean_difference=candidates[0, 0].numpy())


def test_another_shape_is_noticed(basis):
    with pytest.raises(AssertionError, match="directions"):
        checked(component_norm, random(N, D_MODEL), directions=basis[0], residual_axis=1)
    with pytest.raises(AssertionError, match="harmless"):
        checked(difference_in_means, harmful=random(6, N_POS, N_LAYERS, D_MODEL), harmless=random(8, N_POS, 2, D_MODEL))
