"""`abliterate refine`: find how far each layer and role has to be edited."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from abliterate.cli.options import (
    MODEL_DEFAULTS,
    PROMPT_DEFAULTS,
    BatchSizeOption,
    DeviceOption,
    DirectionOption,
    DtypeOption,
    HarmfulOption,
    HarmlessOption,
    JsonOption,
    ModelArg,
    RevisionOption,
    SystemPromptOption,
    TrustRemoteCodeOption,
    option,
    output_option,
    parse_batch_size,
    report_option,
)
from abliterate.cli.output import Output, OutputFile, check_outputs, command_line, holds_json, writing
from abliterate.interventions.refinement_options import RefinementOptions
from abliterate.models.options import ModelOptions
from abliterate.processes import in_first_process

if TYPE_CHECKING:
    from abliterate.interventions.refinement_report import FrontierPoint, RefinementReport


DEFAULTS = RefinementOptions()


def refine(
    context: typer.Context,
    model: ModelArg,
    direction: DirectionOption,
    output_file: Annotated[Path, output_option("FILE", "File of strengths (JSON) to write.")],
    max_refusals: Annotated[float | None, option(RefinementOptions, "max_refusals")] = DEFAULTS.max_refusals,
    max_kl: Annotated[float | None, option(RefinementOptions, "max_kl")] = DEFAULTS.max_kl,
    harmful: HarmfulOption = PROMPT_DEFAULTS.harmful,
    harmless: HarmlessOption = PROMPT_DEFAULTS.harmless,
    n_train: Annotated[int, option(RefinementOptions, "n_train")] = DEFAULTS.n_train,
    n_val: Annotated[int, option(RefinementOptions, "n_val")] = DEFAULTS.n_val,
    seed: Annotated[int, option(RefinementOptions, "seed")] = DEFAULTS.seed,
    steps: Annotated[int, option(RefinementOptions, "steps")] = DEFAULTS.steps,
    reply_tokens: Annotated[int, option(RefinementOptions, "reply_tokens")] = DEFAULTS.reply_tokens,
    borderline: Annotated[str, option(RefinementOptions, "borderline")] = DEFAULTS.borderline,
    max_lost: Annotated[float, option(RefinementOptions, "max_lost")] = DEFAULTS.max_lost,
    system_prompt: SystemPromptOption = MODEL_DEFAULTS.system_prompt,
    dtype: DtypeOption = MODEL_DEFAULTS.dtype,
    device: DeviceOption = MODEL_DEFAULTS.device,
    batch_size: BatchSizeOption = "auto",
    report: Annotated[Path | None, report_option("one HTML page with charts")] = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustRemoteCodeOption = MODEL_DEFAULTS.trust_remote_code,
    json_output: JsonOption = False,
) -> None:
    """Find the gentlest edit that takes the refusals away: a strength for each layer and role, in a file.

    `orthogonalize --strengths FILE` with the same --direction makes it. What is removed from each layer is a direction
    of its own, orthogonal to what harmless prompts have in common. Strengths are found by gradient, deterministically,
    and chosen by replies to validation prompts; the file holds the whole frontier of refusals against KL.

    Unlike the direction's own edit, this leaves some of the direction in the stream: it is beside the paper's, which
    stays exact. With a direction of false refusals (`extract --goal repair`) these go, and the true ones are held where
    they are, up to --max-lost. Exit code 3: nothing on the frontier is within --max-refusals.

    An interrupted run keeps the points that it has found in OUTPUT.work: the same command goes on from there, with
    other limits too.
    """
    from abliterate.checkpoints.model_source import resolve_model
    from abliterate.checkpoints.saved_work import work_directory
    from abliterate.interventions.refining import refine_edit
    from abliterate.pages.refinement_page import write_refinement_page

    check_outputs(OutputFile(path=output_file, what="file of strengths", is_own=holds_json("strengths")), report=report)
    output = Output.of(context, json_output=json_output)
    found = refine_edit(
        model=resolve_model(model, revision=revision, progress=output.progress),
        direction=direction,
        harmful=harmful,
        harmless=harmless,
        options=RefinementOptions(
            n_train=n_train,
            n_val=n_val,
            seed=seed,
            steps=steps,
            max_refusals=max_refusals,
            max_kl=max_kl,
            reply_tokens=reply_tokens,
            borderline=borderline,
            max_lost=max_lost,
        ),
        model_options=ModelOptions(
            dtype=dtype,
            device=device,
            batch_size=parse_batch_size(batch_size),
            system_prompt=system_prompt,
            trust_remote_code=trust_remote_code,
        ),
        progress=output.progress,
        work_directory=work_directory(output_file),
        deliver=lambda found: found.save(output_file) if in_first_process() else None,
    )
    output.report(
        {"strengths_file": output_file, **output.plain(found.report)},
        tables=lambda: [_table(found.report), f"strengths written to {output_file}"],
    )
    if in_first_process() and report is not None:
        with writing(report):
            write_refinement_page(found.report, report, command=command_line())


def _table(report: "RefinementReport") -> Table:
    columns = ["not answered", "metric", "KL first", "KL", "cross-entropy", "strengths"]
    if report.goal == "repair":
        columns = ["borderline", "harmful refused", *columns[1:]]
    table = Table("pressure", *columns, title=f"Frontier of {report.model}, validation prompts")
    for point in (report.plain, *report.frontier):
        name = "the direction" if point.pressure is None else f"{point.pressure:g}"
        table.add_row(f"{name} <-" if point is report.chosen else name, *_cells(point))
    table.caption = (
        "the direction: at strength 1 in all layers, without the embeddings; pressure: weight of the refusal score; "
        "cross-entropy: of the base's replies that are to stay; <- is what was written"
    )
    return table


def _cells(point: "FrontierPoint") -> list[str]:
    change = point.cross_entropy / point.base_cross_entropy - 1
    shares = (*point.attn, *point.mlp)
    return [
        f"{point.unanswered} of {point.n_to_answer}",
        *([] if point.refused is None else [f"{point.refused} of {point.n_to_refuse}"]),
        f"{point.metric:.2f}",
        f"{point.kl_first:.3f}",
        f"{point.kl:.3f}",
        f"{point.cross_entropy:.3f} ({change:+.1%})",
        f"{min(shares):.2f} to {max(shares):.2f}",
    ]
