"""What is measured of a stored weight without torch is what `component` measures of the tensor in hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from abliterate.checkpoints.safetensors_file import PLAIN_DTYPES, TensorInfo, read_shard
from abliterate.checkpoints.stored_tensors import TORCH_DTYPES
from abliterate.directions import orthonormalize
from abliterate.errors import CheckpointError
from abliterate.formats import stored_component
from abliterate.formats.component import component_and_norm
from abliterate.formats.stored_component import directions_behind, measure, read_numbers, residue_bound, roundoff

SHAPES = [((48, 20), 0), ((20, 48), 1), ((20, 48), -1), ((48,), 0), ((3, 48, 5), 1), ((3, 5, 48), 2), ((7, 48, 31), -2)]


def stored(directory: Path, weight: Tensor) -> TensorInfo:
    # A tensor before it, so that it begins anywhere.
    save_file({"before": torch.zeros(3), "weight": weight}, directory / "model.safetensors")
    return next(info for info in read_shard(directory / "model.safetensors").tensors if info.name == "weight")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=[None, 100], ids=["whole", "in parts"])
def parts(request, monkeypatch):
    """Large enough for these tensors, and so small that each is cut within its rows, its matrices and its reads."""
    if request.param:
        monkeypatch.setattr(stored_component, "_PART_ELEMENTS", request.param)
        monkeypatch.setattr(stored_component, "_READ_BYTES", 7 * request.param)


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("dtype", PLAIN_DTYPES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_component_and_norm_are_those_of_the_tensor(tmp_path, dtype, shape, axis):
    weight = random(*shape).to(TORCH_DTYPES[dtype])
    directions = orthonormalize(random(2, 48, seed=1))[0]
    expected = component_and_norm(weight, directions=directions, residual_axis=axis)
    found = measure(tmp_path, stored(tmp_path, weight), directions=directions.numpy(), residual_axis=axis)
    assert found == pytest.approx(expected, rel=1e-13)
    # |U W| and |W| alike would be told apart by nothing else.
    assert found.along < 0.7 * found.norm


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("dtype", PLAIN_DTYPES)
def test_numbers_are_read_as_they_are(tmp_path, dtype):
    special = torch.tensor([0.0, -0.0, 1.0, -2.5, 6e-8, 1e-40, math.inf, -math.inf, math.nan], dtype=torch.float64)
    weight = torch.cat([special, random(300)]).to(TORCH_DTYPES[dtype]).reshape(103, 3)
    found = read_numbers(tmp_path, stored(tmp_path, weight))
    np.testing.assert_array_equal(found, weight.double().numpy())
    assert found.dtype == np.float64


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("axis", [0, 1])
def test_what_is_not_finite_shows_without_a_warning(tmp_path, bad, axis, recwarn):
    weight = random(48, 48).float()
    weight[3, 5] = bad
    found = measure(
        tmp_path, stored(tmp_path, weight), directions=orthonormalize(random(1, 48))[0].numpy(), residual_axis=axis
    )
    assert not math.isfinite(found.norm)
    assert not math.isfinite(found.share)
    assert not recwarn.list


def test_nothing_has_no_component(tmp_path):
    directions = np.eye(1, 48)
    for shape, axis in (((0, 48), 1), ((48, 0), 0), ((4, 48), 1)):
        found = measure(tmp_path, stored(tmp_path, torch.zeros(shape)), directions=directions, residual_axis=axis)
        assert found == (0, 0)
        assert found.share == 0
    assert read_numbers(tmp_path, stored(tmp_path, torch.zeros(0, 3))).shape == (0, 3)


def test_directions_of_another_length_are_refused(tmp_path):
    info = stored(tmp_path, torch.zeros(4, 48))
    with pytest.raises(ValueError, match="the residual axis has length 4"):
        measure(tmp_path, info, directions=np.eye(1, 48), residual_axis=0)


def test_a_file_that_became_shorter_or_went_away_is_an_error_with_its_name(tmp_path):
    info = stored(tmp_path, random(64, 48))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[: info.end - 1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: it became shorter"):
        measure(tmp_path, info, directions=np.eye(1, 48), residual_axis=1)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read: No such file"):
        read_numbers(tmp_path, info)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("n_norms", [0, 1, 2])
def test_directions_are_seen_through_norms(n_norms, centered):
    directions = orthonormalize(random(3, 48))[0]
    gammas = [1 + 0.3 * random(48, seed=10 + index) for index in range(n_norms)]
    found = directions_behind(directions.numpy(), [(each.numpy(), centered) for each in gammas])
    np.testing.assert_allclose(found @ found.T, np.eye(3), rtol=0, atol=1e-14)
    # What has none of them comes out of the norms with none of the directions: y = gamma * (x - mean x), norm by norm.
    x = random(48, seed=99).numpy()
    y = x - found.T @ (found @ x)
    for gamma in gammas:
        y = gamma.numpy() * (y - y.mean() * centered)
    np.testing.assert_allclose(directions.numpy() @ y, 0, rtol=0, atol=1e-13)


def test_a_direction_that_a_norm_takes_away_is_left_out():
    gamma = np.ones(48)
    gamma[0] = 0
    directions = np.eye(2, 48)
    assert directions_behind(directions, [(gamma, False)]).tolist() == [np.eye(2, 48)[1].tolist()]
    with pytest.raises(ValueError, match="must be finite"):
        directions_behind(directions * math.nan, [])


@pytest.mark.parametrize("dtype", PLAIN_DTYPES)
def test_roundoff_is_what_torch_says(dtype):
    info = torch.finfo(TORCH_DTYPES[dtype])
    assert roundoff(dtype) == info.eps / 2
    assert residue_bound(dtype, d_model=1, elements=4, before=0, after=0) == info.tiny * info.eps / 2 * 2
