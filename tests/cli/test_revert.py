"""`abliterate revert`, and how the other commands take an adapter."""

import hashlib
import json
from pathlib import Path

import pytest

from abliterate.directions import make_direction
from tests.support.tiny_models import random_direction, save_tiny_llama


@pytest.fixture
def base(tmp_path) -> Path:
    make_direction(mean_difference=random_direction()).save(tmp_path / "refusal.safetensors")
    return save_tiny_llama(tmp_path / "base")


@pytest.fixture(params=["checkpoint", "adapter"])
def out(call_main, request, tmp_path, base) -> Path:
    direction = tmp_path / "refusal.safetensors"
    result = call_main(
        "orthogonalize", base, "--direction", direction, "-o", tmp_path / "out", "--format", request.param
    )
    assert result.exit_code == 0, result.stderr
    assert f"written to {tmp_path / 'out'}" in result.stdout
    return tmp_path / "out"


def test_it_restores_and_lists_every_hash(call_main, tmp_path, base, out):
    result = call_main("revert", out, "-o", tmp_path / "restored")
    assert result.exit_code == 0, result.stderr
    for path in base.iterdir():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert digest in result.stdout
        assert hashlib.sha256((tmp_path / "restored" / path.name).read_bytes()).hexdigest() == digest
    assert f"restored to {tmp_path / 'restored'}" in result.stdout


def test_json_and_dry_run(call_main, tmp_path, base, out):
    report = json.loads(call_main("revert", out, "--dry-run", "--json").stdout)
    assert report["dry_run"] is True
    assert report["base"] == str(base)
    assert report["files"] == {}
    assert "nothing was written" in call_main("revert", out, "--dry-run").stdout
    assert not (tmp_path / "restored").exists()


def test_an_output_is_needed(call_main, out):
    result = call_main("revert", out)
    assert result.exit_code == 2
    assert "--output" in result.error_line


def test_a_changed_file_is_named(call_main, tmp_path, base):
    direction = tmp_path / "refusal.safetensors"
    call_main("orthogonalize", base, "--direction", direction, "-o", tmp_path / "out")
    (tmp_path / "out" / "generation_config.json").write_text("{}")
    result = call_main("revert", tmp_path / "out", "-o", tmp_path / "restored")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "generation_config.json" in result.error_line


def test_an_adapter_has_no_workers(call_main, tmp_path, base):
    direction = tmp_path / "refusal.safetensors"
    words = ("orthogonalize", base, "--direction", direction, "-o", tmp_path / "out", "--format", "adapter")
    result = call_main(*words, "--workers", 2)
    assert result.exit_code == 2
    assert "leave them out" in result.error_line


def test_verify_says_that_an_adapter_is_one(call_main, tmp_path, base):
    direction = tmp_path / "refusal.safetensors"
    call_main("orthogonalize", base, "--direction", direction, "-o", tmp_path / "out", "--format", "adapter")
    result = call_main("verify", tmp_path / "out")
    assert result.exit_code == 1
    assert "is an adapter" in result.error_line
    assert "without --format adapter" in result.error_line
    again = call_main("orthogonalize", tmp_path / "out", "--direction", direction, "-o", tmp_path / "twice")
    assert "is an adapter and no model" in again.error_line


def test_an_adapter_is_pushed_with_its_card(call_main, tmp_path, base):
    direction = tmp_path / "refusal.safetensors"
    call_main("orthogonalize", base, "--direction", direction, "-o", tmp_path / "out", "--format", "adapter")
    report = json.loads(call_main("push", tmp_path / "out", "me/adapter", "--dry-run", "--json").stdout)
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
    result = call_main("push", tmp_path / "out", "me/adapter", "--dry-run")
    assert result.exit_code == 1
    assert "adapter_model.safetensors" in result.error_line
