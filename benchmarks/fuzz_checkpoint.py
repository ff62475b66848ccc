"""Checkpoints broken at random for minutes: each is edited or refused with a known error, and nothing else happens.

    python -m benchmarks.fuzz_checkpoint [--minutes 10] [--seed 0] [--json FILE]

Six tiny checkpoints (llama sharded and tied, gpt2, gemma2 sharded, mixtral, a llava wrapper) are copied and broken by
`tests/support/checkpoint_mutations.py`: bytes and structure of headers, index and config, tensors renamed, reshaped and
filled with NaN, files cut, swapped, or replaced by pipes, directories and links. On each, `open_checkpoint`,
`plan_edit`, and `orthogonalize_checkpoint` without and with an output are run, with one of several options.

It fails (exit code 1) on an exception that is not an AbliterateError, on a message of several lines, on a try that
takes longer than `--limit` seconds, and on anything written outside the directory for results. A failure names its
seed; `--seed N --tries 1` makes it again.
"""

import argparse
import faulthandler
import json
import platform
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random
from types import FrameType

from tests.support.checkpoint_mutations import make_bases
from tests.support.fuzzing import attempt, make_fuzz_direction

_MEMORY_BYTES = 4 << 30


class HangError(BaseException):
    """A try took too long. No `except Exception` on the way catches it."""


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise HangError


def main() -> int:
    """Fuzz, print what came of it, and return the exit code."""
    parser = argparse.ArgumentParser(description="Fuzz the reading of checkpoints.")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0, help="the first seed; each try has the next")
    parser.add_argument("--tries", type=int, help="stop after so many")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds that a try may take")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    _limit_memory()
    signal.signal(signal.SIGALRM, _stop)
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="abliterate-fuzz-") as directory:
        bases, direction = make_bases(Path(directory) / "bases"), make_fuzz_direction()
        started, tries, slowest = time.monotonic(), 0, 0.0
        while time.monotonic() - started < 60 * arguments.minutes and tries != arguments.tries:
            seed = arguments.seed + tries
            random, begun = Random(seed), time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, arguments.limit)
            # Should the interpreter itself hang, this ends it.
            faulthandler.dump_traceback_later(3 * arguments.limit, exit=True)
            try:
                outcomes[attempt(random.choice(bases), Path(directory) / f"try-{seed}", random, direction)] += 1
            except (Exception, HangError):
                failures.append(f"seed {seed}:\n{traceback.format_exc()}")
                print(failures[-1], file=sys.stderr, flush=True)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            slowest = max(slowest, time.monotonic() - begun)
            tries += 1
        faulthandler.cancel_dump_traceback_later()
        seconds = time.monotonic() - started
    report = {
        "tries": tries,
        "edited": outcomes["edited"],
        "refused": sum(outcomes.values()) - outcomes["edited"],
        "distinct_outcomes": len(outcomes),
        "failures": len(failures),
        "seconds": round(seconds, 1),
        "slowest_try_seconds": round(slowest, 2),
        "python": platform.python_version(),
        "outcomes": dict(outcomes.most_common()),
    }
    print(json.dumps({key: value for key, value in report.items() if key != "outcomes"}, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if failures else 0


def _limit_memory() -> None:
    """Let the address space grow by a few GB only, so that a size out of a file cannot fill the machine."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        limit = pages * resource.getpagesize() + _MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    sys.exit(main())
