"""`abliterate trace`: where in a model a direction shows, and what writes it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from abliterate.cli.options import (
    BatchSizeOption,
    DeviceOption,
    DirectionOption,
    Dtype,
    DtypeOption,
    JsonOption,
    ModelArg,
    RevisionOption,
    SystemPromptOption,
    TrustRemoteCodeOption,
    parse_batch_size,
)
from abliterate.cli.output import Output

if TYPE_CHECKING:
    from abliterate.evaluation.trace_report import TokenTrace, TraceReport

N_ROWS = 12


def trace(
    context: typer.Context,
    model: ModelArg,
    direction: DirectionOption,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompts",
            metavar="SET",
            help="harmful, harmless, borderline (bundled test prompts) or a SPEC; several times for several. "
            "Default: these three. The top heads are those of the first.",
        ),
    ] = None,
    n_prompts: Annotated[int, typer.Option("--n-prompts", min=1, help="Prompts of each set.")] = 128,
    suffix: Annotated[
        str | None,
        typer.Option("--suffix", metavar="TEXT", help="Append this, and as control random text of equal token length."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="Also colour this prompt's tokens.")
    ] = None,
    layer: Annotated[
        int | None, typer.Option("--layer", min=0, help="Where components are read; default: the direction's layer.")
    ] = None,
    top_heads: Annotated[int, typer.Option("--top-heads", min=1, help="How many heads to name.")] = 8,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the random suffixes.")] = 42,
    system_prompt: SystemPromptOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    batch_size: BatchSizeOption = "auto",
    report: Annotated[
        Path | None, typer.Option("--report", metavar="DIR", help="Write JSON, CSV and plots (PNG) here.")
    ] = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    json_output: JsonOption = False,
) -> None:
    """Show where a direction stands in the residual stream, which heads and MLPs write it, and what those attend to.

    Where an architecture's heads are not known the cosines are shown without the table of heads.
    """
    from abliterate.checkpoints.hub import resolve_model
    from abliterate.evaluation.trace_report import DEFAULT_SETS, TraceOptions, write_trace_report
    from abliterate.evaluation.tracing import trace_direction
    from abliterate.extraction.score_report import require_plots
    from abliterate.models.options import ModelOptions

    output = Output.of(context, json_output=json_output)
    if report is not None:
        require_plots()
    traced = trace_direction(
        model=resolve_model(model, revision=revision),
        direction=direction,
        options=TraceOptions(
            prompts=tuple(prompts or DEFAULT_SETS),
            n_prompts=n_prompts,
            suffix=suffix,
            seed=seed,
            n_top_heads=top_heads,
            layer=layer,
            prompt=prompt,
        ),
        model_options=ModelOptions(
            dtype=dtype.value,
            device=device,
            batch_size=parse_batch_size(batch_size),
            system_prompt=system_prompt,
            trust_remote_code=trust_remote_code,
        ),
        progress=output.progress,
    )
    if report is not None:
        write_trace_report(traced, report)
    output.report(traced, tables=lambda: _tables(traced))


def _tables(report: "TraceReport") -> list[Table | Text | str]:
    parts: list[Table | Text | str] = [_cosine_table(report)]
    if report.top_heads:
        parts.append(_head_table(report))
    if report.prompt is not None:
        parts.append(_coloured(report.prompt))
    return parts


def _cosine_table(report: "TraceReport") -> Table:
    table = Table("layer", title=f"Cosine with the direction, last token (mean +- sd): {report.model}")
    for traced in report.sets:
        table.add_column(f"{traced.label} (n={traced.n_prompts})", justify="right")
    step = max(1, -(-(report.n_layers + 1) // N_ROWS))
    shown = {*range(0, report.n_layers + 1, step), report.n_layers}
    shown |= {report.layer} if report.layer is not None else set()
    for layer in sorted(shown):
        profiles = [traced.cosines["last"] for traced in report.sets]
        mark = " *" if layer == report.layer else ""
        table.add_row(f"{layer}{mark}", *(f"{p.mean[layer]:+.3f} +- {p.sd[layer]:.3f}" for p in profiles))
    if report.layer is not None:
        table.caption = "* the direction's layer"
    return table


def _head_table(report: "TraceReport") -> Table:
    table = Table(
        "writer", title="Direct contributions at the last token; in brackets attention to instruction, suffix"
    )
    for traced in report.sets:
        table.add_column(traced.label, justify="right")
    found = [traced.contributions for traced in report.sets if traced.contributions is not None]
    for i, top in enumerate(report.top_heads):
        cells = []
        for traced, contributions in zip(report.sets, found, strict=True):
            cell = f"{contributions.heads[top.layer][top.head]:+.3f}"
            if traced.attention is not None:
                seen = traced.attention[i]
                cell += f" ({seen.instruction:.2f}, {seen.suffix:.2f})"
            cells.append(cell)
        table.add_row(f"head {top.layer}.{top.head}", *cells)
    end = report.layer if report.layer is not None else report.n_layers
    table.add_section()
    table.add_row("embedding", *(f"{c.embedding:+.3f}" for c in found))
    table.add_row("all heads", *(f"{sum(map(sum, c.heads[:end])):+.3f}" for c in found))
    table.add_row("attention biases", *(f"{sum(c.biases[:end]):+.3f}" for c in found))
    table.add_row("all MLPs", *(f"{sum(c.mlps[:end]):+.3f}" for c in found))
    table.add_row(f"measured at layer {end}", *(f"{c.component.mean[end]:+.3f}" for c in found))
    table.caption = f"the sum misses the measured component by at most {max(c.largest_gap for c in found):.1e}"
    return table


def _coloured(prompt: "TokenTrace") -> Text:
    """Return the prompt, red along the direction and blue against it, then its tokens with their numbers."""
    bound = max(map(abs, prompt.components)) or 1.0
    flowing = Text()
    listed = Text(f"\n\ncomponent at layer {prompt.layer}, token by token\n")
    width = max(len(repr(token)) for token in prompt.tokens)
    for token, component in zip(prompt.tokens, prompt.components, strict=True):
        fade = round(255 * (1 - abs(component) / bound))
        style = f"black on #ff{fade:02x}{fade:02x}" if component > 0 else f"black on #{fade:02x}{fade:02x}ff"
        flowing.append(token, style=style)
        listed.append(repr(token), style=style)
        listed.append(" " * (width - len(repr(token))) + f" {component:+9.3f}\n")
    return flowing + listed
