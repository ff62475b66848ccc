"""The page of an extraction: the chosen candidate, all scores over the layers, and how to get them again."""

from collections.abc import Sequence
from pathlib import Path

from abliterate.extraction.judgement import RefusalEvidence
from abliterate.extraction.report import ExtractionReport
from abliterate.extraction.score_report import ScoreTable
from abliterate.extraction.selection import CandidateScore, failed_thresholds, nearest_candidates
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

_CAPTIONS = {
    "bypass": "Bypass: refusal metric on harmful prompts with the candidate ablated (lower is better)",
    "induce": "Induce: refusal metric on harmless prompts with the candidate added (above the threshold)",
    "kl": "KL of the first answer token on harmless prompts, ablated, in nats (below the threshold)",
}


def write_extraction_page(
    scores: ScoreTable, directory: Path, *, command: str, report: ExtractionReport | None = None
) -> Path:
    """Write `index.html` to a directory, and its charts as SVG files beside it; return the page's path.

    Args:
        scores: all candidates and what they are judged by.
        directory: where the page goes.
        command: the command line that made it.
        report: the extraction; None when no candidate passes.
    """
    charts = _charts(scores)
    write_figures(directory, charts)
    sections = [
        _choice(scores, report),
        Section(heading="Scores over the layers", blocks=tuple(chart.html for chart in charts.values())),
        *_robustness(report),
        _thresholds(scores),
        _all_scores(scores),
        _provenance(report, command),
    ]
    subtitle = "the candidate that passes and ablates best" if scores.selected else "no candidate passes"
    return write_page(directory, title=f"Refusal direction of {scores.title}", subtitle=subtitle, sections=sections)


def _choice(scores: ScoreTable, report: ExtractionReport | None) -> Section:
    header = ["candidate", "position", "layer", "bypass", "induce", "KL", "fails"]
    if scores.selected is None:
        nearest = nearest_candidates(
            scores.scores, thresholds=scores.thresholds, n_layers=scores.n_layers, gap=scores.gap
        )
        rows = [[f"{i}", *_cells(one.candidate), "; ".join(one.failed)] for i, one in enumerate(nearest, 1)]
        return Section(
            heading="Result",
            blocks=(
                headline("No candidate direction passes the selection."),
                table(header, rows, caption="The nearest candidates, and what each fails"),
            ),
        )
    chosen = scores.selected
    text = (
        f"Position {chosen.position}, layer {chosen.layer} of {scores.n_layers}: ablating it takes the refusal metric "
        f"on harmful prompts from {scores.baseline_harmful:.2f} to {_number(chosen.bypass)}."
    )
    further = () if report is None else report.further
    rows = [["selected", *_cells(chosen)], *([f"direction {i}", *_cells(score)] for i, score in enumerate(further, 2))]
    if report is not None and report.together is not None:
        rows.append(["all together", "", "", _number(report.together.bypass), "", _number(report.together.kl)])
    passing = "" if report is None else f" {report.n_passing} of {report.n_scored} scored candidates are known to pass."
    return Section(
        heading="Result",
        blocks=(
            headline(text),
            table(header[:-1], rows, caption="The selected candidates" if further else "The selected candidate"),
            *_confirmed(report),
            paragraph(
                "The refusal metric is the log-odds of a refusal token as the first token of the answer, in nats."
                + passing
            ),
        ),
    )


def _charts(scores: ScoreTable) -> dict[str, Figure]:
    thresholds = {
        "bypass": [Threshold(name="unchanged model", value=scores.baseline_harmful, colour="--quiet")],
        "induce": [
            Threshold(name="threshold", value=scores.thresholds.induce),
            Threshold(name="unchanged model", value=scores.baseline_harmless, colour="--quiet"),
        ],
        "kl": [Threshold(name="threshold", value=scores.thresholds.kl)],
    }
    charts = {}
    for name, levels in thresholds.items():
        value = getattr(scores.selected, name) if scores.selected else None
        charts[name] = line_chart(
            _lines(scores, name),
            caption=_CAPTIONS[name],
            x_name="layer",
            thresholds=levels,
            mark=(scores.selected.layer, value) if scores.selected and value is not None else None,
            at=("layer limit", scores.thresholds.layer_limit(scores.n_layers) - 0.5),
            scale="symlog" if name == "kl" else "linear",
        )
    return charts


def _lines(scores: ScoreTable, name: str) -> list[Line]:
    lines = []
    for position in sorted({score.position for score in scores.scores}):
        values: list[float | None] = [None] * scores.n_layers
        for score in scores.scores:
            if score.position == position:
                values[score.layer] = getattr(score, name)
        token = scores.tokens[position] if -position <= len(scores.tokens) else ""
        if any(value is not None for value in values):
            lines.append(Line(name=f"{position}: {token!r}", values=values))
    return lines


def _robustness(report: ExtractionReport | None) -> list[Section]:
    if report is None or report.robustness is None:
        return []
    found = report.robustness
    rows: list[list[object]] = [[w.position, w.layer, f"{w.share:.1%}"] for w in found.winners]
    rows.append(["nothing passes", "", f"{found.share_none:.1%}"])
    pairs: list[tuple[str, object]] = [
        ("Resamplings", found.n_resamples),
        ("Cosine with the chosen direction, mean", f"{found.mean_cosine:.4f}"),
        ("5th percentile", f"{found.low_cosine:.4f}"),
        ("95th percentile", f"{found.high_cosine:.4f}"),
    ]
    text = (
        "Training prompts drawn again with replacement give another direction at the same position and layer; "
        "validation prompts drawn again give other scores of the same candidates, and perhaps another choice."
    )
    caption = "What would be chosen, by share of resamplings"
    return [
        Section(
            heading="How much hangs on the prompts",
            blocks=(paragraph(text), facts(pairs), table(["position", "layer", "share"], rows, caption=caption)),
        )
    ]


def _thresholds(scores: ScoreTable) -> Section:
    limits = scores.thresholds
    pairs: list[tuple[str, object]] = [
        ("Candidates", scores.recipe),
        ("KL at most", f"{limits.kl:g} nats"),
        ("Induce at least", f"{limits.induce:g}"),
        ("Layer below", f"{limits.layer_limit(scores.n_layers)} of {scores.n_layers}"),
        ("Unchanged model, harmful prompts", f"{scores.baseline_harmful:.3f}"),
        ("Unchanged model, harmless prompts", f"{scores.baseline_harmless:.3f}"),
    ]
    return Section(heading="Candidates and thresholds", blocks=(facts(pairs),))


def _all_scores(scores: ScoreTable) -> Section:
    scored = [score for score in scores.scores if score.induce is not None]
    rows = [
        [
            f"{score.position}, {score.layer}",
            *map(_number, (score.bypass, score.induce, score.kl)),
            "; ".join(failed_thresholds(score, scores.thresholds, scores.n_layers)) or "-",
        ]
        for score in scored
    ]
    note = (
        "Candidates are scored as far as the choice depends on them: means of those that are far from passing are "
        "estimated from some of the prompts. --exhaustive scores all of them on all prompts."
    )
    header = ["position, layer", "bypass", "induce", "KL", "fails"]
    numbers = folded(f"All {len(scored)} scored candidates", [table(header, rows, caption="Scores of the candidates")])
    return Section(heading="The numbers", blocks=(paragraph(note), numbers))


def _provenance(report: ExtractionReport | None, command: str) -> Section:
    blocks: list[str] = []
    if report is not None:
        tokens = ", ".join(repr(token.text) for token in report.refusal_tokens)
        kept = [
            (name.replace("_", " "), f"{count.kept} of {count.sampled} kept") for name, count in report.counts.items()
        ]
        pairs: list[tuple[str, object]] = [
            ("Model", report.model),
            ("Revision", report.revision or "local files"),
            ("Width of the residual stream", report.d_model),
            ("Refusal tokens", tokens),
            *(
                ("Forced start of the answer", repr(report.response_prefix))
                for _ in range(bool(report.response_prefix))
            ),
            *kept,
            *_judged(report.refusal),
            ("Norm of the difference in means", f"{report.direction_norm:.4g}"),
        ]
        blocks.append(facts(pairs))
    return Section(heading="Where the numbers come from", blocks=(*blocks, commands([command])))


def _confirmed(report: ExtractionReport | None) -> list[str]:
    if report is None or not report.confirmed:
        return []
    rows = [
        [one.position, one.layer, f"{one.unanswered} of {one.n_harmful}", f"{one.induced} of {one.n_harmless}"]
        for one in report.confirmed
    ]
    header = ["position", "layer", "not answered, ablated", "refused, added"]
    return [table(header, rows, caption="Replies to validation prompts, all refused or all answered unchanged")]


def _judged(evidence: RefusalEvidence) -> list[tuple[str, object]]:
    """Say what prompts were filtered by, and what candidates were scored by."""
    pairs: list[tuple[str, object]] = [
        ("Prompts filtered by", f"{evidence.filter}: {evidence.reason}"),
        ("Scored by", evidence.measure + "".join(f", {opening!r}" for opening in evidence.openings)),
        ("Zero of the scores", f"{evidence.zero:.2f} nats"),
    ]
    if evidence.replies is not None:
        pairs += [
            (f"Replies to {part.replace('_', ' ')} prompts", f"{counts.refused} of {counts.n} refuse")
            for part, counts in evidence.replies.items()
        ]
    if evidence.coverage is not None:
        pairs.append(("Refusals that begin with a refusal token", f"{evidence.coverage:.1%}"))
    if evidence.accuracy is not None and evidence.accuracy_at_0 is not None:
        told = f"{evidence.accuracy:.1%} at best, {evidence.accuracy_at_0:.1%} at 0"
        pairs.append(("Refused and answered prompts told apart", told))
    return pairs


def _cells(score: CandidateScore) -> Sequence[object]:
    return [score.position, score.layer, *map(_number, (score.bypass, score.induce, score.kl))]


def _number(value: float | None) -> str:
    return "not scored" if value is None else f"{value:.3f}"
