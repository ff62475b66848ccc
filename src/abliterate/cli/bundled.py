"""What comes bundled: `abliterate prompts` lists and checks the prompt sets, `abliterate demo` builds the model."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from abliterate.cli.options import JsonOption, one_output, output_option
from abliterate.cli.output import Output, to_plain
from abliterate.errors import PromptSetError

if TYPE_CHECKING:
    from abliterate.prompt_sets import PromptSetInfo

SHOWN_PROMPTS = 3
SHOWN_CHARACTERS = 80


class PromptKind(StrEnum):
    """The kinds of bundled prompts."""

    harmful = "harmful"
    harmless = "harmless"
    borderline = "borderline"


def prompts(
    context: typer.Context,
    spec: Annotated[
        str,
        typer.Argument(
            metavar="SPEC",
            help="bundled, a file (.txt, .jsonl, .json, .csv, .parquet; also FILE:COLUMN), "
            "or a Hub dataset: ID, ID@REVISION, ID:SPLIT or ID:SPLIT:COLUMN.",
            show_default=False,
        ),
    ] = "bundled",
    kind: Annotated[PromptKind | None, typer.Option("--kind", help="List only the bundled sets of this kind.")] = None,
    json_output: JsonOption = False,
) -> None:
    """List and check the bundled prompt sets, or load and check the set that SPEC names.

    Exit code 1 when a set cannot be used: it is not there, has an empty or missing column, or, of the bundled
    ones, has too few prompts, a category missing, or duplicates. Duplicates in SPEC are only counted.
    """
    from abliterate.prompt_sets import (
        BUNDLED,
        bundled_prompt_sets,
        describe_prompt_set,
        find_bundled_problems,
        load_prompt_set,
    )

    output = Output.of(context, json_output=json_output)
    if spec != BUNDLED:
        if kind is not None:
            raise typer.BadParameter("it chooses among the bundled sets and does not go with SPEC", param_hint="--kind")
        loaded = load_prompt_set(spec, kind="harmful", part="train")
        info, first = describe_prompt_set(loaded), loaded.texts[:SHOWN_PROMPTS]
        output.report({**to_plain(info), "first": first}, tables=lambda: _set_tables(info, first), document="set")
        return
    infos = tuple(info for info in bundled_prompt_sets() if kind is None or info.kind == kind)
    problems = find_bundled_problems()
    output.report({"sets": infos, "problems": problems}, tables=lambda: [_bundled_table(infos)])
    if problems:
        more = f" (and {len(problems) - 1} more; see --json)" if len(problems) > 1 else ""
        raise PromptSetError(f"{problems[0]}{more}; correct the files of the bundled sets or reinstall abliterate")


def _bundled_table(infos: tuple["PromptSetInfo", ...]) -> Table:
    table = Table("set", "prompts", "categories", "mean words", "sha256", title="Bundled prompt sets")
    for info in infos:
        row = (str(info.count), str(len(info.categories)), f"{info.mean_words:.1f}", info.sha256)
        table.add_row(info.name.removeprefix("bundled:"), *row)
    return table


def _set_tables(info: "PromptSetInfo", first: tuple[str, ...]) -> list[Table | str]:
    categories = f", {len(info.categories)} categories" if info.categories else ""
    summary = (
        f"{info.name}: {info.count} prompts, {info.mean_words:.1f} words on average, {info.duplicates} duplicates"
        f"{categories}, sha256 {info.sha256}"
    )
    return [summary, *(f"  {_shorten(text)}" for text in first)]


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[: SHOWN_CHARACTERS - 1]}\u2026"


def demo(
    context: typer.Context,
    directory: Annotated[Path | None, typer.Argument(metavar="OUT", help="The same as -o OUT.")] = None,
    output_directory: Annotated[Path | None, output_option("OUT", "Directory to write.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is a checkpoint or empty.")] = False,
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
        output=one_output(directory, output_directory),
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
