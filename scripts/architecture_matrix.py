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
from tests.support.conformance import (
    REFUSED_TYPES,
    TEXT_TYPES,
    WRAPPER_TYPES,
    Result,
    build_model,
    check,
    shortcomings,
)
from tests.support.conformance_models import VARIANTS
from tests.support.matrix import HEADER, MATRIX, REASONS, exact_row, reason_rows, refused_row


def check_type(name: str) -> Result:
    """Check one model type, or a variant of one."""
    torch.set_num_threads(1)
    model_type, changes = VARIANTS.get(name, (name, {}))
    with tempfile.TemporaryDirectory() as work:
        return check(model_type, Path(work), model=build_model(model_type, **changes))


def main() -> int:
    """Check all types, write the document, and return the exit code."""
    rows, reasons = [], []
    names = sorted([*TEXT_TYPES, *WRAPPER_TYPES, *VARIANTS])
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for name, result in zip(names, pool.imap(check_type, names), strict=True):
            if missing := shortcomings(VARIANTS.get(name, (name, {}))[0], result):
                print(f"{name}: it does not hold that {', that '.join(missing)} ({result})", file=sys.stderr)
                return 1
            rows.append(exact_row(name, result))
            reasons += reason_rows(name, result)
            print(rows[-1][:100], file=sys.stderr)
    rows += [refused_row(name, refusal(name)) for name in REFUSED_TYPES]
    MATRIX.parent.mkdir(exist_ok=True)
    text = HEADER.format(version=transformers.__version__) + "\n".join(rows) + "\n" + REASONS + "\n".join(reasons)
    MATRIX.write_text(text + "\n")
    print(f"{MATRIX}: {len(rows)} rows", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
