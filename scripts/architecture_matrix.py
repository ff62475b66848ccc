"""Run the conformance check on every model type and write docs/architectures.md.

    python -m scripts.architecture_matrix

Takes some minutes on two cores; exits with 1 and writes nothing if what the document promises of a type does not hold.
"""

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

import torch
import transformers

from abliterate.architectures.table import refusal
from tests.support import differential
from tests.support.conformance import (
    PARTIAL_TYPES,
    REFUSED_TYPES,
    TEXT_TYPES,
    WRAPPER_TYPES,
    PartialResult,
    Result,
    build_model,
    check,
    check_partial,
    partial_shortcomings,
    shortcomings,
)
from tests.support.conformance_models import VARIANTS
from tests.support.differential import NOT_RUN, RunResult, check_running, make
from tests.support.matrix import HEADER, MATRIX, REASONS, exact_row, partial_row, reason_rows, refused_row


def check_type(name: str) -> tuple[Result | PartialResult, RunResult | None]:
    """Check one model type, or a variant of one."""
    torch.set_num_threads(1)
    model_type, changes = VARIANTS.get(name, (name, {}))
    running = None if name in NOT_RUN else check_running(make(model_type, **changes))
    with tempfile.TemporaryDirectory() as work:
        if name in PARTIAL_TYPES:
            return check_partial(model_type, Path(work)), running
        return check(model_type, Path(work), model=build_model(model_type, **changes)), running


def missing_of(name: str, result: Result | PartialResult, running: RunResult | None) -> list[str]:
    """Return what the document promises of a type and does not hold."""
    missing = [] if running is None else differential.shortcomings(running)
    if isinstance(result, PartialResult):
        return missing + partial_shortcomings(name, result)
    return missing + shortcomings(VARIANTS.get(name, (name, {}))[0], result)


def main() -> int:
    """Check all types, write the document, and return the exit code."""
    rows, reasons = [], []
    names = sorted([*TEXT_TYPES, *WRAPPER_TYPES, *VARIANTS, *PARTIAL_TYPES])
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for name, (result, running) in zip(names, pool.imap(check_type, names), strict=True):
            whole = result.whole if isinstance(result, PartialResult) else result
            if missing := missing_of(name, result, running):
                print(f"{name}: it does not hold that {', that '.join(missing)} ({result}; {running})", file=sys.stderr)
                return 1
            rows.append(
                exact_row(name, whole, running)
                if isinstance(result, Result)
                else partial_row(name, result, running, refusal(name))
            )
            reasons += reason_rows(name, whole)
            print(rows[-1][:100], file=sys.stderr)
    rows += [refused_row(name, refusal(name)) for name in REFUSED_TYPES]
    MATRIX.parent.mkdir(exist_ok=True)
    text = HEADER.format(version=transformers.__version__) + "\n".join(rows) + "\n" + REASONS + "\n".join(reasons)
    MATRIX.write_text(text + "\n")
    print(f"{MATRIX}: {len(rows)} rows", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
