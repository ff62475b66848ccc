"""Where a launcher starts several processes for one edit, the first writes it all and the others do nothing."""

import os
import pickle
import subprocess
import sys

import pytest
import torch

from abliterate.editing.options import WriteOptions
from abliterate.processes import by_itself, in_first_process
from tests.support.loaded_models import content
from tests.support.paths import REPOSITORY


@pytest.mark.parametrize("output_format", ["checkpoint", "adapter"])
def test_the_first_of_several_processes_writes_what_one_writes(
    sharded, direction_file, undisturbed, tmp_path, output_format
):
    out = tmp_path / "out"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=3", "-m", "abliterate", "orthogonalize"),
            *(str(sharded), "--direction", str(direction_file), "-o", str(out), "--json", "--format", output_format),
        ],
        env=os.environ | {"PYTHONPATH": "src", "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"bytes_total"') == 1
    if output_format == "checkpoint":
        assert '"processes": 1' in done.stdout
        assert content(out) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("environment", "is_first"),
    [
        ({}, True),
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),
        # Set by something else than a launcher: nobody would write if this one did not.
        ({"RANK": "1"}, True),
    ],
)
def test_a_process_is_the_first_unless_a_launcher_started_several(monkeypatch, environment, is_first):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert in_first_process() is is_first


def test_all_cores_are_used_whatever_a_launcher_says(monkeypatch):
    alone = WriteOptions().n_workers
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert WriteOptions().n_workers == alone


def test_what_is_sent_is_what_is_seen():
    whole = torch.arange(64_000.0).reshape(64, 1000)
    rows = [(row, {"half": row[:500]}, "text") for row in whole]
    sent = pickle.dumps(by_itself(rows))
    assert len(sent) < 3 * whole.nbytes
    assert len(pickle.dumps(rows[:4])) > 4 * whole.nbytes, "a row takes the whole along, else this is in vain"
    for (row, parts, text), (one, some, word) in zip(rows, pickle.loads(sent), strict=True):
        assert torch.equal(row, one)
        assert torch.equal(parts["half"], some["half"])
        assert text == word
