"""Products of a pair in one pass: the oracle is a dense computation."""

import pytest
import torch

from abliterate.formats import segments
from abliterate.inspection.products import Products, fused_products
from tests.support.stored_pairs import pair_of, random


@pytest.mark.parametrize("axis", [0, 1])
def test_products_are_those_of_a_dense_computation(tmp_path, axis):
    old, vectors = random(90, 40).float(), random(40, 3, seed=2).float()
    new = old + 0.1 * random(90, 40, seed=1).float()
    pair = pair_of(tmp_path, old, new)
    found = Products(pair, vectors.numpy(), axis=axis)
    for part, before, change in pair.blocks():
        found.add(part, before, change)
    across = (new - old) @ vectors
    seen_across, seen_along = map(torch.from_numpy, (found.across, found.along))
    assert torch.allclose(seen_across[1], across, atol=1e-4)
    if axis == 1:
        assert torch.allclose(seen_across[0], old @ vectors, atol=1e-4)
    else:
        assert torch.allclose(seen_along[0], across.T @ old, atol=1e-3)
        assert torch.allclose(seen_along[1], across.T @ (new - old), atol=1e-3)


def test_what_is_stored_otherwise_is_not_fused(tmp_path):
    old = random(8, 8)
    for index, (one, other, fits) in enumerate((
        (torch.bfloat16, torch.bfloat16, True),
        (torch.float16, torch.float16, True),
        (torch.float32, torch.float32, True),
        (torch.float64, torch.float64, False),
        (torch.bfloat16, torch.float16, False),
    )):  # fmt: skip
        work = tmp_path / str(index)
        work.mkdir()
        made = Products(pair_of(work, old.to(one), old.to(other)), random(8, 2).float().numpy(), axis=0)
        assert made.can_be_fused == fits


def test_without_a_compiler_there_are_no_kernels(monkeypatch):
    def missing(name):
        raise ImportError(name)

    segments.compiled_module.cache_clear()
    monkeypatch.setattr(segments.importlib, "import_module", missing)
    try:
        assert fused_products() is None
    finally:
        segments.compiled_module.cache_clear()
