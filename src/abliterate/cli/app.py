"""The command line: registration, `--version`, and the one error boundary."""

import functools
import inspect
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from abliterate._version import __version__
from abliterate.cli.audit import audit
from abliterate.cli.bundled import demo, prompts
from abliterate.cli.chat import chat
from abliterate.cli.convert import convert
from abliterate.cli.evaluate import evaluate
from abliterate.cli.extract import extract
from abliterate.cli.options import expand_home
from abliterate.cli.orthogonalize import orthogonalize
from abliterate.cli.output import accept_any_text
from abliterate.cli.plan import inspect as inspect_command
from abliterate.cli.plan import plan
from abliterate.cli.push import push
from abliterate.cli.refine import refine
from abliterate.cli.revert import revert
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

app = typer.Typer(
    name="abliterate",
    help="Find the refusal direction of a language model, remove it from the weights exactly, "
    "and measure what that did (arXiv 2406.11717).",
    epilog=EXIT_CODES,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _help_of(command: Callable[..., None]) -> str:
    """Return a docstring with each paragraph in one line: the terminal wraps it, and Typer keeps breaks as they are."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _with_expanded_paths(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command whose paths, all of them, know `~`."""

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        command(**{name: expand_home(value) for name, value in arguments.items()})

    return run


_COMMANDS = (
    extract, refine, plan, orthogonalize, revert, verify, inspect_command, evaluate, audit, trace, chat, push, convert,
    prompts, demo,
)  # fmt: skip
for _command in _COMMANDS:
    app.command(help=_help_of(_command), epilog=EXIT_CODES)(_with_expanded_paths(_command))


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
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Show library logs, and tracebacks of errors.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress or notes on stderr; errors only.")] = False,
) -> None:
    context.obj = {"verbose": verbose, "quiet": quiet}
    if not verbose:
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


def main() -> None:
    """Run the command line; each error becomes one line on stderr and its exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    accept_any_text()
    verbose = any(argument in {"-v", "--verbose"} for argument in sys.argv[1:])
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        # Typer takes a termination for an interruption, and says 130.
        sys.exit(143 if _terminations else code)
    except TyperException as error:
        where = getattr(error, "ctx", None)
        command = where.command_path if where else "abliterate"
        _fail(f"{error.format_message().rstrip('.')}; see `{command} --help`", error.exit_code)
    except AbliterateError as error:
        if verbose:
            _show_traceback(error)
        _fail(str(error), error.exit_code)
    except Exception as error:
        if verbose:
            _show_traceback(error)
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            # What no command foresaw, such as a directory that may not be looked into.
            _fail(f"{os.fsdecode(error.filename)}: {error.strerror}; check the path and what you may do there", 1)
        _fail(f"unexpected {type(error).__name__}: {error} (run again with `abliterate -v ...` for details)", 1)


def _terminate(number: int, _frame: object) -> None:
    _terminations.append(number)
    raise Terminated


def _show_traceback(error: Exception) -> None:
    # Python itself would show the messages as they are, with what servers repeat of a request.
    print(printable(without_secrets("".join(traceback.format_exception(error)))), end="", file=sys.stderr)


def _fail(message: str, exit_code: int) -> None:
    sys.stdout.flush()
    if in_first_process():
        print("error:", printable(without_secrets(" ".join(message.split()))), file=sys.stderr)
    sys.exit(exit_code)
