"""Compiled products: the oracle is the same in a library's products, and float64 of torch."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterate.inspection.products import Products, fused_products
from tests.support.stored_pairs import pair_of, random


@settings(deadline=None, max_examples=60)
@given(
    shape=st.sampled_from([(1, 1), (3, 7), (4, 1024), (9, 1025), (21, 300), (130, 16)]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    p=st.integers(1, 5),
    axis=st.sampled_from([0, 1]),
    split=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
def test_compiled_products_are_those_of_a_library(tmp_path_factory, shape, dtype, p, axis, split, seed):
    kernels = fused_products()
    assert kernels is not None, "without numba nothing is held against it"
    old = random(*shape, seed=seed).to(dtype)
    new = (old.double() + 0.1 * random(*shape, seed=seed + 1)).to(dtype)
    vectors = random(shape[1], p, seed=seed + 2).float().numpy()
    pair = pair_of(tmp_path_factory.mktemp("pair"), old, new)
    plain, fused = (Products(pair, vectors, axis=axis) for _ in range(2))
    totals = torch.zeros(3, dtype=torch.float64)
    both = (side.stored(split) for side in (pair.old, pair.new))
    for index, (before, after) in enumerate(zip(*both, strict=True)):
        part = slice(index * split, index * split + len(before))
        plain.add(part, old[part].float().numpy(), (new[part].float() - old[part].float()).numpy())
        totals += torch.tensor(fused.add_stored(part, before, after, kernels))
    wide, change = old.double(), new.double() - old.double()
    # D is rounded to float32 once in both.
    expected = torch.stack([wide.square().sum(), (wide * change).sum(), change.square().sum()])
    assert torch.allclose(totals, expected, rtol=1e-4, atol=1e-4 * float(expected[0]))
    scale = [max(1.0, float(np.abs(each).max())) if each.size else 1.0 for each in (plain.across, plain.along)]
    assert np.allclose(fused.across[axis == 0 :], plain.across[axis == 0 :], atol=1e-4 * scale[0])
    assert np.allclose(fused.along, plain.along, atol=1e-4 * scale[1])


def test_no_number_stays_none_when_it_is_compiled(tmp_path):
    kernels = fused_products()
    assert kernels is not None
    old = random(6, 20).bfloat16()
    new = old.clone()
    new[4, 3] = float("nan")
    pair = pair_of(tmp_path, old, new)
    made = Products(pair, random(20, 2).float().numpy(), axis=0)
    ((part, before, after),) = pair.stored()
    sums = made.add_stored(part, before, after, kernels)
    assert sums[2] != sums[2]
