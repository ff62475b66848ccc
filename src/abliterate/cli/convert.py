"""`abliterate convert`: a GGUF file as a safetensors checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from abliterate.cli.options import JsonOption, one_output, output_option
from abliterate.cli.output import Output
from abliterate.models.options import ConvertedDtype

if TYPE_CHECKING:
    from abliterate.models.conversion import ConversionReport


def convert(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE.gguf", help="A GGUF file with a whole model.")],
    directory: Annotated[Path | None, typer.Argument(metavar="OUT", help="The same as -o OUT.")] = None,
    output_directory: Annotated[Path | None, output_option("OUT", "Directory to write.")] = None,
    dtype: Annotated[
        ConvertedDtype,
        typer.Option(
            "--dtype",
            help="Number format of the weights. float32 holds exactly what the file's blocks stand for; a half format "
            "takes half the space and rounds once more, except where the file is in that format throughout.",
        ),
    ] = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is a checkpoint or empty.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Write the model in a GGUF file as a safetensors checkpoint, with its tokenizer, chat template and stop tokens.

    `extract`, `evaluate`, `audit`, `trace` and `chat` take a GGUF file as it is; `orthogonalize` edits checkpoints. The
    model is held in memory whole, and OUT appears whole or not at all. Needs the package gguf (`pip install
    'abliterate[gguf]'`).
    """
    from abliterate.models.conversion import convert_gguf

    made = one_output(directory, output_directory)
    output = Output.of(context, json_output=json_output)
    report = convert_gguf(source=file, output=made, dtype=dtype, overwrite=overwrite, progress=output.progress)
    if not report.has_chat_template:
        output.note(
            f"{file}: holds no chat template; `extract` and `evaluate` need one: put it into "
            f"{made / 'chat_template.jinja'}"
        )
    output.report(report, tables=lambda: _tables(report))


def _tables(report: "ConversionReport") -> list[Table | str]:
    stops = ", ".join(map(str, report.eos_token_ids)) or "none"
    return [
        f"{report.path}: {report.model_type}, {report.n_parameters / 1e6:.0f} M parameters in {report.dtype}, "
        f"{report.n_bytes / 1e6:.0f} MB in {report.n_shards} file{'s' * (report.n_shards != 1)} of weights; "
        f"answers end at {stops}"
    ]
