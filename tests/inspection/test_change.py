"""Bytes and numbers of two matrices, and the numerical rank of what lies between them."""

import math

import pytest
import torch

from abliterate.errors import CheckpointError
from abliterate.inspection.change import count_outliers, measure_change
from abliterate.inspection.numbers import ByteComparer, has_few_levels, steps
from tests.support.stored_pairs import pairs_of, random, stored


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("entries", "fused"), [(1 << 19, False), (1 << 12, False), (1 << 12, True)])
def test_norms_rank_and_vectors_are_those_of_a_dense_computation(tmp_path, monkeypatch, axis, dtype, entries, fused):
    # In a matrix that is large enough the vectors are looked for in some rows first.
    monkeypatch.setattr("abliterate.inspection.change._WORTH_SAMPLING", entries)
    old = (random(700, 300) / 10).to(dtype)
    new = (old.double() + 0.01 * random(700, 3, seed=1) @ random(3, 300, seed=2)).to(dtype)
    (pair,) = pairs_of(tmp_path, old, new)
    found = measure_change(pair, axis=axis, seed=1, fused=fused)
    change = new.double() - old.double()
    assert found.norm == pytest.approx(float(old.double().norm()), rel=1e-5)
    assert found.change == pytest.approx(float(change.norm()), rel=1e-5)
    assert found.rank == 3
    # Of the columns' axis the vectors are those of the rows that were looked at: 35 places of 5 rows.
    assert found.lines == (300 if axis == 0 else 700 if entries > 1 << 12 else 175)
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    assert found.values == pytest.approx(values[:3].tolist(), rel=2e-3)
    assert found.rest == pytest.approx(float(values[3:].norm()), abs=3e-3 * found.change)
    assert found.rest_is_rounding
    assert not found.is_rounding
    vectors = left[:, :3] if axis == 0 else right[:3].T
    assert found.span is not None
    seen = torch.from_numpy(found.span.vectors)
    assert float(torch.linalg.svdvals(seen.T @ vectors).min()) > 0.9999
    turned = old.double() if axis == 0 else old.double().T
    assert torch.allclose(torch.from_numpy(found.span.before).double(), seen.T @ turned, atol=1e-4)


def test_noise_of_full_rank_has_none_and_rounding_is_told_from_it(tmp_path):
    old = random(300, 400).float()
    (pair,) = pairs_of(tmp_path, old, old + 1e-3 * random(300, 400, seed=1).float())
    assert (measure_change(pair, axis=0, seed=1).rank, measure_change(pair, axis=0, seed=1).rest_is_rounding) == (
        0,
        False,
    )
    (pair,) = pairs_of(tmp_path, old, old.bfloat16())
    found = measure_change(pair, axis=0, seed=1)
    assert found.is_rounding
    assert found.change == pytest.approx(found.rounding, rel=0.05)


@pytest.mark.parametrize("row", [5, 20, 699])
def test_a_change_of_one_row_is_seen_wherever_it_is(tmp_path, monkeypatch, row):
    monkeypatch.setattr("abliterate.inspection.change._WORTH_SAMPLING", 1 << 12)
    old = random(700, 300).bfloat16()
    new = old.clone()
    new[row] += random(300, seed=4).bfloat16()
    (pair,) = pairs_of(tmp_path, old, new)
    found = measure_change(pair, axis=0, seed=1)
    assert found.change == pytest.approx(float((new.double() - old.double()).norm()), rel=1e-5)
    assert found.rank == 1
    assert not found.is_rounding


def test_one_number_that_is_further_off_is_no_rounding(tmp_path):
    old = random(300, 400).float()
    new = old.bfloat16()
    new[200, 7] += 0.5
    (pair,) = pairs_of(tmp_path, old, new)
    assert not measure_change(pair, axis=0, seed=1).is_rounding


def test_a_full_rank_that_is_small_is_not_called_low():
    values = torch.linalg.svdvals(random(64, 128)).tolist()
    assert count_outliers(values, math.hypot(*values), floor=0.0, m=64, n=128) == 0
    low = torch.linalg.svdvals(random(64, 32) @ random(32, 128, seed=1) + 0.1 * random(64, 128, seed=2)).tolist()
    assert count_outliers(low, math.hypot(*low), floor=0.0, m=64, n=128) == 32


def test_stacks_are_taken_apart_and_vectors_are_one_row(tmp_path):
    old = random(3, 20, 30).float()
    new = old.clone()
    new[1] += 1.0
    found = [measure_change(pair, axis=0, seed=1).change for pair in pairs_of(tmp_path, old, new)]
    assert found == pytest.approx([0.0, math.sqrt(600), 0.0])
    assert [pair.shape for pair in pairs_of(tmp_path, random(5).float(), random(5).float())] == [(1, 5)]


def test_not_a_number_is_named(tmp_path):
    old = random(10, 20).float()
    new = old.clone()
    new[3, 4] = float("nan")
    (pair,) = pairs_of(tmp_path, old, new)
    with pytest.raises(CheckpointError, match=r"new.safetensors: tensor w, or that of the base, holds NaN"):
        measure_change(pair, axis=0, seed=1)


@pytest.mark.parametrize("fused", [False, True])
def test_not_a_number_that_the_first_look_does_not_see_is_named(tmp_path, monkeypatch, fused):
    monkeypatch.setattr("abliterate.inspection.change._WORTH_SAMPLING", 1 << 12)
    old = random(700, 300).bfloat16()
    new = (old.double() + 0.1 * random(700, 1, seed=1) @ random(1, 300, seed=2)).bfloat16()
    # 35 places of 5 rows, each 20 behind the other.
    new[17, 4] = float("inf")
    (pair,) = pairs_of(tmp_path, old, new)
    with pytest.raises(CheckpointError, match=r"holds NaN or infinite values"):
        measure_change(pair, axis=0, seed=1, fused=fused)


@pytest.mark.parametrize("size", [7, 1 << 20, (4 << 20) + 12])
def test_bytes_are_compared_to_the_end(tmp_path, size):
    old = torch.zeros(size, dtype=torch.uint8)
    new = old.clone()
    new[-1] = 1
    first, second = stored(tmp_path / "a.safetensors", old), stored(tmp_path / "b.safetensors", new)
    comparer = ByteComparer()
    assert comparer.same((tmp_path, first), (tmp_path, first))
    assert not comparer.same((tmp_path, first), (tmp_path, second))
    with (tmp_path / "b.safetensors").open("r+b") as file:
        file.truncate(second.end - 3)
    with pytest.raises(CheckpointError, match=r"b.safetensors: it became shorter"):
        comparer.same((tmp_path, first), (tmp_path, second))


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")])
def test_a_step_leads_to_the_next_number(dtype, name):
    numbers = (random(500).float().abs() * torch.logspace(-6, 2, 500)).to(dtype)
    after = torch.nextafter(numbers, torch.full_like(numbers, torch.inf))
    assert torch.equal(torch.from_numpy(steps(numbers.float().numpy(), name)), after.float() - numbers.float())


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2],
)
def test_numbers_are_read_as_torch_reads_them(tmp_path, dtype):
    # Every pattern of eight and sixteen bits: subnormal ones, infinities and what is no number are among them.
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    weight = (bits.float() * 1e-3).double() if dtype in (torch.float64, torch.float32) else bits.view(dtype)
    weight = weight.to(dtype).reshape(-1, 512)
    (pair,) = pairs_of(tmp_path, weight, weight)
    found = torch.cat([torch.from_numpy(block.copy()) for block in pair.new.blocks(7)])
    assert found.dtype == torch.float32
    assert torch.equal(found.nan_to_num(nan=12345.0), weight.float().nan_to_num(nan=12345.0))


def test_a_coarse_grid_is_seen_though_it_is_stored_finely(tmp_path):
    old = random(200, 200).bfloat16()
    scale = old.float().abs().max() / 448
    eight = ((old.float() / scale).to(torch.float8_e4m3fn).float() * scale).bfloat16()
    four = (old.float() * 2).round().clamp(-7, 7).bfloat16() / 2
    assert [has_few_levels(pairs_of(tmp_path, old, each)[0]) for each in (old, eight, four)] == [None, 8, 4]
    assert has_few_levels(pairs_of(tmp_path, eight, eight)[0]) is None
