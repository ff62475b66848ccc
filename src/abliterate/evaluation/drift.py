"""What else an edit changed: how far next-token distributions have moved, and the metrics that reports show.

Distributions are compared by KL to the base, and by the cross-entropy of given text. What page, table, JSON and card
show of it are the measurements of `METRICS`; a new metric is a function from `Findings` that is named there.

The base's distributions over its own answers are kept in an unnamed temporary file between the two models, so that
only one model need be in memory at a time. Only harmless prompts are compared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from abliterate.errors import InputError, ModelError
from abliterate.evaluation.recognition import Recognition
from abliterate.extraction.reply_classes import Reply
from abliterate.extraction.scoring import kl_divergence
from abliterate.models.chat_model import ChatModel

if TYPE_CHECKING:
    from jaxtyping import Float, Float32

Advance = Callable[[int], None] | None

CONTINUATION_TOKENS = 32
"""Tokens of each of the base's answers over which KL is taken. The distributions are kept whole, four bytes an entry:
144 prompts, 32 tokens and a vocabulary of 50,000 make 0.9 GB of temporary file."""
TEXT_TOKENS = 256
"""Tokens of each plain text, as in the paper."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEntropy:
    """Cross-entropy of given tokens in nats per token; `base` and `relative_change` are None without a base."""

    base: float | None
    model: float
    relative_change: float | None
    n_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """KL(base || model) of next-token distributions on harmless prompts, in nats a token.

    Attributes:
        first_token: mean over prompts, at the first token of the answer.
        continuation: mean over the first tokens of the base's own greedy answers, at most `per_prompt` of each.
        n_tokens: number of distributions behind `continuation`.
        per_prompt: the most tokens taken of one answer.
    """

    first_token: float
    continuation: float
    n_tokens: int
    per_prompt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Surprise:
    """Negative log-likelihood of some sequences: `nats` in total, over `tokens` tokens, one entry a sequence."""

    nats: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def mean(self) -> float | None:
        """Nats per token over all sequences together; None without tokens."""
        return sum(self.nats) / sum(self.tokens) if sum(self.tokens) else None

    def per_token(self, index: int) -> float | None:
        """Nats per token of one sequence; None if it is empty."""
        return self.nats[index] / self.tokens[index] if self.tokens[index] else None


def compare_surprise(base: Surprise | None, model: Surprise) -> CrossEntropy | None:
    """Put the cross-entropies of base and model beside each other; None without tokens."""
    before, after = None if base is None else base.mean, model.mean
    if after is None:
        return None
    return CrossEntropy(
        base=before,
        model=after,
        relative_change=None if not before else after / before - 1,
        n_tokens=sum(model.tokens),
    )


def completion_surprise(
    chat: ChatModel, rows: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], *, advance: Advance = None
) -> Surprise:
    """Return the negative log-likelihood of completions, given the rows before them.

    Args:
        chat: the model that is asked.
        rows: token ids that are given; at least one each.
        completions: token ids that follow each row.
        advance: called with the number of rows done.
    """
    nats = [0.0] * len(rows)
    said = [i for i, completion in enumerate(completions) if completion]
    if advance is not None:
        advance(len(rows) - len(said))

    def measure(index: int, logits: Float[Tensor, "n_tokens vocab"]) -> None:
        nats[said[index]] = _nats(logits, completions[said[index]])

    if said:
        _for_each(chat, [rows[i] for i in said], [completions[i] for i in said], measure, advance)
    return Surprise(nats=tuple(nats), tokens=tuple(map(len, completions)))


def text_surprise(chat: ChatModel, texts: Sequence[str], *, advance: Advance = None) -> Surprise:
    """Return the negative log-likelihood of plain texts, without any template, at most 256 tokens of each.

    The first token of each is given and not scored: it is the BOS token where the tokenizer puts one.

    Raises:
        ModelError: the tokenizer gives ids beyond the model's embedding.
    """
    encoded = [list(chat.tokenizer(text)["input_ids"])[:TEXT_TOKENS] for text in texts]
    chat.check_tokens(encoded, texts)
    encoded = [ids for ids in encoded if len(ids) > 1]
    return completion_surprise(chat, [ids[:1] for ids in encoded], [ids[1:] for ids in encoded], advance=advance)


class BaseDistributions:
    """The base's next-token distributions over the start of its own answers; use it as a context manager.

    Args:
        rows: token ids of the rendered prompts.
        completions: the base's answers to them.
        per_prompt: how many tokens of each answer to take; the first one is taken even of an empty answer.
    """

    def __init__(
        self,
        *,
        rows: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        per_prompt: int = CONTINUATION_TOKENS,
    ) -> None:
        self._rows = rows
        self._completions = completions
        self._per_prompt = per_prompt
        self._offsets: dict[int, int] = {}
        self._vocabulary = 0
        self._file: IO[bytes] | None = None

    def __enter__(self) -> BaseDistributions:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def record(self, chat: ChatModel, *, advance: Advance = None) -> Surprise:
        """Run the base, keep its distributions, and return what it finds of its own answers.

        Raises:
            InputError: there is no room for the temporary file.
        """
        self._file = file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__

        def keep(index: int, logits: Float[Tensor, "n_tokens vocab"]) -> None:
            self._vocabulary = logits.shape[-1]
            self._offsets[index] = file.tell()
            file.write(logits.float().cpu().numpy().tobytes())

        try:
            return self._run(chat, keep, advance)
        except OSError as error:
            raise InputError(
                f"no room for the base's distributions in {tempfile.gettempdir()} ({error.strerror or error}); "
                "set TMPDIR to a folder on a larger disk"
            ) from error

    def compare(self, chat: ChatModel, *, advance: Advance = None) -> tuple[Divergence, Surprise]:
        """Run the model on the same tokens; return its divergence from the base, and what it finds of the answers.

        Raises:
            ModelError: its vocabulary has another size than the base's.
        """
        found: dict[int, Tensor] = {}

        def measure(index: int, logits: Float[Tensor, "n_tokens vocab"]) -> None:
            if logits.shape[-1] != self._vocabulary:
                raise ModelError(
                    f"the model has {logits.shape[-1]} output tokens and the base {self._vocabulary}; "
                    "they cannot be compared: give the base it was made from"
                )
            found[index] = kl_divergence(self._read(index, len(logits)), logits.cpu())

        surprise = self._run(chat, measure, advance)
        tokens = torch.cat(list(found.values()))
        divergence = Divergence(
            first_token=sum(float(divergence[0]) for divergence in found.values()) / len(found),
            continuation=float(tokens.mean()),
            n_tokens=len(tokens),
            per_prompt=self._per_prompt,
        )
        return divergence, surprise

    def _read(self, index: int, n_tokens: int) -> Float32[Tensor, "n_tokens vocab"]:
        assert self._file is not None
        self._file.seek(self._offsets[index])
        content = self._file.read(4 * n_tokens * self._vocabulary)
        return torch.from_numpy(np.frombuffer(bytearray(content), dtype=np.float32).reshape(n_tokens, -1))

    def _run(
        self, chat: ChatModel, receive: Callable[[int, Float[Tensor, "n_tokens vocab"]], None], advance: Advance
    ) -> Surprise:
        """Run a model over the answers once: `receive` gets the first distributions of each."""
        nats = [0.0] * len(self._rows)

        def measure(index: int, logits: Float[Tensor, "n_tokens vocab"]) -> None:
            receive(index, logits[: self._per_prompt])
            nats[index] = _nats(logits, self._completions[index])

        _for_each(chat, self._rows, self._completions, measure, advance)
        return Surprise(nats=tuple(nats), tokens=tuple(map(len, self._completions)))


def _nats(logits: Float[Tensor, "n_tokens vocab"], completion: Sequence[int]) -> float:
    """Return the negative log-likelihood of a completion by the logits of its tokens; 0 of an empty one."""
    target = torch.tensor(list(completion), device=logits.device)
    return float(cross_entropy(logits.float(), target, reduction="sum")) if completion else 0.0


@torch.inference_mode()
def _for_each(
    chat: ChatModel,
    rows: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    receive: Callable[[int, Float[Tensor, "n_tokens vocab"]], None],
    advance: Advance,
) -> None:
    """Hand over the logits of each token of each completion; of an empty one, those of the token that it lacks.

    Tokens that all rows begin with are run once.
    """
    # The distribution of a token needs those before it, and not the token itself.
    given = [[*row, *completion[:-1]] for row, completion in zip(rows, completions, strict=True)]
    counts = [max(1, len(completion)) for completion in completions]
    cache, n_cached = chat.share_prefix(given, keep=counts)

    def run(indices: list[int]) -> None:
        longest = max(counts[i] for i in indices)
        logits = chat.forward(
            [given[i][n_cached:] for i in indices], cache=cache, n_cached=n_cached, n_logits=longest
        ).view(len(indices), longest, -1)
        for row, i in enumerate(indices):
            receive(i, logits[row, -counts[i] :])
        if advance is not None:
            advance(len(indices))

    # Logits take more memory than what stands before them.
    lengths = [len(tokens) - n_cached for tokens in given]
    costs = [n + chat.cached_share(n_cached) + 4 * count for n, count in zip(lengths, counts, strict=True)]
    chat.for_batches(costs, run, widths=lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One number about harmless behaviour.

    Attributes:
        name: what it is, in words, for a row of a table.
        unit: such as nats a token.
        model: of the model that was evaluated.
        base: of the base; None where it is a comparison already, or there is none.
        relative_change: (model - base) / base; None likewise.
    """

    name: str
    unit: str
    model: float
    base: float | None = None
    relative_change: float | None = None

    def cells(self) -> tuple[str, str, str, str, str]:
        """Return name, unit, base, model and change as a table shows them."""
        base = "" if self.base is None else f"{self.base:.4f}"
        change = "" if self.relative_change is None else f"{self.relative_change:+.1%}"
        return self.name, self.unit, base, f"{self.model:.4f}", change


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What metrics are made of.

    Attributes:
        divergence: KL to the base on harmless prompts; None without a base.
        own_answers: cross-entropy of the base's own harmless answers; None without a base.
        texts: SPEC -> cross-entropy of plain text.
        recognition: how well the model's verdict tells harmful from harmless prompts; None where it has none.
        least_divergence: KL to the base at the first token as far as the likeliest tokens show it; None without them.
        replies: kind of prompts -> the model's replies.
        base_replies: the same of the base; None without one.
    """

    divergence: Divergence | None
    own_answers: CrossEntropy | None
    texts: Mapping[str, CrossEntropy]
    recognition: Recognition | None = None
    least_divergence: float | None = None
    replies: Mapping[str, Sequence[Reply]]
    base_replies: Mapping[str, Sequence[Reply]] | None


Metric = Callable[[Findings], Iterator[Measurement]]
NATS = "nats a token"


def divergences(findings: Findings) -> Iterator[Measurement]:
    """Yield KL(base || model) at the first token of harmless answers, and over the base's own."""
    if findings.divergence is not None:
        found = findings.divergence
        yield Measurement(name="KL(base || model), harmless, first token", unit=NATS, model=found.first_token)
        yield Measurement(
            name=f"KL(base || model), harmless, the base's answers (up to {found.per_prompt} tokens)",
            unit=NATS,
            model=found.continuation,
        )
    if findings.least_divergence is not None:
        yield Measurement(
            name="KL(base || model), harmless, first token: at least, by the likeliest tokens",
            unit=NATS,
            model=findings.least_divergence,
        )


def cross_entropies(findings: Findings) -> Iterator[Measurement]:
    """Yield the cross-entropy of the base's own harmless answers, and of plain texts."""
    named = {f"texts {spec}": entropy for spec, entropy in findings.texts.items()}
    if findings.own_answers is not None:
        named = {"the base's own harmless answers": findings.own_answers, **named}
    for name, entropy in named.items():
        yield Measurement(
            name=f"cross-entropy, {name}",
            unit=NATS,
            model=entropy.model,
            base=entropy.base,
            relative_change=entropy.relative_change,
        )


def harm_recognition(findings: Findings) -> Iterator[Measurement]:
    """Yield how well the model's own yes or no tells harmful from harmless prompts."""
    found = findings.recognition
    if found is not None:
        yield Measurement(
            name="harmful told from harmless by its own yes or no",
            unit="AUC",
            model=found.model.auc,
            base=None if found.base is None else found.base.auc,
        )


METRICS: tuple[Metric, ...] = (divergences, cross_entropies, harm_recognition)


def measure(findings: Findings) -> tuple[Measurement, ...]:
    """Return what all metrics find."""
    return tuple(measurement for metric in METRICS for measurement in metric(findings))
