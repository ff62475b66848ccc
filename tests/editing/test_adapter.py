"""The adapter, loaded and merged by the real PEFT, is the orthogonalized checkpoint; what it cannot be is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import abliterate.editing.adapter
from abliterate.directions import Direction, make_direction
from abliterate.editing.adapter import write_adapter
from abliterate.editing.options import EditOptions
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.editing.record import check_hashes, read_record
from abliterate.errors import InputError, ModelError, VerificationError
from tests.support.conformance import build_model, load_model, text_inputs
from tests.support.loaded_models import load, logits, stored, tree
from tests.support.tiny_models import D_MODEL, random_direction, save_tiny_model

MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True}),
    "llama, tied": ("llama", {"tied": True}),
    "gpt2": ("gpt2", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", MOE),
    "gemma2": ("gemma2", {"tied": True}),
}
DTYPES = [torch.float32, torch.bfloat16]


def directions(k: int) -> list[Direction]:
    return [make_direction(mean_difference=5 * random_direction(seed=seed)) for seed in range(7, 7 + k)]


def merged(base: Path, adapter: Path) -> PreTrainedModel:
    return PeftModel.from_pretrained(load(base), adapter).merge_and_unload()


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in model.state_dict().items()}


def assert_same_weights(found: PreTrainedModel, wanted: PreTrainedModel, base: PreTrainedModel, dtype) -> None:
    new, old = weights(found), weights(base)
    changed = 0
    for name, tensor in weights(wanted).items():
        # The sum is rounded once or twice, the checkpoint with feedback: a few steps of the grid, at its largest entry.
        step = torch.finfo(dtype).eps * float(old[name].abs().max())
        assert float((new[name] - tensor).abs().max()) <= 2 * step, name
        changed += int(not torch.equal(tensor, old[name]))
        assert torch.equal(tensor, old[name]) == torch.equal(new[name], old[name]), name
    assert changed >= 7


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BASES)
def test_merged_by_peft_it_is_the_orthogonalized_checkpoint(tmp_path, name, dtype, k):
    model_type, options = BASES[name]
    base = save_tiny_model(tmp_path / "base", model_type, dtype=dtype, max_shard_size="40KB", **options)
    orthogonalize_checkpoint(source=base, direction=directions(k), output=tmp_path / "whole")
    report = write_adapter(source=base, direction=directions(k), output=tmp_path / "adapter")
    found = merged(base, tmp_path / "adapter")
    assert_same_weights(found, load(tmp_path / "whole"), load(base), dtype)
    assert len(report.tensors) == len(json.loads((tmp_path / "whole" / "abliteration.json").read_text())["tensors"])


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_it_reports_is_what_is_left_in_the_merged_model(tmp_path, dtype, k):
    """To the last digit, so the two are merged in the same order of roundings."""
    base = save_tiny_model(tmp_path / "base", dtype=dtype)
    report = write_adapter(source=base, direction=directions(k), output=tmp_path / "adapter")
    basis = torch.linalg.qr(torch.stack([each.vector.double() for each in directions(k)]).T)[0].T
    found, old = weights(merged(base, tmp_path / "adapter")), weights(load(base))
    for tensor in report.tensors:
        after, before = (
            basis @ (each[tensor.name].T if tensor.edit.writer.residual_axis else each[tensor.name])
            for each in (found, old)
        )
        assert tensor.component_after == pytest.approx(float(after.norm() / found[tensor.name].norm()), rel=1e-6)
        assert tensor.survivor == pytest.approx(float(after.norm() / before.norm()), rel=1e-6)
        assert 0 < tensor.survivor < 5 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "options",
    [
        EditOptions(layers=(1, 2)),
        EditOptions(components=("attn",), strength=0.5),
        EditOptions(strength=2.0),
        EditOptions(tied="skip"),
    ],
    ids=str,
)
def test_it_does_what_the_options_say(tmp_path, options):
    base = save_tiny_model(tmp_path / "base", "gpt2", tied=True)
    orthogonalize_checkpoint(source=base, direction=directions(1), output=tmp_path / "whole", options=options)
    write_adapter(source=base, direction=directions(1), output=tmp_path / "adapter", options=options)
    found, wanted = weights(merged(base, tmp_path / "adapter")), weights(load(tmp_path / "whole"))
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "gpt_oss", "laguna", "opt", "bloom", "glm4v", "llama4_text"])
def test_other_layouts_merge_to_the_same_weights(tmp_path, model_type):
    """Dense layers beside experts, stacks stored the other way, renamed modules, offsets, norms, wrappers."""
    model = build_model(model_type)
    model.save_pretrained(tmp_path / "base")
    width = model.config.get_text_config().hidden_size
    direction = make_direction(mean_difference=random_direction(width))
    orthogonalize_checkpoint(source=tmp_path / "base", direction=direction, output=tmp_path / "whole")
    write_adapter(source=tmp_path / "base", direction=direction, output=tmp_path / "adapter")
    base, whole = (load_model(tmp_path / name, model_type) for name in ("base", "whole"))
    old = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    found = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    wanted = whole.state_dict()
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-14)
    assert any(not torch.equal(old[name], wanted[name]) for name in wanted)
    inputs = text_inputs(found, model_type)
    with torch.no_grad():
        torch.testing.assert_close(found(**inputs).logits, whole(**inputs).logits)


def test_before_it_is_merged_it_acts_as_it_does_after(tmp_path):
    base = save_tiny_model(tmp_path / "base", "mixtral", num_local_experts=4)
    write_adapter(source=base, direction=directions(2), output=tmp_path / "adapter")
    model = PeftModel.from_pretrained(load(base), tmp_path / "adapter")
    before = logits(model)
    assert not torch.allclose(before, logits(load(base)), atol=1e-2)
    torch.testing.assert_close(logits(model.merge_and_unload()), before, rtol=1e-4, atol=1e-4)


def test_what_is_written_and_recorded(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    before = tree(base)
    report = write_adapter(source=base, direction=directions(2), output=tmp_path / "adapter")
    out = tmp_path / "adapter"
    assert sorted(tree(out)) == ["README.md", "abliteration.json", "adapter_config.json", "adapter_model.safetensors"]
    assert tree(base) == before
    record = read_record(out)
    check_hashes(record)
    assert record.is_adapter
    assert record.content["format"] == "adapter"
    assert json.loads(json.dumps(report.record())) == record.content
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["bias"]) == (2, 2, "none")
    assert config["base_model_name_or_path"] == str(base)
    card = (out / "README.md").read_text()
    assert "library_name: peft" in card
    assert "license: mit" in card
    assert "--format adapter" in card
    assert "merge_and_unload()" in card
    largest = max(tensor.survivor for tensor in report.tensors)
    assert 0 < largest < 1e-5
    # Two vectors for each matrix: far less than the matrices are.
    assert sum(t.numel() for t in load_file(out / "adapter_model.safetensors").values()) < report.bytes_edited / 4 / 4


def test_the_same_edit_is_the_same_bytes(tmp_path):
    base = save_tiny_model(tmp_path / "base", "gpt2")
    for name in ("one", "two"):
        write_adapter(source=base, direction=directions(1), output=tmp_path / name)
    one, two = tree(tmp_path / "one"), tree(tmp_path / "two")
    assert one["adapter_model.safetensors"] == two["adapter_model.safetensors"]
    assert one["adapter_config.json"] == two["adapter_config.json"]


def test_a_tied_pair_stored_twice_is_adapted_once(tmp_path):
    base = save_tiny_model(tmp_path / "base", tied=True)
    tensors = stored(base)
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(tensors | head, base / "model.safetensors", metadata={"format": "pt"})
    report = write_adapter(source=base, direction=directions(1), output=tmp_path / "adapter")
    found = merged(base, tmp_path / "adapter")
    assert found.lm_head.weight is found.model.embed_tokens.weight
    r = directions(1)[0].vector.double()
    assert float((found.lm_head.weight.double() @ r).abs().max()) < 1e-6
    embeddings = [tensor for tensor in report.tensors if tensor.edit.writer.role == "embed"]
    assert len(embeddings) == 2
    assert embeddings[0].survivor == embeddings[1].survivor


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (EditOptions(add=1.0), "an addition makes biases"),
        (EditOptions(preserve_norms=True), "restoring lengths scales every column"),
        (EditOptions(tied="untie"), "cannot untie: merged by PEFT.*--tied edit or skip"),
    ],
)
def test_what_is_no_low_rank_change_is_refused(tmp_path, options, match):
    base = save_tiny_model(tmp_path / "base", tied=True)
    with pytest.raises(InputError, match=match) as error:
        write_adapter(source=base, direction=directions(1), output=tmp_path / "adapter", options=options)
    assert "leave out --format adapter" in str(error.value)
    assert not (tmp_path / "adapter").exists()


def test_what_peft_does_not_adapt_is_refused_with_the_components_that_leave_it_out(tmp_path):
    model = build_model("falcon_h1")
    model.save_pretrained(tmp_path / "base")
    direction = make_direction(mean_difference=random_direction(model.config.hidden_size))
    with pytest.raises(ModelError, match=r"out_proj.* --components embed,mlp") as error:
        write_adapter(source=tmp_path / "base", direction=direction, output=tmp_path / "adapter")
    assert "\n" not in str(error.value)
    options = EditOptions(components=("embed", "mlp"))
    orthogonalize_checkpoint(source=tmp_path / "base", direction=direction, output=tmp_path / "whole", options=options)
    write_adapter(source=tmp_path / "base", direction=direction, output=tmp_path / "adapter", options=options)
    found = PeftModel.from_pretrained(load_model(tmp_path / "base", "falcon_h1"), tmp_path / "adapter")
    wanted = load_model(tmp_path / "whole", "falcon_h1").state_dict()
    for name, tensor in found.merge_and_unload().state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-14)


def test_a_factor_that_is_not_what_was_computed_leaves_nothing_behind(tmp_path, monkeypatch):
    base = save_tiny_model(tmp_path / "base")
    write_contents = abliterate.editing.adapter.write_contents

    def flip(contents: dict[str, bytes], directory: Path):
        changed = {
            name: data[:-2] + bytes([data[-2] ^ 0x40]) + data[-1:] if name.endswith(".safetensors") else data
            for name, data in contents.items()
        }
        return write_contents(changed, directory)

    monkeypatch.setattr("abliterate.editing.adapter.write_contents", flip)
    with pytest.raises(VerificationError, match="merged into model"):
        write_adapter(source=base, direction=directions(1), output=tmp_path / "adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_dry_run_writes_nothing_and_an_adapter_is_replaced_only_when_asked(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    report = write_adapter(source=base, direction=directions(1), output=None, dry_run=True)
    assert report.dry_run
    assert report.counts == {"embed": 1, "attn": 3, "mlp": 3}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
    with pytest.raises(InputError, match="no output directory"):
        write_adapter(source=base, direction=directions(1), output=None)
    out = tmp_path / "adapter"
    write_adapter(source=base, direction=directions(1), output=out)
    with pytest.raises(InputError, match="exists"):
        write_adapter(source=base, direction=directions(2), output=out)
    write_adapter(source=base, direction=directions(2), output=out, overwrite=True)
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 2
    assert D_MODEL == 32
