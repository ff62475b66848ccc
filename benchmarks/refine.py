"""`abliterate refine` beside `extract`, and what its edit does beside the direction's own, on one model in one run.

    python -m benchmarks.refine MODEL --direction refusal.safetensors --output build/refine

The direction's own edit, without the embeddings, and that of `refine` are written, and both are measured by
`evaluate` on test prompts that neither was found on. Times are only comparable within one run. No reply is kept.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Run it and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--direction", type=Path, help="default: extracted, and timed")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--kl-threshold", default="0.3", help="of extract")
    parser.add_argument("--max-new-tokens", default="32")
    arguments = parser.parse_args()
    work: Path = arguments.output
    work.mkdir(parents=True, exist_ok=True)
    direction, results = arguments.direction, {}
    if direction is None:
        direction = work / "refusal.safetensors"
        results["extract"] = timed(
            "extract", arguments.model, "-o", direction, "--kl-threshold", arguments.kl_threshold
        )
    strengths = work / "strengths.json"
    results["refine"] = timed("refine", arguments.model, "--direction", direction, "-o", strengths)
    for name, options in (
        ("the direction", ("--components", "attn,mlp", "--tied", "skip")),
        ("refined", ("--strengths", strengths)),
    ):
        edited, report = work / name.replace(" ", "_"), work / f"{name.replace(' ', '_')}.json"
        timed("orthogonalize", arguments.model, "--direction", direction, "-o", edited, "--overwrite", *options)
        timed("evaluate", edited, "--base", arguments.model, "--max-new-tokens", arguments.max_new_tokens, "-o", report)
        results[name] = json.loads(report.read_text())
        shutil.rmtree(edited)
    (work / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    show(results)


def timed(*arguments: object) -> dict[str, float]:
    """Run a command of abliterate; return its wall and CPU time in seconds."""
    words = [sys.executable, "-m", "abliterate", *map(str, arguments)]
    print("$ abliterate", *words[3:], file=sys.stderr, flush=True)
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "wall": time.perf_counter() - started,
        "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }


def show(results: dict[str, Any]) -> None:
    """Print what was measured."""
    if "extract" in results:
        ratio = {key: results["refine"][key] / results["extract"][key] for key in ("wall", "cpu")}
        print(f"refine / extract: wall {ratio['wall']:.2f}, CPU {ratio['cpu']:.2f}")
    for name in ("the direction", "refined"):
        found = results[name]
        for rates, whose in ((found["base_rates"], "base"), (found["rates"], name)):
            refused = ", ".join(
                f"{kind} {rate['rate']:.1%} [{rate['low']:.1%}, {rate['high']:.1%}]" for kind, rate in rates.items()
            )
            print(f"{whose}: refused {refused}")
        for one in found["measurements"]:
            change = "" if one["relative_change"] is None else f" ({one['relative_change']:+.1%})"
            print(f"  {one['name']}: {one['model']:.4g} {one['unit']}{change}")


if __name__ == "__main__":
    main()
