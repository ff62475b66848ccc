"""How long `abliterate --help` and `plan` take, beside a bare interpreter and beside importing torch, in one run.

    python -m benchmarks.startup [RUNS]

The plan is of a small checkpoint (135 tensors). Prints medians of whole processes, run in turn: their time and the CPU
that they took, which other work on the machine changes less; and the ratios of the time.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support.sparse_checkpoints import make_sparse_checkpoint, moe_config


def commands(checkpoint: Path) -> dict[str, list[str]]:
    """Return what is timed."""
    return {
        "python -c pass": [sys.executable, "-c", "pass"],
        "abliterate --help": [sys.executable, "-m", "abliterate", "--help"],
        "abliterate plan": [sys.executable, "-m", "abliterate", "plan", str(checkpoint)],
        "python -c 'import torch'": [sys.executable, "-c", "import torch"],
    }


def timed(command: list[str]) -> tuple[float, float]:
    """Run a command; return its time, and the CPU that it took."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} failed with {process.returncode}")
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime


def main(runs: int) -> None:
    """Time the commands in turn and print a table."""
    with tempfile.TemporaryDirectory(prefix="abliterate-startup-") as directory:
        checkpoint = Path(directory) / "base"
        config = moe_config(hidden=32, layers=4, experts=8, intermediate=16, heads=4, vocabulary=64)
        make_sparse_checkpoint(checkpoint, config, shard_bytes=1 << 20)
        timed_commands = commands(checkpoint)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in timed_commands}
        for _ in range(runs + 1):  # the first round warms the file cache and is not counted
            for name, command in timed_commands.items():
                found[name].append(timed(command))
    medians = {name: [statistics.median(each) for each in zip(*runs[1:], strict=True)] for name, runs in found.items()}
    bare = medians["python -c pass"][0]
    for name, (seconds, cpu) in medians.items():
        print(f"{name:<26} {seconds:6.3f} s   {cpu:6.3f} s of CPU   {seconds / bare:6.1f} x the bare interpreter")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
