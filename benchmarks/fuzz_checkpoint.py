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
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import FrameType
from typing import TypeVar

from abliterate.directions import Direction
from tests.support.checkpoint_mutations import make_bases, make_quantized_bases
from tests.support.fuzzing import OPTIONS, QUANTIZED_OPTIONS, attempt, make_fuzz_direction

Sound = TypeVar("Sound")

_MEMORY_BYTES = 4 << 30


class HangError(BaseException):
    """A try took too long. No `except Exception` on the way catches it."""


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise HangError


def main() -> int:
    """Fuzz, print what came of it, and return the exit code."""
    parser = argparse.ArgumentParser(description="Fuzz the reading of checkpoints.")
    add_arguments(parser)
    parser.add_argument("--quantized", action="store_true", help="quantised checkpoints")
    arguments = parser.parse_args()
    make = make_quantized_bases if arguments.quantized else make_bases
    options = QUANTIZED_OPTIONS if arguments.quantized else OPTIONS

    def prepare(directory: Path) -> tuple[list[Path], Direction]:
        return make(directory / "bases"), make_fuzz_direction()

    def edit(sound: tuple[list[Path], Direction], work: Path, random: Random) -> str:
        bases, direction = sound
        return attempt(random.choice(bases), work, random, direction, options)

    return fuzz(arguments, prepare=prepare, attempt=edit, succeeded=lambda outcome: outcome == "edited")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what all fuzzers are told."""
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0, help="the first seed; each try has the next")
    parser.add_argument("--tries", type=int, help="stop after so many")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds that a try may take")
    parser.add_argument("--json", type=Path)


def fuzz(
    arguments: argparse.Namespace,
    *,
    prepare: Callable[[Path], Sound],
    attempt: Callable[[Sound, Path, Random], str],
    succeeded: Callable[[str], bool],
) -> int:
    """Try again and again until the time is up, print what came of it, and return the exit code.

    Args:
        arguments: see `add_arguments`.
        prepare: makes what is sound, in a directory.
        attempt: breaks a copy of it, in a directory that is not there, and says what came of it.
        succeeded: tells whether that is a result and no error.
    """
    _limit_memory()
    signal.signal(signal.SIGALRM, _stop)
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="abliterate-fuzz-") as directory:
        sound = prepare(Path(directory))
        started, tries, slowest = time.monotonic(), 0, 0.0
        while time.monotonic() - started < 60 * arguments.minutes and tries != arguments.tries:
            seed, begun = arguments.seed + tries, time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, arguments.limit)
            # Should the interpreter itself hang, this ends it.
            faulthandler.dump_traceback_later(3 * arguments.limit, exit=True)
            try:
                outcomes[attempt(sound, Path(directory) / f"try-{seed}", Random(seed))] += 1
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                failures.append(f"seed {seed}:\n{traceback.format_exc()}")
                print(failures[-1], file=sys.stderr, flush=True)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            slowest = max(slowest, time.monotonic() - begun)
            tries += 1
        faulthandler.cancel_dump_traceback_later()
        seconds = time.monotonic() - started
    good = sum(count for outcome, count in outcomes.items() if succeeded(outcome))
    report = {
        "tries": tries,
        "succeeded": good,
        "refused": sum(outcomes.values()) - good,
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
