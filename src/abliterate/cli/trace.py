"""`abliterate trace`: where in a model a direction shows, and what writes it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from abliterate.cli.options import (
    MODEL_DEFAULTS,
    BatchSizeOption,
    DeviceOption,
    DirectionOption,
    DtypeOption,
    JsonOption,
    ModelArg,
    RevisionOption,
    SystemPromptOption,
    TrustRemoteCodeOption,
    option,
    parse_batch_size,
    report_option,
)
from abliterate.cli.output import Output, check_outputs, command_line, writing
from abliterate.interventions.trace_report import TraceOptions
from abliterate.models.options import ModelOptions

if TYPE_CHECKING:
    from abliterate.interventions.trace_report import TokenTrace, TraceReport

DEFAULTS = TraceOptions()
N_ROWS = 12


def trace(
    context: typer.Context,
    model: ModelArg,
    direction: DirectionOption,
    prompts: Annotated[list[str] | None, option(TraceOptions, "prompts")] = None,
    n_prompts: Annotated[int, option(TraceOptions, "n_prompts")] = DEFAULTS.n_prompts,
    suffix: Annotated[str | None, option(TraceOptions, "suffix")] = DEFAULTS.suffix,
    prompt: Annotated[str | None, option(TraceOptions, "prompt")] = DEFAULTS.prompt,
    layer: Annotated[int | None, option(TraceOptions, "layer")] = DEFAULTS.layer,
    top_heads: Annotated[int, option(TraceOptions, "n_top_heads")] = DEFAULTS.n_top_heads,
    seed: Annotated[int, option(TraceOptions, "seed")] = DEFAULTS.seed,
    system_prompt: SystemPromptOption = MODEL_DEFAULTS.system_prompt,
    dtype: DtypeOption = MODEL_DEFAULTS.dtype,
    device: DeviceOption = MODEL_DEFAULTS.device,
    batch_size: BatchSizeOption = "auto",
    report: Annotated[Path | None, report_option("one HTML page, JSON, CSV and charts (SVG)")] = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustRemoteCodeOption = MODEL_DEFAULTS.trust_remote_code,
    json_output: JsonOption = False,
) -> None:
    """Show where a direction stands in the residual stream, which heads and MLPs write it, and what those attend to.

    Where an architecture's heads are not known the cosines are shown without the table of heads.
    """
    from abliterate.checkpoints.model_source import resolve_model
    from abliterate.interventions.trace_report import TraceOptions, write_trace_report
    from abliterate.interventions.tracing import trace_direction
    from abliterate.pages.trace_page import write_trace_page

    output = Output.of(context, json_output=json_output)
    check_outputs(report=report)
    traced = trace_direction(
        model=resolve_model(model, revision=revision, progress=output.progress),
        direction=direction,
        options=TraceOptions(
            prompts=tuple(prompts or DEFAULTS.prompts),
            n_prompts=n_prompts,
            suffix=suffix,
            seed=seed,
            n_top_heads=top_heads,
            layer=layer,
            prompt=prompt,
        ),
        model_options=ModelOptions(
            dtype=dtype,
            device=device,
            batch_size=parse_batch_size(batch_size),
            system_prompt=system_prompt,
            trust_remote_code=trust_remote_code,
        ),
        progress=output.progress,
    )
    output.report(traced, tables=lambda: _tables(traced))
    if report is not None:
        with writing(report):
            write_trace_report(traced, report)
            write_trace_page(traced, report, command=command_line())


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
