"""What stands between a quantised format and the rest: stacks cut into matrices, and formats found by their modules."""

from pathlib import Path

import pytest

from abliterate import formats
from abliterate.checkpoints.safetensors_file import TensorInfo
from abliterate.formats.block_scaled import BlockEncoding
from abliterate.formats.format_float import MXFP4
from abliterate.formats.quantized import is_handled, quantized_formats


def info(name: str, shape: tuple[int, ...], start: int, size: int) -> TensorInfo:
    return TensorInfo(name=name, shard="a", dtype="U8", shape=shape, start=start, end=start + size)


def test_a_stack_is_cut_with_its_companions_but_for_those_of_all_matrices() -> None:
    codes, scales = info("w_blocks", (2, 4, 1, 16), 100, 128), info("w_scales", (2, 4, 1), 300, 8)
    shared = info("w_global", (1,), 400, 1)
    encoding = BlockEncoding(codes=codes, companions=(scales, shared), layout=MXFP4, turned=True)
    first, second = encoding.matrices(2)
    assert (first.codes.start, first.codes.end, second.codes.start, second.codes.end) == (100, 164, 164, 228)
    assert second.codes.shape == (4, 1, 16)
    assert (second.companions[0].start, second.companions[0].end) == (304, 308)
    assert first.companions[1] == second.companions[1] == shared
    assert second.turned


def test_each_module_of_a_format_is_found() -> None:
    modules = sorted(Path(formats.__path__[0]).glob("format_*.py"))
    assert len(quantized_formats()) >= len(modules) >= 2
    names = [name for each in quantized_formats() for name in each.names]
    assert len(names) == len(set(names))


def test_a_config_is_handled_where_a_format_is_named_by_it() -> None:
    assert is_handled({"quantization_config": {"quant_method": "mxfp4"}})
    assert is_handled({"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}})
    assert not is_handled({"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}})
    assert not is_handled({"quantization_config": {"quant_method": "gptq"}})


@pytest.mark.parametrize("method", ["fp8", "modelopt", "compressed-tensors", "gptq", "awq", "mxfp4"])
@pytest.mark.parametrize("value", [{}, [], {"a": 1}, 7, None, ""])
def test_what_a_config_says_may_be_of_any_kind(method: str, value: object) -> None:
    keys = ("fmt", "quant_algo", "format", "config_groups", "bits", "checkpoint_format", "version", "desc_act")
    for key in keys:
        assert is_handled({"quantization_config": {"quant_method": method, key: value}}) in {True, False}
