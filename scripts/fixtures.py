"""Plan every checkpoint of a folder of fixtures, and compare with what is expected of each.

    python -m scripts.fixtures FOLDER

A fixture is FOLDER/checkpoints/NAME.json.gz (or below FOLDER itself): a config, the shards' names, and name, dtype,
shape and shard of every tensor, with `expect`, what is right, in words, and `seen`, what a plan was at some time: its
outcome, error, tie, and groups of [role, pattern, count, axis, norms]. Each is made a directory whose shards have true
headers and holes for data. Where `expect` is "as seen" the plan must be that; what else it says in words is understood
by `_expected`, and what is not understood does not agree. Prints a line for each and a total; exits with 1 unless all
agree.
"""

import gzip
import json
import math
import re
import struct
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterate.editing.plan_report import PlanReport, plan_layout, read_layout
from abliterate.errors import AbliterateError

_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "I64": 64}
_SINGLE = "model.safetensors"
_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """What must come of a plan.

    Attributes:
        planned: Whether there is a plan at all.
        tied: Whether embeddings are tied; None where nothing is expected of it.
        groups: The groups of tensors to edit, sorted; None where nothing is expected of them.
        size_key: Key of the config that gives d_model.
        edited_below: What the name of every tensor to edit must begin with.
        reason: Words that the refusal must have, where there is one.
    """

    planned: bool
    tied: bool | None = None
    groups: list[list[Any]] | None = None
    size_key: str | None = None
    edited_below: str = ""
    reason: str = ""


def write_checkpoint(fixture: dict[str, Any], directory: Path) -> None:
    """Write a fixture as a checkpoint without data; a head that is said to differ from the embedding does."""
    (directory / "config.json").write_text(json.dumps(fixture["config"]))
    shards, weight_map = fixture["shards"], {}
    differs = "differs from the embedding" in fixture["expect"]
    for number, shard in enumerate(shards):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        heads: list[int] = []
        offset = 0
        for name, dtype, shape, where in fixture["tensors"]:
            if where == number:
                end = offset + math.prod(shape) * _BITS[dtype] // 8
                header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
                heads += [end - 1] if differs and name.endswith(_HEADS) else []
                weight_map[name], offset = shard, end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (directory / shard).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + offset)
            for last in heads:
                file.seek(8 + len(text) + last)
                file.write(b"\x01")
    if shards != [_SINGLE]:
        index = {"metadata": fixture.get("index_metadata") or {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _expected(fixture: dict[str, Any]) -> Expectation | None:
    """Return what the words of `expect` mean; None where they are not understood."""
    expect, seen = fixture["expect"], fixture["seen"]
    if expect == "as seen":
        planned = seen["outcome"] == "planned"
        return Expectation(
            planned=planned,
            tied=seen["tied_embeddings"] if planned else None,
            groups=sorted(seen["groups"]) if planned else None,
            reason="" if planned else _reason(seen["error"]),
        )
    if expect.startswith("lm_head is stored, differs from the embedding and must not be edited"):
        groups = [group for group in seen["groups"] if not group[1].endswith(_HEADS)]
        return Expectation(planned=True, tied=False, groups=sorted(groups))
    if expect.startswith("should plan"):
        size = re.search(r"d_model is (\w+)", expect)
        first = expect.removeprefix("should plan").split(":")[0].split(";")[0].strip()
        below = first.removesuffix("*") if first.endswith(".*") else ""
        return Expectation(planned=True, size_key=size[1] if size else None, edited_below=below)
    return None


def _reason(error: str) -> str:
    """Return the part of a refusal that says what is refused; how it goes on may get better."""
    for words in ("the checkpoint is quantised", "cannot be orthogonalized"):
        if words in error:
            return words
    return error.partition(": ")[2]


def compare(fixture: dict[str, Any], name: str) -> tuple[bool, str]:
    """Plan a fixture; return whether that is as expected, and what came of it in words."""
    expected = _expected(fixture)
    if expected is None:
        return False, f"what is expected is not understood: {fixture['expect']}"
    with tempfile.TemporaryDirectory(prefix="abliterate-fixture-") as work:
        directory = Path(work) / name
        directory.mkdir()
        write_checkpoint(fixture, directory)
        try:
            report = plan_layout(read_layout(model=str(directory)))
        except AbliterateError as error:
            message = str(error).replace(f"{directory.parent}/", "")
            return not expected.planned and expected.reason in message, f"refused: {message}"
    differences = [*_differences(report, expected)]
    if expected.size_key is not None and report.d_model != fixture["config"][expected.size_key]:
        differences.append(f"d_model is {report.d_model} and was to be {expected.size_key}")
    plan = f"planned {sum(report.counts.values())} tensors, {'tied' if report.tied_embeddings else 'not tied'}"
    return not differences, "; ".join([plan, *differences])


def _differences(report: PlanReport, expected: Expectation) -> Iterator[str]:
    if not expected.planned:
        yield "was to be refused"
        return
    found = [[g.role, g.pattern, g.count, g.residual_axis, list(g.norms)] for g in report.groups]
    if expected.tied is not None and report.tied_embeddings != expected.tied:
        yield f"was to be {'tied' if expected.tied else 'not tied'}"
    if expected.groups is not None and sorted(found) != expected.groups:
        wrong = [group for group in found if group not in expected.groups]
        missing = [group for group in expected.groups if group not in found]
        yield f"edits {wrong} too many and {missing} too few"
    outside = [tensor.name for tensor in report.tensors if not tensor.name.startswith(expected.edited_below)]
    if outside:
        yield f"edits {outside[0]}, which is not below {expected.edited_below}"


def main() -> int:
    """Compare all, print a line each and the total, and return the exit code."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        print("usage: python -m scripts.fixtures FOLDER", file=sys.stderr)
        return 2
    files = sorted(Path(sys.argv[1]).rglob("*.json.gz"))
    agreed = 0
    for file in files:
        name = file.name.removesuffix(".json.gz")
        with gzip.open(file) as content:
            fixture = json.load(content)
        agrees, words = compare(fixture, name)
        agreed += agrees
        print(f"{'agrees' if agrees else 'DIFFERS':8} {name:28} {words[: 160 if agrees else None]}", flush=True)
    print(f"{agreed} of {len(files)} agree")
    return 0 if files and agreed == len(files) else 1


if __name__ == "__main__":
    sys.exit(main())
