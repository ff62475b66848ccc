"""How long `abliterate --help` takes, beside a bare interpreter and beside importing torch, in one run.

    python benchmarks/startup.py [RUNS]

Prints medians of whole processes, run in turn, and their ratios.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "abliterate --help": [str(Path(sys.executable).parent / "abliterate"), "--help"],
    "python -c 'import torch'": [sys.executable, "-c", "import torch"],
}


def main(runs: int) -> None:
    """Time the commands in turn and print a table."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(runs + 1):  # the first round warms the file cache and is not counted
        for name, command in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    bare = medians["python -c pass"]
    for name, median in medians.items():
        print(f"{name:<26} {median:6.3f} s   {median / bare:6.1f} x the bare interpreter")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
