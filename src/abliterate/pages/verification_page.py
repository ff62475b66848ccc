"""The page of a verification: the verdict, what failed, the direction in the stream, and every edited tensor."""

from pathlib import Path

from abliterate.pages.charts import Figure, Line, Threshold, line_chart
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
from abliterate.release.report import LogitCheck, PartialCheck, StreamCheck, VerificationReport

_VERDICTS = {
    "verified": "Verified: what the record says was done, and nothing else.",
    "partial": "Verified as a partial edit: what the record says was done; a part of the stream keeps the direction.",
    "failed": "Not verified.",
}


def write_verification_page(report: VerificationReport, directory: Path, *, command: str) -> Path:
    """Write `index.html` to a directory, and its chart as an SVG file beside it; return the page's path.

    Args:
        report: What was found.
        directory: Where it goes.
        command: The command line that made it.
    """
    blocks = [headline(_VERDICTS[report.verdict]), *map(paragraph, report.failures)]
    if report.partial is not None:
        blocks.append(facts(_left(report.partial)))
    sections = [Section(heading="Verdict", blocks=(*blocks, *map(paragraph, report.notes)))]
    if report.stream is not None:
        chart = _chart(report.stream)
        write_figures(directory, {"stream": chart})
        sections.append(_stream(report.stream, chart))
    if report.logits is not None:
        sections.append(_logits(report.logits))
    sections += [_tensors(report), _provenance(report, command)]
    subtitle = f"held against {report.base}" if report.files.against_base else "held against its record"
    return write_page(directory, title=f"Verification of {report.checkpoint}", subtitle=subtitle, sections=sections)


def _left(check: PartialCheck) -> list[tuple[str, object]]:
    pairs: list[tuple[str, object]] = [
        ("Why", check.reason),
        ("What still writes", ", ".join(check.modules) or "nothing"),
    ]
    if check.edited_mean is not None and check.base_mean is not None:
        pairs.append(("|R·h|/|h| on average, and in the base", f"{check.edited_mean:.2e}, {check.base_mean:.2e}"))
    return pairs


def _chart(check: StreamCheck) -> Figure:
    lines = [
        Line(name="base, largest", values=[each.base_max for each in check.layers]),
        Line(
            name="edited, largest over the largest |h| so far",
            values=[each.edited_accumulated for each in check.layers],
        ),
    ]
    if any(each.ablated_max is not None for each in check.layers):
        lines.append(Line(name="base ablated by hooks, largest", values=[each.ablated_max for each in check.layers]))
    return line_chart(
        lines,
        caption=f"|R·h|/|h| in the residual stream at every block's input and, last, at the final norm's: "
        f"{check.n_prompts} prompts, {check.n_tokens} tokens, {check.dtype}",
        x_name="layer",
        thresholds=[Threshold(name="what rounding explains", value=check.tolerance)],
        scale="log",
    )


def _stream(check: StreamCheck, chart: Figure) -> Section:
    header = ["into", "base max", "base mean", "edited max", "edited mean", "ablated max"]
    rows = [
        [
            each.place,
            *(
                "-" if value is None else f"{value:.2e}"
                for value in (each.base_max, each.base_mean, each.edited_max, each.edited_mean, each.ablated_max)
            ),
        ]
        for each in check.layers
    ]
    judged = () if check.judged else (paragraph("Not judged: " + "; ".join(check.reasons)),)
    numbers = folded("All layers", [table(header, rows, caption="|R·h|/|h| over all tokens")])
    return Section(heading="The direction in the residual stream", blocks=(chart.html, *judged, numbers))


def _logits(check: LogitCheck) -> Section:
    pairs: list[tuple[str, object]] = [
        ("Largest difference, last token", f"{check.last.largest:.3g}"),
        ("Largest difference, all tokens", f"{check.all.largest:.3g}"),
        ("Relative to their size", f"{check.all.relative:.3g}"),
        ("What rounding explains", f"{check.tolerance:.3g}"),
    ]
    judged = () if check.judged else (paragraph("Not judged: " + "; ".join(check.reasons)),)
    return Section(heading="Logits beside those of the base ablated by hooks", blocks=(facts(pairs), *judged))


def _tensors(report: VerificationReport) -> Section:
    tensors = sorted(report.files.tensors, key=lambda check: -check.survivor)
    header = ["tensor", "role", "dtype", "before", "after", "survivor"]

    def row(index: int) -> list[object]:
        check = tensors[index]
        shares = (f"{value:.2e}" for value in (check.before.share, check.after.share, check.survivor))
        return [check.name, check.recorded.writer.role, check.dtype, *shares]

    caption = "|U·W|/|W| before and after, and the share that survives"
    rows = [row(index) for index in range(len(tensors))]
    blocks = [table(header, rows[:5], caption=f"{caption}: the five with most", n_text=3)] if rows else []
    if len(rows) > len(rows[:5]):
        blocks.append(folded(f"All {len(rows)} edited tensors", [table(header, rows, caption=caption, n_text=3)]))
    return Section(heading="Edited tensors, reread", blocks=tuple(blocks))


def _provenance(report: VerificationReport, command: str) -> Section:
    pairs: list[tuple[str, object]] = [
        ("Base", report.base),
        ("Its commit", report.base_revision or "local files"),
        ("Directions", report.k),
        ("Given, and span what the record says", "yes" if report.direction_given else "not given"),
        ("Unedited tensors compared", f"{report.files.bytes_compared / 1e6:.1f} MB"),
    ]
    return Section(heading="Where the numbers come from", blocks=(facts(pairs), commands([command])))
