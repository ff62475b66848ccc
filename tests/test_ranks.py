"""One, two and three processes: the same choice, scores and candidates to rounding."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from abliterate.directions import Direction, load_direction
from abliterate.processes import Ranks
from tests.support.paths import REPOSITORY
from tests.support.refusing_models import refusing_model

EXTRACT = ["--n-train", "9", "--n-val", "5", "--no-filter", "--refusal-token", "I"]
EXTRACT += ["--kl-threshold", "1e9", "--induce-threshold", "-12"]


# Says on stderr that it takes part, so that a launcher that starts one process for three does not pass for three.
COUNTED = """
import os, sys
from abliterate.cli.app import main
print(f"process {os.environ.get('RANK', 0)} of {os.environ.get('WORLD_SIZE', 1)}", file=sys.stderr, flush=True)
main()
"""


def run_several(model: Path, folder: Path, n: int, command: str, *words: str) -> str:
    """Run a command in n processes, and return what they print together."""
    folder.mkdir(exist_ok=True)
    (folder / "counted.py").write_text(COUNTED)
    # `accelerate launch` starts one process where there is no GPU, whatever --num_processes says.
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={n}"] if n > 1 else []
    done = subprocess.run(
        [sys.executable, *launch, str(folder / "counted.py"), "-q", command, str(model), *words],
        env=os.environ | {"PYTHONPATH": "src", "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [done.stderr.count(f"process {index} of {n}") for index in range(n)] == [1] * n
    return done.stdout


def document(*arguments: Any) -> dict[str, Any]:
    """Return the one document of `run_several`."""
    found: dict[str, Any] = json.loads(run_several(*arguments, "--json"))
    return found


def extract(model: Path, output: Path, n: int, *options: str) -> tuple[Direction, str]:
    stdout = run_several(model, output.parent, n, "extract", "-o", str(output), *EXTRACT, *options)
    return load_direction(output), stdout


@pytest.mark.parametrize(
    ("counts", "options"),
    [
        ((2,), ()),
        pytest.param((3,), (), marks=pytest.mark.proof),
        pytest.param((2, 3), ("--exhaustive",), marks=pytest.mark.proof),
        pytest.param((2, 3), ("--stream-layers",), marks=pytest.mark.proof),
    ],
)
def test_several_processes_choose_what_one_chooses(llama_directory: Path, tmp_path: Path, counts, options) -> None:
    one, _ = extract(llama_directory, tmp_path / "1", 1, *options)
    for n in counts:
        several, stdout = extract(llama_directory, tmp_path / str(n), n, "--json", *options)
        assert stdout.count('"direction_file"') == 1
        for name in ("position", "layer", "counts"):
            assert several.metadata[name] == one.metadata[name]
        assert torch.allclose(several.candidates, one.candidates, atol=1e-5)
        assert torch.allclose(several.vector, one.vector, atol=1e-5)
        for name, grid in one.scores.items():
            known = ~(grid.isnan() | several.scores[name].isnan())
            assert known.any()
            assert torch.allclose(several.scores[name][known], grid[known], atol=1e-4)


def test_shares_come_back_in_order() -> None:
    items = list(range(7))
    parts = [items[index::3] for index in range(3)]
    results: list[int] = [0] * 7
    for index in range(3):
        results[index::3] = parts[index]
    assert results == items
    assert Ranks().share(items, lambda part: [2 * item for item in part]) == [0, 2, 4, 6, 8, 10, 12]
    assert Ranks().share([], lambda part: part) == []


def same(one: Any, other: Any) -> bool:
    """Tell whether two documents are the same to rounding."""
    if isinstance(one, float) and isinstance(other, float):
        return one == pytest.approx(other, rel=1e-3, abs=1e-3)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.fixture
def refusing(tmp_path: Path) -> tuple[Path, list[str]]:
    made = refusing_model("plain", tmp_path)
    model = tmp_path / "model"
    made.chat.model.save_pretrained(model)
    made.chat.tokenizer.save_pretrained(model)
    words = []
    for kind in ("harmful", "harmless", "borderline"):
        few = tmp_path / f"few_{kind}.txt"
        few.write_text("\n".join(getattr(made, kind).read_text().splitlines()[:13]))
        words += [f"--{kind}", str(few)]
    return model, words


@pytest.mark.parametrize("counts", [(2,), pytest.param((2, 3), marks=pytest.mark.proof)])
def test_several_processes_measure_what_one_measures(refusing, tmp_path: Path, counts) -> None:
    model, sets = refusing
    more = ["--base", str(model), "--turns", "--max-new-tokens", "8", *sets]
    one = document(model, tmp_path / "1", 1, "evaluate", *more)
    assert one["rates"]["harmful"]["rate"] > 0.9
    for n in counts:
        kept = ["--cache", str(tmp_path / f"kept{n}")]
        for _ in range(2):
            several = document(model, tmp_path / str(n), n, "evaluate", *more, *kept)
            assert same(several, one)
        files = [file.read_text().splitlines() for file in (tmp_path / f"kept{n}").iterdir()]
        assert len(files) == n
        prompts = [json.loads(line)["prompt"] for lines in files for line in lines]
        assert len(prompts) == len(set(prompts)), "a reply was generated twice"


@pytest.mark.proof
@pytest.mark.parametrize("n", [2, 3])
def test_several_processes_audit_as_one_does(refusing, tmp_path: Path, n: int) -> None:
    model, sets = refusing
    few = ["--n-train", "8", "--n-val", "2", "--n-test", "4", "--screen", "3", "--candidates", "2", "--bootstrap", "2"]
    tests = ["--test-harmful", sets[1], "--test-harmless", sets[3]]
    words = [*tests, *few, "--max-new-tokens", "8", "--harmful", str(tmp_path / "harmful.txt")]
    words += ["--harmless", str(tmp_path / "harmless.txt")]
    one = document(model, tmp_path / "1", 1, "audit", *words)
    assert same(document(model, tmp_path / str(n), n, "audit", *words), one)
