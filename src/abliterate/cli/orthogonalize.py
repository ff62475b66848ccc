"""`abliterate orthogonalize`: project a direction out of a checkpoint's weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from abliterate.cli.options import (
    ALL_COMPONENTS,
    ComponentsOption,
    DirectionOption,
    JsonOption,
    LayersOption,
    ModelArg,
    RevisionOption,
    parse_components,
    parse_layers,
)
from abliterate.cli.output import Output

if TYPE_CHECKING:
    from abliterate.abliteration_record import EditedTensor, OrthogonalizationReport


def orthogonalize(
    context: typer.Context,
    model: ModelArg,
    direction: DirectionOption,
    output_directory: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="OUT", help="Directory to make. Needed unless --dry-run."),
    ] = None,
    components: ComponentsOption = ALL_COMPONENTS,
    layers: LayersOption = None,
    strength: Annotated[
        float, typer.Option("--strength", help="Share of the component to remove; 1 removes it.")
    ] = 1.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan; write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is a checkpoint or empty.")] = False,
    revision: RevisionOption = None,
    json_output: JsonOption = False,
) -> None:
    """Write a copy of MODEL whose weights cannot write along the direction.

    Every tensor that writes to the residual stream is projected, W <- W - r (r^T W); all else is copied byte
    for byte. OUT appears whole or not at all, with a complete record in abliteration.json.
    """
    roles, layer_range = parse_components(components), parse_layers(layers)
    if output_directory is None and not dry_run:
        raise typer.BadParameter("is needed unless --dry-run is given", param_hint="'-o' / '--output'")
    if not 0 < strength < float("inf"):
        raise typer.BadParameter("must be a positive number", param_hint="'--strength'")

    from abliterate.edit_plan import EditOptions
    from abliterate.hub import resolve_model
    from abliterate.orthogonalization import orthogonalize_checkpoint

    output = Output.of(context, json_output=json_output)
    report = orthogonalize_checkpoint(
        source=resolve_model(model, revision=revision),
        direction=direction,
        output=output_directory,
        options=EditOptions(components=roles, layers=layer_range, strength=strength),
        dry_run=dry_run,
        overwrite=overwrite,
        progress=output.progress,
    )
    output.report(report, tables=lambda: _tables(report))


def _tables(report: "OrthogonalizationReport") -> list[Table | str]:
    table = Table("role", "tensors", "shapes", "dtype", "max |r·W|/|W| before", "after")
    for role, count in report.counts.items():
        tensors = [tensor for tensor in report.tensors if tensor.role == role]
        shapes = sorted({" x ".join(map(str, tensor.shape)) for tensor in tensors}, key=len, reverse=True)
        table.add_row(
            role,
            str(count),
            ", ".join(shapes),
            ", ".join(sorted({tensor.dtype for tensor in tensors})),
            _largest(tensors, "component_before"),
            _largest(tensors, "component_after"),
        )
    megabytes = f"{report.bytes_edited / 1e6:.1f} of {report.bytes_total / 1e6:.1f} MB"
    if report.dry_run:
        return [table, *report.notes, f"Dry run: {megabytes} would be edited; nothing was written."]
    return [table, f"{megabytes} edited; written to {report.output}"]


def _largest(tensors: "list[EditedTensor]", field: str) -> str:
    values = [value for tensor in tensors if (value := getattr(tensor, field)) is not None]
    return f"{max(values):.2e}" if values else "-"
