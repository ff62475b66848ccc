"""Write docs/peers.md from results: one section a model, with a table, the frontier, and what failed.

    python -m benchmarks.peers.page                                          anew from docs/peers/*.json
    python -m benchmarks.peers.page --take DIR/results.json --name demo      from new results, which are copied there

What stands between `<!-- results: NAME -->` and `<!-- end of results -->` is replaced, and with it the figure
docs/peers/NAME.svg; the prose around it is written by hand. A model without a section gets one at the end.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterate.files import write_file, write_json
from benchmarks.peers.plot import Point, frontier_svg
from benchmarks.peers.results import KINDS, read_results
from benchmarks.peers.tools import REPOSITORY
from scripts.results import percent, rate, with_block

DOCS = REPOSITORY / "docs"
OURS = "ours"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One edited model: the run it comes from, and what was measured of it."""

    run: Mapping[str, Any]
    result: Mapping[str, Any]

    @property
    def measured(self) -> Mapping[str, Any]:
        """What `evaluate` found."""
        found: Mapping[str, Any] = self.result["evaluation"]
        return found

    @property
    def label(self) -> str:
        """Seed, trials and the name of the export, in words."""
        trials = "" if self.run["trials"] is None else f", {self.run['trials']} trials"
        return f"seed {self.run['seed']}{trials}, {self.result['name']}"

    @property
    def refused(self) -> float:
        """Share of the harmful test prompts."""
        return float(self.measured["rates"]["harmful"]["rate"])

    @property
    def kl(self) -> float:
        """KL over the base's own answers."""
        return float(self.measured["divergence"]["continuation"])

    @property
    def entropy_change(self) -> float:
        """Change of the cross-entropy of the base's own answers, as a share of it."""
        return float(self.measured["cross_entropy"]["relative_change"])


def rows(document: Mapping[str, Any]) -> list[Row]:
    """Return every edited model that was measured, tool by tool."""
    found = [
        Row(run=run, result=result)
        for run in document["runs"]
        for result in run["results"]
        if result["evaluation"] is not None
    ]
    return sorted(found, key=lambda row: (row.run["tool"], row.run["trials"] or 0, row.run["seed"]))


def results_table(document: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table, the base first."""
    lines = [
        "| tool | seed | trials | model | harmful refused | harmless refused | borderline refused | KL, first token "
        "| KL, base's answers | cross-entropy | degenerate | wall, s | CPU, s | peak, MB |",
        f"|{'---|' * 14}",
    ]
    base = document["base"]
    if base is not None:
        cells = ["none", "", "", "the base", *(rate(base["rates"][kind]) for kind in KINDS), "0", "0"]
        cells += [f"{base['cross_entropy']:.3f}", _degenerate(base["rates"]), "", "", ""]
        lines.append(_line(cells))
    for row in rows(document):
        run, measured = row.run, row.measured
        usage = run["usage"]
        entropy = measured["cross_entropy"]
        cells = [
            f"{run['tool']} {run['version']}" if run["tool"].split(":")[0] != OURS else run["tool"],
            str(run["seed"]),
            "" if run["trials"] is None else str(run["trials"]),
            row.result["name"],
            *(rate(measured["rates"][kind]) for kind in KINDS),
            f"{measured['divergence']['first_token']:.3f}",
            f"{row.kl:.3f}",
            f"{entropy['model']:.3f} ({100 * row.entropy_change:+.1f} %)",
            _degenerate(measured["rates"]),
            *(f"{usage[name]:.0f}" for name in ("wall_s", "cpu_s", "peak_mb")),
        ]
        lines.append(_line(cells))
    return lines


def comparison(document: Mapping[str, Any]) -> list[str]:
    """Return, for each result of a peer, the gentlest of ours that leaves no more refusals; no lines without either."""
    everything = rows(document)
    ours = [row for row in everything if row.run["tool"].split(":")[0] == OURS]
    peers = [row for row in everything if row not in ours]
    if not ours or not peers:
        return []
    lines = [
        "| peer | harmful refused | its KL, cross-entropy | ours with no more refusals | our KL, cross-entropy "
        "| gentler in both |",
        f"|{'---|' * 6}",
    ]
    for peer in peers:
        enough = [row for row in ours if row.refused <= peer.refused]
        best = min(enough, key=lambda row: row.kl, default=None)
        cells = [f"{peer.run['tool']}, {peer.label}", f"{percent(peer.refused)} %", _costs(peer)]
        if best is None:
            cells += ["none", "", "no"]
        else:
            both = best.kl < peer.kl and best.entropy_change < peer.entropy_change
            cells += [f"{best.run['tool']}, {best.label}: {percent(best.refused)} %", _costs(best)]
            cells.append("yes" if both else "no")
        lines.append(_line(cells))
    return lines


def failures(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for each run, or edited model, that came to nothing."""
    for run in document["runs"]:
        trials = "" if run["trials"] is None else f", {run['trials']} trials"
        told = f"{run['tool']} {run['version']}, seed {run['seed']}{trials}"
        if run["error"] is not None:
            yield f"- {told}: {_code(run['error'])}"
        for result in run["results"]:
            if result["error"] is not None:
                yield f"- {told}, {result['name']}: {_code(result['error'])}"


def condition_text(document: Mapping[str, Any]) -> str:
    """Return under which conditions the numbers were taken."""
    conditions, runs = document["conditions"], document["runs"]
    loads, nice = [run["load"] for run in runs], sorted({run["nice"] for run in runs})
    sessions = list(dict.fromkeys(run["session"] for run in runs))
    prompts = conditions["prompts"]
    every = conditions["every"]
    text = (
        f"Conditions: {conditions['threads']} of {conditions['cores']} cores for each tool, Python "
        f"{conditions['python']}, {conditions['max_new_tokens']} new tokens. Measured on "
        f"{'all test prompts' if every == 1 else f'one of {every} test prompts'}. For training "
        f"{prompts['harmful/train']['count']} prompts of each kind, for validation "
        f"{prompts['harmful/validation']['count']}. Weights {conditions['model_sha256'][:12]}..."
    )
    if runs:
        load = " to ".join(f"{one:g}" for one in sorted({min(loads), max(loads)}))
        text += (
            f"\nSessions: {', '.join(sessions)}. Runs began at a load of {load} and "
            f"niceness {', '.join(map(str, nice))}. "
        )
        # The run before leaves its own load behind.
        busy = len(sessions) > 1 or max(loads) > conditions["threads"] + 0.5 or nice != [0]
        text += "Wall times are " + (
            "**not comparable**: other work ran beside them, or they come from several sessions."
            if busy
            else "comparable with each other, not with those of another machine or day."
        )
    return text


def block(document: Mapping[str, Any], name: str) -> str:
    """Return all that stands between the marks."""
    lines = [*results_table(document), "", condition_text(document)]
    if rows(document):
        lines += ["", f"![How much is refused against what the edit costs](peers/{name}.svg)"]
    compared = comparison(document)
    lines += ["", *compared] if compared else []
    told = list(failures(document))
    lines += ["", "What failed to run:", "", *told] if told else ["", "Nothing failed to run."]
    return "\n".join(lines)


def figure(document: Mapping[str, Any]) -> str:
    """Return the frontier as SVG."""
    points = [
        Point(
            tool=row.run["tool"],
            label=row.label,
            refused=row.refused,
            low=row.measured["rates"]["harmful"]["low"],
            high=row.measured["rates"]["harmful"]["high"],
            kl=row.kl,
            entropy_change=row.entropy_change,
        )
        for row in rows(document)
    ]
    return frontier_svg(points, title=f"Effect against damage: {document['conditions']['model']}")


def documents(docs: Path) -> dict[Path, str]:
    """Return docs/peers.md and the figures, as they should be by the results in docs/peers.

    Raises:
        ValueError: A file there holds no results, or a section's marks occur twice.
    """
    page = docs / "peers.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else "# Beside other tools, measured\n"
    written: dict[Path, str] = {}
    for path in sorted((docs / "peers").glob("*.json")):
        document, name = read_results(path), path.stem
        if f"<!-- results: {name} -->" not in text:
            text += f"\n## {document['conditions']['model']}\n\n<!-- results: {name} -->\n<!-- end of results -->\n"
        text = with_block(text, name, block(document, name))
        if rows(document):
            written[path.with_suffix(".svg")] = figure(document)
    return written | {page: text}


def _costs(row: Row) -> str:
    return f"{row.kl:.3f}, {100 * row.entropy_change:+.1f} %"


def _degenerate(rates: Mapping[str, Any]) -> str:
    return f"{sum(rates[kind]['degenerate'] for kind in KINDS)} of {sum(rates[kind]['n'] for kind in KINDS)}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _code(text: str) -> str:
    return f"`{text.replace('`', chr(39))}`"


def main(arguments: Sequence[str] | None = None) -> int:
    """Take new results, if any are given, and write the page anew."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.page",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--take", type=Path, metavar="FILE", help="a results.json")
    parser.add_argument("--name", help="what its section is called, such as demo")
    chosen = parser.parse_args(arguments)
    if (chosen.take is None) != (chosen.name is None):
        parser.error("--take FILE and --name NAME belong together")
    if chosen.name is not None and not re.fullmatch(r"[a-z0-9_-]+", chosen.name):
        parser.error(f"--name {chosen.name!r}: small letters, digits, - and _ only")
    try:
        if chosen.take is not None:
            write_json(DOCS / "peers" / f"{chosen.name}.json", read_results(chosen.take))
        for path, text in documents(DOCS).items():
            write_file(path, text)
    except (OSError, ValueError) as error:
        print(f"error: {chosen.take or DOCS / 'peers'}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
