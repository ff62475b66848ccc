import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abliterate.projection import component_and_norm, component_norm, project_out, residue_bound

UNIT_ROUNDOFF = {torch.float64: 2**-53, torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}

SHAPES = st.sampled_from([((48, 20), 0), ((20, 48), 1), ((48, 48), 0), ((48, 48), 1), ((48,), 0), ((3, 48, 5), 1)])
DTYPES = st.sampled_from(list(UNIT_ROUNDOFF))
SEEDS = st.integers(0, 2**31)


def sample(shape: tuple[int, ...], axis: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return weight, torch.randn(shape[axis], generator=generator, dtype=torch.float64)


def write(weight: Tensor, direction: Tensor, axis: int) -> Tensor:
    """What the weight writes along the unit vector: r^T W, in float64, by a computation of its own."""
    return (weight.double().movedim(axis, 0) * (direction / direction.norm()).view(-1, *[1] * (weight.dim() - 1))).sum(
        0
    )


@settings(deadline=None, max_examples=60)
@given(SHAPES, DTYPES, SEEDS)
def test_the_component_is_there_before_and_gone_after(shape_axis, dtype, seed):
    shape, axis = shape_axis
    weight, direction = sample(shape, axis, seed, dtype)
    before = write(weight, direction, axis).norm()
    edited = project_out(weight, direction=direction, residual_axis=axis)
    bound = residue_bound(
        dtype,
        d_model=shape[axis],
        elements=weight.numel(),
        before=float(weight.double().norm()),
        after=float(edited.double().norm()),
    )
    after = write(edited, direction, axis).norm()
    assert after <= bound
    # One random column may lie almost across the direction by chance; several cannot.
    if len(shape) > 1:
        assert before > 0.05 * weight.double().norm()
        assert after < before / 10


@settings(deadline=None, max_examples=60)
@given(SHAPES, DTYPES, SEEDS, st.floats(1e-3, 1e3))
def test_shape_and_dtype_stay_and_the_scale_of_the_direction_does_not_matter(shape_axis, dtype, seed, scale):
    shape, axis = shape_axis
    weight, direction = sample(shape, axis, seed, dtype)
    original = weight.clone()
    edited = project_out(weight, direction=direction, residual_axis=axis)
    assert edited.shape == weight.shape
    assert edited.dtype == weight.dtype
    assert torch.equal(weight, original), "the input must not be changed"
    rescaled = project_out(weight, direction=-scale * direction, residual_axis=axis)
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, 4 * UNIT_ROUNDOFF[dtype])
    torch.testing.assert_close(rescaled.double(), edited.double(), rtol=tolerance, atol=tolerance)


@settings(deadline=None, max_examples=60)
@given(SHAPES, SEEDS)
def test_it_is_idempotent(shape_axis, seed):
    shape, axis = shape_axis
    weight, direction = sample(shape, axis, seed, torch.float64)
    once = project_out(weight, direction=direction, residual_axis=axis)
    twice = project_out(once, direction=direction, residual_axis=axis)
    torch.testing.assert_close(twice, once, rtol=0, atol=1e-14)


@settings(deadline=None, max_examples=60)
@given(SHAPES, SEEDS, st.floats(0.1, 2.0))
def test_what_is_orthogonal_to_the_direction_is_untouched(shape_axis, seed, strength):
    shape, axis = shape_axis
    weight, direction = sample(shape, axis, seed, torch.float64)
    edited = project_out(weight, direction=direction, residual_axis=axis, strength=strength)
    _, other = sample(shape, axis, seed + 1, torch.float64)
    unit = direction / direction.norm()
    other = other - unit * (unit @ other)
    torch.testing.assert_close(write(edited, other, axis), write(weight, other, axis), rtol=0, atol=1e-13)
    torch.testing.assert_close(
        write(edited, direction, axis), (1 - strength) * write(weight, direction, axis), rtol=0, atol=1e-13
    )


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([0, 1]), SEEDS)
def test_the_change_has_rank_one_and_points_along_the_direction(axis, seed):
    shape = (48, 20) if axis == 0 else (20, 48)
    weight, direction = sample(shape, axis, seed, torch.float64)
    change = weight - project_out(weight, direction=direction, residual_axis=axis)
    singular = torch.linalg.svdvals(change)
    assert singular[0] > 1e-3
    assert singular[1] < 1e-12 * singular[0]
    columns = change if axis == 0 else change.T
    unit = direction / direction.norm()
    torch.testing.assert_close(columns, torch.outer(unit, unit @ columns), rtol=0, atol=1e-13)


def test_low_precision_is_rounded_once_from_float32():
    weight, direction = sample((64, 32), 0, 1, torch.bfloat16)
    unit = direction / direction.norm()
    exact = weight.double() - torch.outer(unit, unit @ weight.double())
    edited = project_out(weight, direction=direction, residual_axis=0)
    nearest = exact.to(torch.bfloat16)
    # A value next to a rounding boundary may fall on either side of it.
    assert (edited == nearest).float().mean() > 0.99
    assert ((edited.double() - exact).abs() <= exact.abs() * 2**-8 * 1.01).all()


def test_component_norm_is_one_for_a_weight_along_the_direction_and_zero_for_an_empty_one():
    direction = torch.tensor([3.0, 4.0])
    along = torch.outer(direction, torch.tensor([1.0, -2.0, 5.0]))
    assert component_norm(along, direction=direction, residual_axis=0) == pytest.approx(1.0, abs=1e-12)
    across = torch.outer(torch.tensor([4.0, -3.0]), torch.tensor([1.0, -2.0, 5.0]))
    assert component_norm(across, direction=direction, residual_axis=0) == pytest.approx(0.0, abs=1e-12)
    assert component_norm(torch.zeros(2, 3), direction=direction, residual_axis=0) == 0.0


def test_component_and_norm_agree_with_a_direct_computation_over_many_blocks(monkeypatch):
    monkeypatch.setattr("abliterate.projection._BLOCK_ELEMENTS", 100)
    for shape, axis in [((48, 20), 0), ((20, 48), 1), ((48,), 0), ((3, 48, 5), 1)]:
        weight, direction = sample(shape, axis, 3, torch.float32)
        along, total = component_and_norm(weight, direction=direction, residual_axis=axis)
        assert along == pytest.approx(float(write(weight, direction, axis).norm()), rel=1e-12)
        assert total == pytest.approx(float(weight.double().norm()), rel=1e-12)


@pytest.mark.parametrize("direction", [torch.zeros(4), torch.full((4,), float("nan")), torch.ones(5), torch.ones(4, 1)])
def test_a_direction_that_is_none_is_refused(direction):
    with pytest.raises(ValueError, match="direction"):
        project_out(torch.ones(4, 2), direction=direction, residual_axis=0)


def test_restoring_row_norms_would_put_the_direction_back():
    # Why norms are not restored row by row, as some tools do: scaling rows mixes the residual axis.
    weight, direction = sample((48, 20), 0, 5, torch.float64)
    edited = project_out(weight, direction=direction, residual_axis=0)
    rescaled = edited * (weight.norm(dim=1, keepdim=True) / edited.norm(dim=1, keepdim=True))
    assert component_norm(edited, direction=direction, residual_axis=0) < 1e-15
    assert component_norm(rescaled, direction=direction, residual_axis=0) > 1e-4
