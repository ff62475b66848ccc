"""`abliterate orthogonalize`: exit codes, stdout and stderr."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from abliterate.directions import make_direction
from tests.support.command_line import CommandLine, Outcome
from tests.support.tiny_models import random_direction, save_tiny_llama


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path, Path]:
    """A model, a direction file, and a directory yet to be made."""
    make_direction(mean_difference=random_direction()).save(tmp_path / "refusal.safetensors")
    return save_tiny_llama(tmp_path / "base"), tmp_path / "refusal.safetensors", tmp_path / "out"


@pytest.fixture
def run(call_main: CommandLine) -> Callable[..., Outcome]:
    return functools.partial(call_main, "orthogonalize")


def test_it_writes_a_checkpoint_and_a_summary(run, files):
    model, direction, out = files
    result = run(model, "--direction", direction, "-o", out)
    assert result.exit_code == 0, result.stderr
    assert (out / "abliteration.json").is_file()
    lines = result.stdout.splitlines()
    for role, count, shape in (("embed", 1, "61 x 32"), ("attn", 3, "32 x 32"), ("mlp", 3, "32 x 80")):
        row = next(line for line in lines if role in line)
        assert str(count) in row
        assert shape in row
        assert "F32" in row
        assert "e-08" in row or "e-09" in row
    assert f"written to {out}" in " ".join(result.stdout.split())
    assert "shared with the base" in lines[-1]


def test_json_is_exactly_one_document_on_stdout(run, files):
    model, direction, out = files
    result = run(model, "--direction", direction, "-o", out, "--json")
    report = json.loads(result.stdout)
    assert report["work"]["workers"] >= 1
    assert report["work"]["bytes_shared"] + report["work"]["bytes_written"] >= report["bytes_total"]
    record = json.loads((out / "abliteration.json").read_text())
    assert report["output"] == str(out)
    assert report["counts"] == {"embed": 1, "attn": 3, "mlp": 3}
    assert {key: report[key] for key in record} == record


def test_a_dry_run_needs_no_output_and_writes_nothing(run, files):
    model, direction, out = files
    result = run(model, "--direction", direction, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "nothing was written" in result.stdout
    assert not out.exists()
    report = json.loads(run(model, "--direction", direction, "-o", out, "--dry-run", "--json").stdout)
    assert report["dry_run"] is True
    assert report["tensors"][0]["component_before"] is None
    assert not out.exists()


def test_options_reach_the_edit(run, files):
    model, direction, out = files
    options = ["--components", "mlp,attn", "--layers", "1:3", "--strength", "0.5", "--json"]
    report = json.loads(run(model, "--direction", direction, "-o", out, *options).stdout)
    assert report["options"] == {
        "components": ["attn", "mlp"],
        "layers": [1, 3],
        "strength": 0.5,
        "strengths": None,
        "tied": "edit",
        "preserve_norms": False,
        "add": None,
        "quantized": "refuse",
        "unverified": False,
        "partial": False,
    }
    assert {tensor["layer"] for tensor in report["tensors"]} == {1, 2}


def test_no_number_is_cut_off_in_a_terminal_of_80_columns(run, files):
    model, direction, out = files
    result = run(model, "--direction", direction, "-o", out, columns=80)
    assert result.exit_code == 0, result.stderr
    assert "projected" in result.stdout
    assert "…" not in result.stdout


def test_several_directions_untied_with_lengths_kept(run, files, tmp_path):
    _, direction, out = files
    model = save_tiny_llama(tmp_path / "tied", tied=True)
    make_direction(mean_difference=random_direction(seed=9)).save(tmp_path / "second.safetensors")
    options = ["--direction", tmp_path / "second.safetensors", "--tied", "untie", "--preserve-norms"]
    result = run(model, "--direction", direction, "-o", out, *options)
    assert result.exit_code == 0, result.stderr
    assert "untied" in result.stdout
    assert "survivor" in result.stdout
    assert "no longer" in result.stderr
    record = json.loads((out / "abliteration.json").read_text())
    assert record["subspace"]["k"] == 2
    assert record["options"]["tied"] == "untie"
    assert record["options"]["preserve_norms"] is True


def test_an_addition(run, files, tmp_path):
    model, _, out = files
    direction = tmp_path / "layer-1.safetensors"
    make_direction(mean_difference=random_direction(), metadata={"layer": 1}).save(direction)
    result = run(model, "--direction", direction, "-o", out, "--add", "-1.5")
    assert result.exit_code == 0, result.stderr
    assert "added" in result.stdout
    assert "mlp_bias is switched on" in result.stderr
    assert json.loads((out / "abliteration.json").read_text())["options"]["add"] == -1.5


def test_a_note_about_the_checkpoint_goes_to_stderr(run, files):
    model, direction, out = files
    (model / "consolidated.safetensors").write_bytes(b"x")
    result = run(model, "--direction", direction, "-o", out, "--json")
    assert "consolidated.safetensors" in result.stderr
    json.loads(result.stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--components", "embed,head"], "'head' is not among embed, attn, mlp"),
        (["--components", ""], "'' is not among"),
        (["--layers", "3"], "'3' is not a range A:B"),
        (["--layers", "5:5"], "'5:5' is not a range A:B"),
        (["--layers", "a:b"], "'a:b' is not a range A:B"),
        (["--layers", "-2:5"], "'-2:5' is not a range A:B"),
        (["--layers", "²:5"], "is not a range A:B"),
        (["--strength", "0"], "must be a positive number"),
        (["--strength", "nan"], "must be a positive number"),
        (["--strength", "much"], "'--strength'"),
        (["--frobnicate"], "No such option"),
        (["--tied", "cut"], "'cut' is not one of"),
        (["--add", "0"], "must be a number other than 0"),
        (["--add", "nan"], "must be a number other than 0"),
        (["--add", "1", "--strength", "0.5"], "projects nothing"),
        (["--add", "1", "--layers", "0:1"], "projects nothing"),
        (["--add", "1", "--tied", "untie"], "projects nothing"),
        (["--add", "1", "--preserve-norms"], "projects nothing"),
        (["--add", "1", "--direction", "second.safetensors"], "takes one --direction"),
    ],
)
def test_wrong_usage_exits_2_and_writes_nothing(run, files, arguments, message):
    model, direction, out = files
    result = run(model, "--direction", direction, "-o", out, *arguments)
    assert result.exit_code == 2
    assert message in result.error_line
    assert result.stdout == ""
    assert not out.exists()


def test_without_an_output_or_a_direction_it_exits_2(run, files):
    model, direction, _ = files
    for arguments, message in (
        ([model, "--direction", direction], "unless --dry-run"),
        ([model, "-o", "x"], "--direction"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert message in result.stderr


def test_known_errors_reach_the_boundary_with_their_message(run, files):
    model, direction, out = files

    out.mkdir()
    cases: list[tuple[list[object], str]] = [
        ([model, "--direction", direction, "-o", out], "--overwrite"),
        ([model, "--direction", model / "none", "-o", out, "--overwrite"], "no such file"),
        ([model / "none", "--direction", direction, "-o", out], "none"),
    ]
    for arguments, message in cases:
        result = run(*arguments)
        assert (result.exit_code, result.stdout) == (1, "")
        assert message in result.error_line
    (model / "config.json").write_text('{"model_type": "doge"}')
    result = run(model, "--direction", direction, "-o", out, "--overwrite")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "model type 'doge' cannot be orthogonalized" in result.error_line
    assert list(out.iterdir()) == []


def test_help_describes_the_options(run):
    result = run("--help")
    assert result.exit_code == 0
    for option in (
        "--direction",
        "--output",
        "--components",
        "--layers",
        "--strength",
        "--dry-run",
        "--overwrite",
        "--tied",
        "--preserve-norms",
        "--add",
    ):
        assert option in result.stdout
