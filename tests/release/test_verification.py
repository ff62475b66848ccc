"""Verification passes what orthogonalize wrote, and catches each way in which a checkpoint can be something else."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from abliterate.checkpoints.model_source import resolve_model
from abliterate.directions import Direction, make_direction
from abliterate.editing.options import EditOptions
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.editing.record import read_record
from abliterate.errors import CheckpointError, InputError, ModelError
from abliterate.models.options import ModelOptions
from abliterate.progress import SILENT
from abliterate.release.file_checks import QuickCheck
from abliterate.release.options import VerificationOptions
from abliterate.release.recorded_edits import recorded_subspace
from abliterate.release.report import LogitCheck, StreamCheck, logit_failures, stream_failures
from abliterate.release.verification import VerificationReport, verify_checkpoint
from abliterate.release.verification_runs import ModelRuns
from tests.support.conformance import build_model
from tests.support.fake_hub import FakeHub
from tests.support.loaded_models import stored
from tests.support.tiny_models import CHAT_VOCABULARY, make_tokenizer, save_chat_model, tiny_gpt2, tiny_llama

CPU = ModelOptions(device="cpu")
QUICK = VerificationOptions(quick=True)
FEW = VerificationOptions(n_prompts=1)
DOWN = "model.layers.2.mlp.down_proj.weight"
Q = "model.layers.3.self_attn.q_proj.weight"


def direction_of(seed: int = 8) -> Direction:
    return make_direction(mean_difference=torch.randn(32, generator=torch.Generator().manual_seed(seed)))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """A llama in several shards, and what orthogonalize makes of it."""
    directory = tmp_path_factory.mktemp("verified")
    base = save_chat_model(directory / "base", tiny_llama(), max_shard_size="40KB")
    orthogonalize_checkpoint(source=base, direction=direction_of(), output=directory / "out")
    return base, directory / "out"


@pytest.fixture
def out(made, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made[1], tmp_path / "out"))


def verify(checkpoint: Path, **options) -> VerificationReport:
    return verify_checkpoint(**{"checkpoint": checkpoint, "options": FEW, "model_options": CPU, **options})


def first_failure(checkpoint: Path, **options) -> str:
    report = verify(checkpoint, **options)
    assert not report.passed
    assert "\n" not in report.failures[0]
    return report.failures[0]


def record_of(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "abliteration.json").read_text())


def change_record(checkpoint: Path, change: Callable[[dict], object]) -> None:
    record = record_of(checkpoint)
    change(record)
    (checkpoint / "abliteration.json").write_text(json.dumps(record))


def vouch_again(checkpoint: Path) -> None:
    """Make the record vouch for the files as they are now, as a forger or a buggy writer would."""

    def rehash(record: dict) -> None:
        for kind in ("shards", "side_files"):
            for name in record[kind]:
                data = (checkpoint / name).read_bytes()
                record[kind][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}

    change_record(checkpoint, rehash)


def shard_of(checkpoint: Path, name: str) -> Path:
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    return checkpoint / index["weight_map"][name]


def change_shard(path: Path, change: Callable[[dict[str, Tensor]], object], **metadata: str) -> None:
    with safe_open(path, framework="pt") as file:
        kept = dict(file.metadata())
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=kept | metadata)


class TestWhatOrthogonalizeWrote:
    @pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
    @pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
    def test_passes_in_every_number_format(self, tmp_path, build, weights, dtype):
        base = save_chat_model(tmp_path / "base", build().to(weights))
        orthogonalize_checkpoint(source=base, direction=direction_of(), output=tmp_path / "out")
        report = verify(tmp_path / "out", model_options=ModelOptions(dtype=dtype, device="cpu"))
        assert report.failures == ()
        assert report.stream.judged
        assert report.logits.judged
        assert report.stream.dtype == ("float32" if dtype == "auto" else dtype)
        for layer in report.stream.layers:
            assert layer.base_max > 0.1
            assert layer.edited_max < layer.base_max / 20
        # The tolerance is a statement about rounding and must stay far from what a missing edit leaves.
        assert report.stream.tolerance < 0.05

    def test_the_report(self, made):
        base, out = made
        report = verify(out, directions=[direction_of()])
        assert (report.base, report.base_revision, report.k, report.direction_given) == (str(base), None, 1, True)
        assert report.passed
        assert [layer.place for layer in report.stream.layers] == [*(f"layer {i}" for i in range(5)), "final norm"]
        assert report.stream.n_prompts == 2
        assert max(layer.edited_max for layer in report.stream.layers) < 1e-6
        assert max(layer.ablated_max for layer in report.stream.layers) < 1e-6
        assert report.logits.last.n_positions == 2
        assert report.logits.all.n_positions == report.stream.n_tokens
        assert report.logits.all.relative < 1e-5
        assert report.logits.all.kl_max < 1e-9
        checks = {check.name: check for check in report.files.tensors}
        assert set(checks) == {tensor["name"] for tensor in record_of(out)["tensors"]}
        assert all(check.survivor < 1e-5 < check.before.share for check in checks.values())
        unedited = sum(t.numel() * 4 for name, t in stored(base).items() if name not in checks)
        assert report.files.bytes_compared == unedited

    def test_quick_runs_no_model(self, made, monkeypatch):
        monkeypatch.setattr("abliterate.release.verification_runs.open_model", None)
        report = verify(made[1], options=QUICK)
        assert report.passed
        assert (report.stream, report.logits) == (None, None)
        assert report.files.against_base

    def test_several_directions(self, made, tmp_path):
        directions = [direction_of(1), direction_of(2)]
        orthogonalize_checkpoint(source=made[0], direction=directions, output=tmp_path / "out")
        report = verify(tmp_path / "out", directions=directions[::-1])
        assert (report.failures, report.k) == ((), 2)
        assert report.logits.judged
        assert "1 directions given do not span the 2" in first_failure(tmp_path / "out", directions=directions[:1])

    def test_without_a_chat_template_prompts_are_run_as_they_are(self, tmp_path):
        model = tiny_llama()
        model.save_pretrained(tmp_path / "base")
        make_tokenizer(template=None).save_pretrained(tmp_path / "base")
        orthogonalize_checkpoint(source=tmp_path / "base", direction=direction_of(), output=tmp_path / "out")
        assert verify(tmp_path / "out").passed


class TestWhatIsPromised:
    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            (EditOptions(strength=0.5), "strength is 0.5"),
            (EditOptions(layers=(1, 3)), "only layers 1 to 2"),
            (EditOptions(components=("attn", "mlp")), "components left out: embed"),
        ],
    )
    def test_a_partial_edit_is_reported_and_not_judged(self, made, tmp_path, options, reason):
        orthogonalize_checkpoint(source=made[0], direction=direction_of(), output=tmp_path / "out", options=options)
        report = verify(tmp_path / "out")
        assert report.passed
        assert not report.stream.judged
        assert not report.logits.judged
        assert reason in report.stream.reasons[0]
        assert max(layer.edited_accumulated for layer in report.stream.layers) > report.stream.tolerance

    def test_a_tied_head_keeps_the_stream_clean_and_not_the_logits(self, tmp_path):
        base = save_chat_model(tmp_path / "base", tiny_llama(tied=True))
        orthogonalize_checkpoint(source=base, direction=direction_of(), output=tmp_path / "out")
        report = verify(tmp_path / "out")
        assert report.passed
        assert report.stream.judged
        assert not report.logits.judged
        assert "tied" in report.logits.reasons[0]
        assert report.logits.all.relative > 100 * report.logits.tolerance

    def test_untied_the_logits_are_those_of_ablation(self, tmp_path):
        base = save_chat_model(tmp_path / "base", tiny_llama(tied=True), max_shard_size="40KB")
        options = EditOptions(tied="untie")
        orthogonalize_checkpoint(source=base, direction=direction_of(), output=tmp_path / "out", options=options)
        report = verify(tmp_path / "out")
        assert report.passed
        assert report.stream.judged
        assert report.logits.judged
        assert report.logits.all.relative < 1e-5
        copy = shard_of(tmp_path / "out", "lm_head.weight")
        change_shard(copy, lambda tensors: tensors["lm_head.weight"].mul_(2))
        vouch_again(tmp_path / "out")
        assert "lm_head.weight is not the copy" in first_failure(tmp_path / "out", options=QUICK)

    def test_skipped_tied_embeddings_leave_the_direction(self, tmp_path):
        base = save_chat_model(tmp_path / "base", tiny_llama(tied=True))
        options = EditOptions(tied="skip")
        orthogonalize_checkpoint(source=base, direction=direction_of(), output=tmp_path / "out", options=options)
        report = verify(tmp_path / "out")
        assert report.passed
        assert not report.stream.judged
        assert "skipped" in report.stream.reasons[0]
        assert report.stream.layers[0].edited_max == pytest.approx(report.stream.layers[0].base_max)

    @pytest.mark.parametrize("strength", [1.0, 0.5])
    def test_preserved_norms(self, made, tmp_path, strength):
        options = EditOptions(preserve_norms=True, strength=strength)
        orthogonalize_checkpoint(source=made[0], direction=direction_of(), output=tmp_path / "out", options=options)
        report = verify(tmp_path / "out")
        assert report.passed
        assert report.stream.judged == (strength == 1.0)
        assert not report.logits.judged
        assert any("norms were preserved" in reason for reason in report.logits.reasons)

    def test_an_addition_is_verified_by_its_bytes(self, made, tmp_path):
        direction = make_direction(mean_difference=direction_of().vector * 3, metadata={"layer": 2})
        options = EditOptions(add=-1.0)
        out = tmp_path / "out"
        orthogonalize_checkpoint(source=made[0], direction=direction, output=out, options=options)
        report = verify(out)
        assert report.passed
        assert not report.stream.judged
        assert report.logits is None
        assert report.stream.layers[1].edited_max == report.stream.layers[1].base_max
        assert report.stream.layers[2].edited_max != report.stream.layers[2].base_max
        name = "model.layers.1.mlp.down_proj.bias"
        change_shard(shard_of(out, name), lambda tensors: tensors[name][3].add_(1.0))
        vouch_again(out)
        assert f"tensor {name} differs from the base's by more" in first_failure(out, options=QUICK)

    def test_a_share_that_is_not_the_one_asked_for(self, made, tmp_path):
        options = EditOptions(strength=0.5)
        orthogonalize_checkpoint(source=made[0], direction=direction_of(), output=tmp_path / "out", options=options)
        change_record(tmp_path / "out", lambda record: record["options"].update(strength=0.4))
        assert "was to be left" in first_failure(tmp_path / "out", options=QUICK)


class TestWhatIsCaught:
    @pytest.mark.parametrize("vouched", [False, True])
    def test_a_flipped_byte_in_an_unedited_tensor(self, out, vouched):
        path = shard_of(out, Q)
        change_shard(path, lambda tensors: tensors[Q].view(torch.uint8)[5].bitwise_xor_(1))
        if vouched:
            vouch_again(out)
        assert f"tensor {Q} differs" in first_failure(out)

    def test_a_flipped_byte_in_an_edited_tensor(self, out):
        path = shard_of(out, DOWN)
        change_shard(path, lambda tensors: tensors[DOWN].view(torch.uint8)[5, 0].bitwise_xor_(1))
        assert path.name in first_failure(out) or DOWN in first_failure(out)

    def test_a_changed_dtype(self, out):
        change_shard(shard_of(out, Q), lambda tensors: tensors.update({Q: tensors[Q].half()}))
        vouch_again(out)
        failure = first_failure(out)
        assert Q in failure or shard_of(out, Q).name in failure

    def test_a_missing_key(self, out):
        change_shard(shard_of(out, Q), lambda tensors: tensors.pop(Q))
        index = json.loads((out / "model.safetensors.index.json").read_text())
        del index["weight_map"][Q]
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
        vouch_again(out)
        failures = verify(out).failures
        assert any(Q in failure for failure in failures)

    def test_a_key_that_the_index_names_and_no_shard_has(self, out):
        change_shard(shard_of(out, Q), lambda tensors: tensors.pop(Q))
        with pytest.raises(CheckpointError, match=Q):
            verify(out)

    @pytest.mark.parametrize("vouched", [False, True])
    def test_an_edit_undone(self, made, out, vouched):
        original = stored(made[0])[DOWN]
        change_shard(shard_of(out, DOWN), lambda tensors: tensors.update({DOWN: original}))
        if vouched:
            vouch_again(out)
        failure = first_failure(out, options=QUICK)
        assert f"tensor {DOWN} has a component of" in failure
        assert "it was not edited" in failure

    def test_a_layer_edited_by_half(self, made, out):
        original = stored(made[0])[DOWN]
        change_shard(shard_of(out, DOWN), lambda tensors: tensors[DOWN][:, 40:].copy_(original[:, 40:]))
        vouch_again(out)
        assert f"tensor {DOWN} has a component of" in first_failure(out)

    def test_an_edit_along_another_direction(self, made, tmp_path):
        orthogonalize_checkpoint(source=made[0], direction=direction_of(9), output=tmp_path / "other")
        change_record(tmp_path / "other", lambda record: record.update(subspace=record_of(made[1])["subspace"]))
        assert "has a component of" in first_failure(tmp_path / "other")

    def test_a_direction_that_is_not_the_recorded_one(self, made):
        assert "do not span" in first_failure(made[1], directions=[direction_of(9)])

    def test_changed_header_metadata(self, out):
        path = shard_of(out, Q)
        change_shard(path, lambda tensors: None, note="changed")
        vouch_again(out)
        failure = first_failure(out)
        assert path.name in failure
        assert "metadata" in failure

    def test_a_tensor_that_was_neither_edited_nor_recorded(self, made, out):
        original = stored(made[0])[DOWN]
        change_shard(shard_of(out, DOWN), lambda tensors: tensors.update({DOWN: original}))
        vouch_again(out)
        change_record(out, lambda record: record.update(tensors=[t for t in record["tensors"] if t["name"] != DOWN]))
        failure = first_failure(out, options=QUICK)
        assert f"tensor {DOWN} is not edited according to" in failure
        # A planner that does not know of it would not see that; the stream does, from the layer on.
        stream, _ = run_only(out, made[0])
        failing = [layer.place for layer in stream.layers if layer.edited_accumulated > stream.tolerance]
        assert failing == ["layer 3", "layer 4", "final norm"]
        assert "residual stream at layer 3" in stream_failures(out, stream)[0]

    def test_an_edit_of_what_is_no_writer(self, made, out):
        name, unit = "lm_head.weight", direction_of().vector
        change_shard(shard_of(out, name), lambda tensors: tensors[name].sub_(torch.outer(tensors[name] @ unit, unit)))
        vouch_again(out)
        entry = {**record_of(out)["tensors"][0], "name": name, "residual_axis": 1, "shard": shard_of(out, name).name}
        change_record(out, lambda record: record["tensors"].append(entry))
        assert f"tensor {name} is projected" in first_failure(out, options=QUICK)
        # The stream is clean all the same; the logits are not what they must be.
        stream, logits = run_only(out, made[0])
        assert stream_failures(out, stream) == []
        assert "its logits differ" in logit_failures(out, logits)[0]

    def test_a_changed_side_file(self, out):
        (out / "tokenizer_config.json").write_text("{}")
        vouch_again(out)
        assert "tokenizer_config.json" in first_failure(out, options=QUICK)

    def test_a_changed_config(self, out):
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
        vouch_again(out)
        assert "config.json" in first_failure(out, options=QUICK)

    def test_a_nan(self, out):
        change_shard(shard_of(out, DOWN), lambda tensors: tensors[DOWN][3].fill_(float("nan")))
        vouch_again(out)
        assert DOWN in first_failure(out)

    def test_what_fails_in_the_files_is_not_run(self, made, out):
        change_shard(shard_of(out, Q), lambda tensors: tensors[Q].zero_())
        report = verify(out)
        assert report.stream is None
        assert "not run" in report.notes[0]


class TestBases:
    def test_one_that_moved(self, made, out, tmp_path):
        change_record(out, lambda record: record["base"].update(model=str(tmp_path / "gone")))
        with pytest.raises(InputError, match=r"which is not there; .* --base"):
            verify(out, options=QUICK)
        assert verify(out, base=made[0], options=QUICK).passed

    def test_another_model_is_not_the_base(self, made, tmp_path):
        other = save_chat_model(tmp_path / "other", tiny_gpt2())
        with pytest.raises(InputError, match="is not the model that was edited"):
            verify(made[1], base=other, options=QUICK)

    def test_the_same_architecture_with_other_weights(self, made, tmp_path):
        other = Path(shutil.copytree(made[0], tmp_path / "other"))
        change_shard(shard_of(other, Q), lambda tensors: tensors[Q].zero_())
        assert f"tensor {Q} differs" in first_failure(made[1], base=other, options=QUICK)

    def test_on_the_hub_at_the_recorded_commit(self, made, monkeypatch, tmp_path):
        with FakeHub() as hub:
            hub.use(monkeypatch, tmp_path)
            files = {file.name: file.read_bytes() for file in made[0].iterdir()}
            repo = hub.add_repo("org/base", files)
            edited = repo.refs["main"]
            orthogonalize_checkpoint(
                source=resolve_model("org/base"), direction=direction_of(), output=tmp_path / "out"
            )
            repo.commit({"config.json": b"{}", "model.safetensors": b"new"}, message="changed since")
            for base in (None, "org/base"):
                report = verify(tmp_path / "out", base=base, options=QUICK)
                assert (report.passed, report.base, report.base_revision) == (True, "org/base", edited)

    def test_a_directory_without_a_record(self, made):
        with pytest.raises(InputError, match=r"no abliteration\.json"):
            verify(made[0])

    def test_another_tokenizer(self, made, out, tmp_path):
        other = Path(shutil.copytree(made[0], tmp_path / "other"))
        for directory in (other, out):
            make_tokenizer(template="{{ messages[0]['content'] }}!").save_pretrained(directory)
        make_tokenizer(template="{{ messages[0]['content'] }}?").save_pretrained(other)
        with pytest.raises(ModelError, match="tokenizer or chat template"):
            run_only(out, other)


def run_only(out: Path, base: Path) -> tuple[StreamCheck, LogitCheck | None]:
    """Run (c) and (d) alone, where the files would fail first."""
    record = read_record(out)
    run = ModelRuns(
        record=record,
        source=resolve_model(str(base)),
        subspace=recorded_subspace(record),
        options=FEW,
        model_options=CPU,
        progress=SILENT,
    )
    return run.measure(QuickCheck(against_base=True, bytes_compared=0, tensors=(), failures=()))[:2]


def test_the_number_of_prompts_is_checked():
    with pytest.raises(InputError, match="at least 1"):
        VerificationOptions(n_prompts=0)


class TestPartialEdits:
    """Of a partial edit the files must be as ever, and what is left in the stream is measured and said."""

    @pytest.fixture(scope="class", params=["inkling_text", "gemma3n_text", "qwen4_exp_text"])
    def partly(self, request, tmp_path_factory) -> Path:
        directory = tmp_path_factory.mktemp("partial")
        model = build_model(request.param, vocab_size=CHAT_VOCABULARY).float()
        base = save_chat_model(directory / "base", model)
        direction = make_direction(mean_difference=torch.randn(64, generator=torch.Generator().manual_seed(8)))
        options = EditOptions(partial=True)
        orthogonalize_checkpoint(source=base, direction=direction, output=directory / "out", options=options)
        return directory / "out"

    def test_what_is_left_is_measured_and_does_not_fail(self, partly):
        report = verify(partly)
        assert report.passed, report.failures
        assert report.verdict == "partial"
        left = report.partial
        assert left is not None
        assert left.reason == record_of(partly)["partial"]["reason"]
        assert list(left.modules) == record_of(partly)["partial"]["modules"]
        assert 1e-4 < left.edited_mean < 0.9 * left.base_mean
        assert left.edited_mean < left.edited_max
        assert report.stream is not None
        assert not report.stream.judged
        assert report.stream.reasons == (f"the edit is partial: {left.reason}",)
        # Hooks leave nothing, in each of several streams.
        assert all(layer.ablated_max < 1e-6 < layer.base_max for layer in report.stream.layers)

    def test_its_files_are_held_as_strictly_as_ever(self, partly, tmp_path):
        assert verify(partly, options=QUICK).verdict == "partial"
        out = Path(shutil.copytree(partly, tmp_path / "out"))
        tensors = load_file(out / "model.safetensors")
        name = next(tensor["name"] for tensor in record_of(out)["tensors"] if tensor["role"] == "mlp")
        tensors[name] += 0.01
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        report = verify(out, options=QUICK)
        assert (report.verdict, report.passed) == ("failed", False)
        assert any(name in failure for failure in report.failures)

    def test_a_record_that_hides_it_does_not_pass(self, partly, tmp_path):
        out = Path(shutil.copytree(partly, tmp_path / "out"))
        record = record_of(out)
        record["options"]["partial"] = False
        (out / "abliteration.json").write_text(json.dumps(record))
        with pytest.raises(CheckpointError, match="--partial edits all that an edit can clean"):
            verify(out, options=QUICK)

    def test_a_record_that_claims_it_of_a_whole_edit_does_not_pass(self, out):
        record = record_of(out)
        record["options"]["partial"] = True
        (out / "abliteration.json").write_text(json.dumps(record))
        assert "the edit is partial according to abliteration.json, and of a model of type llama it is whole" in (
            first_failure(out)
        )
