"""Whole numbers in words: packed and read again, edited within their range; and what does not fit is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterate.checkpoints.encoding import EncodingError
from abliterate.checkpoints.safetensors_file import TensorInfo
from abliterate.directions import orthonormalize
from abliterate.formats.format_int import FORMATS, Packing
from tests.support.quantized_models import AWQ_ORDER, LAYOUTS, pack

WHOLE = [kind for kind in LAYOUTS if kind.startswith(("int", "gptq", "awq"))]
DTYPES = {
    torch.int32: "I32", torch.int64: "I64", torch.int8: "I8", torch.bfloat16: "BF16", torch.float16: "F16",
}  # fmt: skip


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def infos(tensors: dict[str, torch.Tensor]) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(name=name, shard="a", dtype=DTYPES[t.dtype], shape=tuple(t.shape), start=0, end=t.nbytes)
        for name, t in tensors.items()
    }


def find(kind: str, tensors: dict[str, torch.Tensor], **changes: object):
    """Return the encoding of a weight `x` that is stored as these tensors, and the tensors that it reads."""
    known = infos(tensors)
    found = [
        each.find(info, known, LAYOUTS[kind][0] | changes) for each in FORMATS for info in known.values()
    ]  # fmt: skip
    (info,) = [each for each in found if each is not None]
    return info, [tensors[each.name] for each in info.encoding.stored]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("axis", [0, 1])
@given(seed=st.integers(0, 99), n_words=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_codes_are_packed_as_a_plain_loop_packs_them(bits, axis, seed, n_words):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (n_words * 8, n_words * 8), generator=generator)
    for order in [None, AWQ_ORDER] if bits == 4 else [None]:
        packing = Packing(bits=bits, axis=axis, order=order)
        words = pack(codes, bits=bits, dim=axis, order=order)
        assert torch.equal(packing.unpacked(words), codes.short())
        assert torch.equal(packing.packed(codes.short()), words)


@pytest.mark.parametrize("kind", WHOLE)
def test_what_is_decoded_is_the_matrix_to_half_a_step(kind):
    plain = matrix(64, 128)
    tensors = LAYOUTS[kind][1]("x", plain)
    info, (codes, *companions) = find(kind, tensors)
    decoded = info.encoding.decode(codes, companions)
    assert info.name == "x.weight"
    assert info.shape == decoded.shape == plain.shape
    bits = 8 if "8" in kind else 4
    # Of the range of a row: half a step, and what bfloat16 takes from the ends by its scales.
    step = (plain.amax(dim=1) - plain.amin(dim=1)).max() / (2**bits - 1)
    assert float((decoded - plain).abs().max()) < 1.6 * float(step)


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("k", [1, 2])
def test_next_to_nothing_survives_at_the_width_of_real_models(kind, k):
    """Also where a row of 512 entries has one scale: steps are wide, and no entry leaves the grid at first."""
    basis = orthonormalize(torch.randn(k, 4096, generator=torch.Generator().manual_seed(3), dtype=torch.float64))[0]
    info, (codes, *companions) = find(kind, LAYOUTS[kind][1]("x", matrix(4096, 512)))
    encoding = info.encoding
    new = encoding.requantize(codes, companions, directions=basis, strength=1.0)
    assert (new.dtype, new.shape) == (codes.dtype, codes.shape)
    before, after = (basis @ encoding.decode(each, companions).double() for each in (codes, new))
    assert float(after.norm()) < 1e-4 * float(before.norm())
    assert float(after.norm()) <= encoding.largest_residue(d_model=4096, k=k, along=float(before.norm()), norm=0.0)
    refitted = encoding.refit(codes, companions, directions=basis, strength=1.0)
    assert all(torch.equal(one, other) for one, other in zip(refitted, companions, strict=True))
    assert encoding.rewritten == (encoding.codes,)


@pytest.mark.parametrize(("kind", "least"), [("int8 rows", 0.05), ("int4 groups", 0.9), ("awq", 0.9)])
def test_plain_rounding_would_give_much_of_it_back(kind, least):
    basis = orthonormalize(torch.randn(1, 4096, generator=torch.Generator().manual_seed(3), dtype=torch.float64))[0]
    info, (codes, *companions) = find(kind, LAYOUTS[kind][1]("x", matrix(4096, 512)))
    decoded = info.encoding.decode(codes, companions).double()
    scales = companions[0].double()
    scales = (scales.T if "awq" in kind else scales).repeat_interleave(info.encoding.group, dim=1)
    # Codes are whole numbers of steps: the nearest of them to the edited number.
    plain = ((decoded - basis.T @ (basis @ decoded)) / scales).round() * scales
    assert least < float((basis @ plain).norm() / (basis @ decoded).norm()) < 1.01


def test_an_entry_at_the_end_of_its_range_stays_within_it():
    """Rows that hold the least and the greatest code only: what is taken out must not run over."""
    codes = torch.where(torch.arange(64)[:, None] % 2 == 0, 0, 15).expand(64, 32)
    tensors = LAYOUTS["int4 groups"][1]("x", matrix(64, 32)) | {"x.weight_packed": pack(codes, bits=4, dim=1)}
    info, (packed, *companions) = find("int4 groups", tensors)
    basis = torch.nn.functional.normalize(torch.ones(1, 64, dtype=torch.float64), dim=1)
    new = info.encoding.requantize(packed, companions, directions=basis, strength=1.0)
    old_numbers, new_numbers = (info.encoding.decode(each, companions) for each in (packed, new))
    # Half of the entries would have to leave the range by a part of a step; those that wrap around move by all of it.
    assert float((new_numbers - old_numbers).abs().max()) < 0.3 * float(old_numbers.abs().max())
    assert float((basis @ new_numbers.double()).norm()) < 0.1 * float((basis @ old_numbers.double()).norm())


@pytest.mark.parametrize(
    ("kind", "change", "match"),
    [
        ("int4 groups", {"x.weight_g_idx": torch.zeros(128, dtype=torch.int32)}, "order of columns"),
        ("int4 groups", {"x.weight_scale": torch.ones(64, 3).bfloat16()}, "groups are not those"),
        ("int4 groups", {"x.weight_scale": torch.ones(64, 4).int()}, "groups are not those"),
        ("int4 groups", {"x.weight_zero_point": torch.zeros(8, 4).int()}, "groups are not those"),
        ("int4 groups with zeros", {"x.weight_zero_point": torch.zeros(7, 4).int()}, "groups are not those"),
        ("int8 rows", {"x.weight_scale": torch.ones(63, 1).bfloat16()}, "groups are not those"),
        ("gptq", {"x.scales": torch.ones(3, 64).half()}, "groups are not those"),
        ("gptq", {"x.qzeros": torch.zeros(4, 64).int()}, "zero points that do not fit"),
        ("awq", {"x.qzeros": torch.zeros(4, 8).half()}, "zero points that do not fit"),
    ],
)
def test_companions_that_do_not_fit_are_refused(kind, change, match):
    with pytest.raises(EncodingError, match=match):
        find(kind, LAYOUTS[kind][1]("x", matrix(64, 128)) | change)


def test_two_schemes_that_both_fit_are_not_guessed_between():
    first, second = (LAYOUTS[kind][0]["config_groups"]["group_0"] for kind in ("int4 groups", "int8 groups"))
    narrow = {"weights": second["weights"] | {"group_size": 16}}
    with pytest.raises(EncodingError, match="groups are not those"):
        find("int4 groups", LAYOUTS["int4 groups"][1]("x", matrix(64, 128)),
             config_groups={"group_0": first, "group_1": narrow})  # fmt: skip


@pytest.mark.parametrize("groups", [None, [], {"group_0": None}, {"group_0": {"weights": {"num_bits": "4"}}}])
def test_a_config_that_names_no_scheme_is_refused(groups):
    with pytest.raises(EncodingError, match="groups are not those"):
        find("int4 groups", LAYOUTS["int4 groups"][1]("x", matrix(64, 128)), config_groups=groups)


@pytest.mark.parametrize("size", ["128", 0, -2, 48])
def test_a_group_size_that_cannot_be_is_refused(size):
    with pytest.raises(EncodingError, match="groups are not those"):
        find("gptq", LAYOUTS["gptq"][1]("x", matrix(64, 128)), group_size=size)
