"""How far a model is from refusing, without generating: the refusal metric, and what it is made of.

The *refusal metric* is the log-odds that the first answer token is a refusal token; it needs one forward pass and
drives the selection (Arditi et al. 2024, section 2.4). Where refusals do not begin with few tokens of their own, the
same is asked of the *openings* that the model refuses with: the log-odds that one of them follows, each forced token
by token. What is asked is a `RefusalMeasure`; `behaviour` decides which. The *refusal rate*, another thing, counts
completions that contain a refusal substring (section 2.3).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from abliterate.errors import InputError
from abliterate.models.chat_model import ChatModel
from abliterate.models.hooks import Recording

EPSILON = 1e-8
"""Added inside both logarithms, so the metric is clamped to +-18.4207 (the published code's value)."""

LOGITS_AT_ONCE = 1 << 25
"""Of so many logits probabilities are computed at a time on a GPU: 256 MB of float64, and a few times that."""

MIN_PROBABILITY_GAP = 0.05
MIN_PROBABILITY_RATIO = 3.0
MAX_REFUSAL_TOKENS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusalToken:
    """A token that starts refusals: its mean first-token probability on harmful and on harmless prompts."""

    token_id: int
    text: str
    harmful_probability: float
    harmless_probability: float


def refusal_metric(logits: Tensor, *, token_ids: Sequence[int]) -> Tensor:
    """Return log P - log(1 - P) with P the probability of all refusal tokens together.

    Args:
        logits: [..., vocab], the logits at the last prompt position.
        token_ids: the refusal tokens.

    Returns:
        float64 tensor [...], in nats, within +-18.4207.
    """
    found = [torch.softmax(rows.to(torch.float64), dim=-1)[:, list(token_ids)].sum(dim=-1) for rows in in_parts(logits)]
    refusal = torch.cat(found).reshape(logits.shape[:-1])
    return torch.log(refusal + EPSILON) - torch.log(1 - refusal + EPSILON)


def in_parts(logits: Tensor) -> list[Tensor]:
    """Return the rows of logits [..., vocab] in parts [n, vocab], of which to compute in float64: on a CPU one by one.

    What is computed of one row on the way stays in the processor's cache; of a batch it would be memory asked for anew
    at each step, which takes several times as long.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    step = max(1, LOGITS_AT_ONCE // rows.shape[-1]) if rows.is_cuda else 1
    return [rows[start : start + step] for start in range(0, max(1, len(rows)), step)]


def find_refusal_tokens(*, harmful_logits: Tensor, harmless_logits: Tensor) -> list[tuple[int, float, float]]:
    """Find the tokens that start an answer to harmful prompts and not to harmless ones.

    A token counts when its mean first-token probability on harmful prompts exceeds the one on harmless prompts by
    0.05 and by a factor of 3; at most ten are kept, the largest difference first.

    Args:
        harmful_logits: [n_harmful, vocab] at the last prompt position.
        harmless_logits: [n_harmless, vocab].

    Returns:
        (token id, harmful probability, harmless probability), possibly empty.
    """
    harmful = _mean_probabilities(harmful_logits)
    harmless = _mean_probabilities(harmless_logits)
    gap = harmful - harmless
    found = []
    for token_id in torch.argsort(gap, descending=True)[:MAX_REFUSAL_TOKENS].tolist():
        p, q = float(harmful[token_id]), float(harmless[token_id])
        if p - q >= MIN_PROBABILITY_GAP and p >= MIN_PROBABILITY_RATIO * q:
            found.append((token_id, p, q))
    return found


def _mean_probabilities(logits: Tensor) -> Tensor:
    total = torch.zeros(logits.shape[-1], dtype=torch.float64)
    for row in logits:
        total += torch.softmax(row.to(torch.float64), dim=-1).cpu()
    return total / max(1, len(logits))


class RefusalMeasure(Protocol):
    """What is asked of the model about each prompt, and what its logits answer."""

    @property
    def n_logits(self) -> int:
        """How many of the last logits of each row are needed."""
        ...

    def ask(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return the rows to run for some prompts, the same number for each, prompt by prompt."""
        ...

    def read(self, logits: Tensor, indices: Tensor) -> Tensor:
        """Return one float64 value for each row that was run.

        Args:
            logits: [n, vocab], or [n, n_logits, vocab] where more than one is needed.
            indices: [n], which of the rows that `ask` returned they are of.
        """
        ...

    def combine(self, values: Tensor) -> Tensor:
        """Return the log-odds [..., n_prompts], in nats, of the values [..., n_rows] of all rows."""
        ...


@dataclass(frozen=True, slots=True)
class FirstTokens:
    """The published metric: the log-odds that the first answer token is one of these."""

    token_ids: tuple[int, ...]
    n_logits: int = 1

    def ask(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return the prompts themselves."""
        return [list(row) for row in rows]

    def read(self, logits: Tensor, indices: Tensor) -> Tensor:  # noqa: ARG002
        """Return `refusal_metric`."""
        return refusal_metric(logits, token_ids=self.token_ids)

    def combine(self, values: Tensor) -> Tensor:
        """Return the values."""
        return values


@dataclass(frozen=True, slots=True)
class Openings:
    """The log-odds that the answer goes on with one of some sequences of tokens, none of which begins with another.

    With sequences of one token it is the published metric, but for its epsilon: probabilities of several tokens
    together are far below that.
    """

    sequences: tuple[tuple[int, ...], ...]

    @property
    def n_logits(self) -> int:
        """How many of the last logits of each row are needed."""
        return max(map(len, self.sequences))

    def ask(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return each prompt with each sequence behind it, but for the sequence's last token."""
        return [[*row, *sequence[:-1]] for row in rows for sequence in self.sequences]

    def read(self, logits: Tensor, indices: Tensor) -> Tensor:
        """Return the log-probability of each row's sequence."""
        if logits.ndim == 2:
            logits = logits[:, None]
        found = torch.empty(len(logits), dtype=torch.float64, device=logits.device)
        for i, index in enumerate(indices.tolist()):
            sequence = self.sequences[index % len(self.sequences)]
            probabilities = torch.log_softmax(logits[i, -len(sequence) :].to(torch.float64), dim=-1)
            found[i] = probabilities.gather(1, torch.tensor(sequence, device=logits.device)[:, None]).sum()
        return found

    def combine(self, values: Tensor) -> Tensor:
        """Return the log-odds of all sequences together."""
        together = values.reshape(*values.shape[:-1], -1, len(self.sequences)).logsumexp(dim=-1)
        # Rounding can bring the sum of probabilities to 1.
        return together - torch.log(-torch.expm1(together.clamp(max=-EPSILON)))


@torch.inference_mode()
def measure_refusal(chat: ChatModel, measure: RefusalMeasure, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return the log-odds [n] of refusing after each row of token ids, of the model as it is now, hooks and all."""
    asked = measure.ask(rows)
    values = torch.empty(len(asked), dtype=torch.float64)

    def run(indices: list[int]) -> None:
        logits = chat.forward([asked[i] for i in indices], n_logits=measure.n_logits)
        values[indices] = measure.read(logits.float().cpu(), torch.tensor(indices))

    chat.for_batches([len(row) for row in asked], run)
    return measure.combine(values)


def refusal_tokens_of(
    *, chat: ChatModel, harmful: Recording, harmless: Recording, named: Sequence[str] = ()
) -> list[RefusalToken]:
    """Return the tokens that start refusals: those named, or those that tell harmful from harmless prompts.

    Args:
        chat: the model.
        harmful: recording of the harmful training prompts.
        harmless: recording of the harmless training prompts.
        named: token texts given by the user.

    Raises:
        InputError: a named text is not one token.
    """
    if named:
        ids = [_token_of(chat, text) for text in named]
    else:
        found = find_refusal_tokens(harmful_logits=harmful.logits, harmless_logits=harmless.logits)
        ids = [token_id for token_id, _, _ in found]
    return describe_tokens(ids, chat=chat, harmful=harmful, harmless=harmless)


def describe_tokens(
    token_ids: Sequence[int], *, chat: ChatModel, harmful: Recording, harmless: Recording
) -> list[RefusalToken]:
    """Return tokens with their text and their mean first-token probabilities on training prompts."""
    p, q = (_mean_probabilities(recording.logits) for recording in (harmful, harmless))
    return [
        RefusalToken(
            token_id=token_id,
            text=chat.decode([token_id], skip_special_tokens=False),
            harmful_probability=float(p[token_id]),
            harmless_probability=float(q[token_id]),
        )
        for token_id in token_ids
    ]


def _token_of(chat: ChatModel, text: str) -> int:
    ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise InputError(f"--refusal-token {text!r} is {len(ids)} tokens in this model's vocabulary; it must be one")
    return int(ids[0])
