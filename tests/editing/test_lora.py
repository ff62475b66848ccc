"""The factors of an edit: their product is the edit, in PEFT's layout, and merging them is what they say it is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterate.directions import orthonormalize
from abliterate.editing.lora import coefficients, merge_factors, pack_factors, unpack_factors
from abliterate.formats.projection import project_out

SHAPES = {0: (12, 7), 1: (7, 12), "experts, out": (3, 12, 7), "experts, in": (3, 7, 12)}
AXES = {0: 0, 1: 1, "experts, out": 1, "experts, in": 2}


def basis(k: int, d_model: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return orthonormalize(torch.randn(k, d_model, generator=generator, dtype=torch.float64))[0]


def weight(kind, dtype: torch.dtype = torch.float64, seed: int = 1) -> torch.Tensor:
    return torch.randn(SHAPES[kind], generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def product(first: torch.Tensor, second: torch.Tensor, *, experts: int) -> torch.Tensor:
    """B A for each expert, [E, out, in], by PEFT's own formula: rows of A by expert, columns of B by rank."""
    wide_a = first.reshape(experts, -1, first.shape[-1])
    wide_b = second.reshape(second.shape[0], -1, experts)
    return torch.einsum("o r e, e r i -> e o i", wide_b, wide_a)


@pytest.mark.parametrize("kind", SHAPES)
@settings(deadline=None, max_examples=40)
@given(k=st.integers(1, 4), extra=st.integers(0, 2), strength=st.floats(0.1, 2))
def test_the_product_of_the_factors_is_the_edit(kind, k, extra, strength):
    old, directions, axis = weight(kind), basis(k), AXES[kind]
    experts = old.shape[0] if old.dim() == 3 else 1
    on_b = axis == old.dim() - 2
    found = coefficients(old, directions=directions, residual_axis=axis, strength=strength)
    first, second = pack_factors(found, directions, rank=k + extra, residual_on_b=on_b)
    assert first.shape == (experts * (k + extra), old.shape[-1])
    assert second.shape == (old.shape[-2], experts * (k + extra))
    assert first.is_contiguous()
    assert second.is_contiguous()
    new = project_out(old, directions=directions, residual_axis=axis, strength=strength)
    change = product(first, second, experts=experts)
    torch.testing.assert_close(old + change.reshape(old.shape), new, rtol=0, atol=1e-13)
    assert torch.linalg.matrix_rank(change[0], tol=1e-10) == k
    unpacked = unpack_factors(first, second, experts=experts, residual_on_b=on_b)
    assert torch.equal(unpacked[0][:, :k], found)
    assert torch.equal(unpacked[1][0, :k], directions)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", SHAPES)
def test_what_merging_gives_is_measured_on_the_rounded_sum(kind, dtype):
    old, directions, axis = weight(kind, dtype), basis(2), AXES[kind]
    found = coefficients(old, directions=directions, residual_axis=axis)
    spanned = directions.expand(len(found), -1, -1)
    result = merge_factors(old, found, spanned, directions=directions, residual_axis=axis)
    turned = old if axis == old.dim() - 2 else old.transpose(-1, -2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # Matrix by matrix: a batched product may be summed in another order.
    change = torch.stack([span.T @ part for span, part in zip(spanned.to(wide), found, strict=True)])
    merged = (turned.to(wide) + change).to(dtype).double()
    assert result.before.along == pytest.approx(float((directions @ turned.double()).norm()))
    assert result.before.norm == pytest.approx(float(old.double().norm()))
    assert result.after.along == pytest.approx(float((directions @ merged).norm()), abs=1e-13)
    assert result.after.norm == pytest.approx(float(merged.norm()))
    assert result.after.along < torch.finfo(dtype).eps * result.before.norm
    assert result.change_error < 20 * torch.finfo(wide).eps * result.before.norm


@pytest.mark.parametrize("spoil", ["coefficients", "directions"])
def test_factors_of_another_edit_are_noticed(spoil):
    old, directions = weight(0, torch.float32), basis(1)
    found = coefficients(old, directions=directions, residual_axis=0)
    spanned = directions.expand(1, -1, -1).clone()
    (found if spoil == "coefficients" else spanned)[0, 0, 3] += 0.01
    result = merge_factors(old, found, spanned, directions=directions, residual_axis=0)
    assert result.change_error > 0.005


def test_blocks_do_not_show(monkeypatch):
    old, directions = weight(0, torch.bfloat16), basis(2)
    whole = coefficients(old, directions=directions, residual_axis=0)
    spanned = directions.expand(1, -1, -1)
    before = merge_factors(old, whole, spanned, directions=directions, residual_axis=0)
    monkeypatch.setattr("abliterate.editing.lora._BLOCK_ELEMENTS", 24)
    torch.testing.assert_close(coefficients(old, directions=directions, residual_axis=0), whole)
    again = merge_factors(old, whole, spanned, directions=directions, residual_axis=0)
    assert again.after.along == pytest.approx(before.after.along)


def test_a_vector_has_no_factors():
    with pytest.raises(ValueError, match="1 axes"):
        coefficients(torch.ones(12), directions=basis(1), residual_axis=0)
