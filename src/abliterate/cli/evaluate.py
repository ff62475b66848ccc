"""`abliterate evaluate`: measure refusal rates and the damage done."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from abliterate.cli.options import (
    MODEL_DEFAULTS,
    PROMPT_DEFAULTS,
    BaseRevisionOption,
    BatchSizeOption,
    DeviceOption,
    DtypeOption,
    FailIfOption,
    HarmfulOption,
    HarmlessOption,
    JsonOption,
    JunitOption,
    RevisionOption,
    ServedModelArg,
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
from abliterate.evaluation.report import EvaluationOptions, Intervention, ServerOptions, TaskOptions, chosen_parts
from abliterate.files import write_file
from abliterate.models.options import ModelOptions
from abliterate.processes import in_first_process

if TYPE_CHECKING:
    from abliterate.evaluation.capability import CapabilityReport
    from abliterate.evaluation.judges import JudgedRate
    from abliterate.evaluation.report import CategoryRate, EvaluationReport, RefusalRate


DEFAULTS = EvaluationOptions()


def evaluate(
    context: typer.Context,
    model: ServedModelArg = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="What to compare with: directory or Hub id.")
    ] = None,
    base_revision: BaseRevisionOption = None,
    direction: Annotated[Path | None, typer.Option("--direction", help="Direction file for --intervention.")] = None,
    intervention: Annotated[Intervention, option(EvaluationOptions, "intervention")] = DEFAULTS.intervention,
    coefficient: Annotated[float | None, option(EvaluationOptions, "coefficient")] = DEFAULTS.coefficient,
    harmful: HarmfulOption = PROMPT_DEFAULTS.harmful,
    harmless: HarmlessOption = PROMPT_DEFAULTS.harmless,
    borderline: Annotated[str, option(EvaluationOptions, "borderline")] = DEFAULTS.borderline,
    text: Annotated[list[str] | None, option(EvaluationOptions, "texts")] = None,
    max_new_tokens: Annotated[int, option(EvaluationOptions, "max_new_tokens")] = DEFAULTS.max_new_tokens,
    thinking: Annotated[bool, option(EvaluationOptions, "thinking")] = DEFAULTS.thinking,
    languages: Annotated[str | None, option(EvaluationOptions, "languages")] = None,
    turns: Annotated[bool, option(EvaluationOptions, "turns")] = DEFAULTS.turns,
    judge: Annotated[list[str] | None, option(EvaluationOptions, "judges")] = None,
    judge_label: Annotated[str | None, option(EvaluationOptions, "judge_label")] = DEFAULTS.judge_label,
    judge_prompt: Annotated[str, option(EvaluationOptions, "judge_prompt")] = DEFAULTS.judge_prompt,
    server: Annotated[str | None, option(ServerOptions, "url")] = None,
    api_model: Annotated[str | None, option(ServerOptions, "api_model")] = None,
    base_server: Annotated[str | None, option(ServerOptions, "base_url")] = None,
    base_api_model: Annotated[str | None, option(ServerOptions, "base_api_model")] = None,
    judge_server: Annotated[str | None, option(ServerOptions, "judge_url")] = None,
    judge_api_model: Annotated[str | None, option(ServerOptions, "judge_api_model")] = None,
    server_requests: Annotated[int, option(ServerOptions, "requests")] = DEFAULTS.server.requests,
    server_timeout: Annotated[float, option(ServerOptions, "timeout")] = DEFAULTS.server.timeout,
    server_body: Annotated[str | None, option(ServerOptions, "body")] = None,
    lm_eval: Annotated[str | None, option(TaskOptions, "tasks")] = None,
    lm_eval_path: Annotated[Path | None, option(TaskOptions, "path")] = DEFAULTS.tasks.path,
    lm_eval_limit: Annotated[int | None, option(TaskOptions, "limit")] = DEFAULTS.tasks.limit,
    output_file: Annotated[Path | None, output_option("FILE", "Measurements (JSON) to write.")] = None,
    save_completions: Annotated[Path | None, option(EvaluationOptions, "save_completions")] = DEFAULTS.save_completions,
    report_directory: Annotated[Path | None, report_option("one HTML page, and the JSON")] = None,
    report_completions: Annotated[
        bool,
        typer.Option("--report-completions", help="Put the replies that --save-completions writes into the page too."),
    ] = False,
    cache: Annotated[Path | None, option(EvaluationOptions, "cache")] = DEFAULTS.cache,
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="REPORT", help="Compare with an earlier JSON report, paired by prompt."),
    ] = None,
    fail_if: FailIfOption = None,
    junit: JunitOption = None,
    summary: SummaryOption = None,
    system_prompt: SystemPromptOption = MODEL_DEFAULTS.system_prompt,
    dtype: DtypeOption = MODEL_DEFAULTS.dtype,
    device: DeviceOption = MODEL_DEFAULTS.device,
    batch_size: BatchSizeOption = "auto",
    revision: RevisionOption = None,
    trust_remote_code: TrustRemoteCodeOption = MODEL_DEFAULTS.trust_remote_code,
    json_output: JsonOption = False,
) -> None:
    """Measure refusal rates on held-out prompts; with --base also what else changed.

    Replies are greedy and are not written anywhere unless --save-completions or --cache asks for it. Prompts that the
    direction was found with are left out.

    For CI: --against compares the refusal rates with those of an earlier report, prompt by prompt; --fail-if ends with
    exit code 1 where a condition holds, of KIND_refusal_rate, _refusal_low, _refusal_high, _degenerate_rate, and
    against that report _refusal_change and _refusal_p, for KIND harmful, harmless or borderline; with --base also of
    kl_first_token, kl_continuation, cross_entropy_change and recognition_change; and of recognition_auc. A rate can be
    of a part that --languages or --turns asks for: harmful_refusal_rate@de, harmful_refusal_rate@opening.

    With --server the replies come from any server with the OpenAI protocol for chats (vLLM, SGLang, llama.cpp, Ollama,
    ...). MODEL may then be left out; where it is given, the prompts that its record names are left out. A base can be
    served, too. What takes the model's own numbers is measured as far as the server gives log-probabilities.
    """
    from abliterate.pages.evaluation_page import write_evaluation_page
    from abliterate.release import gates

    output = Output.of(context, json_output=json_output)
    if server is not None and not in_first_process():
        return
    _check_where(context, server=server, model=model)
    if report_completions and (report_directory is None or save_completions is None):
        raise typer.BadParameter("--report-completions needs --report DIR and --save-completions FILE")
    check_outputs(
        OutputFile(path=output_file, what="report of `evaluate`", is_own=holds_json("rates")),
        OutputFile(
            path=save_completions,
            what="file of completions",
            is_own=holds_json("completion"),
            flag="--save-completions",
        ),
        OutputFile(path=junit, what="JUnit file", is_own=starts_with("<?xml"), flag="--junit"),
        OutputFile(path=summary, what="summary", is_own=starts_with("## "), flag="--summary"),
        report=report_directory,
    )
    conditions = [gates.parse_gate(text, gates.EVALUATION_NAMES) for text in fail_if or ()]
    asked = chosen_parts(_listed(languages), turns=turns)
    gates.check_measured(
        conditions,
        has_base=base is not None or base_server is not None or base_api_model is not None,
        has_earlier=against is not None,
        parts=asked,
        served=server is not None,
    )
    earlier = None if against is None else gates.read_earlier(against)
    options = EvaluationOptions(
        harmful=harmful,
        harmless=harmless,
        borderline=borderline,
        texts=tuple(text or DEFAULTS.texts),
        max_new_tokens=max_new_tokens,
        thinking=thinking,
        intervention=intervention,
        coefficient=coefficient,
        languages=_listed(languages),
        turns=turns,
        judges=tuple(judge or ()),
        judge_label=judge_label,
        judge_prompt=judge_prompt,
        tasks=TaskOptions(
            tasks=_listed(lm_eval),
            path=lm_eval_path,
            limit=lm_eval_limit,
        ),
        server=ServerOptions(
            url=server,
            api_model=api_model,
            base_url=base_server,
            base_api_model=base_api_model,
            judge_url=judge_server,
            judge_api_model=judge_api_model,
            requests=server_requests,
            timeout=server_timeout,
            body=server_body,
        ),
        save_completions=save_completions,
        cache=cache,
    )
    report = _measure(
        output,
        model=model,
        revision=revision,
        base=base,
        base_revision=base_revision,
        direction=direction,
        options=options,
        model_options=ModelOptions(
            dtype=dtype,
            device=device,
            batch_size=parse_batch_size(batch_size),
            system_prompt=system_prompt,
            trust_remote_code=trust_remote_code,
        ),
    )
    if not in_first_process():
        return
    comparisons = () if earlier is None else gates.compare_reports(report, earlier)
    results = gates.judge_gates(conditions, gates.evaluation_numbers(report, comparisons))
    more = {name: found for name, found in (("against", comparisons), ("gates", results)) if found}
    # First: what the disk does not take is not lost.
    output.report(
        {**output.plain(report), **output.plain(more)},
        tables=lambda: [*report_tables(report), *gate_tables(comparisons, results)],
    )
    if output_file is not None:
        with writing(output_file, "-o"):
            report.save(output_file)
    if report_directory is not None:
        completions = save_completions if report_completions else None
        with writing(report_directory):
            write_evaluation_page(report, report_directory, command=command_line(), completions=completions)
    if junit is not None:
        with writing(junit, "--junit"):
            gates.write_junit(junit, command="evaluate", model=report.model, results=results)
    if summary is not None:
        with writing(summary, "--summary"):
            write_file(summary, gates.evaluation_summary(report, comparisons, results))
    gates.require(results)


_IN_PROCESS = ("base", "base_revision", "coefficient", "dtype", "device", "batch_size", "trust_remote_code")
_OF_SERVER = ("api_model", "base_server", "base_api_model", "judge_server", "judge_api_model", "server_body")


def _check_where(context: typer.Context, *, server: str | None, model: str | None) -> None:
    """Refuse options that would play no part: those of a model in this process with a server, and the other way."""
    others = _OF_SERVER if server is None else _IN_PROCESS
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in others and source is not None and source.name == "COMMANDLINE":
            flag = parameter.opts[0]
            if server is None:
                raise typer.BadParameter(f"{flag} is about a server; name it with --server URL")
            raise typer.BadParameter(
                f"{flag} is about a model in this process, and --server asks another; leave it out"
            )
    if server is None and model is None:
        raise typer.BadParameter("MODEL is missing: a local model directory, a .gguf file or a Hub id; or --server URL")


def _measure(
    output: Output,
    *,
    model: str | None,
    revision: str | None,
    base: str | None,
    base_revision: str | None,
    direction: Path | None,
    options: EvaluationOptions,
    model_options: ModelOptions,
) -> "EvaluationReport":
    from abliterate.checkpoints.model_source import resolve_model

    source = None if model is None else resolve_model(model, revision=revision, progress=output.progress)
    if options.server.url is not None:
        from abliterate.evaluation.served import evaluate_server

        return evaluate_server(
            options=options,
            model=source,
            direction=direction,
            system_prompt=model_options.system_prompt,
            progress=output.progress,
        )
    from abliterate.evaluation.run import evaluate_model

    assert source is not None
    return evaluate_model(
        model=source,
        base=base,
        base_revision=base_revision,
        direction=direction,
        options=options,
        model_options=model_options,
        progress=output.progress,
    )


def _listed(words: str | None) -> tuple[str, ...]:
    """Return what commas separate."""
    return tuple(word.strip() for word in (words or "").split(",") if word.strip())


def report_tables(report: "EvaluationReport") -> list[Table | str]:
    """Return all tables of a report, the headline first."""
    more: list[Table | str] = [budgets_table(report)] if any(rate.budgets for rate in report.rates.values()) else []
    more += [parts_table(report)] if report.parts else []
    more += [judges_table(report)] if report.judges else []
    more += [tasks_table(report.capability)] if report.capability else []
    more += served_lines(report)
    return [rates_table(report), damage_table(report), *more, categories_table(report)]


def served_lines(report: "EvaluationReport") -> list[Table | str]:
    """Return who replied, and what could not be measured for that."""
    lines: list[Table | str] = []
    for name, served in (("base", report.base_server), ("model", report.server)):
        if served is not None:
            left_out = "".join(f"\n  not measured: {text}" for text in served.left_out)
            lines.append(f"The {name} was {served.model} at {served.url}{left_out}")
    return lines


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
    """Return what each judge says beside the refusals counted, with their agreement."""
    table = Table("judge", "prompts", "base declines", "model declines", "undecided", "kappa", title="Judges")
    for judge in report.judges:
        for kind, rate in judge.rates.items():
            base = _cell(judge.base_rates[kind]) if judge.base_rates else ""
            kappa = judge.agreement[kind].kappa
            agreement = "-" if kappa is None else f"{kappa:.2f}"
            table.add_row(judge.judge, kind, base, _cell(rate), str(rate.undecided), agreement)
    table.caption = "kappa: agreement with the refusals counted beyond chance; - where all replies are rated alike"
    return table


def rates_table(report: "EvaluationReport") -> Table:
    """Return the refusal rates of the model, beside those of its base when there is one."""
    columns = ["prompts", "n", *(["base"] if report.base_rates else []), "model"]
    columns += [*(["p (McNemar)"] if report.changes else []), "strict", "deflected", "degenerate"]
    table = Table(*columns, title=f"Refusal rates of {report.model} (Wilson 95 % intervals)")
    for kind, rate in report.rates.items():
        before = [_cell(report.base_rates[kind])] if report.base_rates else []
        change = [f"{report.changes[kind].p_value:.2g}"] if report.changes else []
        table.add_row(
            *(kind, str(rate.n), *before, _cell(rate), *change),
            *(str(rate.strict), str(rate.deflected), str(rate.degenerate)),
        )
    excluded = sum(report.excluded.values())
    table.caption = f"{excluded} prompts left out: the direction was found with them" if excluded else None
    return table


def budgets_table(report: "EvaluationReport") -> Table:
    """Return the model's refusal rates of the same replies, each read as if it had stopped after so many tokens."""
    tokens = [budget.tokens for budget in next(iter(report.rates.values())).budgets]
    table = Table("prompts", *[f"{n} tokens" for n in tokens], title="Refused within so many tokens")
    for kind, rate in report.rates.items():
        table.add_row(kind, *[f"{budget.rate:.1%}" for budget in rate.budgets])
    return table


def parts_table(report: "EvaluationReport") -> Table:
    """Return the refusal rates where the prompts were asked in other ways, beside the plain ones of the same ids."""
    columns = ["asked", "prompts", "n", *(["base"] if report.base_rates else []), "model"]
    columns += [*(["p (McNemar)"] if report.changes else []), "asked plainly", "p (plain)"]
    table = Table(*columns, title="Asked in other ways")
    for name, part in report.parts.items():
        for kind, rate in part.rates.items():
            before = [_cell(part.base_rates[kind])] if part.base_rates else []
            change = [f"{part.changes[kind].p_value:.2g}"] if part.changes else []
            plain = part.beside_plain.get(kind)
            beside = ("", "") if plain is None else (f"{plain.share_before:.1%}", f"{plain.p_value:.2g}")
            table.add_row(name, kind, str(rate.n), *before, _cell(rate), *change, *beside)
    table.caption = "asked plainly: what the model refuses of the prompts of the same ids in English, in a first turn"
    return table


def damage_table(report: "EvaluationReport") -> Table:
    """Return what else changed, as the report's measurements say it."""
    table = Table("", "unit", "base", "model", "change", title="What else changed")
    for measurement in report.measurements:
        table.add_row(*measurement.cells())
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
