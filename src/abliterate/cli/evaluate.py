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
from abliterate.cli.output import Output

if TYPE_CHECKING:
    from abliterate.evaluation import EvaluationReport, RefusalRate


class InterventionChoice(StrEnum):
    """What hooks do to the model while it is measured."""

    none = "none"
    ablate = "ablate"
    add = "add"


def evaluate(
    context: typer.Context,
    model: ModelArg,
    base: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="What to compare with: directory or Hub id.")
    ] = None,
    direction: Annotated[Path | None, typer.Option("--direction", help="Direction file for --intervention.")] = None,
    intervention: Annotated[
        InterventionChoice, typer.Option("--intervention", help="Ablate or add the direction by hooks.")
    ] = InterventionChoice.none,
    coefficient: Annotated[
        float, typer.Option("--coefficient", help="Dose of --intervention add; -1 bypasses, +1 induces.")
    ] = 1.0,
    harmful: HarmfulOption = "bundled",
    harmless: HarmlessOption = "bundled",
    borderline: Annotated[
        str, typer.Option("--borderline", metavar="SPEC", help="Safe prompts that look unsafe.")
    ] = "bundled",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Length of each completion.")] = 64,
    output_file: Annotated[Path | None, typer.Option("-o", "--output", help="Also write the JSON report here.")] = None,
    save_completions: Annotated[
        Path | None, typer.Option("--save-completions", help="Write all completions here (JSON Lines).")
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

    Completions are greedy and are not written anywhere unless --save-completions asks for it.
    """
    from abliterate.evaluation import EvaluationOptions, evaluate_model
    from abliterate.hub import resolve_model
    from abliterate.model import ModelOptions

    output = Output.of(context, json_output=json_output)
    report = evaluate_model(
        model=resolve_model(model, revision=revision),
        base=base,
        direction=direction,
        options=EvaluationOptions(
            harmful=harmful,
            harmless=harmless,
            borderline=borderline,
            max_new_tokens=max_new_tokens,
            intervention=intervention.value,
            coefficient=coefficient,
            save_completions=save_completions,
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
    output.report(report, tables=lambda: [rates_table(report)])


def rates_table(report: "EvaluationReport") -> Table:
    """Return the refusal rates of the model, beside those of its base when there is one."""
    columns = ["prompts", "n", *(["base"] if report.base_rates else []), "model", "degenerate"]
    table = Table(*columns, title=f"Refusal rates of {report.model} (Wilson 95 % intervals)")
    for kind, rate in report.rates.items():
        before = [_cell(report.base_rates[kind])] if report.base_rates else []
        table.add_row(kind, str(rate.n), *before, _cell(rate), str(rate.degenerate))
    if report.kl_harmless is not None:
        table.caption = f"harmless prompts: KL(base || model) of the first token {report.kl_harmless:.4f} nats"
    if report.cross_entropy is not None:
        entropy = report.cross_entropy
        table.caption = (
            f"{table.caption}; cross-entropy of the base's answers {entropy.base:.4f} -> {entropy.model:.4f} "
            f"nats a token ({entropy.relative_change:+.1%})"
        )
    return table


def _cell(rate: "RefusalRate") -> str:
    return f"{rate.rate:.1%} [{rate.low:.1%}, {rate.high:.1%}]"
