"""Kills `abliterate orthogonalize` at random moments and resumes it: the result must be that of a run left in peace.

`--kills` times SIGKILL hits a run after a random part of the time that an undisturbed one takes, and `--resume` goes
on; whenever a run gets through, its files are compared with the undisturbed ones byte by byte (the record but for its
time) and the next begins. All the while a reader looks at the target: it must be absent or whole. Then `--faults`
times the one function that writes fails with ENOSPC, or writes part of what it was given, from a random call on.
"""

import argparse
import errno
import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections import Counter
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

# Forked from a process that has imported everything, so that a run costs its writing and not its imports.
FORK = multiprocessing.get_context("fork")


def content(path: Path) -> dict[str, bytes]:
    """Return a checkpoint's files, the record without its time."""
    files = {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    record = json.loads(files["abliteration.json"])
    return files | {"abliteration.json": json.dumps(record | {"created": None}).encode()}


def watch(target: Path, names: set[str], sizes: dict[str, int], counts: Any, stopped: Any) -> None:
    """Look at the target as often as can be, and count what is neither absent nor whole."""
    while not stopped.is_set():
        time.sleep(0.0005)
        counts[0] += 1
        try:
            state = target.stat().st_ino
            found = {path.name: path.stat().st_size for path in target.iterdir()}
            is_same = target.stat().st_ino == state
        except FileNotFoundError:
            continue
        if is_same and (found.keys() != names or any(found[name] != size for name, size in sizes.items())):
            counts[1] += 1


def start(arguments: list[str], fault: tuple[str, int] | None = None) -> ForkProcess:
    """Start `abliterate` in a process of its own; a fault is its kind and the number of writes that go well."""
    process = FORK.Process(target=run, args=(arguments, fault))
    process.start()
    return process


def run(arguments: list[str], fault: tuple[str, int] | None) -> None:
    """Be `abliterate`."""
    import abliterate.checkpoints.file_ranges
    from abliterate.cli.app import main as abliterate_main

    left = 0 if fault is None else fault[1]

    def write(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal left
        left -= 1
        if fault is None or left >= 0:
            return os.pwrite(descriptor, data, offset)
        if fault[0] == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.pwrite(descriptor, data[: max(1, len(data) // 2)], offset)

    abliterate.checkpoints.file_ranges.write_some = write
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    sys.argv = ["abliterate", "-q", *arguments]
    abliterate_main()


def complete(arguments: list[str], fault: tuple[str, int] | None = None) -> int:
    """Run to the end and return the exit code."""
    process = start(arguments, fault)
    process.join()
    return process.exitcode or 0


def main() -> None:
    """Make a checkpoint, then kill, resume and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, default=Path("build/kill-writer"))
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    directory: Path = arguments.directory
    shutil.rmtree(directory, ignore_errors=True)
    maker = FORK.Process(target=make_model, args=(directory,))
    maker.start()
    maker.join()
    import abliterate.editing.orthogonalization  # noqa: F401

    out = directory / "out"
    command = ["orthogonalize", str(directory / "base"), "--direction", str(directory / "refusal.safetensors")]
    started = time.perf_counter()
    assert complete([*command, "-o", str(directory / "calm")]) == 0
    seconds = time.perf_counter() - started
    expected = content(directory / "calm")
    sizes = {name: len(data) for name, data in expected.items() if name != "abliteration.json"}
    looks, stopped = FORK.Array("q", 2), FORK.Event()
    reader = FORK.Process(target=watch, args=(out, set(expected), sizes, looks, stopped))
    reader.start()
    counts: Counter[str] = Counter()

    def compare() -> None:
        counts["compared"] += 1
        counts["different"] += content(out) != expected
        # Out of the way at once, as the reader would take a removal for something half-written.
        out.rename(directory / "old")
        shutil.rmtree(directory / "old")

    while counts["kills"] < arguments.kills:
        process = start([*command, "-o", str(out), "--resume"])
        wait_until_writing(process, directory / ".out.partial", generator.uniform(0, 0.7 * seconds))
        process.kill()
        process.join()
        counts["kills" if process.exitcode == -9 else f"over before the kill, exit code {process.exitcode}"] += 1
        counts["kills with finished files"] += len(journal(directory)) > 1
        if not out.exists() and generator.random() < 0.1:
            assert complete([*command, "-o", str(out), "--resume"]) == 0
        if out.exists():
            compare()
    if not out.exists():
        assert complete([*command, "-o", str(out), "--resume"]) == 0
    compare()
    for number in range(arguments.faults):
        kind = ("full", "short")[number % 2]
        code = complete([*command, "-o", str(out)], (kind, generator.randrange(24)))
        counts[f"faults: {kind}, exit code {code}"] += 1
        if not out.exists():
            assert complete([*command, "-o", str(out), "--resume"]) == 0
        compare()
    stopped.set()
    reader.join()
    shutil.rmtree(directory)
    counts["looks of the reader"], counts["half-written"] = looks
    print(json.dumps(counts, indent=2))
    sys.exit(bool(counts["different"] or counts["half-written"]))


def wait_until_writing(process: ForkProcess, partial: Path, seconds: float) -> None:
    """Wait until the run has begun to write, and a while longer; or until it is over."""
    while process.is_alive() and not (partial / ".abliterate" / "journal-0.jsonl").exists():
        time.sleep(0.002)
    end = time.perf_counter() + seconds
    while process.is_alive() and time.perf_counter() < end:
        time.sleep(0.002)


def journal(directory: Path) -> list[bytes]:
    """Return the journal's lines."""
    path = directory / ".out.partial" / ".abliterate" / "journal-0.jsonl"
    return path.read_bytes().splitlines() if path.exists() else []


def make_model(directory: Path) -> None:
    """Write a small llama in bf16 in many shards, and a direction."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from abliterate.directions import make_direction

    config = LlamaConfig(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=8000, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(directory / "base", max_shard_size="5MB")
    make_direction(mean_difference=torch.randn(512)).save(directory / "refusal.safetensors")


if __name__ == "__main__":
    main()
