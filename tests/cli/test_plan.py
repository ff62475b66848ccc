"""`abliterate plan`: exit codes, stdout and stderr."""

import json

import pytest
import typer
from typer.testing import CliRunner, Result

from abliterate.cli.plan import plan
from abliterate.errors import AbliterateError, InputError, UnsupportedArchitectureError
from tests.support.tiny_models import save_tiny_gpt2, save_tiny_llama

app = typer.Typer()
app.command()(plan)


def run(*arguments: object, fails: type[AbliterateError] | None = None) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    if fails is not None:
        assert isinstance(result.exception, fails)
    elif result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_table_of_writers_and_what_they_need(tmp_path):
    result = run(save_tiny_gpt2(tmp_path / "base", tied=True))
    assert result.exit_code == 0
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    row = next(line for line in lines if "transformer.h.*.mlp.c_proj.weight" in line)
    for cell in ("mlp", "0-2", " 3 ", "128 x 32", "F32", " 1 "):
        assert cell in row
    text = " ".join(result.stdout.split())
    for words in ("gpt2, 3 layers, d_model 32; licence not known", "tensors to edit in 1 files", "Disk:", "Memory:"):
        assert words in text
    assert "The embeddings are tied" in text


def test_what_options_leave_out_is_named(tmp_path):
    result = run(save_tiny_llama(tmp_path / "base"), "--components", "mlp", "--layers", "1:2")
    row = next(line for line in result.stdout.splitlines() if "o_proj" in line)
    assert "leaves out" in row


def test_json_is_one_document_with_every_tensor(tmp_path):
    report = json.loads(run(save_tiny_llama(tmp_path / "base"), "--json").stdout)
    assert report["counts"] == {"embed": 1, "attn": 3, "mlp": 3}
    assert [tensor["layer"] for tensor in report["tensors"] if tensor["role"] == "mlp"] == [0, 1, 2]
    assert {"revision", "license", "gated", "left_alone", "disk_bytes", "memory_bytes"} <= report.keys()


def test_errors_reach_the_one_boundary(tmp_path):
    base = save_tiny_llama(tmp_path / "base")
    run(base, "--layers", "0:9", fails=InputError)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "xglm"}))
    assert run(base, "--json", fails=UnsupportedArchitectureError).stdout == ""


@pytest.mark.parametrize("arguments", [[], ["x", "--components", "head"], ["x", "--layers", "3:2"], ["x", "--no"]])
def test_wrong_usage(arguments):
    assert run(*arguments).exit_code == 2
