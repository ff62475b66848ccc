"""FP4 in its layouts: read as their own decoder reads them, edited in the units of the whole matrix, or refused."""

import pytest
import torch

from abliterate.checkpoints.encoding import EncodingError
from abliterate.checkpoints.safetensors_file import TensorInfo
from abliterate.directions import orthonormalize
from abliterate.formats.format_float import FORMATS
from tests.support.quantized_models import LAYOUTS

FP4 = ["nvfp4", "modelopt nvfp4", "packed mxfp4", "fp4 in bytes"]
TWO_LEVELS = FP4[:2]
DTYPES = {
    torch.uint8: "U8", torch.int8: "I8", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0", torch.float16: "F16",
}  # fmt: skip
VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def matrix(rows: int, columns: int) -> torch.Tensor:
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def find(kind: str, tensors: dict[str, torch.Tensor]):
    known = {
        name: TensorInfo(name=name, shard="a", dtype=DTYPES[t.dtype], shape=tuple(t.shape), start=0, end=t.nbytes)
        for name, t in tensors.items()
    }
    found = [each.find(info, known, LAYOUTS[kind][0]) for each in FORMATS for info in known.values()]
    (info,) = [each for each in found if each is not None]
    return info, [tensors[each.name] for each in info.encoding.stored]


@pytest.mark.parametrize("kind", FP4)
def test_numbers_are_code_times_scale_times_that_of_the_whole(kind):
    tensors = LAYOUTS[kind][1]("x", matrix(8, 64))
    info, (codes, *companions) = find(kind, tensors)
    plain = codes.view(torch.uint8).long()
    pairs = VALUES[torch.stack([plain & 15, plain >> 4], dim=-1).flatten(-2)]
    scales = companions[0]
    numbers = torch.exp2(scales.float() - 127) if scales.dtype == torch.uint8 else scales.float()
    wanted = pairs * numbers.repeat_interleave(64 // numbers.shape[1], dim=1)
    if kind in TWO_LEVELS:
        wanted = wanted / companions[1] if kind == "nvfp4" else wanted * companions[1]
    decoded = info.encoding.decode(codes, companions)
    torch.testing.assert_close(decoded, wanted)
    # Half of the widest step, of the greatest number, which scales that are powers of two may make twice as wide.
    assert float((decoded - matrix(8, 64)).abs().max()) < 0.35 * float(matrix(8, 64).abs().max())


@pytest.mark.parametrize("kind", FP4)
def test_next_to_nothing_survives_at_the_width_of_real_models(kind):
    basis = orthonormalize(torch.randn(2, 4096, generator=torch.Generator().manual_seed(3), dtype=torch.float64))[0]
    info, (codes, *companions) = find(kind, LAYOUTS[kind][1]("x", matrix(4096, 64)))
    encoding = info.encoding
    new = encoding.requantize(codes, companions, directions=basis, strength=1.0)
    scales = encoding.refit(codes, companions, directions=basis, strength=1.0)
    assert [(each.dtype, each.shape) for each in (new, scales[0])] == [
        (each.dtype, each.shape) for each in (codes, companions[0])
    ]
    before = basis @ encoding.decode(codes, companions).double()
    after = basis @ encoding.decode(new, [*scales, *companions[len(scales) :]]).double()
    assert float(after.norm()) < 1e-4 * float(before.norm())
    assert [each.name for each in encoding.rewritten] == [each.name for each in encoding.stored[:2]]


@pytest.mark.parametrize("kind", TWO_LEVELS)
@pytest.mark.parametrize("number", [0.0, -1e-4, float("nan"), float("inf"), None])
def test_a_scale_of_the_whole_that_cannot_be_right_is_refused(kind, number):
    info, (codes, scales, whole) = find(kind, LAYOUTS[kind][1]("x", matrix(64, 64)))
    basis = torch.nn.functional.normalize(torch.ones(1, 64, dtype=torch.float64), dim=1)
    # None: the other way up, as the other of the two layouts has it.
    lie = whole.reciprocal() if number is None else torch.full_like(whole, number)
    with pytest.raises(ValueError, match="the scale of the whole matrix"):
        info.encoding.requantize(codes, [scales, lie], directions=basis, strength=1.0)


@pytest.mark.parametrize(
    ("kind", "change", "match"),
    [
        ("nvfp4", {"x.weight_global_scale": None}, "the scale of the whole matrix is not there"),
        ("modelopt nvfp4", {"x.weight_scale_2": None}, "the scale of the whole matrix is not there"),
        ("nvfp4", {"x.weight_global_scale": torch.ones(2)}, "not one number"),
        ("modelopt nvfp4", {"x.weight_scale_2": torch.ones(1).half()}, "not one number"),
        ("nvfp4", {"x.weight_scale": torch.ones(8, 2).to(torch.float8_e4m3fn)}, "not one for 16 numbers"),
        ("packed mxfp4", {"x.weight_scale": torch.ones(8, 4, dtype=torch.uint8)}, "not one for 32 numbers"),
        ("fp4 in bytes", {"x.scale": torch.ones(8, 2)}, "of a dtype that FP4 does not have"),
        ("packed mxfp4", {"x.weight_scale": torch.ones(8, 2, dtype=torch.int8)}, "dtype that is not known"),
    ],
)
def test_scales_that_do_not_fit_are_refused(kind, change, match):
    tensors = LAYOUTS[kind][1]("x", matrix(8, 64)) | change
    with pytest.raises(EncodingError, match=match):
        find(kind, {name: tensor for name, tensor in tensors.items() if tensor is not None})
