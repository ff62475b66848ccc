"""Float32 products of matrices on this processor: torch's own choice beside oneDNN, as `models/machine.product` has it.

    python -m benchmarks.products --threads 1
    python -m benchmarks.products --threads 2 --d-model 2048 --d-ff 8192 --vocabulary 32000

For the shapes of a model's layers and for several numbers of rows: billions of operations a second of each way, in
turn, their ratio, and how far the results are from those in float64, as a share of the largest. Says whether a loaded
model computes so on this processor; both ways are measured on any.
"""

import argparse
import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from abliterate.models import machine


def rate(run: Callable[[], object], *, operations: int, seconds: float) -> float:
    """Return how many billion operations a second a computation makes, after one that is not counted."""
    run()
    started, n = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        run()
        n += 1
    return operations * n / (time.perf_counter() - started) / 1e9


def error(found: Tensor, exact: Tensor) -> float:
    """Return the largest difference, as a share of the largest entry."""
    return float((found.double() - exact).abs().max() / exact.abs().max())


@torch.inference_mode()
def main() -> None:
    """Time both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--d-model", type=int, default=896)
    parser.add_argument("--d-ff", type=int, default=4864)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 512, 1536])
    parser.add_argument("--seconds", type=float, default=0.4, help="of each measurement")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    used = machine.wider_by_onednn()
    print(f"a loaded model's products go to oneDNN on this processor: {'yes' if used else 'no'}")
    # Measured on any processor.
    machine.wider_by_onednn = functools.cache(lambda: True)
    d, f, v = arguments.d_model, arguments.d_ff, arguments.vocabulary
    for d_in, d_out in ((d, d), (d, f), (f, d), (d, v)):
        weight = torch.randn(d_out, d_in) / d_in**0.5
        for n in arguments.rows:
            hidden = torch.randn(n, d_in)
            if n * d_out > 2**27:
                continue
            size = 2 * n * d_in * d_out
            plain = rate(lambda h=hidden, w=weight: linear(h, w), operations=size, seconds=arguments.seconds)  # type: ignore[misc]
            ours = rate(lambda h=hidden, w=weight: machine.product(h, w), operations=size, seconds=arguments.seconds)  # type: ignore[misc]
            exact = hidden.double() @ weight.double().T
            print(
                f"{n:5} x {d_in} x {d_out}: torch {plain:.0f}, ours {ours:.0f} billion a second, {ours / plain:.2f} "
                f"times; errors {error(linear(hidden, weight), exact):.0e}, "
                f"{error(machine.product(hidden, weight), exact):.0e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
