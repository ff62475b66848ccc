import hashlib
import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from abliterate.cli.orthogonalize import orthogonalize
from abliterate.cli.push import push
from abliterate.cli.revert import revert
from abliterate.cli.verify import verify
from abliterate.directions import make_direction
from abliterate.errors import InputError, VerificationError
from tests.support.tiny_models import random_direction, save_tiny_llama

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
for command in (orthogonalize, revert, verify, push):
    app.command()(command)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture
def base(tmp_path) -> Path:
    make_direction(mean_difference=random_direction()).save(tmp_path / "refusal.safetensors")
    return save_tiny_llama(tmp_path / "base")


@pytest.fixture(params=["checkpoint", "adapter"])
def out(request, tmp_path, base) -> Path:
    direction = tmp_path / "refusal.safetensors"
    result = run("orthogonalize", base, "--direction", direction, "-o", tmp_path / "out", "--format", request.param)
    assert result.exit_code == 0, result.output
    assert f"written to {tmp_path / 'out'}" in result.stdout
    return tmp_path / "out"


def test_it_restores_and_lists_every_hash(tmp_path, base, out):
    result = run("revert", out, "-o", tmp_path / "restored")
    assert result.exit_code == 0, result.output
    for path in base.iterdir():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert digest in result.stdout
        assert hashlib.sha256((tmp_path / "restored" / path.name).read_bytes()).hexdigest() == digest
    assert f"restored to {tmp_path / 'restored'}" in result.stdout


def test_json_and_dry_run(tmp_path, base, out):
    report = json.loads(run("revert", out, "--dry-run", "--json").stdout)
    assert report["dry_run"] is True
    assert report["base"] == str(base)
    assert report["files"] == {}
    assert "nothing was written" in run("revert", out, "--dry-run").stdout
    assert not (tmp_path / "restored").exists()


def test_an_output_is_needed(out):
    result = run("revert", out)
    assert result.exit_code == 2
    assert "--output" in result.output


def test_a_changed_file_is_named(tmp_path, base):
    direction = tmp_path / "refusal.safetensors"
    run("orthogonalize", base, "--direction", direction, "-o", tmp_path / "out")
    (tmp_path / "out" / "generation_config.json").write_text("{}")
    result = run("revert", tmp_path / "out", "-o", tmp_path / "restored")
    assert isinstance(result.exception, VerificationError)
    assert "generation_config.json" in str(result.exception)
    assert result.exception.exit_code == 1


def test_an_adapter_has_no_workers(tmp_path, base):
    direction = tmp_path / "refusal.safetensors"
    words = ("orthogonalize", base, "--direction", direction, "-o", tmp_path / "out", "--format", "adapter")
    result = run(*words, "--workers", 2)
    assert result.exit_code == 2
    assert "leave them out" in result.output


def test_verify_says_that_an_adapter_is_one(tmp_path, base):
    direction = tmp_path / "refusal.safetensors"
    run("orthogonalize", base, "--direction", direction, "-o", tmp_path / "out", "--format", "adapter")
    result = run("verify", tmp_path / "out")
    assert isinstance(result.exception, InputError)
    assert "is an adapter" in str(result.exception)
    assert "without --format adapter" in str(result.exception)
    again = run("orthogonalize", tmp_path / "out", "--direction", direction, "-o", tmp_path / "twice")
    assert "is an adapter and no model" in str(again.exception)


def test_an_adapter_is_pushed_with_its_card(tmp_path, base):
    direction = tmp_path / "refusal.safetensors"
    run("orthogonalize", base, "--direction", direction, "-o", tmp_path / "out", "--format", "adapter")
    report = json.loads(run("push", tmp_path / "out", "me/adapter", "--dry-run", "--json").stdout)
    assert [file["path"] for file in report["files"]] == [
        "README.md",
        "abliteration.json",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert report["left_out"] == []
    assert 'PeftModel.from_pretrained(base, "adapter").merge_and_unload()' in report["card"]
    weights = tmp_path / "out" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00\x01"[:1])
    result = run("push", tmp_path / "out", "me/adapter", "--dry-run")
    assert isinstance(result.exception, VerificationError)
