"""`abliterate demo`: build the demo model from installed packages."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from abliterate.cli.options import JsonOption
from abliterate.cli.output import Output


def demo(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write the checkpoint.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DIR if it is a checkpoint or empty.")] = False,
    hardened: Annotated[
        bool, typer.Option("--hardened", help="The one with extended refusals: overview, refusal, reasons.")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Build the demo model: SmolLM2-135M-Instruct with an adapter that makes it refuse.

    With --hardened it refuses as arXiv 2505.19056 proposes against this very edit: with a neutral overview, the refusal
    and its reasons. Audit both to see what that changes (docs/extended_refusals.md).
    """
    from abliterate.models.demo import ADAPTER_DIRECTORY, HARDENED_ADAPTER_DIRECTORY, build_demo_model

    output = Output.of(context, json_output=json_output)
    report = build_demo_model(
        output=directory,
        overwrite=overwrite,
        adapter=HARDENED_ADAPTER_DIRECTORY if hardened else ADAPTER_DIRECTORY,
        progress=output.progress,
    )

    def tables() -> list[Table | str]:
        return [
            f"{report.path}: {report.base_model} with a rank-{report.adapter_rank} adapter merged, "
            f"{report.n_parameters / 1e6:.0f} M parameters, {report.n_bytes / 1e6:.0f} MB"
        ]

    output.report(report, tables=tables)
