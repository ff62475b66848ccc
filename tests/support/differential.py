"""What a tiny model gives in a batch and with a cache, beside what it gives alone and without."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from abliterate.architectures.table import feels_padding
from abliterate.models.chat_model import ChatModel
from abliterate.models.greedy import GreedyDecoder, can_continue, stop_tokens
from tests.support.conformance import as_chat, build_model, merge

# Long enough for a cache, of two lengths, alike at the start.
_START = [31, 7, 52, 19, 44, 23, 11, 38, 27]
ROWS = [[*_START, 9, 41, 16, 58, 33, 21, 48, 13, 29, 35, 6], [*_START, 55, 12, 40, 26]]
NOTHING = 1e-4
N_TOKENS = 5
# Theirs is attention to the best tokens of an index, here to all of them, as for prompts of ordinary length.
INDEXED: dict[str, dict[str, Any]] = {
    **{name: {"index_topk": 64} for name in ("axk2", "deepseek_v32", "glm_moe_dsa", "hy_v4")},
    "mistral_large4": {"text_config": {"index_topk": 64}},
}
# Their towers, which no text needs, read a config that the tiny one does not have.
NOT_RUN = ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What running a tiny model found.

    Attributes:
        equal_lengths: Batches hold rows of one length only.
        unlike_alone: Largest difference of log-probabilities between rows run together and each alone.
        by_generate: Replies are decoded by transformers' `generate`, in the place of our own decoder.
        same_replies: Replies that are decoded together, with a cache, are those of each row alone without one.
    """

    equal_lengths: bool
    unlike_alone: float
    by_generate: bool
    same_replies: bool


def shortcomings(result: RunResult) -> list[str]:
    """Return what docs/architectures.md promises of running a type and does not hold."""
    holds = {
        "rows in a batch give what each gives alone": result.unlike_alone < NOTHING,
        "a cache changes no reply": result.same_replies,
    }
    return [promise for promise, kept in holds.items() if not kept]


def make(model_type: str, **changes: Any) -> ChatModel:
    """Build a tiny model in float32: in float64 a row of a mask that holds nothing but its minimum can become NaN."""
    return as_chat(build_model(model_type, **merge(changes, INDEXED.get(model_type, {}))).float())


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference of log-probabilities."""
    one, other = (logits.double().log_softmax(dim=-1) for logits in (found, expected))
    assert not one.isnan().any()
    return float((one - other).abs().max())


def check_running(chat: ChatModel) -> RunResult:
    """Run rows together and alone, and decode them with a cache and without."""
    alone = torch.cat([chat.forward([row]) for row in ROWS])
    stops = stop_tokens(chat)
    replies = GreedyDecoder(chat=chat, max_new_tokens=N_TOKENS).replies(ROWS)
    return RunResult(
        equal_lengths=feels_padding(chat.model.config),
        unlike_alone=difference(chat.last_logits(ROWS), alone),
        by_generate=not can_continue(chat, ROWS, max_new_tokens=N_TOKENS),
        same_replies=replies == [_without_cache(chat, row, stops) for row in ROWS],
    )


@torch.no_grad()
def _without_cache(chat: ChatModel, row: list[int], stops: set[int]) -> list[int]:
    reply: list[int] = []
    while len(reply) < N_TOKENS:
        logits = chat.model(input_ids=torch.tensor([[*row, *reply]]), use_cache=False).logits[0, -1]
        token = int(logits.argmax())
        if token in stops:
            break
        reply.append(token)
    return reply
