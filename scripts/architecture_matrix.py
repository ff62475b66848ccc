"""Run the conformance check on every model type and write docs/architectures.md.

    python -m scripts.architecture_matrix

Takes a few minutes on one core; exits with 1 and writes nothing if a type that is not refused is not exact.
"""

import sys
import tempfile
from pathlib import Path

import transformers

from abliterate.architectures.table import refusal
from tests.support.conformance import CLEAN, DIRTY, REFUSED_TYPES, TEXT_TYPES, WRAPPER_TYPES, build_model, check
from tests.support.conformance_models import VARIANTS
from tests.support.matrix import HEADER, MATRIX, REASONS, exact_row, reason_rows, refused_row


def main() -> int:
    """Check all types, write the document, and return the exit code."""
    rows, reasons = [], []
    for name in sorted([*TEXT_TYPES, *WRAPPER_TYPES, *VARIANTS]):
        model_type, changes = VARIANTS.get(name, (name, {}))
        with tempfile.TemporaryDirectory() as work:
            result = check(model_type, Path(work), model=build_model(model_type, **changes))
        if result.after >= CLEAN or result.before <= DIRTY or min(result.without.values()) <= CLEAN:
            print(f"{name}: not exact ({result})", file=sys.stderr)
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
