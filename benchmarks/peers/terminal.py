"""Programs that ask with menus, driven through a pseudo-terminal as a person would: read the list, go down, Enter.

What such a program writes is read as a stream, without its control sequences. A menu is what stands below a question
once nothing more comes; the first drawing holds it whole, if only the terminal is wide and high enough.
"""

import codecs
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from benchmarks.peers.measuring import ToolFailedError, Usage, end, last_error_line, plain, wait_for

ROWS, COLUMNS = 100, 250
DOWN, ENTER = "\x1b[B", "\r"
# Where is the cursor? A program that gets no answer falls back to less, or waits.
_ASKED, _ANSWER = b"\x1b[6n", b"\x1b[1;1R"
_POINTERS = "»❯>→*•●○ \t"
_QUIET_S = 0.7


def parse_menu(text: str, question: str) -> list[str]:
    """Return the choices below the last time that a question stands in a text, in their order.

    Raises:
        ToolFailedError: The question is not there, or nothing is below it.
    """
    _, found, below = plain(text).rpartition(question)
    if not found:
        raise ToolFailedError(f"it did not ask {question!r}")
    # The rest of the question's own line is a hint such as "(Use arrow keys)".
    choices: list[str] = []
    for line in below.split("\n")[1:]:
        choice = re.sub(r"\s+", " ", line.strip(_POINTERS))
        if choice:
            choices.append(choice)
        elif choices:
            break
    if not choices:
        raise ToolFailedError(f"there is no choice below {question!r}")
    return choices


class Terminal:
    """A program in a pseudo-terminal; use it as a context manager, which ends what is still running."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], log: Path, limit_s: float, cwd: Path) -> None:
        """Start it.

        Raises:
            ToolFailedError: It cannot be started.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        self._limit_s = limit_s
        self._seen = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._mark = 0
        self._usage: Usage | None = None
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        size = {"LINES": str(ROWS), "COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}
        self._started = time.monotonic()
        try:
            self._process = subprocess.Popen(
                list(command), stdin=theirs, stdout=theirs, stderr=theirs, env={**env, **size}, cwd=cwd,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            os.close(ours)
            raise ToolFailedError(f"{command[0]} cannot be started: {error.strerror or error}") from error
        finally:
            os.close(theirs)
        self._terminal = ours
        self._log = log.open("wb")

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._usage is None:
            end(self._process)
            self._usage = wait_for(self._process, self._started)
        if isinstance(error, ToolFailedError) and error.usage is None:
            error.usage = self._usage
        os.close(self._terminal)
        self._log.close()

    def expect(self, *texts: str) -> str:
        """Wait until one of some texts comes after what was expected before, and return it.

        Raises:
            ToolFailedError: The program ended, or the time is over.
        """
        while True:
            fresh = plain(self._seen[self._mark :])
            found = next((text for text in texts if text in fresh), None)
            if found is not None:
                return found
            if not self._read(self._left()):
                raise ToolFailedError(f"it ended before {texts[0]!r}: {last_error_line(self._seen)}")

    def menu(self, question: str) -> list[str]:
        """Wait for a question and return its choices.

        Raises:
            ToolFailedError: The program ended, the time is over, or there are no choices.
        """
        self.expect(question)
        self._settle()
        return parse_menu(self._seen[self._mark :], question)

    def choose(self, question: str, choice: str) -> None:
        """Wait for a question and take the first choice that begins with a text.

        Raises:
            ToolFailedError: As `menu`, or no choice begins so.
        """
        choices = self.menu(question)
        index = next((i for i, each in enumerate(choices) if each.startswith(choice)), None)
        if index is None:
            raise ToolFailedError(f"{question!r} offers no {choice!r}, but {', '.join(choices)}")
        for _ in range(index):
            self.send(DOWN)
            self._settle(0.1)
        self.send(ENTER)

    def answer(self, question: str, text: str) -> None:
        """Wait for a question and type a line."""
        self.expect(question)
        self._settle()
        self.send(text)
        self._settle()
        self.send(ENTER)

    def send(self, keys: str) -> None:
        """Type something; what was written before it is not looked at again."""
        self._mark = len(self._seen)
        try:
            os.write(self._terminal, keys.encode())
        except OSError as error:
            raise ToolFailedError(f"it takes no more keys: {last_error_line(self._seen)}") from error

    def finish(self) -> Usage:
        """Wait for its end and return what it took.

        Raises:
            ToolFailedError: The time is over, or it ended with another code than 0.
        """
        while self._read(self._left()):
            pass
        self._usage = wait_for(self._process, self._started)
        if self._process.returncode:
            raise ToolFailedError(last_error_line(self._seen), self._usage)
        return self._usage

    def _left(self) -> float:
        left = self._limit_s - (time.monotonic() - self._started)
        if left <= 0:
            raise ToolFailedError(f"it did not end within {self._limit_s:.0f} s")
        return left

    def _settle(self, quiet_s: float = _QUIET_S) -> None:
        """Read until nothing has come for a while."""
        while select.select([self._terminal], [], [], quiet_s)[0]:
            if not self._read(self._left()):
                return

    def _read(self, timeout_s: float) -> bool:
        """Read what is there, or wait for it; False at the end of the program.

        Raises:
            ToolFailedError: Nothing came in time.
        """
        if not select.select([self._terminal], [], [], timeout_s)[0]:
            raise ToolFailedError(f"it did not end within {self._limit_s:.0f} s")
        try:
            content = os.read(self._terminal, 65536)
        except OSError:  # the program has closed its side
            return False
        if not content:
            return False
        for _ in range(content.count(_ASKED)):
            os.write(self._terminal, _ANSWER)
        self._log.write(content)
        self._log.flush()
        self._seen += self._decoder.decode(content)
        return True
