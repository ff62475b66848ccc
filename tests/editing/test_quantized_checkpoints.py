"""Quantised checkpoints: edited in their own layout, loaded by transformers, verified; or refused."""

import json
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import abliterate.editing.edited_tensors
from abliterate.checkpoints.checkpoint import open_checkpoint
from abliterate.checkpoints.stored_tensors import read_tensor, tensor_bytes
from abliterate.directions import Direction, make_direction
from abliterate.editing.adapter import write_adapter
from abliterate.editing.options import EditOptions, WriteOptions
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.errors import CheckpointError, InputError, QuantizedCheckpointError, VerificationError
from abliterate.formats.quantized import plain_view
from abliterate.models.options import ModelOptions
from abliterate.release.options import VerificationOptions
from abliterate.release.reverting import revert_checkpoint
from abliterate.release.verification import VerificationReport, verify_checkpoint
from tests.support.loaded_models import stored, stream_component, tree
from tests.support.quantized_models import LAYOUTS, save_mxfp4_gpt_oss, save_quantized_llama
from tests.support.tiny_models import random_direction, save_tiny_llama

REQUANTIZE = EditOptions(quantized="requantize")
DEQUANTIZE = EditOptions(quantized="dequantize")
KINDS = [*LAYOUTS, "mxfp4"]
# Those of eight bits; the others have four.
EIGHT_BITS = [
    "block",
    "mxfp8",
    "ue8m0",
    "per tensor",
    "compressed",
    "modelopt fp8",
    "int8 groups",
    "int8 rows",
    "gptq, 8 bits",
]
COMPRESSED = [kind for kind, (content, _) in LAYOUTS.items() if "config_groups" in content]
# What transformers loads, by itself or with the format's own package, compressed-tensors, where that decodes on a CPU.
LOADED = ["block", "ue8m0", "per tensor", "mxfp4", "fp4 in bytes", *COMPRESSED]


def save(path: Path, kind: str) -> tuple[Path, Direction]:
    base = save_mxfp4_gpt_oss(path) if kind == "mxfp4" else save_quantized_llama(path, kind)
    return base, make_direction(mean_difference=random_direction(64 if kind == "mxfp4" else 256))


def load(path: Path, dtype: torch.dtype = torch.float32):
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager"}
    content = json.loads((path / "config.json").read_text()).get("quantization_config", {})
    if "config_groups" in content:
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(path, **options).eval().to(dtype)


def verify(out: Path, *, quick: bool = False) -> VerificationReport:
    return verify_checkpoint(
        checkpoint=out,
        options=VerificationOptions(n_prompts=1, quick=quick),
        model_options=ModelOptions(device="cpu"),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_layout_stays_and_next_to_nothing_survives(tmp_path, kind):
    base, direction = save(tmp_path / "base", kind)
    report = orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out", options=REQUANTIZE)
    old, new = stored(base), stored(tmp_path / "out")
    assert [(n, t.dtype, t.shape) for n, t in new.items()] == [(n, t.dtype, t.shape) for n, t in old.items()]
    quantized = [tensor for tensor in report.tensors if tensor.edit.stored_as]
    assert len(quantized) == (3 if kind == "mxfp4" else 6)
    most = 0.005 if kind in EIGHT_BITS else 0.05
    for tensor in report.tensors:
        assert tensor.component_before > 0.01
        assert tensor.survivor < (most if tensor.edit.stored_as else 0.005)
    edited = {name for tensor in report.tensors for name in tensor.edit.stored_as or (tensor.name,)}
    changed = {name for name in old if bytes(tensor_bytes(old[name])) != bytes(tensor_bytes(new[name]))}
    assert changed <= edited
    assert {tensor.edit.stored_as[0] for tensor in quantized} <= changed
    before, after = tree(base), tree(tmp_path / "out")
    assert before["config.json"] == after["config.json"]
    assert verify(tmp_path / "out", quick=True).failures == ()


@pytest.mark.parametrize("kind", LOADED)
def test_transformers_loads_it_and_the_stream_is_clean(tmp_path, kind):
    base, direction = save(tmp_path / "base", kind)
    orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out", options=REQUANTIZE)
    before = stream_component(load(base), direction.vector)
    after = stream_component(load(tmp_path / "out"), direction.vector)
    assert before > 0.05
    # transformers decodes to bfloat16, of which each tensor keeps its own rounding.
    assert after < 0.03 * before


@pytest.mark.parametrize("kind", ["block", "mxfp4"])
def test_it_verifies_by_running_it(tmp_path, kind):
    base, direction = save(tmp_path / "base", kind)
    orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out", options=REQUANTIZE)
    report = verify(tmp_path / "out")
    assert report.failures == ()
    assert report.stream is not None


@pytest.mark.parametrize("kind", KINDS)
def test_dequantized_it_is_the_plain_checkpoint_edited(tmp_path, kind):
    """The oracle: what transformers, or a formula, decodes, saved plain and orthogonalized as ever."""
    base, direction = save(tmp_path / "base", kind)
    report = orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out", options=DEQUANTIZE)
    view = plain_view(open_checkpoint(base))
    plain = {info.name: read_tensor(base, info).to(torch.bfloat16).contiguous() for info in view.tensors()}
    oracle = tmp_path / "plain"
    oracle.mkdir()
    save_file(plain, oracle / "model.safetensors", metadata={"format": "pt"})
    (oracle / "config.json").write_text(json.dumps(view.config))
    orthogonalize_checkpoint(source=oracle, direction=direction, output=tmp_path / "wanted")
    found, wanted = stored(tmp_path / "out"), stored(tmp_path / "wanted")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        # Experts are rounded one by one here and in blocks of several there: the feedback is shared differently.
        step = 2**-8 * float(tensor.abs().max()) if "experts.down_proj" in name else 0
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=step)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {key: value for key, value in json.loads((base / "config.json").read_text()).items()
                      if key != "quantization_config"}  # fmt: skip
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert {tensor.edit.stored_dtype for tensor in report.tensors} == {"BF16"}
    assert all(tensor.survivor < 0.01 and not tensor.edit.stored_as for tensor in report.tensors)
    assert report.bytes_total == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert verify(tmp_path / "out", quick=True).failures == ()


@pytest.mark.parametrize("kind", ["block", "mxfp4", "compressed"])
def test_dequantized_it_loads_and_the_stream_is_clean(tmp_path, kind):
    base, direction = save(tmp_path / "base", kind)
    orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out", options=DEQUANTIZE)
    assert stream_component(load(tmp_path / "out"), direction.vector) < 2e-3
    if kind != "compressed":
        assert verify(tmp_path / "out").failures == ()


def test_dequantized_and_untied_and_reverted(tmp_path):
    base = save_quantized_llama(tmp_path / "base", "block", tied=True)
    direction = make_direction(mean_difference=random_direction(256))
    options = EditOptions(quantized="dequantize", tied="untie", preserve_norms=True)
    orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out", options=options)
    model = load(tmp_path / "out")
    assert stream_component(model, direction.vector) < 2e-3
    old = stored(base)["model.embed_tokens.weight"]
    assert torch.equal(model.lm_head.weight, old.float())
    assert verify(tmp_path / "out", quick=True).failures == ()
    revert_checkpoint(checkpoint=tmp_path / "out", output=tmp_path / "restored")
    assert tree(tmp_path / "restored") == tree(base)


def test_a_number_that_was_dequantized_and_changed_since_fails_verification(tmp_path):
    base, direction = save(tmp_path / "base", "mxfp4")
    orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out", options=DEQUANTIZE)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    info = open_checkpoint(tmp_path / "out").tensor(name)
    content = bytearray((tmp_path / "out" / info.shard).read_bytes())
    content[info.end - 1] ^= 0x01
    (tmp_path / "out" / info.shard).write_bytes(content)
    assert f"tensor {name} differs" in verify(tmp_path / "out", quick=True).failures[0]


def test_what_is_seen_is_what_transformers_loads(tmp_path):
    base, _ = save(tmp_path / "base", "mxfp4")
    view = plain_view(open_checkpoint(base))
    info = view.tensor("model.layers.1.mlp.experts.down_proj")
    loaded = load(base, torch.bfloat16).state_dict()["model.layers.1.mlp.experts.down_proj"]
    torch.testing.assert_close(read_tensor(base, info).bfloat16(), loaded, rtol=0, atol=0)
    assert info.shape == tuple(loaded.shape)
    assert "quantization_config" not in view.config


@pytest.mark.parametrize("kind", COMPRESSED)
def test_what_is_seen_is_what_the_package_of_the_format_decodes(tmp_path, kind):
    base, _ = save(tmp_path / "base", kind)
    view, loaded = plain_view(open_checkpoint(base)), load(base).state_dict()
    names = [info.name for info in view.tensors() if info.encoding is not None]
    assert len(names) == 21
    for name in names:
        # It multiplies in bfloat16.
        torch.testing.assert_close(read_tensor(base, view.tensor(name)), loaded[name], rtol=2**-8, atol=0)


def test_several_directions_strength_and_layers(tmp_path):
    base = save_quantized_llama(tmp_path / "base", "block")
    directions = [make_direction(mean_difference=random_direction(256, seed=seed)) for seed in (7, 8)]
    options = EditOptions(quantized="requantize", layers=(1, 2), strength=0.5)
    report = orthogonalize_checkpoint(source=base, direction=directions, output=tmp_path / "out", options=options)
    assert [tensor.survivor for tensor in report.tensors] == pytest.approx([0.5, 0.5], abs=0.01)
    assert verify(tmp_path / "out", quick=True).failures == ()


@pytest.mark.parametrize("suffix", ["", "_scale_inv"])
def test_a_code_or_scale_that_was_changed_since_fails_verification(tmp_path, suffix):
    base, direction = save(tmp_path / "base", "block")
    orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out", options=REQUANTIZE)
    info = open_checkpoint(tmp_path / "out").tensor("model.layers.1.mlp.down_proj.weight" + suffix)
    content = bytearray((tmp_path / "out" / info.shard).read_bytes())
    content[info.start + 2] ^= 0x41
    (tmp_path / "out" / info.shard).write_bytes(content)
    report = verify(tmp_path / "out", quick=True)
    assert "model.layers.1.mlp.down_proj.weight" in report.failures[0]


def test_a_writer_that_the_record_stores_elsewhere_fails_verification(tmp_path):
    base, direction = save(tmp_path / "base", "block")
    orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out", options=REQUANTIZE)
    path = tmp_path / "out" / "abliteration.json"
    record = json.loads(path.read_text())
    entry = next(tensor for tensor in record["tensors"] if tensor["stored_as"])
    entry["stored_as"].append("model.norm.weight")
    path.write_text(json.dumps(record))
    assert "is stored as" in verify(tmp_path / "out", quick=True).failures[0]


def test_it_is_reverted(tmp_path):
    base, direction = save(tmp_path / "base", "mxfp4")
    orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out", options=REQUANTIZE)
    revert_checkpoint(checkpoint=tmp_path / "out", output=tmp_path / "restored")
    assert tree(tmp_path / "restored") == tree(base)


def test_the_number_of_workers_does_not_show(tmp_path):
    base, direction = save(tmp_path / "base", "mxfp4")
    for workers in (1, 3):
        orthogonalize_checkpoint(
            source=base,
            direction=direction,
            output=tmp_path / str(workers),
            options=REQUANTIZE,
            writing=WriteOptions(workers=workers),
        )
    one, three = tree(tmp_path / "1"), tree(tmp_path / "3")
    assert {n: c for n, c in one.items() if n != "abliteration.json"} == {
        n: c for n, c in three.items() if n != "abliteration.json"
    }


def test_by_default_it_is_refused_with_the_ways_out(tmp_path):
    base, direction = save(tmp_path / "base", "block")
    config = json.loads((base / "config.json").read_text()) | {"_name_or_path": "someone/plain"}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(QuantizedCheckpointError, match=r"method fp8.*someone/plain.*--quantized requantize"):
        orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out")


@pytest.mark.parametrize(
    "content",
    [
        {"quant_method": "gptq", "bits": 4, "desc_act": True},
        {"quant_method": "awq", "bits": 4, "version": "gemv"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "compressed-tensors", "format": "marlin-24"},
        {"quant_method": "fp8", "fmt": "e5m2"},
        {"quant_method": "brand-new"},
    ],
    ids=lambda content: content["quant_method"],
)
def test_other_methods_are_refused_by_name(tmp_path, content):
    base, direction = save(tmp_path / "base", "block")
    config = json.loads((base / "config.json").read_text())
    config |= {"quantization_config": content, "_name_or_path": "someone/plain"}
    (base / "config.json").write_text(json.dumps(config))
    for options in (EditOptions(), REQUANTIZE, DEQUANTIZE):
        with pytest.raises(QuantizedCheckpointError, match="someone/plain") as error:
            orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out", options=options)
        assert content["quant_method"] in str(error.value)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def change_tensors(base: Path, change) -> None:
    index = json.loads((base / "model.safetensors.index.json").read_text())
    tensors = stored(base)
    change(tensors)
    for file in set(index["weight_map"].values()):
        names = [name for name in tensors if index["weight_map"].get(name) == file]
        save_file({name: tensors[name] for name in names}, base / file, metadata={"format": "pt"})
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if name in tensors}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(f"{DOWN}_scale_inv"), "down_proj.weight is stored as F8_E4M3"),
        (lambda t: t.update({f"{DOWN}_scale_inv": torch.ones(5, 3)}), "whose blocks are not those"),
        (lambda t: t.update({f"{DOWN}_scale_inv": torch.ones(2, 3, dtype=torch.int32)}), "dtype that is not known"),
    ],
)
def test_codes_whose_scales_do_not_fit_are_refused_by_name(tmp_path, change, match):
    base, direction = save(tmp_path / "base", "block")
    change_tensors(base, change)
    with pytest.raises(QuantizedCheckpointError, match=match):
        orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out", options=REQUANTIZE)


@pytest.mark.parametrize("options", [REQUANTIZE, DEQUANTIZE])
@pytest.mark.parametrize(("kind", "scale"), [("nvfp4", "weight_global_scale"), ("modelopt nvfp4", "weight_scale_2")])
def test_a_scale_the_other_way_up_is_refused_and_nothing_is_left(tmp_path, kind, scale, options):
    base, direction = save(tmp_path / "base", kind)
    name = f"model.layers.1.mlp.down_proj.{scale}"
    change_tensors(base, lambda tensors: tensors.update({name: tensors[name].reciprocal()}))
    with pytest.raises(CheckpointError, match=r"down_proj.*the scale of the whole matrix, .* cannot be right"):
        orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out", options=options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_codes_that_are_no_numbers_are_refused_and_nothing_is_left(tmp_path):
    base, direction = save(tmp_path / "base", "block")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[DOWN] = tensors[DOWN].clone()
        tensors[DOWN].view(torch.uint8)[3, 5] = 0x7F

    change_tensors(base, spoil)
    with pytest.raises(CheckpointError, match="NaN"):
        orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out", options=REQUANTIZE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_write_that_went_wrong_is_found_on_rereading(tmp_path, monkeypatch):
    base, direction = save(tmp_path / "base", "block")
    write = abliterate.editing.edited_tensors.PlainFile.write

    def flip(self, data, offset):
        is_codes = len(data) > 1 << 12 and not isinstance(data.obj, mmap.mmap)  # where copied bytes lie
        write(self, memoryview(bytes([data[0] ^ 1]) + bytes(data[1:])) if is_codes else data, offset)

    monkeypatch.setattr("abliterate.editing.edited_tensors.PlainFile.write", flip)
    with pytest.raises(VerificationError, match=r"proj.weight, reread, is not what was written"):
        orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out", options=REQUANTIZE)


def test_what_does_not_go_with_it_is_refused(tmp_path):
    with pytest.raises(InputError, match="grid of a quantised weight"):
        EditOptions(quantized="requantize", preserve_norms=True)
    with pytest.raises(InputError, match="quantized is 'x'"):
        EditOptions(quantized="x")
    base, direction = save(tmp_path / "base", "block")
    with pytest.raises(InputError, match="adapter"):
        write_adapter(source=base, direction=direction, output=tmp_path / "out", options=REQUANTIZE)


def test_a_plain_checkpoint_is_edited_as_ever(tmp_path):
    base = save_tiny_llama(tmp_path / "base")
    direction = make_direction(mean_difference=random_direction())
    orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "one")
    for name, options in (("two", REQUANTIZE), ("three", DEQUANTIZE)):
        orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / name, options=options)
        assert verify(tmp_path / name, quick=True).failures == ()
        one, other = tree(tmp_path / "one"), tree(tmp_path / name)
        assert {n: c for n, c in one.items() if n != "abliteration.json"} == {
            n: c for n, c in other.items() if n != "abliteration.json"
        }
