"""The fused arithmetic: the oracle is the same written with torch, bit for bit."""

import importlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abliterate.directions import make_direction
from abliterate.editing import edited_files, edited_tensors
from abliterate.editing.options import EditOptions
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.formats import segments
from abliterate.formats.projection import NormFactor, effective_directions, project_out, tensor_bits
from abliterate.formats.segments import NormSums
from abliterate.formats.stored_component import ComponentMeter
from tests.support.tiny_models import random_direction, save_tiny_model

# More columns than are worked on together, vectors longer and shorter than the lanes, parts of chunks.
SHAPES = [
    ((48, 20), 0),
    ((20, 48), 1),
    ((70, 1100), 0),
    ((9, 1000), 1),
    ((48,), 0),
    ((3, 48, 5), 1),
    ((3, 7, 130), 2),
    ((64, 1), 0),
    ((1, 257), 1),
    ((4, 3), 0),
]


NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@pytest.fixture
def runs(monkeypatch) -> list[str]:
    """What was projected by the kernels: without them the two sides of each comparison would be one."""
    seen: list[str] = []
    plain = edited_tensors.project_stored

    def project(kernels, old, new, **options):
        seen.append(old.dtype.str)
        return plain(kernels, old, new, **options)

    monkeypatch.setattr(edited_tensors, "project_stored", project)
    return seen


def bits(weight: Tensor) -> Tensor:
    return weight.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()])


@settings(deadline=None, max_examples=120)
@given(
    shape_axis=st.sampled_from(SHAPES),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float16, torch.float64]),
    seed=st.integers(0, 2**31),
    rank=st.integers(0, 3),
    strength=st.sampled_from([1, 1.0, 0.5, 2.0, 0.0, -1.0]),
    preserve_norms=st.booleans(),
    scale=st.sampled_from([1.0, 1e-6, 1e-30, 1e30, 0.0]),
    with_norm=st.booleans(),
    in_place=st.booleans(),
)
def test_the_bytes_are_those_of_the_plain_arithmetic(
    shape_axis, dtype, seed, rank, strength, preserve_norms, scale, with_norm, in_place
):
    assert segments.kernels_for("F32") is not None, "without numba both sides would be one"
    shape, axis = shape_axis
    generator = torch.Generator().manual_seed(seed)
    # Some numbers far larger than the others, as real weights have.
    weight = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp() * scale
    weight = weight.to(dtype)
    if dtype == torch.float16:
        weight = weight.nan_to_num().clamp(-3e4, 3e4)
    directions = torch.randn(rank, shape[axis], generator=generator, dtype=torch.float64)
    if with_norm:
        gamma = torch.randn(shape[axis], generator=generator)
        directions = effective_directions(directions, norms=[NormFactor(gamma=gamma)])
    options = {"directions": directions, "residual_axis": axis, "strength": strength, "preserve_norms": preserve_norms}
    sums = NormSums(), NormSums()
    plain = project_out(weight, before=sums[0], **options)
    target = weight.clone() if in_place else None
    source = weight if target is None else target
    fused = project_out(source, before=sums[1], out=target, fused=True, **options)
    assert torch.equal(bits(fused), bits(plain))
    for name in ("along_squared", "total_squared"):
        assert getattr(sums[1], name) == pytest.approx(getattr(sums[0], name), rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("dtype", list(NAMES))
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("rank", [1, 2])
def test_the_meter_measures_the_same(shape, axis, dtype, rank):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(shape, generator=generator).to(dtype)
    directions = torch.linalg.qr(torch.randn(shape[axis], rank, generator=generator, dtype=torch.float64)).Q.T
    results = []
    for fused in (False, True):
        name = NAMES[dtype]
        meter = ComponentMeter(directions.numpy(), shape=shape, residual_axis=axis, dtype=name, fused=fused)
        rows = tensor_bits(weight).view(segments.STORED[name]).reshape(-1, meter.row_length)
        for first in range(0, len(rows), 5):
            meter.add(rows[first : first + 5])
        results.append(meter.result())
    assert results[1].along == pytest.approx(results[0].along, rel=1e-12)
    assert results[1].norm == pytest.approx(results[0].norm, rel=1e-12)


def test_a_number_that_is_none_is_not_lost():
    for number in (float("nan"), float("inf"), -float("inf")):
        weight = torch.ones(48, 20, dtype=torch.bfloat16)
        weight[3, 4] = number
        sums = NormSums()
        project_out(weight, directions=torch.ones(1, 48), residual_axis=0, before=sums, fused=True)
        assert not torch.isfinite(torch.tensor(sums.total_squared))


@pytest.mark.parametrize("options", [{}, {"preserve_norms": True}, {"strength": 0.5}])
@pytest.mark.parametrize(("model_type", "dtype"), [("llama", torch.bfloat16), ("gpt2", torch.float16)])
def test_a_checkpoint_is_the_same_with_and_without(tmp_path: Path, monkeypatch, runs, model_type, dtype, options):
    base = save_tiny_model(tmp_path / "base", model_type, dtype=dtype)
    direction = make_direction(mean_difference=5 * random_direction())
    made = {}
    for name, worth in (("plain", 1 << 60), ("fused", 0)):
        monkeypatch.setattr(edited_files, "_WORTH_FUSING", worth)
        out = tmp_path / name
        orthogonalize_checkpoint(source=base, direction=direction, output=out, options=EditOptions(**options))
        made[name] = {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
        assert set(runs) == (set() if name == "plain" else {{torch.bfloat16: "<u2", torch.float16: "<i2"}[dtype]})
    assert made["plain"] == made["fused"]


def test_every_number_of_sixteen_bits_is_read_and_written_as_it_is() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        numbers = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
        weight = numbers[torch.isfinite(numbers)][None, :]
        kept = project_out(weight, directions=torch.eye(1, weight.shape[1]), residual_axis=1, strength=0.0, fused=True)
        assert torch.equal(bits(kept), bits(weight))


@pytest.mark.parametrize("error", [ImportError("no numba"), RuntimeError("cannot cache function")])
def test_without_a_compiler_or_a_folder_for_its_work_the_plain_arithmetic_is_used(monkeypatch, error):
    def fails(name: str) -> None:
        raise error

    segments.compiled_module.cache_clear()
    monkeypatch.setattr(importlib, "import_module", fails)
    try:
        assert segments.kernels_for("F32") is None
        weight = torch.randn(48, 20, dtype=torch.bfloat16)
        direction = torch.randn(1, 48)
        edited = project_out(weight, directions=direction, residual_axis=0, fused=True)
        assert torch.equal(edited, project_out(weight, directions=direction, residual_axis=0))
    finally:
        segments.compiled_module.cache_clear()


@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 1 << 7), (torch.float16, 1 << 10)])
@pytest.mark.parametrize("fused", [False, True])
def test_halfway_between_two_numbers_the_even_one_is_taken(dtype, least, fused):
    # Three quarters of a number with an odd last bit need one bit more than there is, or two.
    numbers = torch.arange(least, 2 * least, dtype=torch.float32)
    weight = torch.stack([numbers, -numbers]).to(dtype)
    direction = torch.tensor([[1.0, 0.0]])
    edited = project_out(weight, directions=direction, residual_axis=0, strength=0.25, fused=fused)
    wanted = torch.stack([0.75 * numbers, -numbers])
    assert (wanted.to(dtype) != wanted).sum() > least // 2
    assert torch.equal(edited, wanted.to(dtype))
