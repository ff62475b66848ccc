"""How the field of an options class is called on the command line, said once, beside its default.

    kl: Annotated[float, Argument(flag="--kl-threshold", help="Largest KL accepted, in nats.")] = 0.1

The commands make their options of it, and `cli_arguments` writes options down again as the words that give them.
"""

import shlex
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True, slots=True, kw_only=True)
class Argument:
    """What a command calls a field of its options.

    Attributes:
        flag: the name with its dashes. Of a truth value: what turns the default around.
        help: what `--help` says about it.
        metavar: what stands for the value there; None: its type.
        minimum: the smallest number that the command takes.
        maximum: the largest.
        separator: what stands between the values of a tuple; None: the flag is given once for each.
        names_file: whether the value can be a path on this machine.
        of_machine: whether it says where and how fast the work is done, and not what comes out.
    """

    flag: str
    help: str
    metavar: str | None = None
    minimum: float | None = None
    maximum: float | None = None
    separator: str | None = None
    names_file: bool = False
    of_machine: bool = False


def arguments_of(options: "type[DataclassInstance]") -> dict[str, Argument]:
    """Return the arguments of the fields that have one, by the fields' names."""
    found = {field.name: _annotated(field.type) for field in fields(options)}
    return {name: argument for name, argument in found.items() if argument is not None}


def cli_arguments(options: "DataclassInstance") -> list[str]:
    """Return the command-line arguments that give these options: those that differ from the defaults.

    What is about the machine is left out, and so are the folders of its files: what is written down may be published.
    Fields that are options themselves follow in their places.
    """
    words: list[str] = []
    defaults, known = type(options)(), arguments_of(type(options))
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name in known:
            if not known[field.name].of_machine and value != getattr(defaults, field.name):
                words += _words(known[field.name], value)
        elif is_dataclass(value) and not isinstance(value, type):
            words += cli_arguments(value)
    return words


def _annotated(annotation: Any) -> Argument | None:
    return next((part for part in get_args(annotation) if isinstance(part, Argument)), None)


def _words(argument: Argument, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [argument.flag]
    parts = [_without_folder(str(part)) if argument.names_file else str(part) for part in _parts(value)]
    if argument.separator is not None:
        parts = [argument.separator.join(parts)]
    return [word for part in parts for word in _option(argument.flag, part)]


def _parts(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _option(flag: str, value: str) -> list[str]:
    # A value that begins with a dash would be taken for an option of its own.
    return [f"{flag}={value}"] if value.startswith("-") else [flag, value]


def _without_folder(spec: str) -> str:
    path, colon, column = spec.partition(":")
    return Path(path).name + colon + column if Path(path).is_absolute() or Path(path).exists() else spec


def shell_word(word: Any) -> str:
    """Return a word as a shell reads it, in one line and printable whatever it holds."""
    text = str(word)
    if text.isprintable():
        return shlex.quote(text)
    # A line feed would end the command, and could end the block of code.
    escaped = "".join(
        f"\\{c}" if c in "\\'" else c if c.isprintable() else "".join(f"\\x{byte:02x}" for byte in c.encode())
        for c in text
    )
    return f"$'{escaped}'"
