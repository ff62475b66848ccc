"""Options and arguments that several commands share, so that one word means one thing everywhere."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abliterate.arguments import arguments_of
from abliterate.editing.options import ROLES, EditOptions, QuantizedPolicy
from abliterate.extraction.options import PromptSources
from abliterate.models.options import Dtype, ModelOptions

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from abliterate.architectures.names import Role

ALL_COMPONENTS = ",".join(ROLES)
MODEL_DEFAULTS = ModelOptions()
PROMPT_DEFAULTS = PromptSources()


ADVANCED = "Advanced"
PANELS: Mapping[str, tuple[str, ...]] = {
    "Model": (
        "--base", "--base-revision", "--direction", "--intervention", "--revision", "--server", "--system-prompt",
        "--trust-remote-code",
    ),
    "Prompts": (
        "--borderline", "--harmful", "--harmless", "--kind", "--max-new-tokens", "--n-prompts", "--n-test", "--prompt",
        "--prompts", "--test-harmful", "--test-harmless",
    ),
    "Selection": (
        "--components", "--goal", "--kl-threshold", "--layer", "--layers", "--max-kl", "--max-refusals", "--partial",
        "--quantized", "--quick", "--strengths", "--tied", "--top-heads", "--unverified",
    ),
    "Output": (
        "--collection", "--commit-message", "--dry-run", "--evaluation", "--fail-if", "--fail-if-brittle", "--format",
        "--gated", "--hardened", "--json", "--output", "--overwrite", "--private", "--report", "--resume", "--sibling",
    ),
    "Machine": ("--batch-size", "--device", "--dtype"),
}  # fmt: skip
"""Where the help of a command shows an option. What stands nowhere is `ADVANCED`."""
SHOWN: Mapping[str, tuple[str, ...]] = {
    "extract": (
        "--revision", "--harmful", "--harmless", "--goal", "--kl-threshold", "--output", "--report", "--json",
        "--device", "--dtype", "--batch-size",
    ),
    "refine": (
        "--direction", "--harmful", "--harmless", "--max-kl", "--max-refusals", "--output", "--report", "--json",
        "--device", "--dtype", "--batch-size",
    ),
    "orthogonalize": (
        "--direction", "--components", "--layers", "--strengths", "--quantized", "--tied", "--output", "--format",
        "--dry-run", "--overwrite", "--json",
    ),
    "evaluate": (
        "--base", "--direction", "--server", "--harmful", "--harmless", "--max-new-tokens", "--output", "--report",
        "--fail-if", "--json", "--device",
    ),
    "audit": (
        "--harmful", "--harmless", "--test-harmful", "--test-harmless", "--n-test", "--output", "--report",
        "--fail-if-brittle", "--json", "--device", "--batch-size",
    ),
    "trace": (
        "--direction", "--revision", "--prompts", "--n-prompts", "--prompt", "--layer", "--top-heads", "--report",
        "--json", "--device", "--dtype",
    ),
}  # fmt: skip
"""Of a command that has more options than a reader takes in: those that are not `ADVANCED`."""
MAY_BE_PATHS = frozenset({"MODEL", "SPEC", "SET", "guard|yes-no|FILE"})
"""What stands in the help for a text that can name a file."""


def panel_of(command: str, flags: Sequence[str]) -> str:
    """Return the panel of an option in the help of a command."""
    shown = SHOWN.get(command)
    if shown is not None and not any(flag in shown for flag in flags):
        return ADVANCED
    return next((panel for panel, known in PANELS.items() if any(flag in known for flag in flags)), ADVANCED)


def output_option(metavar: str, help_text: str) -> Any:
    """Return `-o`: the file or directory that a command makes, whatever that is."""
    return typer.Option("-o", "--output", metavar=metavar, help=help_text)


def one_output(argument: Path | None, option: Path | None) -> Path:
    """Return what a command makes, where it can be said as an argument or, as elsewhere, by `-o`.

    Raises:
        typer.BadParameter: it is not said, or twice.
    """
    if (argument is None) == (option is None):
        raise typer.BadParameter("say once where to write: as an argument or by -o", param_hint="'-o' / '--output'")
    return Path(argument or option or ".")


def report_option(holds: str) -> Any:
    """Return `--report`: a directory for people to look at, beside what the command makes."""
    return typer.Option("--report", metavar="DIR", help=f"Also write a report into this directory: {holds}.")


def option(options: "type[DataclassInstance]", name: str) -> Any:
    """Return the command-line option of a field of an options class: its flag, its limits and its help."""
    argument = arguments_of(options)[name]
    return typer.Option(
        argument.flag, metavar=argument.metavar, min=argument.minimum, max=argument.maximum, help=argument.help
    )


def default_of(options: "type[DataclassInstance]", name: str) -> Any:
    """Return the default of a field, without making the options: that may look for the device that they name."""
    return next(field.default for field in dataclasses.fields(options) if field.name == name)


def expand_home(value: Any, *, may_be_path: bool = False) -> Any:
    """Return a path, or several, with `~` as a shell expands it; anything else as it is.

    A shell leaves `--output=~/x` alone, and would have a directory called `~` made.

    Args:
        value: What a command is given.
        may_be_path: Whether a text can be a path.
    """
    if isinstance(value, Path):
        return Path(os.path.expanduser(value))
    if isinstance(value, str) and may_be_path:
        return os.path.expanduser(value)
    return [expand_home(each, may_be_path=may_be_path) for each in value] if isinstance(value, list) else value


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return a question to add to a message, which asks for the likeliest of the known words; empty where none is."""
    close = get_close_matches(word.lower(), known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


ModelArg = Annotated[str, typer.Argument(metavar="MODEL", help="A local model directory, a .gguf file or a Hub id.")]
ServedModelArg = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="A local model directory, a .gguf file or a Hub id; may be left out with --server."
    ),
]
RevisionOption = Annotated[
    str | None, typer.Option("--revision", metavar="REV", help="Branch, tag or commit of MODEL on the Hub.")
]
BaseRevisionOption = Annotated[
    str | None,
    typer.Option(
        "--base-revision",
        metavar="REV",
        help="Branch, tag or commit of --base on the Hub. Default: the commit in MODEL's record, if that names --base.",
    ),
]
DirectionOption = Annotated[
    Path, typer.Option("--direction", help="Direction file (safetensors), as `extract` writes it.")
]
DirectionsOption = Annotated[
    list[Path],
    typer.Option("--direction", help="Direction file (safetensors), as `extract` writes it; may be repeated."),
]
ComponentsOption = Annotated[str, option(EditOptions, "components")]
LayersOption = Annotated[str | None, option(EditOptions, "layers")]
QuantizedOption = Annotated[QuantizedPolicy, option(EditOptions, "quantized")]
UnverifiedOption = Annotated[bool, option(EditOptions, "unverified")]
PartialOption = Annotated[bool, option(EditOptions, "partial")]
HarmfulOption = Annotated[str, option(PromptSources, "harmful")]
HarmlessOption = Annotated[str, option(PromptSources, "harmless")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print exactly one JSON document on stdout instead of tables.")
]
VerboseOption = Annotated[bool, typer.Option("-v", "--verbose", help="Show library logs, and tracebacks of errors.")]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="No progress or notes on stderr; errors only.")]
IntervalOption = Annotated[
    float | None,
    typer.Option(
        "--progress-interval",
        metavar="SECONDS",
        min=1,
        help="In a log, how long a task goes on without a line about it. Default: 30.",
        show_default=False,
    ),
]
FailIfOption = Annotated[
    list[str] | None,
    typer.Option(
        "--fail-if",
        metavar="CONDITION",
        help="End with exit code 1 if this holds of the report, such as 'harmful_refusal_rate<0.9'; may be repeated.",
    ),
]
JunitOption = Annotated[
    Path | None, typer.Option("--junit", metavar="FILE", help="Write the gates of --fail-if as JUnit XML here.")
]
SummaryOption = Annotated[
    Path | None, typer.Option("--summary", metavar="FILE", help="Write the result as Markdown here, for CI.")
]
DtypeOption = Annotated[Dtype, option(ModelOptions, "dtype")]
DeviceOption = Annotated[str, option(ModelOptions, "device")]
BatchSizeOption = Annotated[str, option(ModelOptions, "batch_size")]
SystemPromptOption = Annotated[str | None, option(ModelOptions, "system_prompt")]
TrustRemoteCodeOption = Annotated[bool, option(ModelOptions, "trust_remote_code")]


def parse_batch_size(text: str) -> int | None:
    """Return the number, or None for `auto`.

    Raises:
        typer.BadParameter: it is neither.
    """
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise typer.BadParameter(f"--batch-size {text!r} is neither a positive number nor auto")
    return int(text)


def parse_components(text: str) -> "tuple[Role, ...]":
    """Return the roles that `--components` names, in their usual order.

    Raises:
        typer.BadParameter: one of them is not a role.
    """
    wanted = [part.strip() for part in text.split(",")]
    unknown = [part for part in wanted if part not in ROLES]
    if unknown:
        raise typer.BadParameter(
            f"{unknown[0]!r} is not among {', '.join(ROLES)}{did_you_mean(unknown[0], ROLES)}",
            param_hint="'--components'",
        )
    return tuple(role for role in ROLES if role in wanted)


def parse_layers(text: str | None) -> tuple[int, int] | None:
    """Return the half-open range that `--layers` names.

    Raises:
        typer.BadParameter: it is not a range, or empty.
    """
    if text is None:
        return None
    first, _, end = text.partition(":")
    if not (first.isascii() and first.isdigit() and end.isascii() and end.isdigit()) or int(first) >= int(end):
        raise typer.BadParameter(f"{text!r} is not a range A:B with A < B, such as 10:20", param_hint="'--layers'")
    return int(first), int(end)
