"""`--unverified`: an unknown type is edited only if a tiny model of its config, edited the same way, proves clean.

`--partial`: of a type that no edit cleans whole, a tiny model shows how much is left, and every place says so.
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from abliterate.architectures import names, vocabulary
from abliterate.architectures.table import ARCHITECTURES, WRAPPERS
from abliterate.architectures.tiny_config import shrink_config
from abliterate.directions import make_direction
from abliterate.editing import tiny_twin
from abliterate.editing.model_card import how_to_reproduce, summary, what_was_done
from abliterate.editing.options import EditOptions
from abliterate.editing.plan_report import plan_layout, read_layout
from abliterate.editing.record import read_record
from abliterate.editing.tiny_twin import CLEAN, CLEARLY_LESS, DIRTY, prove_on_tiny_twin
from abliterate.errors import UnsupportedArchitectureError
from abliterate.release.options import VerificationOptions
from abliterate.release.verification import verify_checkpoint
from tests.support.conformance import PARTIAL_TYPES, build_model, save_model
from tests.support.tiny_models import random_direction, save_tiny_model


@pytest.fixture
def unknown(tmp_path, monkeypatch) -> Path:
    """A checkpoint of a type that is struck out of the table; other sizes than a tiny twin has."""
    monkeypatch.delitem(ARCHITECTURES, "qwen3")
    return save_tiny_model(tmp_path / "base", "qwen3", num_hidden_layers=5, max_shard_size="30KB")


def change_config(path: Path, *, remove: tuple[str, ...] = (), **values: object) -> None:
    config = json.loads((path / "config.json").read_text()) | values
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in remove}))


@pytest.fixture
def edit(call_main, tmp_path):
    """Run `orthogonalize --unverified` on a checkpoint."""
    direction = tmp_path / "refusal.safetensors"
    make_direction(mean_difference=random_direction()).save(direction)
    return lambda base, *words: call_main(
        "orthogonalize", base, "--direction", direction, "-o", tmp_path / "out", "--unverified", *words
    )


@pytest.fixture
def refused(edit, tmp_path, tmp_path_factory, monkeypatch):
    """Check that the edit of a checkpoint is refused in one line, and that nothing is written or left behind."""
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def check(base: Path, message: str) -> None:
        before = sorted(tmp_path.rglob("*"))
        result = edit(base)
        assert result.exit_code == 1
        assert result.stdout == ""
        line = result.stderr.splitlines()[-1]
        assert line.startswith("error: ")
        assert str(base / "config.json") in line
        assert message in line
        assert sorted(tmp_path.rglob("*")) == before
        assert list(temporary.iterdir()) == []

    return check


def test_an_unknown_type_is_refused_and_the_flag_is_named(unknown, call_main, tmp_path):
    for command in (["plan", unknown], ["orthogonalize", unknown, "--direction", "x", "-o", tmp_path / "out"]):
        result = call_main(*command)
        assert result.exit_code == 1
        assert "model type 'qwen3' cannot be orthogonalized" in result.stderr
        assert "--unverified tries the edit on a tiny model" in result.stderr
    assert not (tmp_path / "out").exists()


def test_it_is_edited_after_the_proof_and_every_place_says_so(unknown, edit, tmp_path):
    result = edit(unknown, "--json")
    assert result.exit_code == 0, result.stderr
    assert "trying the edit on a tiny model of its config" in result.stderr
    assert "its stream is clean after the edit" in result.stderr
    assert "'qwen3' is not known and was accepted with --unverified" in result.stderr
    report = json.loads(result.stdout)
    assert report["counts"] == {"embed": 1, "attn": 5, "mlp": 5}
    assert any("--unverified" in note for note in report["notes"])
    record = read_record(tmp_path / "out").content
    assert record["options"]["unverified"] is True
    assert "accepted with `--unverified`" in what_was_done(record)
    assert "--unverified" in how_to_reproduce(record, None)
    assert verify_checkpoint(checkpoint=tmp_path / "out", options=VerificationOptions(quick=True)).passed
    # What the record names is held against the plan, also for an unknown type.
    dropped = record["tensors"].pop()
    (tmp_path / "out" / "abliteration.json").write_text(json.dumps(record))
    failed = verify_checkpoint(checkpoint=tmp_path / "out", options=VerificationOptions(quick=True))
    assert not failed.passed
    assert any(dropped["name"] in failure for failure in failed.failures)


def test_the_result_is_verified_by_running_it(tmp_path, edit, llama_directory, monkeypatch):
    monkeypatch.delitem(ARCHITECTURES, "llama")
    assert edit(llama_directory).exit_code == 0
    assert verify_checkpoint(checkpoint=tmp_path / "out", options=VerificationOptions(n_prompts=1)).passed


def test_plan_proves_it_too_and_says_so(unknown, call_main):
    result = call_main("plan", unknown, "--unverified")
    assert result.exit_code == 0
    assert "was accepted with --unverified" in result.stdout
    assert "its stream is clean after the edit" in result.stderr


def test_a_known_type_needs_no_proof_and_is_recorded_as_known(edit, monkeypatch, tmp_path):
    monkeypatch.setattr(tiny_twin, "_try", lambda *_: pytest.fail("a twin was built"))
    result = edit(save_tiny_model(tmp_path / "base"))
    assert result.exit_code == 0
    assert read_record(tmp_path / "out").content["options"]["unverified"] is False


@pytest.mark.parametrize("model_type", ["mixtral", "olmo2", "nemotron_h", "mistral3", "gpt_oss"])
def test_experts_norms_hybrids_and_towers(model_type, tmp_path, monkeypatch):
    model = build_model(model_type)
    for types in (ARCHITECTURES, WRAPPERS):
        if model_type in types:
            monkeypatch.delitem(types, model_type)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    state = torch.random.get_rng_state()
    proof = prove_on_tiny_twin(layout=read_layout(model=str(tmp_path)))
    assert proof is not None
    assert proof.before > DIRTY
    assert proof.after < CLEAN
    assert torch.equal(state, torch.random.get_rng_state())


def test_refused_by_name_stays_refused(refused, tmp_path):
    base = save_tiny_model(tmp_path / "base")
    change_config(base, model_type="doge")
    refused(base, "model type 'doge' cannot be orthogonalized: it multiplies each channel of the residual stream")


def test_code_that_comes_with_a_checkpoint_is_never_run(unknown, refused):
    (unknown / "modeling.py").write_text("raise SystemExit('it was run')")
    change_config(unknown, auto_map={"AutoModelForCausalLM": "modeling.Model", "AutoConfig": "modeling.Config"})
    refused(unknown, "its auto_map names Python code that comes with the checkpoint, which is never run")


def test_a_type_that_transformers_does_not_know(unknown, refused):
    change_config(unknown, model_type="brand_new")
    refused(unknown, "no tiny model of it can be built: transformers")


def test_a_type_that_is_no_language_model(unknown, refused):
    change_config(unknown, model_type="vit")
    refused(unknown, "transformers has no causal language model of it")


def test_a_config_that_transformers_does_not_take(unknown, refused):
    change_config(unknown, rms_norm_eps="small")
    refused(unknown, "no tiny model of it can be built: ")


def test_a_config_that_does_not_shrink(unknown, refused, monkeypatch):
    monkeypatch.setattr(tiny_twin, "_MAX_PARAMETERS", 1000)
    refused(unknown, "its config does not shrink")


def test_a_depth_that_no_model_has_does_not_hang(unknown):
    change_config(unknown, vision_config={"num_hidden_layers": 10**12, "hidden_size": 10**12})
    assert prove_on_tiny_twin(layout=read_layout(model=str(unknown))) is not None
    assert shrink_config({"num_hidden_layers": 10**12})["num_hidden_layers"] == 3


def test_a_tie_that_only_the_config_class_knows_of(refused, tmp_path, monkeypatch):
    monkeypatch.delitem(ARCHITECTURES, "starcoder2")
    base = save_tiny_model(tmp_path / "base", "starcoder2", tied=True)
    change_config(base, remove=("tie_word_embeddings",))
    refused(base, "transformers ties its embeddings, which config.json does not say; add tie_word_embeddings: true")
    change_config(base, tie_word_embeddings=True)
    assert prove_on_tiny_twin(layout=read_layout(model=str(base))) is not None


def test_a_writer_that_the_twin_has_not(tmp_path, refused, monkeypatch):
    monkeypatch.delitem(ARCHITECTURES, "qwen3")
    base = save_tiny_model(tmp_path / "base", "qwen3")
    tensors = load_file(base / "model.safetensors") | {"model.layers.1.mlp.down_proj.bias": torch.ones(32)}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    refused(base, "has the residual writer model.layers.*.mlp.down_proj.bias, and the tiny model has not")


def test_a_writer_that_the_checkpoint_has_not(tmp_path, refused, monkeypatch):
    monkeypatch.delitem(ARCHITECTURES, "llama")
    base = save_tiny_model(tmp_path / "base", "llama")
    change_config(base, mlp_bias=True)
    refused(base, "the tiny model has the residual writer model.layers.*.mlp.down_proj.bias, and the checkpoint has")


def test_a_missed_writer_leaves_the_stream_unclean(unknown, refused, monkeypatch):
    monkeypatch.setattr(vocabulary, "READER_PATHS", vocabulary.READER_PATHS | {"self_attn.o_proj"})
    # What names say is remembered from before, and must not be what they say here.
    monkeypatch.setattr(names, "_pattern", names._pattern.__wrapped__)
    refused(unknown, "a tiny model of it does not show that the edit is complete: |r.h|/|h| is 0.")


def test_norms_of_another_kind_leave_the_stream_unclean(tmp_path, refused, monkeypatch):
    monkeypatch.delitem(ARCHITECTURES, "gemma2")
    base = save_tiny_model(tmp_path / "base", "gemma2", tied=True)
    refused(base, "in its stream before the edit, and still 0.")


def test_a_measure_that_shows_nothing_is_no_proof(unknown, refused, monkeypatch):
    for found, message in ((0.0, "is only 0"), (float("nan"), "is only nan")):
        monkeypatch.setattr(tiny_twin, "stream_components", lambda *_, found=found: (found, found))
        refused(unknown, message)


def test_a_model_whose_blocks_cannot_be_watched_is_no_proof(unknown, refused, monkeypatch):
    monkeypatch.setattr(tiny_twin, "LAYER_LISTS", ("nothing",))
    refused(unknown, "0 of 0 places of its stream were seen")


def test_the_library_refuses_an_unknown_wrapper_around_a_known_model_without_proof(tmp_path, monkeypatch):
    monkeypatch.delitem(WRAPPERS, "mistral3")
    save_tiny_model(tmp_path, "mistral")
    change_config(tmp_path, model_type="mistral3", text_config={"model_type": "mistral"})
    with pytest.raises(UnsupportedArchitectureError, match="'mistral3'"):
        plan_layout(read_layout(model=str(tmp_path)))


def save_partial(path: Path, model_type: str) -> Path:
    save_model(build_model(model_type).float(), path, model_type)
    return path


@pytest.fixture
def partial(call_main, tmp_path):
    """Run `orthogonalize --partial` on a checkpoint."""
    direction = tmp_path / "refusal.safetensors"
    make_direction(mean_difference=random_direction(64)).save(direction)
    return lambda base, *words: call_main(
        "orthogonalize", base, "--direction", direction, "-o", tmp_path / "out", "--partial", *words
    )


@pytest.mark.parametrize("model_type", PARTIAL_TYPES)
def test_what_a_partial_edit_leaves_is_measured_on_the_text_model(tmp_path, model_type):
    layout = read_layout(model=str(save_partial(tmp_path, model_type)))
    proof = prove_on_tiny_twin(layout=layout, options=EditOptions(partial=True))
    assert proof is not None
    assert CLEAN < proof.mean_after < CLEARLY_LESS * proof.mean_before
    assert proof.mean_after < proof.after
    # The seeds are the config's own.
    assert proof == prove_on_tiny_twin(layout=layout, options=EditOptions(partial=True))


def test_every_place_says_what_a_partial_edit_leaves(partial, call_main, tmp_path):
    base = save_partial(tmp_path / "base", "qwen4_exp_text")
    result = partial(base, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    left = report["partial"]
    assert left["modules"] == ["model.layers.*.ple.conv1d"]
    assert left["reason"].startswith("its n-gram embedding writes through a convolution and a gate")
    assert 0 < left["twin"]["mean_after"] < left["twin"]["mean_before"]
    record = read_record(tmp_path / "out").content
    assert record["partial"] == left
    assert record["options"]["partial"] is True
    numbers = f"fell from {left['twin']['mean_before']:.2g} to {left['twin']['mean_after']:.2g} on average"
    planned = call_main("plan", base, "--partial")
    for text in (report["notes"][0], " ".join(result.stderr.split()), planned.stdout):
        assert f"partial: {left['reason']}; on a tiny random model of this config |r.h|/|h| {numbers}" in text
        assert "`abliterate verify` measures it in this model" in text
        assert "model.layers.*.ple.conv1d" in text
        assert "`abliterate evaluate MODEL --intervention ablate --direction F`" in text
    assert json.loads(call_main("plan", base, "--partial", "--json").stdout)["partial"] == left
    assert "The edit is partial" in what_was_done(record)
    assert "`model.layers.*.ple.conv1d`" in what_was_done(record)
    assert "as far as an edit of weights can" in summary(record)
    assert "--partial" in how_to_reproduce(record, None)


def test_without_the_flag_one_line_names_it(call_main, tmp_path):
    base = save_partial(tmp_path / "base", "inkling_text")
    for command in (["plan", base], ["orthogonalize", base, "--direction", "x", "-o", tmp_path / "out"]):
        for words in ([], ["--unverified"]):
            result = call_main(*command, *words)
            assert result.exit_code == 1
            assert len(result.stderr.splitlines()) == 1
            assert "model type 'inkling_text' cannot be orthogonalized: a convolution of each channel" in result.stderr
            assert "--partial edits all that an edit can clean and measures what is left" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_type_that_is_cleaned_whole_is_edited_as_without_the_flag(call_main, monkeypatch, tmp_path):
    monkeypatch.setattr(tiny_twin, "_try_partial", lambda *_: pytest.fail("a twin was built"))
    base = save_tiny_model(tmp_path / "base")
    make_direction(mean_difference=random_direction()).save(tmp_path / "r.safetensors")
    for out, words in (("without", []), ("with", ["--partial"])):
        result = call_main(
            "orthogonalize", base, "--direction", tmp_path / "r.safetensors", "-o", tmp_path / out, *words
        )
        assert result.exit_code == 0
    records = [read_record(tmp_path / out).content for out in ("without", "with")]
    assert records[1]["options"]["partial"] is False
    assert records[1]["partial"] is None
    assert records[0]["shards"] == records[1]["shards"]


@pytest.fixture
def partly_refused(partial, tmp_path):
    """Check that a partial edit is refused in one line, and that nothing is written."""

    def check(base: Path, message: str, *words: str) -> None:
        result = partial(base, *words)
        assert result.exit_code == 1
        assert result.stdout == ""
        assert message in result.stderr.splitlines()[-1]
        assert not (tmp_path / "out").exists()

    return check


def test_a_partial_edit_that_takes_nothing_away_is_refused(partly_refused, tmp_path, monkeypatch):
    base = save_partial(tmp_path / "base", "inkling_text")
    for found, message in ((0.0, "is only 0"), (float("nan"), "is only nan"), (0.1, "and still 0.1 after it")):
        monkeypatch.setattr(tiny_twin, "stream_components", lambda *_, found=found: (found, found))
        partly_refused(base, message)


def test_a_checkpoint_with_other_norms_than_its_type_is_refused(partly_refused, tmp_path):
    base = tmp_path / "base"
    save_model(build_model("gemma3n_text").float(), base, "gemma3n_text", shard="5GB")
    tensors = load_file(base / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "post_laurel_norm" not in name}
    save_file(kept, base / "model.safetensors", metadata={"format": "pt"})
    partly_refused(base, "its residual writers are of other kinds, or behind other norms")


def test_a_config_that_transformers_does_not_take_is_no_tiny_model(partly_refused, tmp_path):
    base = save_partial(tmp_path / "base", "inkling_text")
    change_config(base, rms_norm_eps="small")
    partly_refused(
        base, "--partial refuses model type 'inkling_text' with this config: no tiny model of it can be built"
    )


def test_a_partial_edit_is_no_adapter_and_no_addition(partly_refused, tmp_path):
    base = save_partial(tmp_path / "base", "inkling_text")
    partly_refused(base, "leave out --format adapter", "--format", "adapter")
    make_direction(mean_difference=random_direction(64), metadata={"layer": 1}).save(tmp_path / "refusal.safetensors")
    partly_refused(base, "cannot be put into its weights", "--add", "1")


def test_two_directions_and_some_layers_are_recorded_as_partial_too(partial, tmp_path):
    base = save_partial(tmp_path / "base", "gemma3n")
    second = tmp_path / "second.safetensors"
    make_direction(mean_difference=random_direction(64, seed=9)).save(second)
    result = partial(base, "--direction", second, "--layers", "0:2")
    assert result.exit_code == 0, result.stderr
    record = read_record(tmp_path / "out").content
    assert record["partial"]["modules"] == ["model.language_model.layers.*.laurel"]
    assert record["subspace"]["k"] == 2
