"""`abliterate evaluate`: measure refusal rates and the damage done."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from abliterate.cli.options import (
    BatchSizeOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    HarmfulOption,
    HarmlessOption,
    JsonOption,
    ModelArg,
    RevisionOption,
    SystemPromptOption,
    TrustRemoteCodeOption,
    parse_batch_size,
)
from abliterate.cli.output import Output, command_line

if TYPE_CHECKING:
    from abliterate.evaluation.capability import CapabilityReport
    from abliterate.evaluation.judges import JudgedRate
    from abliterate.evaluation.report import CategoryRate, EvaluationReport, RefusalRate


class InterventionChoice(StrEnum):
    """What hooks do to the model while it is measured."""

    none = "none"
    ablate = "ablate"
    add = "add"
    affine = "affine"


def evaluate(
    context: typer.Context,
    model: ModelArg,
    base: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="What to compare with: directory or Hub id.")
    ] = None,
    direction: Annotated[Path | None, typer.Option("--direction", help="Direction file for --intervention.")] = None,
    intervention: Annotated[
        InterventionChoice,
        typer.Option(
            "--intervention", help="By hooks: ablate the direction, add it, or set it to its harmless mean (affine)."
        ),
    ] = InterventionChoice.none,
    coefficient: Annotated[
        float | None,
        typer.Option(
            "--coefficient",
            help="Dose. add: -1 bypasses, +1 induces (default 1); affine: 0 harmless, 1 harmful mean (default 0).",
        ),
    ] = None,
    harmful: HarmfulOption = "bundled",
    harmless: HarmlessOption = "bundled",
    borderline: Annotated[
        str, typer.Option("--borderline", metavar="SPEC", help="Safe prompts that look unsafe.")
    ] = "bundled",
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            metavar="SPEC",
            help="Plain texts for cross-entropy, without a template; several times for several. Default: a bundled "
            "sample.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int,
        typer.Option("--max-new-tokens", min=1, help="Length of each reply; 256 reaches refusals that come late."),
    ] = 256,
    thinking: Annotated[
        bool, typer.Option("--thinking", help="Let a thinking model think; only answers count.")
    ] = False,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            "--judge",
            metavar="MODEL",
            help="A local classifier or guard model that judges the replies too; several times for several.",
        ),
    ] = None,
    judge_label: Annotated[
        str | None, typer.Option("--judge-label", metavar="LABEL", help="The classifier's label that means refusal.")
    ] = None,
    judge_prompt: Annotated[
        str,
        typer.Option(
            "--judge-prompt",
            metavar="HOW",
            help="guard (the judge's own chat template), yes-no, or a file with {prompt} and {reply}; auto chooses.",
        ),
    ] = "auto",
    lm_eval: Annotated[
        str | None,
        typer.Option("--lm-eval", metavar="TASKS", help="Tasks of lm-evaluation-harness, separated by commas."),
    ] = None,
    lm_eval_path: Annotated[
        Path | None, typer.Option("--lm-eval-path", metavar="DIR", help="A folder with task definitions of your own.")
    ] = None,
    lm_eval_limit: Annotated[
        int | None, typer.Option("--lm-eval-limit", min=1, help="Documents of each task; default: all.")
    ] = None,
    output_file: Annotated[Path | None, typer.Option("-o", "--output", help="Also write the JSON report here.")] = None,
    save_completions: Annotated[
        Path | None, typer.Option("--save-completions", help="Write all completions here (JSON Lines).")
    ] = None,
    report_directory: Annotated[
        Path | None,
        typer.Option("--report", metavar="DIR", help="Write one self-contained HTML page (and the JSON) here."),
    ] = None,
    report_completions: Annotated[
        bool,
        typer.Option("--report-completions", help="Put the replies that --save-completions writes into the page too."),
    ] = False,
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache",
            metavar="DIR",
            help="Keep all replies here, those to harmful prompts too, so that an interrupted run goes on.",
        ),
    ] = None,
    system_prompt: SystemPromptOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    batch_size: BatchSizeOption = "auto",
    revision: RevisionOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    json_output: JsonOption = False,
) -> None:
    """Measure refusal rates on held-out prompts; with --base also what else changed.

    Replies are greedy and are not written anywhere unless --save-completions or --cache asks for it. Prompts that the
    direction was found with are left out.
    """
    from abliterate.checkpoints.hub import resolve_model
    from abliterate.evaluation.report import EvaluationOptions, TaskOptions
    from abliterate.evaluation.run import evaluate_model
    from abliterate.models.options import ModelOptions
    from abliterate.reports.evaluation_page import write_evaluation_page

    output = Output.of(context, json_output=json_output)
    if report_completions and (report_directory is None or save_completions is None):
        raise typer.BadParameter("--report-completions needs --report DIR and --save-completions FILE")
    report = evaluate_model(
        model=resolve_model(model, revision=revision),
        base=base,
        direction=direction,
        options=EvaluationOptions(
            harmful=harmful,
            harmless=harmless,
            borderline=borderline,
            texts=tuple(text or ("bundled",)),
            max_new_tokens=max_new_tokens,
            thinking=thinking,
            intervention=intervention.value,
            coefficient=coefficient,
            judges=tuple(judge or ()),
            judge_label=judge_label,
            judge_prompt=judge_prompt,
            tasks=TaskOptions(
                tasks=tuple(task.strip() for task in (lm_eval or "").split(",") if task.strip()),
                path=lm_eval_path,
                limit=lm_eval_limit,
            ),
            save_completions=save_completions,
            cache=cache,
        ),
        model_options=ModelOptions(
            dtype=dtype.value,
            device=device,
            batch_size=parse_batch_size(batch_size),
            system_prompt=system_prompt,
            trust_remote_code=trust_remote_code,
        ),
        progress=output.progress,
    )
    if output_file is not None:
        report.save(output_file)
    if report_directory is not None:
        completions = save_completions if report_completions else None
        write_evaluation_page(report, report_directory, command=command_line(), completions=completions)
    output.report(report, tables=lambda: report_tables(report))


def report_tables(report: "EvaluationReport") -> list[Table | str]:
    """Return all tables of a report, the headline first."""
    more: list[Table | str] = [judges_table(report)] if report.judges else []
    more += [tasks_table(report.capability)] if report.capability else []
    return [rates_table(report), damage_table(report), *more, categories_table(report)]


def tasks_table(report: "CapabilityReport") -> Table:
    """Return the scores of lm-evaluation-harness, with paired differences."""
    table = Table("task", "metric", "n", "base", "model", "difference (95 %)", "p (McNemar)", title=report.harness)
    for score in report.scores:
        difference = (
            "" if score.difference is None else f"{score.difference:+.4f} [{score.low:+.4f}, {score.high:+.4f}]"
        )
        base = "" if score.base is None else f"{score.base:.4f}"
        p_value = "" if score.p_value is None else f"{score.p_value:.2g}"
        table.add_row(score.task, score.metric, str(score.n), base, f"{score.model:.4f}", difference, p_value)
    return table


def judges_table(report: "EvaluationReport") -> Table:
    """Return what each judge says beside the substrings, with their agreement."""
    table = Table("judge", "prompts", "base declines", "model declines", "undecided", "kappa", title="Judges")
    for judge in report.judges:
        for kind, rate in judge.rates.items():
            base = _cell(judge.base_rates[kind]) if judge.base_rates else ""
            kappa = judge.agreement[kind].kappa
            agreement = "-" if kappa is None else f"{kappa:.2f}"
            table.add_row(judge.judge, kind, base, _cell(rate), str(rate.undecided), agreement)
    table.caption = "kappa: agreement with the substrings beyond chance; - where all replies are rated alike"
    return table


def rates_table(report: "EvaluationReport") -> Table:
    """Return the refusal rates of the model, beside those of its base when there is one."""
    columns = ["prompts", "n", *(["base"] if report.base_rates else []), "model"]
    columns += [*(["p (McNemar)"] if report.changes else []), "degenerate"]
    table = Table(*columns, title=f"Refusal rates of {report.model} (Wilson 95 % intervals)")
    for kind, rate in report.rates.items():
        before = [_cell(report.base_rates[kind])] if report.base_rates else []
        change = [f"{report.changes[kind].p_value:.2g}"] if report.changes else []
        table.add_row(kind, str(rate.n), *before, _cell(rate), *change, str(rate.degenerate))
    excluded = sum(report.excluded.values())
    table.caption = f"{excluded} prompts left out: the direction was found with them" if excluded else None
    return table


def damage_table(report: "EvaluationReport") -> Table:
    """Return what else changed: KL on harmless prompts and cross-entropies, in nats a token."""
    table = Table("nats a token", "base", "model", "change", title="What else changed")
    if report.divergence is not None:
        found = report.divergence
        table.add_row("KL(base || model), harmless, first token", "", f"{found.first_token:.4f}", "")
        table.add_row("KL(base || model), harmless, base's answers", "", f"{found.continuation:.4f}", "")
    entropies = {"the base's harmless answers": report.cross_entropy}
    entropies |= {f"texts {spec}": entropy for spec, entropy in report.text_cross_entropy.items()}
    for name, entropy in entropies.items():
        if entropy is not None:
            before = "" if entropy.base is None else f"{entropy.base:.4f}"
            change = "" if entropy.relative_change is None else f"{entropy.relative_change:+.1%}"
            table.add_row(f"cross-entropy, {name}", before, f"{entropy.model:.4f}", change)
    return table


def categories_table(report: "EvaluationReport") -> Table:
    """Return refused / n in each category, base first where there is one."""
    table = Table("category", "n", "base refuses", "model refuses", "degenerate", title="By category")
    for kind, rates in report.categories.items():
        for rate in rates:
            base = "" if rate.base_rate is None else f"{rate.base_rate:.0%}"
            table.add_row(f"{kind}: {rate.category}", str(rate.n), base, _cell(rate), str(rate.degenerate))
    return table


def _cell(rate: "RefusalRate | CategoryRate | JudgedRate") -> str:
    return f"{rate.rate:.1%} [{rate.low:.1%}, {rate.high:.1%}]"
