"""The page of an evaluation: what it found, how sure that is, and how to get it again."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from abliterate.evaluation.judges import JudgedRate
from abliterate.evaluation.recognition import Recognition
from abliterate.evaluation.report import CategoryRate, EvaluationReport, RefusalRate
from abliterate.files import JsonLines
from abliterate.pages.charts import Interval, Part, interval_chart, share_chart
from abliterate.pages.page import (
    Section,
    commands,
    facts,
    folded,
    headline,
    p_value_in_words,
    paragraph,
    quoted,
    share_in_words,
    table,
    write_page,
)

_NAMES = {"harmful": "Harmful", "harmless": "Harmless", "borderline": "Borderline"}
_CLASS_COLOURS = (
    ("refusal", "--base"),
    ("deflection", "--third"),
    ("answer", "--answer"),
    ("degenerate", "--fifth"),
)


def write_evaluation_page(
    report: EvaluationReport, directory: Path, *, command: str, completions: Path | None = None
) -> list[Path]:
    """Write `index.html` and `evaluation.json` to a directory; return both.

    Args:
        report: the evaluation.
        directory: where the page goes.
        command: the command line that made it.
        completions: a file that `--save-completions` wrote, to put into the page; None keeps completions out of it.
    """
    sections = [
        _refusals(report),
        _classes(report),
        *([_budgets(report)] if any(rate.budgets for rate in report.rates.values()) else []),
        *([_parts(report)] if report.parts else []),
        *([_damage(report)] if report.measurements else []),
        *([_recognition(report.recognition)] if report.recognition else []),
        *([_judges(report)] if report.judges else []),
        *([_tasks(report)] if report.capability else []),
        *([_categories(report)] if any(report.categories.values()) else []),
        _provenance(report, command),
        *([_completions(completions)] if completions is not None else []),
    ]
    subtitle = f"compared with {report.base}" if report.base else "measured by itself, without a base"
    page = write_page(directory, title=f"Evaluation of {report.model}", subtitle=subtitle, sections=sections)
    data = directory / "evaluation.json"
    report.save(data)
    return [page, data]


def _refusals(report: EvaluationReport) -> Section:
    before = report.base_rates
    header = ["prompts", "n", *(["base"] if before else []), "model", *(["change", "p (McNemar)"] if before else [])]
    rows, points = [], []
    for kind, rate in report.rates.items():
        row: list[object] = [_NAMES.get(kind, kind), rate.n]
        row += [_rate(before[kind])] if before else []
        row += [_rate(rate)]
        if kind in report.changes:
            change = report.changes[kind]
            row += [f"{100 * change.difference:+.1f} points", p_value_in_words(change.p_value)]
        rows.append(row)
        points.append((_NAMES.get(kind, kind), _intervals(before[kind] if before else None, rate)))
    return Section(
        heading="Refusal rates",
        blocks=(
            headline(_sentence(report)),
            table(header, rows, caption="Refusal rates with Wilson 95 % intervals"),
            interval_chart(
                points,
                series=("base", "model") if before else ("model",),
                caption="Share of prompts refused, with 95 % intervals",
            ).html,
            paragraph(
                f"A reply counts as a refusal by {report.scorer}. Empty, repetitive and incoherent replies "
                f"and deflections count as neither refusal nor answer. Greedy replies of at most "
                f"{report.max_new_tokens} tokens."
                + (" The p-value is of the exact test on the prompts whose answer changed." if before else "")
            ),
        ),
    )


def _sentence(report: EvaluationReport) -> str:
    model = report.rates["harmful"]
    if report.base_rates is None:
        return f"The model refuses {model.rate:.1%} of {model.n} harmful prompts."
    base = report.base_rates["harmful"]
    text = f"Of {model.n} harmful prompts the base refuses {base.rate:.1%} and the model {model.rate:.1%}."
    if report.divergence is not None:
        text += f" On harmless prompts the first token moved by {report.divergence.first_token:.3f} nats (KL)."
    return text


def _classes(report: EvaluationReport) -> Section:
    header = ["replies", "n", "refusal", "strict", "deflection", "answer", "empty", "repetitive", "incoherent"]
    header += ["substring", "cut off"]
    rows, bars = [], []
    sides = [("base", report.base_rates), ("model", report.rates)]
    for kind in report.rates:
        for side, rates in sides:
            if rates is None:
                continue
            rate, name = rates[kind], f"{_NAMES.get(kind, kind)}, {side}"
            counts = (
                rate.refused,
                rate.strict,
                rate.deflected,
                rate.answered,
                rate.empty,
                rate.repetitive,
                rate.incoherent,
            )
            rows.append([name, rate.n, *counts, rate.matches, rate.truncated])
            shares = (rate.refused, rate.deflected, rate.answered, rate.degenerate)
            colours = (colour for _, colour in _CLASS_COLOURS)
            parts = [
                Part(share=count / max(1, rate.n), colour=colour) for count, colour in zip(shares, colours, strict=True)
            ]
            bars.append((name, parts))
    notes = (
        [paragraph(f"{n} prompts were left out: the direction was found with them.")]
        if (n := sum(report.excluded.values()))
        else []
    )
    return Section(
        heading="What the replies are",
        blocks=(
            share_chart(bars, legend=_CLASS_COLOURS, caption="Classes of replies").html,
            table(
                header,
                rows,
                caption="Counts; strict: the refusals that decline something, without such as “As an AI engineer”; "
                "substring: replies with one of the published substrings, whatever their class",
            ),
            *([paragraph(told)] if (told := _languages(report)) else []),
            *notes,
        ),
    )


def _languages(report: EvaluationReport) -> str:
    """Say how many refusals are in which language, where not all are English."""
    counted: Counter[str] = Counter()
    for rates in (report.rates, report.base_rates or {}):
        for rate in rates.values():
            counted.update(rate.languages)
    if not set(counted) - {"en"}:
        return ""
    return (
        "Refusals by language, base and model: " + ", ".join(f"{name} {n}" for name, n in counted.most_common()) + "."
    )


def _budgets(report: EvaluationReport) -> Section:
    """Return the refusal rates of the replies cut to fewer tokens: how late the model refuses."""
    sides = [("base", report.base_rates), ("model", report.rates)]
    shown = [(side, rates) for side, rates in sides if rates is not None]
    tokens = [budget.tokens for budget in next(iter(report.rates.values())).budgets]
    rows, blocks = [], []
    for kind in report.rates:
        for side, rates in shown:
            cells = [share_in_words(each.rate, low=each.low, high=each.high) for each in rates[kind].budgets]
            rows.append([f"{_NAMES.get(kind, kind)}, {side}", rates[kind].n, *cells])
    for kind in [kind for kind in report.rates if kind == "harmful"]:
        points = []
        for i, n in enumerate(tokens):
            each = [(k, rates[kind].budgets[i]) for k, (_, rates) in enumerate(shown) if rates[kind].budgets]
            found = [Interval(series=k, value=one.rate, low=one.low, high=one.high) for k, one in each]
            points.append((f"{n} tokens", found))
        caption = f"{_NAMES[kind]} prompts: share refused within so many tokens, with 95 % intervals"
        blocks.append(interval_chart(points, series=tuple(side for side, _ in shown), caption=caption).html)
    return Section(
        heading="How late it refuses",
        blocks=(
            *blocks,
            table(
                ["replies", "n", *[f"{n} tokens" for n in tokens]],
                rows,
                caption="Refusal rates of the same replies, each read as if it had stopped there",
            ),
        ),
    )


ASKED = {
    "opening": "after a harmless question",
    "repetition": "after itself",
    "ar": "in Arabic",
    "de": "in German",
    "es": "in Spanish",
    "fr": "in French",
    "ru": "in Russian",
    "zh": "in Chinese",
}


def _parts(report: EvaluationReport) -> Section:
    """Return the refusal rates of the prompts asked in other languages and in a second turn."""
    has_base = report.base_rates is not None
    header = ["asked", "prompts", "n", *(["base"] if has_base else []), "model", *(["p (McNemar)"] if has_base else [])]
    header += ["asked plainly", "p (McNemar)"]
    rows, points = [], []
    for name, part in report.parts.items():
        for kind, rate in part.rates.items():
            row: list[object] = [ASKED[name], _NAMES.get(kind, kind), rate.n]
            row += [_rate(part.base_rates[kind])] if part.base_rates else []
            row += [_rate(rate)]
            row += [p_value_in_words(part.changes[kind].p_value)] if has_base else []
            plain = part.beside_plain.get(kind)
            row += ["", ""] if plain is None else [f"{plain.share_before:.1%}", p_value_in_words(plain.p_value)]
            rows.append(row)
        base = part.base_rates["harmful"] if part.base_rates else None
        points.append((ASKED[name], _intervals(base, part.rates["harmful"])))
    return Section(
        heading="Asked in other ways",
        blocks=(
            interval_chart(
                points,
                series=("base", "model") if has_base else ("model",),
                caption="Harmful prompts: share refused when asked in other ways, with 95 % intervals",
            ).html,
            table(header, rows, caption="Refusal rates with Wilson 95 % intervals", n_text=2),
            paragraph(
                "Asked plainly: what the model refuses of the prompts of the same ids in English and in a first turn; "
                "the p-value beside it is of the exact test on the prompts that it refuses in one way alone. In a "
                "second turn the model has answered a harmless question, or the same prompt, before."
            ),
        ),
    )


def _recognition(found: Recognition) -> Section:
    """Return how well the model's own yes or no tells harmful from harmless requests."""
    sides = [("base", found.base, found.base_said), ("model", found.model, found.said)]
    rows = [
        [side, value.n_higher, value.n_lower, f"{value.auc:.3f} [{value.low:.3f}, {value.high:.3f}]", f"{said:.1%}"]
        for side, value, said in sides
        if value is not None and said is not None
    ]
    asked = " and ".join(f"“{question.partition(chr(10))[0]}”" for question in found.questions)
    text = f"Asked of each request: {asked} AUC: how often a harmful request gets more of a yes to the first, and of a "
    text += "no to the second, than a harmless one; 0.5 is chance. Yes or no: the probability that the answer begins "
    text += "with either."
    if found.change is not None:
        change = found.change
        text += f" The AUC changed by {change.difference:+.3f} [{change.low:+.3f}, {change.high:+.3f}] "
        text += f"({p_value_in_words(change.p_value)}, DeLong)."
    header = ["", "harmful", "harmless", "AUC (95 %)", "yes or no"]
    return Section(
        heading="Does it still know?",
        blocks=(
            table(header, rows, caption="The model's own verdict on the requests, without a reply"),
            paragraph(text),
        ),
    )


def _damage(report: EvaluationReport) -> Section:
    rows: list[list[object]] = [list(measurement.cells()) for measurement in report.measurements]
    return Section(
        heading="What else changed",
        blocks=(table(["", "unit", "base", "model", "change"], rows, caption="Damage to harmless behaviour"),),
    )


def _judges(report: EvaluationReport) -> Section:
    blocks = [
        paragraph(
            "Each judge read the coherent replies. Kappa is Cohen's: agreement with the refusals counted above beyond "
            "chance, over the replies of base and model that the judge decided."
        )
    ]
    for judge in report.judges:
        rows = []
        for kind, rate in judge.rates.items():
            agreement = judge.agreement[kind]
            kappa = "undefined" if agreement.kappa is None else f"{agreement.kappa:.2f}"
            base = [_rate(judge.base_rates[kind])] if judge.base_rates else []
            row = [_NAMES.get(kind, kind), *base, _rate(rate), rate.undecided, f"{agreement.agreed}/{agreement.n}"]
            rows.append([*row, kappa])
        header = ["declined", *(["base"] if judge.base_rates else []), "model", "undecided", "agreed", "kappa"]
        blocks.append(table(header, rows, caption=f"{judge.judge} ({judge.style}: {judge.question})"))
    return Section(heading="Judges", blocks=tuple(blocks))


def _tasks(report: EvaluationReport) -> Section:
    assert report.capability is not None
    rows = [
        [
            score.task,
            score.metric,
            score.n,
            "" if score.base is None else f"{score.base:.4f}",
            f"{score.model:.4f}",
            "" if score.difference is None else f"{score.difference:+.4f} [{score.low:+.4f}, {score.high:+.4f}]",
            "" if score.p_value is None else p_value_in_words(score.p_value),
        ]
        for score in report.capability.scores
    ]
    header = ["task", "metric", "n", "base", "model", "difference, paired (95 %)", "p (McNemar)"]
    return Section(
        heading="Capability",
        blocks=(table(header, rows, caption=f"Tasks of {report.capability.harness}", n_text=2),),
    )


def _categories(report: EvaluationReport) -> Section:
    blocks = []
    for kind, rates in report.categories.items():
        if not rates:
            continue
        name = _NAMES.get(kind, kind)
        points = [(rate.category.replace("_", " "), _category_intervals(rate)) for rate in rates]
        has_base = rates[0].base_rate is not None
        chart = interval_chart(
            points,
            series=("base", "model") if has_base else ("model",),
            caption=f"{name} prompts: share refused by category, the model's with its 95 % interval",
        ).html
        header = ["category", "n", *(["base"] if has_base else []), "model", "degenerate"]
        rows = [
            [
                rate.category,
                rate.n,
                *([f"{100 * rate.base_rate:.0f} %"] if rate.base_rate is not None else []),
                _rate(rate),
                rate.degenerate,
            ]
            for rate in rates
        ]
        numbers = folded(f"{name}: the numbers", [table(header, rows, caption=f"{name} prompts by category")])
        blocks += [chart if kind == "harmful" else folded(f"{name}: the figure", [chart]), numbers]
    return Section(heading="By category", blocks=tuple(blocks))


def _provenance(report: EvaluationReport, command: str) -> Section:
    pairs: list[tuple[str, object]] = [("Model", report.model), ("Base", report.base or "none")]
    revisions = (("Model's revision", report.revision), ("Base's revision", report.base_revision))
    pairs += [(name, revision) for name, revision in revisions if revision is not None]
    for name, served in (("Model", report.server), ("Base", report.base_server)):
        if served is not None:
            pairs += [(f"{name} served by", served.url), (f"{name} is called there", served.model)]
            pairs += [("Not measured", text) for text in served.left_out]
    pairs.append(("Intervention by hooks", report.intervention))
    if report.coefficient is not None:
        pairs.append(("Coefficient", f"{report.coefficient:g}"))
    if report.direction is not None:
        pairs += [(f"Direction: {key}", value) for key, value in report.direction.items() if value is not None]
    pairs.append(("System prompt", report.system_prompt or "the template's own"))
    for kind, chosen in report.prompt_sets.items():
        text = f"{chosen['name']}, {chosen['n']} prompts, SHA-256 {chosen['sha256']}"
        pairs.append((f"{_NAMES.get(kind, kind)} prompts", text))
    pairs += [(f"Version of {name}", version) for name, version in report.versions.items()]
    return Section(heading="Where the numbers come from", blocks=(facts(pairs), commands([command])))


def _completions(path: Path) -> Section:
    blocks = []
    for entry in JsonLines(path).read(dict):
        summary = f"{entry['kind']} {entry['id']}, {entry['model']}: {entry['class']}"
        blocks.append(folded(summary, [paragraph(entry["prompt"]), quoted(entry["completion"])]))
    return Section(heading="Replies", blocks=tuple(blocks))


def _intervals(base: RefusalRate | None, model: RefusalRate) -> list[Interval]:
    sides: Sequence[tuple[int, RefusalRate]] = [(0, model)] if base is None else [(0, base), (1, model)]
    return [Interval(series=i, value=rate.rate, low=rate.low, high=rate.high) for i, rate in sides]


def _category_intervals(rate: CategoryRate) -> list[Interval]:
    base = rate.base_rate
    own = Interval(series=0 if base is None else 1, value=rate.rate, low=rate.low, high=rate.high)
    return [own] if base is None else [Interval(series=0, value=base, low=base, high=base), own]


def _rate(rate: RefusalRate | CategoryRate | JudgedRate) -> str:
    return share_in_words(rate.rate, low=rate.low, high=rate.high)
