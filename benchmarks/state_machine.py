"""The state machines of the tests, at length: what writes directories and small files, under faults at random moments.

    python -m benchmarks.state_machine [--steps 10000] [--seed 0] [--directory /dev/shm]

It stops at the first finding, which it prints as the steps that lead to it, and exits with 1.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from tests.support.directory_machine import DirectoryMachine
from tests.support.file_machine import FileMachine

_LENGTH = 20


def main() -> int:
    """Run each machine until it has made its steps, print the counts, and return the exit code."""
    parser = argparse.ArgumentParser(description="Run the state machines at length.")
    parser.add_argument("--steps", type=int, default=10_000, help="commands that each machine runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--directory", type=Path, help="where the directories are made; by default where temporary ones are"
    )
    arguments = parser.parse_args()
    if arguments.directory:
        tempfile.tempdir = str(arguments.directory)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    for machine in (DirectoryMachine, FileMachine):
        started, number = time.monotonic(), arguments.seed
        while machine.steps < arguments.steps:
            run(machine, number)
            number += 1
            print(f"{machine.__name__}: {machine.steps} steps", file=sys.stderr, flush=True)
        counts = {"machine": machine.__name__, "steps": machine.steps, "happened": dict(machine.happened)}
        print(json.dumps(counts | {"seconds": round(time.monotonic() - started)}), flush=True)
    return 0


def run(machine: type[RuleBasedStateMachine], number: int) -> None:
    """Run 50 sequences of one seed."""
    once = settings(
        max_examples=50,
        stateful_step_count=_LENGTH,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        # Sequences are short, and shrinking one takes longer than reading it.
        phases=[Phase.generate],
    )
    run_state_machine_as_test(seed(number)(machine), settings=once)


if __name__ == "__main__":
    sys.exit(main())
