"""What a tool is here: a package in an environment of its own, a way to run it unattended, and what it leaves.

Nothing of a peer is imported, copied or kept in this repository. Each is installed from the package index beside the
same torch, is given the same prompt files, and runs offline, without a GPU and without anyone's Hub token.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from abliterate.files import write_file
from benchmarks.peers.measuring import ToolFailedError, Usage, last_error_line
from benchmarks.peers.prompts import Prompts

TORCH = "torch==2.13.0"
REPOSITORY = Path(__file__).parents[2]
_PRIVATE = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "PYTHONPATH", "VIRTUAL_ENV")
_READY = "ready.txt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run of a tool.

    Attributes:
        model: the directory of the model.
        prompts: what it is given.
        work: an empty directory for whatever it writes.
        programs: where its environment keeps its commands.
        env: the environment variables of its processes.
        seed: of its random choices.
        trials: how many it may try; None for a tool that does not search.
        n_front: how many of the trials that it shows as its front are exported.
        max_new_tokens: length of the replies that it judges by.
        system_prompt: what the model's template puts there by itself; None where it puts nothing.
        limit_s: the longest that it may take.
    """

    model: Path
    prompts: Prompts
    work: Path
    programs: Path
    env: Mapping[str, str]
    seed: int
    trials: int | None
    n_front: int
    max_new_tokens: int
    system_prompt: str | None
    limit_s: float

    @property
    def log(self) -> Path:
        """Where what it says goes."""
        return self.work / "log.txt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """An edited model that a tool left, and what the tool says of it (measured on the prompts that it searches by)."""

    name: str
    model: Path
    claims: Mapping[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a run left and what it took; `settings` are the options that differ from the tool's own."""

    exports: tuple[Export, ...]
    usage: Usage
    settings: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A tool that edits a model.

    Attributes:
        name: as `--tools` calls it.
        requirement: what pip installs, with its exact version; None for our own.
        searches: whether it takes a number of trials.
        run: runs it; raises ToolFailedError.
    """

    name: str
    requirement: str | None
    searches: bool
    run: Callable[[Job], Made]

    @property
    def version(self) -> str:
        """The version that is installed, or `this commit`."""
        return self.requirement.partition("==")[2] if self.requirement else "this commit"


def variables(*, home: Path, threads: int | None) -> dict[str, str]:
    """Return the environment of all runs: offline, on the CPU, with so many threads, and with a cache of its own."""
    env = {name: value for name, value in os.environ.items() if name not in _PRIVATE}
    env |= {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if threads is not None:
        env |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    return env


def make_environment(directory: Path, requirement: str) -> Path:
    """Make an environment that holds one tool, unless it is there, and return the directory of its commands.

    Raises:
        ToolFailedError: It cannot be installed beside the torch that is pinned.
    """
    programs = directory / "bin"
    ready = directory / _READY
    if ready.is_file() and ready.read_text(encoding="utf-8") == f"{TORCH}\n{requirement}\n":
        return programs
    constraints = directory / "constraints.txt"
    _install([sys.executable, "-m", "venv", str(directory)])
    write_file(constraints, f"{TORCH}\n")
    pip = [str(programs / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _install([*pip, TORCH])
    _install([*pip, "--constraint", str(constraints), requirement])
    write_file(ready, f"{TORCH}\n{requirement}\n")
    return programs


def _install(command: list[str]) -> None:
    env = {name: value for name, value in os.environ.items() if name not in _PRIVATE}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise ToolFailedError(f"not installed: {last_error_line(done.stdout + done.stderr)}")


def exported(directory: Path, log: Path) -> Path:
    """Return the directory of an edited model.

    Raises:
        ToolFailedError: No model is there.
    """
    if not (directory / "config.json").is_file() or not list(directory.glob("*.safetensors")):
        said = last_error_line(log.read_text(encoding="utf-8", errors="replace")) if log.is_file() else ""
        raise ToolFailedError(f"it ended without a model: {said}")
    return directory


def stored_dtype(model: Path) -> str | None:
    """Return the number format that a model's config names, or None."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    named = config.get("dtype") or config.get("torch_dtype")
    return named if isinstance(named, str) else None


def words(options: Mapping[str, Any]) -> list[str]:
    """Return options as the words of a command line; None leaves one out, and True has no value."""
    line: list[str] = []
    for name, value in options.items():
        if value is not None and value is not False:
            line += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return line


def shown(options: Mapping[str, Any], job: Job) -> str:
    """Return options as they are recorded: without the paths of the machine."""
    text = " ".join(f"{word!r}" if " " in word else word for word in words(options))
    return without_paths(text, {"MODEL": job.model, "WORK": job.work, "PROMPTS": job.prompts.directory})


def without_paths(text: str, paths: Mapping[str, Path]) -> str:
    """Return a text in which directories are called by a name, the longest first."""
    named = {str(path): name for name, path in paths.items()}
    named |= {str(path.resolve()): name for name, path in paths.items()}
    for path in sorted(named, key=len, reverse=True):
        text = text.replace(path, named[path])
    return re.sub(r"(/[^\s'\":,/]+){2,}/(?=site-packages)", "", text)


def usage_values(usage: Usage | None) -> dict[str, float] | None:
    """Return a usage as it is recorded, or None."""
    return None if usage is None else {name: round(value, 2) for name, value in asdict(usage).items()}
