"""What a running model shows of an edit: directions in its residual stream, and logits beside other logits."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abliterate.models.chat_model import ChatModel
from abliterate.models.hooks import capture_stream

# Positions whose logits are held in float64 at a time: 2 x 32 x 262,144 entries are 134 MB.
_POSITIONS_AT_ONCE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamComponents:
    """How much of some directions a model's residual stream has: |R h|/|h|.

    Attributes:
        largest: Largest value over all tokens at the input of each block, and last before the final norm.
        mean: Mean over all tokens at the same places.
        accumulated: Largest |R h| over the largest |h| that the same token has had so far. Rounding adds up in
            proportion to |h|, and stays where a later layer takes most of |h| away.
        n_tokens: Number of tokens.
        dtype: What the model ran in, as torch names it.
    """

    largest: tuple[float, ...]
    mean: tuple[float, ...]
    accumulated: tuple[float, ...]
    n_tokens: int
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitDifference:
    """How far one model's logits are from another's, over a number of positions.

    Attributes:
        n_positions: Number of positions.
        kl_mean: Mean of KL(first || second) in nats.
        kl_max: Its largest value.
        largest: Largest difference of two logits.
        relative: |difference| / |logits - their mean|, norms over all positions and the vocabulary: 0 for equal
            models, near 1.4 for unrelated ones.
    """

    n_positions: int
    kl_mean: float
    kl_max: float
    largest: float
    relative: float


@dataclass(slots=True, kw_only=True)
class LogitComparison:
    """Adds up differences of logits position by position; `result` says what they come to."""

    n_positions: int = 0
    kl_sum: float = 0.0
    kl_max: float = 0.0
    largest: float = 0.0
    difference_squared: float = 0.0
    scale_squared: float = 0.0

    def add(self, first: Tensor, second: Tensor) -> None:
        """Compare logits [n, vocab] of the same positions."""
        chunks = (torch.split(logits, _POSITIONS_AT_ONCE) for logits in (first, second))
        for a, b in zip(*chunks, strict=True):
            p, q = torch.log_softmax(a.double(), dim=-1), torch.log_softmax(b.double(), dim=-1)
            # A logit of minus infinity (a masked token) in both has no part in the divergence.
            terms = torch.where(p.isneginf(), 0.0, p.exp() * (p - q))
            kl = terms.sum(dim=-1).clamp(min=0.0)
            finite = torch.where((a == b) & a.isinf(), 0.0, a.double() - b.double())
            centred = torch.where(a.isinf(), 0.0, a.double())
            centred = centred - centred.mean(dim=-1, keepdim=True)
            self.n_positions += len(a)
            self.kl_sum += float(kl.sum())
            self.kl_max = _larger(self.kl_max, float(kl.max()))
            self.largest = _larger(self.largest, float(finite.abs().max()))
            self.difference_squared += float(finite.square().sum())
            self.scale_squared += float(centred.square().sum())

    def result(self) -> LogitDifference:
        """Return what was added up."""
        return LogitDifference(
            n_positions=self.n_positions,
            kl_mean=self.kl_sum / self.n_positions,
            kl_max=self.kl_max,
            largest=self.largest,
            relative=math.sqrt(self.difference_squared / self.scale_squared) if self.scale_squared else 0.0,
        )


@torch.inference_mode()
def run_prompts(
    chat: ChatModel,
    rows: Sequence[Sequence[int]],
    *,
    subspace: Tensor,
    receive: Callable[[int, Tensor], None] | None = None,
    advance: Callable[[int], None] | None = None,
) -> StreamComponents:
    """Run prompts one by one and measure |R h|/|h| (float64) in the stream, in the dtype the model runs in.

    Args:
        chat: The model, perhaps under an intervention.
        rows: Token ids.
        subspace: R, [k, d_model], orthonormal rows.
        receive: Called with each row's index and its logits [tokens, vocab], float32 on the CPU.
        advance: Called with the number of prompts done.
    """
    basis = subspace.double().cpu()
    places = chat.n_layers + 1
    largest, accumulated, total, counts = [0.0] * places, [0.0] * places, [0.0] * places, [0] * places
    peak = torch.zeros(0, dtype=torch.float64)

    def measure(place: int, hidden: Tensor) -> None:
        nonlocal peak
        # Some models hold several streams side by side.
        wide = hidden.detach().cpu().double().reshape(-1, basis.shape[-1])
        norms, along = wide.norm(dim=-1), (wide @ basis.T).norm(dim=-1)
        peak = torch.maximum(peak, norms) if place and peak.shape == norms.shape else norms
        shares = torch.where(norms == 0, 0.0, along / norms)
        largest[place] = _larger(largest[place], float(shares.max()))
        accumulated[place] = _larger(accumulated[place], float(torch.where(peak == 0, 0.0, along / peak).max()))
        total[place] += float(shares.sum())
        counts[place] += len(shares)

    with capture_stream(chat, measure):
        for index, row in enumerate(rows):
            ids = torch.tensor([list(row)], device=chat.device)
            logits = chat.model(input_ids=ids, use_cache=False).logits[0]
            if receive is not None:
                receive(index, logits.float().cpu())
            if advance is not None:
                advance(1)
    return StreamComponents(
        largest=tuple(largest),
        mean=tuple(amount / max(1, count) for amount, count in zip(total, counts, strict=True)),
        accumulated=tuple(accumulated),
        n_tokens=sum(len(row) for row in rows),
        dtype=str(chat.model.dtype).removeprefix("torch."),
    )


def _larger(first: float, second: float) -> float:
    # `max` would lose a NaN, and a model that computes NaN must not pass for a clean one.
    return second if math.isnan(second) or second > first else first
