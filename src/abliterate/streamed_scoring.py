"""Recordings and scores of a model whose layers are streamed: the same values, from a fixed number of readings.

One reading of the weights records all prompts, one adds every candidate at its own layer, one ablates every candidate
that is left; see `streamed_model`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from abliterate.candidate_scoring import kl_divergence
from abliterate.models.hooks import Recording
from abliterate.models.streamed_model import StreamedChat, Variant
from abliterate.refusal_metric import refusal_metric
from abliterate.selection import Candidate, PromptScores, ScoreName


@torch.inference_mode()
def record_streamed(chat: StreamedChat, rows: Sequence[Sequence[int]]) -> Recording:
    """Run the prompts once, as `activations.record` does; reads the weights once.

    Args:
        chat: the model.
        rows: token ids of the rendered prompts.
    """
    n_positions = chat.chat_format.n_positions
    activations = torch.zeros(len(rows), n_positions, chat.n_layers, chat.d_model, dtype=chat.model.dtype)

    def keep(layer: int, indices: list[int], hidden: Tensor) -> None:
        activations[indices, :, layer] = hidden[:, -n_positions:].cpu()

    last = chat.last_hidden(rows, [Variant()], watch=keep, what="Recording, layer by layer")
    return Recording(activations=activations, logits=next(chat.logits(last)))


class StreamedScorer:
    """Computes scores of candidates on the validation prompts; each call of `score` reads the weights once.

    Args:
        chat: the model.
        candidates: [n_pos, n_layers, d_model], un-normalised; positions -n_pos .. -1.
        harmful_rows: token ids of the harmful validation prompts.
        harmless_rows: token ids of the harmless validation prompts.
        base_harmless_logits: the unchanged model's, [n_harmless, vocab].
        token_ids: the refusal tokens.
    """

    kl_at_once: int | None = None

    def __init__(
        self,
        *,
        chat: StreamedChat,
        candidates: Tensor,
        harmful_rows: Sequence[Sequence[int]],
        harmless_rows: Sequence[Sequence[int]],
        base_harmless_logits: Tensor,
        token_ids: Sequence[int],
    ) -> None:
        self._chat = chat
        self._candidates = candidates
        self._harmful_rows = harmful_rows
        self._harmless_rows = harmless_rows
        self._base = base_harmless_logits
        self._token_ids = token_ids

    def groups(self, score: ScoreName, candidates: Sequence[Candidate]) -> list[list[Candidate]]:  # noqa: ARG002
        """Return all candidates as one group: they share one reading of the weights."""
        return [list(candidates)]

    def score(self, score: ScoreName, candidates: Sequence[Candidate]) -> list[PromptScores]:
        """Return the values of a score for each candidate, prompt by prompt; all but induce gives bypass and KL."""
        vectors = [self._candidates[key] for key in candidates]
        if score == "induce":
            added = [Variant(start=key[1], added=v) for key, v in zip(candidates, vectors, strict=True)]
            last = self._chat.last_hidden(self._harmless_rows, added, what="Induce, layer by layer")
            return [{"induce": self._metric(logits)} for logits in self._chat.logits(last)]
        return self._ablated([(vector / vector.norm())[None] for vector in vectors], "Bypass and KL, layer by layer")

    def score_together(self, basis: Tensor) -> PromptScores:
        """Return bypass and KL, prompt by prompt, with what `basis` [k, d_model] spans ablated."""
        return self._ablated([basis], "All together, layer by layer")[0]

    def _ablated(self, bases: Sequence[Tensor], what: str) -> list[PromptScores]:
        rows, n = [*self._harmful_rows, *self._harmless_rows], len(self._harmful_rows)
        last = self._chat.last_hidden(rows, [Variant(ablated=basis) for basis in bases], what=what)
        found: list[PromptScores] = []
        for logits in self._chat.logits(last):
            kl = kl_divergence(self._base, logits[n:])
            found.append({"bypass": self._metric(logits[:n]), "kl": tuple(kl.tolist())})
        return found

    def _metric(self, logits: Tensor) -> tuple[float, ...]:
        return tuple(refusal_metric(logits, token_ids=self._token_ids).tolist())
