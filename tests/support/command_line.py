"""The command line in this process, through its one error boundary, as a script calls it."""

import io
import os
import signal
import sys
from typing import NamedTuple
from unittest import mock

import pytest

from abliterate.cli.app import main


class Outcome(NamedTuple):
    """How one command ended, and what it wrote."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def error_line(self) -> str:
        """The one error line, which is the last line of stderr; nothing else may tell of the error."""
        lines = self.stderr.splitlines()
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:], self.stderr
        assert "Traceback" not in self.stderr
        return lines[-1]


class CommandLine:
    """Calls `abliterate` in this process, with pipes for stdin, stdout and stderr."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object, stdin: str = "", columns: int = 200) -> Outcome:
        """Run `abliterate` with some arguments, and leave the process as it was."""
        words = ["abliterate", *map(str, arguments)]
        piped = io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8")
        on_terminate = signal.getsignal(signal.SIGTERM)
        self._capsys.readouterr()
        try:
            with (
                mock.patch.dict(os.environ, COLUMNS=str(columns)),
                mock.patch.multiple(sys, argv=words, stdin=piped),
                pytest.raises(SystemExit) as ended,
            ):
                main()
        finally:
            signal.signal(signal.SIGTERM, on_terminate)
        # Python itself ends with 0 where the code is none, and with 1 where it is a text.
        code = ended.value.code
        return Outcome(code if isinstance(code, int) else int(code is not None), *self._capsys.readouterr())
