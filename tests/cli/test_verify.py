"""`abliterate verify`: exit codes, stdout and stderr."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from abliterate.directions import make_direction
from abliterate.editing.options import EditOptions
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from tests.support.command_line import CommandLine, Outcome
from tests.support.conformance import build_model
from tests.support.tiny_models import CHAT_VOCABULARY, save_chat_model, tiny_llama


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path, Path]:
    """A base, what orthogonalize made of it, and the direction file."""
    base, out, file = tmp_path / "base", tmp_path / "out", tmp_path / "refusal.safetensors"
    save_chat_model(base, tiny_llama())
    make_direction(mean_difference=torch.randn(32, generator=torch.Generator().manual_seed(8))).save(file)
    orthogonalize_checkpoint(source=base, direction=file, output=out)
    return base, out, file


@pytest.fixture
def run(call_main: CommandLine) -> Callable[..., Outcome]:
    return functools.partial(call_main, "verify")


def undo(base: Path, out: Path, name: str) -> None:
    tensors = load_file(out / "model.safetensors")
    tensors[name] = load_file(base / "model.safetensors")[name]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def test_tables(run, files):
    base, out, direction = files
    result = run(out, "--direction", direction, "--n-prompts", "1", "--device", "cpu")
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    for words in (
        "layer 0",
        "layer 4",
        "final norm",
        "rounding explains",
        "Equal up to rounding",
        "Verified:",
        str(base),
    ):
        assert words in text
    assert "float32" in text


def test_json_is_exactly_one_document(run, files):
    report = json.loads(run(files[1], "--n-prompts", "1", "--device", "cpu", "--dtype", "float32", "--json").stdout)
    assert report["passed"] is True
    assert report["failures"] == []
    assert len(report["stream"]["layers"]) == 6
    assert {"kl_mean", "kl_max", "largest", "relative", "n_positions"} == report["logits"]["all"].keys()
    assert len(report["files"]["tensors"]) == 11


def test_quick(run, files):
    report = json.loads(run(files[1], "--quick", "--json", "--base", files[0]).stdout)
    assert (report["passed"], report["stream"], report["logits"]) == (True, None, None)


def test_a_failure_is_one_line_and_the_report_is_there(call_main, files):
    base, out, _ = files
    name = "model.layers.3.mlp.down_proj.weight"
    undo(base, out, name)
    done = call_main("-q", "verify", out, "--quick", "--json")
    assert done.exit_code == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"error: {out}: tensor {name} has a component of")
    report = json.loads(done.stdout)
    assert report["passed"] is False
    assert name in report["failures"][0]
    code, table, _ = call_main("verify", out, "--quick")
    assert code == 1
    assert "Verified" not in table
    assert name in table


def test_a_wrong_direction_fails(run, files, tmp_path):
    other = tmp_path / "other.safetensors"
    make_direction(mean_difference=torch.ones(32)).save(other)
    result = run(files[1], "--quick", "--direction", other)
    assert result.exit_code == 1
    assert "do not span" in result.error_line


def test_a_base_that_is_gone(run, files, tmp_path):
    files[0].rename(tmp_path / "moved")
    result = run(files[1], "--quick")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "--base" in result.error_line
    assert run(files[1], "--quick", "--base", tmp_path / "moved").exit_code == 0


@pytest.mark.parametrize("arguments", [[], ["x", "--n-prompts", "0"], ["x", "--dtype", "int3"], ["x", "--no-such"]])
def test_wrong_usage(run, arguments):
    assert run(*arguments).exit_code == 2


def test_a_partial_edit_is_called_one(run, tmp_path):
    base = save_chat_model(tmp_path / "base", build_model("inkling_text", vocab_size=CHAT_VOCABULARY).float())
    direction = make_direction(mean_difference=torch.randn(64, generator=torch.Generator().manual_seed(8)))
    options = EditOptions(partial=True)
    orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out", options=options)
    result = run(tmp_path / "out", "--n-prompts", "1")
    assert result.exit_code == 0, result.stderr
    assert "Not judged: the edit is partial: a convolution of each channel follows the projection" in result.stdout
    assert "Verified as a partial edit: " in result.stdout
    assert "on average (" in result.stdout
    assert "what still writes: model.layers.*.attn_sconv, model.layers.*.mlp_sconv" in result.stdout
    quick = json.loads(run(tmp_path / "out", "--quick", "--json").stdout)
    assert (quick["verdict"], quick["passed"], quick["partial"]["edited_mean"]) == ("partial", True, None)
    assert "was not measured" in run(tmp_path / "out", "--quick").stdout
