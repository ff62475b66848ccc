"""The command line: registration, what every command takes, `--version`, and the one error boundary."""

import functools
import inspect
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from copy import copy
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException
from typer.models import ArgumentInfo, OptionInfo

from abliterate._version import __version__
from abliterate.cli.audit import audit
from abliterate.cli.bundled import demo, prompts
from abliterate.cli.chat import chat
from abliterate.cli.convert import convert
from abliterate.cli.edited import push, revert
from abliterate.cli.evaluate import evaluate
from abliterate.cli.extract import extract
from abliterate.cli.options import (
    MAY_BE_PATHS,
    PANELS,
    IntervalOption,
    JsonOption,
    QuietOption,
    VerboseOption,
    expand_home,
    panel_of,
)
from abliterate.cli.orthogonalize import orthogonalize
from abliterate.cli.output import Manner, Output, accept_any_text, forget_documents, write_error
from abliterate.cli.plan import inspect as inspect_command
from abliterate.cli.plan import plan
from abliterate.cli.refine import refine
from abliterate.cli.trace import trace
from abliterate.cli.verify import verify
from abliterate.errors import AbliterateError, Terminated
from abliterate.files import printable, without_secrets
from abliterate.processes import in_first_process

_terminations: list[int] = []

EXIT_CODES = (
    "Exit codes: 0 done; 1 a known error or a failed verification; 2 wrong usage; "
    "3 no candidate direction (or set of strengths) passes the selection; 130 interrupted; 143 terminated."
)


class _Group(TyperGroup):
    """The whole, whose switches are shown as such: they take no value."""

    def get_params(self, ctx: Any) -> Any:
        parameters = super().get_params(ctx)
        for each in parameters:
            if getattr(each, "is_flag", False):
                each.metavar = ""
        return parameters


app = typer.Typer(
    name="abliterate",
    cls=_Group,
    help="Find the refusal direction of a language model, remove it from the weights exactly, "
    "and measure what that did (arXiv 2406.11717).",
    epilog=EXIT_CODES,
    pretty_exceptions_enable=False,
)


class _Command(TyperCommand):
    """A command whose `--help` stands with the options that say what is printed, and whose errors name it."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        try:
            return super().parse_args(ctx, args)
        except TyperException as error:
            # What finds that an option lacks its value knows no command.
            if getattr(error, "ctx", ctx) is None:
                error.ctx = ctx  # type: ignore[attr-defined]
            raise

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)
        if option is not None:
            option.rich_help_panel, option.metavar = "Output", ""
        return option


def _help_of(command: Callable[..., None]) -> str:
    """Return a docstring with each paragraph in one line: the terminal wraps it, and Typer keeps breaks as they are."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(escape(" ".join(paragraph.split())) for paragraph in paragraphs)


def _everywhere(
    quiet: QuietOption = False, verbose: VerboseOption = False, progress_interval: IntervalOption = None
) -> None:
    """Hold the options that every command takes, behind its name too, where people type them."""


def _with_what_all_take(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that takes the options of all, knows `~` in every path, and ends with what took how long."""
    parameters = _parameters_of(command)
    paths = {name for name, each in parameters.items() if _info_of(each).metavar in MAY_BE_PATHS}

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        context: typer.Context = arguments["context"]
        before = context.obj or Manner()
        manner = context.obj = _settle(
            quiet=arguments.pop("quiet") or before.quiet,
            verbose=arguments.pop("verbose") or before.verbose,
            json_output=arguments["json_output"] or before.json_output,
            interval=arguments.pop("progress_interval") or before.interval,
        )
        output = Output(_name_of(command), manner=manner)
        try:
            # Someone who chats is waited for.
            with output.telling_of_pauses() if command is not chat else nullcontext():
                command(**{name: expand_home(value, may_be_path=name in paths) for name, value in arguments.items()})
        finally:
            output.summary()

    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context), *parameters.values()]
    )
    run.__annotations__ = {"context": typer.Context, **{name: each.annotation for name, each in parameters.items()}}
    return run


def _parameters_of(command: Callable[..., None]) -> dict[str, inspect.Parameter]:
    """Return what a command takes but for its context, panel by panel, each with its panel and what stands for it."""
    found: dict[str, inspect.Parameter] = {}
    for function in (command, _everywhere):
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.annotation is not typer.Context:
                annotation = _described(parameter.annotation, _name_of(command))
                found[name] = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=annotation)
    order = [None, *PANELS]
    panels = {name: _info_of(each).rich_help_panel for name, each in found.items()}
    ranks = {name: order.index(panel) if panel in order else len(order) for name, panel in panels.items()}
    return {name: found[name] for name in sorted(found, key=ranks.__getitem__)}


def _described(hint: Any, command: str) -> Any:
    """Return the annotation of a parameter with its panel, and with what stands for its value in the help."""
    kind, *others = get_args(hint)
    info = copy(next(each for each in others if isinstance(each, OptionInfo | ArgumentInfo)))
    # What stands in brackets would be taken for a style.
    info.help = escape(info.help or "")
    if isinstance(info, OptionInfo):
        flags = [word for text in (info.default, *(info.param_decls or ())) for word in str(text).split("/")]
        info.rich_help_panel = panel_of(command, flags)
        if info.metavar is None:
            info.metavar = _METAVARS.get(_plain(kind))
    return Annotated[kind, info]


_METAVARS: Mapping[Any, str] = {bool: "", int: "N", float: "NUMBER", Path: "FILE", str: "TEXT"}


def _plain(kind: Any) -> Any:
    """Return the type of one value, where there can be none or several."""
    parts = [part for part in get_args(kind) if part is not type(None)]
    if get_origin(kind) is list or type(None) in get_args(kind):
        return _plain(parts[0])
    return kind


def _info_of(parameter: inspect.Parameter) -> OptionInfo | ArgumentInfo:
    info: OptionInfo | ArgumentInfo = get_args(parameter.annotation)[1]
    return info


def _name_of(command: Callable[..., None]) -> str:
    return command.__name__.replace("_", "-")


_COMMANDS: Mapping[str, tuple[Callable[..., None], ...]] = {
    "Find and take out": (extract, refine, plan, orthogonalize, revert),
    "Prove and measure": (verify, inspect_command, evaluate, audit, trace, chat),
    "Share and prepare": (push, convert, prompts, demo),
}
for _panel, _members in _COMMANDS.items():
    for _command in _members:
        app.command(cls=_Command, help=_help_of(_command), epilog=EXIT_CODES, rich_help_panel=_panel)(
            _with_what_all_take(_command)
        )


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"abliterate {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
    progress_interval: IntervalOption = None,
    json_output: JsonOption = False,
) -> None:
    interval = Manner().interval if progress_interval is None else progress_interval
    context.obj = Manner(quiet=quiet, verbose=verbose, json_output=json_output, interval=interval)


def _settle(**manner: Any) -> Manner:
    """Return how the command speaks, and tell the libraries before any of them is imported."""
    settled = Manner(**manner)
    if not settled.verbose:
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if settled.quiet or not sys.stderr.isatty():
        # The bars of libraries know neither `-q` nor a log, which they leave without line breaks.
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = os.environ["TQDM_DISABLE"] = "1"
    return settled


def yield_soon() -> None:
    """Have threads that wait for one another give their core away soon, unless the user says how they are to wait.

    By default those of GNU's OpenMP, which torch computes with, spin for milliseconds at the end of each operation. On
    a machine that others use, too, the thread that they wait for may be waiting for that very core: see
    benchmarks/threads.py.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")


def main() -> None:
    """Run the command line; each error becomes one line on stderr, with `--json` one document too, and an exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    yield_soon()
    accept_any_text()
    forget_documents()
    verbose = any(argument in {"-v", "--verbose"} for argument in sys.argv[1:])
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        # Typer takes a termination for an interruption, and says 130.
        if code == 130:
            _end(*("Terminated", "terminated", 143) if _terminations else ("Interrupted", "interrupted", 130))
        sys.exit(code)
    except TyperException as error:
        where = getattr(error, "ctx", None)
        command = where.command_path if where else "abliterate"
        _fail("UsageError", f"{error.format_message().rstrip('.')}; see `{command} --help`", error.exit_code)
    except AbliterateError as error:
        if verbose:
            _show_traceback(error)
        _fail(type(error).__name__, str(error), error.exit_code)
    except Exception as error:
        if verbose:
            _show_traceback(error)
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            # What no command foresaw, such as a directory that may not be looked into.
            message = f"{os.fsdecode(error.filename)}: {error.strerror}; check the path and what you may do there"
            _fail("InputError", message, 1)
        message = f"unexpected {type(error).__name__}: {error} (run again with `abliterate -v ...` for details)"
        _fail("UnexpectedError", message, 1)


def _terminate(number: int, _frame: object) -> None:
    _terminations.append(number)
    raise Terminated


def _show_traceback(error: Exception) -> None:
    # Python itself would show the messages as they are, with what servers repeat of a request.
    print(printable(without_secrets("".join(traceback.format_exception(error)))), end="", file=sys.stderr)


def _fail(kind: str, message: str, exit_code: int) -> None:
    """End with one line on stderr."""
    line = printable(without_secrets(" ".join(message.split())))
    sys.stdout.flush()
    if in_first_process():
        print("error:", line, file=sys.stderr)
    _end(kind, line, exit_code)


def _end(kind: str, message: str, exit_code: int) -> None:
    """End; with `--json` stdout has one document then, whatever went wrong."""
    # What is wrong may be the arguments, so that nothing has read them.
    if "--json" in sys.argv[1:] and in_first_process():
        write_error(kind, message, exit_code=exit_code)
    sys.stdout.flush()
    sys.exit(exit_code)
