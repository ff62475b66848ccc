"""Every other format that comes from elsewhere, broken at random for minutes: read, or refused with a known error.

    python -m benchmarks.fuzz_formats [--minutes 10] [--seed 0] [--only FORMAT]... [--json FILE]

The formats are direction files, records (abliteration.json), files of strengths, prompt files, chat templates, reply
caches, adapters, GGUF files, tokenizer files and, as `extract` loads it, config.json. Sound files are broken by
structure and by bytes, and then everything is done with them that the commands do (tests/support/format_fuzzing.py).

What counts as a fault is what counts for `benchmarks.fuzz_checkpoint`: an exception that is not an AbliterateError, a
message of several lines, a try that takes longer than `--limit` seconds or needs memory beyond the limit, and anything
written outside the directory for results.
"""

import argparse
import sys
from pathlib import Path
from random import Random

from benchmarks.fuzz_checkpoint import add_arguments, fuzz
from tests.support.format_fuzzing import FORMATS, make_formats, try_format


def main() -> int:
    """Fuzz, print what came of it, and return the exit code."""
    parser = argparse.ArgumentParser(description="Fuzz the reading of all formats but checkpoints.")
    add_arguments(parser)
    parser.add_argument("--only", action="append", choices=list(FORMATS), help="this format; may be given again")
    arguments = parser.parse_args()
    names = arguments.only or list(FORMATS)

    def prepare(directory: Path) -> dict[str, Path]:
        return make_formats(directory / "sound")

    def attempt(sound: dict[str, Path], work: Path, random: Random) -> str:
        name = random.choice(names)
        return try_format(name, sound[name], work, random)

    return fuzz(arguments, prepare=prepare, attempt=attempt, succeeded=lambda outcome: outcome.endswith(": read"))


if __name__ == "__main__":
    sys.exit(main())
