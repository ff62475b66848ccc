"""`abliterate plan` and `inspect`: from files alone, what an edit would touch, and what is left of a direction."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from abliterate.cli.options import (
    ALL_COMPONENTS,
    BaseRevisionOption,
    ComponentsOption,
    JsonOption,
    LayersOption,
    ModelArg,
    PartialOption,
    QuantizedOption,
    RevisionOption,
    UnverifiedOption,
    output_option,
    parse_components,
    parse_layers,
    report_option,
)
from abliterate.cli.output import Output, OutputFile, check_outputs, command_line, gate_tables, writing
from abliterate.editing.options import EditOptions
from abliterate.errors import AbliterateError, InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from abliterate.editing.plan_report import PlanReport
    from abliterate.inspection.reading import Inspection
    from abliterate.inspection.report import InspectionReport, PairReading
    from abliterate.inspection.sources import PairSources
    from abliterate.release.gates import GateResult
    from abliterate.release.inspection_runs import RunReading


DEFAULTS = EditOptions()
# Names that a line shows before it counts the others.
_SHOWN = 4
InspectBaseOption = Annotated[
    str | None,
    typer.Option("--base", metavar="MODEL", help="What MODEL is held against: the model that it was made from."),
]
InspectDirectionsOption = Annotated[
    list[Path] | None,
    typer.Option("--direction", help="Direction file to look for in the weights; may be repeated."),
]
InspectOutputOption = Annotated[
    Path | None,
    output_option("FILE", "Direction file to write: what was projected out; of each layer one where they differ."),
]
InspectReportOption = Annotated[
    Path | None,
    report_option("one HTML page, and the JSON"),
]
InspectRunOption = Annotated[
    bool,
    typer.Option(
        "--run", help="Run both models on a few prompts: what is left in the stream, and how many each refuses."
    ),
]
InspectFailIfOption = Annotated[
    list[str] | None,
    typer.Option(
        "--fail-if",
        metavar="CONDITION",
        help="End with exit code 1 if this holds of the report, such as 'verdict!=identical'; may be repeated.",
    ),
]


def plan(
    context: typer.Context,
    model: ModelArg,
    components: ComponentsOption = ALL_COMPONENTS,
    layers: LayersOption = None,
    quantized: QuantizedOption = DEFAULTS.quantized,
    unverified: UnverifiedOption = DEFAULTS.unverified,
    partial: PartialOption = DEFAULTS.partial,
    revision: RevisionOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show what `orthogonalize` would do to MODEL: which tensors, why not others, disk and memory, licence.

    Only config.json and the headers of the weight files are read; of a Hub model nothing else is downloaded.
    """
    roles, layer_range = parse_components(components), parse_layers(layers)

    from abliterate.editing.plan_report import plan_layout, read_layout

    output = Output.of(context, json_output=json_output)
    layout = read_layout(model=model, revision=revision)
    options = EditOptions(
        components=roles, layers=layer_range, quantized=quantized, unverified=unverified, partial=partial
    )
    proof = None
    if unverified or partial:
        from abliterate.editing.tiny_twin import prove_on_tiny_twin

        proof = prove_on_tiny_twin(layout=layout, options=options, progress=output.progress)
    report = plan_layout(layout, options=options, proof=proof)
    output.report(report, tables=lambda: _tables(report))


def _tables(report: "PlanReport") -> list[Table | str]:
    edited = Table(
        Column("role", no_wrap=True),
        "layers",
        Column("tensor, and norms between it and the stream", overflow="fold"),
        Column("count", justify="right", no_wrap=True),
        "stored as",
        Column("MB", justify="right", no_wrap=True),
    )
    for group in report.groups:
        edited.add_row(
            group.role,
            group.layers or "-",
            "\n> ".join((group.pattern, *group.norms)),
            str(group.count),
            f"{' x '.join(map(str, group.shape))} {group.dtype}, axis {group.residual_axis}",
            f"{group.bytes / 1e6:.2f}",
        )
    return [edited, *_left_alone(report), *_facts(report), *report.notes]


def _left_alone(report: "PlanReport") -> list[Table | str]:
    from abliterate.architectures.writers import LeftAlone
    from abliterate.editing.plan_report import group_left_alone

    reason = "a residual writer that --components or --layers leaves out"
    not_selected = [LeftAlone(tensor_name=name, reason=reason) for name in report.not_selected]
    table = Table(Column("left alone", overflow="fold"), "count", "why")
    for group in group_left_alone([*report.left_alone, *not_selected]):
        table.add_row(group.tensors, str(group.count), group.reason)
    return [table] if table.row_count else []


def _facts(report: "PlanReport") -> list[Table | str]:
    where = report.model if report.revision is None else f"{report.model} at {report.revision}"
    licence = report.license_name or report.license or "not known"
    link = f" ({report.license_link})" if report.license_link else ""
    gated = f"; gated on the Hub ({report.gated} approval)" if report.gated else ""
    total = sum(report.counts.values())
    lines = [
        f"{where}: {report.model_type}, {report.n_layers} layers, d_model {report.d_model}; "
        f"licence {licence}{link}{gated}",
        f"{total} tensors to edit in {report.n_shards} files: {report.bytes_edited / 1e6:.1f} of "
        f"{report.bytes_weights / 1e6:.1f} MB of weights",
        f"Disk: {report.disk_bytes / 1e6:.1f} MB for the edited checkpoint"
        + (f", after a download of {report.download_bytes / 1e6:.1f} MB" if report.download_bytes else ""),
        f"Memory: {report.memory_bytes / 1e6:.1f} MB for {report.largest_tensor}, besides Python and torch",
    ]
    if report.tied_embeddings:
        lines.append(
            "The embeddings are tied: the output head is one matrix with the token embedding, so editing one edits both"
        )
    return list(lines)


def inspect(
    context: typer.Context,
    model: ModelArg,
    base: InspectBaseOption = None,
    directions: InspectDirectionsOption = None,
    output_file: InspectOutputOption = None,
    report_directory: InspectReportOption = None,
    run: InspectRunOption = False,
    fail_if: InspectFailIfOption = None,
    revision: RevisionOption = None,
    base_revision: BaseRevisionOption = None,
    json_output: JsonOption = False,
) -> None:
    """Say what was done to MODEL, whoever made it and however it is stored, from its files alone.

    With --base every tensor is held against the base's: verdict identical, requantised, directional, low_rank,
    fine_tuned or unrelated; the direction that was projected out, how strongly, and what is left. Other shards, names
    with other prefixes, dtypes and quantised layouts are understood; of two Hub models only the files that differ are
    downloaded. Without --base: what MODEL's record and card say, and what its weights have of --direction. --fail-if
    takes verdict!=WORD and numbers (tensors_edited>0, record_problems>0, ...). Nothing is run without --run.
    """
    from abliterate.inspection.reading import inspect_model
    from abliterate.inspection.sources import resolve_pair
    from abliterate.pages.inspection_page import write_inspection_page
    from abliterate.release import gates

    output = Output.of(context, json_output=json_output)
    check_outputs(_direction_file(output_file), report=report_directory)
    if output_file is not None and base is None:
        raise InputError("--output writes the direction that a base was freed of; name that base with --base")
    if run and base is None:
        raise InputError("--run holds a model against its base on prompts; name that base with --base")
    conditions = [gates.parse_gate(text, gates.INSPECTION_NAMES) for text in fail_if or ()]
    with resolve_pair(model, base, revision=revision, base_revision=base_revision, progress=output.progress) as pair:
        found = inspect_model(
            model=pair.model,
            base=pair.base,
            directions=directions or (),
            opened=pair.opened,
            same_files=pair.same_files,
            progress=output.progress,
        )
        ran, not_run = _ran(pair, found, directions or (), output) if run else (None, None)
    report, failure = _saved(found, output_file)
    results = gates.judge_gates(conditions, gates.inspection_numbers(report))
    _print(output, report, results, ran)
    if report_directory is not None:
        with writing(report_directory):
            write_inspection_page(report, report_directory, command=command_line())
    # Last: what was read at length is not lost.
    for error in (failure, not_run):
        if error is not None:
            raise error
    gates.require(results)


def _ran(
    pair: "PairSources", found: "Inspection", directions: "Sequence[Path]", output: Output
) -> "tuple[RunReading | None, AbliterateError | None]":
    """Run both models; return what they did, or why that cannot be said."""
    from abliterate.directions import load_direction
    from abliterate.release.inspection_runs import read_runs

    try:
        if pair.opened is not None or pair.base is None:
            raise InputError("--run needs both models whole; name directories, or download what is on the Hub first")
        given = [load_direction(each).vector for each in directions]
        return read_runs(
            model=pair.model, base=pair.base, recovered=found.vectors, given=given, progress=output.progress
        ), None
    except AbliterateError as error:
        return None, error


def _print(
    output: Output, report: "InspectionReport", results: "Sequence[GateResult]", ran: "RunReading | None"
) -> None:
    beside = {"gates": output.plain(results)} if results else {}
    if ran is not None:
        beside["run"] = output.plain(ran)
    output.report(
        {**output.plain(report), **beside},
        tables=lambda: [*_pair_tables(report), *_readings(report), *_run_lines(ran), *gate_tables((), results)],
    )


def _run_lines(ran: "RunReading | None") -> list[str]:
    if ran is None:
        return []
    lines = [
        f"Run on {2 * ran.n_prompts} prompts: of what the base's stream has of the {ran.directions} directions, "
        f"{ran.left:.2%} is in the model's"
    ]
    if ran.base.refused is not None and ran.model.refused is not None:
        lines.append(
            f"Refused in short replies, of {ran.n_prompts} harmful prompts: {ran.base.refused} by the base, "
            f"{ran.model.refused} by the model; of {ran.n_prompts} harmless ones {ran.base.refused_harmless} and "
            f"{ran.model.refused_harmless}"
        )
    return lines


def _saved(found: "Inspection", output_file: Path | None) -> "tuple[InspectionReport, InputError | None]":
    """Write the recovered directions; return the report, and why they could not be written."""
    if output_file is None:
        return found.report, None
    try:
        made = found.directions()
        files = _file_names(output_file, made)
        check_outputs(*map(_direction_file, files))
        with writing(output_file, "-o"):
            for path, direction in zip(files, made.values(), strict=True):
                direction.save(path)
    except InputError as error:
        return found.report, error
    return found.written_to(files), None


def _direction_file(path: Path | None) -> OutputFile:
    from abliterate.directions import is_direction_file

    return OutputFile(path=path, what="direction file", is_own=is_direction_file)


def _file_names(output_file: Path, added: "Iterable[str]") -> list[Path]:
    names = (".".join(filter(None, (output_file.stem, each))) for each in added)
    return [output_file.with_name(f"{name}{output_file.suffix}") for name in names]


def _pair_tables(report: "InspectionReport") -> list[Table | str]:
    lines: list[Table | str] = []
    if report.pair is not None:
        lines += [_parts(report.pair), *_pair_lines(report)]
    record = report.record
    if record.record is not None:
        claims = ", ".join(f"{name} {value}" for name, value in record.claims.items() if isinstance(value, int | str))
        lines.append(f"{record.record} says: {claims or 'nothing that can be read'}")
        if report.pair is None and not record.problems:
            lines.append("Whether that describes the bytes can only be told beside the base (--base)")
    lines += [f"The record does not describe the bytes: it {problem}" for problem in record.problems]
    if record.base_model is not None or record.tags:
        said = [f"base_model {record.base_model}"] if record.base_model else []
        said += [f"tags {', '.join(record.tags)}"] if record.tags else []
        lines.append(f"The card says: {'; '.join(said)}")
    if report.pair is None and not report.tensors:
        lines.append("Nothing more can be said without a base (--base) or a direction (--direction)")
    return lines


def _parts(pair: "PairReading") -> Table:
    table = Table("part", "tensors", "changed", "|D|/|W|", "strength")
    for part in pair.parts:
        change = "" if part.change is None else f"{part.change:.2e}"
        strengths = "" if part.strengths is None else f"{part.strengths[0]:.3f} to {part.strengths[1]:.3f}"
        table.add_row(part.part, str(part.tensors), str(part.changed), change, strengths)
    return table


def _pair_lines(report: "InspectionReport") -> list[str]:
    pair = report.pair
    assert pair is not None
    words = [word for word in ("exact", "partial", "restored_norms") if getattr(pair, word)]
    lines = [
        f"{report.model} beside {report.base}: {pair.tensors} tensors, {pair.equal_bytes} with the same bytes, "
        f"{pair.equal_numbers} with the same numbers in others, {pair.rounded} rounded, {pair.edited} edited; "
        f"{pair.shards_changed} of {pair.shards} files changed"
    ]
    counts = (("added", pair.added), ("missing", pair.missing), ("of another shape", pair.reshaped))
    lines += [f"{len(names)} tensors {what}: {_first_names(names)}" for what, names in counts if names]
    lines += [f"{name}: {rows:+d} rows" for name, rows in pair.padded.items()]
    lines += [f"{name} adds a vector of length {length:.4g}" for name, length in pair.added_vectors.items()]
    lines += [f"{what}: {_first_names(names)}" for what, names in (
        ("config.json differs in", pair.config_changes), ("Other files that differ", pair.files_changed)
    ) if names]  # fmt: skip
    if pair.low_rank is not None:
        low = pair.low_rank
        lines.append(f"Rank {low.least_rank} to {low.rank} in {low.tensors} tensors: {_first_names(low.targets)}")
    found = pair.directions
    if found is not None:
        cosines = ", ".join(f"{cosine:.4f}" for cosine in found.cosines)
        beside = f"; cosine with the given: {cosines}" if cosines else ""
        lines.append(f"Recovered from {found.tensors} tensors: k {found.k}, {found.scope}{beside}")
        if found.files:
            lines.append(f"Written to {_first_names(found.files)}")
    lines += list(pair.notes)
    beside = f" ({', '.join(words)})" if words else ""
    return [*lines, f"verdict: {pair.verdict}{beside}: {pair.reason}"]


def _first_names(names: "Sequence[str]") -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _readings(report: "InspectionReport") -> list[Table | str]:
    if not report.tensors:
        return []
    table = Table("role", "tensors", "dtype", "|U·W|/|W|", "largest")
    if report.left is not None:
        table.add_column("share of the base's")
        table.add_column("largest share")
    for role in report.roles:
        cells = [role.role, str(role.tensors), ", ".join(role.dtypes), f"{role.component:.2e}", f"{role.largest:.2e}"]
        if role.left is not None and role.most_left is not None:
            cells += [f"{role.left:.2%}", f"{role.most_left:.2%}"]
        table.add_row(*cells)
    lines = [f"{report.model}: {report.model_type}; a matrix of random numbers has {report.random:.2e}"]
    if report.left is not None:
        lines.append(f"Of what {report.base} has of the direction, {report.left:.2%} is in it, over all tensors")
    return [table, *lines]
