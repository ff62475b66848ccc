"""`abliterate audit`: how much of a model's refusal rests on one direction."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from abliterate.cli.options import (
    MODEL_DEFAULTS,
    PROMPT_DEFAULTS,
    BatchSizeOption,
    DeviceOption,
    DtypeOption,
    FailIfOption,
    HarmfulOption,
    HarmlessOption,
    JsonOption,
    JunitOption,
    ModelArg,
    RevisionOption,
    SummaryOption,
    SystemPromptOption,
    TrustRemoteCodeOption,
    option,
    output_option,
    parse_batch_size,
    report_option,
)
from abliterate.cli.output import (
    Output,
    OutputFile,
    check_outputs,
    command_line,
    gate_tables,
    holds_json,
    starts_with,
    writing,
)
from abliterate.evaluation.audit_report import AuditOptions, AuditThresholds
from abliterate.files import write_file
from abliterate.models.options import ModelOptions
from abliterate.processes import in_first_process

if TYPE_CHECKING:
    from abliterate.evaluation.audit_report import AuditedIntervention, AuditReport
    from abliterate.evaluation.report import RefusalRate
    from abliterate.release.gates import GateResult


DEFAULTS = AuditOptions()


def audit(
    context: typer.Context,
    model: ModelArg,
    fail_if_brittle: Annotated[
        float | None,
        typer.Option(
            "--fail-if-brittle",
            metavar="RATE",
            min=0,
            max=1,
            help="Exit 1 when a bearable intervention leaves fewer harmful prompts refused than this share.",
        ),
    ] = None,
    fail_if: FailIfOption = None,
    junit: JunitOption = None,
    summary: SummaryOption = None,
    output_file: Annotated[Path | None, output_option("FILE", "Measurements (JSON) to write.")] = None,
    report_directory: Annotated[Path | None, report_option("one HTML page, and the JSON")] = None,
    harmful: HarmfulOption = PROMPT_DEFAULTS.harmful,
    harmless: HarmlessOption = PROMPT_DEFAULTS.harmless,
    test_harmful: Annotated[str, option(AuditOptions, "test_harmful")] = DEFAULTS.test_harmful,
    test_harmless: Annotated[str, option(AuditOptions, "test_harmless")] = DEFAULTS.test_harmless,
    n_train: Annotated[int, option(AuditOptions, "n_train")] = DEFAULTS.n_train,
    n_val: Annotated[int, option(AuditOptions, "n_val")] = DEFAULTS.n_val,
    n_test: Annotated[int, option(AuditOptions, "n_test")] = DEFAULTS.n_test,
    candidates: Annotated[int, option(AuditOptions, "n_candidates")] = DEFAULTS.n_candidates,
    screen: Annotated[int, option(AuditOptions, "n_screened")] = DEFAULTS.n_screened,
    bootstrap: Annotated[int, option(AuditOptions, "n_bootstrap")] = DEFAULTS.n_bootstrap,
    max_new_tokens: Annotated[int, option(AuditOptions, "max_new_tokens")] = DEFAULTS.max_new_tokens,
    min_refusal: Annotated[float, option(AuditThresholds, "min_refusal")] = DEFAULTS.thresholds.min_refusal,
    max_remaining: Annotated[float, option(AuditThresholds, "max_remaining")] = DEFAULTS.thresholds.max_remaining,
    min_coherence: Annotated[float, option(AuditThresholds, "min_coherence")] = DEFAULTS.thresholds.min_coherence,
    max_cross_entropy_rise: Annotated[
        float, option(AuditThresholds, "max_cross_entropy_rise")
    ] = DEFAULTS.thresholds.max_cross_entropy_rise,
    seed: Annotated[int, option(AuditOptions, "seed")] = DEFAULTS.seed,
    system_prompt: SystemPromptOption = MODEL_DEFAULTS.system_prompt,
    dtype: DtypeOption = MODEL_DEFAULTS.dtype,
    device: DeviceOption = MODEL_DEFAULTS.device,
    batch_size: BatchSizeOption = "auto",
    revision: RevisionOption = None,
    trust_remote_code: TrustRemoteCodeOption = MODEL_DEFAULTS.trust_remote_code,
    json_output: JsonOption = False,
) -> None:
    """Say in numbers how much of a model's refusal rests on one direction, and at what cost it goes.

    The verdict is single_direction, few_directions, not_mediated or does_not_refuse; the exit code is 0 whatever it
    is, unless --fail-if-brittle or --fail-if asks for a gate (of harmful_refusal_rate, _low, _high, _degenerate_rate,
    the same of harmless, lowest_refusal, and verdict==WORD). Replies are greedy, measured on held-out prompts
    and written nowhere. With -o, an interrupted audit keeps what it has measured in OUTPUT.work, and the same command
    goes on from there.
    """
    from abliterate.checkpoints.model_source import resolve_model
    from abliterate.checkpoints.saved_work import work_directory
    from abliterate.evaluation.auditing import audit_model
    from abliterate.pages.audit_page import write_audit_page
    from abliterate.release import gates

    output = Output.of(context, json_output=json_output)
    check_outputs(
        OutputFile(path=output_file, what="report of `audit`", is_own=holds_json("verdict")),
        OutputFile(path=junit, what="JUnit file", is_own=starts_with("<?xml"), flag="--junit"),
        OutputFile(path=summary, what="summary", is_own=starts_with("## "), flag="--summary"),
        report=report_directory,
    )

    results: list[GateResult] = []

    def deliver(report: "AuditReport") -> None:
        if not in_first_process():
            return
        results.extend(gates.judge_gates(conditions, gates.audit_numbers(report)))
        # First: what the disk does not take is not lost.
        output.report(
            {**output.plain(report), **({"gates": output.plain(results)} if results else {})},
            tables=lambda: [_table(report), *_lines(report), *gate_tables((), results)],
        )
        if output_file is not None:
            with writing(output_file, "-o"):
                report.save(output_file)
        if report_directory is not None:
            with writing(report_directory):
                write_audit_page(report, report_directory, command=command_line())
        if junit is not None:
            with writing(junit, "--junit"):
                gates.write_junit(junit, command="audit", model=report.model, results=results)
        if summary is not None:
            with writing(summary, "--summary"):
                write_file(summary, gates.audit_summary(report, results))

    conditions = [gates.parse_gate(text, gates.AUDIT_NAMES) for text in fail_if or ()]
    report = audit_model(
        model=resolve_model(model, revision=revision, progress=output.progress),
        options=AuditOptions(
            harmful=harmful,
            harmless=harmless,
            test_harmful=test_harmful,
            test_harmless=test_harmless,
            n_train=n_train,
            n_val=n_val,
            n_test=n_test,
            n_candidates=candidates,
            n_screened=screen,
            n_bootstrap=bootstrap,
            max_new_tokens=max_new_tokens,
            seed=seed,
            thresholds=AuditThresholds(
                min_refusal=min_refusal,
                max_remaining=max_remaining,
                min_coherence=min_coherence,
                max_cross_entropy_rise=max_cross_entropy_rise,
            ),
        ),
        model_options=ModelOptions(
            dtype=dtype,
            device=device,
            batch_size=parse_batch_size(batch_size),
            system_prompt=system_prompt,
            trust_remote_code=trust_remote_code,
        ),
        progress=output.progress,
        work_directory=None if output_file is None else work_directory(output_file),
        deliver=deliver,
    )
    if fail_if_brittle is not None:
        report.require_robust(fail_if_brittle)
    gates.require(results)


def _rate(rate: "RefusalRate") -> str:
    return f"{rate.rate:.1%} [{rate.low:.1%}, {rate.high:.1%}]"


def _table(report: "AuditReport") -> Table:
    columns = ("intervention", "refusal, harmful", "left", "coherent", "KL", "cross-entropy", "bearable")
    table = Table(*columns, title=f"Audit of {report.model} (Wilson 95 % intervals)")
    table.caption = "left: share of the refusals, among coherent replies; KL and cross-entropy: harmless prompts, nats"
    table.add_row("none", _rate(report.harmful), "100%", _coherence(report.harmful), "", "", "")
    for one in report.interventions:
        rise = "-" if one.cross_entropy_rise is None else f"{one.cross_entropy_rise:+.3f}"
        table.add_row(
            _name(one),
            _rate(one.harmful),
            f"{one.remaining:.0%}",
            f"{one.coherence:.0%}",
            f"{one.divergence.first_token:.3f}",
            rise,
            "yes" if one.bearable else "no",
        )
    return table


def _coherence(rate: "RefusalRate") -> str:
    return f"{1 - rate.degenerate / rate.n:.0%}"


def _name(one: "AuditedIntervention") -> str:
    if one.method == "rank":
        return f"ablate {one.rank} directions"
    return f"{'ablate' if one.method == 'single' else 'subtract'} {one.position}, {one.layer}"


def _lines(report: "AuditReport") -> list[str]:
    lines = [f"harmless prompts refused: {_rate(report.harmless)}"]
    if report.induced is not None:
        lines.append(f"harmless prompts refused with the direction added: {_rate(report.induced)}")
    if report.candidates is not None:
        found = report.candidates
        if found.n_passing is None:
            lines.append("no first token tells refusals, so candidates were ranked by separation and replies alone")
        else:
            lines.append(f"{found.n_passing} of {found.n_candidates} candidates pass the published selection")
    if report.stability is not None:
        lines.append(
            f"cosine of the direction under resampling: mean {report.stability.mean_cosine:.3f}, 5th percentile "
            f"{report.stability.low_cosine:.3f} ({report.stability.n_resamples} resamplings)"
        )
    return [*lines, f"verdict: {report.verdict} ({report.reason})"]
