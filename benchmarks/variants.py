"""Other directions than the paper's, beside it: what each variant of `extract` removes and costs, on one model.

    python benchmarks/variants.py MODEL [--n-train 48] [--n-val 12] [--kl-threshold 0.3] [--every 3] [--json FILE]

Each variant is extracted with the same prompts, projected out of the weights, and evaluated on test prompts that no
extraction saw. Scores are of the directions chosen (all together for a rank above one); rates carry Wilson intervals.
The table goes to standard output as it grows.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from abliterate.direction_recipes import DirectionRecipe
from abliterate.errors import NoDirectionError
from abliterate.evaluation import evaluate_model
from abliterate.evaluation_report import EvaluationOptions, EvaluationReport
from abliterate.extraction import extract_direction
from abliterate.extraction_report import ExtractionOptions, ExtractionReport
from abliterate.model import ModelOptions, load_chat_model
from abliterate.orthogonalization import orthogonalize_checkpoint
from abliterate.prompt_sets import load_prompt_set
from abliterate.selection import Thresholds

VARIANTS: dict[str, dict[str, Any]] = {
    "the paper's": {},
    "`--variant projected`": {"recipe": DirectionRecipe(variant="projected")},
    "`--winsorize 0.05`": {"recipe": DirectionRecipe(winsorize=0.05)},
    "`--rank 2`": {"rank": 2},
    "`--rank 3`": {"rank": 3},
}
KINDS = ("harmful", "harmless", "borderline")
HEADER = (
    "| variant | position, layer | bypass | induce | KL | refuses harmful | harmless | KL, test prompts "
    "| cross-entropy, change |"
)


def save_test_prompts(directory: Path, every: int) -> dict[str, str]:
    """Write every n-th test prompt of each kind to a file; return the SPECs."""
    specs = {}
    for kind in KINDS:
        path = directory / f"{kind}.jsonl"
        texts = load_prompt_set("bundled", kind=kind, part="test").texts[::every]
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
        specs[kind] = str(path)
    return specs


def line(name: str, report: ExtractionReport, measured: EvaluationReport) -> str:
    """Return one line of the table."""
    together = report.together
    bypass, kl = (together.bypass, together.kl) if together else (report.selected.bypass, report.selected.kl)
    assert bypass is not None
    assert kl is not None
    induce = "-" if together else f"{report.selected.induce:.2f}"
    chosen = " and ".join(f"{score.position}, {score.layer}" for score in (report.selected, *report.further))
    entropy = measured.cross_entropy
    assert entropy is not None
    assert entropy.relative_change is not None
    rates = [
        f"{rate.rate:.1%} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"
        for rate in (measured.rates["harmful"], measured.rates["harmless"])
    ]
    return (
        f"| {name} | {chosen} | {bypass:.2f} | {induce} | {kl:.3f} | {rates[0]} | {rates[1]} "
        f"| {measured.kl_harmless:.3f} | {entropy.base:.3f} to {entropy.model:.3f}, {entropy.relative_change:+.1%} |"
    )


def main() -> None:
    """Extract, edit and evaluate each variant, one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--n-train", type=int, default=48)
    parser.add_argument("--n-val", type=int, default=12)
    parser.add_argument("--kl-threshold", type=float, default=0.3)
    parser.add_argument("--every", type=int, default=3, help="evaluate every n-th test prompt")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--json", type=Path, help="write all reports here")
    arguments = parser.parse_args()
    chat = load_chat_model(arguments.model, name=str(arguments.model), options=ModelOptions())
    documents = {}
    print(HEADER, "|---|---|---|---|---|---|---|---|---|", sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        specs = save_test_prompts(place, arguments.every)
        evaluation = EvaluationOptions(**specs, max_new_tokens=arguments.max_new_tokens, cache=place / "replies")
        for number, (name, changes) in enumerate(VARIANTS.items()):
            options = ExtractionOptions(
                n_train=arguments.n_train,
                n_val=arguments.n_val,
                thresholds=Thresholds(kl=arguments.kl_threshold),
                **changes,
            )
            try:
                extraction = extract_direction(model=chat, options=options)
            except NoDirectionError as error:
                print(f"{name}: {error}", file=sys.stderr, flush=True)
                continue
            edited = place / f"edited-{number}"
            orthogonalize_checkpoint(source=arguments.model, direction=list(extraction.directions), output=edited)
            measured = evaluate_model(model=edited, base=arguments.model, options=evaluation)
            documents[name] = {"extraction": asdict(extraction.report), "evaluation": asdict(measured)}
            print(line(name, extraction.report, measured), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(documents, indent=1))
    before = documents.popitem()[1]["evaluation"]["base_rates"] if documents else {}
    print(f"\nunchanged: {json.dumps({kind: before[kind] for kind in before})}")


if __name__ == "__main__":
    main()
