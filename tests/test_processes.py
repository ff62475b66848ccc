"""One, two and three processes write the same bytes, and one that is killed can be made up for."""

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.errors import InputError
from abliterate.processes import Ranks, share_by_size
from tests.support.loaded_models import content
from tests.support.paths import REPOSITORY

# Process 1 kills itself when it has finished so many files.
DYING = """
import os, signal
import abliterate.checkpoints.resumable_directory
from abliterate.cli.app import main
add = abliterate.checkpoints.resumable_directory.Journal.add
def add_and_die(self, name, entry):
    add(self, name, entry)
    if os.environ.get("RANK") == "1" and self.n_entries == 2:
        os.kill(os.getpid(), signal.SIGKILL)
abliterate.checkpoints.resumable_directory.Journal.add = add_and_die
main()
"""


def launch(n: int, program: list[str], *options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={n}", *program]
    return subprocess.run(
        [*command, "orthogonalize", *map(str, options)],
        env=os.environ | {"PYTHONPATH": "src", "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.proof)])
def test_several_processes_write_the_bytes_of_one(sharded, direction_file, undisturbed, tmp_path, n):
    out = tmp_path / "out"
    done = launch(n, ["-m", "abliterate"], sharded, "--direction", direction_file, "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"bytes_total"') == 1
    assert f'"processes": {n}' in done.stdout
    assert content(out) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_process_that_is_killed_fails_all_and_the_work_goes_on_later(sharded, direction_file, undisturbed, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "dying.py").write_text(DYING)
    died = launch(2, [str(tmp_path / "dying.py")], sharded, "--direction", direction_file, "-o", out)
    assert died.returncode != 0
    assert not out.exists()
    journals = sorted((tmp_path / ".out.partial" / ".abliterate").glob("journal-*.jsonl"))
    assert [path.read_text().count("\n") > 2 for path in journals] == [True, True]
    done = launch(2, ["-m", "abliterate"], sharded, "--direction", direction_file, "-o", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert "files are finished and were checked" in done.stderr
    assert content(out) == undisturbed
    assert {path.name for path in tmp_path.iterdir()} == {"out", "dying.py"}


def two(theirs) -> Ranks:
    """The first of two processes, of which the other did what it is told here."""

    def exchange(values):
        (value,) = values
        if not hasattr(value, "finished"):
            return [value, {}]
        if isinstance(theirs, RuntimeError):
            raise theirs
        return [value, type(value)(finished={}, traffic=type(value.traffic)(), **theirs)]

    return Ranks(count=2, exchange=exchange)


@pytest.mark.parametrize(
    ("theirs", "message", "is_kept"),
    [
        ({"error": "disk full"}, "disk full; .*--resume", True),
        ({"error": "NaN", "is_worth_keeping": False}, "NaN", False),
        (
            RuntimeError("connection closed"),
            "another process of this run ended before its part was done.*--resume",
            True,
        ),
    ],
)
def test_the_failure_of_another_process_is_ours(sharded, direction_file, tmp_path, theirs, message, is_kept):
    with pytest.raises(Exception, match=message):
        orthogonalize_checkpoint(source=sharded, direction=direction_file, output=tmp_path / "out", ranks=two(theirs))
    assert [path.name for path in tmp_path.iterdir()] == ([".out.partial"] if is_kept else [])


def test_what_stops_the_first_process_stops_the_others(sharded, direction_file, tmp_path):
    second = Ranks(index=1, count=2, exchange=lambda values: [InputError("another run is writing it"), *values])
    with pytest.raises(InputError, match="another run"):
        orthogonalize_checkpoint(source=sharded, direction=direction_file, output=tmp_path / "out", ranks=second)
    assert list(tmp_path.iterdir()) == []


@given(st.dictionaries(st.text(min_size=1), st.integers(0, 1000)), st.integers(1, 5))
def test_shares_are_disjoint_complete_and_even(sizes, count):
    shares = [share_by_size(sizes, index=index, count=count) for index in range(count)]
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)
