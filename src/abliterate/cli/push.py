"""`abliterate push`: put an orthogonalized checkpoint on the Hub, with a model card."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from abliterate.cli.options import JsonOption
from abliterate.cli.output import Output

if TYPE_CHECKING:
    from abliterate.release.publishing import PushReport


def push(
    context: typer.Context,
    checkpoint: Annotated[
        Path, typer.Argument(metavar="OUT", help="A directory that `abliterate orthogonalize` wrote.")
    ],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="OWNER/NAME on the Hub, or NAME for yourself.")],
    private: Annotated[
        bool,
        typer.Option("--private/--public", help="Who can read it; one that exists must already be so."),
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show what would go; no network.")
    ] = False,
    commit_message: Annotated[
        str | None, typer.Option("--commit-message", metavar="TEXT", help="First line of the commit.")
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option("--evaluation", metavar="FILE", help="Measurements; default OUT/evaluation.json if there."),
    ] = None,
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
        private=private,
        dry_run=dry_run,
        commit_message=commit_message,
        evaluation=evaluation,
        progress=output.progress,
    )
    for path in report.left_out:
        output.note(f"left out, not part of the edited checkpoint: {path}")
    for path in report.remote_only:
        output.note(f"already in the repository, not part of this checkpoint, left there: {path}")
    if not report.evaluated:
        output.note("no evaluation: the model card says that nothing was measured")
    output.report(report, tables=lambda: _tables(report))


def _tables(report: "PushReport") -> list[Table | str]:
    table = Table("file", "bytes")
    table.columns[1].justify = "right"
    for file in report.files:
        table.add_row(escape(file.path), f"{file.bytes:,}")
    visibility = "private" if report.private else "public"
    total = f"{len(report.files)} files, {report.total_bytes:,} bytes"
    licence = report.license or "not known"
    if report.dry_run:
        return [
            table,
            f"Dry run: {total} would go to {report.repo_id} ({visibility}); licence {licence}. Model card:\n",
            report.card,
        ]
    state = "new" if report.created else "existing"
    return [table, f"{total} are at {report.url} ({visibility}, {state}), commit {report.commit}"]
