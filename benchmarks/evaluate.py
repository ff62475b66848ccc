"""Replies decoded side by side, as `evaluate` generates them, beside plain `generate`, on one model in one run.

    python benchmarks/evaluate.py MODEL [--max-new-tokens 32,128] [--every 1] [--threads 1]

Both reply to the bundled harmless test prompts, one after the other, and the replies are compared token by token.
Loading the model is not timed. No reply is kept.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from abliterate.models.chat_model import ChatModel
from abliterate.models.greedy import GreedyDecoder
from abliterate.models.loading import load_chat_model
from abliterate.models.options import ModelOptions
from abliterate.prompt_sets import load_prompt_set

T = TypeVar("T")


def main() -> None:
    """Run both and print a line for each length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--max-new-tokens", default="32,128", help="lengths, by commas")
    parser.add_argument("--every", type=int, default=1, help="take every n-th prompt")
    parser.add_argument("--threads", type=int, help="default: what torch takes by itself")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    chat = load_chat_model(arguments.model, name=str(arguments.model), options=ModelOptions())
    rows = chat.encode(load_prompt_set("bundled", kind="harmless", part="test").texts[:: arguments.every])
    for length in map(int, arguments.max_new_tokens.split(",")):
        (ours, wall, cpu), (plain, plain_wall, plain_cpu) = (
            timed(partial(side_by_side, chat, rows, max_new_tokens=length)),
            timed(partial(chat.generate, rows, max_new_tokens=length)),
        )
        same = sum(one == other for one, other in zip(ours, plain, strict=True))
        mean = sum(map(len, ours)) / len(ours)
        print(
            f"{length} new tokens (mean {mean:.1f}), {len(rows)} prompts: generate takes {plain_wall / wall:.2f} times "
            f"as long ({plain_cpu / cpu:.2f} of CPU time); {same} of {len(rows)} replies are the same",
            flush=True,
        )


def side_by_side(chat: ChatModel, rows: list[list[int]], *, max_new_tokens: int) -> list[list[int]]:
    """Return the replies as `evaluate` generates them."""
    return GreedyDecoder(chat=chat, max_new_tokens=max_new_tokens).replies(rows)


def timed(run: Callable[[], T]) -> tuple[T, float, float]:
    """Return what `run` returns, and its wall and CPU time in seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = run()
    return found, time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    main()
