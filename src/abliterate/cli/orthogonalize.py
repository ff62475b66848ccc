"""`abliterate orthogonalize`: project a direction out of a checkpoint's weights."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Column, Table

from abliterate.cli.options import (
    ALL_COMPONENTS,
    ComponentsOption,
    DirectionsOption,
    JsonOption,
    LayersOption,
    ModelArg,
    PartialOption,
    QuantizedOption,
    RevisionOption,
    UnverifiedOption,
    default_of,
    option,
    output_option,
    parse_components,
    parse_layers,
)
from abliterate.cli.output import Output
from abliterate.editing.options import ROLES, EditOptions, TiedPolicy, WriteOptions
from abliterate.editing.strengths import read_strengths
from abliterate.processes import in_first_process

if TYPE_CHECKING:
    from abliterate.architectures.names import Role
    from abliterate.checkpoints.model_source import ModelSource
    from abliterate.editing.edits import Kind
    from abliterate.editing.plan import TwinProof
    from abliterate.editing.record import EditedTensor, OrthogonalizationReport
    from abliterate.interventions.hook_export import HookExport


DEFAULTS = EditOptions()


def orthogonalize(
    context: typer.Context,
    model: ModelArg,
    directions: DirectionsOption,
    output_directory: Annotated[
        Path | None, output_option("OUT", "Directory to write. Needed unless --dry-run.")
    ] = None,
    components: ComponentsOption = ALL_COMPONENTS,
    layers: LayersOption = None,
    strength: Annotated[float, option(EditOptions, "strength")] = DEFAULTS.strength,
    strengths: Annotated[Path | None, option(EditOptions, "strengths")] = None,
    tied: Annotated[TiedPolicy, option(EditOptions, "tied")] = DEFAULTS.tied,
    preserve_norms: Annotated[bool, option(EditOptions, "preserve_norms")] = DEFAULTS.preserve_norms,
    add: Annotated[float | None, option(EditOptions, "add")] = DEFAULTS.add,
    quantized: QuantizedOption = DEFAULTS.quantized,
    output_format: Annotated[
        Literal["checkpoint", "adapter", "hooks"],
        typer.Option(
            "--format",
            help="A whole checkpoint; the same edit as a LoRA adapter for PEFT to merge, without --preserve-norms, "
            "--add and --tied untie; or where to hook a model whose weights must stay as they are.",
        ),
    ] = "checkpoint",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan; write nothing.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it is a checkpoint, an adapter or empty.")
    ] = False,
    resume: Annotated[bool, option(WriteOptions, "resume")] = default_of(WriteOptions, "resume"),
    workers: Annotated[int | None, option(WriteOptions, "workers")] = default_of(WriteOptions, "workers"),
    device: Annotated[str, option(WriteOptions, "device")] = default_of(WriteOptions, "device"),
    unverified: UnverifiedOption = DEFAULTS.unverified,
    partial: PartialOption = DEFAULTS.partial,
    revision: RevisionOption = None,
    json_output: JsonOption = False,
) -> None:
    """Write a copy of MODEL whose weights cannot write along the direction.

    Every tensor that writes to the residual stream is projected, W <- W - r (r^T W); all else is copied byte
    for byte. Give --direction several times to project out what several directions span. What was edited is
    read back from the disk and measured before OUT appears, whole or not at all, with a complete record in
    abliteration.json.

    A run that is interrupted, or finds the disk full, keeps its finished shards in .OUT.partial beside OUT, and
    --resume goes on from there. One process writes, with several threads: where a launcher such as torchrun starts
    more, the first writes and the others end at once.
    """
    if not in_first_process():
        return
    roles, layer_range = parse_components(components), parse_layers(layers)
    if output_directory is None and not dry_run:
        raise typer.BadParameter("is needed unless --dry-run is given", param_hint="'-o' / '--output'")
    if not 0 < strength < float("inf"):
        raise typer.BadParameter("must be a positive number", param_hint="'--strength'")
    if add is not None:
        if not math.isfinite(add) or add == 0:
            raise typer.BadParameter("must be a number other than 0", param_hint="'--add'")
        if len(directions) > 1:
            raise typer.BadParameter("takes one --direction", param_hint="'--add'")
        if (roles, layer_range, strength, tied, preserve_norms) != (
            DEFAULTS.components,
            DEFAULTS.layers,
            DEFAULTS.strength,
            DEFAULTS.tied,
            DEFAULTS.preserve_norms,
        ):
            raise typer.BadParameter(
                "projects nothing; leave out --components, --layers, --strength, --tied and --preserve-norms",
                param_hint="'--add'",
            )

    if output_format != "checkpoint" and (
        workers is not None or device != default_of(WriteOptions, "device") or resume
    ):
        raise typer.BadParameter(
            f"{output_format} takes no --workers, --device and --resume; leave them out", param_hint="'--format'"
        )
    if output_format == "hooks" and (dry_run or output_directory is None):
        raise typer.BadParameter("hooks takes no --dry-run; `plan` shows what writes", param_hint="'--format'")

    options = EditOptions(
        strengths=None if strengths is None else read_strengths(strengths),
        components=roles,
        layers=layer_range,
        strength=strength,
        tied=tied,
        preserve_norms=preserve_norms,
        add=add,
        quantized=quantized,
        unverified=unverified,
        partial=partial,
    )
    writing = WriteOptions(workers=workers, device=device, resume=resume)

    from abliterate.checkpoints.model_source import resolve_model

    output = Output.of(context, json_output=json_output)
    source = resolve_model(model, revision=revision, progress=output.progress)
    if output_format == "hooks" and output_directory is not None:
        from abliterate.interventions.hook_export import export_hooks

        export = export_hooks(
            source=source,
            direction=directions,
            output=output_directory,
            options=options,
            overwrite=overwrite,
            progress=output.progress,
        )
        output.report(export, tables=lambda: _places(export), document="hooks")
        return
    proof = _prove(source, options, output) if unverified or partial else None
    write: Callable[..., OrthogonalizationReport]
    if output_format == "checkpoint":
        from abliterate.editing.orthogonalization import orthogonalize_checkpoint

        write = functools.partial(orthogonalize_checkpoint, writing=writing, proof=proof)
    else:
        # An adapter's names are those of modules, so this imports more.
        from abliterate.editing.adapter import write_adapter

        write = write_adapter
    report = write(
        source=source,
        direction=directions,
        output=output_directory,
        options=options,
        dry_run=dry_run,
        overwrite=overwrite,
        progress=output.progress,
    )
    output.report(report, tables=lambda: _tables(report))


def _places(export: "HookExport") -> list[Table | str]:
    table = Table("operation", "at", "role", "places", Column("such as", overflow="fold"))
    groups: dict[tuple[str, str, str], list[str]] = {}
    for place in export.places:
        groups.setdefault((place.operation, place.at, place.role or "-"), []).append(place.module)
    for key, modules in groups.items():
        table.add_row(*key, str(len(modules)), modules[0])
    whole = "together what --intervention does" if export.whole else "some of what writes to the stream"
    control = "; a control vector for llama.cpp beside it" if export.control_vector else ""
    return [table, f"{len(export.places)} places, {whole}{control}; written to {export.output}"]


def _prove(source: "ModelSource", options: EditOptions, output: Output) -> "TwinProof | None":
    from abliterate.editing.plan_report import read_layout
    from abliterate.editing.tiny_twin import prove_on_tiny_twin

    return prove_on_tiny_twin(layout=read_layout(model=str(source.path)), options=options, progress=output.progress)


def _tables(report: "OrthogonalizationReport") -> list[Table | str]:
    table = Table("role", Column("kind", no_wrap=True), "tensors", "shapes", "dtype")
    for name in ("before", "after", "survivor"):
        table.add_column(name, no_wrap=True)
    table.caption = "the largest |r·W|/|W| before and after, and share of it that survives"
    groups: dict[tuple[Role, Kind], list[EditedTensor]] = {}
    for tensor in report.tensors:
        groups.setdefault((tensor.edit.writer.role, tensor.edit.kind), []).append(tensor)
    for role, kind in sorted(groups, key=lambda group: (ROLES.index(group[0]), group[1])):
        tensors = groups[role, kind]
        shapes = dict.fromkeys(" x ".join(map(str, tensor.edit.info.shape)) for tensor in tensors)
        table.add_row(
            role,
            kind,
            str(len(tensors)),
            ", ".join(sorted(shapes, key=len, reverse=True)),
            ", ".join(sorted({tensor.edit.stored_dtype for tensor in tensors})),
            *(_largest(tensors, field) for field in ("component_before", "component_after", "survivor")),
        )
    megabytes = f"{report.bytes_edited / 1e6:.1f} of {report.bytes_total / 1e6:.1f} MB"
    if report.dry_run:
        return [table, *report.notes, f"Dry run: {megabytes} would be edited; nothing was written."]
    if report.format == "adapter":
        size = sum(file.bytes for file in report.shards.values()) / 1e6
        return [
            table,
            f"{megabytes} would be edited by merging; an adapter of {size:.2f} MB written to {report.output}",
        ]
    lines = [f"{megabytes} edited; written to {report.output}"]
    if report.work is not None:
        work = report.work
        lines.append(f"{work.seconds:.1f} s with {work.workers} workers, {work.cpu_seconds:.1f} s of CPU")
        lines.append(
            f"{work.bytes_shared / 1e6:.1f} MB shared with the base, {work.bytes_read / 1e6:.1f} MB read, "
            f"{work.bytes_written / 1e6:.1f} MB written"
        )
    return [table, *lines]


def _largest(tensors: "list[EditedTensor]", field: str) -> str:
    values = [value for tensor in tensors if (value := getattr(tensor, field)) is not None]
    return f"{max(values):.1e}" if values else "-"
