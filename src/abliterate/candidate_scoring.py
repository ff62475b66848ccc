"""The three scores of a candidate direction: bypass, induce and KL (Arditi et al. 2024, section 2.3, appendix C).

Nothing is approximated: the same forward passes as the published procedure, with the tokens that all prompts share
run once per candidate, logits at the last token only, and activation addition restarted at its own block.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from abliterate.interventions import (
    ablate_direction,
    add_direction,
    blocks_return_tuples,
    capture_inputs,
    start_at_block,
)
from abliterate.model import ChatModel
from abliterate.refusal_metric import refusal_metric

KL_EPSILON = 1e-6
"""Added inside both logarithms of the KL divergence (the published code's value)."""


def kl_divergence(base_logits: Tensor, logits: Tensor) -> Tensor:
    """Return KL(base || other) of next-token distributions, in nats, float64.

    Args:
        base_logits: [..., vocab].
        logits: [..., vocab].
    """
    p = torch.softmax(base_logits.to(torch.float64), dim=-1)
    q = torch.softmax(logits.to(torch.float64), dim=-1)
    return (p * (torch.log(p + KL_EPSILON) - torch.log(q + KL_EPSILON))).sum(dim=-1)


class CandidateScorer:
    """Computes scores of candidates on the validation prompts.

    Args:
        chat: the model.
        candidates: [n_pos, n_layers, d_model], un-normalised; positions -n_pos .. -1.
        harmful_rows: token ids of the harmful validation prompts.
        harmless_rows: token ids of the harmless validation prompts.
        token_ids: the refusal tokens.
    """

    def __init__(
        self,
        *,
        chat: ChatModel,
        candidates: Tensor,
        harmful_rows: Sequence[Sequence[int]],
        harmless_rows: Sequence[Sequence[int]],
        token_ids: Sequence[int],
    ) -> None:
        self._chat = chat
        self._candidates = candidates
        self._harmful_rows = harmful_rows
        self._harmless_rows = harmless_rows
        self._token_ids = token_ids
        self._stream = _ResidualStream(chat, harmless_rows)
        self.base_harmless_logits = self._stream.logits

    def candidate(self, position: int, layer: int) -> Tensor:
        """Return the un-normalised candidate [d_model]."""
        return self._candidates[position, layer]

    def bypass(self, position: int, layer: int) -> float:
        """Return the mean refusal metric on the harmful prompts with the candidate ablated everywhere."""
        with ablate_direction(self._chat, self.candidate(position, layer)):
            logits = self._chat.last_logits(self._harmful_rows)
        return float(refusal_metric(logits, token_ids=self._token_ids).mean())

    def kl(self, position: int, layer: int) -> float:
        """Return the mean KL(base || ablated) of the first answer token on the harmless prompts, in nats."""
        with ablate_direction(self._chat, self.candidate(position, layer)):
            logits = self._chat.last_logits(self._harmless_rows)
        return float(kl_divergence(self.base_harmless_logits, logits).mean())

    def induce(self, position: int, layer: int) -> float:
        """Return the mean refusal metric on the harmless prompts with the candidate added at its own layer."""
        logits = self._stream.logits_with_addition(self.candidate(position, layer), layer=layer)
        return float(refusal_metric(logits, token_ids=self._token_ids).mean())


class _ResidualStream:
    """The residual stream of some prompts at every block's input, so that a pass can start at any block.

    Attributes:
        logits: [n, vocab] of the unchanged model.
    """

    def __init__(self, chat: ChatModel, rows: Sequence[Sequence[int]]) -> None:
        self._chat = chat
        self._n_rows = len(rows)
        self._tuple_output = blocks_return_tuples(chat)
        self._prefix_hidden: list[Tensor] = []
        with capture_inputs(chat, lambda _layer, hidden: self._prefix_hidden.append(hidden)):
            self._cache, self._n_cached = chat.share_prefix(rows)
        self._prefix = list(rows[0][: self._n_cached])
        self._batches: list[tuple[list[int], list[list[int]], list[Tensor]]] = []
        results: list[Tensor] = []

        def run(indices: list[int]) -> None:
            batch = [list(rows[i][self._n_cached :]) for i in indices]
            inputs: list[Tensor] = []
            with capture_inputs(chat, lambda _layer, hidden: inputs.append(hidden)):
                results.append(chat.forward(batch, cache=self._cache, n_cached=self._n_cached))
            self._batches.append((indices, batch, inputs))

        chat.for_batches([len(row) - self._n_cached for row in rows], run)
        self.logits = self._in_order(results)

    def logits_with_addition(self, vector: Tensor, *, layer: int) -> Tensor:
        """Return the logits [n, vocab] with `vector` added to the input of block `layer` at all positions."""
        chat = self._chat
        cache = None
        if self._cache is not None:
            with self._from_block(layer, self._prefix_hidden[layer], vector):
                cache = chat.run_prefix(self._prefix)
            # The blocks that were skipped have cached nothing; theirs is the unchanged model's.
            if cache is not None:
                cache.layers[:layer] = self._cache.layers[:layer]
        results = []
        for _, batch, inputs in self._batches:
            with self._from_block(layer, inputs[layer], vector):
                results.append(chat.forward(batch, cache=cache, n_cached=self._n_cached))
        return self._in_order(results)

    @contextmanager
    def _from_block(self, layer: int, hidden: Tensor, vector: Tensor) -> Iterator[None]:
        with (
            start_at_block(self._chat, hidden, layer=layer, tuple_output=self._tuple_output),
            add_direction(self._chat, vector, layer=layer),
        ):
            yield

    def _in_order(self, results: list[Tensor]) -> Tensor:
        logits = torch.empty(self._n_rows, results[0].shape[-1])
        for (indices, _, _), result in zip(self._batches, results, strict=True):
            logits[indices] = result.float().cpu()
        return logits
