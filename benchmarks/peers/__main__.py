"""Other tools and ours on one model, with the same prompts, and then one measure for all of them.

    python -m benchmarks.peers MODEL --output DIR [--trials 6,20,60] [--seeds 1,2] [--tools heretic,temaq,ours]

Each peer is installed from the package index into DIR/envs, run offline on the CPU, and what it leaves is evaluated by
`abliterate evaluate` on test prompts that no tool was given. What is finished stands in DIR/results.json and is not run
again; what failed is recorded there with its last error line. `python -m benchmarks.peers.page` writes docs/peers.md.

Edited models are removed once they are measured, and the replies of all models at the end (--keep keeps both).
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.measuring import ToolFailedError, run_measured
from benchmarks.peers.others import PEERS
from benchmarks.peers.ours import our_tools
from benchmarks.peers.prompts import Prompts, describe, describe_test, write_prompts, write_test_prompts
from benchmarks.peers.results import NAME, Key, Results, ResultsError, kept, kept_base
from benchmarks.peers.tools import (
    REPOSITORY,
    Export,
    Job,
    Made,
    Tool,
    make_environment,
    usage_values,
    variables,
    without_paths,
)

OURS = "ours"
NOTE = (
    "note: wall times are comparable within one run of this command only, and only where nothing else ran beside it; "
    "CPU times and memory less so"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be done, as the command line says it."""

    model: Path
    output: Path
    trials: tuple[int, ...]
    seeds: tuple[int, ...]
    tools: tuple[Tool, ...]
    n_front: int
    max_new_tokens: int
    every: int
    threads: int | None
    limit_s: float
    keep: bool
    retry_failed: bool

    def runs(self) -> Iterator[tuple[Tool, Key]]:
        """Yield each run: all tools with one seed, then with the next; one that does not search has no trials."""
        for seed in self.seeds:
            for tool in self.tools:
                for trials in self.trials if tool.searches else (None,):
                    yield tool, (tool.name, seed, trials)


def say(text: str) -> None:
    """Write one line to stderr."""
    print(text, file=sys.stderr, flush=True)


def fingerprint(model: Path) -> str:
    """Return a hash of a model's config and weights."""
    digest = hashlib.sha256()
    for path in (model / "config.json", *sorted(model.glob("*.safetensors"))):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def own_system_prompt(model: Path) -> str | None:
    """Return the system message that a model's template writes where none is given, or None if it writes none.

    It is what the two renderings, with a message and without, do not share. In a process of its own: with a tokenizer
    loaded this one would be large, and a process begins with the peak memory of the one that started it.
    """
    program = (
        "import json, os, sys\n"
        "from transformers import AutoTokenizer\n"
        "render = AutoTokenizer.from_pretrained(sys.argv[1]).apply_chat_template\n"
        "user, mark = {'role': 'user', 'content': 'u'}, 'MARKMARK'\n"
        "plain = render([user], tokenize=False, add_generation_prompt=True)\n"
        "try:\n"
        "    marked = render([{'role': 'system', 'content': mark}, user], tokenize=False, add_generation_prompt=True)\n"
        "except Exception:\n"
        "    marked = ''\n"
        "before, found, after = marked.partition(mark)\n"
        "own = found and plain.startswith(before) and plain.endswith(after) and len(plain) >= len(before + after)\n"
        "print(json.dumps(plain[len(before):len(plain) - len(after)] if own else None))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(model)], capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    own = json.loads(done.stdout.splitlines()[-1])
    return own if isinstance(own, str) and own.strip() else None


def conditions(plan: Plan, prompts: Prompts, system_prompt: str | None) -> dict[str, Any]:
    """Return what must be equal for results to stand in one table."""
    return {
        "model": plan.model.resolve().name,
        "model_sha256": fingerprint(plan.model),
        "prompts": describe(prompts),
        "test_prompts": describe_test(every=plan.every),
        "system_prompt": system_prompt,
        "max_new_tokens": plan.max_new_tokens,
        "every": plan.every,
        "threads": plan.threads or os.cpu_count(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def perform(plan: Plan, results: Results, prompts: Prompts, system_prompt: str | None) -> int:
    """Do what is not done yet, and return how many runs failed."""
    env = variables(home=plan.output / "hub", threads=plan.threads)
    session, n_failed = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), 0
    for tool, key in plan.runs():
        label = f"{key[0]}, seed {key[1]}" + ("" if key[2] is None else f", {key[2]} trials")
        if results.finished(key, retry_failed=plan.retry_failed):
            say(f"{label}: done before")
            continue
        say(f"{label}: running")
        run: dict[str, Any] = {
            "tool": tool.name,
            "version": tool.version,
            "seed": key[1],
            "trials": key[2],
            "session": session,
            "load": round(os.getloadavg()[0], 2),
            "nice": os.nice(0),
            "settings": None,
            "usage": None,
            "results": [],
            "error": None,
        }
        work = plan.output / "work" / _folder(label)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        job_made = _run(tool, key, plan=plan, prompts=prompts, system_prompt=system_prompt, work=work, env=env, run=run)
        for export in job_made.exports if job_made else ():
            run["results"].append(measure(export, plan=plan, env=env, work=work, results=results))
        results.add(run)
        errors = [one["error"] for one in (run, *run["results"]) if one["error"] is not None]
        n_failed += bool(errors)
        say(f"{label}: " + (f"failed: {errors[0]}" if errors else _short(run)))
        if not plan.keep:
            shutil.rmtree(work, ignore_errors=True)
    if not plan.keep:
        # Replies to harmful prompts are in it.
        shutil.rmtree(plan.output / "replies", ignore_errors=True)
        shutil.rmtree(plan.output / "work", ignore_errors=True)
    return n_failed


def _run(
    tool: Tool, key: Key, *, plan: Plan, prompts: Prompts, system_prompt: str | None, work: Path, env: dict[str, str],
    run: dict[str, Any],
) -> Made | None:  # fmt: skip
    """Run a tool, put what it took or how it failed into `run`, and return what it made."""
    try:
        programs = Path(sys.executable).parent
        if tool.requirement is not None:
            say(f"{tool.requirement}: installed in {plan.output / 'envs' / tool.name}, or to be")
            programs = make_environment(plan.output / "envs" / tool.name, tool.requirement)
        made = tool.run(
            Job(
                model=plan.model,
                prompts=prompts,
                work=work,
                programs=programs,
                env=env,
                seed=key[1],
                trials=key[2],
                n_front=plan.n_front,
                max_new_tokens=plan.max_new_tokens,
                system_prompt=system_prompt,
                limit_s=plan.limit_s,
            )
        )
    except ToolFailedError as error:
        run["error"] = _clean(str(error), plan)
        run["usage"] = usage_values(error.usage)
        return None
    run["usage"], run["settings"] = usage_values(made.usage), made.settings
    return made


def measure(export: Export, *, plan: Plan, env: dict[str, str], work: Path, results: Results) -> dict[str, Any]:
    """Evaluate an edited model as all are evaluated, remove it, and return what is recorded of it."""
    result: dict[str, Any] = {"name": export.name, "claims": dict(export.claims), "evaluation": None, "error": None}
    report = work / "evaluation.json"
    command = [
        sys.executable, "-m", "abliterate", "evaluate", str(export.model), "--base", str(plan.model),
        "--max-new-tokens", str(plan.max_new_tokens), "--cache", str(plan.output / "replies"),
        "--output", str(report),
    ]  # fmt: skip
    if plan.every > 1:
        # The name of a kind of prompts is that of its option.
        for kind, file in write_test_prompts(plan.output / "prompts", every=plan.every).items():
            command += [f"--{kind}", str(file)]
    own = {**env, "PYTHONPATH": os.pathsep.join((str(REPOSITORY / "src"), str(REPOSITORY)))}
    try:
        run_measured(command, log=work / "evaluation.log", env=own, limit_s=plan.limit_s)
        document = json.loads(report.read_text(encoding="utf-8"))
        result["evaluation"] = kept(document)
        results.set_base(kept_base(document))
    except ToolFailedError as error:
        result["error"] = _clean(f"evaluate: {error}", plan)
    if not plan.keep:
        shutil.rmtree(export.model, ignore_errors=True)
    return result


def _clean(text: str, plan: Plan) -> str:
    return without_paths(text, {"MODEL": plan.model, "DIR": plan.output, "REPOSITORY": REPOSITORY, "~": Path.home()})


def _folder(label: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in label)


def _short(run: dict[str, Any]) -> str:
    parts = [
        f"{result['name']}: {result['evaluation']['rates']['harmful']['refused']} of "
        f"{result['evaluation']['rates']['harmful']['n']} harmful refused"
        for result in run["results"]
    ]
    return f"{'; '.join(parts)} ({run['usage']['wall_s']:.0f} s)"


def chosen_tools(names: str, extract: tuple[str, ...] = ()) -> tuple[Tool, ...]:
    """Return the tools of a list such as `heretic,ours`, ours with these options of `extract`.

    Raises:
        ArgumentTypeError: One is unknown.
    """
    known = {tool.name: (tool,) for tool in PEERS} | {OURS: our_tools(extract)}
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'no tool'}: choose from {', '.join(known)}")
    return tuple(tool for name in dict.fromkeys(wanted) for tool in known[name])


def whole_numbers(text: str) -> tuple[int, ...]:
    """Return the numbers of a list such as `6,20`.

    Raises:
        ArgumentTypeError: One is none, or is below 1.
    """
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 6,20") from error
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{min(numbers)} is below 1")
    return numbers


def positive(text: str) -> int:
    """Return one whole number above 0."""
    (number,) = whole_numbers(text)[:1]
    return number


def parse(arguments: Sequence[str] | None) -> Plan:
    """Return the plan that a command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = ",".join([*(tool.name for tool in PEERS), OURS])
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model's directory")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where everything goes")
    parser.add_argument("--trials", type=whole_numbers, default="6,20,60", help="of the tools that search")
    parser.add_argument("--seeds", type=whole_numbers, default="1,2")
    parser.add_argument("--tools", default=every, help=f"of {every}")
    parser.add_argument("--kl-threshold", help="of our `extract`; default: its own (`make demo` names 0.3)")
    parser.add_argument(
        "--front", type=positive, default=1, metavar="N", help="export N trials of a front that is shown"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=32, help="length of replies, searching and measuring"
    )
    parser.add_argument("--every", type=positive, default=1, metavar="N", help="measure on every N-th test prompt only")
    parser.add_argument("--threads", type=positive, help="threads of each tool; default: what each takes by itself")
    parser.add_argument("--limit", type=float, default=6.0, metavar="HOURS", help="end a run that takes longer")
    parser.add_argument("--keep", action="store_true", help="keep edited models, logs and replies")
    parser.add_argument("--retry-failed", action="store_true", help="run again what failed before")
    chosen = parser.parse_args(arguments)
    if not (chosen.model / "config.json").is_file():
        parser.error(f"{chosen.model} is no directory of a model: it has no config.json")
    extract = () if chosen.kl_threshold is None else ("--kl-threshold", chosen.kl_threshold)
    try:
        tools = chosen_tools(chosen.tools, extract)
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --tools: {error}")
    return Plan(
        model=chosen.model.resolve(),
        output=chosen.output.resolve(),
        trials=chosen.trials,
        seeds=chosen.seeds,
        tools=tools,
        n_front=chosen.front,
        max_new_tokens=chosen.max_new_tokens,
        every=chosen.every,
        threads=chosen.threads,
        limit_s=3600 * chosen.limit,
        keep=chosen.keep,
        retry_failed=chosen.retry_failed,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for and is not done yet."""
    plan = parse(arguments)
    say(NOTE)
    prompts = write_prompts(plan.output / "prompts")
    system_prompt = own_system_prompt(plan.model)
    try:
        results = Results(plan.output / NAME, conditions(plan, prompts, system_prompt))
    except ResultsError as error:
        say(f"error: {error}")
        return 1
    # What a tool started ends with this process, whichever signal ends it.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        n_failed = perform(plan, results, prompts, system_prompt)
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from there")
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    say(f"{plan.output / NAME}: {len(results.document['runs'])} runs" + (f", {n_failed} failed" if n_failed else ""))
    say(NOTE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
