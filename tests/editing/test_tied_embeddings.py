"""Tied embeddings: what each policy does to the head, in the files and in the loaded model."""

import hashlib
import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from abliterate.checkpoints.checkpoint import open_checkpoint
from abliterate.directions import Direction, make_direction
from abliterate.editing.options import EditOptions, TiedPolicy
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.editing.record import OrthogonalizationReport
from abliterate.errors import InputError
from tests.support.loaded_models import ablated, load, logits, stored, stream_component, tree
from tests.support.tiny_models import random_direction, save_tiny_model

EMBEDDINGS = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}
HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def direction() -> Direction:
    return make_direction(mean_difference=5 * random_direction())


def edit(base: Path, out: Path, direction: Direction, tied: TiedPolicy, **options) -> OrthogonalizationReport:
    return orthogonalize_checkpoint(
        source=base, direction=direction, output=out, options=EditOptions(tied=tied, **options)
    )


def store_both(base: Path, embedding: str) -> None:
    tensors = stored(base)
    save_file(tensors | {HEAD: tensors[embedding].clone()}, base / "model.safetensors", metadata={"format": "pt"})


def store_head_alone(base: Path, embedding: str) -> None:
    tensors = stored(base)
    tensors[HEAD] = tensors.pop(embedding)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def drop_prefix(base: Path, embedding: str) -> None:
    prefix = embedding.partition(".")[0] + "."
    tensors = {name.removeprefix(prefix): tensor for name, tensor in stored(base).items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def store_embedding(_base: Path, _embedding: str) -> None:
    pass


LAYOUTS = [store_embedding, store_both, store_head_alone, drop_prefix]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_untied_the_logits_are_those_of_the_ablated_base(tmp_path, direction, model_type, layout, caplog):
    base, out = save_tiny_model(tmp_path / "base", model_type, tied=True), tmp_path / "out"
    layout(base, EMBEDDINGS[model_type])
    report = edit(base, out, direction, "untie")
    original = load(base)
    logging.getLogger("transformers").addHandler(caplog.handler)
    with caplog.at_level(logging.WARNING):
        edited = load(out)
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not caplog.records, [record.getMessage() for record in caplog.records]
    plain = logits(original)
    with ablated(original, direction.vector):
        by_hooks = logits(original)
    assert (plain - by_hooks).abs().max() > 0.1
    assert (by_hooks - logits(edited)).abs().max() < 2e-5
    assert stream_component(edited, direction.vector) < 1e-6
    assert edited.config.tie_word_embeddings is False
    head, embedding = edited.lm_head.weight, edited.get_input_embeddings().weight
    assert torch.equal(head, original.lm_head.weight), "the head keeps its rows"
    assert head.data_ptr() != embedding.data_ptr()
    assert not torch.equal(head, embedding)
    assert any("no longer" in note for note in report.notes)
    assert report.config_changes == {"tie_word_embeddings": False}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_edited_together_they_stay_tied_and_the_logits_differ(tmp_path, direction, model_type, layout):
    base, out = save_tiny_model(tmp_path / "base", model_type, tied=True), tmp_path / "out"
    layout(base, EMBEDDINGS[model_type])
    report = edit(base, out, direction, "edit")
    assert report.config_changes == {}
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    original, edited = load(base), load(out)
    assert torch.equal(edited.lm_head.weight, edited.get_input_embeddings().weight)
    assert stream_component(edited, direction.vector) < 1e-6
    with ablated(original, direction.vector):
        by_hooks = logits(original)
    unedited_head = logits(edited) - by_hooks
    assert unedited_head.abs().max() > 1e-2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_skipped_they_stay_as_they_are(tmp_path, direction, layout):
    base, out = save_tiny_model(tmp_path / "base", tied=True), tmp_path / "out"
    layout(base, EMBEDDINGS["llama"])
    report = edit(base, out, direction, "skip")
    assert {tensor.edit.writer.role for tensor in report.tensors} == {"attn", "mlp"}
    assert any("still in the residual stream" in note for note in report.notes)
    assert torch.equal(load(base).lm_head.weight, load(out).lm_head.weight)
    assert stream_component(load(out), direction.vector) > 1e-3


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_only_what_untying_needs_is_changed_in_the_files(tmp_path, direction, model_type):
    base = save_tiny_model(tmp_path / "base", model_type, tied=True, max_shard_size="20KB", dtype=torch.bfloat16)
    out = tmp_path / "out"
    edit(base, out, direction, "untie")
    embedding = EMBEDDINGS[model_type]
    before, after = open_checkpoint(base), open_checkpoint(out)
    assert len(before.shards) > 3
    where = before.tensor(embedding).shard
    assert after.tensor(HEAD).shard == where, "in the shard of the tensor it was copied from"
    for old, new in zip(before.shards, after.shards, strict=True):
        assert old.metadata == new.metadata
        assert (old.header_bytes == new.header_bytes) == (old.file_name != where)
        assert [tensor.name for tensor in old.tensors] == [t.name for t in new.tensors if t.name != HEAD]
        assert len(new.header_bytes) % 8 == 0
    old_tensors, new_tensors = stored(base), stored(out)
    assert torch.equal(new_tensors[HEAD], old_tensors[embedding])
    assert before.index is not None
    assert after.index is not None
    assert after.index["weight_map"] == before.index["weight_map"] | {HEAD: where}
    grown = after.index["metadata"]["total_size"] - before.index["metadata"]["total_size"]
    assert grown == old_tensors[embedding].nbytes
    config = json.loads((base / "config.json").read_text())
    assert json.loads((out / "config.json").read_text()) == config | {"tie_word_embeddings": False}
    record = json.loads((out / "abliteration.json").read_text())
    for name, written in (record["shards"] | record["side_files"]).items():
        assert written["sha256"] == hashlib.sha256((out / name).read_bytes()).hexdigest()
    assert record["base"]["tied_tensor"] == embedding
    entry = next(tensor for tensor in record["tensors"] if tensor["name"] == HEAD)
    assert entry["kind"] == "untied"
    assert entry["component_after"] is None
    assert record["config_changes"] == {"tie_word_embeddings": False}


def test_an_embedding_made_from_a_head_that_is_stored_alone_is_measured(tmp_path, direction):
    base, out = save_tiny_model(tmp_path / "base", tied=True, dtype=torch.bfloat16), tmp_path / "out"
    store_head_alone(base, EMBEDDINGS["llama"])
    report = edit(base, out, direction, "untie")
    entry = next(tensor for tensor in report.tensors if tensor.name == EMBEDDINGS["llama"])
    assert entry.edit.kind == "untied"
    assert entry.component_before is not None
    assert entry.survivor is not None
    assert entry.component_before > 0.05
    assert entry.survivor < 0.02
    assert torch.equal(stored(out)[HEAD], stored(base)[HEAD])


@pytest.mark.parametrize(
    ("tied", "options"), [(False, {}), (True, {"components": ("mlp",)}), (True, {"layers": (1, 2)})]
)
@pytest.mark.parametrize("policy", ["untie", "skip"])
def test_where_no_tied_embedding_is_edited_the_policy_changes_nothing(tmp_path, direction, tied, options, policy):
    base = save_tiny_model(tmp_path / "base", tied=tied)
    report = edit(base, tmp_path / "out", direction, policy, **options)
    assert any(f"--tied {policy} changes nothing" in note for note in report.notes)
    edit(base, tmp_path / "plain", direction, "edit", **options)
    one, other = tree(tmp_path / "out"), tree(tmp_path / "plain")
    del one["abliteration.json"], other["abliteration.json"]
    assert one == other


def test_skipping_all_there_is_to_edit_is_refused(tmp_path, direction):
    base = save_tiny_model(tmp_path / "base", tied=True)
    with pytest.raises(InputError, match="--tied skip leaves them"):
        edit(base, tmp_path / "out", direction, "skip", components=("embed",))
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="one of edit, untie, skip"):
        EditOptions(tied="cut")  # type: ignore[arg-type]
