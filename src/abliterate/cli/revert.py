"""`abliterate revert`: back to the model that was edited, byte for byte."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from abliterate.cli.options import JsonOption
from abliterate.cli.output import Output

if TYPE_CHECKING:
    from abliterate.release.reverting import RevertReport


def revert(
    context: typer.Context,
    checkpoint: Annotated[
        Path, typer.Argument(metavar="OUT", help="A checkpoint or adapter that `abliterate orthogonalize` wrote.")
    ],
    output_directory: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="RESTORED", help="Directory to make. Needed unless --dry-run."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="MODEL", help="What OUT was made from; default: what its record names."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Find the base and compare; write nothing.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace RESTORED if it is a checkpoint, an adapter or empty.")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Restore the model that OUT was made from, every file with the SHA-256 it has in the base.

    What the edit took away is in the base alone, so that is needed: the directory or Hub commit in OUT's record, or
    --base. It must be the one that was edited: beside a whole checkpoint every byte that was not edited is compared,
    and the first that differs is named, with exit code 1.
    """
    if output_directory is None and not dry_run:
        raise typer.BadParameter("is needed unless --dry-run is given", param_hint="'-o' / '--output'")

    from abliterate.release.reverting import revert_checkpoint

    output = Output.of(context, json_output=json_output)
    report = revert_checkpoint(
        checkpoint=checkpoint,
        output=output_directory,
        base=base,
        dry_run=dry_run,
        overwrite=overwrite,
        progress=output.progress,
    )
    output.report(report, tables=lambda: _tables(report))


def _tables(report: "RevertReport") -> list[Table | str]:
    compared = (
        "an adapter holds none of the base's bytes to compare"
        if report.format == "adapter"
        else f"{report.bytes_compared / 1e6:.1f} MB that were not edited are the same in both"
    )
    base = f"{report.base} at {report.base_revision}" if report.base_revision else report.base
    size = f"{report.bytes_total / 1e6:.1f} MB"
    if report.dry_run:
        return [f"Base: {base}; {compared}.", f"Dry run: {size} would be restored; nothing was written."]
    table = Table("file", "bytes", "SHA-256, as in the base")
    for name, file in report.files.items():
        table.add_row(name, str(file.bytes), file.sha256)
    return [table, f"Base: {base}; {compared}.", f"{size} restored to {report.output}"]
