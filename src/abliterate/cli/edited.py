"""`abliterate push` and `revert`: an edited checkpoint on its way out, and on its way back."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from abliterate.cli.options import JsonOption, option, output_option
from abliterate.cli.output import Output
from abliterate.release.options import Gating, PushOptions

if TYPE_CHECKING:
    from abliterate.release.publishing import PushReport
    from abliterate.release.reverting import RevertReport

_DEFAULTS = PushOptions()
EditedArg = Annotated[Path, typer.Argument(metavar="OUT", help="A directory that `abliterate orthogonalize` wrote.")]


def push(
    context: typer.Context,
    checkpoint: EditedArg,
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="OWNER/NAME on the Hub, or NAME for yourself.")],
    private: Annotated[bool, option(PushOptions, "private")] = _DEFAULTS.private,
    gated: Annotated[Gating | None, option(PushOptions, "gated")] = _DEFAULTS.gated,
    collection: Annotated[str | None, option(PushOptions, "collection")] = _DEFAULTS.collection,
    sibling: Annotated[list[Path] | None, option(PushOptions, "siblings")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show what would go; no network.")
    ] = False,
    commit_message: Annotated[str | None, option(PushOptions, "commit_message")] = _DEFAULTS.commit_message,
    evaluation: Annotated[Path | None, option(PushOptions, "evaluation")] = _DEFAULTS.evaluation,
    json_output: JsonOption = False,
) -> None:
    """Push OUT to the Hub, with a model card made from its record and its evaluation.

    Every file is checked against abliteration.json first. The token is that of `hf auth login` or HF_TOKEN.
    An interrupted push goes on where it stopped when it is repeated; nothing on the Hub is ever deleted.
    """
    from abliterate.release.publishing import push_checkpoint

    output = Output.of(context, json_output=json_output)
    report = push_checkpoint(
        checkpoint=checkpoint,
        repo_id=repo_id,
        options=PushOptions(
            private=private,
            gated=gated,
            collection=collection,
            siblings=tuple(sibling or ()),
            evaluation=evaluation,
            commit_message=commit_message,
        ),
        dry_run=dry_run,
        progress=output.progress,
    )
    for path in report.left_out:
        output.note(f"left out, not part of the edited checkpoint: {path}")
    for path in report.remote_only:
        output.note(f"already in the repository, not part of this checkpoint, left there: {path}")
    if not report.evaluated:
        output.note("no evaluation: the model card says that nothing was measured")
    output.report(report, tables=lambda: _pushed(report))


def _pushed(report: "PushReport") -> list[Table | str]:
    table = Table("file", "bytes")
    table.columns[1].justify = "right"
    for file in report.files:
        table.add_row(escape(file.path), f"{file.bytes:,}")
    visibility = ("private" if report.private else "public") + (f", gated: {report.gated}" if report.gated else "")
    total = f"{len(report.files)} files, {report.total_bytes:,} bytes"
    licence = report.license or "not known"
    into = f" and into the collection {report.collection}" if report.collection else ""
    if report.dry_run:
        return [
            table,
            f"Dry run: {total} would go to {report.repo_id} ({visibility}){into}; licence {licence}. Model card:\n",
            report.card,
        ]
    state = "new" if report.created else "existing"
    return [table, f"{total} are at {report.url} ({visibility}, {state}){into}, commit {report.commit}"]


def revert(
    context: typer.Context,
    checkpoint: Annotated[
        Path, typer.Argument(metavar="OUT", help="A checkpoint or adapter that `abliterate orthogonalize` wrote.")
    ],
    output_directory: Annotated[
        Path | None, output_option("RESTORED", "Directory to write. Needed unless --dry-run.")
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
    output.report(report, tables=lambda: _restored(report))


def _restored(report: "RevertReport") -> list[Table | str]:
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
