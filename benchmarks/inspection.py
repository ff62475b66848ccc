"""Inspecting an edited checkpoint beside its base, against reading both with `cmp`.

Makes a llama checkpoint with the shapes of an 8B model (bf16, random weights, as many layers as `--size` takes), an
edited one and a copy, and runs in turn, `--runs` times round, each with the files out of the page cache:

* `cmp` of every file of the base with that of the copy, which reads both to their ends;
* `abliterate inspect EDITED --base BASE`, and the same of the copy, in which nothing differs;
* with `--beside TREE` both of another commit.

Prints the median of wall time, CPU time and peak resident memory, and the ratio to `cmp`. The machine may be shared, so
the ratio counts.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.orthogonalize import PAUSE, SHAPES, in_cache, make_checkpoint, timed


def ways_of(base: Path, edited: Path, copy: Path, *, beside: Path | None) -> dict[str, tuple[list[str], Path]]:
    """Return the commands, and what each reads beside the base."""
    compare = " && ".join(f"cmp {base / file.name} {copy / file.name}" for file in sorted(base.glob("*.safetensors")))
    ways = {"cmp": (["sh", "-c", compare], copy)}
    for name, model in (("inspect", edited), ("inspect, nothing differs", copy)):
        words = [sys.executable, "-m", "abliterate", "-q", "inspect", str(model), "--base", str(base)]
        ways[name] = (words, model)
        if beside is not None:
            ways[f"{name}, other commit"] = (["env", f"PYTHONPATH={beside / 'src'}", *words], model)
    return ways


def main() -> None:
    """Make the checkpoints, run both several times in turn, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=4.0, help="GB of weights")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path("build/benchmark-inspect"))
    parser.add_argument("--warm", action="store_true", help="with the files in the page cache, as far as it holds them")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints, and take those that are there")
    parser.add_argument("--beside", type=Path, metavar="TREE", help="checkout of another commit, timed as well")
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    base, edited, copy = (arguments.directory / name for name in ("base", "edited", "copy"))
    if arguments.make:
        make_checkpoint(base, arguments.size, SHAPES["8b"])
        return
    if not (arguments.keep and copy.is_dir()):
        shutil.rmtree(arguments.directory, ignore_errors=True)
        # In processes of their own, so that what is measured does not begin with what they had.
        maker = [sys.executable, "-m", "benchmarks.inspection", "--make", "--size", str(arguments.size)]
        subprocess.run([*maker, "--directory", str(arguments.directory)], check=True)
        edit = ["orthogonalize", str(base), "--direction", str(arguments.directory / "refusal.safetensors")]
        subprocess.run(
            [sys.executable, "-m", "abliterate", "-q", *edit, "-o", str(edited)], check=True, stdout=sys.stderr
        )
        shutil.copytree(base, copy)
    ways = ways_of(base, edited, copy, beside=arguments.beside)
    results: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(arguments.runs):
        for way, (command, read) in ways.items():
            os.sync()
            for directory in (base, edited, copy):
                in_cache(directory, wanted=arguments.warm and directory in (base, read))
            time.sleep(PAUSE)
            results[way].append(timed(command))
            print(f"{way}: {results[way][-1]}", file=sys.stderr, flush=True)
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    if not arguments.keep:
        shutil.rmtree(arguments.directory)
    show(results, size=size)


def show(results: dict[str, list[dict[str, float]]], *, size: int) -> None:
    """Print the medians, and the wall time as a multiple of `cmp`."""
    print(f"{size / 1e9:.2f} GB each, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}")
    print("| way | wall / cmp | wall, s (least, median, greatest) | CPU, s | peak MB |\n|---|---|---|---|---|")
    medians = {
        way: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for way, runs in results.items()
    }
    for way, median in medians.items():
        walls = [run["wall"] for run in results[way]]
        print(
            f"| {way} | {median['wall'] / medians['cmp']['wall']:.2f} | {min(walls):.1f}, {median['wall']:.1f}, "
            f"{max(walls):.1f} | {median['cpu']:.1f} | {median['peak_mb']:.0f} |"
        )


if __name__ == "__main__":
    main()
