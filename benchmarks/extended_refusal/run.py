"""Audit two demo models that differ in how they refuse: in a sentence, and as arXiv 2505.19056 proposes.

Both are made from the same base with the same training budget. The audit is that of `abliterate audit`; this script
only builds the two models and runs it on both with the same options. What is there already is taken.

    python -m benchmarks.extended_refusal.run --output build/extended_refusal
    python -m benchmarks.extended_refusal.run --output build/extended_refusal --train   trains both adapters first

Leaves in OUTPUT, for `plain` and `hardened` each, the model, `NAME.audit.json` and a page in `NAME.page/`.
`make results` puts the numbers into docs/extended_refusals.md.
"""

import argparse
from pathlib import Path

from abliterate.evaluation.audit_report import AuditOptions
from abliterate.evaluation.auditing import audit_model
from abliterate.models.options import ModelOptions
from abliterate.pages.audit_page import write_audit_page
from benchmarks.extended_refusal.models import SUBJECTS, make

N_TEST = 64


def main() -> None:
    """Build and audit both models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--train", action="store_true", help="train the adapters anew (hours on a CPU)")
    parser.add_argument("--n-test", type=int, default=N_TEST, help="test prompts of each kind")
    parser.add_argument(
        "--dtype", default="bfloat16", help="what the audits run in; bfloat16 takes two thirds of the time"
    )
    arguments = parser.parse_args()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    for name in ("plain", "hardened"):
        report_file = output / f"{name}.audit.json"
        if report_file.is_file():
            continue
        if make(SUBJECTS[name], output, train_all=arguments.train) is None:
            raise SystemExit(f"the training of {name} has failed")
        report = audit_model(
            model=output / name,
            options=AuditOptions(n_test=arguments.n_test),
            model_options=ModelOptions(dtype=arguments.dtype),
        )
        command = f"abliterate audit {output / name} --n-test {arguments.n_test} --dtype {arguments.dtype}"
        write_audit_page(report, output / f"{name}.page", command=command)
        report.save(report_file)
        print(f"{name}: {report.verdict} ({report.reason})", flush=True)


if __name__ == "__main__":
    main()
