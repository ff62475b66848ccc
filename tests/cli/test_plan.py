"""`abliterate plan`: exit codes, stdout and stderr."""

import functools
import json
from collections.abc import Callable

import pytest

from tests.support.command_line import CommandLine, Outcome
from tests.support.conformance import build_model
from tests.support.tiny_models import save_tiny_gpt2, save_tiny_llama


@pytest.fixture
def run(call_main: CommandLine) -> Callable[..., Outcome]:
    return functools.partial(call_main, "plan")


def test_a_table_of_writers_and_what_they_need(run, tmp_path):
    result = run(save_tiny_gpt2(tmp_path / "base", tied=True))
    assert result.exit_code == 0
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    row = next(line for line in lines if "transformer.h.*.mlp.c_proj.weight" in line)
    for cell in ("mlp", "0-2", " 3 ", "128 x 32 F32, axis 1"):
        assert cell in row
    text = " ".join(result.stdout.split())
    for words in ("gpt2, 3 layers, d_model 32; licence not known", "tensors to edit in 1 files", "Disk:", "Memory:"):
        assert words in text
    assert "The embeddings are tied" in text


@pytest.mark.parametrize("columns", [None, "80", "60"])
def test_no_name_is_cut_in_a_pipe_or_on_a_narrow_terminal(run, tmp_path, monkeypatch, columns):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    model = build_model("gemma3")
    model.save_pretrained(tmp_path / "base")
    report = json.loads(run(tmp_path / "base", "--json").stdout)
    result = run(tmp_path / "base")
    assert "…" not in result.stdout
    names = {name for group in report["groups"] for name in (group["pattern"], *group["norms"])}
    assert any("post_feedforward_layernorm" in name for name in names)
    # What is folded goes on in the same column of the next line.
    rows = [line.split("│") for line in result.stdout.splitlines() if line.startswith("│")]
    text = "".join("".join(row[3].split()) for row in rows if len(row) == 8)
    for name in names:
        assert name in (text if columns else result.stdout), name


def test_what_options_leave_out_is_named(run, tmp_path):
    result = run(save_tiny_llama(tmp_path / "base"), "--components", "mlp", "--layers", "1:2")
    row = next(line for line in result.stdout.splitlines() if "o_proj" in line)
    assert "leaves out" in row


def test_json_is_one_document_with_every_tensor(run, tmp_path):
    report = json.loads(run(save_tiny_llama(tmp_path / "base"), "--json").stdout)
    assert report["counts"] == {"embed": 1, "attn": 3, "mlp": 3}
    assert [tensor["layer"] for tensor in report["tensors"] if tensor["role"] == "mlp"] == [0, 1, 2]
    assert {"revision", "license", "gated", "left_alone", "disk_bytes", "memory_bytes"} <= report.keys()


def test_errors_reach_the_one_boundary(run, tmp_path):
    base = save_tiny_llama(tmp_path / "base")
    result = run(base, "--layers", "0:9")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "layers 0:9 reaches beyond the 3 layers" in result.error_line
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "xglm"}))
    result = run(base, "--json")
    assert (result.exit_code, json.loads(result.stdout)["error"]) == (1, "UnsupportedArchitectureError")
    assert "model type 'xglm' cannot be orthogonalized" in result.error_line


@pytest.mark.parametrize("arguments", [[], ["x", "--components", "head"], ["x", "--layers", "3:2"], ["x", "--no"]])
def test_wrong_usage(run, arguments):
    assert run(*arguments).exit_code == 2
