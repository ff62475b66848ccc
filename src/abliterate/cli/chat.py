"""`abliterate chat`: talk to a model with its direction ablated, added or left alone."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.live import Live
from rich.table import Table
from rich.text import Text

from abliterate.cli.options import (
    MODEL_DEFAULTS,
    BaseRevisionOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArg,
    RevisionOption,
    SystemPromptOption,
    TrustRemoteCodeOption,
)
from abliterate.cli.output import Output, SafeConsole
from abliterate.errors import InputError
from abliterate.evaluation.report import MAX_NEW_TOKENS
from abliterate.files import printable

if TYPE_CHECKING:
    from abliterate.interventions.chatting import ChatSession, Side


def chat(
    context: typer.Context,
    model: ModelArg,
    base: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="What /both compares with: directory or Hub id.")
    ] = None,
    base_revision: BaseRevisionOption = None,
    direction: Annotated[Path | None, typer.Option("--direction", help="Direction file for /ablate and /add.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Length of each reply.")
    ] = MAX_NEW_TOKENS,
    system_prompt: SystemPromptOption = MODEL_DEFAULTS.system_prompt,
    dtype: DtypeOption = MODEL_DEFAULTS.dtype,
    device: DeviceOption = MODEL_DEFAULTS.device,
    revision: RevisionOption = None,
    trust_remote_code: TrustRemoteCodeOption = MODEL_DEFAULTS.trust_remote_code,
    json_output: JsonOption = False,
) -> None:
    """Chat in the terminal, or with a message a line on stdin; /help lists the commands.

    Replies are greedy. From a pipe, stdout holds the replies alone and a command that fails ends the run; with
    --json it holds one document with all turns, at the end. Ctrl-C stops a reply; at the prompt, or from a pipe, it
    ends the run. Nothing is written unless /save asks for it.
    """
    from abliterate.checkpoints.model_source import resolve_model
    from abliterate.directions import load_direction
    from abliterate.editing.record import resolve_base
    from abliterate.interventions.chatting import ChatSession
    from abliterate.models.loading import open_model
    from abliterate.models.options import ModelOptions

    output = Output.of(context, json_output=json_output)
    loaded = load_direction(direction) if direction is not None else None
    options = ModelOptions(dtype=dtype, device=device, system_prompt=system_prompt, trust_remote_code=trust_remote_code)
    sources = [resolve_model(model, revision=revision, progress=output.progress)]
    if base is not None:
        sources.append(resolve_base(base, revision=base_revision, edited=sources[0], progress=output.progress))
    elif base_revision is not None:
        raise InputError(f"--base-revision {base_revision}: is of --base, which is not given")
    chats = [open_model(source, options=options, progress=output.progress).chat for source in sources]
    session = ChatSession(
        model=chats[0], base=chats[1] if len(chats) > 1 else None, direction=loaded, max_new_tokens=max_new_tokens
    )
    _Conversation(session, output).run()


class _Conversation:
    """Reads lines and shows replies, in a terminal or for a script."""

    def __init__(self, session: "ChatSession", output: Output) -> None:
        self._session = session
        self._output = output
        self._interactive = sys.stdin.isatty()
        self._n_lines = 0
        self._console = SafeConsole(highlight=False)

    def run(self) -> None:
        interrupted = False
        try:
            for line in self._lines():
                if line.strip() == "/quit":
                    break
                if not self._handle(line):
                    interrupted = True
                    break
        except KeyboardInterrupt:
            interrupted = True
        if self._output.json_output:
            self._output.report(self._session.document(), tables=list)
        if interrupted:
            raise KeyboardInterrupt

    def _lines(self) -> Iterator[str]:
        """Yield what the user types, or the lines of stdin; empty ones are left out."""
        if self._interactive:
            self._output.note("/help lists the commands, /quit or Ctrl-D ends")
        while (line := self._read_line()) is not None:
            if line.strip():
                yield line

    def _read_line(self) -> str | None:
        if self._interactive and self._console.is_terminal:
            # Importing readline gives `input` line editing and history, where the platform has it.
            with suppress(ImportError):
                import readline  # noqa: F401
            try:
                return input("> ")
            except EOFError:
                return None
        if self._interactive:
            self._output.stderr.print("> ", end="")
        self._n_lines += 1
        try:
            line = sys.stdin.readline()
            line.encode()  # where Python lets other bytes pass, it stands for them with what no text may hold
        except UnicodeError as error:
            raise InputError(
                f"stdin, line {self._n_lines}: not {sys.stdin.encoding} text; convert it, as with `iconv -t UTF-8`"
            ) from error
        return line.rstrip("\n") if line else None

    def _handle(self, line: str) -> bool:
        """Carry out a command or show a reply; return whether the conversation goes on."""
        from abliterate.errors import AbliterateError

        try:
            if line.startswith("/") and not line.startswith("//"):
                self._output.note(self._session.command(line))
                return True
            turn_was_interrupted = self._reply(line.removeprefix("/"))
        except AbliterateError as error:
            # Someone who types can try again; a script must not go on from a state it did not ask for.
            if not self._interactive:
                raise
            self._output.stderr.print(f"error: {error}", markup=False)
            return True
        return self._interactive or not turn_was_interrupted

    def _reply(self, message: str) -> bool:
        session = self._session
        if self._output.json_output:
            return session.reply(message, lambda _side, _text: None).interrupted
        if len(session.sides) > 1 and self._console.is_terminal:
            return self._side_by_side(message)
        shown: set[Side] = set()

        def show(side: "Side", text: str) -> None:
            if len(session.sides) > 1 and side not in shown:
                self._output.write("\n" * bool(shown) + f"[{side}]\n")
            shown.add(side)
            self._output.write(text)

        turn = session.reply(message, show)
        self._output.write("\n")
        return turn.interrupted

    def _side_by_side(self, message: str) -> bool:
        texts = {side: Text() for side in self._session.sides}
        table = Table(*texts, expand=True)
        table.add_row(*texts.values())
        with Live(table, console=self._console, refresh_per_second=8, vertical_overflow="visible"):

            def show(side: "Side", text: str) -> None:
                texts[side].append(printable(text))

            return self._session.reply(message, show).interrupted
