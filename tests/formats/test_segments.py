"""The axis cut in segments: what the last of them can take away, and where it stays in one piece."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterate.formats.segments import NormSums, bits_of, cut_in_segments, kernels_for, project_stored


def basis(d_model: int, k: int, *, seed: int, spread: float = 1.0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    vectors = generator.standard_normal((d_model, k)) * np.exp(spread * generator.standard_normal((d_model, 1)))
    return np.ascontiguousarray(np.linalg.qr(vectors)[0].T)


@settings(deadline=None)
@given(st.integers(3, 400), st.integers(1, 3), st.integers(0, 99), st.sampled_from([0.0, 1.0, 3.0]))
def test_segments_cover_the_axis_and_what_is_left_of_each_can_be_turned_round(d_model, k, seed, spread):
    rows = basis(d_model, k, seed=seed, spread=spread)
    found = cut_in_segments(rows, dtype="BF16")
    assert found.bounds[0] == 0
    assert found.bounds[-1] == d_model
    assert all(start < end for start, end in itertools.pairwise(found.bounds))
    for start, inverse in zip(found.bounds, found.inverses, strict=False):
        rest = rows[:, start:]
        np.testing.assert_allclose(inverse @ (rest @ rest.T), np.eye(k), atol=1e-6)
    assert len(found.inverses) == len(found.bounds) - 1
    assert found.directions.dtype == np.float32


def test_a_spread_direction_is_cut_where_half_of_it_is_left_and_half_of_that():
    even = np.full((1, 1024), 1 / 32)
    assert cut_in_segments(even, dtype="F16").bounds[:4] == (0, 512, 768, 896)


def test_a_direction_that_is_one_entry_is_not_cut():
    assert cut_in_segments(np.eye(1, 64), dtype="BF16").bounds == (0, 64)


@pytest.mark.parametrize(("dtype", "wide"), [("F32", np.float32), ("F64", np.float64)])
def test_what_is_rounded_by_the_arithmetic_alone_stays_in_one_piece(dtype, wide):
    found = cut_in_segments(basis(256, 2, seed=1), dtype=dtype)
    assert found.bounds == (0, 256)
    assert found.directions.dtype == wide


def test_float64_is_not_compiled():
    assert kernels_for("F64") is None


@pytest.mark.parametrize("axis", [0, -1])
def test_stored_numbers_are_projected_in_place_without_torch(axis):
    kernels = kernels_for("F32")
    assert kernels is not None
    weight = np.random.default_rng(0).standard_normal((40, 40)).astype(np.float32)
    row = basis(40, 1, seed=2)[0]
    before, edited = NormSums(), weight.copy()
    project_stored(
        kernels,
        bits_of(edited, dtype="F32"),
        bits_of(edited, dtype="F32"),
        segments=cut_in_segments(row[None], dtype="F32"),
        residual_axis=axis,
        strength=1.0,
        preserve_norms=False,
        before=before,
    )
    along = np.tensordot(row, weight.astype(np.float64), axes=(0, axis))
    assert np.abs(np.tensordot(row, edited.astype(np.float64), axes=(0, axis))).max() < 1e-6
    assert before.along_squared == pytest.approx(float(np.square(along).sum()), rel=1e-5)
    assert before.total_squared == pytest.approx(float(np.square(weight.astype(np.float64)).sum()), rel=1e-5)
