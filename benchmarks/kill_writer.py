"""Kills `abliterate orthogonalize` at random moments and resumes it: the result must be that of a run left in peace.

    python -m benchmarks.kill_writer [--kills 1000] [--faults 100] [--directories DIR ...]

Everything is done in each directory (one on the disk, one in memory), with direct I/O and without. SIGKILL hits a run
after a random part of the time that an undisturbed one takes, and `--resume` goes on. Two edits take turns, so that
each run after the first result replaces the other's with `--overwrite`: after every kill the target must be absent
(before the first) or hold one of the two byte by byte (the record but for its time). All the while a reader looks at
the target, which must be absent or whole. Then the one function that writes fails with ENOSPC, or writes part of what
it was given, from a random call on. Counts are printed for each way and all together; it exits with 1 if any result
differs.
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
# What a run that was killed in the last moment leaves in its result.
OWN = ".abliterate"
FORK = multiprocessing.get_context("fork")


def content(path: Path) -> dict[str, bytes]:
    """Return a checkpoint's files, the record without its time."""
    names = [file.relative_to(path) for file in path.rglob("*") if file.is_file()]
    files = {name.as_posix(): (path / name).read_bytes() for name in names if name.parts[0] != OWN}
    record = json.loads(files["abliteration.json"])
    return files | {"abliteration.json": json.dumps(record | {"created": None}).encode()}


def watch(target: Path, names: set[str], sizes: dict[str, int], counts: Any, stopped: Any) -> None:
    """Look at the target as often as can be, and count what is neither absent nor whole."""
    while not stopped.is_set():
        time.sleep(0.003)
        counts[0] += 1
        try:
            state = target.stat().st_ino
            found = {path.name: path.stat().st_size for path in target.iterdir() if path.name != OWN}
            is_same = target.stat().st_ino == state
        except FileNotFoundError:
            continue
        if is_same and (found.keys() != names or any(found[name] != size for name, size in sizes.items())):
            counts[1] += 1


def start(arguments: list[str], *, direct: bool, fault: tuple[str, int] | None = None) -> ForkProcess:
    """Start `abliterate` in a process of its own; a fault is its kind and the number of writes that go well."""
    process = FORK.Process(target=run, args=(arguments, direct, fault))
    process.start()
    return process


def run(arguments: list[str], direct: bool, fault: tuple[str, int] | None) -> None:
    """Be `abliterate`."""
    import abliterate.checkpoints.file_ranges
    import abliterate.checkpoints.linux_file
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
    if not direct:
        abliterate.checkpoints.linux_file.open_direct = lambda *_: None
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    sys.argv = ["abliterate", "-q", *arguments]
    abliterate_main()


def complete(arguments: list[str], *, direct: bool, fault: tuple[str, int] | None = None) -> int:
    """Run to the end and return the exit code."""
    process = start(arguments, direct=direct, fault=fault)
    process.join()
    return process.exitcode or 0


class Rounds:
    """Kills and faults in one directory, in one way of writing.

    Args:
        directory: Where the base and the direction are.
        direct: Whether files are moved past the page cache where the file system can.
        generator: Where all choices come from.
    """

    def __init__(self, directory: Path, *, direct: bool, generator: random.Random) -> None:
        self.directory, self.direct, self.generator = directory, direct, generator
        self.out = directory / "out"
        self.counts: Counter[str] = Counter()
        self.expected: dict[str, dict[str, bytes]] = {}
        for strength in ("1.0", "0.5"):
            process = start(self.command(strength, directory / "calm"), direct=direct)
            wait_until_writing(process, directory / ".calm.partial", 0)
            started = time.perf_counter()
            process.join()
            assert process.exitcode == 0
            # From its first file on, as that is when a run can be hit.
            self.seconds = time.perf_counter() - started
            self.expected[strength] = content(directory / "calm")
            shutil.rmtree(directory / "calm")
        sizes = {name: len(data) for name, data in self.expected["1.0"].items() if name != "abliteration.json"}
        self.looks, self.stopped = FORK.Array("q", 2), FORK.Event()
        names = set(self.expected["1.0"])
        self.reader = FORK.Process(target=watch, args=(self.out, names, sizes, self.looks, self.stopped))
        self.reader.start()

    def command(self, strength: str, out: Path) -> list[str]:
        """Return the command of one of the two edits."""
        base, direction = str(self.directory / "base"), str(self.directory / "refusal.safetensors")
        return ["orthogonalize", base, "--direction", direction, "--strength", strength, "-o", str(out), "--overwrite"]

    def look(self) -> str | None:
        """Return which edit is at the target, None where nothing is; count what is neither."""
        if not self.out.exists():
            return None
        self.counts["compared"] += 1
        found = content(self.out)
        for strength, expected in self.expected.items():
            if found == expected:
                return strength
        self.counts["different"] += 1
        return None

    def kill(self, times: int) -> None:
        """Kill so many runs; each goes on with what the one before has left, until one gets through."""
        there: str | None = None
        while self.counts["kills"] < times:
            wanted = "0.5" if there == "1.0" else "1.0"
            command = [*self.command(wanted, self.out), "--resume"]
            process = start(command, direct=self.direct)
            wait_until_writing(process, self.directory / ".out.partial", self.generator.uniform(0, self.seconds))
            process.kill()
            process.join()
            is_killed = process.exitcode == -9
            self.counts["kills" if is_killed else f"over before the kill, exit code {process.exitcode}"] += 1
            self.counts["kills with finished files"] += len(journal(self.directory)) > 1
            found = self.look()
            self.counts["different"] += found not in ({there, wanted} if is_killed else {wanted})
            self.counts["kills after the new one had its name"] += is_killed and found == wanted
            self.counts["whole with marks of the tool"] += (self.out / ".abliterate").exists()
            there = found
            if is_killed and self.counts["kills"] % 20 == 0:
                print(f"{self.directory}, direct I/O {self.direct}: {dict(self.counts)}", file=sys.stderr, flush=True)
        self.through(wanted)

    def through(self, wanted: str) -> None:
        """Let a run get through, and see that its result is right and nothing is left beside it."""
        assert complete([*self.command(wanted, self.out), "--resume"], direct=self.direct) == 0
        self.counts["different"] += self.look() != wanted
        beside = {path.name for path in self.directory.iterdir()} - {"base", "refusal.safetensors", "out"}
        self.counts["left behind"] += bool(beside)

    def fail(self, times: int) -> None:
        """Let so many runs meet a full disk or short writes, at any of their writes."""
        for number in range(times):
            there = self.look()
            wanted = "0.5" if there == "1.0" else "1.0"
            kind = ("full", "short")[number % 2]
            code = complete(
                self.command(wanted, self.out), direct=self.direct, fault=(kind, self.generator.randrange(60))
            )
            self.counts[f"faults: {kind}, exit code {code}"] += 1
            self.counts["different"] += self.look() != (there if code else wanted)
            self.through(wanted)

    def end(self) -> None:
        """Stop the reader and remove the result."""
        self.stopped.set()
        self.reader.join()
        self.counts["looks of the reader"], self.counts["half-written"] = self.looks[:]
        shutil.rmtree(self.out)


def main() -> int:
    """Make a checkpoint in each directory, then kill, resume and compare."""
    parser = argparse.ArgumentParser(description="Kill the writer of checkpoints, and fill its disk.")
    parser.add_argument("--kills", type=int, default=1000, help="all together")
    parser.add_argument("--faults", type=int, default=100, help="all together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--directories", type=Path, nargs="+", default=[Path("build/kill-writer"), Path("/dev/shm/kill-writer")]
    )
    arguments = parser.parse_args()
    total: Counter[str] = Counter()
    n_ways = 2 * len(arguments.directories)
    for directory in arguments.directories:
        shutil.rmtree(directory, ignore_errors=True)
        maker = FORK.Process(target=make_model, args=(directory,))
        maker.start()
        maker.join()
    import abliterate.editing.orthogonalization  # noqa: F401

    for place, directory in enumerate(arguments.directories):
        for direct in (True, False):
            way = 2 * place + (not direct)
            generator = random.Random(arguments.seed + way)
            rounds = Rounds(directory, direct=direct, generator=generator)
            started = time.monotonic()
            try:
                rounds.kill(arguments.kills // n_ways + (way < arguments.kills % n_ways))
                rounds.fail(arguments.faults // n_ways + (way < arguments.faults % n_ways))
            finally:
                rounds.end()
            name = f"{file_system(directory)}, {'direct I/O' if direct else 'through the page cache'}"
            print(json.dumps({name: rounds.counts, "seconds": round(time.monotonic() - started)}), flush=True)
            total.update(rounds.counts)
        shutil.rmtree(directory)
    print(json.dumps({"all together": total}, indent=2))
    return int(any(total[name] for name in ("different", "half-written", "left behind")))


def file_system(directory: Path) -> str:
    """Return the kind of file system that a directory is on."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    place = directory.resolve()
    found = [(len(mount[1]), mount[2]) for mount in mounts if place.is_relative_to(mount[1])]
    return max(found)[1] if found else "unknown"


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
        hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=4000, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(directory / "base", max_shard_size="1MB")
    make_direction(mean_difference=torch.randn(256)).save(directory / "refusal.safetensors")


if __name__ == "__main__":
    sys.exit(main())
