"""Runs that are killed, find the disk full or the source gone, and what `--resume` makes of them."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import abliterate.checkpoints.file_ranges
import abliterate.progress
from abliterate.directions import make_direction
from abliterate.editing.options import EditOptions, WriteOptions
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.errors import AbliterateError, CheckpointError
from tests.support.loaded_models import content, tree
from tests.support.paths import REPOSITORY
from tests.support.tiny_models import random_direction, save_tiny_model

# Each write is slow, so that a kill finds the run in the middle of it.
SLOWLY = """
import sys, time
import abliterate.checkpoints.file_ranges, abliterate.checkpoints.file_assembly
from abliterate.cli.app import main
write, finish = abliterate.checkpoints.file_ranges.write_some, abliterate.checkpoints.file_assembly._Assembly._finish
def slowly(*arguments):
    time.sleep(0.004)
    return write(*arguments)
def finish_slowly(*arguments):
    time.sleep(0.02)
    finish(*arguments)
abliterate.checkpoints.file_ranges.write_some = slowly
abliterate.checkpoints.file_assembly._Assembly._finish = finish_slowly
print("ready", file=sys.stderr, flush=True)
main()
"""


def start(base: Path, direction: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    arguments = ["orthogonalize", str(base), "--direction", str(direction), "-o", str(out), *options]
    return subprocess.Popen(
        [sys.executable, "-c", SLOWLY, *arguments],
        env=os.environ | {"PYTHONPATH": "src", "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_files(out: Path, count: int) -> None:
    journal = out.with_name(f".{out.name}.partial") / ".abliterate" / "journal-0.jsonl"
    for _ in range(6000):
        if journal.exists() and journal.read_bytes().count(b"\n") > count:
            return
        time.sleep(0.01)
    raise AssertionError("the run never got so far")


def test_killed_at_random_moments_and_resumed(sharded, direction_file, undisturbed, tmp_path):
    out, generator = tmp_path / "out", random.Random(0)
    for finished in (0, 2, 4):
        process = start(sharded, direction_file, out, "--resume")
        wait_for_files(out, finished)
        time.sleep(generator.uniform(0, 0.05))
        process.kill()
        process.communicate()
        assert not out.exists()
    process = start(sharded, direction_file, out, "--resume")
    _, messages = process.communicate()
    assert process.returncode == 0, messages
    assert "files are finished and were checked" in " ".join(messages.split())
    assert content(out) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "term")]
)
def test_a_signal_is_one_line_and_its_exit_code(sharded, direction_file, tmp_path, number, code, word):
    before = tree(sharded)
    process = start(sharded, direction_file, tmp_path / "out")
    wait_for_files(tmp_path / "out", 1)
    process.send_signal(number)
    stdout, stderr = process.communicate()
    assert process.returncode == code, stderr
    assert stdout == ""
    (line,) = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert stderr.splitlines()[-1] == line
    assert word in line
    assert "goes on from there with --resume" in line
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    assert tree(sharded) == before


def test_two_runs_to_the_same_target(sharded, direction_file, undisturbed, tmp_path):
    first = start(sharded, direction_file, tmp_path / "out")
    wait_for_files(tmp_path / "out", 1)
    first.send_signal(signal.SIGSTOP)
    second = start(sharded, direction_file, tmp_path / "out", "--resume")
    _, message = second.communicate()
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 1
    assert "another run is writing it" in message
    assert first.communicate()[1] is not None
    assert first.returncode == 0
    assert content(tmp_path / "out") == undisturbed


class Faulty:
    """Stands in for the one function that writes: fails or writes little from some call on."""

    def __init__(self, calls: int, error: int | None) -> None:
        self.calls, self.error = calls, error

    def __call__(self, descriptor: int, data: memoryview, offset: int) -> int:
        self.calls -= 1
        if self.calls >= 0:
            return os.pwrite(descriptor, data, offset)
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))
        return os.pwrite(descriptor, data[: max(1, len(data) // 3)], offset)


@pytest.mark.usefixtures("any_file")
@pytest.mark.parametrize(
    ("calls", "overwrite"),
    [
        (0, False),
        (5, True),
        (11, False),
        *(pytest.param(calls, True, marks=pytest.mark.proof) for calls in (0, 3, 8, 11)),
        *(pytest.param(calls, False, marks=pytest.mark.proof) for calls in (3, 5, 8)),
    ],
)
def test_a_full_disk_and_then_room(sharded, direction_file, undisturbed, tmp_path, monkeypatch, calls, overwrite):
    out = tmp_path / "out"
    if overwrite:
        orthogonalize_checkpoint(
            source=sharded, direction=direction_file, output=out, options=EditOptions(strength=0.5)
        )
        old = tree(out)
    monkeypatch.setattr(abliterate.checkpoints.file_ranges, "write_some", Faulty(calls, errno.ENOSPC))
    with pytest.raises(CheckpointError, match=r"No space left on device; .* was left as it was, and") as raised:
        orthogonalize_checkpoint(source=sharded, direction=direction_file, output=out, overwrite=overwrite)
    assert ("--resume" in str(raised.value)) == (tmp_path / ".out.partial").exists()
    assert (tree(out) == old) if overwrite else not out.exists()
    monkeypatch.undo()
    writing = WriteOptions(resume=True)
    orthogonalize_checkpoint(source=sharded, direction=direction_file, output=out, overwrite=overwrite, writing=writing)
    assert content(out) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("any_file")
def test_short_writes_are_no_fault(sharded, direction_file, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(abliterate.checkpoints.file_ranges, "write_some", Faulty(2, None))
    orthogonalize_checkpoint(source=sharded, direction=direction_file, output=tmp_path / "out")
    assert content(tmp_path / "out") == undisturbed


@pytest.mark.parametrize(("error", "kept"), [(errno.EIO, True), (None, False)])
def test_a_source_that_cannot_be_read_or_is_cut_while_it_is_read(
    sharded, direction_file, tmp_path, monkeypatch, error, kept
):
    read, left = os.preadv, [60]

    def fail(descriptor, buffers, offset, *rest):
        left[0] -= 1
        if left[0] < 0 and os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(sharded)):
            if error is None:
                return 0
            raise OSError(error, os.strerror(error))
        return read(descriptor, buffers, offset, *rest)

    monkeypatch.setattr(os, "preadv", fail)
    message = "Input/output error" if error else "became shorter"
    with pytest.raises(CheckpointError, match=message) as raised:
        orthogonalize_checkpoint(source=sharded, direction=direction_file, output=tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ([".out.partial"] if kept else [])


@pytest.mark.parametrize("changed", ["model", "direction", "set of options"])
def test_what_another_input_has_left_is_not_gone_on_with(sharded, direction_file, tmp_path, monkeypatch, changed):
    source = save_tiny_model(tmp_path / "base", dtype=torch.bfloat16, max_shard_size="8KB")
    # So late that more files have been begun than may wait for the disk: some are finished.
    monkeypatch.setattr(abliterate.checkpoints.file_ranges, "write_some", Faulty(40, errno.ENOSPC))
    with pytest.raises(AbliterateError, match="--resume"):
        orthogonalize_checkpoint(source=source, direction=direction_file, output=tmp_path / "out")
    monkeypatch.undo()
    options, other = EditOptions(), direction_file
    if changed == "model":
        (source / "generation_config.json").write_text("{}")
    elif changed == "direction":
        other = make_direction(mean_difference=random_direction(seed=5))
    else:
        options = EditOptions(strength=0.5)
    heard = []

    class Listening:
        task = staticmethod(abliterate.progress.SILENT.task)
        message = staticmethod(heard.append)

    orthogonalize_checkpoint(
        source=source,
        direction=other,
        output=tmp_path / "out",
        options=options,
        writing=WriteOptions(resume=True),
        progress=Listening(),
    )
    (line,) = [line for line in heard if "is from another" in line]
    assert f"is from another {changed}, so it was removed" in line
    orthogonalize_checkpoint(source=source, direction=other, output=tmp_path / "fresh", options=options)
    assert content(tmp_path / "out") == content(tmp_path / "fresh")
