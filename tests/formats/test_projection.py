import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abliterate.formats.component import component_and_norm, component_norm
from abliterate.formats.projection import NormFactor, effective_directions, project_out
from abliterate.formats.stored_component import residue_bound

NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
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
    edited = project_out(weight, directions=direction[None], residual_axis=axis)
    bound = residue_bound(
        NAMES[dtype],
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
    edited = project_out(weight, directions=direction[None], residual_axis=axis)
    assert edited.shape == weight.shape
    assert edited.dtype == weight.dtype
    assert torch.equal(weight, original), "the input must not be changed"
    rescaled = project_out(weight, directions=-scale * direction[None], residual_axis=axis)
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, 4 * UNIT_ROUNDOFF[dtype])
    torch.testing.assert_close(rescaled.double(), edited.double(), rtol=tolerance, atol=tolerance)


@settings(deadline=None, max_examples=60)
@given(SHAPES, SEEDS)
def test_it_is_idempotent(shape_axis, seed):
    shape, axis = shape_axis
    weight, direction = sample(shape, axis, seed, torch.float64)
    once = project_out(weight, directions=direction[None], residual_axis=axis)
    twice = project_out(once, directions=direction[None], residual_axis=axis)
    torch.testing.assert_close(twice, once, rtol=0, atol=1e-14)


@settings(deadline=None, max_examples=60)
@given(SHAPES, SEEDS, st.floats(0.1, 2.0))
def test_what_is_orthogonal_to_the_direction_is_untouched(shape_axis, seed, strength):
    shape, axis = shape_axis
    weight, direction = sample(shape, axis, seed, torch.float64)
    edited = project_out(weight, directions=direction[None], residual_axis=axis, strength=strength)
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
    change = weight - project_out(weight, directions=direction[None], residual_axis=axis)
    singular = torch.linalg.svdvals(change)
    assert singular[0] > 1e-3
    assert singular[1] < 1e-12 * singular[0]
    columns = change if axis == 0 else change.T
    unit = direction / direction.norm()
    torch.testing.assert_close(columns, torch.outer(unit, unit @ columns), rtol=0, atol=1e-13)


@settings(deadline=None, max_examples=40)
@given(SHAPES, SEEDS, st.integers(2, 4), st.floats(0.1, 2.0))
def test_several_directions_are_removed_together(shape_axis, seed, k, strength):
    shape, axis = shape_axis
    weight, _ = sample(shape, axis, seed, torch.float64)
    directions = torch.stack([sample(shape, axis, seed + n, torch.float64)[1] for n in range(1, k + 1)])
    edited = project_out(weight, directions=directions, residual_axis=axis, strength=strength)
    for direction in directions:
        expected = (1 - strength) * write(weight, direction, axis)
        torch.testing.assert_close(write(edited, direction, axis), expected, rtol=0, atol=1e-12)
    _, other = sample(shape, axis, seed + 9, torch.float64)
    other = other - torch.linalg.pinv(directions) @ (directions @ other)
    torch.testing.assert_close(write(edited, other, axis), write(weight, other, axis), rtol=0, atol=1e-12)
    change = (weight - edited).movedim(axis, 0).flatten(1) if len(shape) > 1 else (weight - edited).view(-1, 1)
    assert torch.linalg.matrix_rank(change, rtol=1e-10) == min(k, *change.shape)


@pytest.mark.parametrize(
    ("shape", "axis"), [((48, 20), 0), ((20, 48), 1), ((3, 48, 48), 1), ((3, 48, 48), 2), ((3, 48), 1)]
)
def test_blocks_do_not_change_the_result(monkeypatch, shape, axis):
    weight, direction = sample(shape, axis, 11, torch.float64)
    whole = project_out(weight, directions=direction[None], residual_axis=axis)
    unit = direction / direction.norm()
    rows = weight.movedim(axis, -1)
    expected = (rows - (rows @ unit).unsqueeze(-1) * unit).movedim(-1, axis)
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-14)
    monkeypatch.setattr("abliterate.formats.projection._BLOCK_ELEMENTS", 100)
    torch.testing.assert_close(
        project_out(weight, directions=direction[None], residual_axis=axis), whole, rtol=0, atol=1e-14
    )


class TestFeedback:
    """Rounding: where plain rounding leaves a share of the component, feedback leaves far less of it."""

    @staticmethod
    def edits(dtype: torch.dtype, d_model: int, **options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weight, direction = sample((d_model, 256), 0, 3, dtype)
        unit = direction / direction.norm()
        exact = weight.double() - options.get("strength", 1.0) * torch.outer(unit, unit @ weight.double())
        return weight, direction, exact, project_out(weight, directions=direction[None], residual_axis=0, **options)

    @pytest.mark.parametrize(("dtype", "plain_share"), [(torch.bfloat16, 5e-3), (torch.float16, 2e-4)])
    def test_less_survives_and_no_more_is_changed(self, dtype, plain_share):
        weight, direction, exact, edited = self.edits(dtype, 4096)
        plain = exact.to(dtype)
        before = write(weight, direction, 0).norm()
        assert write(plain, direction, 0).norm() / before > plain_share
        assert write(edited, direction, 0).norm() / before < 1e-4
        changes = [(each.double() - weight.double()).norm() for each in (edited, plain)]
        assert changes[0] < 1.001 * changes[1]
        # And what it does besides is not more than the grid does anyway.
        assert (edited.double() - exact).norm() < 1.02 * (plain.double() - exact).norm()

    @pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
    def test_wide_dtypes_are_exact_to_their_own_rounding(self, dtype, share):
        weight, direction, _, edited = self.edits(dtype, 4096)
        assert write(edited, direction, 0).norm() / write(weight, direction, 0).norm() < share

    @pytest.mark.parametrize("strength", [0.25, 0.75, 1.5, 2.0])
    def test_any_strength_leaves_the_share_that_was_asked_for(self, strength):
        weight, direction, _, edited = self.edits(torch.bfloat16, 2048, strength=strength)
        before, after = write(weight, direction, 0), write(edited, direction, 0)
        assert (after - (1 - strength) * before).norm() / before.norm() < 1.5e-4

    def test_an_edit_of_an_edit_changes_next_to_nothing(self):
        _, direction, exact, edited = self.edits(torch.bfloat16, 1024)
        again = project_out(edited, directions=direction[None], residual_axis=0)
        assert write(again, direction, 0).norm() <= 1.01 * write(edited, direction, 0).norm()
        assert (again.double() - edited.double()).norm() < 1e-3 * exact.norm()

    def test_several_directions(self):
        weight, _ = sample((2048, 128), 0, 3, torch.bfloat16)
        directions = torch.randn(3, 2048, generator=torch.Generator().manual_seed(4))
        edited = project_out(weight, directions=directions, residual_axis=0)
        before, after = (component_norm(each, directions=directions, residual_axis=0) for each in (weight, edited))
        assert after / before < 2e-4

    def test_one_direction_that_dominates_a_weight(self):
        weight, direction = sample((1024, 64), 0, 3, torch.float64)
        weight += 20 * torch.outer(direction / direction.norm(), torch.randn(64, dtype=torch.float64))
        stored = weight.to(torch.bfloat16)
        edited = project_out(stored, directions=direction[None], residual_axis=0)
        assert write(edited, direction, 0).norm() / write(stored, direction, 0).norm() < 2e-5


class TestNorms:
    """A norm between a writer and the stream: the oracle is the norm itself, applied to what the writer puts out."""

    @staticmethod
    def norm(x: Tensor, factor: NormFactor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if factor.centered else x
        return factor.gamma * x / x.square().mean(-1, keepdim=True).sqrt()

    @pytest.mark.parametrize("centered", [(False,), (True,), (False, True), (True, False), (True, True), ()])
    def test_the_stream_is_clean_behind_a_chain_of_norms(self, centered):
        generator = torch.Generator().manual_seed(5)
        norms = [
            NormFactor(gamma=1 + torch.randn(48, generator=generator, dtype=torch.float64), centered=each)
            for each in centered
        ]
        weight, _ = sample((48, 20), 0, 6, torch.float64)
        directions = torch.randn(2, 48, generator=generator, dtype=torch.float64)
        inputs = torch.randn(7, 20, generator=generator, dtype=torch.float64)

        def stream(edited: Tensor) -> Tensor:
            written = inputs @ edited.T
            for norm in norms:
                written = self.norm(written, norm)
            return written @ directions.T

        seen = effective_directions(directions, norms=norms)
        torch.testing.assert_close(seen @ seen.T, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-13)
        assert stream(weight).abs().max() > 0.1
        assert stream(project_out(weight, directions=seen, residual_axis=0)).abs().max() < 1e-12
        if norms:
            plain = project_out(weight, directions=directions, residual_axis=0)
            assert stream(plain).abs().max() > 0.1, "without the norms' weights it would stay in the stream"

    def test_the_norm_of_a_loaded_model_has_a_gradient(self):
        gamma = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        seen = effective_directions(torch.tensor([[1.0, 1.0]]), norms=[NormFactor(gamma=gamma)])
        torch.testing.assert_close(seen, torch.tensor([[1.0, 2.0]], dtype=torch.float64) / 5**0.5)
        assert not seen.requires_grad

    def test_what_a_norm_takes_away_by_itself_needs_no_edit(self):
        gamma = torch.ones(8)
        gamma[3] = 0
        directions = torch.eye(8)[3:4]
        seen = effective_directions(directions, norms=[NormFactor(gamma=gamma)])
        assert seen.shape == (0, 8)
        weight, _ = sample((8, 5), 0, 1, torch.bfloat16)
        assert torch.equal(project_out(weight, directions=seen, residual_axis=0), weight)
        assert component_and_norm(weight, directions=seen, residual_axis=0)[0] == 0.0


class TestPreservedNorms:
    """`preserve_norms`: what one input writes keeps its length, and the direction stays out."""

    @settings(deadline=None, max_examples=40)
    @given(SHAPES, st.sampled_from([torch.float64, torch.bfloat16]), SEEDS)
    def test_each_vector_along_the_residual_axis_keeps_its_norm_and_loses_the_direction(self, shape_axis, dtype, seed):
        shape, axis = shape_axis
        weight, direction = sample(shape, axis, seed, dtype)
        edited = project_out(weight, directions=direction[None], residual_axis=axis, preserve_norms=True)
        lengths = [each.double().norm(dim=axis) for each in (weight, edited)]
        torch.testing.assert_close(lengths[1], lengths[0], rtol={torch.float64: 1e-13}.get(dtype, 2e-3), atol=0)
        plain = project_out(weight, directions=direction[None], residual_axis=axis)
        if len(shape) > 1:
            assert plain.double().norm() < 0.999 * weight.double().norm(), "without the option they get shorter"
        total = float(edited.double().norm())
        bound = residue_bound(NAMES[dtype], d_model=shape[axis], elements=weight.numel(), before=total, after=total)
        assert write(edited, direction, axis).norm() <= bound

    def test_a_vector_along_the_direction_is_not_blown_up(self):
        direction = torch.zeros(16, dtype=torch.float32)
        direction[2:5] = torch.tensor([1.0, 2.0, -1.0])
        weight = torch.stack([3 * direction, torch.zeros(16), torch.ones(16)], dim=1)
        edited = project_out(weight, directions=direction[None], residual_axis=0, preserve_norms=True)
        assert edited[:, :2].abs().max() < 1e-5
        assert float(edited[:, 2].norm()) == pytest.approx(4.0, rel=1e-6)

    def test_strength_is_that_of_the_edit_before_the_lengths_are_restored(self):
        weight, direction = sample((48, 20), 0, 5, torch.float64)
        unit = direction / direction.norm()
        half = weight - 0.5 * torch.outer(unit, unit @ weight)
        expected = half * (weight.norm(dim=0) / half.norm(dim=0))
        edited = project_out(weight, directions=direction[None], residual_axis=0, strength=0.5, preserve_norms=True)
        torch.testing.assert_close(edited, expected, rtol=0, atol=1e-13)


def test_component_norm_is_one_for_a_weight_along_the_direction_and_zero_for_an_empty_one():
    direction = torch.tensor([3.0, 4.0])
    along = torch.outer(direction, torch.tensor([1.0, -2.0, 5.0]))
    assert component_norm(along, directions=direction[None], residual_axis=0) == pytest.approx(1.0, abs=1e-12)
    across = torch.outer(torch.tensor([4.0, -3.0]), torch.tensor([1.0, -2.0, 5.0]))
    assert component_norm(across, directions=direction[None], residual_axis=0) == pytest.approx(0.0, abs=1e-12)
    assert component_norm(torch.zeros(2, 3), directions=direction[None], residual_axis=0) == 0.0


def test_component_and_norm_agree_with_a_direct_computation_over_many_blocks(monkeypatch):
    monkeypatch.setattr("abliterate.formats.projection._BLOCK_ELEMENTS", 100)
    for shape, axis in [((48, 20), 0), ((20, 48), 1), ((48,), 0), ((3, 48, 5), 1)]:
        weight, direction = sample(shape, axis, 3, torch.float32)
        along, total = component_and_norm(weight, directions=direction[None], residual_axis=axis)
        assert along == pytest.approx(float(write(weight, direction, axis).norm()), rel=1e-12)
        assert total == pytest.approx(float(weight.double().norm()), rel=1e-12)


@pytest.mark.parametrize("directions", [torch.full((1, 4), float("nan")), torch.ones(1, 5), torch.ones(4)])
def test_a_direction_that_is_none_is_refused(directions):
    with pytest.raises(ValueError, match="direction"):
        project_out(torch.ones(4, 2), directions=directions, residual_axis=0)


def test_restoring_row_norms_would_put_the_direction_back():
    # Why norms are not restored row by row, as some tools do: scaling rows mixes the residual axis.
    weight, direction = sample((48, 20), 0, 5, torch.float64)
    edited = project_out(weight, directions=direction[None], residual_axis=0)
    rescaled = edited * (weight.norm(dim=1, keepdim=True) / edited.norm(dim=1, keepdim=True))
    assert component_norm(edited, directions=direction[None], residual_axis=0) < 1e-15
    assert component_norm(rescaled, directions=direction[None], residual_axis=0) > 1e-4
