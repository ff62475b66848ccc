"""The page of a trace: where in a model a direction shows, and which heads write it."""

from pathlib import Path

from abliterate.interventions.trace_report import LAST_TOKEN, TracedSet, TraceReport
from abliterate.pages.charts import Figure, Line, bar_chart, heat_map, line_chart
from abliterate.pages.page import (
    Section,
    commands,
    facts,
    folded,
    headline,
    paragraph,
    table,
    write_figures,
    write_page,
)


def write_trace_page(report: TraceReport, directory: Path, *, command: str) -> Path:
    """Write `index.html` to a directory, and its charts as SVG files beside it; return the page's path.

    Args:
        report: The trace.
        directory: Where the page goes.
        command: The command line that made it.
    """
    charts = {"cosines": _cosines(report), **_heads(report)}
    write_figures(directory, charts)
    sections = [_where(report, charts["cosines"])]
    if report.heads_unavailable is None:
        sections.append(_who(report, charts))
    if report.prompt is not None:
        sections.append(_tokens(report))
    sections.append(_provenance(report, command))
    return write_page(
        directory,
        title=f"A direction traced in {report.model}",
        subtitle=f"of {report.n_layers} blocks",
        sections=sections,
    )


def _cosines(report: TraceReport) -> Figure:
    lines = [
        Line(name=_name(each), values=each.cosines[LAST_TOKEN].mean, spread=each.cosines[LAST_TOKEN].sd)
        for each in report.sets
    ]
    return line_chart(
        lines,
        caption="Cosine of the residual stream with the direction at the last token, mean and standard deviation",
        x_name="layer (input of the block; the last is the final stream)",
        at=None if report.layer is None else (f"layer {report.layer}", report.layer),
    )


def _heads(report: TraceReport) -> dict[str, Figure]:
    found = {each.label: each.contributions.heads for each in report.sets if each.contributions is not None}
    if not found:
        return {}
    first, heads = next(iter(found.items()))
    greatest = max((abs(value) for row in heads for value in row), default=0.0) or 1.0
    cells = heat_map(
        [(f"layer {layer}", [value / greatest for value in row]) for layer, row in enumerate(heads)],
        caption=f"Direct contribution of each head at the last token, {first}",
        x_name="head",
        legend=f"along the direction, at most {greatest:.3g}",
        negative="against it",
    )
    bars = bar_chart(
        [
            (f"layer {top.layer}, head {top.head}", [each[top.layer][top.head] for each in found.values()])
            for top in report.top_heads
        ],
        series=list(found),
        caption="The heads that write most of the direction, direct contribution at the last token",
    )
    return {"heads": cells, "top_heads": bars}


def _where(report: TraceReport, chart: Figure) -> Section:
    rows = [
        [layer, *(f"{each.cosines[LAST_TOKEN].mean[layer]:+.3f}" for each in report.sets)]
        for layer in range(report.n_layers + 1)
    ]
    first = report.sets[0].cosines[LAST_TOKEN].mean
    layer = max(range(len(first)), key=lambda index: abs(first[index]))
    text = f"It shows most on {report.sets[0].label} prompts at layer {layer}: cosine {first[layer]:+.2f}"
    others = [f"{each.cosines[LAST_TOKEN].mean[layer]:+.2f} on {each.label}" for each in report.sets[1:]]
    header = ["layer", *(each.label for each in report.sets)]
    return Section(
        heading="Where it shows",
        blocks=(
            headline(", ".join([text, *others]) + "."),
            chart.html,
            folded("All layers", [table(header, rows, caption="Mean cosine at the last token")]),
        ),
    )


def _who(report: TraceReport, charts: dict[str, Figure]) -> Section:
    blocks = [charts[name].html for name in ("top_heads", "heads") if name in charts]
    attention = [
        [
            f"layer {head.layer}, head {head.head}",
            each.label,
            *(f"{share:.1%}" for share in (head.template, head.instruction, head.suffix, head.post_instruction)),
        ]
        for each in report.sets
        for head in each.attention or ()
    ]
    if attention:
        header = ["head", "prompts", "template before", "instruction", "suffix", "post-instruction"]
        caption = "Where these heads look from the last token"
        blocks.append(table(header, attention, caption=caption, n_text=2))
    elif report.attention_unavailable is not None:
        blocks.append(paragraph(f"Where these heads look is not known: {report.attention_unavailable}."))
    return Section(heading="Which heads write it", blocks=tuple(blocks))


def _tokens(report: TraceReport) -> Section:
    assert report.prompt is not None
    rows = [
        [repr(token), f"{component:+.3f}"]
        for token, component in zip(report.prompt.tokens, report.prompt.components, strict=True)
    ]
    caption = f"Component along the direction at the input of block {report.prompt.layer}"
    return Section(heading="One prompt", blocks=(table(["token", "component"], rows, caption=caption),))


def _provenance(report: TraceReport, command: str) -> Section:
    pairs: list[tuple[str, object]] = [
        ("Direction", report.direction_sha256),
        ("Its layer", "not known" if report.layer is None else report.layer),
        ("Attention heads", f"none traced: {report.heads_unavailable}" if report.heads_unavailable else report.n_heads),
        ("Post-instruction tokens", ", ".join(map(repr, report.post_instruction_tokens))),
    ]
    if report.suffix is not None:
        pairs.append(("Suffix", f"{report.suffix.text!r}, {report.suffix.n_tokens} tokens"))
    gaps = [each.contributions.largest_gap for each in report.sets if each.contributions is not None]
    if gaps:
        pairs.append(("Contributions and component differ by at most", f"{max(gaps):.2e}"))
    return Section(heading="Where the numbers come from", blocks=(facts(pairs), commands([command])))


def _name(traced: TracedSet) -> str:
    return f"{traced.label} (n={traced.n_prompts})"
