"""Options and arguments that several commands share, so that one word means one thing everywhere."""

import dataclasses
import os
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


def option(options: "type[DataclassInstance]", name: str) -> Any:
    """Return the command-line option of a field of an options class: its flag, its limits and its help."""
    argument = arguments_of(options)[name]
    return typer.Option(
        argument.flag, metavar=argument.metavar, min=argument.minimum, max=argument.maximum, help=argument.help
    )


def default_of(options: "type[DataclassInstance]", name: str) -> Any:
    """Return the default of a field, without making the options: that may look for the device that they name."""
    return next(field.default for field in dataclasses.fields(options) if field.name == name)


def expand_home(value: Any) -> Any:
    """Return a path, or several, with `~` as a shell expands it; anything else as it is.

    A shell leaves `--output=~/x` alone, and would have a directory called `~` made.
    """
    if isinstance(value, Path):
        return Path(os.path.expanduser(value))
    return [expand_home(each) for each in value] if isinstance(value, list) else value


ModelArg = Annotated[str, typer.Argument(metavar="MODEL", help="A local model directory, a .gguf file or a Hub id.")]
ServedModelArg = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]", help="A local model directory, a .gguf file or a Hub id; may be left out with --server."
    ),
]
RevisionOption = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of MODEL on the Hub.")]
BaseRevisionOption = Annotated[
    str | None,
    typer.Option(
        "--base-revision",
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
        raise typer.BadParameter(f"{unknown[0]!r} is not among {', '.join(ROLES)}", param_hint="'--components'")
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
