"""The main job on the real demo model, through the command line, as a shell script runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.paths import REPOSITORY

pytestmark = pytest.mark.demo
BIN = Path(sys.executable).parent


def shell(script: str, directory: Path) -> str:
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=directory, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_extract_orthogonalize_evaluate_push(demo_directory: Path, tmp_path: Path) -> None:
    extracted = json.loads(
        shell(
            f"abliterate extract {demo_directory} -o refusal.safetensors --n-train 24 --n-val 6 --json"
            " --kl-threshold 0.3 | python -m json.tool",
            tmp_path,
        )
    )
    assert extracted["selected"]["bypass"] < 0 < extracted["selected"]["induce"]
    assert extracted["baseline"]["harmful"] > 0 > extracted["baseline"]["harmless"]
    record = json.loads(
        shell(
            f"abliterate orthogonalize {demo_directory} --direction refusal.safetensors -o out --json"
            " | python -m json.tool",
            tmp_path,
        )
    )
    assert record["counts"] == {"embed": 1, "attn": 30, "mlp": 30}
    assert max(tensor["component_after"] for tensor in record["tensors"]) < 1e-6
    prompts = REPOSITORY / "prompts"
    for kind in ("harmful", "harmless"):
        lines = (prompts / kind / "test.jsonl").read_text().splitlines()[::12]
        (tmp_path / f"{kind}.jsonl").write_text("\n".join(lines))
    (tmp_path / "plain.txt").write_text("The river rises in the hills.\nIt reaches the sea after a week.\n")
    evaluation = json.loads(
        shell(
            f"abliterate evaluate out --base {demo_directory} --harmful harmful.jsonl --harmless harmless.jsonl"
            " --borderline harmless.jsonl --text plain.txt --max-new-tokens 16 -o out/evaluation.json"
            " --json | python -m json.tool",
            tmp_path,
        )
    )
    assert evaluation["base_rates"]["harmful"]["rate"] >= 0.8
    assert evaluation["rates"]["harmful"]["rate"] <= 0.3
    assert evaluation["base_rates"]["harmless"]["rate"] <= 0.1
    assert 0 < evaluation["cross_entropy"]["relative_change"] < 0.6
    verified = json.loads(shell("abliterate verify out --n-prompts 1 --json | python -m json.tool", tmp_path))
    assert verified["passed"] is True
    pushed = json.loads(
        shell("abliterate push out someone/demo-abliterated --dry-run --json | python -m json.tool", tmp_path)
    )
    assert pushed["dry_run"] is True


@pytest.mark.proof
def test_streamed_layers_choose_what_the_model_in_memory_chooses(demo_directory: Path, tmp_path: Path) -> None:
    # Few prompts and layers: when streamed, each candidate runs through all blocks, without a shared prefix.
    options = "--n-train 16 --n-val 3 --no-filter --refusal-token I --prune-layers 0.8"
    options += " --kl-threshold 1e9 --induce-threshold -1e9"
    whole, streamed = (
        json.loads(
            shell(f"abliterate extract {demo_directory} -o {name} {options} --exhaustive --json {way}", tmp_path)
        )
        for name, way in (("whole.safetensors", ""), ("streamed.safetensors", "--stream-layers"))
    )
    assert {key: whole["selected"][key] for key in ("position", "layer")} == {
        key: streamed["selected"][key] for key in ("position", "layer")
    }
    for one, other in zip(whole["scores"], streamed["scores"], strict=True):
        for score in ("bypass", "induce", "kl"):
            assert (one[score] is None) == (other[score] is None)
            assert one[score] is None or abs(one[score] - other[score]) < 1e-3
