"""Extraction beside the paper's procedure: wall time, computation, memory and the choice, in one run.

    python benchmarks/extract.py MODEL [--n-train 128] [--n-val 32] [--device cpu] [--dtype float32] [--json FILE]

MODEL is a directory (`abliterate demo DIR` makes one), `base`, the demo model's base from its installed package, or
`random-1b` or `random-8b`, a llama of that size with random weights, on which every candidate is let pass.
Each way runs in a process of its own, one after another, on the same prompts:

published    as the paper's authors do it: batches of 32 in the order of the prompts, a pass to filter, a pass for the
             means, then three passes per position and layer (KL, bypass, induce), logits of all tokens
exhaustive   `abliterate extract --exhaustive`
raced        `abliterate extract`, which scores most candidates on some of the prompts

The published way's means come out of padded batches and are rounded otherwise, which a candidate that breaks the model
magnifies. So with `--same-directions` its directions are, untimed, scored by ours too.

A token-layer is one token through one decoder block; padding counts. Loading the model is not timed. The share of the
peak is that of the arithmetic of all matrix products with weights (attention's own are left out) over what one large
matrix product reaches on the same device at the same time.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WAYS = ("published", "exhaustive", "raced")
BATCH = 32
RANDOM: dict[str, dict[str, Any]] = {
    "random-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "random-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False,
    },
}  # fmt: skip


@contextmanager
def counted(chat: Any) -> Iterator[dict[str, int]]:
    """Count tokens through blocks, by what the last matrix of each computes, and through the output head."""
    counts = {"token_layers": 0, "head_tokens": 0}

    def counter(name: str) -> Callable[..., None]:
        def count(_module: Any, _args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            counts[name] += hidden.numel() // hidden.shape[-1]

        return count

    last_matrices = [chat.model.get_submodule(block.writers[-1].owner) for block in chat.stream.blocks]
    handles = [module.register_forward_hook(counter("token_layers")) for module in last_matrices]
    handles.append(chat.model.get_output_embeddings().register_forward_hook(counter("head_tokens")))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


class Published:
    """The procedure of Arditi et al. (2024) as published, written plainly."""

    def __init__(self, chat: Any, token_ids: list[int]) -> None:
        self.chat, self.token_ids = chat, token_ids

    @torch.inference_mode()
    def logits(self, rows: list[list[int]]) -> Tensor:
        """Run batches of 32 and return the last token's logits; all tokens' are computed."""
        results = []
        for start in range(0, len(rows), BATCH):
            ids, mask = self.chat.pad(rows[start : start + BATCH])
            results.append(self.chat.model(input_ids=ids, attention_mask=mask).logits[:, -1].float())
        return torch.cat(results)

    def metric(self, rows: list[list[int]]) -> Tensor:
        """Return the refusal metric of each row."""
        from abliterate.extraction.refusal import refusal_metric

        return refusal_metric(self.logits(rows), token_ids=self.token_ids)

    def means(self, rows: list[list[int]]) -> Tensor:
        """Return the mean of resid_pre at the post-instruction tokens, [n_pos, n_layers, d_model] float64."""
        n_positions = self.chat.chat_format.n_positions
        total = torch.zeros(n_positions, self.chat.n_layers, self.chat.d_model, dtype=torch.float64)

        def watch(layer: int) -> Callable[..., None]:
            def look(_module: Any, args: Any, kwargs: Any) -> None:
                hidden = args[0] if args else kwargs["hidden_states"]
                total[:, layer] += hidden[:, -n_positions:].to(torch.float64).sum(dim=0).cpu()

            return look

        handles = [
            block.register_forward_pre_hook(watch(layer), with_kwargs=True)
            for layer, block in enumerate(self.chat.blocks)
        ]
        self.logits(rows)
        for handle in handles:
            handle.remove()
        return total / len(rows)

    def extract(self, rows: dict[str, list[list[int]]], *, filter_prompts: bool) -> list[dict[str, Any]]:
        """Filter, take the means and score every position and layer by three passes."""
        from abliterate.extraction.scoring import kl_divergence
        from abliterate.models.hooks import ablate_direction, add_direction

        if filter_prompts:
            for name, part in rows.items():
                sign = 1 if name.startswith("harmful") else -1
                keep = (sign * self.metric(part) > 0).tolist()
                rows[name] = [row for row, kept in zip(part, keep, strict=True) if kept]
        self.candidates = candidates = self.means(rows["harmful_train"]) - self.means(rows["harmless_train"])
        base = self.logits(rows["harmless_validation"])
        scores = []
        for position in range(-len(candidates), 0):
            for layer in range(self.chat.n_layers):
                vector = candidates[position, layer]
                with ablate_direction(self.chat, vector):
                    kl = kl_divergence(base, self.logits(rows["harmless_validation"])).mean()
                with ablate_direction(self.chat, vector):
                    bypass = self.metric(rows["harmful_validation"]).mean()
                with add_direction(self.chat, vector, layer=layer):
                    induce = self.metric(rows["harmless_validation"]).mean()
                scores.append(
                    {
                        "position": position,
                        "layer": layer,
                        "bypass": float(bypass),
                        "induce": float(induce),
                        "kl": float(kl),
                    }
                )
        return scores


def scores_by_ours(
    published: Published, rows: dict[str, list[list[int]]], table: list[dict[str, Any]]
) -> list[list[Any]]:
    """Return the scores that `table` has, computed by `abliterate extract`'s scorer from the same directions."""
    from statistics import fmean

    from abliterate.extraction.refusal import FirstTokens
    from abliterate.extraction.scoring import CandidateScorer

    scorer = CandidateScorer(
        chat=published.chat,
        candidates=published.candidates,
        harmful_rows=rows["harmful_validation"],
        harmless_rows=rows["harmless_validation"],
        measure=FirstTokens(tuple(published.token_ids)),
    )
    keys = [(score["position"], score["layer"]) for score in table]
    # A zero vector, as the same tokens in all prompts give, is no direction.
    keys = [key for key in keys if published.candidates[key].norm() > 1e-9 * published.candidates.norm(dim=-1).max()]
    found: dict[tuple[int, int], dict[str, float]] = {key: {} for key in keys}
    for name in ("ablated", "induce"):
        for group in scorer.groups(name, keys):
            for key, values in zip(group, scorer.score(name, group), strict=True):
                found[key] |= {each: fmean(numbers) for each, numbers in values.items()}
    return [[*key, scores["bypass"], scores["induce"], scores["kl"]] for key, scores in found.items()]


def load(arguments: argparse.Namespace) -> Any:
    """Load MODEL as a chat model."""
    from abliterate.models.chat_model import make_chat_model
    from abliterate.models.demo import load_base_model
    from abliterate.models.loading import load_chat_model
    from abliterate.models.options import ModelOptions

    name, device, dtype = arguments.model, arguments.device, getattr(torch, arguments.dtype)
    if name in RANDOM:
        return make_chat_model(random_model(name, device, dtype), load_base_model()[1], name=name)
    if name == "base":
        model, tokenizer = load_base_model()
        return make_chat_model(model.to(device, dtype), tokenizer)
    return load_chat_model(Path(name), name=name, options=ModelOptions(dtype=arguments.dtype, device=device))


def random_model(name: str, device: str, dtype: torch.dtype) -> Any:
    """Make a llama with random weights on a device."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(LlamaConfig(**RANDOM[name]), dtype=dtype)


def synchronize(device: str) -> None:
    """Wait until a device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_flops(device: str, dtype: torch.dtype) -> float:
    """Return how many operations a second the device does in a large matrix product."""
    n = 8192 if device.startswith("cuda") else 2048
    one, other = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(8):
        synchronize(device)
        started = time.perf_counter()
        torch.mm(one, other)
        synchronize(device)
        times.append(time.perf_counter() - started)
    return float(2 * n**3 / statistics.median(times[2:]))


def measure(way: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one way in this process and return what it took and chose."""
    from abliterate.extraction.options import ExtractionOptions, Thresholds
    from abliterate.extraction.report import NoCandidatePassesError
    from abliterate.extraction.run import N_PREFIX_PROMPTS, extract_direction
    from abliterate.extraction.selection import CandidateScore, passing_candidates
    from abliterate.models.chat_model import with_response_prefix
    from abliterate.models.greedy import find_response_prefix
    from abliterate.prompt_sets import split_for_extraction

    chat, device = load(arguments), arguments.device
    is_random = arguments.model in RANDOM
    options = ExtractionOptions(
        n_train=arguments.n_train,
        n_val=arguments.n_val,
        filter="none" if arguments.no_filter or is_random else "metric",
        refusal_tokens=("I",) if is_random else tuple(arguments.refusal_token),
        thresholds=Thresholds(kl=1e9, induce=-1e9)
        if is_random
        else Thresholds(kl=arguments.kl_threshold, induce=arguments.induce_threshold),
        exhaustive=way == "exhaustive",
    )
    peak = peak_flops(device, chat.model.dtype)
    chat.last_logits(chat.encode(["What starts first takes longer."] * 8))
    with counted(chat) as counts:
        synchronize(device)
        started, cpu = time.perf_counter(), time.process_time()
        if way == "published":
            prompts = split_for_extraction(
                "bundled", "bundled", n_train=options.n_train, n_val=options.n_val, seed=options.seed
            )
            few = [part.texts[:N_PREFIX_PROMPTS] for part in (prompts.harmful_train, prompts.harmless_train)]
            prefixed = with_response_prefix(chat, find_response_prefix(chat, [*few[0], *few[1]]))
            parts = ("harmful_train", "harmless_train", "harmful_validation", "harmless_validation")
            rows = {name: prefixed.encode(getattr(prompts, name).texts) for name in parts}
            published = Published(prefixed, arguments.token_ids)
            table = published.extract(rows, filter_prompts=options.filter != "none")
            scores = [CandidateScore(**score) for score in table]
            passing = passing_candidates(scores, thresholds=options.thresholds, n_layers=chat.n_layers)
            selected, token_ids = (passing[0] if passing else None), arguments.token_ids
        else:
            try:
                report = extract_direction(model=chat, options=options).report
                selected, scores = report.selected, list(report.scores)
                token_ids = [token.token_id for token in report.refusal_tokens]
            except NoCandidatePassesError as error:
                selected, scores, token_ids = None, list(error.score_table.scores), arguments.token_ids
        synchronize(device)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    by_ours = scores_by_ours(published, rows, table) if way == "published" and arguments.same_directions else []
    in_blocks = sum(p.numel() for block in chat.blocks for p in block.parameters()) / chat.n_layers
    in_head = chat.model.get_output_embeddings().weight.numel()
    flops = 2 * (in_blocks * counts["token_layers"] + in_head * counts["head_tokens"])
    on_gpu = torch.cuda.max_memory_allocated() if device.startswith("cuda") else 0
    return {
        "way": way,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "token_layers": counts["token_layers"],
        "flops": flops,
        "share_of_peak": flops / seconds / peak,
        "peak_flops": peak,
        "device": torch.cuda.get_device_name() if on_gpu else device,
        "peak_gpu_mb": on_gpu / 2**20,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "selected": [selected.position, selected.layer] if selected else None,
        "token_ids": token_ids,
        "scores": [[s.position, s.layer, s.bypass, s.induce, s.kl] for s in scores],
        "by_ours": by_ours,
        "threads": torch.get_num_threads(),
    }


def differences(scores: list[list[Any]], other: list[list[Any]]) -> list[float]:
    """Return the differences of scores that both ways computed, the largest first."""
    known = {(row[0], row[1]): row[2:] for row in other}
    found = (
        abs(a - b)
        for row in scores
        for a, b in zip(row[2:], known[row[0], row[1]], strict=True)
        if a is not None and b is not None
    )
    return sorted(found, reverse=True)


def show(results: list[dict[str, Any]]) -> None:
    """Print the table, relative to the first result, whose scores are the reference."""
    first = results[0]
    print(
        "| | wall s | faster | CPU s | less CPU | million token-layers | share of peak | peak memory MB "
        "| scores on all prompts | chosen | scores differ |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for result in results:
        scores = result["scores"]
        if result["way"] == "raced":
            # Those of other candidates are estimated.
            scores = [row for row in scores if row[:2] == result["selected"]]
        n_scores = sum(value is not None for row in scores for value in row[2:])
        apart = differences(scores, first["scores"]) or [float("nan")]
        print(
            f"| {result['way']} | {result['seconds']:.1f} | {first['seconds'] / result['seconds']:.2f} x "
            f"| {result['cpu_seconds']:.1f} | {first['cpu_seconds'] / result['cpu_seconds']:.2f} x "
            f"| {result['token_layers'] / 1e6:.2f} | {result['share_of_peak']:.0%} "
            f"| {result['peak_gpu_mb'] or result['peak_rss_mb']:.0f} "
            f"| {n_scores} | {result['selected']} | {apart[0]:.1e} (over 1e-4: {sum(each > 1e-4 for each in apart)}) |"
        )
    if first["by_ours"]:
        apart = differences(first["by_ours"], first["scores"])
        print(
            f"\nGiven the published way's directions, ours differs in {len(apart)} scores by at most {apart[0]:.1e} "
            f"(over 1e-4: {sum(each > 1e-4 for each in apart)})."
        )


def main() -> None:
    """Run the ways in processes of their own and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--n-train", type=int, default=128)
    parser.add_argument("--n-val", type=int, default=32)
    parser.add_argument("--no-filter", action="store_true")
    parser.add_argument("--refusal-token", action="append", default=[])
    parser.add_argument("--kl-threshold", type=float, default=0.1)
    parser.add_argument("--induce-threshold", type=float, default=0.0)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--ways", default=",".join(WAYS), help="comma-separated, of " + ", ".join(WAYS))
    parser.add_argument(
        "--same-directions", action="store_true", help="score the published way's directions by ours too"
    )
    parser.add_argument("--json", type=Path, help="write all results here")
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--token-ids", type=json.loads, default=[], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(arguments.only, arguments)))
        return
    results: dict[str, dict[str, Any]] = {}
    token_ids: list[int] = []
    # The published way is given its refusal tokens, as the paper's table gives them: those that ours finds.
    for way in sorted(arguments.ways.split(","), key=WAYS.index, reverse=True):
        command = [sys.executable, __file__, *sys.argv[1:], "--only", way, "--token-ids", json.dumps(token_ids)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results[way] = json.loads(done.stdout.splitlines()[-1])
        token_ids = token_ids or results[way]["token_ids"]
        print(f"{way}: {results[way]['seconds']:.1f} s", file=sys.stderr)
    ordered = [results[way] for way in WAYS if way in results]
    print(
        f"{arguments.model}, {arguments.n_train} training and {arguments.n_val} validation prompts of each kind, "
        f"{arguments.dtype} on {ordered[0]['device']}, {ordered[0]['threads']} threads on {os.cpu_count()} cores, "
        f"torch {torch.__version__}; peak: {ordered[0]['peak_flops'] / 1e12:.3g} TFLOP/s\n"
    )
    show(ordered)
    if arguments.json:
        arguments.json.write_text(json.dumps(ordered, indent=1))


if __name__ == "__main__":
    main()
