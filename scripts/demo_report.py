"""Put the demo's measurements into report.json, and show them as a table.

python scripts/demo_report.py build/demo --write   writes build/demo/report.json
python scripts/demo_report.py build/demo           shows it
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from abliterate.directions import load_direction

KINDS = ("harmful", "harmless", "borderline")


def build_report(directory: Path) -> dict[str, Any]:
    """Return before and after, damage and the selected candidate, from the files the commands wrote."""
    evaluation = json.loads((directory / "abliterated" / "evaluation.json").read_text())
    metadata = load_direction(directory / "refusal.safetensors").metadata
    entropy = evaluation["cross_entropy"]
    return {
        "model": str(directory / "model"),
        "abliterated": str(directory / "abliterated"),
        "direction": str(directory / "refusal.safetensors"),
        "before": _side(evaluation["base_rates"]),
        "after": _side(evaluation["rates"]),
        "kl_harmless": evaluation["kl_harmless"],
        "cross_entropy": entropy,
        "selected": {name: metadata[name] for name in ("position", "layer", "bypass", "induce", "kl")},
        "thresholds": metadata["thresholds"],
        "max_new_tokens": evaluation["max_new_tokens"],
        "prompt_sets": evaluation["prompt_sets"],
    }


def _side(rates: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{kind}_refusal_rate": {name: rates[kind][name] for name in ("rate", "low", "high", "n", "degenerate")}
        for kind in KINDS
    }


def show(report: dict[str, Any], directory: Path) -> None:
    """Print the report as a table."""
    console = Console(highlight=False)
    table = Table("refusal rate", "before", "after", title="Demo model: SmolLM2-135M-Instruct, taught to refuse")
    for kind in KINDS:
        cells = [_cell(report[side][f"{kind}_refusal_rate"]) for side in ("before", "after")]
        table.add_row(f"{kind} prompts", *cells)
    console.print(table)
    chosen, entropy = report["selected"], report["cross_entropy"]
    console.print(
        f"direction: position {chosen['position']}, layer {chosen['layer']}, bypass {chosen['bypass']:.2f}, "
        f"induce {chosen['induce']:.2f}, KL {chosen['kl']:.3f} (threshold {report['thresholds']['kl']:g})"
    )
    console.print(
        f"harmless answers: KL {report['kl_harmless']:.3f} nats at the first token, cross-entropy "
        f"{entropy['base']:.3f} -> {entropy['model']:.3f} nats a token ({entropy['relative_change']:+.1%})"
    )
    console.print(f"report: {directory / 'report.json'}; plots: {directory / 'plots'}")
    console.print(f"to publish it: abliterate push {directory / 'abliterated'} YOUR-NAME/REPO")


def _cell(rate: dict[str, Any]) -> str:
    return f"{rate['rate']:.1%} [{rate['low']:.1%}, {rate['high']:.1%}]"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    target = arguments.directory / "report.json"
    if arguments.write:
        target.write_text(json.dumps(build_report(arguments.directory), indent=2) + "\n")
    else:
        show(json.loads(target.read_text()), arguments.directory)
