"""A demo's measurements as one report, and as a table; `scripts.demo_pipeline` makes and shows it."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from abliterate.directions import load_direction

LINE_WIDTH = 120
KINDS = ("harmful", "harmless", "borderline")
SMALL = "SmolLM2-135M-Instruct, taught to refuse"


def build_report(directory: Path) -> dict[str, Any]:
    """Return before and after, damage and the selected candidate, from the files the commands wrote.

    Where it was verified and the direction was added, and where the model came from, are in it if there are such files.
    """
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
        **_more(directory),
    }


def _more(directory: Path) -> dict[str, Any]:
    more: dict[str, Any] = {}
    if (directory / "source.json").is_file():
        more["source"] = json.loads((directory / "source.json").read_text())
    if (directory / "induced.json").is_file():
        added = json.loads((directory / "induced.json").read_text())
        more["added"] = {
            side: _rate(added[rates]["harmless"]) for side, rates in (("before", "base_rates"), ("after", "rates"))
        }
    checks = {path.suffixes[0][1:]: json.loads(path.read_text()) for path in directory.glob("verification.*.json")}
    if checks:
        more["verified"] = {dtype: bool(check["passed"]) for dtype, check in sorted(checks.items())}
    return more


def _side(rates: dict[str, Any]) -> dict[str, Any]:
    return {f"{kind}_refusal_rate": _rate(rates[kind]) for kind in KINDS}


def _rate(rate: dict[str, Any]) -> dict[str, Any]:
    return {name: rate[name] for name in ("rate", "low", "high", "n", "degenerate")}


def show(report: dict[str, Any], directory: Path) -> None:
    """Print the report as a table."""
    # A log has no width of its own, and nothing in it is to be broken.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else LINE_WIDTH)
    name = report["source"]["model"] if "source" in report else SMALL
    table = Table("refusal rate", "before", "after", title=f"Demo model: {name}")
    for kind in KINDS:
        cells = [_cell(report[side][f"{kind}_refusal_rate"]) for side in ("before", "after")]
        table.add_row(f"{kind} prompts", *cells)
    if "added" in report:
        table.add_row("harmless, direction added", *(_cell(report["added"][side]) for side in ("before", "after")))
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
    if "verified" in report:
        console.print(", ".join(f"verify in {dtype}: {'passed' if ok else 'failed'}" for dtype, ok in _checks(report)))
    console.print(f"report: {directory / 'report.json'}; plots: {directory / 'plots'}")
    console.print(f"to publish it: abliterate push {directory / 'abliterated'} YOUR-NAME/REPO")


def _checks(report: dict[str, Any]) -> list[tuple[str, bool]]:
    return list(report["verified"].items())


def _cell(rate: dict[str, Any]) -> str:
    return f"{rate['rate']:.1%} [{rate['low']:.1%}, {rate['high']:.1%}]"
