"""The peers, run as their manuals say, with the same prompts in the same roles as far as each lets one give them.

Every option that is given is recorded with the result. What is equal for all: the prompts, the seed, the number of
trials, the length of the replies that a search judges by (refusals come early on the models measured here), and, where
it can be set, the system prompt that the model's own template would write. All else is the tool's own default.
"""

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.peers.measuring import Usage, run_measured
from benchmarks.peers.prompts import N_TRAIN, N_VALIDATION
from benchmarks.peers.terminal import Terminal
from benchmarks.peers.tools import Export, Job, Made, Tool, exported, shown, stored_dtype, words

# By itself heretic takes 60 of 200 trials at random, and tries batch sizes up to 128, which takes long on a CPU.
RANDOM_SHARE, FEWEST_RANDOM, BATCH = 0.3, 3, 16
WHICH, WHAT, WHERE = "Which trial do you want to use?", "What do you want to do with the decensored model?", "Path to"
_TRIAL = re.compile(r"\[Trial +(\d+)\] Refusals: +(\d+)/(\d+), KL divergence: +([\d.]+)")


def run_heretic(job: Job) -> Made:
    """Run a study and export the first trials of its front, in the order in which it offers them."""
    trials = job.trials or FEWEST_RANDOM
    options: dict[str, Any] = {
        "model": job.model,
        "seed": job.seed,
        "n-trials": trials,
        "n-startup-trials": min(trials, max(FEWEST_RANDOM, round(RANDOM_SHARE * trials))),
        "batch-size": BATCH,
        "max-response-length": job.max_new_tokens,
        "good-prompts.dataset": job.prompts.part("harmless", "train"),
        "bad-prompts.dataset": job.prompts.part("harmful", "train"),
        "good-evaluation-prompts.dataset": job.prompts.part("harmless", "validation"),
        "bad-evaluation-prompts.dataset": job.prompts.part("harmful", "validation"),
        "study-checkpoint-dir": job.work / "study",
        "export-strategy": "merge",
        "system-prompt": job.system_prompt,
    }
    command = [str(job.programs / "heretic"), *words(options)]
    exports = []
    with Terminal(command, env=job.env, log=job.log, limit_s=job.limit_s, cwd=job.work) as terminal:
        offered = [choice for choice in terminal.menu(WHICH) if _TRIAL.match(choice)]
        for choice in offered[: job.n_front]:
            exports.append(_export(terminal, choice, job))
        terminal.choose(WHICH, "Exit program")
        usage = terminal.finish()
    return Made(
        exports=tuple(Export(name=one.name, model=exported(one.model, job.log), claims=one.claims) for one in exports),
        usage=usage,
        settings=shown(options, job),
    )


def _export(terminal: Terminal, choice: str, job: Job) -> Export:
    """Save one trial of the front, from its menu back to its menu."""
    found = _TRIAL.match(choice)
    assert found is not None
    number, refusals, of, divergence = found.groups()
    directory = job.work / f"trial-{number}"
    terminal.choose(WHICH, choice)
    terminal.choose(WHAT, "Save the model to a local folder")
    terminal.answer(WHERE, str(directory))
    terminal.choose(WHAT, "Return to the trial selection menu")
    claims = {"refusals": int(refusals), "prompts": int(of), "kl_first_token": float(divergence)}
    return Export(name=f"trial {number}", model=directory, claims=claims)


def run_temaq(job: Job) -> Made:
    """Run a search that exports its best candidate unasked.

    It has one list of prompts of each kind: the first ones make the directions and the surrogate, and the replies that
    confirm are those to the first of the same list.
    """
    output, settings = job.work / "edited", job.work / "settings.toml"
    options: dict[str, Any] = {
        "workdir": job.work / "search",
        "output": output,
        "device": "cpu",
        # What it takes by itself is bfloat16, which most CPUs compute slowly.
        "eval-dtype": stored_dtype(job.model),
        "seed": job.seed,
        "trials": job.trials,
        "harmful-file": job.prompts.all("harmful"),
        "harmless-file": job.prompts.all("harmless"),
        "n-probe": N_TRAIN,
        "verify-probes": N_VALIDATION,
        "max-new-tokens": job.max_new_tokens,
        "select": "auto",
    }
    if job.system_prompt is not None:
        settings.write_text(f"system_prompt = {json.dumps(job.system_prompt)}\n", encoding="utf-8")
        options["config"] = settings
    command = [str(job.programs / "temaq-abliterated"), str(job.model), *words(options)]
    usage = run_measured(command, log=job.log, env=job.env, limit_s=job.limit_s, cwd=job.work)
    claims = _temaq_claims(job.work / "search" / "report" / "run_summary.json")
    export = Export(name="chosen", model=exported(output, job.log), claims=claims)
    return Made(exports=(export,), usage=usage, settings=shown(options, job))


def _temaq_claims(summary: Path) -> dict[str, float | int | str]:
    if not summary.is_file():
        return {}
    report = json.loads(summary.read_text(encoding="utf-8"))
    named = {
        "trials": report.get("attempts"),
        "refusal_rate": report.get("final_refusal_full_generation"),
        "prompts": report.get("n_verify_prompts"),
        "kl": report.get("kl_final"),
    }
    return {name: value for name, value in named.items() if value is not None}


def run_senbonzakura(job: Job) -> Made:
    """Let it divide the prompts, then run its search, which writes the point that it chooses.

    It divides a list of each kind by itself, and keeps some that it neither fits nor searches by: four are the fewest.
    """
    kept = 4
    track, output = job.work / "track", job.work / "edited"
    program = str(job.programs / "senbonzakura")
    division: dict[str, Any] = {
        "harmful": job.prompts.all("harmful"),
        "harmless": job.prompts.all("harmless"),
        "out": track,
        "fit": N_TRAIN - kept,
        "search": N_VALIDATION,
    }
    options: dict[str, Any] = {
        "model": job.model,
        "device": "cpu",
        "track": track,
        "out": output,
        "trials": job.trials,
        "seed": job.seed,
        "dir-prompts": N_TRAIN - kept,
        "eval-refusal": N_VALIDATION,
        "eval-kl": N_VALIDATION,
        "eval-refusal-final": 0,
        "gen-tokens": job.max_new_tokens,
        # It asks 200 questions of arithmetic before and after, which takes hours on a CPU and decides nothing.
        "capability-n": 0,
        "short-budget-ok": True,
        "slow-probe-ok": True,
        "panel": "off",
        "no-persist-study": True,
    }
    usage: Usage = run_measured(
        [program, "track", *words(division)], log=job.log, env=job.env, limit_s=job.limit_s, cwd=job.work
    )
    usage += run_measured(
        [program, "abliterate", *words(options)], log=job.log, env=job.env, limit_s=job.limit_s, cwd=job.work
    )
    export = Export(name="chosen", model=exported(output, job.log))
    return Made(exports=(export,), usage=usage, settings=f"{shown(division, job)}; {shown(options, job)}")


PEERS = (
    Tool(name="heretic", requirement="heretic-llm==1.4.0", searches=True, run=run_heretic),
    Tool(name="temaq", requirement="temaq-abliterated==1.1.1", searches=True, run=run_temaq),
    Tool(name="senbonzakura", requirement="senbonzakura==0.5.1", searches=True, run=run_senbonzakura),
)
