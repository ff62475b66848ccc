"""`abliterate extract`: find the refusal direction of a model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from abliterate.cli.options import (
    MODEL_DEFAULTS,
    PROMPT_DEFAULTS,
    BatchSizeOption,
    DeviceOption,
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
from abliterate.cli.output import Output, OutputFile, check_outputs, command_line, writing
from abliterate.errors import InputError
from abliterate.extraction.options import (
    DirectionRecipe,
    ExtractionOptions,
    Filter,
    Goal,
    RepairOptions,
    Thresholds,
    Variant,
)
from abliterate.models.options import DeviceMap, ModelOptions

if TYPE_CHECKING:
    from abliterate.checkpoints.model_source import ModelSource
    from abliterate.extraction.report import Extraction, ExtractionReport, NoCandidatePassesError, RepairReport
    from abliterate.extraction.score_report import ScoreTable
    from abliterate.extraction.selection import CandidateScore


DEFAULTS = ExtractionOptions()
REPAIR_DEFAULTS = RepairOptions()


def extract(
    context: typer.Context,
    model: ModelArg,
    output_file: Annotated[Path, output_option("FILE", "Direction file (safetensors) to write.")],
    harmful: HarmfulOption = PROMPT_DEFAULTS.harmful,
    harmless: HarmlessOption = PROMPT_DEFAULTS.harmless,
    n_train: Annotated[int, option(ExtractionOptions, "n_train")] = DEFAULTS.n_train,
    n_val: Annotated[int, option(ExtractionOptions, "n_val")] = DEFAULTS.n_val,
    seed: Annotated[int, option(ExtractionOptions, "seed")] = DEFAULTS.seed,
    kl_threshold: Annotated[float, option(Thresholds, "kl")] = DEFAULTS.thresholds.kl,
    induce_threshold: Annotated[float, option(Thresholds, "induce")] = DEFAULTS.thresholds.induce,
    prune_layers: Annotated[float, option(Thresholds, "prune_layers")] = DEFAULTS.thresholds.prune_layers,
    system_prompt: SystemPromptOption = MODEL_DEFAULTS.system_prompt,
    refusal_token: Annotated[list[str] | None, option(ExtractionOptions, "refusal_tokens")] = None,
    filter_prompts: Annotated[Filter, option(ExtractionOptions, "filter")] = DEFAULTS.filter,
    no_filter: Annotated[bool, typer.Option("--no-filter", hidden=True, help="The same as --filter none.")] = False,
    confirm: Annotated[int | None, option(ExtractionOptions, "confirm")] = DEFAULTS.confirm,
    exhaustive: Annotated[bool, option(ExtractionOptions, "exhaustive")] = DEFAULTS.exhaustive,
    variant: Annotated[Variant, option(DirectionRecipe, "variant")] = DEFAULTS.recipe.variant,
    winsorize: Annotated[float | None, option(DirectionRecipe, "winsorize")] = DEFAULTS.recipe.winsorize,
    rank: Annotated[int, option(ExtractionOptions, "rank")] = DEFAULTS.rank,
    bootstrap: Annotated[int, option(ExtractionOptions, "n_bootstrap")] = DEFAULTS.n_bootstrap,
    goal: Annotated[
        Goal,
        typer.Option("--goal", help="remove: the refusal direction; repair: that of false refusals, true ones stay."),
    ] = "remove",
    borderline: Annotated[str, option(RepairOptions, "borderline")] = REPAIR_DEFAULTS.borderline,
    orthogonal: Annotated[float, option(RepairOptions, "orthogonal")] = REPAIR_DEFAULTS.orthogonal,
    max_lost: Annotated[float, option(RepairOptions, "max_lost")] = REPAIR_DEFAULTS.max_lost,
    dtype: DtypeOption = MODEL_DEFAULTS.dtype,
    device: DeviceOption = MODEL_DEFAULTS.device,
    batch_size: BatchSizeOption = "auto",
    device_map: Annotated[DeviceMap | None, option(ModelOptions, "device_map")] = MODEL_DEFAULTS.device_map,
    stream_layers: Annotated[bool, option(ModelOptions, "stream_layers")] = MODEL_DEFAULTS.stream_layers,
    report: Annotated[Path | None, report_option("one HTML page, scores (JSON, CSV) and charts (SVG)")] = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustRemoteCodeOption = MODEL_DEFAULTS.trust_remote_code,
    json_output: JsonOption = False,
) -> None:
    """Find the direction in the residual stream that mediates refusal, and write it to a file.

    SPEC is `bundled`, a .txt/.jsonl/.json/.csv/.parquet file, or a Hub dataset ID or ID@rev, with [:split[:column]].
    When no candidate passes the selection, the nearest ones are shown and the exit code is 3.

    Short replies show which prompts the model refuses. Where the paper's rule (a refusal token is more likely than not
    to come first) agrees with them it is used as it is; a model that refuses in other ways is judged by its replies,
    its refusal tokens and the zero of its scores are taken from them, and the file says so.

    Recordings and scores are kept in OUTPUT.work until the file is written: an interrupted extraction, or one with
    other thresholds after exit code 3, goes on from there. `torchrun --nproc-per-node N -m abliterate extract ...`
    (or `accelerate launch` on GPUs) shares the work between N processes.

    --stream-layers needs the memory of one layer (or of the output head) and reads the weights four times, whatever the
    number of prompts and candidates: for the first tokens, the means, induce, and bypass with KL; eight times where
    every answer starts alike, once more with --rank. What does not fit into memory lies in files beside OUTPUT.

    --variant, --winsorize and --rank depart from the paper; each file says which were used. With --rank K there are K
    files, NAME.1.safetensors (the best) to NAME.K.safetensors: `orthogonalize` projects them out together when each is
    given with a --direction of its own.

    --goal repair looks for the direction of false refusals: from borderline prompts (safe ones that look unsafe) that
    the model answers to those that it refuses, without the true refusal direction. Ablating what is chosen leaves at
    most --max-lost of the harmful validation prompts answered; exit code 3 where nothing does.
    """
    from abliterate.checkpoints.saved_work import work_directory
    from abliterate.extraction.report import NoCandidatePassesError
    from abliterate.extraction.run import extract_direction
    from abliterate.extraction.score_report import write_score_report
    from abliterate.pages.extraction_page import write_extraction_page
    from abliterate.processes import in_first_process

    if stream_layers and device_map:
        raise typer.BadParameter("cannot go with --stream-layers", param_hint="'--device-map'")
    output = Output.of(context, json_output=json_output)
    options = ExtractionOptions(
        n_train=n_train,
        n_val=n_val,
        seed=seed,
        thresholds=Thresholds(kl=kl_threshold, induce=induce_threshold, prune_layers=prune_layers),
        refusal_tokens=tuple(refusal_token or ()),
        filter="none" if no_filter else filter_prompts,
        confirm=confirm,
        exhaustive=exhaustive,
        recipe=DirectionRecipe(variant=variant, winsorize=winsorize),
        rank=rank,
        n_bootstrap=bootstrap,
    )
    model_options = ModelOptions(
        dtype=dtype,
        device=device,
        batch_size=parse_batch_size(batch_size),
        system_prompt=system_prompt,
        trust_remote_code=trust_remote_code,
        device_map=device_map,
        stream_layers=stream_layers,
    )
    repair = RepairOptions(borderline=borderline, orthogonal=orthogonal, max_lost=max_lost)
    if goal == "repair":
        if report is not None:
            raise typer.BadParameter("cannot go with --goal repair", param_hint="'--report'")
        _check_outputs([output_file], None, model)
        _repair(
            output,
            output_file,
            model=_resolved(model, revision, [output_file], output),
            harmful=harmful,
            harmless=harmless,
            options=options,
            repair=repair,
            model_options=model_options,
        )
        return
    if repair != REPAIR_DEFAULTS:
        raise typer.BadParameter("--borderline, --orthogonal and --max-lost go with it", param_hint="'--goal repair'")
    files = _file_names(output_file, rank)
    _check_outputs(files, report, model)

    def write_report(table: "ScoreTable", found: "ExtractionReport | None" = None) -> None:
        if report is None:
            return
        with writing(report):
            write_score_report(table, report)
            write_extraction_page(table, report, command=command_line(), report=found)

    def deliver(extraction: "Extraction") -> None:
        if in_first_process():
            for file, direction in zip(files, extraction.directions, strict=True):
                direction.save(file)
            write_report(extraction.score_table, extraction.report)

    try:
        extraction = extract_direction(
            model=_resolved(model, revision, files, output),
            harmful=harmful,
            harmless=harmless,
            options=options,
            model_options=model_options,
            progress=output.progress,
            work_directory=work_directory(output_file),
            deliver=deliver,
        )
    except NoCandidatePassesError as error:
        if in_first_process():
            write_report(error.score_table)
        tables: list[Table | str] = [_nearest_table(error), *_next_command(error)]
        output.report(error.report, tables=lambda: tables, document="not_found")
        raise
    output.report(
        {"direction_file": files[0], "direction_files": files, **output.plain(extraction.report)},
        tables=lambda: [*_tables(extraction.report), f"direction written to {', '.join(map(str, files))}"],
    )


def _repair(output: Output, output_file: Path, **what: Any) -> None:
    from abliterate.checkpoints.saved_work import work_directory
    from abliterate.extraction.repair import extract_repair
    from abliterate.processes import in_first_process

    found = extract_repair(
        **what,
        progress=output.progress,
        work_directory=work_directory(output_file),
        deliver=lambda repair: repair.direction.save(output_file) if in_first_process() else None,
    )
    output.report(
        {"direction_file": output_file, **output.plain(found.report)},
        tables=lambda: [*_repair_tables(found.report), f"direction written to {output_file}"],
        document="repair",
    )


def _repair_tables(report: "RepairReport") -> list[Table]:
    chosen = report.selected
    table = Table("position", "layer", "borderline", "harmful", "KL", title=f"False refusals of {report.model}")
    table.add_row(*map(str, (chosen.position, chosen.layer)), *map(_number, (chosen.bypass, chosen.kept, chosen.kl)))
    kept = ", ".join(f"{c.kept}/{c.sampled} {name.replace('_', ' ')}" for name, c in report.counts.items())
    table.caption = (
        f"mean refusal metric of validation prompts that are refused; unchanged: {report.baseline['borderline']:.2f} "
        f"on borderline, {report.baseline['harmful']:.2f} on harmful ones; zero {report.zero:.2f}; refused, or "
        f"answered where harmless: {kept}; {report.share_left:.0%} of the difference is left where the true refusal "
        "direction is taken out"
    )
    replies = Table("position", "layer", "borderline refused", "harmful refused", title="Confirmed by replies")
    for one in report.confirmed:
        harmful = f"{one.harmful} of {one.n_harmful}"
        replies.add_row(str(one.position), str(one.layer), f"{one.borderline} of {one.n_borderline}", harmful)
    replies.caption = "replies to validation prompts with it ablated; the unchanged model refuses all of them"
    return [table, replies]


def _file_names(output_file: Path, rank: int) -> list[Path]:
    if rank == 1:
        return [output_file]
    return [output_file.with_name(f"{output_file.stem}.{i}{output_file.suffix}") for i in range(1, rank + 1)]


def _check_outputs(files: list[Path], report: Path | None, model: str) -> None:
    """Check before hours of work what would be found after them, or would lose something."""
    from abliterate.directions import is_direction_file

    for file in files:
        if file.is_dir():
            beside = file if not (file / "config.json").exists() else file.absolute().parent
            hint = beside / "refusal.safetensors"
            raise InputError(f"{file}: is a directory; give -o a file to write, such as {hint}")
    check_outputs(
        *(OutputFile(path=file, what="direction file", is_own=is_direction_file) for file in files), report=report
    )
    _check_outside(files, Path(model))


def _check_outside(files: list[Path], model: Path) -> None:
    if not model.is_dir():
        return
    for file in files:
        if file.resolve().is_relative_to(model.resolve()):
            raise InputError(f"{file}: lies in the model's own directory {model}; choose another -o")


def _resolved(model: str, revision: str | None, files: list[Path], output: Output) -> "ModelSource":
    from abliterate.checkpoints.model_source import resolve_model

    source = resolve_model(model, revision=revision, progress=output.progress)
    # Where the Hub's client put a model is known only now.
    _check_outside(files, source.path)
    return source


def _tables(report: "ExtractionReport") -> list[Table]:
    tables = [_summary(report)]
    if report.confirmed:
        table = Table("position", "layer", "not answered, ablated", "refused, added", title="Confirmed by replies")
        for one in report.confirmed:
            unanswered, induced = f"{one.unanswered} of {one.n_harmful}", f"{one.induced} of {one.n_harmless}"
            table.add_row(str(one.position), str(one.layer), unanswered, induced)
        table.caption = "replies to validation prompts; the unchanged model refuses all harmful and no harmless ones"
        tables.append(table)
    if (found := report.robustness) is not None:
        table = Table("position", "layer", "chosen in", title=f"{found.n_resamples} resamplings of the prompts")
        for winner in found.winners[:5]:
            table.add_row(str(winner.position), str(winner.layer), f"{winner.share:.1%}")
        table.add_row("nothing passes", "", f"{found.share_none:.1%}")
        table.caption = (
            f"cosine with the direction of resampled training prompts: mean {found.mean_cosine:.4f}, "
            f"5 % {found.low_cosine:.4f}, 95 % {found.high_cosine:.4f}"
        )
        tables.append(table)
    return tables


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _row(score: "CandidateScore") -> list[str]:
    return [str(score.position), str(score.layer), *map(_number, (score.bypass, score.induce, score.kl))]


def _summary(report: "ExtractionReport") -> Table:
    table = Table("position", "layer", "bypass", "induce", "KL", title=f"Refusal direction of {report.model}")
    for score in (report.selected, *report.further):
        table.add_row(*_row(score))
    if report.together is not None:
        table.add_row("together", "", _number(report.together.bypass), "", _number(report.together.kl))
    kept = ", ".join(f"{c.kept}/{c.sampled} {name.replace('_', ' ')}" for name, c in report.counts.items())
    tokens = " ".join(repr(token.text) for token in report.refusal_tokens)
    refusal = report.refusal
    judged = (
        f"prompts filtered by {refusal.filter}: {refusal.reason}; scored by {refusal.measure}, zero {refusal.zero:.2f}"
    )
    table.caption = (
        f"{report.n_passing} of {report.n_scored} scored candidates known to pass; unchanged model: "
        f"{report.baseline.harmful:.2f} on harmful, {report.baseline.harmless:.2f} on harmless prompts; "
        f"candidates: {report.recipe.in_words}; refusal tokens {tokens}; {judged}; prompts kept: {kept}"
    )
    return table


def _nearest_table(error: "NoCandidatePassesError") -> Table:
    table = Table("position", "layer", "bypass", "induce", "KL", "failed", title="No candidate passes; the nearest")
    for one in error.nearest:
        table.add_row(*_row(one.candidate), "; ".join(one.failed))
    for name, score in error.report["best"].items():
        table.add_row(*_row(score), f"best {name}")
    table.caption = f"prompts filtered by {error.evidence.filter}: {error.evidence.reason}"
    return table


def _next_command(error: "NoCandidatePassesError") -> list[str]:
    if not error.accepting:
        return []
    return [f"the nearest is accepted by: {command_line()} {' '.join(error.accepting)}"]
