"""The main job on a demo model, step by step: what is done is not done again, and each step says how long is left.

    python -m scripts.demo_pipeline small build/demo         SmolLM2-135M, taught to refuse (`make demo`)
    python -m scripts.demo_pipeline real build/demo-real     Qwen2.5-Coder-0.5B, as aligned by its makers

A step counts as done if it ended well with the same command and its output is there; then the next is looked at. Where
one has to run, all that come after it run again. What was done, and how long it took, stands in DIR/steps.json.
"""

import argparse
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from scripts.demo_report import LINE_WIDTH, build_report, show
from scripts.real_model import QWEN, RealModel, came_as_checkpoint, fetch

# At the paper's 0.1 a candidate of the small model passes too, but it leaves more of the refusals: docs/results.md.
SMALL_KL = "0.3"
STATE = "steps.json"
REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a demo.

    Attributes:
        name: what it does, in two words.
        minutes: how long it takes on two slow cores, to tell what is left before anything has been measured.
        output: what is there when it is done.
        command: what follows `abliterate`; empty where `function` does it.
        stdout: a file for the JSON that the command prints.
        function: does what no command does.
        needed: whether it is to be done at all, asked when its turn comes.
    """

    name: str
    minutes: float
    output: Path
    command: tuple[str, ...] = ()
    stdout: Path | None = None
    function: Callable[[], None] = lambda: None
    needed: Callable[[], bool] = lambda: True

    def run(self) -> None:
        """Do it.

        Raises:
            CalledProcessError: the command failed, and has said why.
        """
        if not self.command:
            self.function()
            return
        for line in command_lines(("abliterate", *self.command)):
            say(line)
        words = [sys.executable, "-m", "abliterate", *self.command]
        done = subprocess.run(words, check=True, stdout=None if self.stdout is None else subprocess.PIPE)
        if self.stdout is not None:
            partial = self.stdout.with_name(f".{self.stdout.name}.partial")
            partial.write_bytes(done.stdout)
            os.replace(partial, self.stdout)


def small_steps(directory: Path) -> list[Step]:
    """Return the steps of `make demo`."""
    model = directory / "model"
    build = Step(
        name="demo model",
        minutes=1,
        output=model / "config.json",
        command=("demo", str(model), "--overwrite"),
    )
    return [
        build,
        *edit_steps(directory, extract=("--kl-threshold", SMALL_KL), minutes=(3, 0.2)),
        evaluate_step(directory, minutes=8, options=("--max-new-tokens", "32")),
        report_step(directory),
    ]


def real_steps(
    directory: Path, *, model: RealModel = QWEN, extract: Sequence[str] = (), max_new_tokens: int = 48
) -> list[Step]:
    """Return the steps of `make demo-real`.

    Args:
        directory: where everything goes.
        model: where it comes from.
        extract: options of `extract`; none, as the model that this is made for needs none.
        max_new_tokens: length of the replies.
    """
    checkpoint, file, direction = (directory / name for name in ("model", "model.gguf", "refusal.safetensors"))
    cache, some = directory / "cache", directory / "some_harmful.txt"
    replies = ("--max-new-tokens", str(max_new_tokens), "--cache", str(cache))
    return [
        Step(
            name="download",
            minutes=3,
            output=directory / "source.json",
            function=lambda: fetch(model, directory),
        ),
        Step(
            name="convert",
            minutes=3,
            output=checkpoint / "config.json",
            command=("convert", str(file), str(checkpoint), "--overwrite"),
            needed=lambda: not came_as_checkpoint(directory),
        ),
        *edit_steps(directory, extract=extract, minutes=(6, 0.5)),
        *(
            Step(
                name=f"verify in {dtype}",
                minutes=2,
                output=directory / f"verification.{dtype}.json",
                command=(
                    "verify", str(directory / "abliterated"), "--direction", str(direction), "--dtype", dtype, "--json",
                ),
                stdout=directory / f"verification.{dtype}.json",
            )
            for dtype in ("float32", "bfloat16")
        ),
        evaluate_step(directory, minutes=25, options=(*replies, "--report", str(directory / "page"))),
        Step(name="prompts", minutes=0, output=some, function=lambda: write_some_harmful(some)),
        # Addition is about the harmless prompts; of the base's replies to them none is generated twice.
        Step(
            name="evaluate the direction added",
            minutes=8,
            output=directory / "induced.json",
            command=(
                "evaluate", str(checkpoint), "--direction", str(direction), "--intervention", "add",
                "--harmful", str(some), "--borderline", str(some), *replies,
                "--output", str(directory / "induced.json"),
            ),
        ),
        report_step(directory, clear=cache),
    ]  # fmt: skip


def edit_steps(directory: Path, *, extract: Sequence[str], minutes: tuple[float, float]) -> list[Step]:
    """Return the steps from a model to its edited checkpoint, which all demos share."""
    model, direction, edited = (str(directory / name) for name in ("model", "refusal.safetensors", "abliterated"))
    return [
        Step(
            name="extract",
            minutes=minutes[0],
            output=Path(direction),
            command=("extract", model, "--output", direction, "--report", str(directory / "plots"), *extract),
        ),
        Step(
            name="orthogonalize",
            minutes=minutes[1],
            output=Path(edited) / "abliteration.json",
            command=("orthogonalize", model, "--direction", direction, "--output", edited, "--overwrite"),
        ),
    ]


def evaluate_step(directory: Path, *, minutes: float, options: Sequence[str]) -> Step:
    """Return the step that measures before and after, which all demos share."""
    edited = directory / "abliterated"
    return Step(
        name="evaluate before and after",
        minutes=minutes,
        output=edited / "evaluation.json",
        command=(
            "evaluate", str(edited), "--base", str(directory / "model"), *options,
            "--output", str(edited / "evaluation.json"),
        ),
    )  # fmt: skip


def report_step(directory: Path, *, clear: Path | None = None) -> Step:
    """Return the step that puts the measurements together."""

    def write() -> None:
        report = build_report(directory)
        partial = directory / ".report.json.partial"
        partial.write_text(json.dumps(report, indent=2) + "\n")
        os.replace(partial, directory / "report.json")
        if clear is not None:
            # Replies to harmful prompts are in it.
            shutil.rmtree(clear, ignore_errors=True)

    return Step(name="report", minutes=0, output=directory / "report.json", function=write)


def write_some_harmful(path: Path) -> None:
    """Write a few bundled test prompts, one a line."""
    lines = (REPOSITORY / "prompts" / "harmful" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    path.write_text("".join(json.loads(line)["text"] + "\n" for line in lines), encoding="utf-8")


def run(steps: Sequence[Step], directory: Path) -> None:
    """Run what is not done yet, in order.

    Raises:
        CalledProcessError: a command failed; what was done before is kept.
    """
    directory.mkdir(parents=True, exist_ok=True)
    state = read_state(directory)
    first = next((number for number, step in enumerate(steps) if not is_done(step, state)), len(steps))
    for step in steps[first:]:
        state.pop(step.name, None)
    write_state(directory, state)
    expected, spent = 0.0, 0.0
    for number, step in enumerate(steps):
        label = f"[{number + 1}/{len(steps)}] {step.name}"
        if number < first:
            say(f"{label}: done before")
            continue
        if not step.needed():
            say(f"{label}: not needed")
            state[step.name] = {"command": list(step.command), "seconds": 0, "needed": False}
            write_state(directory, state)
            continue
        # As fast as the steps before it were, beside what was expected of them.
        pace = spent / expected if expected else 1.0
        left = pace * sum(each.minutes for each in steps[number:])
        say(f"{label}: about {minutes(pace * step.minutes)}; {minutes(left)} left in all")
        started = time.monotonic()
        step.run()
        seconds = time.monotonic() - started
        if not step.output.exists():
            raise FileNotFoundError(f"{step.name} ended without {step.output}")
        expected, spent = expected + step.minutes, spent + seconds / 60
        state[step.name] = {"command": list(step.command), "seconds": round(seconds, 1), "needed": True}
        write_state(directory, state)
        say(f"{label}: done in {minutes(seconds / 60)}")


def is_done(step: Step, state: dict[str, Any]) -> bool:
    """Return whether a step ended well before, with this command, and its output is still there."""
    before = state.get(step.name)
    return before is not None and before["command"] == list(step.command) and step.output.exists()


def read_state(directory: Path) -> dict[str, Any]:
    """Return what was done before; nothing where that cannot be read."""
    try:
        state = json.loads((directory / STATE).read_text())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def write_state(directory: Path, state: dict[str, Any]) -> None:
    """Say what is done."""
    partial = directory / f".{STATE}.partial"
    partial.write_text(json.dumps(state, indent=2) + "\n")
    os.replace(partial, directory / STATE)


def command_lines(words: Sequence[str]) -> list[str]:
    """Return a command as a shell reads it, in lines that a log has room for."""
    lines, parts = ["$"], [shlex.quote(words[0])]
    for before, word in pairwise(words):
        # An option and its value stay together.
        if before.startswith("--") and not word.startswith("-"):
            parts[-1] += f" {shlex.quote(word)}"
        else:
            parts.append(shlex.quote(word))
    for part in parts:
        if len(lines[-1]) + len(part) + 3 > LINE_WIDTH:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += f" {part}"
    return lines


def summary(steps: Sequence[Step], state: dict[str, Any]) -> list[str]:
    """Return what took how long, a line a step, and the most memory that any of them took now."""
    width = max(len(step.name) for step in steps)
    lines = [f"  {step.name:<{width}}  {minutes(state[step.name]['seconds'] / 60):>8}" for step in steps]
    total = sum(state[step.name]["seconds"] for step in steps) / 60
    # Linux counts in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    memory = f"; peak memory {peak / 1e9:.1f} GB" if peak else ""
    return ["Steps:", *lines, f"  {'in all':<{width}}  {minutes(total):>8}{memory}"]


def minutes(value: float) -> str:
    """Return a time in words."""
    return f"{round(60 * value)} s" if value < 1.5 else f"{round(value)} min"


def say(text: str) -> None:
    """Write one line to stderr."""
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the demos and show what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", choices=("small", "real"))
    parser.add_argument("directory", type=Path)
    chosen = parser.parse_args(arguments)
    steps = (small_steps if chosen.demo == "small" else real_steps)(chosen.directory)
    try:
        run(steps, chosen.directory)
    except subprocess.CalledProcessError as error:
        say(f"stopped: the command above ended with {error.returncode}; the same command goes on from there")
        return error.returncode if error.returncode > 0 else 1
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from there")
        return 130
    except Exception as error:  # the last line of a demo is for people
        say(f"stopped: {error}; the same command goes on from there")
        return 1
    for line in summary(steps, read_state(chosen.directory)):
        say(line)
    show(json.loads((chosen.directory / "report.json").read_text()), chosen.directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
