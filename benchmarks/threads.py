"""How fast a model runs with threads that wait as torch's do by themselves, and as the command line has them wait.

    python -m benchmarks.threads MODEL --busy 2

Passes of 16 rows of 40 tokens in float32, in a process of its own for each way, in turn; alone, and beside so many
processes that keep a core busy. Prints the passes a second and the ratio of their medians.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# The variable is set before torch is imported, whose library reads it when it is loaded.
PASSES = """
import sys, time
from abliterate.cli.app import yield_soon
if sys.argv[2] == "ours": yield_soon()
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.disable_progress_bar()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
ids = torch.randint(0, model.config.vocab_size, (16, 40))
with torch.inference_mode():
    model(ids, logits_to_keep=1)
    started, n = time.perf_counter(), 0
    while time.perf_counter() - started < 6:
        model(ids, logits_to_keep=1)
        n += 1
    print(n / (time.perf_counter() - started))
"""


@contextmanager
def busy(n: int) -> Iterator[None]:
    """Keep `n` cores busy."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    """Time both ways, alone and beside others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--busy", type=int, default=2, help="other processes that compute")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    for n in (0, arguments.busy):
        found: dict[str, list[float]] = {"by itself": [], "ours": []}
        with busy(n):
            for _ in range(arguments.runs):
                for way, values in found.items():
                    command = [sys.executable, "-c", PASSES, arguments.model, way]
                    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
                    values.append(float(done.stdout))
        medians = {way: statistics.median(values) for way, values in found.items()}
        beside = f"beside {n} busy processes" if n else "alone"
        listed = "; ".join(f"{way} " + ", ".join(f"{each:.2f}" for each in values) for way, values in found.items())
        print(f"{beside}: {listed} passes a second; ours / by itself {medians['ours'] / medians['by itself']:.2f}")


if __name__ == "__main__":
    main()
