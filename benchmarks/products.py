"""Float32 products of matrices on this processor: torch's own choice beside oneDNN, as `models/machine.product` has it.

    python -m benchmarks.products --threads 1
    python -m benchmarks.products --threads 2 --rows 1 --d-model 4096 --d-ff 14336     as in a chat with a larger model
    python -m benchmarks.products --threads 1 --rows 512 --backward                    as in `refine`
    ONEDNN_MAX_CPU_ISA=AVX2 python -m benchmarks.products --threads 1                  as on a processor without AVX-512

For the shapes of a model's layers and for several numbers of rows: billions of operations a second of each way, in
turn, their ratio, and how far the results are from those in float64, as a share of the largest. With `--backward` the
gradient of what goes in is computed, too. Says whether a loaded model computes so on this processor; both ways are
measured on any.
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


def forward(way: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor) -> None:
    """Multiply alone."""
    with torch.inference_mode():
        way(hidden, weight)


def backward(way: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor) -> None:
    """Multiply, and find the gradient of `hidden`."""
    torch.autograd.grad(way(hidden.requires_grad_(), weight).sum(), hidden)


def main() -> None:
    """Time both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--d-model", type=int, default=896)
    parser.add_argument("--d-ff", type=int, default=4864)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 512, 1536])
    parser.add_argument("--seconds", type=float, default=0.4, help="of each measurement")
    parser.add_argument("--backward", action="store_true", help="time the gradient of the input, too")
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
            if n * d_out > 2**27:
                continue
            hidden = torch.randn(n, d_in)
            run, operations = (
                (backward, 4 * n * d_in * d_out) if arguments.backward else (forward, 2 * n * d_in * d_out)
            )
            plain, ours = (
                rate(functools.partial(run, way, hidden, weight), operations=operations, seconds=arguments.seconds)
                for way in (linear, machine.product)
            )
            with torch.inference_mode():
                exact = hidden.double() @ weight.double().T
                errors = [error(way(hidden, weight), exact) for way in (linear, machine.product)]
            print(
                f"{n:5} x {d_in} x {d_out}: torch {plain:.0f}, ours {ours:.0f} billion a second, {ours / plain:.2f} "
                f"times; errors {errors[0]:.0e}, {errors[1]:.0e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
