"""One architecture on disk in the several ways that transformers loads: the edit must find the same writers in each."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from abliterate.architectures.writers import map_stream
from abliterate.checkpoints.checkpoint import open_checkpoint
from abliterate.directions import make_direction
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from tests.support.conformance import CLEAN, DIRTY, build_model, check, check_saved
from tests.support.tiny_models import random_direction, save_tiny_llama

Tensors = dict[str, Tensor]


def rewritten(work: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Put all tensors of `work`/base through `change` and store what it gives in one file."""
    base = work / "base"
    shards = sorted(base.glob("*.safetensors"))
    tensors: Tensors = {}
    for shard in shards:
        tensors |= load_file(shard)
        shard.unlink()
    (base / "model.safetensors.index.json").unlink(missing_ok=True)
    changed = {name: tensor.clone().contiguous() for name, tensor in change(tensors).items()}
    save_file(changed, base / "model.safetensors", metadata={"format": "pt"})
    return base


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        assert any(name.startswith(old) for name in tensors)
        return {new + name.removeprefix(old) if name.startswith(old) else name: t for name, t in tensors.items()}

    return change


def fused(tensors: Tensors) -> Tensors:
    """Stack numbered experts (gate, up and down, or w1, w3 and w2) as newer re-saves do, under `mlp.experts`."""
    stacked: dict[str, list[Tensor]] = {}
    kept = {}
    for name in sorted(tensors, key=lambda n: [int(p) if p.isdigit() else p for p in n.split(".")]):
        before, found, after = name.partition(".experts.")
        if not found or tensors[name].dim() == 3:
            kept[name.replace("block_sparse_moe", "mlp")] = tensors[name]
            continue
        part = after.split(".")[1]
        stacked.setdefault(f"{before.rpartition('.')[0]}.mlp.experts {part}", []).append(tensors[name])
    for key in {key.split()[0] for key in stacked}:
        gate, up, down = (
            torch.stack(next(stacked[f"{key} {part}"] for part in names if f"{key} {part}" in stacked))
            for names in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
        )
        kept[f"{key}.gate_up_proj"] = torch.cat([gate, up], dim=1)
        kept[f"{key}.down_proj"] = down
    return kept


def transposed_experts(tensors: Tensors) -> Tensors:
    return {
        name: tensor.transpose(1, 2) if ".mlp.experts." in name and tensor.dim() == 3 else tensor
        for name, tensor in fused(tensors).items()
    }


def is_exact(work: Path, model_type: str) -> bool:
    result = check_saved(model_type, work)
    assert result.before > DIRTY
    assert result.edited_on_disk == result.edited_in_memory
    assert min(result.without.values()) > CLEAN
    return result.after < CLEAN


@pytest.mark.parametrize(
    ("model_type", "change"),
    [
        ("mixtral", fused),
        ("qwen3_moe", fused),
        ("qwen3_5_moe", fused),
        ("qwen3_vl_moe", transposed_experts),
        ("gemma3", renamed("language_model.model.", "model.language_model.")),
        ("llava", renamed("language_model.model.", "model.language_model.")),
        ("qwen2_vl", renamed("model.", "model.language_model.")),
        ("gpt2", renamed("transformer.", "")),
        ("bloom", renamed("transformer.", "")),
        ("llama", renamed("model.", "")),
    ],
)
def test_another_layout_of_the_same_model(tmp_path, model_type, change):
    build_model(model_type).save_pretrained(tmp_path / "base")
    rewritten(tmp_path, change)
    assert is_exact(tmp_path, model_type)


@pytest.mark.parametrize(
    ("model_type", "changes", "axis"),
    [
        ("gpt_oss", {"intermediate_size": 64}, 2),
        ("llama4_text", {"intermediate_size": 64}, 2),
        ("aria_text", {"intermediate_size": 64}, 2),
        ("granitemoe", {"intermediate_size": 64}, 1),
        ("hy_v4", {"moe_intermediate_size": 64}, 1),
    ],
)
def test_experts_that_are_square_in_both_layouts(tmp_path, model_type, changes, axis):
    model = build_model(model_type, **changes)
    result = check(model_type, tmp_path, model=model)
    assert result.after < CLEAN
    assert min(result.without.values()) > CLEAN
    checkpoint = open_checkpoint(tmp_path / "base")
    tensors = {tensor.name: tensor for tensor in checkpoint.tensors()}
    stream = map_stream(
        config=checkpoint.config,
        tensors=tuple(tensors.values()),
        path=checkpoint.path,
        same_bytes=checkpoint.same_bytes,
    )
    square = [w for w in stream.writers if tensors[w.tensor_name].shape[1:] == (64, 64)]
    assert square
    assert {writer.residual_axis for writer in square} == {axis}


def test_a_norm_in_another_shard_than_its_writer(tmp_path):
    result = check("gemma2", tmp_path, shard="1KB")
    assert result.after < CLEAN
    checkpoint = open_checkpoint(tmp_path / "base")
    shards = {tensor.name: tensor.shard for tensor in checkpoint.tensors()}
    stream = map_stream(
        config=checkpoint.config,
        tensors=tuple(checkpoint.tensors()),
        path=checkpoint.path,
        same_bytes=checkpoint.same_bytes,
    )
    assert all(shards[w.tensor_name] != shards[norm.weight] for w in stream.writers for norm in w.norm_chain)


def test_forty_shards_and_a_single_file(tmp_path):
    model = build_model("llama", num_hidden_layers=5)
    for name, size in (("many", "1KB"), ("one", "1GB")):
        (tmp_path / name).mkdir()
        assert check("llama", tmp_path / name, model=model, shard=size).after < CLEAN
    assert len(list((tmp_path / "many" / "edited").glob("*.safetensors"))) >= 40
    assert len(list((tmp_path / "one" / "edited").glob("*.safetensors"))) == 1


def test_a_tied_head_that_is_stored_beside_the_embedding(tmp_path):
    build_model("gemma2").save_pretrained(tmp_path / "base")
    rewritten(tmp_path, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    result = check_saved("gemma2", tmp_path)
    assert result.after < CLEAN
    assert "`lm_head`" in result.writers
    assert "`model.embed_tokens`" in result.writers


def test_a_tied_head_that_is_stored_alone(tmp_path):
    build_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    rewritten(tmp_path, renamed("model.embed_tokens.weight", "lm_head.weight"))
    result = check_saved("llama", tmp_path)
    assert result.after < CLEAN
    assert "`lm_head`" in result.writers


def test_code_that_comes_with_a_model_is_copied_and_not_run(tmp_path):
    base = save_tiny_llama(tmp_path / "base")
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\n"
    for name in ("modeling_own.py", "configuration_own.py", "__init__.py", "sub/notes.txt", "unknown.bin"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(code)
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    (base / "config.json").write_text(json.dumps(config))
    direction = make_direction(mean_difference=random_direction())
    orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out")
    assert not ran.exists()
    for name in ("modeling_own.py", "configuration_own.py", "__init__.py", "sub/notes.txt", "unknown.bin"):
        assert (tmp_path / "out" / name).read_text() == code
