"""Which formats are handled, and a quantised checkpoint as the numbers that it means."""

import json

import pytest
import torch
from safetensors.torch import save_file

from abliterate.checkpoints.checkpoint import open_checkpoint
from abliterate.errors import CheckpointError, QuantizedCheckpointError
from abliterate.formats.quantized import base_in_words, dequantized_layout, is_handled, plain_view, quantization_of

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [4, 4]}
CODES, SCALES = "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.weight_scale_inv"


def save(path, tensors, config=FP8):
    """Save a checkpoint of these tensors in one file, and open it."""
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    return open_checkpoint(path)


def pair(rows=8, columns=6, scales=(2, 2)):
    return {CODES: torch.zeros(rows, columns, dtype=torch.float8_e4m3fn), SCALES: torch.ones(scales)}


def _mixed(*formats: str) -> dict[str, object]:
    groups = {f"group_{number}": {"format": name} for number, name in enumerate(formats)}
    return {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}


@pytest.mark.parametrize(
    ("content", "handled"),
    [
        ({"quant_method": "fp8"}, True),
        ({"quant_method": "fp8", "fmt": "e5m2"}, False),
        ({"quant_method": "mxfp4"}, True),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, True),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, True),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, True),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, False),
        (_mixed("nvfp4-pack-quantized", "float-quantized"), True),
        (_mixed("naive-quantized"), False),
        ({"quant_method": "gptq"}, False),
        ({"quant_method": "gptq", "bits": 4}, True),
        ({"quant_method": "gptq", "bits": 3}, False),
        ({"quant_method": "gptq", "bits": 4, "desc_act": True}, False),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, False),
        ({"quant_method": "awq", "bits": 4, "version": "GEMM"}, True),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, False),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, True),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, False),
    ],
)
def test_which_formats_are_handled(content, handled):
    assert is_handled({"quantization_config": content}) is handled
    assert is_handled({"compression_config": content}) is handled


def test_a_config_that_names_no_method():
    assert quantization_of({}) is None
    assert quantization_of({"quantization_config": {}}) is None
    assert quantization_of({"quantization_config": "mine"}) == ("unknown", {})
    assert not is_handled({})


def test_the_model_to_use_instead_is_named_where_it_is_known():
    assert "org/plain as base_model" in base_in_words({"base_model": "org/plain"})
    assert base_in_words({"_name_or_path": ""}) == "use the model it was quantised from"


def test_codes_and_scales_are_one_plain_tensor(tmp_path):
    others = {"lm_head.weight": torch.ones(2), "model.layers.0.mlp.down_proj.input_scale": torch.ones(1)}
    view = plain_view(save(tmp_path / "base", pair() | others))
    assert "quantization_config" not in view.config
    tensors = {tensor.name: tensor for tensor in view.tensors()}
    assert tensors.keys() == {CODES, "lm_head.weight"}
    assert (tensors[CODES].dtype, tensors[CODES].shape) == ("BF16", (8, 6))
    assert tensors[CODES].encoding.layout.block == (4, 4)
    assert tensors["lm_head.weight"].encoding is None


def test_once_it_is_dequantised_the_offsets_are_those_of_two_bytes_a_number(tmp_path):
    view = plain_view(save(tmp_path / "base", pair()))
    (shard,) = dequantized_layout(view).shards
    (tensor,) = shard.tensors
    assert (tensor.encoding, tensor.start, tensor.end - tensor.start) == (None, len(shard.header_bytes), 2 * 8 * 6)


@pytest.mark.parametrize(("scales", "block"), [((1,), (8, 6)), ((8, 1), (1, 6)), ((2, 2), (4, 4)), ((8, 6), (1, 1))])
def test_the_block_is_told_from_the_shapes(tmp_path, scales, block):
    (tensor,) = plain_view(save(tmp_path / "base", pair(scales=scales))).tensors()
    assert tensor.encoding.layout.block == block


def test_a_plain_checkpoint_is_its_own_view(tmp_path):
    checkpoint = save(tmp_path / "base", {"lm_head.weight": torch.ones(2)}, config=None)
    assert plain_view(checkpoint) is checkpoint


def test_what_is_not_known_to_be_read_rightly_is_refused(tmp_path):
    with pytest.raises(QuantizedCheckpointError, match="whose blocks are not those that"):
        plain_view(save(tmp_path / "blocks", pair(scales=(3, 2))))
    with pytest.raises(QuantizedCheckpointError, match="of a dtype that is not known"):
        plain_view(save(tmp_path / "dtype", pair() | {SCALES: torch.ones(2, 2, dtype=torch.float64)}))
    with pytest.raises(QuantizedCheckpointError, match="the quantisation method gptq is not one that can be decoded"):
        plain_view(save(tmp_path / "method", pair(), config={"quant_method": "gptq"}))


def test_a_tensor_that_is_there_plain_and_quantised(tmp_path):
    codes = torch.zeros(2, 1, 16, dtype=torch.uint8)
    tensors = {"a_blocks": codes, "a_scales": torch.zeros(2, 1, dtype=torch.uint8), "a": torch.zeros(2)}
    with pytest.raises(CheckpointError, match="tensor a is there plain and quantised"):
        plain_view(save(tmp_path / "base", tensors, config={"quant_method": "mxfp4"}))


@pytest.mark.parametrize("key", ["quant_method", "base_model"])
def test_what_a_config_says_stays_on_one_line(tmp_path, key):
    base = tmp_path / "base"
    save(base, pair(), config={"quant_method": "a\nb" if key == "quant_method" else "gptq"})
    config = json.loads((base / "config.json").read_text()) | {"base_model": "c\nd\x1b[2J"}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(QuantizedCheckpointError) as caught:
        plain_view(open_checkpoint(base))
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert "c d" in str(caught.value)


@pytest.mark.parametrize("size", [3, "128", True, {"a": 1}])
def test_a_block_size_that_is_no_list_is_none(tmp_path, size):
    config = {"quant_method": "fp8", "weight_block_size": size}
    with pytest.raises(QuantizedCheckpointError, match="whose blocks are not those that"):
        plain_view(save(tmp_path / "base", pair(scales=(3, 2)), config=config))
