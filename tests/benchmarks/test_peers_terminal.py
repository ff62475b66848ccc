"""Menus are driven through a pseudo-terminal: here those of a small program that asks as peers do, in colours."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.peers.measuring import ToolFailedError, last_error_line, plain, run_measured
from benchmarks.peers.others import run_heretic
from benchmarks.peers.prompts import Prompts
from benchmarks.peers.terminal import Terminal, parse_menu
from benchmarks.peers.tools import REPOSITORY, Job

# Asks where the cursor is, as such programs do, draws a list, and redraws it at each arrow key.
PROGRAM = """\
import os, pathlib, sys, termios, tty

TRIALS = ["[Trial   3] Refusals:  3/32, KL divergence: 0.0550", "[Trial   6] Refusals: 27/32, KL divergence: 0.0030"]
termios_before = termios.tcgetattr(0)
tty.setraw(0)

def write(text):
    os.write(1, text.replace("\\n", "\\r\\n").encode())

def key():
    keys = os.read(0, 1)
    return keys + os.read(0, 2) if keys == b"\\x1b" else keys

def select(question, choices):
    write("\\x1b[6n")
    while not (answer := os.read(0, 100)).endswith(b"R"):
        pass
    at = 0
    while True:
        write(f"\\x1b[?25l\\x1b[36m?\\x1b[0m \\x1b[1m{question}\\x1b[0m (Use arrow keys)\\n")
        for i, choice in enumerate(choices):
            write((" \\x1b[7m\\u00bb " if i == at else "   ") + choice + "\\x1b[0m\\x1b[K\\n")
        pressed = key()
        if pressed == b"\\r":
            write(f"\\x1b[{len(choices) + 1}A\\x1b[J? {question} {choices[at]}\\n")
            return choices[at]
        at += pressed == b"\\x1b[B"

def ask(question):
    write(f"? {question} ")
    typed = b""
    while (pressed := os.read(0, 1)) != b"\\r":
        typed += pressed
        os.write(1, pressed)
    write("\\n")
    return typed.decode()

options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if options["--seed"] == "666":
    write("Traceback (most recent call last):\\n\\x1b[31mValueError: \\x1b[0mno such model\\n")
    sys.exit(1)
write("\\x1b[1;32mOptimization finished!\\x1b[0m\\n")
OFFERED = [*TRIALS, "Run additional trials", "Exit program"]
while (trial := select("Which trial do you want to use?", OFFERED)) in TRIALS:
    write(f"Restoring model from {trial[1:9]}...\\n")
    actions = ["Save the model to a local folder", "Upload the model", "Return to the trial selection menu"]
    while select("What do you want to do with the decensored model?", actions) == actions[0]:
        folder = pathlib.Path(ask("Path to the folder:"))
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_text(trial)
        write(f"Model saved to {folder}.\\n")
termios.tcsetattr(0, termios.TCSADRAIN, termios_before)
sys.exit(0 if trial == "Exit program" else 9)
"""


@pytest.fixture
def job(tmp_path: Path):
    """A job for a `heretic` that is the small program above."""
    program = tmp_path / "bin" / "heretic"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n{PROGRAM}")
    program.chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()

    def make(**changes):
        values = {
            "model": tmp_path, "prompts": Prompts(directory=tmp_path), "work": work, "programs": program.parent,
            "env": dict(os.environ), "seed": 1, "trials": 6, "n_front": 1, "max_new_tokens": 8,
            "system_prompt": "Be kind", "limit_s": 60.0,
        }  # fmt: skip
        return Job(**values | changes)

    return make


def test_the_first_trial_that_is_offered_is_exported(job):
    made = run_heretic(job())
    (export,) = made.exports
    assert (export.name, export.claims) == ("trial 3", {"refusals": 3, "prompts": 32, "kl_first_token": 0.055})
    assert (export.model / "model.safetensors").read_text().startswith("[Trial   3]")
    assert made.usage.wall_s > 0
    assert made.usage.peak_mb > 1
    assert "--n-trials 6 --n-startup-trials 3" in made.settings
    assert "--system-prompt 'Be kind'" in made.settings
    assert str(export.model.parent) not in made.settings


def test_several_trials_of_the_front_are_exported(job):
    made = run_heretic(job(n_front=5))
    assert [export.name for export in made.exports] == ["trial 3", "trial 6"]
    assert [(export.model / "model.safetensors").read_text()[:10] for export in made.exports] == [
        "[Trial   3", "[Trial   6",
    ]  # fmt: skip


def test_a_program_that_ends_too_early_is_told_by_its_last_error_line(job):
    with pytest.raises(ToolFailedError, match=r"it ended before 'Which trial.*ValueError: no such model$") as caught:
        run_heretic(job(seed=666))
    assert caught.value.usage is not None


def test_a_program_that_takes_too_long_is_ended(job, tmp_path):
    with pytest.raises(ToolFailedError, match="did not end within 1 s") as caught:
        with Terminal(
            [sys.executable, "-c", "import time; time.sleep(60)"],
            env=dict(os.environ), log=tmp_path / "log", limit_s=1.0, cwd=tmp_path,
        ) as terminal:  # fmt: skip
            terminal.menu("Which")
    assert caught.value.usage is not None
    assert caught.value.usage.wall_s < 30


def test_a_choice_that_is_not_offered_is_an_error(job):
    here = job()
    with pytest.raises(ToolFailedError, match=r"offers no 'Sing', but .*Exit program"):
        with Terminal(
            [str(here.programs / "heretic"), "--seed", "1"], env=here.env, log=here.log, limit_s=30, cwd=here.work
        ) as terminal:
            terminal.choose("Which trial do you want to use?", "Sing")


def test_a_menu_is_read_without_its_colours():
    drawn = (
        "before\r\n\x1b[36m?\x1b[0m \x1b[1mWhich?\x1b[0m (Use arrow keys)\r\n \x1b[7m\u00bb One  of\x1b[0m\x1b[K\r\n"
        "\x1b[?25l   Two\r\n\r\nno choice\r\n"
    )
    assert parse_menu(drawn, "Which?") == ["One of", "Two"]
    assert parse_menu("Which?\n 1\n" + drawn, "Which?") == ["One of", "Two"]
    with pytest.raises(ToolFailedError, match="did not ask 'Why"):
        parse_menu(drawn, "Why?")
    with pytest.raises(ToolFailedError, match="no choice below"):
        parse_menu("Which?\n\n", "Which?")


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("WARNING: a\nERROR: no matching distribution\nWARNING: b\n", "ERROR: no matching distribution"),
        ("Traceback\n  File x\nRuntimeError: boom\n\n", "RuntimeError: boom"),
        ("\x1b[31mbox\x1b[0m\n\u2502 KeyError: 'a' \u2502\n\u2570\u2500\u2500\u256f\n", "KeyError: 'a'"),
        ("done\nall is well\n", "all is well"),
        ("", "it ended without a word"),
    ],
)
def test_the_last_error_line(output, line):
    assert last_error_line(output) == line


def test_control_sequences_are_taken_out():
    assert plain("\x1b]0;title\x07a\x1b[1;31mb\x1b[0m\r\nc\rd\x1b(B\x1b=e") == "ab\nc\nde"


def test_a_run_is_measured_with_what_it_starts(tmp_path):
    burn = "import time\nt = time.process_time()\nwhile time.process_time() - t < 0.5: pass"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"
    usage = run_measured([sys.executable, "-c", parent], log=tmp_path / "log", env=dict(os.environ), limit_s=60)
    assert usage.cpu_s >= 0.5
    assert usage.wall_s >= 0.4
    assert usage.peak_mb > 5
    both = usage + usage
    assert (both.wall_s, both.peak_mb) == (2 * usage.wall_s, usage.peak_mb)


def test_a_command_that_fails_is_told_by_its_last_error_line(tmp_path):
    words = [sys.executable, "-c", "print('so far'); raise OSError('disk')"]
    with pytest.raises(ToolFailedError, match=r"^OSError: disk$") as caught:
        run_measured(words, log=tmp_path / "log", env=dict(os.environ), limit_s=60)
    assert caught.value.usage is not None
    with pytest.raises(ToolFailedError, match="cannot be started"):
        run_measured([str(tmp_path / "none")], log=tmp_path / "log", env={}, limit_s=60)
    with pytest.raises(ToolFailedError, match="did not end within 0 s"):
        run_measured([sys.executable, "-c", "import time; time.sleep(60)"], log=tmp_path / "log", env={}, limit_s=0.2)


def test_what_was_started_ends_when_the_command_is_ended(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from benchmarks.peers import __main__ as command\n"
        "from benchmarks.peers.measuring import run_measured\n"
        "from benchmarks.peers.tools import Tool\n"
        "child = 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'\n"
        "def run(job):\n"
        "    return run_measured([sys.executable, '-c', child], log=job.log, env=dict(os.environ), limit_s=60)\n"
        "command.PEERS = ()\n"
        "command.our_tools = lambda _: (Tool(name='ours', requirement=None, searches=False, run=run),)\n"
        "command.own_system_prompt = lambda model: None\n"
        f"sys.exit(command.main([{str(tmp_path)!r}, '--output', {str(tmp_path / 'out')!r}, '--tools', 'ours']))\n"
    )
    path = os.pathsep.join((str(REPOSITORY / "src"), str(REPOSITORY)))
    process = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path})
    log = tmp_path / "out" / "work" / "ours--seed-1" / "log.txt"
    try:
        until = time.monotonic() + 60
        while not (log.is_file() and log.read_text().endswith("\n")):
            assert time.monotonic() < until
            time.sleep(0.05)
        child = int(log.read_text())
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 130
    finally:
        process.kill()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
