"""Write the results in README.md and in docs (results, extended_refusals, quantisation, variants) anew.

    python scripts/results.py                                    from docs/results, as it lies in the repository
    python scripts/results.py --demo build/demo --audits build/extended_refusal      from new measurements
    python scripts/results.py --variants FILE                                        from those of the variants
    python scripts/results.py --variants-real FILE                                   from those on the aligned model
    python scripts/results.py --procedures build/extended_refusal       from those of both procedures
    python scripts/results.py --real build/demo-real                                 from `make demo-real`

New measurements are first copied to docs/results: numbers only, no reply of a model is in them. What stands between
`<!-- results: NAME -->` and `<!-- end of results -->` is replaced; the prose around it is written by hand. The picture
that README begins with is drawn anew, too.
"""

import argparse
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from abliterate.evaluation.statistics import wilson_interval

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "docs" / "results"
REAL = "demo-real.json"
PROCEDURES = "procedures.json"
QUANTISATION = "quantisation.json"
KINDS = ("harmful", "harmless", "borderline")
MODELS = ("plain", "hardened")
PROCEDURE_MODELS = ("plain", "hardened", "refusal_only", "overview_only", "aligned", "aligned_hardened")
# What is kept of the reports of a variant: no grid of scores, no path.
KEPT = {
    "extraction": (
        "counts", "baseline", "thresholds", "recipe", "selected", "further", "together", "n_passing", "n_scored",
        "direction_norm",
    ),
    "evaluation": (
        "max_new_tokens", "scorer", "rates", "base_rates", "changes", "kl_harmless", "divergence", "cross_entropy",
        "text_cross_entropy", "prompt_sets", "versions",
    ),
}  # fmt: skip
REMARKS = {
    "single_direction": "one direction carries it",
    "few_directions": "a few directions carry it, one does not",
    "not_mediated": "nothing that was tried carries it",
    "does_not_refuse": "it does not refuse",
}


def percent(value: float) -> str:
    """Return a share in per cent with one decimal."""
    return f"{100 * value:.1f}"


def rate(values: dict[str, Any]) -> str:
    """Return a rate with its interval."""
    return f"{percent(values['rate'])} % [{percent(values['low'])}, {percent(values['high'])}]"


def rates_block(report: dict[str, Any]) -> str:
    """Return the rates that `make demo` found, for README."""
    lines = ["| refusal rate | before | after |", "|---|---|---|"]
    for kind in KINDS:
        before, after = (report[side][f"{kind}_refusal_rate"] for side in ("before", "after"))
        lines.append(f"| {kind} prompts ({before['n']}) | {rate(before)} | {rate(after)} |")
    return "\n".join(lines)


def demo_block(report: dict[str, Any]) -> str:
    """Return what `make demo` found, for docs/results.md."""
    lines = [rates_block(report)]
    chosen, entropy = report["selected"], report["cross_entropy"]
    lines += [
        "",
        f"Position {chosen['position']}, layer {chosen['layer']}: bypass {chosen['bypass']:.2f}, induce "
        f"{chosen['induce']:.2f}, KL {chosen['kl']:.3f} (threshold {report['thresholds']['kl']:g}). The damage: KL "
        f"{report['kl_harmless']:.3f} nats at the first token of harmless",
        f"answers; cross-entropy of the base's own harmless answers {entropy['base']:.3f} to {entropy['model']:.3f} "
        f"nats a token ({100 * entropy['relative_change']:+.1f} %). {report['max_new_tokens']} new tokens.",
    ]
    return "\n".join(lines)


NOT_MEASURED = "Not measured yet with this version: `make demo-real`, then `make results-real`."


def real_block(report: dict[str, Any] | None) -> str:
    """Return what `make demo-real` found, for docs/results.md; None where it has not been run."""
    if report is None:
        return NOT_MEASURED
    table, *rest = demo_block(report).split("\n\n")
    added, source = report["added"], report["source"]
    table += (
        f"\n| harmless prompts, direction added ({added['before']['n']}) | {rate(added['before'])} | "
        f"{rate(added['after'])} |"
    )
    checks = ", ".join(f"{dtype} {'passed' if ok else 'FAILED'}" for dtype, ok in report["verified"].items())
    exact = f"revision {source['revision']}" if "revision" in source else f"SHA-256 {source['sha256'][:12]}..."
    return "\n\n".join([table, *rest, f"`verify`: {checks}. {source['model']}, from {source['from']} ({exact})."])


def audits_block(audits: dict[str, dict[str, Any]]) -> str:
    """Return one line a model and intervention, for docs/extended_refusals.md."""
    lines = [
        "| model | intervention | harmful prompts refused | left | coherent | KL | perplexity | bearable |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, audit in audits.items():
        harmful = audit["harmful"]
        coherent = 1 - harmful["degenerate"] / harmful["n"]
        base = next((one["cross_entropy"]["base"] for one in audit["interventions"] if one["cross_entropy"]), None)
        before = "" if base is None else perplexity(base)
        lines.append(f"| {name} | none | {rate(harmful)} | 100 % | {percent(coherent)} % | 0 | {before} | |")
        lines += [f"| {name} | {intervention_row(one)} |" for one in audit["interventions"]]
    for name, audit in audits.items():
        lines += ["", f"{name.capitalize()}: `{audit['verdict']}` ({audit['reason']})."]
        found = audit["candidates"]
        if found is not None and found["n_passing"] is None:
            lines[-1] += " No first token tells its refusals, so the published selection cannot be applied."
        elif found is not None:
            lines[-1] += f" {found['n_passing']} of {found['n_candidates']} candidates pass the published selection."
        if audit["induced"] is not None:
            lines[-1] += f" With the direction added, {rate(audit['induced'])} of the harmless prompts are refused"
            lines[-1] += f" ({rate(audit['harmless'])} without)."
    return "\n".join(lines)


def intervention_row(one: dict[str, Any]) -> str:
    """Return the cells of one intervention."""
    where = f"{one['position']}, {one['layer']}"
    name = {
        "single": f"ablate {where}",
        "rank": f"ablate {one['rank']} directions",
        "addition": f"subtract {where}",
    }[one["method"]]
    entropy = one["cross_entropy"]
    cells = [
        name,
        rate(one["harmful"]),
        f"{100 * one['remaining']:.0f} %",
        f"{percent(one['coherence'])} %",
        f"{one['divergence']['first_token']:.3f}",
        "" if entropy is None else perplexity(entropy["model"]),
        "yes" if one["bearable"] else "no",
    ]
    return " | ".join(cells)


def procedures_block(results: Sequence[dict[str, Any]]) -> str:
    """Return what each procedure leaves of a model's refusals, for docs/extended_refusals.md."""
    if not results:
        return "Not measured yet with this version."
    header = ["model", "procedure", "direction", "refused", "not complied", "coherent", "overview", "rationale"]
    rows = [header, ["---"] * len(header)]
    for result in results:
        for line in result["lines"]:
            counts, where = line["counts"], "" if line["layer"] is None else f"{line['position']}, {line['layer']}"
            where += (f" ({line['remark']})" if where else line["remark"]) if line["remark"] else ""
            cells = [""] * 5
            if counts is not None:
                intervals = (proportion(counts[name], counts["n"]) for name in ("refused", "not_complied", "coherent"))
                parts = (f"{100 * counts[name] / counts['n']:.0f} %" for name in ("overview", "rationale"))
                cells = [*map(rate, intervals), *parts]
            dtype = result.get("dtype", "float32")
            model = result["model"] if dtype == "float32" else f"{result['model']}, in {dtype}"
            rows.append([model, line["procedure"], where, *cells])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def quantisation_block(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return what quantised models have of a direction and refuse, for docs/quantisation.md."""
    if not results:
        return "Not measured yet with this version."
    header = ["model", "", "share of the component", "refused, transformers", "refused, llama.cpp"]
    rows = [header, ["---"] * len(header)]
    for model, lines in results.items():
        for line in lines:
            in_llama_cpp = line.get("refused_in_llama_cpp")
            rates = [
                "" if count is None else rate(proportion(count, line["n"])) for count in (line["refused"], in_llama_cpp)
            ]
            rows.append([model, line["name"], f"{100 * line['left']:.3g} %", *rates])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def proportion(count: int, n: int) -> dict[str, float]:
    """Return a share with its 95 % interval."""
    low, high = wilson_interval(count, n)
    return {"rate": count / n, "low": low, "high": high}


def variants_block(variants: dict[str, dict[str, Any]]) -> str:
    """Return one line a variant of `extract`, for docs/variants.md."""
    lines = [
        "| directions | position, layer | bypass | induce | KL | harmful refused | harmless refused "
        "| borderline refused | KL, test prompts | cross-entropy | of plain text |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    first = next(iter(variants.values()))["evaluation"]
    entropies = [first["cross_entropy"], first["text_cross_entropy"]["bundled"]]
    cells = ["none", "", "", "", "0", *(rate(first["base_rates"][kind]) for kind in KINDS), "0"]
    cells += [f"{entropy['base']:.3f}" for entropy in entropies]
    lines.append(f"| {' | '.join(cells)} |")
    for name, one in variants.items():
        found, measured = one["extraction"], one["evaluation"]
        chosen, together = [found["selected"], *found["further"]], found["together"]
        scores = together or found["selected"]
        induce = ", ".join(f"{score['induce']:.2f}" for score in chosen)
        entropies = [measured["cross_entropy"], measured["text_cross_entropy"]["bundled"]]
        cells = [
            name,
            "; ".join(f"{score['position']}, {score['layer']}" for score in chosen),
            f"{scores['bypass']:.2f}",
            induce,
            f"{scores['kl']:.3f}",
            *(rate(measured["rates"][kind]) for kind in KINDS),
            f"{measured['kl_harmless']:.3f}",
            *(f"{each['model']:.3f} ({100 * each['relative_change']:+.1f} %)" for each in entropies),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def perplexity(nats: float) -> str:
    """Return the perplexity of a cross-entropy in nats a token."""
    return f"{math.exp(nats):.2f}"


def summary_block(audits: dict[str, dict[str, Any]]) -> str:
    """Return the audits in one line a model, for docs/results.md."""
    lines = [
        "| demo model | refused | fewest, at a bearable cost | pass the published selection | verdict of `audit` |",
        "|---|---|---|---|---|",
    ]
    for name, audit in audits.items():
        found = audit["candidates"]
        if found is None:
            passing = ""
        elif found["n_passing"] is None:
            passing = "cannot be judged: no first token tells refusals"
        else:
            passing = f"{found['n_passing']} of {found['n_candidates']}"
        lines.append(
            f"| {name} | {rate(audit['harmful'])} | {percent(audit['lowest_refusal'])} % | {passing} | "
            f"`{audit['verdict']}`: {REMARKS[audit['verdict']]} |"
        )
    return "\n".join(lines)


PICTURE_STYLE = (
    "text{font:14px system-ui,sans-serif;fill:#1f2328}.grid{stroke:#d0d7de}.before{fill:#9a6700}.after{fill:#0969da}"
    ".whisker{stroke:#1f2328;stroke-width:1.5}@media(prefers-color-scheme:dark){text{fill:#e6edf3}"
    ".grid{stroke:#3d444d}.before{fill:#d29922}.after{fill:#4493f8}.whisker{stroke:#e6edf3}}"
)


def picture(report: dict[str, Any]) -> str:
    """Return the rates of `make demo` before and after as an SVG: a bar each, with its interval."""
    left, width, top = 150, 520, 34

    def x(share: float) -> str:
        return f"{left + width * share:.1f}"

    shapes = []
    for tick in range(0, 101, 25):
        shapes.append(f'<path class="grid" d="M{x(tick / 100)} {top - 8}V{top + 168}"/>')
        shapes.append(f'<text x="{x(tick / 100)}" y="{top + 186}" text-anchor="middle">{tick} %</text>')
    for row, kind in enumerate(KINDS):
        y = top + 58 * row
        shapes.append(f'<text x="{left - 12}" y="{y + 25}" text-anchor="end">{kind} prompts</text>')
        for number, side in enumerate(("before", "after")):
            one, middle = report[side][f"{kind}_refusal_rate"], y + 11 + 20 * number
            bar = f'x="{left}" y="{middle - 8}" width="{width * one["rate"]:.1f}" height="16"'
            shapes.append(f'<rect class="{side}" {bar}><title>{kind}, {side}: {rate(one)}</title></rect>')
            shapes.append(f'<path class="whisker" d="M{x(one["low"])} {middle}H{x(one["high"])}"/>')
    for number, side in enumerate(("before", "after")):
        shapes.append(f'<rect class="{side}" x="{left + 110 * number}" y="6" width="12" height="12"/>')
        shapes.append(f'<text x="{left + 18 + 110 * number}" y="17">{side}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 232" width="700" height="232" role="img">'
        f"<title>Share of prompts refused before and after the edit, with 95 % intervals</title>"
        f"<style>{PICTURE_STYLE}</style>\n" + "\n".join(shapes) + "\n</svg>\n"
    )


def with_block(text: str, name: str, block: str) -> str:
    """Return a document in which the block of this name is replaced.

    Raises:
        ValueError: the document has no such block, or several.
    """
    pattern = rf"(<!-- results: {re.escape(name)} -->\n).*?(<!-- end of results -->)"
    changed, n = re.subn(pattern, lambda found: f"{found[1]}{block}\n{found[2]}", text, flags=re.DOTALL)
    if n != 1:
        raise ValueError(f"there are {n} blocks named {name}, expected one")
    return changed


def documents(results: Path, repository: Path) -> dict[Path, str]:
    """Return each document that holds results, as it should be."""
    demo = json.loads((results / "demo.json").read_text())
    audits = {name: json.loads((results / f"{name}.audit.json").read_text()) for name in MODELS}
    variants = {name: json.loads(file.read_text()) for name, file in _variants(results).items() if file.is_file()}
    procedures = json.loads((results / PROCEDURES).read_text()) if (results / PROCEDURES).is_file() else []
    quantised = json.loads((results / QUANTISATION).read_text()) if (results / QUANTISATION).is_file() else {}
    real = json.loads((results / REAL).read_text()) if (results / REAL).is_file() else None
    readme, docs = repository / "README.md", repository / "docs"
    page = docs / "results.md"
    text = with_block(page.read_text(encoding="utf-8"), "demo", demo_block(demo))
    text = with_block(text, "demo-real", real_block(real))
    refusals, kinds, layouts = (docs / f"{name}.md" for name in ("extended_refusals", "variants", "quantisation"))
    of_refusals = with_block(refusals.read_text(encoding="utf-8"), "audits", audits_block(audits))
    of_variants = kinds.read_text(encoding="utf-8")
    for name, found in variants.items():
        of_variants = with_block(of_variants, name, variants_block(found))
    return {
        readme: with_block(readme.read_text(encoding="utf-8"), "rates", rates_block(demo)),
        page: with_block(text, "audits", summary_block(audits)),
        docs / "pictures" / "demo.svg": picture(demo),
        refusals: with_block(of_refusals, "procedures", procedures_block(procedures)),
        layouts: with_block(layouts.read_text(encoding="utf-8"), "quantisation", quantisation_block(quantised)),
        kinds: of_variants,
    }


def _variants(results: Path) -> dict[str, Path]:
    """Return where the variants on the demo model and on the aligned one are filed, by the name of their table."""
    return {"variants": results / "variants.json", "variants-real": results / "variants.real.json"}


def take(
    demo: Path | None,
    audits: Path | None,
    variants: Path | None,
    results: Path,
    real: Path | None = None,
    procedures: Path | None = None,
    variants_real: Path | None = None,
) -> None:
    """Copy new measurements to the results of the repository."""
    results.mkdir(parents=True, exist_ok=True)
    if demo is not None:
        report = json.loads((demo / "report.json").read_text())
        (results / "demo.json").write_text(json.dumps(report, indent=2) + "\n")
    if real is not None:
        report = json.loads((real / "report.json").read_text())
        (results / REAL).write_text(json.dumps(report, indent=2) + "\n")
    if audits is not None:
        for name in MODELS:
            report = json.loads((audits / f"{name}.audit.json").read_text())
            (results / f"{name}.audit.json").write_text(json.dumps(report, indent=2) + "\n")
    if procedures is not None:
        # Models that were not tried anew stay as they are filed.
        filed = json.loads((results / PROCEDURES).read_text()) if (results / PROCEDURES).is_file() else []
        by_model = {one["model"]: one for one in filed}
        for name in PROCEDURE_MODELS:
            file = procedures / f"{name}.result.json"
            if file.is_file():
                by_model[name] = json.loads(file.read_text())
        lines = [by_model[name] for name in PROCEDURE_MODELS if name in by_model]
        (results / PROCEDURES).write_text(json.dumps(lines, indent=2) + "\n")
    given = {"variants": variants, "variants-real": variants_real}
    for name, file in _variants(results).items():
        taken = given[name]
        if taken is not None:
            reports = json.loads(taken.read_text())
            kept = {label: {part: {key: one[part][key] for key in keys} for part, keys in KEPT.items()}
                    for label, one in reports.items()}  # fmt: skip
            file.write_text(json.dumps(kept, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="directory of `make demo`")
    parser.add_argument("--real", type=Path, help="directory of `make demo-real`")
    parser.add_argument("--audits", type=Path, help="directory of benchmarks/extended_refusal/run.py")
    parser.add_argument("--procedures", type=Path, help="directory of benchmarks/extended_refusal/procedures.py")
    parser.add_argument("--variants", type=Path, help="what benchmarks/variants.py wrote")
    parser.add_argument("--variants-real", type=Path, help="the same on the model of `make demo-real`")
    arguments = parser.parse_args()
    take(
        arguments.demo,
        arguments.audits,
        arguments.variants,
        RESULTS,
        arguments.real,
        arguments.procedures,
        arguments.variants_real,
    )
    for path, text in documents(RESULTS, REPOSITORY).items():
        path.write_text(text, encoding="utf-8")
