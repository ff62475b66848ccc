"""`abliterate chat` through a pipe, as a script uses it, and through a pseudo-terminal, as a person does."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from abliterate.directions import make_direction
from abliterate.files import printable
from abliterate.models.chat_model import ChatModel
from tests.support.command_line import CommandLine, Outcome

COMMAND = [sys.executable, "-m", "abliterate"]


@pytest.fixture
def direction(tmp_path: Path) -> Path:
    made = make_direction(
        mean_difference=20 * torch.randn(32, generator=torch.Generator().manual_seed(4)), metadata={"layer": 2}
    )
    made.save(tmp_path / "r.safetensors")
    return tmp_path / "r.safetensors"


@pytest.fixture
def talk(call_main: CommandLine) -> Callable[..., Outcome]:
    """Run a command with some lines in the pipe that it reads."""
    return lambda lines, *arguments: call_main(*arguments, stdin=lines)


def test_a_pipe_gets_the_replies_alone(talk, llama_directory: Path, direction: Path) -> None:
    lines = "Explain rain.\n\n/ablate\n/both\nExplain snow.\n/quit\nnever read\n"
    options = ("--direction", direction, "--max-new-tokens", 6)
    done = talk(lines, "chat", llama_directory, *options)
    assert done.exit_code == 0, done.stderr
    document = json.loads(talk(lines, "chat", llama_directory, *options, "--json").stdout)
    first, second = document["turns"]
    assert (first["user"], first["intervention"]) == ("Explain rain.", "none")
    assert (second["user"], second["intervention"]) == ("Explain snow.", "ablate")
    replies = second["replies"]
    expected = f"{first['replies']['edited']}\n[base]\n{replies['base']}\n[edited]\n{replies['edited']}\n"
    assert done.stdout == printable(expected)
    assert "the direction is ablated" in done.stderr
    assert talk(lines, "-q", "chat", llama_directory, *options).stderr == ""


def test_a_message_that_starts_with_a_slash(talk, llama_directory: Path) -> None:
    done = talk("//etc is what?\n", "chat", llama_directory, "--max-new-tokens", 2, "--json")
    assert json.loads(done.stdout)["turns"][0]["user"] == "/etc is what?"


def test_no_lines_no_turns(talk, llama_directory: Path) -> None:
    done = talk("", "chat", llama_directory, "--json")
    assert (done.exit_code, json.loads(done.stdout)["turns"]) == (0, [])


@pytest.mark.parametrize(
    ("lines", "arguments", "message"),
    [
        ("/dance\nExplain rain.\n", (), "no command /dance"),
        ("/ablate\n", (), "--direction"),
        ("Explain rain.\n", ("--max-new-tokens", 600), "context of 512"),
        ("", ("--direction", "missing.safetensors"), "missing.safetensors"),
        ("", ("--base", "./missing"), "missing"),
    ],
)
def test_a_script_ends_at_the_first_error(
    talk, llama_directory: Path, lines: str, arguments: tuple[object, ...], message: str
) -> None:
    done = talk(lines, "chat", llama_directory, *arguments)
    assert (done.exit_code, done.stdout) == (1, "")
    assert message in done.error_line


def test_what_a_reply_holds_for_a_terminal_is_written_as_escapes(
    talk, llama_directory: Path, direction: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChatModel, "decode", lambda *_arguments, **_options: "a\x1b]52;c;aGk=\x07\u3000b")
    options = ("--direction", direction, "--max-new-tokens", 2)
    done = talk("Explain rain.\n/ablate\n/both\nExplain snow.\n", "chat", llama_directory, *options)
    reply = "a\\x1b]52;c;aGk=\\x07\u3000b\n"
    assert done.stdout == f"{reply}[base]\n{reply}[edited]\n{reply}"


def test_a_message_in_another_encoding_is_one_line(llama_directory: Path) -> None:
    command = [*COMMAND, "chat", str(llama_directory), "--max-new-tokens", "2"]
    for variables in ({"PYTHONIOENCODING": "utf-8:strict"}, {"PYTHONIOENCODING": "utf-8:surrogateescape"}):
        done = subprocess.run(
            command, input=b"Bonjour \xe9\n", capture_output=True, check=False, env={**os.environ, **variables}
        )
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr.decode().splitlines()[-1].startswith("error: stdin, line 1: not utf-8 text")


def test_an_interrupt_in_a_pipe_stops_the_reply_and_ends_with_130(llama_directory: Path) -> None:
    command = [*COMMAND, "chat", str(llama_directory), "--max-new-tokens", "400"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write("Explain rain at length.\nExplain snow.\n")
        process.stdin.flush()
        first = os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        rest, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert first
    assert "Traceback" not in error
    assert rest.endswith("\n")


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, *arguments: object) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ.update(TERM="dumb", COLUMNS="100")
            os.execv(COMMAND[0], [*COMMAND, *map(str, arguments)])
        self.seen = ""
        self.deadline = time.monotonic() + 240

    def read(self) -> bool:
        """Read what is there; return whether the other end is still open."""
        if time.monotonic() > self.deadline:
            os.kill(self.pid, signal.SIGKILL)
            pytest.fail(f"nothing more came after: {self.seen!r}")
        if select.select([self.fd], [], [], 0.2)[0]:
            try:
                self.seen += os.read(self.fd, 4096).decode(errors="replace")
            except OSError:
                return False
        return True

    def wait_for(self, text: str, *, after: int = 0) -> int:
        """Read until `text` stands behind the first `after` characters; return where it ends."""
        while text not in self.seen[after:]:
            assert self.read(), self.seen
        return self.seen.index(text, after) + len(text)

    def send(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def exit_code(self, *, keys: str = "") -> int:
        """Read to the end, and return the exit code; press `keys` now and then until it comes.

        A prompt is on the screen a moment before it can be interrupted.
        """
        self.send(keys)
        pressed = time.monotonic()
        while self.read():
            if keys and time.monotonic() > pressed + 10:
                self.send(keys)
                pressed = time.monotonic()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_in_a_terminal_an_error_or_an_interrupted_reply_does_not_end_it(llama_directory: Path, direction: Path) -> None:
    terminal = Terminal("chat", llama_directory, "--direction", direction, "--max-new-tokens", 400)
    terminal.wait_for("> ")
    terminal.send("/dance\n")
    end = terminal.wait_for("error: there is no command /dance")
    end = terminal.wait_for("> ", after=end)
    terminal.send("Explain rain.\n")
    end = terminal.wait_for("Explain rain.\r\n", after=end)
    while len(terminal.seen) < end + 10:
        assert terminal.read()
    terminal.send("\x03")
    end = terminal.wait_for("\r\n> ", after=end)
    terminal.send("/ablate\n")
    end = terminal.wait_for("the direction is ablated", after=end)
    terminal.wait_for("> ", after=end)
    assert terminal.exit_code(keys="\x03") == 130


def test_in_a_terminal_both_stand_side_by_side(llama_directory: Path, direction: Path) -> None:
    terminal = Terminal("chat", llama_directory, "--direction", direction, "--max-new-tokens", 4)
    terminal.wait_for("> ")
    terminal.send("/ablate\n/both\n")
    end = terminal.wait_for("base and edited answer")
    terminal.send("Explain rain.\n")
    end = terminal.wait_for("edited", after=end)
    terminal.wait_for("> ", after=end)
    assert any("base" in line and "edited" in line for line in terminal.seen.splitlines()[-12:])
    terminal.send("/quit\n")
    assert terminal.exit_code() == 0
