"""One, two and three processes: the same choice, scores and candidates to rounding."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from abliterate.directions import Direction, load_direction
from abliterate.processes import Ranks
from tests.support.paths import REPOSITORY

EXTRACT = ["--n-train", "9", "--n-val", "5", "--no-filter", "--refusal-token", "I"]
EXTRACT += ["--kl-threshold", "1e9", "--induce-threshold", "-12"]


# Says on stderr that it takes part, so that a launcher that starts one process for three does not pass for three.
COUNTED = """
import os, sys
from abliterate.cli.app import main
print(f"process {os.environ.get('RANK', 0)} of {os.environ.get('WORLD_SIZE', 1)}", file=sys.stderr, flush=True)
main()
"""


def extract(model: Path, output: Path, n: int, *options: str) -> tuple[Direction, str]:
    output.parent.joinpath("counted.py").write_text(COUNTED)
    # `accelerate launch` starts one process where there is no GPU, whatever --num_processes says.
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={n}"] if n > 1 else []
    done = subprocess.run(
        [
            *(sys.executable, *launch, str(output.parent / "counted.py"), "-q", "extract", str(model)),
            *("-o", str(output), *EXTRACT, *options),
        ],
        env=os.environ | {"PYTHONPATH": "src", "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [done.stderr.count(f"process {index} of {n}") for index in range(n)] == [1] * n
    return load_direction(output), done.stdout


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
