"""How tasks are shown: few lines in a log, bars on a terminal, and at the end what took how long."""

import io
import os
import pty
import re
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from abliterate.cli.stages import BarProgress, LineProgress, Stages, telling_of_pauses
from tests.support.paths import SOURCES


class Clock:
    """A clock that stands still but when it is told to go on, and an event that waits for it."""

    def __init__(self, monkeypatch):
        self.seconds = 0.0
        monkeypatch.setattr("abliterate.cli.stages.time.monotonic", lambda: self.seconds)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def ticks(clock, monkeypatch, steps):
    """Let the thread of a task wake as often as there are steps, each of which says what happens before."""
    turn, done = threading.Semaphore(0), threading.Semaphore(0)
    waits = []

    class Ended:
        def __init__(self):
            self.ended = False

        def wait(self, interval):
            waits.append(interval)
            done.release()
            turn.acquire()
            return self.ended

        def set(self):
            self.ended = True
            turn.release()

    monkeypatch.setattr(
        "abliterate.cli.stages.threading", SimpleNamespace(Event=Ended, Thread=threading.Thread, Lock=threading.Lock)
    )

    def go():
        done.acquire()
        for step in steps:
            step()
            turn.release()
            done.acquire()
        return waits

    return go


def test_a_log_has_a_line_at_the_start_every_interval_and_at_the_end(clock, monkeypatch):
    lines = []
    progress = LineProgress(lines.append, Stages(), 30)
    advance = [lambda _n: None]

    def later(seconds, n):
        def step():
            clock.seconds += seconds
            advance[0](n)

        return step

    go = ticks(clock, monkeypatch, [later(30, 10), later(30, 0), later(30, 20)])
    with progress.task("Answering prompts", total=40) as advance[0]:
        assert set(go()) == {30}
        clock.seconds += 10
        advance[0](10)
    assert lines == [
        "Answering prompts: 40 to do",
        "Answering prompts: 10 of 40 done, 3.0 s each, about 2 min left",
        "Answering prompts: 10 of 40 done, 6.0 s each, about 3 min left",
        "Answering prompts: 30 of 40 done, 3.0 s each, about 30 s left",
        "Answering prompts: 40 done in 2 min, 2.5 s each",
    ]


def test_a_task_of_one_step_and_one_of_bytes_say_so_too(clock, monkeypatch):
    lines = []

    def wait(seconds):
        return lambda: setattr(clock, "seconds", clock.seconds + seconds)

    go = ticks(clock, monkeypatch, [wait(45)])
    with LineProgress(lines.append, Stages()).task("Loading model", total=1) as advance:
        go()
        advance(1)
    go = ticks(clock, monkeypatch, [wait(10)])
    with LineProgress(lines.append, Stages()).task("Hashing", total=3_000_000_000, unit="bytes") as advance:
        advance(1_000_000_000)
        go()
        advance(2_000_000_000)
    go = ticks(clock, monkeypatch, [wait(90)])
    with LineProgress(lines.append, Stages()).task("Comparing", total=4) as advance:
        advance(4)
        go()
    assert lines == [
        "Loading model",
        "Loading model: 45 s so far",
        "Loading model: done in 45 s",
        "Hashing: 3.0 GB to do",
        "Hashing: 1.0 GB of 3.0 GB done, 100.0 MB/s, about 20 s left",
        "Hashing: 3.0 GB done in 10 s, 300.0 MB/s",
        "Comparing: 4 to do",
        "Comparing: 4 done, finishing, 2 min so far",
        "Comparing: 4 done in 2 min, 22.5 s each",
    ]


def test_the_clock_of_a_task_ends_with_it():
    before = threading.active_count()
    for _ in range(3):
        with LineProgress(lambda _line: None, Stages()).task("Working", total=2) as advance:
            assert threading.active_count() == before + 1
            advance(1)
    with pytest.raises(ZeroDivisionError), LineProgress(lambda _line: None, Stages()).task("Working", total=2):
        raise ZeroDivisionError
    assert threading.active_count() == before


def test_a_log_tells_of_long_pauses_between_tasks_too():
    lines, stages = [], Stages()
    with telling_of_pauses(lines.append, stages, 0.05):
        until = time.monotonic() + 20
        while len(lines) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        with stages.timed("Loading model"):
            n_before = len(lines)
            time.sleep(0.3)
            assert len(lines) <= n_before + 1  # one may have been on its way
        while lines[-1].startswith("Starting") and time.monotonic() < until:
            time.sleep(0.01)
    assert lines[0] == "Starting: 0 s so far"
    assert lines[-1] == "After Loading model: 0 s so far"


def test_a_long_command_ends_with_what_took_how_long_and_a_short_one_without(clock):
    stages = Stages()
    with stages.timed("Loading model"):
        clock.seconds += 4
    assert stages.summary() == []
    for seconds in (60, 66):
        with stages.timed("Answering harmful prompts"):
            clock.seconds += seconds
    *lines, last = stages.summary()
    assert lines == [
        "Stages:",
        "  Loading model                   4 s",
        "  Answering harmful prompts     2 min",
    ]
    assert re.fullmatch(r"  in all +2 min; peak memory \d+\.\d GB", last)


def test_a_terminal_has_a_bar_with_the_time_left():
    console = Console(file=io.StringIO(), force_terminal=True, width=100, highlight=False)
    stages = Stages()
    progress = BarProgress(console, stages)
    with progress.task("Answering prompts", total=4) as advance:
        advance(4)
    progress.message("[bold]a message")
    shown = console.file.getvalue()
    assert "Answering prompts" in shown
    assert "4/4" in shown
    assert "time left" in shown
    assert "[bold]a message" in shown
    assert stages.seconds.keys() == {"Answering prompts"}


PROGRAM = """
import sys, time
from abliterate.cli.output import Output
with Output("plan").progress.task("Answering prompts", total=2) as advance:
    advance(1)
    advance(1)
"""


def run_on_a_terminal(program):
    """Return what a program writes to stderr where that is a terminal."""
    master, slave = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(SOURCES), "TERM": "xterm", "COLUMNS": "100"}
    child = subprocess.Popen([sys.executable, "-c", program], stderr=slave, stdout=subprocess.DEVNULL, env=environment)
    os.close(slave)
    shown, until = b"", time.monotonic() + 60
    while time.monotonic() < until:
        try:
            part = os.read(master, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(master)
    assert child.wait(timeout=60) == 0
    return shown.decode()


def test_where_stderr_is_a_terminal_bars_are_drawn_and_else_lines():
    shown = run_on_a_terminal(PROGRAM)
    assert "\u2501" in shown  # the bar
    assert "2/2" in shown
    log = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
    )
    assert log.stderr == "Answering prompts: 2 to do\nAnswering prompts: 2 done in 0 s\n"
