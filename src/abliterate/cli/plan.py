"""`abliterate plan` and `inspect`: from files alone, what an edit would touch, and what is left of a direction."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from abliterate.cli.options import (
    ALL_COMPONENTS,
    BaseRevisionOption,
    ComponentsOption,
    DirectionsOption,
    JsonOption,
    LayersOption,
    ModelArg,
    PartialOption,
    QuantizedOption,
    RevisionOption,
    UnverifiedOption,
    parse_components,
    parse_layers,
)
from abliterate.cli.output import Output
from abliterate.editing.options import EditOptions

if TYPE_CHECKING:
    from abliterate.editing.plan_report import PlanReport
    from abliterate.release.inspection import InspectionReport


DEFAULTS = EditOptions()


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
    from abliterate.editing.plan_report import pattern_of

    counts: dict[tuple[str, str], int] = {}
    for kept in report.left_alone:
        key = (pattern_of(kept.tensor_name), kept.reason)
        counts[key] = counts.get(key, 0) + 1
    for name in report.not_selected:
        key = (pattern_of(name), "a residual writer that --components or --layers leaves out")
        counts[key] = counts.get(key, 0) + 1
    if not counts:
        return []
    table = Table(Column("left alone", overflow="fold"), "count", "why")
    for (pattern, reason), count in counts.items():
        table.add_row(pattern, str(count), reason)
    return [table]


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
    directions: DirectionsOption,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="MODEL", help="What each tensor is held against: the model before its edit."),
    ] = None,
    revision: RevisionOption = None,
    base_revision: BaseRevisionOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show what MODEL's weights have of a direction, whoever made them and however they are stored.

    Every tensor that writes to the residual stream is read, decoded and measured: safetensors, quantised or not, and
    GGUF. With --base also as a share of what the base has: what plain quantisation of an edited model gives back, for
    example. Nothing is run.
    """
    from abliterate.checkpoints.hub import resolve_model
    from abliterate.editing.record import resolve_base
    from abliterate.release.inspection import inspect_model

    output = Output.of(context, json_output=json_output)
    source = resolve_model(model, revision=revision)
    original = None
    if base is not None:
        original = resolve_base(base, revision=base_revision, edited=source, progress=output.progress)
    report = inspect_model(model=source, base=original, directions=directions, progress=output.progress)
    output.report(report, tables=lambda: _readings(report))


def _readings(report: "InspectionReport") -> list[Table | str]:
    table = Table("role", "tensors", "dtype", "|U·W|/|W|", "largest")
    if report.base is not None:
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
