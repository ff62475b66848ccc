"""The page of a refinement: the strengths over the layers, and the frontier that they were chosen from."""

from collections.abc import Sequence
from pathlib import Path

from abliterate.interventions.refinement_report import FrontierPoint, RefinementReport
from abliterate.pages.charts import Line, Threshold, line_chart
from abliterate.pages.page import Section, commands, facts, headline, paragraph, table, write_page


def write_refinement_page(report: RefinementReport, directory: Path, *, command: str) -> Path:
    """Write `index.html` to a directory and return its path.

    Args:
        report: what was found.
        directory: where the page goes.
        command: the command line that made it.
    """
    sections = [_result(report), _strengths(report), _frontier(report), _provenance(report, command)]
    subtitle = "strengths for each layer and role, by gradient"
    return write_page(directory, title=f"A gentler edit of {report.model}", subtitle=subtitle, sections=sections)


def _result(report: RefinementReport) -> Section:
    chosen, plain = report.chosen, report.plain
    kind = "borderline" if report.goal == "repair" else "harmful"
    held = ""
    if chosen.refused is not None:
        held = f" Of the harmful ones {chosen.refused} of {chosen.n_to_refuse} are still refused, as they are to be."
    return Section(
        heading="Result",
        blocks=(
            headline(
                f"{chosen.unanswered} of {chosen.n_to_answer} {kind} validation prompts are still not answered, at a "
                f"KL of {chosen.kl:.3f} nats a token on the replies that are to stay, where the direction at strength "
                f"1 leaves {plain.unanswered} at {plain.kl:.3f}.{held}"
            ),
            paragraph(
                f"The unchanged model refuses all of these {kind} prompts. No prompt of these was optimised on. Some "
                "of the direction stays in the stream."
            ),
        ),
    )


def _strengths(report: RefinementReport) -> Section:
    lines = [Line(name="attention", values=report.chosen.attn), Line(name="MLP", values=report.chosen.mlp)]
    caption = "Share of its layer's direction that is removed from what each writes; below 0 it grows"
    chart = line_chart(lines, caption=caption, x_name="layer", thresholds=[Threshold(name="all of it", value=1.0)]).html
    return Section(heading="Strengths over the layers", blocks=(chart,))


def _frontier(report: RefinementReport) -> Section:
    counted = ["not answered", *(["harmful refused"] if report.goal == "repair" else [])]
    header = ["", *counted, "refusal metric", "KL, first token", "KL", "cross-entropy", "change"]
    rows = [["the direction at strength 1", *_cells(report.plain)]]
    for point in report.frontier:
        name = f"pressure {point.pressure:g}"
        rows.append([f"{name}, chosen" if point == report.chosen else name, *_cells(point)])
    caption = "From the strongest pressure on the refusal score to the weakest; nats, on validation prompts"
    at = next(i for i, point in enumerate(report.frontier) if point == report.chosen)
    charts = [
        line_chart(
            [Line(name="KL on replies that are to stay", values=[point.kl for point in report.frontier])],
            caption="KL over the base's replies, nats a token",
            x_name="point of the frontier",
            thresholds=[Threshold(name="the direction at strength 1", value=report.plain.kl)],
            mark=(at, report.chosen.kl),
        ).html,
        line_chart(
            [Line(name="not answered", values=[100 * point.share_unanswered for point in report.frontier])],
            caption="Prompts that are to be answered and are not, %",
            x_name="point of the frontier",
            mark=(at, 100 * report.chosen.share_unanswered),
        ).html,
    ]
    return Section(heading="The frontier", blocks=(table(header, rows, caption=caption), *charts))


def _cells(point: FrontierPoint) -> Sequence[object]:
    change = point.cross_entropy / point.base_cross_entropy - 1
    return [
        f"{point.unanswered} of {point.n_to_answer}",
        *([] if point.refused is None else [f"{point.refused} of {point.n_to_refuse}"]),
        f"{point.metric:.2f}",
        f"{point.kl_first:.4f}",
        f"{point.kl:.4f}",
        f"{point.cross_entropy:.4f}",
        f"{change:+.1%}",
    ]


def _provenance(report: RefinementReport, command: str) -> Section:
    pairs: list[tuple[str, object]] = [
        ("direction (SHA-256)", report.direction_sha256),
        ("refusal tokens", " ".join(map(repr, report.refusal_tokens))),
        ("each layer's own direction read at position", report.position),
        *((f"{part.replace('_', ' ')} prompts used", f"{kept} of {n}") for part, (kept, n) in report.counts.items()),
        *((f"{name} version", version) for name, version in report.versions.items()),
    ]
    return Section(heading="How to get it again", blocks=(commands([command]), facts(pairs)))
