"""Whole runs of other programs, measured: wall time, CPU time and peak memory, the children included.

The numbers are those that the kernel keeps for a child that has ended (wait4): its CPU time holds that of all
descendants it waited for; its peak is the largest resident set of any one process among them, not their sum.
"""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[()][0-9A-Z]|[@-Z\\-_=>78])")
_NOISE = re.compile(r"^(WARNING|DEPRECATION|\[notice\]|Notice)\b|^\W*$", re.IGNORECASE)
_TOLD = re.compile(r"(^|\s)(ERROR:|error:|[A-Za-z_.]*(Error|Exception)\b)")
_LONGEST = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a run took; see the module's docstring for what the peak is."""

    wall_s: float
    cpu_s: float
    peak_mb: float

    def __add__(self, other: "Usage") -> "Usage":
        """Return what one run after the other took."""
        return Usage(
            wall_s=self.wall_s + other.wall_s,
            cpu_s=self.cpu_s + other.cpu_s,
            peak_mb=max(self.peak_mb, other.peak_mb),
        )


class ToolFailedError(Exception):
    """A tool did not do what it was asked for; the message is its last error line, `usage` what it took until then."""

    def __init__(self, message: str, usage: Usage | None = None) -> None:
        super().__init__(message)
        self.usage = usage


def plain(text: str) -> str:
    """Return a terminal's text without its control sequences, carriage returns as line breaks."""
    return re.sub(r"\r+\n?", "\n", _ANSI.sub("", text))


def last_error_line(output: str) -> str:
    """Return the last line of an output that tells of an error, or else the last that says anything."""
    lines = [line.strip(" │╭╮╰╯─\t") for line in plain(output).splitlines()]
    lines = [line for line in lines if not _NOISE.match(line)]
    told = [line for line in lines if _TOLD.search(line)]
    return (told or lines or ["it ended without a word"])[-1][:_LONGEST]


def wait_for(process: "subprocess.Popen[bytes]", started: float) -> Usage:
    """Wait for a child and return what it took; its return code is set as `wait` would."""
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Usage(
        wall_s=time.monotonic() - started,
        cpu_s=used.ru_utime + used.ru_stime,
        peak_mb=used.ru_maxrss / 1024,
    )


def end(process: "subprocess.Popen[bytes]") -> None:
    """End a child and what it started, which has a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_measured(
    command: Sequence[str], *, log: Path, env: Mapping[str, str], limit_s: float, cwd: Path | None = None
) -> Usage:
    """Run a command to its end, its output into a file, and return what it took.

    Raises:
        ToolFailedError: It cannot be started, ended with another code than 0, or did not end in time.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                list(command), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=dict(env),
                cwd=cwd, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise ToolFailedError(f"{command[0]} cannot be started: {error.strerror or error}") from error
        late = False
        try:
            while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                late = time.monotonic() - started > limit_s
                if late:
                    end(process)
                    break
                time.sleep(0.05)
        except BaseException:
            end(process)
            wait_for(process, started)
            raise
        usage = wait_for(process, started)
    if late:
        raise ToolFailedError(f"it did not end within {limit_s:.0f} s", usage)
    if process.returncode:
        raise ToolFailedError(last_error_line(log.read_text(encoding="utf-8", errors="replace")), usage)
    return usage
