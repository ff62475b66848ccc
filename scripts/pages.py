"""Write the pages of docs that are made from the code: docs/cli.md from `--help`, docs/troubleshooting.md from errors.

    python -m scripts.pages

A test holds the pages to this. What a command's help says stands in its docstring and in the options' `Argument`s; an
example of each error, its cause and its remedy stand in the docstrings of `abliterate.errors`.
"""

import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer.main
from typer.core import TyperOption

import abliterate.extraction.report
import abliterate.interventions.contributions  # noqa: F401
from abliterate import errors
from abliterate.cli.app import EXIT_CODES, app
from abliterate.cli.options import ADVANCED, PANELS
from abliterate.files import write_file

DOCS = Path(__file__).parents[1] / "docs"
MADE = "<!-- made by `python -m scripts.pages` -->"
_OF_ALL = ("--quiet", "--verbose", "--progress-interval", "--json")


def command_page() -> str:
    """Return docs/cli.md: every command with its arguments and options, as `--help` has them."""
    group: Any = typer.main.get_command(app)
    lines = [
        "# Command line", "", MADE, "",
        "`abliterate COMMAND --help` says the same in a terminal. `abliterate --install-completion` lets the shell "
        "complete commands and options.", "",
        f"{EXIT_CODES}", "",
        "Every command takes, before its name or behind it:", "",
        *_options([each for each in _options_of(group) if each.opts[-1] in _OF_ALL]), "",
        "With `--json` stdout holds one JSON document, after an error too ([schemas](schemas/README.md)). Tables, "
        "progress and notes are for people: they may change. Progress, notes and errors go to stderr. On a terminal "
        "progress is a bar; elsewhere it is a line when a task begins, every 30 seconds, and when it ends.", "",
    ]  # fmt: skip
    for name, command in group.commands.items():
        lines += _command(name, command)
    return "\n".join(lines).rstrip() + "\n"


def _command(name: str, command: Any) -> list[str]:
    arguments = [each for each in command.params if not isinstance(each, TyperOption)]
    words = [each.metavar if each.required else f"[{each.metavar}]" for each in arguments]
    lines = [f"## abliterate {name}", "", "```text", " ".join(["abliterate", name, *words, "[OPTIONS]"]), "```", ""]
    lines += [_plain(command.help), "", "| argument | |", "|---|---|"]
    lines += [f"| `{each.metavar}` | {_cell(_plain(each.help))} |" for each in arguments] + [""]
    options = [each for each in _options_of(command) if each.opts[-1] not in _OF_ALL]
    for panel in (*PANELS, ADVANCED):
        found = [each for each in options if each.rich_help_panel == panel]
        if found:
            lines += [f"**{panel}**", "", *_options(found), ""]
    return lines


def _options_of(command: Any) -> list[TyperOption]:
    return [each for each in command.params if isinstance(each, TyperOption) and not each.hidden]


def _options(options: Sequence[TyperOption]) -> list[str]:
    lines = ["| option | | default |", "|---|---|---|"]
    for each in options:
        flags = ", ".join(f"`{flag}`" for flag in sorted((*each.opts, *each.secondary_opts), key=len, reverse=True))
        # Help says `<a|b>` of what can be chosen.
        kind = each.metavar if each.metavar is not None else "|".join(map(str, each.type_descriptor.choices or ()))
        value = f" `{_cell(kind)}`" if kind else ""
        default = "required" if each.required else _default(each)
        lines.append(f"| {flags}{value} | {_cell(_plain(each.help))} | {default} |")
    return lines


def _default(option: TyperOption) -> str:
    value = option.default
    if value is None or value is False or not option.show_default or callable(value):
        return ""
    return f"`{option.opts[0]}`" if value is True else f"`{_cell(str(getattr(value, 'value', value)))}`"


def _plain(text: str | None) -> str:
    """Return a text of the help as it is shown: brackets are escaped there."""
    return (text or "").replace("\\[", "[")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def error_page() -> str:
    """Return docs/troubleshooting.md: every class of errors with a message, what is behind it and what to do."""
    lines = [
        "# Troubleshooting", "", MADE, "",
        "A command that fails writes one line that begins with `error:`, and leaves nothing half-written. With "
        "`--json` stdout holds the same as a document: `error` is a name below, `UsageError` (wrong arguments, exit "
        "code 2), `Interrupted`, `Terminated` or `UnexpectedError` ([schemas](schemas/README.md)). With `-v` the "
        "traceback comes before the line. An `unexpected` error is a fault of this tool: please report it.", "",
        f"{EXIT_CODES}", "",
    ]  # fmt: skip
    for kind in error_classes():
        sections = sections_of(kind)
        lines += [f"## {kind.__name__}", "", sections["summary"], ""]
        lines += ["```text", f"error: {sections['Message']}", "```", ""]
        lines += [f"- **Cause.** {sections['Cause']}", f"- **Remedy.** {sections['Remedy']}"]
        lines.append(f"- **Exit code.** {kind.exit_code}" + ("; after SIGTERM 143" if kind.exit_code == 130 else ""))
        also = [
            each.__name__
            for each in kind.__subclasses__()
            if each.__module__ != errors.__name__ and not each.__name__.startswith("_")
        ]
        lines += [f"- **Also as** {', '.join(f'`{name}`' for name in also)}."] if also else []
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def error_classes() -> list[type[errors.AbliterateError]]:
    """Return the classes of `abliterate.errors` that are raised, in their order there."""
    return [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.AbliterateError) and kind is not errors.AbliterateError
    ]


def sections_of(kind: type) -> dict[str, str]:
    """Return the first paragraph of a docstring as `summary`, and its sections, each in one line."""
    text = inspect.getdoc(kind) or ""
    found = {"summary": " ".join(text.partition("\n\n")[0].split())}
    for name, body in re.findall(r"(?m)^(\w+):\n((?:    .*\n?|\n)+)", text):
        found[name] = " ".join(body.split())
    return found


def pages() -> dict[str, str]:
    """Return the name and the content of each page."""
    return {"cli.md": command_page(), "troubleshooting.md": error_page()}


def main() -> int:
    """Write all pages."""
    for name, text in pages().items():
        write_file(DOCS / name, text)
        print(DOCS / name, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
