"""Strengths by gradient: the least KL on harmless replies under growing pressure on the refusal score.

Everything is teacher-forced, so a step is one pass over a few rows and one backwards, and nothing is drawn at random:
the same model and prompts give the same strengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from abliterate.interventions.soft_edit import SoftEdit
from abliterate.models.chat_model import ChatModel

if TYPE_CHECKING:
    from jaxtyping import Float

BATCH = 12
"""Rows of each kind in a step."""
LEARNING_RATE = 0.15
START = 0.7
"""Strength of all layers and roles at the first step."""
MARGIN = 3.5
"""So many nats below its zero the refusal score of a prompt is low enough: softplus presses little from there on."""
DIGITS = 4
"""Strengths are rounded to so many decimals, so that what is measured is what the file says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseReplies:
    """Prompts with the base's own replies, which are to stay, and what the base predicts there.

    Attributes:
        rows: token ids of prompts and replies.
        lengths: tokens of each reply.
        base: log-probabilities of the unchanged model at the reply's tokens, [length, vocab] of each.
    """

    rows: list[list[int]]
    lengths: list[int]
    base: list[Float[Tensor, "length vocab"]]


def reply_logits(
    chat: ChatModel, rows: Sequence[Sequence[int]], lengths: Sequence[int]
) -> list[Float[Tensor, "length vocab"]]:
    """Return the logits that predict the last tokens of each row, float32; gradients flow.

    Args:
        chat: the model.
        rows: token ids of prompts with their replies.
        lengths: of how many last tokens of each row.
    """
    found = chat.differentiable_logits(rows, [length + 1 for length in lengths])
    return [row[:-1].float() for row in found]


def last_logits(chat: ChatModel, rows: Sequence[Sequence[int]]) -> Float[Tensor, "n vocab"]:
    """Return the logits behind the last token of each row, float32; gradients flow."""
    return torch.cat(chat.differentiable_logits(rows, [1] * len(rows))).float()


def log_odds(logits: Float[Tensor, "n vocab"], token_ids: Sequence[int]) -> Float[Tensor, " n"]:
    """Return the refusal metric, log P - log(1 - P) of the tokens; with a gradient wherever P is 1 or 0."""
    listed = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    listed[list(token_ids)] = True
    refusing = logits.masked_fill(~listed, -torch.inf).logsumexp(dim=-1)
    other = logits.masked_fill(listed, -torch.inf).logsumexp(dim=-1)
    return refusing - other


def read_base(chat: ChatModel, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]]) -> BaseReplies:
    """Return what the unchanged model predicts in its own replies."""
    rows = [[*prompt, *reply] for prompt, reply in zip(prompts, replies, strict=True)]
    lengths = [len(reply) for reply in replies]
    base: list[Tensor] = []
    with torch.no_grad():
        for start in range(0, len(rows), BATCH):
            found = reply_logits(chat, rows[start : start + BATCH], lengths[start : start + BATCH])
            # Half the memory; what rounding does to a probability is far below what an edit does.
            base += [torch.log_softmax(logits, dim=-1).half().cpu() for logits in found]
    return BaseReplies(rows=rows, lengths=lengths, base=base)


def compare(
    chat: ChatModel, replies: BaseReplies, indices: Sequence[int]
) -> list[tuple[Float[Tensor, " length"], Float[Tensor, " length"]]]:
    """Return of some replies KL(base || model) and -log p of the reply, each at each token, in nats; gradients flow."""
    found = reply_logits(chat, [replies.rows[i] for i in indices], [replies.lengths[i] for i in indices])
    pairs = []
    for i, logits in zip(indices, found, strict=True):
        base, predicted = replies.base[i].to(logits.device).float(), torch.log_softmax(logits, dim=-1)
        pairs.append(((base.exp() * (base - predicted)).sum(dim=-1), -at_reply(predicted, replies, i)))
    return pairs


def at_reply(values: Float[Tensor, "length vocab"], replies: BaseReplies, index: int) -> Float[Tensor, " length"]:
    """Return the values at a reply's own tokens."""
    tokens = torch.tensor(replies.rows[index][-replies.lengths[index] :], device=values.device)
    return values.gather(1, tokens[:, None]).squeeze(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """One optimisation, point by point along the frontier.

    Attributes:
        chat: the model.
        edit: where strengths act.
        to_answer: token ids of prompts that the model refuses and is to answer.
        to_stay: replies that are to stay.
        token_ids: what the refusal metric asks for.
        zero: the metric's zero, in nats.
    """

    chat: ChatModel
    edit: SoftEdit
    to_answer: list[list[int]]
    to_stay: BaseReplies
    token_ids: Sequence[int]
    zero: float = 0.0

    def points(
        self,
        pressures: Sequence[float],
        *,
        steps: int,
        advance: Callable[[int], None],
        known: Mapping[float, Float[Tensor, "n_layers 2"]] | None = None,
    ) -> Iterator[tuple[float, Float[Tensor, "n_layers 2"]]]:
        """Yield the strengths of one pressure after another, each begun at the one before; not rounded.

        Args:
            pressures: weights of the refusal score, from the strongest.
            steps: of the first; see `further_steps`.
            advance: is told of steps.
            known: strengths that an interrupted search had found.
        """
        strengths = torch.full((self.edit.n_layers, 2), START)
        for number, pressure in enumerate(pressures):
            n = steps if number == 0 else further_steps(steps)
            found = (known or {}).get(pressure)
            if found is None:
                strengths = self._minimise(strengths, pressure, steps=n, advance=advance)
            else:
                strengths = found
                advance(n)
            yield pressure, strengths

    def _minimise(
        self, start: Tensor, pressure: float, *, steps: int, advance: Callable[[int], None]
    ) -> Float[Tensor, "n_layers 2"]:
        strengths = start.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([strengths], lr=LEARNING_RATE, betas=(0.8, 0.95))
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * (1 - step / steps)
            optimizer.zero_grad()
            with self.edit.applied(strengths):
                # One after the other, so that one graph alone is in memory.
                self._damage(step).backward()  # type: ignore[no-untyped-call]
                (pressure * self._refusal(step)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            advance(1)
        return strengths.detach()

    def _damage(self, step: int) -> Tensor:
        pairs = compare(self.chat, self.to_stay, _turn(step, len(self.to_stay.rows)))
        # The first token decides where a reply goes, so it counts twice.
        return torch.stack([(kl.sum() + kl[0]) / (len(kl) + 1) for kl, _ in pairs]).mean()

    def _refusal(self, step: int) -> Tensor:
        logits = last_logits(self.chat, [self.to_answer[i] for i in _turn(step, len(self.to_answer))])
        return torch.nn.functional.softplus(log_odds(logits, self.token_ids) - self.zero + MARGIN).mean()


def further_steps(steps: int) -> int:
    """Return how many steps a point takes that begins at the one before: half of those of the first."""
    return max(1, steps // 2)


def rounded(strengths: Float[Tensor, "n_layers 2"]) -> Float[Tensor, "n_layers 2"]:
    """Return strengths as the file says them."""
    return strengths.mul(10**DIGITS).round().div(10**DIGITS)


def _turn(step: int, n: int) -> list[int]:
    """Return which of n rows a step takes: all in turn."""
    return [(step * BATCH + i) % n for i in range(min(BATCH, n))]
