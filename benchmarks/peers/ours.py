"""Our own ways to edit a model, as commands of this checkout; each is one more tool beside the peers.

A way is one extraction and one edit of its own. Ways that extract alike share the extraction, which runs once, and each
is charged the whole of it. `refine` gives a frontier: with `--front N` N of its points are measured. To add a way that
needs a further command, add its words to `commands`.
"""

import hashlib
import json
import os
import struct
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from abliterate.files import write_json
from benchmarks.peers.measuring import Usage, run_measured
from benchmarks.peers.prompts import N_TRAIN, N_VALIDATION
from benchmarks.peers.tools import REPOSITORY, Export, Job, Made, Tool, exported, without_paths


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to edit: the options of the commands that differ from their defaults; `refine` None: without it."""

    name: str
    extract: tuple[str, ...] = ()
    refine: tuple[str, ...] | None = None
    orthogonalize: tuple[str, ...] = ()


METADATA_KEY = "abliterate"
WAYS = (
    Way(name="paper"),
    Way(name="attn,mlp --tied skip", orthogonalize=("--components", "attn,mlp", "--tied", "skip")),
    Way(name="refine", refine=()),
)


def commands(way: Way, job: Job, direction: Path, output: Path) -> tuple[list[str], list[list[str]]]:
    """Return the extraction, which ways may share, and what comes after it, without the program's name."""
    prompts = [
        "--harmful", str(job.prompts.all("harmful")), "--harmless", str(job.prompts.all("harmless")),
        "--n-val", str(N_VALIDATION), "--seed", str(job.seed),
    ]  # fmt: skip
    extract = [
        "extract", str(job.model), "--output", str(direction), *prompts, "--n-train", str(N_TRAIN), *way.extract,
    ]  # fmt: skip
    given = [str(job.model), "--direction", str(direction)]
    edit = ["orthogonalize", *given, "--output", str(output), *way.orthogonalize]
    if way.refine is None:
        return extract, [edit]
    strengths = str(output.with_name("strengths.json"))
    refine = ["refine", *given, "--output", strengths, *prompts, *way.refine]
    return extract, [refine, [*edit, "--strengths", strengths]]


def run_way(way: Way, job: Job) -> Made:
    """Extract, unless a way before it did, and edit.

    Raises:
        ToolFailedError: A command failed.
    """
    path = os.pathsep.join((str(REPOSITORY / "src"), str(REPOSITORY)))
    env = {**job.env, "PYTHONPATH": path}
    program = [sys.executable, "-m", "abliterate"]
    key = hashlib.sha256(json.dumps([job.seed, str(job.model), way.extract]).encode()).hexdigest()[:12]
    shared = job.work.parent / f"ours.extract.{key}"
    direction, taken = shared / "direction.safetensors", shared / "usage.json"
    extract, rest = commands(way, job, direction, job.work / "edited")
    if direction.is_file() and taken.is_file():
        usage = Usage(**json.loads(taken.read_text(encoding="utf-8")))
    else:
        shared.mkdir(parents=True, exist_ok=True)
        usage = run_measured([*program, *extract], log=shared / "log.txt", env=env, limit_s=job.limit_s)
        write_json(taken, asdict(usage))
    for command in rest:
        usage += run_measured([*program, *command], log=job.log, env=env, limit_s=job.limit_s)
    claims = _claims(direction)
    exports = [Export(name="chosen", model=exported(job.work / "edited", job.log), claims=claims)]
    for pressure in _others(job.work / "strengths.json", job.n_front - 1) if way.refine is not None else ():
        output = job.work / f"edited-{pressure:g}"
        edit = [*commands(way, job, direction, output)[1][-1][:-1], f"{job.work / 'strengths.json'}@{pressure:g}"]
        # It is not charged: who wants one point makes one edit.
        run_measured([*program, *edit], log=job.log, env=env, limit_s=job.limit_s)
        exports.append(Export(name=f"pressure {pressure:g}", model=exported(output, job.log), claims=claims))
    settings = "; ".join(
        without_paths(
            " ".join(command), {"MODEL": job.model, "PROMPTS": job.prompts.directory, "WORK": job.work.parent}
        )
        for command in (extract, *rest)
    )
    return Made(exports=tuple(exports), usage=usage, settings=settings)


def _others(strengths: Path, n: int) -> list[float]:
    """Return the pressures of the next points of a frontier: those that leave the fewest unanswered, then the least KL.

    The chosen point is not among them, nor what another point, the chosen one too, is no worse than in either.
    """
    document = json.loads(strengths.read_text(encoding="utf-8"))
    points = [(point["unanswered"], point["kl"], point["pressure"]) for point in document["frontier"]]
    chosen = document["chosen"]["pressure"]
    undominated = [
        point
        for point in points
        if not any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points)
    ]
    return [pressure for _, _, pressure in sorted(undominated) if pressure != chosen][:n]


def _claims(direction: Path) -> Mapping[str, float | int | str]:
    """Return where a direction comes from, out of its file's header; torch would make this process large."""
    with direction.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    metadata = json.loads(header["__metadata__"][METADATA_KEY])
    return {name: metadata[name] for name in ("position", "layer") if isinstance(metadata.get(name), int)}


def our_tools(extract: tuple[str, ...] = (), ways: tuple[Way, ...] = WAYS) -> tuple[Tool, ...]:
    """Return a tool for each way.

    Args:
        extract: options of `extract` that all ways share.
        ways: see `Way`.
    """

    def tool(way: Way) -> Tool:
        given = replace(way, extract=(*extract, *way.extract))
        return Tool(name=f"ours: {way.name}", requirement=None, searches=False, run=lambda job: run_way(given, job))

    return tuple(tool(way) for way in ways)
