"""Editing a checkpoint beside copying it, and beside loading, editing and saving it with transformers.

Makes a llama checkpoint with the shapes of an 8B or a 70B model (bf16, random weights, as many layers as `--size`
takes) and runs, one after another and `--runs` times round, each in a process of its own:

* `cp -r`, and `cp -r` followed by a flush to the disk, which is what ours ends with;
* `abliterate orthogonalize`, with the files in the page cache and without;
* the limit: each shard read, hashed and written past the page cache, in a thread each, and nothing else;
* with `--beside TREE` the same of another commit;
* transformers: from_pretrained, the same projection in float32 on each weight, save_pretrained.

Prints the median of wall time, CPU time and peak resident memory, and the ratios to `cp -r`. The machine may be
shared, so the ratios count.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# A guest gives memory that it has freed back to its hypervisor within seconds, and taking it again costs more than
# copying into it. Without a pause `cp`, which writes at once, would be spared that, and what imports torch first not.
PAUSE = 5.0
# torch is imported by the process that makes the checkpoint alone: what a child process has at its peak begins with
# what its parent had.
SHARD_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Shapes:
    """The sizes of a llama."""

    d_model: int
    d_mlp: int
    d_kv: int
    vocabulary: int

    def layer(self) -> dict[str, tuple[int, ...]]:
        """Return the tensors of a layer."""
        return {
            "input_layernorm.weight": (self.d_model,),
            "mlp.down_proj.weight": (self.d_model, self.d_mlp),
            "mlp.gate_proj.weight": (self.d_mlp, self.d_model),
            "mlp.up_proj.weight": (self.d_mlp, self.d_model),
            "post_attention_layernorm.weight": (self.d_model,),
            "self_attn.k_proj.weight": (self.d_kv, self.d_model),
            "self_attn.o_proj.weight": (self.d_model, self.d_model),
            "self_attn.q_proj.weight": (self.d_model, self.d_model),
            "self_attn.v_proj.weight": (self.d_kv, self.d_model),
        }


# Those of Llama 3 8B and Llama 2 70B, whose out-projections are larger than a block of the writer's.
SHAPES = {"8b": Shapes(4096, 14336, 1024, 128256), "70b": Shapes(8192, 28672, 1024, 32000)}
LIMIT = """
import hashlib, mmap, os, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
source, out = map(Path, sys.argv[1:])
out.mkdir()
def copy(file):
    target = os.open(out / file.name, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    block, digest, size = mmap.mmap(-1, 1 << 23), hashlib.sha256(), 0
    with file.open("rb", buffering=0) as reader:
        while n := reader.readinto(block):
            digest.update(memoryview(block)[:n])
            # What is written past the page cache comes in whole pages.
            os.write(target, memoryview(block)[: -(-n // 4096) * 4096])
            size += n
    os.truncate(target, size)
    os.fsync(target)
    os.close(target)
files = [file for file in sorted(source.iterdir()) if file.suffix == ".safetensors"]
with ThreadPoolExecutor(os.cpu_count()) as threads:
    list(threads.map(copy, files))
"""
TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM
from abliterate.directions import load_direction
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
r = load_direction(sys.argv[2]).vector.float()
with torch.no_grad():
    model.model.embed_tokens.weight.copy_((lambda w: w - (w @ r)[:, None] * r)(model.model.embed_tokens.weight.float()))
    for layer in model.model.layers:
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            module.weight.copy_((lambda w: w - torch.outer(r, r @ w))(module.weight.float()))
model.save_pretrained(sys.argv[3])
"""


def tensor_shapes(size: float, of: Shapes) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a checkpoint of about `size` GB."""
    end = (of.vocabulary, of.d_model)
    ends = {"model.embed_tokens.weight": end, "lm_head.weight": end}
    layer = sum(2 * math.prod(shape) for shape in of.layer().values())
    left = size * 1e9 - sum(2 * math.prod(shape) for shape in ends.values())
    n_layers = max(1, round(left / layer))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": ends["model.embed_tokens.weight"]}
    for index in range(n_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in of.layer().items()}
    return shapes | {"model.norm.weight": (of.d_model,), "lm_head.weight": ends["lm_head.weight"]}


def make_checkpoint(path: Path, size: float, of: Shapes) -> None:
    """Write the checkpoint, tensor by tensor, and a direction beside it."""
    import torch

    from abliterate.directions import make_direction

    path.mkdir(parents=True)
    direction = torch.randn(of.d_model, generator=torch.Generator().manual_seed(1))
    make_direction(mean_difference=direction).save(path.parent / "refusal.safetensors")
    shapes = tensor_shapes(size, of)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if sum(2 * math.prod(each) for each in shards[-1].values()) >= SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    weight_map: dict[str, str] = {}
    noise = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file_name)
        write_shard(path / file_name, shard, noise)
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": of.d_model,
        "intermediate_size": of.d_mlp, "num_attention_heads": of.d_model // 128, "num_key_value_heads": of.d_kv // 128,
        "vocab_size": of.vocabulary,
        "num_hidden_layers": sum(name.endswith("o_proj.weight") for name in shapes), "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))


def write_shard(path: Path, shard: dict[str, tuple[int, ...]], noise: "torch.Tensor") -> None:
    """Write one safetensors file of noise."""
    import torch

    header, position = {}, 0
    for name, shape in shard.items():
        end = position + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shard.values():
            left, shift = math.prod(shape), 0
            while left:
                part = noise.roll(shift)[: min(left, len(noise))] if shift else noise[: min(left, len(noise))]
                file.write(part.view(torch.uint8).numpy().data)
                left -= len(part)
                shift += 1
        file.flush()
        os.fsync(file.fileno())


def in_cache(path: Path, *, wanted: bool) -> None:
    """Bring a directory's files into the page cache, or out of it."""
    for file in sorted(path.rglob("*")):
        with file.open("rb", buffering=0) as reader:
            if not wanted:
                os.posix_fadvise(reader.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                continue
            buffer = bytearray(1 << 22)
            while reader.readinto(buffer):
                pass


def timed(command: list[str]) -> dict[str, float]:
    """Run a command and return its wall and CPU time in seconds and its peak resident memory in MB."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    message = process.stderr.read() if process.stderr else ""
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{command}: {message}")
    return {"wall": seconds, "cpu": usage.ru_utime + usage.ru_stime, "peak_mb": usage.ru_maxrss / 1024}


def ways_of(
    source: Path, out: Path, direction: Path, *, workers: int | None, beside: Path | None
) -> dict[str, tuple[list[str], bool]]:
    """Return the commands, and whether each finds the source in the page cache."""
    arguments = ["-q", "orthogonalize", str(source), "--direction", str(direction), "-o", str(out)]
    ours = [sys.executable, "-m", "abliterate", *arguments, *(["--workers", str(workers)] if workers else [])]
    copy = ["cp", "-r", str(source), str(out)]
    flush = ["sh", "-c", f"cp -r {source} {out} && sync {out}/*"]
    limit = [sys.executable, "-c", LIMIT, str(source), str(out)]
    other = ["env", f"PYTHONPATH={beside / 'src'}", *ours] if beside else []
    others = {"other commit, cold": (other, False), "other commit, warm": (other, True)} if beside else {}
    return {
        "cp -r, cold": (copy, False), "cp -r, warm": (copy, True), "cp -r and sync, cold": (flush, False),
        "ours, cold": (ours, False), "ours, warm": (ours, True),
        "limit, cold": (limit, False), "limit, warm": (limit, True),
        "transformers, cold": ([sys.executable, "-c", TRANSFORMERS, str(source), str(direction), str(out)], False),
        **others,
    }  # fmt: skip


def main() -> None:
    """Make the checkpoint, run every way several times in turn, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=4.0, help="GB of weights")
    parser.add_argument("--shapes", choices=tuple(SHAPES), default="8b", help="of which llama")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--directory", type=Path, default=Path("build/benchmark-orthogonalize"))
    parser.add_argument("--only", nargs="+", metavar="WORD", help="ways with one of these words in their name")
    parser.add_argument("--beside", type=Path, metavar="TREE", help="checkout of another commit, timed as well")
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    of = SHAPES[arguments.shapes]
    directory = arguments.directory / f"{arguments.shapes}-{arguments.size:g}"
    source, out, direction = directory / "base", directory / "out", directory / "refusal.safetensors"
    if arguments.make:
        make_checkpoint(source, arguments.size, of)
        return
    shutil.rmtree(directory, ignore_errors=True)
    given = ["--size", str(arguments.size), "--shapes", arguments.shapes, "--directory", str(arguments.directory)]
    subprocess.run([sys.executable, __file__, "--make", *given], check=True)
    ways = ways_of(source, out, direction, workers=arguments.workers, beside=arguments.beside)
    if arguments.only:
        ways = {way: each for way, each in ways.items() if any(word in way for word in arguments.only)}
    results: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(arguments.runs):
        for way, (command, warm) in ways.items():
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            in_cache(source, wanted=warm)
            time.sleep(PAUSE)
            results[way].append(timed(command))
            print(f"{way}: {results[way][-1]}", file=sys.stderr, flush=True)
    shutil.rmtree(directory)
    show(results, size=sum(2 * math.prod(shape) for shape in tensor_shapes(arguments.size, of).values()))


def show(results: dict[str, list[dict[str, float]]], *, size: int) -> None:
    """Print the medians, and each way's wall time as a multiple of `cp -r` under the same conditions."""
    medians = {
        way: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for way, runs in results.items()
    }
    print(f"{size / 1e9:.2f} GB, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}")
    print("| way | wall / cp -r | wall, s (least, median, greatest) | CPU, s | peak MB |\n|---|---|---|---|---|")
    for way, median in medians.items():
        walls = [run["wall"] for run in results[way]]
        base = medians.get("cp -r, warm" if way.endswith("warm") else "cp -r, cold")
        ratio = f"{median['wall'] / base['wall']:.2f}" if base else "-"
        print(
            f"| {way} | {ratio} | {min(walls):.1f}, {median['wall']:.1f}, {max(walls):.1f} "
            f"| {median['cpu']:.1f} | {median['peak_mb']:.0f} |"
        )


if __name__ == "__main__":
    main()
