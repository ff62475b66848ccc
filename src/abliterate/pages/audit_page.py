"""The page of an audit: the verdict, every intervention beside the unchanged model, and what makes the verdict."""

from pathlib import Path

from abliterate.evaluation.audit_report import AuditedIntervention, AuditReport
from abliterate.evaluation.report import RefusalRate
from abliterate.pages.charts import Interval, interval_chart
from abliterate.pages.page import (
    Section,
    commands,
    facts,
    folded,
    headline,
    p_value_in_words,
    paragraph,
    share_in_words,
    table,
    write_page,
)

VERDICTS = {
    "single_direction": "Refusal rests on a single direction.",
    "few_directions": "Refusal rests on a few directions, not on one.",
    "not_mediated": "No direction or subspace that was tried carries refusal at a bearable cost.",
    "does_not_refuse": "The model does not refuse, so there is nothing to remove.",
}


def write_audit_page(report: AuditReport, directory: Path, *, command: str) -> list[Path]:
    """Write `index.html` and `audit.json` to a directory; return both.

    Args:
        report: the audit.
        directory: where the page goes.
        command: the command line that made it.
    """
    sections = [
        _verdict(report),
        *([_interventions(report)] if report.interventions else []),
        *([_candidates(report)] if report.candidates is not None else []),
        _thresholds(report),
        _provenance(report, command),
    ]
    page = write_page(
        directory,
        title=f"Audit of {report.model}",
        subtitle="how much of its refusal rests on one direction, and what it costs to take it away",
        sections=sections,
    )
    data = directory / "audit.json"
    report.save(data)
    return [page, data]


def _verdict(report: AuditReport) -> Section:
    rows: list[list[object]] = [["harmful", report.harmful.n, _rate(report.harmful), report.harmful.degenerate]]
    rows.append(["harmless", report.harmless.n, _rate(report.harmless), report.harmless.degenerate])
    if report.induced is not None:
        rows.append(["harmless, direction added", report.induced.n, _rate(report.induced), report.induced.degenerate])
    return Section(
        heading="Verdict",
        blocks=(
            headline(VERDICTS[report.verdict]),
            paragraph(f"Verdict {report.verdict}: {report.reason}."),
            table(
                ["prompts", "n", "refused", "degenerate"],
                rows,
                caption="The unchanged model on held-out prompts, Wilson 95 % intervals",
            ),
            paragraph(
                f"Under the strongest bearable intervention it refuses {report.lowest_refusal:.1%} of the harmful "
                "prompts it answers legibly. Empty, repetitive and incoherent replies are degenerate: neither refusal "
                f"nor answer. Greedy replies of at most {report.options.max_new_tokens} tokens."
            ),
        ),
    )


def _interventions(report: AuditReport) -> Section:
    before = report.harmful
    unchanged = Interval(series=0, value=before.rate, low=before.low, high=before.high)
    points = [("unchanged", [unchanged])]
    rows: list[list[object]] = []
    for one in report.interventions:
        name = _short(one)
        rate = one.harmful
        points.append((_short(one), [Interval(series=1, value=rate.rate, low=rate.low, high=rate.high)]))
        rise = "" if one.cross_entropy_rise is None else f"{one.cross_entropy_rise:+.3f}"
        rows.append(
            [
                name,
                _rate(rate),
                f"{one.remaining:.0%}",
                p_value_in_words(one.change.p_value),
                f"{one.coherence:.0%}",
                f"{one.divergence.first_token:.3f}",
                rise,
                "yes" if one.bearable else "no",
            ]
        )
    header = ["intervention by hooks", "refused", "left", "p (McNemar)", "coherent", "KL", "cross-entropy", "bearable"]
    return Section(
        heading="Interventions",
        blocks=(
            interval_chart(
                points, series=("unchanged", "intervention"), caption="Share of harmful prompts refused, 95 % intervals"
            ).html,
            table(header, rows, caption="Held-out harmful prompts; KL and cross-entropy on harmless ones, in nats"),
            paragraph(
                "Ablate P, L and subtract P, L: the direction of position P, layer L; rank k: k directions ablated. "
                "Left is the share of the refusals that remains among legible replies. KL is that of the first token; "
                "cross-entropy is the rise in nats a token on the unchanged model's own harmless answers."
            ),
        ),
    )


def _candidates(report: AuditReport) -> Section:
    found = report.candidates
    assert found is not None
    if found.n_passing is None:
        text = "No first token tells its refusals, so candidates were ranked by separation and by their replies alone."
    else:
        text = f"{found.n_passing} of {found.n_candidates} candidates pass the published selection."
    if report.stability is not None:
        text += (
            f" When the training prompts are resampled ({report.stability.n_resamples} times), the best direction's "
            f"cosine with itself is {report.stability.mean_cosine:.3f} on average, "
            f"{report.stability.low_cosine:.3f} at the 5th percentile."
        )
    rows = [
        [
            f"{one.position}, {one.layer}",
            *("" if value is None else f"{value:.3f}" for value in (one.bypass, one.induce, one.kl)),
            f"{one.separation:.2f}",
            f"{one.answered}/{one.n_prompts}",
        ]
        for one in found.screened
    ]
    header = ["position, layer", "bypass", "induce", "KL", "separation", "answered"]
    return Section(
        heading="Candidates",
        blocks=(
            paragraph(text),
            folded(
                "The screened candidates",
                [table(header, rows, caption="Screened by ablation on harmful validation prompts, the best first")],
            ),
        ),
    )


def _thresholds(report: AuditReport) -> Section:
    limits, selection = report.options.thresholds, report.options.selection
    rows = [
        ["the model refuses", f"at least {limits.min_refusal:.0%} of harmful prompts"],
        ["refusal is defeated", f"at most {limits.max_remaining:.0%} of the refusals are left"],
        ["the cost is bearable", f"at least {limits.min_coherence:.0%} of the replies are coherent"],
        ["and", f"cross-entropy rises by at most {limits.max_cross_entropy_rise:g} nats a token"],
        ["a candidate passes", f"induce at least {selection.induce:g}, KL at most {selection.kl:g} nats"],
    ]
    return Section(
        heading="What makes the verdict",
        blocks=(table(["statement", "when"], rows, caption="Thresholds", n_text=2),),
    )


def _provenance(report: AuditReport, command: str) -> Section:
    options = report.options
    pairs: list[tuple[str, object]] = [("Model", report.model)]
    if report.revision is not None:
        pairs.append(("Revision", report.revision))
    pairs.append(("Run in", report.dtype))
    pairs.append(("Directions found with", f"{options.n_train} prompts of each kind, {options.n_val} to select"))
    pairs.append(("Seed", options.seed))
    for kind, chosen in report.prompt_sets.items():
        pairs.append((f"{kind.capitalize()} prompts", f"{chosen['name']}, {chosen['n']}, SHA-256 {chosen['sha256']}"))
    pairs += [(f"Version of {name}", version) for name, version in report.versions.items()]
    return Section(heading="Where the numbers come from", blocks=(facts(pairs), commands([command])))


def _short(one: AuditedIntervention) -> str:
    if one.method == "rank":
        return f"rank {one.rank}"
    return f"{'ablate' if one.method == 'single' else 'subtract'} {one.position}, {one.layer}"


def _rate(rate: RefusalRate) -> str:
    return share_in_words(rate.rate, low=rate.low, high=rate.high)
