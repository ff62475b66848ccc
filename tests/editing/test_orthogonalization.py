import functools
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import abliterate.checkpoints.file_assembly
import abliterate.editing.edited_files
import abliterate.editing.edited_tensors
import abliterate.formats.projection
from abliterate.checkpoints.checkpoint import open_checkpoint
from abliterate.checkpoints.model_source import ModelSource
from abliterate.directions import Direction, make_direction
from abliterate.editing.options import EditOptions, WriteOptions
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.editing.record import OrthogonalizationReport, decode_subspace
from abliterate.errors import (
    AbliterateError,
    CheckpointError,
    DirectionError,
    InputError,
    QuantizedCheckpointError,
    Terminated,
    UnsupportedArchitectureError,
    VerificationError,
)
from abliterate.formats.component import component_norm
from abliterate.formats.projection import project_out
from tests.support.loaded_models import ablated, load, logits, stored, stream_component, tree
from tests.support.tiny_models import D_MODEL, N_LAYERS, random_direction, save_tiny_model


@pytest.fixture(scope="module")
def direction() -> Direction:
    return make_direction(mean_difference=5 * random_direction(), metadata={"model": "tiny", "layer": 1})


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """An untied float32 llama in several shards, with the side files that real checkpoints have."""
    path = save_tiny_model(tmp_path_factory.mktemp("base") / "llama", attention_bias=True, max_shard_size="30KB")
    (path / "tokenizer.json").write_bytes(b'{"version": "1.0"}')
    (path / "modeling_custom.py").write_text("raise SystemExit('remote code must not run')")
    (path / "original").mkdir()
    (path / "original" / "params.json").write_text("{}")
    (path / ".cache").mkdir()
    (path / ".cache" / "junk").write_text("x")
    return path


@pytest.fixture
def single(tmp_path) -> Path:
    return save_tiny_model(tmp_path / "base")


def writer_axes(model_type: str, *, biases: bool = False) -> dict[str, int]:
    """The writers by hand, name in the loaded model -> residual axis: independent of the code under test."""
    if model_type == "gpt2":
        axes = {"transformer.wte.weight": 1, "transformer.wpe.weight": 1}
        for layer in range(N_LAYERS):
            for module in ("attn", "mlp"):
                axes |= {
                    f"transformer.h.{layer}.{module}.c_proj.weight": 1,
                    f"transformer.h.{layer}.{module}.c_proj.bias": 0,
                }
        return axes
    axes = {"model.embed_tokens.weight": 1}
    for layer in range(N_LAYERS):
        axes |= {f"model.layers.{layer}.self_attn.o_proj.weight": 0, f"model.layers.{layer}.mlp.down_proj.weight": 0}
        if biases:
            axes[f"model.layers.{layer}.self_attn.o_proj.bias"] = 0
    return axes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("model_type", "options"), [("llama", {"attention_bias": True}), ("gpt2", {})])
def test_it_equals_the_edit_of_the_loaded_model_bit_for_bit(tmp_path, direction, dtype, model_type, options):
    base = save_tiny_model(tmp_path / "base", model_type, dtype=dtype, max_shard_size="20KB", **options)
    report = orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out")
    axes = writer_axes(model_type, biases=bool(options))
    before, after = load(base).state_dict(), load(tmp_path / "out").state_dict()
    assert before.keys() == after.keys()
    assert {tensor.name for tensor in report.tensors} == axes.keys()
    for name, weight in before.items():
        expected = weight
        if name in axes:
            expected = project_out(weight, directions=direction.vector[None], residual_axis=axes[name])
            assert not torch.equal(weight, after[name])
        assert after[name].dtype == dtype
        assert torch.equal(after[name], expected), name


def test_it_agrees_with_the_formula_in_float64(single, tmp_path, direction):
    orthogonalize_checkpoint(source=single, direction=direction, output=tmp_path / "out")
    before, after = stored(single), stored(tmp_path / "out")
    r = direction.vector.double()
    for name, axis in writer_axes("llama").items():
        weight = before[name].double() if axis == 0 else before[name].double().T
        expected = weight - torch.outer(r, r @ weight)
        torch.testing.assert_close(after[name].double(), expected if axis == 0 else expected.T, rtol=1e-6, atol=1e-7)


def test_every_other_byte_stays(llama, tmp_path, direction):
    out = tmp_path / "out"
    report = orthogonalize_checkpoint(source=llama, direction=direction, output=out)
    old, new = tree(llama), tree(out)
    record = json.loads(new.pop("abliteration.json"))
    del old[".cache/junk"]
    assert old.keys() == new.keys()
    edited = {tensor.name for tensor in report.tensors}
    before, after = open_checkpoint(llama), open_checkpoint(out)
    assert len(before.shards) > 3
    assert before.index == after.index
    for old_shard, new_shard in zip(before.shards, after.shards, strict=True):
        assert old_shard == new_shard, "header bytes, metadata, order and offsets"
        for tensor in old_shard.tensors:
            where = slice(tensor.start, tensor.end)
            same = old[tensor.shard][where] == new[tensor.shard][where]
            assert same == (tensor.name not in edited), tensor.name
    shard_names = {shard.file_name for shard in before.shards}
    for name in old.keys() - shard_names:
        assert old[name] == new[name], name
    assert record["shards"].keys() == shard_names
    assert record["side_files"].keys() == old.keys() - shard_names
    for name, written in (record["shards"] | record["side_files"]).items():
        assert written == {"sha256": hashlib.sha256(new[name]).hexdigest(), "bytes": len(new[name])}


def test_the_record_is_complete(llama, tmp_path, direction):
    out = tmp_path / "out"
    source = ModelSource(path=llama, name="someone/tiny-llama", revision="abc123")
    report = orthogonalize_checkpoint(source=source, direction=direction, output=out)
    record = json.loads((out / "abliteration.json").read_text())
    assert list(record) == [
        "format_version", "format", "tool", "created", "base", "directions", "subspace", "options", "config_changes",
        "tensors", "left_alone", "shards", "side_files", "partial",
    ]  # fmt: skip
    assert record["format_version"] == 2
    assert {group["tensors"]: group["count"] for group in record["left_alone"]} == {"lm_head.weight": 1}
    assert record["tool"].keys() == {"name", "version", "torch", "safetensors"}
    assert record["base"] == {
        "model": "someone/tiny-llama",
        "revision": "abc123",
        "model_type": "llama",
        "config_file_sha256": hashlib.sha256((llama / "config.json").read_bytes()).hexdigest(),
        "tied_embeddings": False,
        "pipeline_tag": "text-generation",
    }
    assert record["directions"] == [
        {"sha256": direction.sha256, "d_model": D_MODEL, "metadata": {"model": "tiny", "layer": 1}}
    ]
    torch.testing.assert_close(
        torch.from_numpy(decode_subspace(record["subspace"]))[0], direction.vector.double(), rtol=0, atol=1e-7
    )
    assert record["options"] == {
        "components": ["embed", "attn", "mlp"], "layers": None, "strength": 1.0, "strengths": None,
        "tied": "edit",
        "preserve_norms": False, "add": None, "quantized": "refuse", "unverified": False, "partial": False,
    }  # fmt: skip
    assert record["config_changes"] == {}
    assert record["partial"] is None
    assert len(record["tensors"]) == 1 + 3 * N_LAYERS
    before, after = stored(llama), stored(out)
    for tensor in record["tensors"]:
        axis = writer_axes("llama", biases=True)[tensor["name"]]
        assert tensor["residual_axis"] == axis
        assert tensor["shape"] == list(before[tensor["name"]].shape)
        # What there was is measured by the edit, in its float32.
        for key, weights, accuracy in (("component_before", before, 1e-6), ("component_after", after, 1e-9)):
            measured = component_norm(weights[tensor["name"]], directions=direction.vector[None], residual_axis=axis)
            assert tensor[key] == pytest.approx(measured, rel=accuracy)
        assert tensor["component_after"] < 1e-6
    assert max(tensor["component_before"] for tensor in record["tensors"]) > 0.1
    assert report.counts == {"embed": 1, "attn": 2 * N_LAYERS, "mlp": N_LAYERS}
    assert report.output == str(out)
    assert report.bytes_total == sum(len(v) for k, v in tree(llama).items() if k.endswith(".safetensors"))
    assert report.bytes_edited == sum(before[tensor["name"]].nbytes for tensor in record["tensors"])


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_untied_the_logits_equal_those_of_the_ablated_base(tmp_path, direction, model_type, dtype, tolerance):
    biases = {"attention_bias": True, "mlp_bias": True} if model_type == "llama" else {}
    base = save_tiny_model(tmp_path / "base", model_type, dtype=dtype, **biases)
    orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out")
    original, edited = load(base), load(tmp_path / "out")
    plain = logits(original)
    with ablated(original, direction.vector):
        by_hooks = logits(original)
    assert (plain - by_hooks).abs().max() > 0.1, "the direction must matter to the base model"
    assert (by_hooks - logits(edited)).abs().max() < tolerance
    assert torch.equal(logits(original), plain), "the hooks must be gone"


def test_tied_the_head_changes_too_and_the_record_says_so(tmp_path, direction):
    base = save_tiny_model(tmp_path / "base", tied=True, dtype=torch.float64)
    report = orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out")
    assert report.base["tied_embeddings"] is True
    assert any("tied" in note for note in report.notes)
    original, edited = load(base), load(tmp_path / "out")
    assert edited.lm_head.weight.data_ptr() == edited.get_input_embeddings().weight.data_ptr()
    assert stream_component(edited, direction.vector) < 1e-6
    with ablated(original, direction.vector):
        by_hooks = logits(original)
    # Condition 1 of the theorem fails here: before the head the models agree, after it they do not.
    assert (by_hooks - logits(edited)).abs().max() > 1e-3


def test_tied_with_both_tensors_stored_both_are_edited_and_stay_tied(tmp_path, direction):
    base = save_tiny_model(tmp_path / "base", tied=True)
    tensors = stored(base)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out")
    edited = load(tmp_path / "out")
    assert torch.equal(edited.lm_head.weight, edited.get_input_embeddings().weight)
    assert stream_component(edited, direction.vector) < 1e-6


def test_an_untied_head_is_never_edited(single, tmp_path, direction):
    orthogonalize_checkpoint(source=single, direction=direction, output=tmp_path / "out")
    assert torch.equal(stored(single)["lm_head.weight"], stored(tmp_path / "out")["lm_head.weight"])


@pytest.mark.parametrize("model_type", ["granite", "olmo", "phi3", "qwen3", "starcoder2"])
def test_the_stream_is_clean_for_other_model_types(tmp_path, direction, model_type):
    base = save_tiny_model(tmp_path / "base", model_type, dtype=torch.float64, max_shard_size="40KB")
    assert stream_component(load(base), direction.vector) > 1e-1
    orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out")
    assert stream_component(load(tmp_path / "out"), direction.vector) < 1e-6


@pytest.mark.parametrize("role", ["embed", "attn", "mlp"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_no_role_is_edited_needlessly(tmp_path, direction, model_type, role):
    base = save_tiny_model(tmp_path / "base", model_type, dtype=torch.float64)
    components = tuple(other for other in ("embed", "attn", "mlp") if other != role)
    report = orthogonalize_checkpoint(
        source=base, direction=direction, output=tmp_path / "out", options=EditOptions(components=components)
    )
    assert {tensor.edit.writer.role for tensor in report.tensors} == set(components)
    assert stream_component(load(tmp_path / "out"), direction.vector) > 1e-3


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        (EditOptions(layers=(1, 2)), {1}),
        (EditOptions(layers=(0, 2)), {None, 0, 1}),
        (EditOptions(layers=(0, 2), components=("mlp",)), {0, 1}),
        (EditOptions(components=("embed",)), {None}),
    ],
)
def test_layers_and_components_select(single, tmp_path, direction, options, layers):
    report = orthogonalize_checkpoint(source=single, direction=direction, output=tmp_path / "out", options=options)
    edited = {tensor.name for tensor in report.tensors}
    assert {tensor.edit.writer.layer for tensor in report.tensors} == layers
    before, after = stored(single), stored(tmp_path / "out")
    assert {name for name in before if not torch.equal(before[name], after[name])} == edited


def test_strength_scales_what_is_removed(single, tmp_path, direction):
    report = orthogonalize_checkpoint(
        source=single, direction=direction, output=tmp_path / "out", options=EditOptions(strength=0.25)
    )
    name = "model.layers.0.mlp.down_proj.weight"
    before, after = (direction.vector @ stored(path)[name] for path in (single, tmp_path / "out"))
    torch.testing.assert_close(after, 0.75 * before, rtol=1e-4, atol=1e-6)
    assert all(tensor.component_after > 0.01 for tensor in report.tensors if tensor.edit.writer.layer is not None)


def test_a_direction_file_and_plain_strings_do_as_well(single, tmp_path, direction):
    direction.save(tmp_path / "refusal.safetensors")
    report = orthogonalize_checkpoint(
        source=str(single), direction=str(tmp_path / "refusal.safetensors"), output=str(tmp_path / "out")
    )
    assert report.directions[0]["sha256"] == direction.sha256
    assert (tmp_path / "out" / "abliteration.json").is_file()


def test_a_second_edit_keeps_the_first_in_its_record(single, tmp_path, direction):
    first, second = tmp_path / "first", tmp_path / "second"
    orthogonalize_checkpoint(source=single, direction=direction, output=first)
    (first / "evaluation.json").write_text('{"model": "first"}')
    other = make_direction(mean_difference=random_direction(seed=8))
    orthogonalize_checkpoint(source=first, direction=other, output=second, options=EditOptions(strength=0.5))
    record = json.loads((second / "abliteration.json").read_text())
    assert record["directions"][0]["sha256"] == other.sha256
    earlier = record["base"]["abliteration"]
    assert earlier["directions"][0]["sha256"] == direction.sha256
    assert earlier["options"]["strength"] == 1.0
    assert earlier["base"]["model"] == str(single)
    assert not (second / "evaluation.json").exists(), "it describes other weights"
    assert "abliteration.json" not in record["side_files"]


def test_a_dry_run_returns_the_plan_and_writes_nothing(single, tmp_path, direction):
    before = tree(tmp_path)
    for output in (None, tmp_path / "out"):
        report = orthogonalize_checkpoint(source=single, direction=direction, output=output, dry_run=True)
        assert report.dry_run
        assert len(report.tensors) == 1 + 2 * N_LAYERS
        assert all(tensor.component_before is None for tensor in report.tensors)
        assert report.shards == {}
    assert tree(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def change_config(path: Path, **values: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))


def put_nan(path: Path) -> None:
    tensors = stored(path)
    tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, path / "model.safetensors")


def leave_only_pickle(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda base: change_config(base, model_type="doge"), UnsupportedArchitectureError, "'doge'"),
        (lambda base: change_config(base, model_type="new_one"), UnsupportedArchitectureError, "'new_one'"),
        (
            lambda base: change_config(base, quantization_config={"quant_method": "gptq"}),
            QuantizedCheckpointError,
            "gptq",
        ),
        (lambda base: change_config(base, num_hidden_layers=9), CheckpointError, "has no residual writer"),
        (leave_only_pickle, CheckpointError, "convert them with"),
        (put_nan, CheckpointError, "model.layers.2.mlp.down_proj.weight holds NaN"),
        (lambda base: (base / "config.json").unlink(), CheckpointError, "no config.json"),
        (lambda base: (base / "abliteration.json").write_text("{"), CheckpointError, "abliteration.json"),
    ],
)
def test_a_source_that_cannot_be_edited_is_refused_and_nothing_is_written(
    single, tmp_path, direction, damage, error, message
):
    damage(single)
    before = tree(tmp_path)
    with pytest.raises(error, match=message) as raised:
        orthogonalize_checkpoint(source=single, direction=direction, output=tmp_path / "new" / "out")
    assert "\n" not in str(raised.value)
    assert tree(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_a_direction_that_does_not_fit_is_refused(single, tmp_path):
    narrow = make_direction(mean_difference=torch.ones(16), metadata={"model": "other"})
    narrow.save(tmp_path / "narrow.safetensors")
    for direction in (narrow, tmp_path / "narrow.safetensors"):
        with pytest.raises(DirectionError, match=r"16 entries.*32"):
            orthogonalize_checkpoint(source=single, direction=direction, output=tmp_path / "out")
    with pytest.raises(DirectionError, match="no such file"):
        orthogonalize_checkpoint(source=single, direction=tmp_path / "none", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (EditOptions(layers=(1, N_LAYERS + 1)), "beyond the 3 layers"),
        (EditOptions(layers=(1, 2), components=("embed",)), "select no tensor"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused(single, tmp_path, direction, options, message):
    with pytest.raises(InputError, match=message):
        orthogonalize_checkpoint(source=single, direction=direction, output=tmp_path / "out", options=options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("where", [".", "inside", "inside/deeper", ".."])
def test_an_output_that_touches_the_source_is_refused(single, direction, where, overwrite):
    before = tree(single)
    with pytest.raises(InputError, match="model's own directory"):
        orthogonalize_checkpoint(source=single, direction=direction, output=single / where, overwrite=overwrite)
    assert tree(single) == before


def test_a_link_to_the_source_is_the_source(single, tmp_path, direction):
    (tmp_path / "link").symlink_to(single)
    with pytest.raises(InputError, match="model's own directory"):
        orthogonalize_checkpoint(source=single, direction=direction, output=tmp_path / "link", overwrite=True)


def test_an_existing_output_needs_overwrite_and_must_look_like_a_checkpoint(single, tmp_path, direction):
    def run(output: Path, *, overwrite: bool) -> OrthogonalizationReport:
        return orthogonalize_checkpoint(source=single, direction=direction, output=output, overwrite=overwrite)

    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(InputError, match="--overwrite"):
        run(out, overwrite=False)
    run(out, overwrite=True)
    (out / "stale.txt").write_text("x")
    with pytest.raises(InputError, match="--overwrite"):
        run(out, overwrite=False)
    assert (out / "stale.txt").exists()
    run(out, overwrite=True)
    assert not (out / "stale.txt").exists()

    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(precious)
    for path, message in (
        (precious, "no checkpoint"),
        (tmp_path / "file", "not a directory"),
        (tmp_path / "link", "not"),
    ):
        with pytest.raises(InputError, match=message):
            run(path, overwrite=True)
    assert (precious / "thesis.tex").read_text() == "x"
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out", "precious", "file", "link"}


def test_no_output_without_a_dry_run(single, direction):
    with pytest.raises(InputError, match="-o"):
        orthogonalize_checkpoint(source=single, direction=direction, output=None)


class _FailingProgress:
    """Raises once some bytes of a task were reported."""

    def __init__(self, task: str, error: BaseException) -> None:
        self.wanted, self.error = task, error

    @contextmanager
    def task(self, description: str, *, total: int | None, unit: str = "") -> Iterator[Any]:
        def advance(_steps: int) -> None:
            if description.startswith(self.wanted):
                raise self.error

        yield advance

    def message(self, text: str) -> None:
        pass


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted; .*out was left as it was"),
        (Terminated(), 143, "terminated; .*out was left as it was"),
        (OSError(28, "No space left on device"), 1, "No space left on device; .*out was left as it was"),
    ],
)
def test_a_run_that_is_stopped_leaves_the_old_output_as_it_was(
    llama, tmp_path, direction, overwrite, error, code, message
):
    out = tmp_path / "new" / "out"
    if overwrite:
        orthogonalize_checkpoint(source=llama, direction=direction, output=out)
    before = tree(tmp_path)
    with pytest.raises(AbliterateError, match=message) as raised:
        orthogonalize_checkpoint(
            source=llama,
            direction=direction,
            output=out,
            overwrite=overwrite,
            progress=_FailingProgress("Writing", error),
        )
    assert raised.value.exit_code == code
    assert "\n" not in str(raised.value)
    # It came with the first bytes, before anything was finished.
    assert "nothing was kept" in str(raised.value)
    assert tree(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["new"] if overwrite else [])


@pytest.mark.parametrize(
    ("name", "replacement", "message"),
    [
        ("project_out", lambda weight, **_: weight.clone(), "reread, has a component of"),
        ("project_out", lambda weight, **_: weight * float("nan"), "reread, has a component of"),
    ],
)
def test_what_is_written_is_verified(single, tmp_path, direction, monkeypatch, name, replacement, message):
    monkeypatch.setattr(abliterate.formats.projection, name, replacement)
    with pytest.raises(VerificationError, match=message):
        orthogonalize_checkpoint(source=single, direction=direction, output=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_a_planned_edit_that_no_shard_consumed_is_an_error(single, tmp_path, direction, monkeypatch):
    edit_one = abliterate.editing.edited_files.EditedShard._edit

    def forget(self, edit):
        if edit.name == "model.layers.1.mlp.down_proj.weight":
            self._copy(edit.source.shard, edit.source.start, edit.source.end)
        else:
            edit_one(self, edit)

    monkeypatch.setattr(abliterate.editing.edited_files.EditedShard, "_edit", forget)
    with pytest.raises(VerificationError, match=r"were not made, first model\.layers\.1\.mlp\.down_proj"):
        orthogonalize_checkpoint(source=single, direction=direction, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("model_type", "options"), [("gpt2", {}), ("qwen3_moe", {"num_experts": 4})])
def test_the_bytes_do_not_depend_on_the_number_of_threads(tmp_path, direction, model_type, options, monkeypatch):
    monkeypatch.setattr(abliterate.editing.edited_tensors, "_METER_BYTES", 200)
    monkeypatch.setattr(abliterate.checkpoints.file_assembly, "_SEGMENT_BYTES", 1000)
    budget = functools.partial(abliterate.editing.edited_tensors.blocks_of, budget=900)
    monkeypatch.setattr(abliterate.editing.edited_tensors, "blocks_of", budget)
    monkeypatch.setattr(abliterate.formats.projection, "_BLOCK_ELEMENTS", 3 * D_MODEL)
    base = save_tiny_model(tmp_path / "base", model_type, dtype=torch.bfloat16, max_shard_size="20KB", **options)
    reports = []
    for workers in (1, 2, 7):
        out = tmp_path / f"out-{workers}"
        writing = WriteOptions(workers=workers)
        reports.append(orthogonalize_checkpoint(source=base, direction=direction, output=out, writing=writing))
        assert reports[-1].work.workers == workers
    one, *others = [tree(tmp_path / f"out-{workers}") for workers in (1, 2, 7)]
    for other in others:
        assert {name for name in one if one[name] != other[name]} <= {"abliteration.json"}
    assert all(report.tensors == reports[0].tensors for report in reports)
    moved = reports[0].work
    assert moved.bytes_shared + moved.bytes_written == sum(len(data) for data in one.values()) - len(
        one["abliteration.json"]
    ), "no byte is written twice"


@pytest.mark.parametrize(("options", "message"), [({"workers": 0}, "1 or more"), ({"device": "cuda:99"}, "not there")])
def test_ways_of_writing_that_there_are_not(options, message):
    with pytest.raises(InputError, match=message):
        WriteOptions(**options)


def test_the_source_is_never_changed(llama, tmp_path, direction):
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in llama.rglob("*")}
    orthogonalize_checkpoint(source=llama, direction=direction, output=tmp_path / "out")
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in llama.rglob("*")} == before


def test_a_bias_along_the_direction_becomes_nothing_and_passes(single, tmp_path, direction):
    # After the edit nothing but rounding is left of such a tensor: the bound must not be relative to that.
    tensors = stored(single)
    for scale, name in ((1.0, "model.layers.0.mlp.down_proj.weight"), (0.0, "model.layers.1.mlp.down_proj.weight")):
        tensors[name] = scale * torch.outer(direction.vector, torch.ones(tensors[name].shape[1]))
    save_file(tensors, single / "model.safetensors")
    orthogonalize_checkpoint(source=single, direction=direction, output=tmp_path / "out")
    assert stored(tmp_path / "out")["model.layers.0.mlp.down_proj.weight"].abs().max() < 1e-6


class TestSeveralDirections:
    def test_all_of_them_are_gone_from_weights_and_stream(self, tmp_path):
        base = save_tiny_model(tmp_path / "base", dtype=torch.float64, mlp_bias=True)
        directions = [make_direction(mean_difference=random_direction(seed=seed)) for seed in (1, 2, 3)]
        directions[2].save(tmp_path / "third.safetensors")
        report = orthogonalize_checkpoint(
            source=base, direction=[*directions[:2], tmp_path / "third.safetensors"], output=tmp_path / "out"
        )
        original, edited = load(base), load(tmp_path / "out")
        for direction in directions:
            assert stream_component(original, direction.vector) > 1e-2
            assert stream_component(edited, direction.vector) < 1e-6
        assert stream_component(edited, random_direction(seed=4)) > 1e-2
        assert [entry["sha256"] for entry in report.directions] == [each.sha256 for each in directions]
        subspace = torch.from_numpy(decode_subspace(report.subspace))
        torch.testing.assert_close(subspace @ subspace.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-14)
        stacked = torch.stack([each.vector.double() for each in directions])
        torch.testing.assert_close(stacked @ subspace.T @ subspace, stacked, rtol=0, atol=1e-14)

    def test_the_change_of_a_weight_has_their_rank(self, single, tmp_path):
        directions = [make_direction(mean_difference=random_direction(seed=seed)) for seed in (1, 2)]
        orthogonalize_checkpoint(source=single, direction=directions, output=tmp_path / "out")
        name = "model.layers.1.mlp.down_proj.weight"
        change = (stored(single)[name] - stored(tmp_path / "out")[name]).double()
        assert torch.linalg.matrix_rank(change, rtol=1e-4) == 2

    @pytest.mark.parametrize("other", ["the same", "turned round", "in the span"])
    def test_one_that_adds_nothing_is_refused(self, single, tmp_path, direction, other):
        second = make_direction(mean_difference=random_direction(seed=2))
        vector = {
            "the same": direction.vector,
            "turned round": -3 * direction.vector,
            "in the span": direction.vector + second.vector + 1e-5 * random_direction(seed=5),
        }[other]
        third = make_direction(mean_difference=vector)
        with pytest.raises(DirectionError, match=r"direction 3: lies in the span.*leave it out"):
            orthogonalize_checkpoint(source=single, direction=[direction, second, third], output=tmp_path / "out")
        third.save(tmp_path / "third.safetensors")
        with pytest.raises(DirectionError, match=r"third\.safetensors: lies in the span"):
            orthogonalize_checkpoint(
                source=single, direction=[direction, second, tmp_path / "third.safetensors"], output=tmp_path / "out"
            )
        with pytest.raises(DirectionError, match="no direction was given"):
            orthogonalize_checkpoint(source=single, direction=[], output=tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_preserved_norms_keep_the_stream_clean(tmp_path, direction):
    base = save_tiny_model(tmp_path / "base", "gpt2", dtype=torch.float64)
    options = EditOptions(preserve_norms=True)
    orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out", options=options)
    assert stream_component(load(tmp_path / "out"), direction.vector) < 1e-6
    before, after = stored(base), stored(tmp_path / "out")
    for name, axis in writer_axes("gpt2").items():
        assert not torch.equal(before[name], after[name])
        torch.testing.assert_close(after[name].norm(dim=axis), before[name].norm(dim=axis), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_survivor_of_each_tensor_is_reported(tmp_path, dtype):
    direction = make_direction(mean_difference=random_direction(256))
    base = save_tiny_model(tmp_path / "base", hidden_size=256, intermediate_size=512, dtype=dtype)
    report = orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out")
    unit = direction.vector.double() / direction.vector.double().norm()
    before, after = stored(base), stored(tmp_path / "out")
    for tensor in report.tensors:
        old, new = (each[tensor.name].double().movedim(tensor.edit.writer.residual_axis, 0) for each in (before, after))
        accuracy = 1e-3 if dtype == torch.bfloat16 else 1e-6
        assert tensor.survivor == pytest.approx(float((unit @ new).norm() / (unit @ old).norm()), rel=accuracy)
        assert tensor.survivor < 2e-3


class TestFaultsWhileWriting:
    """What is computed and lands on the disk other than was meant is found before the directory appears."""

    @pytest.fixture
    def damage(self, single, tmp_path, direction, monkeypatch):
        read, info, done = abliterate.checkpoints.file_ranges.PlainFile.read, open_checkpoint(single).tensor, []

        def run(name: str, at: int) -> None:
            position = info(name).start + at

            def faulty(target, offset, count, memory):
                is_new = target.path.parent != single and target.path.suffix == ".safetensors"
                if is_new and offset <= position < offset + count and not done:
                    done.append(position)
                    old = os.pread(target.descriptor, 1, position)
                    os.pwrite(target.descriptor, bytes([old[0] ^ 1]), position)
                return read(target, offset, count, memory)

            monkeypatch.setattr(abliterate.checkpoints.file_ranges.PlainFile, "read", faulty)
            orthogonalize_checkpoint(source=single, direction=direction, output=tmp_path / "out")

        return run

    @pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"])
    def test_one_flipped_bit(self, tmp_path, damage, name):
        with pytest.raises(VerificationError, match=f"{name}, reread, is not what was written") as raised:
            damage(name, 0)
        assert "disk or memory may be faulty" in str(raised.value)
        assert {path.name for path in tmp_path.iterdir()} == {"base"}

    def test_a_flipped_bit_in_the_header(self, tmp_path, damage):
        # The first byte before the tensors: the header's last one.
        with pytest.raises(VerificationError, match="header, reread, is not what was written"):
            damage("lm_head.weight", -1)
        assert {path.name for path in tmp_path.iterdir()} == {"base"}
