"""Stored grids, decoded by formulas of the test's own; and an edit that stays through requantising."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterate.directions import orthonormalize
from abliterate.formats.block_scaled import BlockLayout, decode, encode, refitted_scales, requantize
from abliterate.formats.format_float import E4M3, MXFP4, NVFP4, PACKED_MXFP4

FP8_BLOCK = BlockLayout(grid=E4M3, block=(128, 128))
FP8_UE8M0 = BlockLayout(grid=E4M3, block=(128, 128), power_of_two=True)
FP4_VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def rows_of(columns: int) -> BlockLayout:
    return BlockLayout(grid=E4M3, block=(1, columns))


def whole(rows: int, columns: int) -> BlockLayout:
    return BlockLayout(grid=E4M3, block=(rows, columns))


# Name -> layout of a [rows, columns] matrix, dtype of its scales, the largest share that may survive.
KINDS = {
    "fp8 block": (lambda _r, _c: FP8_BLOCK, torch.float32, 0.005),
    "fp8 block, bf16 scales": (lambda _r, _c: FP8_BLOCK, torch.bfloat16, 0.005),
    "fp8 ue8m0 in float32": (lambda _r, _c: FP8_UE8M0, torch.float32, 0.005),
    "fp8 ue8m0": (lambda _r, _c: FP8_UE8M0, torch.float8_e8m0fnu, 0.005),
    "fp8 per tensor": (whole, torch.float32, 0.005),
    "fp8 per row": (lambda _r, c: rows_of(c), torch.bfloat16, 0.005),
    "mxfp4": (lambda _r, _c: MXFP4, torch.uint8, 0.05),
    "packed mxfp4": (lambda _r, _c: PACKED_MXFP4, torch.uint8, 0.05),
    "packed mxfp4, e8m0": (lambda _r, _c: PACKED_MXFP4, torch.float8_e8m0fnu, 0.05),
    "nvfp4": (lambda _r, _c: NVFP4, torch.float8_e4m3fn, 0.05),
}


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def basis(k: int, d_model: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return orthonormalize(torch.randn(k, d_model, generator=generator, dtype=torch.float64))[0]


def stored(kind: str, rows: int, columns: int, seed: int = 0):
    make, dtype, most = KINDS[kind]
    layout = make(rows, columns)
    return layout, *encode(matrix(rows, columns, seed), layout=layout, scale_dtype=dtype), most


def share(values: torch.Tensor, directions: torch.Tensor) -> float:
    return float((directions @ values.double()).norm())


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 9), groups=st.integers(1, 3), seed=st.integers(0, 99))
def test_what_was_stored_is_stored_again_unchanged(kind, rows, groups, seed):
    layout, codes, scales, _ = stored(kind, rows, 32 * groups, seed)
    values = decode(codes, scales, layout=layout)
    step = 2.0**-4 if layout.grid is E4M3 else 0.5
    largest = matrix(rows, 32 * groups, seed).abs().max()
    assert float((values - matrix(rows, 32 * groups, seed)).abs().max()) <= step * float(largest) * 2
    again = encode(values, layout=layout, scale_dtype=scales.dtype)
    if layout.power_of_two:
        # A largest entry that was rounded up to the end of the grid may need the next power; the numbers are the same.
        torch.testing.assert_close(decode(*again, layout=layout), values, rtol=0, atol=0)


def test_the_codes_of_fp8_are_those_of_torch():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(16, 16)
    scales = torch.tensor([[3.0]])
    found = decode(codes, scales, layout=FP8_BLOCK)
    torch.testing.assert_close(found, codes.float() * 3, rtol=0, atol=0, equal_nan=True)


def test_the_codes_of_mxfp4_are_read_low_half_first():
    codes = torch.arange(256, dtype=torch.uint8).reshape(2, 8, 16)
    scales = torch.arange(120, 136, dtype=torch.uint8).reshape(2, 8)
    found = decode(codes, scales, layout=MXFP4)
    for row in range(2):
        for group in range(8):
            for index in range(16):
                byte = int(codes[row, group, index])
                for half, code in ((0, byte & 15), (1, byte >> 4)):
                    value = FP4_VALUES[code & 7] * (-1 if code & 8 else 1) * 2.0 ** (int(scales[row, group]) - 127)
                    assert float(found[row, 32 * group + 2 * index + half]) == value


def test_mxfp4_is_decoded_as_transformers_does():
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (2, 6, 3, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 140, (2, 6, 3), generator=generator, dtype=torch.uint8)
    wanted = mxfp4.convert_moe_packed_tensors(codes, scales, dtype=torch.float32)
    torch.testing.assert_close(decode(codes, scales, layout=MXFP4).transpose(1, 2), wanted, rtol=0, atol=0)


def test_ragged_blocks_have_the_scale_of_their_place():
    layout, codes, scales, _ = stored("fp8 block", 130, 257)
    assert scales.shape == (2, 3)
    wanted = codes.float() * scales.repeat_interleave(128, 0)[:130].repeat_interleave(128, 1)[:, :257]
    torch.testing.assert_close(decode(codes, scales, layout=layout), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "columns", "k"),
    [
        (64, 96, 1),
        (64, 96, 2),
        (320, 160, 1),
        pytest.param(4096, 64, 1, marks=pytest.mark.proof),
        pytest.param(4096, 64, 2, marks=pytest.mark.proof),
    ],
)
def test_an_edit_survives_requantising(kind, rows, columns, k):
    layout, codes, scales, most = stored(kind, rows, columns)
    directions, old = basis(k, rows), decode(codes, scales, layout=layout)
    result = requantize(codes, scales, layout=layout, directions=directions)
    new = decode(result.codes, result.scales, layout=layout)
    assert result.codes.shape == codes.shape
    assert (result.codes.dtype, result.scales.dtype) == (codes.dtype, scales.dtype)
    assert result.before == pytest.approx((share(old, directions), float(old.double().norm())))
    assert result.after == pytest.approx((share(new, directions), float(new.double().norm())), rel=1e-4, abs=1e-9)
    # Plain rounding would leave a good part, and what is better is not much further from the exact edit.
    exact = old.double() - directions.T @ (directions @ old.double())
    plain = decode(*encode(exact.float(), layout=layout, scale_dtype=scales.dtype), layout=layout)
    assert share(new, directions) <= most * share(old, directions)
    assert share(new, directions) < 0.1 * share(plain, directions)
    edit = float((old.double() - exact).norm())
    assert float((new.double() - exact).norm()) < 1.5 * float((plain.double() - exact).norm()) + 1.5 * edit


@pytest.mark.parametrize("kind", ["fp8 block", "mxfp4"])
@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_another_strength_leaves_its_share(kind, strength):
    layout, codes, scales, _ = stored(kind, 256, 64)
    directions = basis(1, 256)
    result = requantize(codes, scales, layout=layout, directions=directions, strength=strength)
    old, new = (
        directions @ decode(*pair, layout=layout).double() for pair in ((codes, scales), (result.codes, result.scales))
    )
    torch.testing.assert_close(new, (1 - strength) * old, rtol=0, atol=2e-2 * float(old.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_no_component_keeps_every_byte(kind):
    make, dtype, _ = KINDS[kind]
    values = matrix(96, 64)
    values[7] = 0
    values[8] = -0.0
    layout = make(96, 64)
    codes, scales = encode(values, layout=layout, scale_dtype=dtype)
    if layout.grid is E4M3:
        codes = codes.view(torch.uint8).clone()
        codes[8] = 0x80
        codes = codes.view(torch.float8_e4m3fn)
    directions = torch.zeros(1, 96, dtype=torch.float64)
    directions[0, 7] = 1
    result = requantize(codes, scales, layout=layout, directions=directions)
    assert torch.equal(result.codes.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(result.scales.view(torch.uint8), scales.view(torch.uint8))
    assert result.after[0] == 0


@pytest.mark.parametrize("kind", ["fp8 block", "fp8 ue8m0", "fp8 per row", "mxfp4"])
def test_a_block_that_does_not_fit_any_more_gets_a_new_scale_and_no_other(kind):
    make, dtype, _ = KINDS[kind]
    values = 0.01 * torch.ones(256, 256)
    values[:128] = 1e-4
    directions = torch.zeros(2, 256, dtype=torch.float64)
    # Taking away what row 0 shares with row 200 puts large numbers into a block of small ones.
    directions[0, [0, 200]] = 0.5**0.5
    directions = directions[:1]
    layout = make(256, 256)
    codes, scales = encode(values, layout=layout, scale_dtype=dtype)
    new = refitted_scales(codes, scales, layout=layout, directions=directions)
    changed = (new.view(torch.uint8) != scales.view(torch.uint8)).reshape(*scales.shape, -1).any(-1)
    first_row = torch.zeros_like(changed)
    first_row[0] = True
    assert bool(changed.any())
    assert not bool((changed & ~first_row).any())
    result = requantize(codes, scales, layout=layout, directions=directions)
    assert result.after[0] < 0.05 * result.before[0]


def test_nan_is_refused():
    codes = torch.full((4, 4), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="NaN"):
        requantize(codes, torch.ones(1, 1), layout=FP8_BLOCK, directions=basis(1, 4))


def test_chunks_do_not_show(monkeypatch):
    layout, codes, scales, _ = stored("fp8 block", 64, 300)
    whole_result = requantize(codes, scales, layout=layout, directions=basis(1, 64))
    monkeypatch.setattr("abliterate.formats.block_scaled._BLOCK_ELEMENTS", 64 * 50)
    result = requantize(codes, scales, layout=layout, directions=basis(1, 64))
    assert torch.equal(result.scales, whole_result.scales)
    assert result.after[0] < 1e-3 * result.before[0]
