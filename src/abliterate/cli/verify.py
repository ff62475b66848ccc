"""`abliterate verify`: prove what was done to a checkpoint, from its files and by running it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from abliterate.cli.options import (
    MODEL_DEFAULTS,
    PROMPT_DEFAULTS,
    DeviceOption,
    DtypeOption,
    HarmfulOption,
    HarmlessOption,
    JsonOption,
    TrustRemoteCodeOption,
    option,
    report_option,
)
from abliterate.cli.output import Output, check_outputs, command_line, writing
from abliterate.models.options import ModelOptions
from abliterate.release.options import VerificationOptions

if TYPE_CHECKING:
    from abliterate.release.file_checks import TensorCheck
    from abliterate.release.report import LogitCheck, PartialCheck, StreamCheck, VerificationReport


DEFAULTS = VerificationOptions()


def verify(
    context: typer.Context,
    checkpoint: Annotated[
        Path, typer.Argument(metavar="OUT", help="A directory that `abliterate orthogonalize` wrote.")
    ],
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="MODEL", help="What it was made from; default: what its record names."),
    ] = None,
    direction: Annotated[
        list[Path] | None,
        typer.Option("--direction", help="Direction file that must span what the record names. May be repeated."),
    ] = None,
    quick: Annotated[bool, option(VerificationOptions, "quick")] = DEFAULTS.quick,
    harmful: HarmfulOption = PROMPT_DEFAULTS.harmful,
    harmless: HarmlessOption = PROMPT_DEFAULTS.harmless,
    n_prompts: Annotated[int, option(VerificationOptions, "n_prompts")] = DEFAULTS.n_prompts,
    dtype: DtypeOption = MODEL_DEFAULTS.dtype,
    device: DeviceOption = MODEL_DEFAULTS.device,
    trust_remote_code: TrustRemoteCodeOption = MODEL_DEFAULTS.trust_remote_code,
    report_directory: Annotated[Path | None, report_option("one HTML page, and its chart (SVG)")] = None,
    json_output: JsonOption = False,
) -> None:
    """Prove what was done to OUT.

    (a) Only the planned tensors differ from the base. (b) What rounding left of the direction in each. (c) The
    direction in the residual stream on real prompts, base beside edited. (d) The logits beside those of the base with
    the direction ablated by hooks. Exit code 1 names the first tensor or layer that fails. Of a partial edit (c)
    measures what is left.
    """
    from abliterate.errors import VerificationError
    from abliterate.pages.verification_page import write_verification_page
    from abliterate.release.verification import verify_checkpoint

    output = Output.of(context, json_output=json_output)
    check_outputs(report=report_directory)
    report = verify_checkpoint(
        checkpoint=checkpoint,
        base=base,
        directions=direction or (),
        options=VerificationOptions(quick=quick, harmful=harmful, harmless=harmless, n_prompts=n_prompts),
        model_options=ModelOptions(dtype=dtype, device=device, trust_remote_code=trust_remote_code),
        progress=output.progress,
    )
    for note in report.notes:
        output.note(note)
    output.report(report, tables=lambda: _tables(report))
    if report_directory is not None:
        with writing(report_directory):
            write_verification_page(report, report_directory, command=command_line())
    if report.failures:
        more = f" (and {len(report.failures) - 1} more failures)" if len(report.failures) > 1 else ""
        raise VerificationError(report.failures[0] + more)


def _tables(report: "VerificationReport") -> list[Table | str]:
    parts: list[Table | str] = []
    if report.files.tensors:
        parts += _tensors(report.files.tensors)
    if report.stream is not None:
        parts += _stream(report.stream)
    if report.logits is not None:
        parts += _logits(report.logits)
    if report.passed:
        compared = f"{report.files.bytes_compared / 1e6:.1f} MB of unedited tensors are those of {report.base}"
        verdict = "Verified" if report.partial is None else "Verified as a partial edit"
        parts.append(f"{verdict}: {compared}; {len(report.files.tensors)} edited tensors are as recorded")
        if report.partial is not None:
            parts.append(_partial(report.partial))
    return parts


def _partial(check: "PartialCheck") -> str:
    measured = "the models were not run, so what is left was not measured"
    if check.base_mean is not None and check.edited_mean is not None:
        measured = (
            f"|R·h|/|h| is {check.edited_mean:.2e} on average ({check.base_mean:.2e} in the base), and "
            f"{check.edited_max or 0:.2e} at most ({check.base_max or 0:.2e})"
        )
    return f"Partial: {check.reason}; {measured}; what still writes: {', '.join(check.modules) or 'nothing'}"


def _tensors(checks: "tuple[TensorCheck, ...]") -> list[Table | str]:
    table = Table(
        "role", "tensors", "dtype", "max |U·W|/|W| before", "after", "max survivor", "worst tensor",
        title="Edited tensors, reread",
    )  # fmt: skip
    for role in dict.fromkeys(check.recorded.writer.role for check in checks):
        group = [check for check in checks if check.recorded.writer.role == role]
        worst = max(group, key=lambda check: check.survivor)
        table.add_row(
            role,
            str(len(group)),
            ", ".join(sorted({check.dtype for check in group})),
            f"{max(check.before.share for check in group):.2e}",
            f"{max(check.after.share for check in group):.2e}",
            f"{worst.survivor:.2e}",
            worst.name,
        )
    return [table]


def _stream(check: "StreamCheck") -> list[Table | str]:
    table = Table(
        "into", "base max", "base mean", "edited max", "edited mean", "ablated max",
        title=f"|R·h|/|h| in the residual stream, {check.n_prompts} prompts, {check.n_tokens} tokens, {check.dtype}",
    )  # fmt: skip
    for layer in check.layers:
        values = (layer.base_max, layer.base_mean, layer.edited_max, layer.edited_mean, layer.ablated_max)
        table.add_row(layer.place, *("-" if value is None else f"{value:.2e}" for value in values))
    if check.judged:
        worst = max(check.layers, key=lambda layer: layer.edited_accumulated)
        return [
            table,
            f"Largest |R·h| over the largest |h| so far: {worst.edited_accumulated:.2e} at {worst.place}; "
            f"rounding explains {check.tolerance:.2e}",
        ]
    return [table, f"Not judged: {'; '.join(check.reasons)}"]


def _logits(check: "LogitCheck") -> list[Table | str]:
    table = Table(
        "positions", "n", "mean KL (nats)", "max KL", "largest difference", "relative",
        title="Logits beside those of the base ablated by hooks",
    )  # fmt: skip
    for label, found in (("last", check.last), ("all", check.all)):
        values = (found.kl_mean, found.kl_max, found.largest, found.relative)
        table.add_row(label, str(found.n_positions), *(f"{value:.2e}" for value in values))
    if check.judged:
        return [table, f"Equal up to rounding, which explains a relative difference of {check.tolerance:.2e}"]
    return [table, f"Not judged: {'; '.join(check.reasons)}"]
