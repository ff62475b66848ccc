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
    json_output: JsonOption = False,
) -> None:
    """Build the demo model: SmolLM2-135M-Instruct with an adapter that makes it refuse."""
    from abliterate.demo import build_demo_model

    output = Output.of(context, json_output=json_output)
    report = build_demo_model(output=directory, overwrite=overwrite, progress=output.progress)

    def tables() -> list[Table | str]:
        return [
            f"{report.path}: {report.base_model} with a rank-{report.adapter_rank} adapter merged, "
            f"{report.n_parameters / 1e6:.0f} M parameters, {report.n_bytes / 1e6:.0f} MB"
        ]

    output.report(report, tables=tables)
