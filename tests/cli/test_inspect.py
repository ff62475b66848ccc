"""`abliterate inspect`, and GGUF files on the command line: exit codes, stdout and stderr."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from abliterate.directions import load_direction, make_direction
from tests.support.command_line import CommandLine
from tests.support.gguf_models import tiny, write
from tests.support.tiny_models import random_direction, save_tiny_llama


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "base").mkdir()
    return write(tmp_path / "base", tiny(hidden_size=64, num_hidden_layers=2, head_dim=16))


@pytest.fixture
def direction(tmp_path) -> Path:
    path = tmp_path / "r.safetensors"
    make_direction(mean_difference=random_direction(64)).save(path)
    return path


def test_a_file_is_planned_edited_inspected_verified_and_restored(call_main: CommandLine, tmp_path, file, direction):
    out = tmp_path / "out"
    planned = call_main("plan", file, "--json")
    assert planned.exit_code == 0
    assert {group["dtype"] for group in json.loads(planned.stdout)["groups"]} == {"F32"}
    assert call_main("orthogonalize", file, "--direction", direction, "--dry-run").exit_code == 0
    assert not out.exists()
    assert call_main("orthogonalize", file, "--direction", direction, "-o", out).exit_code == 0
    assert sorted(path.name for path in out.iterdir()) == ["abliteration.json", "model.gguf"]
    seen = call_main("inspect", out, "--direction", direction, "--base", file)
    assert seen.exit_code == 0
    assert f"Of what {file} has of the direction, 0.00% is in it, over all tensors" in seen.stdout
    assert "share of the base's" in seen.stdout
    assert call_main("verify", out, "--quick").exit_code == 0
    assert call_main("revert", out, "-o", tmp_path / "back").exit_code == 0
    assert (tmp_path / "back" / "model.gguf").read_bytes() == file.read_bytes()
    assert call_main("orthogonalize", file, "--direction", direction, "-o", out, "--overwrite").exit_code == 0


def test_json_is_one_document_and_a_base_is_not_needed(call_main, tmp_path, direction):
    model = save_tiny_llama(tmp_path / "m", hidden_size=64)
    report = json.loads(call_main("inspect", model, "--direction", direction, "--json").stdout)
    assert report["schema"] == "abliterate.inspect/1"
    assert report["left"] is None
    assert len(report["tensors"]) == sum(role["tensors"] for role in report["roles"])
    assert "share" not in call_main("inspect", model, "--direction", direction).stdout


@pytest.mark.parametrize(("arguments", "code", "said"), [
    (["inspect", "{file}", "-o", "r.safetensors"], 1, "name that base with --base"),
    (["inspect", "{file}", "--fail-if", "kl>1"], 1, "'kl' is not among verdict, exact"),
    (["inspect", "{file}", "--fail-if", "verdict=directional"], 1, "such as verdict!=identical"),
    (["inspect", "{file}.txt", "--direction", "{direction}"], 1, "no such directory"),
    (["inspect", "{file}", "--direction", "{file}"], 1, "model.gguf"),
    (["orthogonalize", "{file}", "--direction", "{direction}", "-o", "x.gguf"], 1, "-o names a directory"),
    (["orthogonalize", "{file}", "--direction", "{direction}", "-o", "o", "--quantized", "dequantize"], 1, "convert"),
    (["orthogonalize", "{file}", "--direction", "{direction}", "-o", "o", "--format", "adapter"], 1, "GGUF file"),
    (["verify", "{file}"], 1, "abliteration.json"),
])  # fmt: skip
def test_what_cannot_be_done_is_one_line(call_main, tmp_path, monkeypatch, file, direction, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    result = call_main(*(word.format(file=file, direction=direction) for word in arguments))
    assert result.exit_code == code
    assert said in result.error_line
    assert result.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_a_pair_is_judged_the_direction_written_and_a_gate_obeyed(call_main, tmp_path, file, direction):
    out, recovered, page = tmp_path / "out", tmp_path / "again.safetensors", tmp_path / "page"
    assert call_main("orthogonalize", file, "--direction", direction, "-o", out).exit_code == 0
    seen = call_main("inspect", out, "--base", file, "-o", recovered, "--report", page)
    assert seen.exit_code == 0
    assert "verdict: directional (exact): a direction was projected out of" in seen.stdout
    assert "abliteration.json says: base" in seen.stdout
    assert sorted(path.name for path in page.iterdir()) == ["index.html", "inspection.json"]
    assert abs(float(load_direction(recovered).vector.double() @ random_direction(64))) > 0.9999
    gated = call_main("inspect", out, "--base", file, "--fail-if", "verdict!=identical", "--json")
    assert gated.exit_code == 1
    report = json.loads(gated.stdout)
    assert (report["verdict"], report["gates"][0]["failed"]) == ("directional", True)
    assert "verdict!=identical: it is directional" in gated.error_line
    passes = ("--fail-if", "tensors_edited>0", "--fail-if", "record_problems>0")
    assert call_main("inspect", file, "--base", file, *passes).exit_code == 0
    # Without a base there is no verdict, so that a gate on it fails.
    assert call_main("inspect", out, "--fail-if", "verdict!=identical").exit_code == 1
    assert call_main("inspect", out, "--base", recovered).exit_code == 1


def test_directions_of_layers_have_files_of_their_own(call_main, tmp_path):
    base = save_tiny_llama(tmp_path / "base", hidden_size=64)
    vectors = [random_direction(64, seed=layer) for layer in range(2)]
    shutil.copytree(base, tmp_path / "out")
    weights = load_file(base / "model.safetensors")
    for name, weight in weights.items():
        layer = re.search(r"layers\.([01])\..*(o_proj|down_proj)\.weight", name)
        if layer:
            vector = vectors[int(layer[1])].to(weight.dtype)
            weights[name] = (weight - torch.outer(vector, vector @ weight)).contiguous()
    save_file(weights, tmp_path / "out" / "model.safetensors")
    done = call_main("inspect", tmp_path / "out", "--base", base, "-o", tmp_path / "own.safetensors")
    assert done.exit_code == 0
    files = [tmp_path / f"own.layer{layer}.safetensors" for layer in range(2)]
    assert "Written to" in done.stdout
    assert sorted(tmp_path.glob("own*")) == files
    for file, vector in zip(files, vectors, strict=True):
        assert abs(float(load_direction(file).vector.double() @ vector)) > 0.999


def test_where_no_direction_can_be_written_the_report_is_not_lost(call_main, tmp_path):
    base = save_tiny_llama(tmp_path / "base")
    (tmp_path / "second.1.safetensors").write_text("mine")
    done = call_main("inspect", base, "--base", base, "-o", tmp_path / "r.safetensors", "--json")
    assert (done.exit_code, json.loads(done.stdout)["verdict"]) == (1, "identical")
    assert "no direction was recovered: the verdict is identical" in done.error_line
    assert not (tmp_path / "r.safetensors").exists()
    for number in (1, 2):
        make_direction(mean_difference=random_direction(seed=number)).save(tmp_path / f"{number}.safetensors")
    given = ["--direction", tmp_path / "1.safetensors", "--direction", tmp_path / "2.safetensors"]
    assert call_main("orthogonalize", base, *given, "-o", tmp_path / "out").exit_code == 0
    done = call_main("inspect", tmp_path / "out", "--base", base, "-o", tmp_path / "second.safetensors", "--json")
    assert (done.exit_code, json.loads(done.stdout)["verdict"]) == (1, "directional")
    assert "second.1.safetensors: exists and is no direction file" in done.error_line
    assert (tmp_path / "second.1.safetensors").read_text() == "mine"
    assert not (tmp_path / "second.2.safetensors").exists()
