"""The prompts that every tool is given, as plain text files: a prompt a line, the same for all."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from abliterate.files import write_file
from abliterate.prompt_sets import Kind, Part, load_prompt_set

N_TRAIN, N_VALIDATION = 128, 32
COUNTS: dict[Part, int] = {"train": N_TRAIN, "validation": N_VALIDATION}
KINDS: tuple[Kind, ...] = ("harmful", "harmless")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Where the prompt files lie: `KIND.PART.txt`, and `KIND.txt` with the training prompts first."""

    directory: Path

    def part(self, kind: Kind, part: Part) -> Path:
        """Return the file of one kind and part."""
        return self.directory / kind / f"{part}.txt"

    def all(self, kind: Kind) -> Path:
        """Return the file of one kind that holds the training prompts and then those for validation."""
        return self.directory / f"{kind}.txt"


def write_prompts(directory: Path) -> Prompts:
    """Write the first bundled prompts of each part, where they are not there yet, and return where they lie."""
    prompts = Prompts(directory=directory)
    for kind in KINDS:
        (directory / kind).mkdir(parents=True, exist_ok=True)
        everything = ""
        for part, n in COUNTS.items():
            lines = "".join(
                f"{' '.join(text.split())}\n" for text in load_prompt_set("bundled", kind=kind, part=part).texts[:n]
            )
            write_file(prompts.part(kind, part), lines)
            everything += lines
        write_file(prompts.all(kind), everything)
    return prompts


def write_test_prompts(directory: Path, *, every: int) -> dict[Kind, Path]:
    """Write every n-th bundled test prompt of each kind, borderline ones too, and return the files."""
    files = {kind: directory / kind / "test.txt" for kind in get_args(Kind)}
    for kind, file in files.items():
        write_file(file, _test_prompts(kind, every=every))
    return files


def _test_prompts(kind: Kind, *, every: int) -> str:
    texts = load_prompt_set("bundled", kind=kind, part="test").texts[::every]
    return "".join(f"{' '.join(text.split())}\n" for text in texts)


def describe(prompts: Prompts) -> dict[str, dict[str, int | str]]:
    """Return the number of prompts in each file, and the SHA-256 of its bytes."""
    return {f"{kind}/{part}": _described(prompts.part(kind, part).read_bytes()) for kind in KINDS for part in COUNTS}


def describe_test(*, every: int) -> dict[str, dict[str, int | str]]:
    """Return the same of every n-th bundled test prompt of each kind."""
    return {kind: _described(_test_prompts(kind, every=every).encode()) for kind in get_args(Kind)}


def _described(content: bytes) -> dict[str, int | str]:
    return {"count": content.count(b"\n"), "sha256": hashlib.sha256(content).hexdigest()}
