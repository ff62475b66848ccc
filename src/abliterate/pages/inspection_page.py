"""The page of an inspection: the verdict, a map of layers by parts, every changed tensor, and what comes along."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from abliterate.files import write_json
from abliterate.inspection.report import ChangedTensor, InspectionReport, PairReading
from abliterate.pages.charts import heat_map
from abliterate.pages.page import Section, commands, facts, folded, headline, paragraph, table, write_page

VERDICTS = {
    "identical": "It is the base.",
    "requantised": "It is the base, rounded to another grid.",
    "directional": "Directions were projected out of it, or added, and nothing else was done.",
    "low_rank": "A change of low rank was merged into it.",
    "fine_tuned": "More was changed than a projection or an adapter does.",
    "unrelated": "It is not made from this base.",
}
# Strengths beyond this are as dark as it; reflections have 2.
_DARKEST = 1.0


def write_inspection_page(report: InspectionReport, directory: Path, *, command: str) -> list[Path]:
    """Write `index.html` and `inspection.json` to a directory; return both.

    Args:
        report: the inspection.
        directory: where the page goes.
        command: the command line that made it.
    """
    sections = []
    if report.pair is not None:
        sections += [_verdict(report.pair), *_map(report.pair), _tensors(report.pair)]
    if report.tensors:
        sections.append(_component(report))
    sections += [_record(report), _provenance(report, command)]
    page = write_page(
        directory,
        title=f"Inspection of {report.model}",
        subtitle=f"beside {report.base}" if report.base is not None else "without a base",
        sections=sections,
    )
    data = directory / "inspection.json"
    write_json(data, asdict(report))
    return [page, data]


def _verdict(pair: PairReading) -> Section:
    words = [word for word in ("exact", "partial", "restored_norms") if getattr(pair, word)]
    found = pair.directions
    rows: list[tuple[str, object]] = [
        ("tensors", pair.tensors),
        ("same bytes", pair.equal_bytes),
        ("same numbers in other bytes", pair.equal_numbers),
        ("rounded", pair.rounded),
        ("edited", pair.edited),
        ("files changed", f"{pair.shards_changed} of {pair.shards}"),
        ("added, missing, of another shape", f"{len(pair.added)}, {len(pair.missing)}, {len(pair.reshaped)}"),
        ("config.json differs in", ", ".join(pair.config_changes) or "nothing"),
        ("other files that differ", ", ".join(pair.files_changed) or "none"),
    ]
    if found is not None:
        rows.append(("directions", f"{found.k}, {found.scope}, from {found.tensors} tensors"))
        if found.cosines:
            rows.append(("cosine with the given", ", ".join(f"{cosine:.4f}" for cosine in found.cosines)))
    return Section(
        heading="Verdict",
        blocks=(
            headline(VERDICTS[pair.verdict]),
            paragraph(f"Verdict {', '.join([pair.verdict, *words])}: {pair.reason}."),
            facts(rows),
            *(paragraph(note) for note in pair.notes),
        ),
    )


def _map(pair: PairReading) -> list[Section]:
    layers = 1 + max((tensor.layer for tensor in pair.changed if tensor.layer is not None), default=-1)
    if not layers:
        return []
    figures = []
    for key, what, dark in (
        ("strength", "Strength of the projection, by part and layer", "1 or more: taken out whole"),
        ("change", "Size of the change, |D|/|W|, by part and layer", "the largest"),
    ):
        rows = [(part, _cells(pair.changed, part, key, layers)) for part in _names(pair.changed)]
        largest = max((value for _, values in rows for value in values if value is not None), default=0.0)
        scale = _DARKEST if key == "strength" else largest
        if not largest or not scale:
            continue
        scaled = [(part, [None if value is None else value / scale for value in values]) for part, values in rows]
        figures.append(heat_map(scaled, caption=what, x_name="layer", legend=dark).html)
    return [Section(heading="Layers by parts", blocks=tuple(figures))] if figures else []


def _names(changed: Sequence[ChangedTensor]) -> list[str]:
    return list(dict.fromkeys(_end(tensor) for tensor in changed if tensor.layer is not None))


def _end(tensor: ChangedTensor) -> str:
    parts = tensor.name.removesuffix(".weight").split(".")
    return f"{tensor.part}: {parts[-1]}"


def _cells(changed: Sequence[ChangedTensor], part: str, key: str, layers: int) -> list[float | None]:
    cells: list[float | None] = [None] * layers
    for tensor in changed:
        value = getattr(tensor, key)
        if tensor.layer is not None and _end(tensor) == part and value is not None:
            cells[tensor.layer] = max(value, cells[tensor.layer] or 0.0)
    return cells


def _tensors(pair: PairReading) -> Section:
    header = ["tensor", "kind", "|D|/|W|", "rounding", "rank", "strength", "left", "cosine", "lengths kept"]
    rows = [
        [
            tensor.name,
            tensor.kind,
            f"{tensor.change:.2e}",
            f"{tensor.rounding:.1e}",
            "full" if tensor.rank is None else tensor.rank,
            "" if tensor.strength is None else f"{tensor.strength:.3f}",
            "" if tensor.left is None else f"{tensor.left:.2%}",
            "" if tensor.cosine is None else f"{tensor.cosine:.4f}",
            tensor.kept or "",
        ]
        for tensor in pair.changed
    ]
    limits = [[name, f"{value:g}"] for name, value in pair.thresholds.items()]
    return Section(
        heading="Changed tensors",
        blocks=(
            folded(
                f"{len(rows)} tensors whose numbers are not the base's",
                (table(header, rows, caption="D = W' - W; norms are Frobenius norms", n_text=2),),
            ),
            folded("Thresholds", (table(["threshold", "value"], limits, caption="What the verdict is made by"),)),
        ),
    )


def _component(report: InspectionReport) -> Section:
    rows = [
        [
            role.role,
            role.tensors,
            f"{role.component:.2e}",
            f"{role.largest:.2e}",
            "" if role.left is None else f"{role.left:.2%}",
        ]
        for role in report.roles
    ]
    return Section(
        heading="What the writers have of the directions",
        blocks=(
            table(["role", "tensors", "|U W|/|W|", "largest", "share of the base's"], rows, caption="By role"),
            paragraph(f"A matrix of random numbers has {report.random:.2e}."),
        ),
    )


def _record(report: InspectionReport) -> Section:
    record = report.record
    rows: list[tuple[str, object]] = [("record", record.record or "none")]
    rows += [(name, value) for name, value in record.claims.items() if value is not None]
    rows += [("the card's base_model", record.base_model or "none"), ("its tags", ", ".join(record.tags) or "none")]
    wrong = [paragraph(f"The record does not describe the bytes: it {problem}.") for problem in record.problems]
    return Section(heading="What it says of itself", blocks=(*wrong, facts(rows)))


def _provenance(report: InspectionReport, command: str) -> Section:
    rows = [("model", report.model), ("base", report.base or "none"), ("model type", report.model_type)]
    return Section(heading="How this was made", blocks=(facts(rows), commands([command])))
