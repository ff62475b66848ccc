"""Releases whose config or index is not as transformers writes them today: accepted, or refused with the true cause."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from abliterate.architectures.config import read_text_model
from abliterate.checkpoints.checkpoint import open_checkpoint
from abliterate.directions import make_direction
from abliterate.editing.adapter import write_adapter
from abliterate.editing.options import EditOptions
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.editing.plan_report import PlanReport, plan_layout, read_layout
from abliterate.editing.tiny_twin import prove_on_tiny_twin
from abliterate.errors import CheckpointError, ModelError, UnsupportedArchitectureError
from abliterate.models.loading import load_tokenizer, load_weights
from abliterate.models.options import ModelOptions
from tests.support.conformance import DIRTY, build_model, save_model, stream_component, text_inputs
from tests.support.conformance_models import VARIANTS
from tests.support.tiny_models import random_direction, save_chat_model, save_tiny_llama, save_tiny_model, tiny_llama

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"


def plan(path: Path) -> PlanReport:
    return plan_layout(read_layout(model=str(path)))


def change_config(path: Path, change: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(change(config)))


def renamed(config: dict[str, Any], **names: str) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in config.items()}


@pytest.mark.parametrize(
    ("model_type", "old", "new"), [("bloom", "hidden_size", "n_embed"), ("xlstm", "hidden_size", "embedding_dim")]
)
def test_a_width_under_its_older_name(tmp_path, model_type, old, new):
    build_model(model_type).save_pretrained(tmp_path)
    change_config(tmp_path, lambda config: {k: v for k, v in config.items() if k != new})
    before = plan(tmp_path)
    change_config(tmp_path, lambda config: renamed(config, **{old: new}))
    after = plan(tmp_path)
    assert old not in json.loads((tmp_path / "config.json").read_text())
    assert (after.d_model, after.tensors) == (before.d_model, before.tensors)


def test_of_two_widths_bloom_takes_that_of_its_releases():
    config = {"model_type": "bloom", "hidden_size": 64, "n_embed": 4096, "n_layer": 2}
    assert read_text_model(config=config, path=Path("tiny")).d_model == 4096


def test_kimi_k2_is_deepseek_v3(tmp_path):
    build_model("deepseek_v3").save_pretrained(tmp_path)
    before = plan(tmp_path)
    change_config(tmp_path, lambda config: config | {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "code.Own"}})
    after = plan(tmp_path)
    assert (after.model_type, after.tensors) == ("kimi_k2", before.tensors)


def test_kimi_k25_with_the_text_type_of_its_releases(tmp_path):
    build_model("kimi_k25").save_pretrained(tmp_path)
    before = plan(tmp_path)
    change_config(tmp_path, lambda config: config | {"text_config": config["text_config"] | {"model_type": "kimi_k2"}})
    assert plan(tmp_path).tensors == before.tensors


def save_omni(path: Path, thinker: str, *, tied: bool) -> None:
    """Save a thinker as its releases hold it: within a model that also speaks."""
    build_model(thinker, tie_word_embeddings=tied).save_pretrained(path)
    tensors = {
        name if name.startswith("thinker.") else f"thinker.{name}": tensor
        for name, tensor in load_file(path / "model.safetensors").items()
    }
    d_model = 64
    tensors |= {
        "talker.model.layers.0.self_attn.o_proj.weight": torch.randn(d_model, d_model),
        "talker.model.embed_tokens.weight": torch.randn(20, d_model),
        "token2wav.dit.transformer_blocks.0.ff.weight": torch.randn(d_model, 8),
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    outer = thinker.removesuffix("_thinker")
    change_config(path, lambda config: {"model_type": outer, "thinker_config": config, "torch_dtype": "float64"})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("thinker", ["qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"])
def test_an_omni_model_is_edited_in_its_thinker(tmp_path, thinker, tied):
    base, out = tmp_path / "base", tmp_path / "out"
    save_omni(base, thinker, tied=tied)
    report = plan(base)
    assert report.tied_embeddings == tied
    assert report.text_section == ("thinker_config", "text_config")
    assert {tensor.name.partition(".")[0] for tensor in report.tensors} == {"thinker"}
    assert any(each.tensor_name.startswith("talker.") for each in report.left_alone)
    direction = make_direction(mean_difference=random_direction(report.d_model))
    options = EditOptions(tied="untie" if tied else "edit")
    orthogonalize_checkpoint(source=base, direction=direction, output=out, options=options)
    models = [
        load_weights(path, name="omni", options=ModelOptions(device="cpu", dtype="float32")) for path in (base, out)
    ]
    inputs = text_inputs(models[0], thinker)
    components = [stream_component(model, inputs, direction.vector.double()) for model in models]
    assert components[0] > DIRTY
    assert components[1] < 1e-5
    heads = [model.get_output_embeddings().weight for model in models]
    assert torch.equal(*heads)
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    for name in before:
        assert torch.equal(before[name], after[name]) or name.startswith("thinker."), name


@pytest.mark.parametrize("which", ["index", "shard"])
def test_index_and_shards_that_differ_are_so_in_the_release(tmp_path, which):
    save_tiny_llama(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    if which == "index":
        index["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = index["weight_map"]["lm_head.weight"]
        match = "names tensor model.layers.0.self_attn.rotary_emb.inv_freq, which no shard has; the release is so"
    else:
        names = sorted(index["weight_map"])[:2]
        for name in names:
            del index["weight_map"][name]
        match = f"does not name tensor {names[0]} and 1 tensors more, which a shard has; the release is so"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    assert match in str(error.value)
    assert "save_pretrained" in str(error.value)
    assert "download" not in str(error.value)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pointer_of_git_lfs_says_what_fetches_the_file(tmp_path, name):
    save_tiny_llama(tmp_path)
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=f"{name}: is a pointer of Git LFS .* `git lfs pull`"):
        read_layout(model=str(tmp_path))


def test_loading_a_pointer_of_git_lfs_says_so(tmp_path):
    save_tiny_llama(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(POINTER)
    with pytest.raises((CheckpointError, ModelError), match="git lfs pull"):
        load_weights(tmp_path, name="model", options=ModelOptions(device="cpu"))


def test_a_tokenizer_that_is_a_pointer_of_git_lfs_says_so(tmp_path):
    save_chat_model(tmp_path, tiny_llama())
    (tmp_path / "tokenizer.json").write_bytes(POINTER)
    with pytest.raises((CheckpointError, ModelError), match=r"tokenizer.json: is a pointer .* `git lfs pull`"):
        load_tokenizer(tmp_path, name="model", options=ModelOptions(device="cpu"))


@pytest.mark.parametrize("own_code", [True, False])
def test_unverified_is_advised_only_where_it_can_help(tmp_path, own_code):
    save_tiny_model(tmp_path)
    auto_map = {"auto_map": {"AutoConfig": "code.Own"}} if own_code else {}
    change_config(tmp_path, lambda config: config | {"model_type": "brand_new"} | auto_map)
    with pytest.raises(UnsupportedArchitectureError) as error:
        plan(tmp_path)
    assert ("--unverified tries the edit" in str(error.value)) == (not own_code)
    assert ("so --unverified cannot try it either" in str(error.value)) == own_code


@pytest.mark.parametrize("keys", [("quantization", "quantization_config"), ("quantization",)])
def test_the_quantisation_of_mlx_is_named(tmp_path, keys):
    save_tiny_llama(tmp_path)
    change_config(tmp_path, lambda config: config | {key: {"group_size": 64, "bits": 4} for key in keys})
    with pytest.raises(CheckpointError, match=r"method mlx.*MLX alone reads this layout; use the release it was"):
        plan(tmp_path)


def test_an_omni_model_has_no_adapter_of_its_thinker_alone(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    save_omni(base, "qwen2_5_omni_thinker", tied=False)
    direction = make_direction(mean_difference=random_direction(64))
    with pytest.raises(ModelError, match="would fit its thinker_config alone"):
        write_adapter(source=base, direction=direction, output=out)


def test_files_that_mlx_wrote_are_edited_and_said_to_be_its_own(tmp_path):
    save_tiny_llama(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file), file, metadata={"format": "mlx"})
    assert any(note.startswith("MLX wrote these files") for note in plan(tmp_path).notes)


def released_inkling(path: Path) -> Path:
    """Save a tiny Inkling as it is released: images, sound and prediction layers beside the text model."""
    save_model(build_model("inkling_mm_model").bfloat16(), path, "inkling_mm_model", shard="5GB")
    tensors = load_file(path / "model.safetensors")
    tensors["model.mtp.layers.0.transformer_block.attn.wo_ud.weight"] = torch.ones(64, 64)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_a_release_of_inkling_is_edited_in_its_own_names(tmp_path):
    path = released_inkling(tmp_path)
    options = EditOptions(partial=True)
    layout = read_layout(model=str(path))
    report = plan_layout(layout, options=options, proof=prove_on_tiny_twin(layout=layout, options=options))
    edited = {group.pattern.partition("layers.*.")[2] or group.pattern for group in report.groups}
    assert edited == {
        *("attn.wo_ud.weight", "mlp.w2_md.weight", "mlp.experts.w2_weight", "mlp.shared_experts.shared_w2_weight"),
        "model.llm.embed.weight",
    }
    assert report.partial is not None
    assert report.partial.modules == ("model.llm.layers.*.attn_sconv", "model.llm.layers.*.mlp_sconv")
    assert report.partial.twin is not None


def test_experts_that_are_stored_quantised_without_a_word_in_the_config_are_noticed(tmp_path):
    save_model(build_model("inkling2"), tmp_path, "inkling2", shard="5GB")
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("experts.w2_weight")]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = torch.ones(4, 64, 2, dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"w2_weight.* not stored as a plain weight|w2_weight is stored as F8_E4M3"
    ):
        plan_layout(read_layout(model=str(tmp_path)), options=EditOptions(partial=True))


def test_gemma4_experts_that_are_stored_one_by_one_are_edited_as_the_stack_is(tmp_path):
    whole = tmp_path / "whole"
    model_type, changes = VARIANTS["gemma4 with experts"]
    save_model(build_model(model_type, **changes).float(), whole, model_type, shard="10GB")
    apart = tmp_path / "apart"
    shutil.copytree(whole, apart)
    tensors = load_file(whole / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        stack = tensors.pop(name)
        for index, matrix in enumerate(stack):
            # As releases in few bits store them, for engines that keep experts apart.
            if name.endswith("gate_up_proj"):
                parts = zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True)
            else:
                parts = iter([("down_proj", matrix)])
            for part, each in parts:
                tensors[f"{name.rpartition('.')[0]}.{index}.{part}.weight"] = each.clone()
    save_file(tensors, apart / "model.safetensors", metadata={"format": "pt"})
    direction = make_direction(mean_difference=random_direction(d_model=tensors["model.embed_tokens.weight"].shape[1]))
    edited = {}
    for base in (whole, apart):
        orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / f"{base.name}.edited")
        edited[base.name] = load_file(tmp_path / f"{base.name}.edited" / "model.safetensors")
    stacks = [name for name in edited["whole"] if name.endswith("experts.down_proj")]
    assert stacks
    for name in stacks:
        parts = [edited["apart"][f"{name.rpartition('.')[0]}.{i}.down_proj.weight"] for i in range(4)]
        assert torch.allclose(torch.stack(parts), edited["whole"][name], atol=1e-7)
        assert not torch.equal(edited["whole"][name], load_file(whole / "model.safetensors")[name])
