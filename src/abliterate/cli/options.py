"""Options and arguments that several commands share, so that one word means one thing everywhere."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from abliterate.architectures.writers import Role

COMPONENTS: "tuple[Role, ...]" = ("embed", "attn", "mlp")
ALL_COMPONENTS = ",".join(COMPONENTS)


class Dtype(StrEnum):
    """Number formats a model can be loaded in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


ModelArg = Annotated[str, typer.Argument(metavar="MODEL", help="A local model directory or a Hub id.")]
RevisionOption = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of MODEL on the Hub.")]
DirectionOption = Annotated[
    Path, typer.Option("--direction", help="Direction file (safetensors), as `extract` writes it.")
]
DirectionsOption = Annotated[
    list[Path],
    typer.Option("--direction", help="Direction file (safetensors), as `extract` writes it; may be repeated."),
]
ComponentsOption = Annotated[
    str, typer.Option("--components", help="What to edit: any of embed, attn, mlp, by commas.")
]
LayersOption = Annotated[
    str | None,
    typer.Option(
        "--layers",
        metavar="A:B",
        help="Edit layers A to B-1 only; the embeddings are edited only if A is 0. Default: everything.",
    ),
]
UnverifiedOption = Annotated[
    bool,
    typer.Option(
        "--unverified",
        help="Accept a model type that is not known, if a tiny model of its config, edited the same way, proves clean.",
    ),
]
HarmfulOption = Annotated[
    str,
    typer.Option("--harmful", metavar="SPEC", help="Harmful prompts: bundled, a file, or a Hub dataset."),
]
HarmlessOption = Annotated[
    str,
    typer.Option("--harmless", metavar="SPEC", help="Harmless prompts: bundled, a file, or a Hub dataset."),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print exactly one JSON document on stdout instead of tables.")
]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Number format the model runs in.")]
DeviceOption = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps; auto takes a GPU when there is one.")
]
BatchSizeOption = Annotated[
    str, typer.Option("--batch-size", help="Prompts per forward pass, or auto (halved when memory runs out).")
]
SystemPromptOption = Annotated[
    str | None, typer.Option("--system-prompt", help="System message; default: what the chat template does.")
]
TrustRemoteCodeOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]


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
        typer.BadParameter: one of them is none.
    """
    wanted = [part.strip() for part in text.split(",")]
    unknown = [part for part in wanted if part not in COMPONENTS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is not among {', '.join(COMPONENTS)}", param_hint="'--components'")
    return tuple(role for role in COMPONENTS if role in wanted)


def parse_layers(text: str | None) -> tuple[int, int] | None:
    """Return the half-open range that `--layers` names.

    Raises:
        typer.BadParameter: it is none, or empty.
    """
    if text is None:
        return None
    first, _, end = text.partition(":")
    if not (first.isascii() and first.isdigit() and end.isascii() and end.isdigit()) or int(first) >= int(end):
        raise typer.BadParameter(f"{text!r} is not a range A:B with A < B, such as 10:20", param_hint="'--layers'")
    return int(first), int(end)
