"""How large a checkpoint or a prompt file may be: time and peak memory at the sizes that somebody will have one day.

    python -m benchmarks.limits [--only plan,edit,terabyte,shards,tensors,prompts] [--directory DIR]

The checkpoints are sparse, real headers over files of nothing but holes, and are removed afterwards:

    plan      960 GB in the shapes of a 480B MoE (qwen3_moe, one tensor for each expert's matrices): planned only
    edit      40 GB of such shapes with 1 % edited, beside 4 GB with 10 % edited: peak memory of both
    terabyte  1 % of the 960 GB edited: peak memory beside 4 GB of matrices as large (hashes all; only if asked for)
    shards    10,000 shards, planned and edited with 256 file descriptors
    tensors   100,000 tensors in 50 shards, planned and edited
    prompts   a million prompts as .txt, .jsonl, .csv and .json

It exits with 1 where a bound is broken: 60 s of CPU and 1 GB for the plan, 1.25 times the memory of the small edit for
the large one.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.sparse_checkpoints import make_sparse_checkpoint, moe_config

_GB = 10**9
_READ = """
import resource, sys
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
from pathlib import Path
from abliterate.prompt_files import read_prompt_file
assert len(read_prompt_file(Path(sys.argv[1])).texts) == int(sys.argv[2])
"""
_DIRECTION = """
import sys, torch
from pathlib import Path
from abliterate.directions import make_direction
make_direction(mean_difference=torch.randn(int(sys.argv[1]))).save(Path(sys.argv[2]))
"""


def measured(arguments: list[str], *, descriptors: int | None = None) -> dict[str, float]:
    """Run a command; return its time, the CPU that it took, and its peak memory in MB."""

    def limit() -> None:
        if descriptors is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    started = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, preexec_fn=limit)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{arguments} failed with {process.returncode}")
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mb": round(usage.ru_maxrss / 1024),
    }


def abliterate(*arguments: object, descriptors: int | None = None) -> dict[str, float]:
    """Run `abliterate` in a process of its own."""
    command = [sys.executable, "-m", "abliterate", "-q", *map(str, arguments)]
    return measured(command, descriptors=descriptors)


def make(directory: Path, *, shard_bytes: int, **shape: int) -> tuple[Path, Path, dict[str, Any]]:
    """Make a sparse checkpoint and a direction for it; return both and what there is of it."""
    base, direction = directory / "base", directory / "refusal.safetensors"
    size = make_sparse_checkpoint(base, moe_config(**shape), shard_bytes=shard_bytes)
    subprocess.run([sys.executable, "-c", _DIRECTION, str(shape["hidden"]), str(direction)], check=True)
    index = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    return base, direction, {"gb": round(size / _GB, 2), "tensors": len(index), "shards": len(set(index.values()))}


LARGE = {"hidden": 6144, "experts": 160, "intermediate": 2560, "heads": 96, "vocabulary": 151936}


def plan(directory: Path) -> dict[str, Any]:
    """Plan an edit of a terabyte."""
    base, direction, facts = make(directory, shard_bytes=4 * _GB, layers=62, **LARGE)
    found = _planned(base, direction)
    for each in found.values():
        assert each["cpu_seconds"] < 60, found
        assert each["peak_mb"] < 1000, found
    return facts | found


def edit(directory: Path) -> dict[str, Any]:
    """Edit 1 % of 40 GB and 10 % of 4 GB, the same bytes."""
    results = {
        name: _edit(directory / name, shard_bytes=2 * _GB, layers=layers, edited="2:3", **SMALL)
        for name, layers in (("small", 5), ("large", 48))
    }
    assert results["large"]["peak_mb"] < 1.25 * results["small"]["peak_mb"], results
    return results


SMALL = {"hidden": 2048, "experts": 64, "intermediate": 1024, "heads": 16, "vocabulary": 32000}


def terabyte(directory: Path) -> dict[str, Any]:
    """Edit 1 % of a terabyte, and two of three layers of 4 GB with matrices as large: memory is by the block."""
    shape = LARGE | {"experts": 8, "vocabulary": 32000}
    small = _edit(directory / "small", shard_bytes=2 * _GB, layers=3, edited="0:2", **shape)
    large = _edit(directory / "large", shard_bytes=4 * _GB, layers=62, edited="2:4", **LARGE)
    assert large["peak_mb"] < 1.25 * small["peak_mb"], (small, large)
    return {"small": small, "large": large}


def _edit(directory: Path, *, shard_bytes: int, edited: str, **shape: int) -> dict[str, Any]:
    base, direction, facts = make(directory, shard_bytes=shard_bytes, **shape)
    out = directory / "out"
    found = abliterate("orthogonalize", base, "--direction", direction, "--layers", edited, "-o", out)
    on_disk = sum(512 * file.stat().st_blocks for file in out.iterdir()) // 10**6
    shutil.rmtree(directory)
    return facts | found | {"mb_on_disk": on_disk}


def shards(directory: Path) -> dict[str, Any]:
    """Plan and edit 10,000 shards with few file descriptors."""
    shape = {"hidden": 32, "experts": 32, "intermediate": 16, "heads": 4, "vocabulary": 64}
    base, direction, facts = make(directory, shard_bytes=1, layers=95, **shape)
    return facts | _plan_and_edit(base, direction, directory / "out", descriptors=256)


def tensors(directory: Path) -> dict[str, Any]:
    """Plan and edit 100,000 tensors."""
    shape = {"hidden": 32, "experts": 512, "intermediate": 16, "heads": 4, "vocabulary": 64}
    base, direction, facts = make(directory, shard_bytes=2_100_000, layers=65, **shape)
    return facts | _plan_and_edit(base, direction, directory / "out", descriptors=None)


def _plan_and_edit(base: Path, direction: Path, out: Path, *, descriptors: int | None) -> dict[str, Any]:
    edit = abliterate("orthogonalize", base, "--direction", direction, "-o", out, descriptors=descriptors)
    return _planned(base, direction, descriptors=descriptors) | {"edit": edit}


def _planned(base: Path, direction: Path, *, descriptors: int | None = None) -> dict[str, dict[str, float]]:
    """Plan without a direction, which needs no torch, and with one."""
    command = ("orthogonalize", base, "--direction", direction, "--dry-run")
    return {
        "plan": abliterate("plan", base, descriptors=descriptors),
        "dry_run": abliterate(*command, descriptors=descriptors),
    }


def prompts(directory: Path) -> dict[str, Any]:
    """Read a million prompts of 60 characters in each format."""
    number = 1_000_000
    texts = [f"Prompt number {n:07d}: how is it that nobody ever asks for this?" for n in range(number)]
    contents: dict[str, Callable[[], str]] = {
        "txt": lambda: "\n".join(texts),
        "jsonl": lambda: "\n".join(json.dumps({"id": n, "text": text}) for n, text in enumerate(texts)),
        "csv": lambda: "id,text\n" + "\n".join(f'{n},"{text}"' for n, text in enumerate(texts)),
        "json": lambda: json.dumps(texts),
    }
    directory.mkdir()
    results: dict[str, Any] = {}
    for suffix, content in contents.items():
        path = directory / f"prompts.{suffix}"
        path.write_text(content())
        found = measured([sys.executable, "-c", _READ, str(path), str(number)])
        results[suffix] = found | {"file_mb": path.stat().st_size // 10**6}
    return results


PARTS = {part.__name__: part for part in (plan, edit, shards, tensors, prompts, terabyte)}


def main() -> None:
    """Measure and print one line of JSON for each part."""
    parser = argparse.ArgumentParser(description="Measure time and memory at the limits.")
    usual = ",".join(name for name in PARTS if name != "terabyte")
    parser.add_argument("--only", default=usual, help="some of " + ",".join(PARTS))
    parser.add_argument("--directory", type=Path, help="where the sparse files are made")
    arguments = parser.parse_args()
    for name in arguments.only.split(","):
        with tempfile.TemporaryDirectory(prefix="abliterate-limits-", dir=arguments.directory) as directory:
            print(json.dumps({name: PARTS[name](Path(directory) / name)}), flush=True)


if __name__ == "__main__":
    main()
