"""One model from its direction to its measured edit, as a library: python examples/library.py MODEL OUT."""

import sys
from pathlib import Path

import abliterate
from abliterate.evaluation.report import EvaluationOptions
from abliterate.release.verification import verify_checkpoint

if __name__ == "__main__":
    model, out = sys.argv[1:3]
    extraction = abliterate.extract_direction(model=model)
    direction = Path(f"{out}.safetensors")
    extraction.direction.save(direction)
    abliterate.orthogonalize_checkpoint(source=model, direction=direction, output=out)
    print("verified:", verify_checkpoint(checkpoint=Path(out)).passed)
    report = abliterate.evaluate_model(model=out, base=model, options=EvaluationOptions(max_new_tokens=64))
    for kind, rate in report.rates.items():
        before = report.base_rates[kind] if report.base_rates else rate
        print(f"{kind}: {before.rate:.1%} refused before, {rate.rate:.1%} [{rate.low:.1%}, {rate.high:.1%}] after")
