"""What refining found, as plain values."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from abliterate.extraction.options import Goal


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierPoint:
    """One set of strengths and what it does to validation prompts, none of which it was optimised on.

    Attributes:
        pressure: Weight of the refusal score against the KL in what was minimised; None where nothing was: strength 1
            everywhere.
        attn: Share of the component that is removed from what attention writes, one a layer.
        mlp: The same of what the MLP writes.
        unanswered: Prompts that are to be answered (harmful ones, or borderline ones of a repair) whose reply still
            refuses or says nothing; the unchanged model refuses all of them.
        n_to_answer: How many there are.
        metric: Mean refusal metric on them, in nats.
        kl_first: Mean KL(base || edited) of the first token of the replies that are to stay, in nats: those to harmless
            prompts, and of a repair the refusals of harmful ones.
        kl: The same over the base's own replies, a mean of tokens.
        cross_entropy: Of those replies, nats a token.
        base_cross_entropy: The unchanged model's.
        n_to_stay: How many such replies there are.
        refused: Of a repair, harmful prompts that are still refused; None where these are to be answered.
        n_to_refuse: How many there are; the unchanged model refuses all of them.
    """

    pressure: float | None
    attn: tuple[float, ...]
    mlp: tuple[float, ...]
    unanswered: int
    n_to_answer: int
    metric: float
    kl_first: float
    kl: float
    cross_entropy: float
    base_cross_entropy: float
    n_to_stay: int
    refused: int | None = None
    n_to_refuse: int = 0

    @property
    def share_unanswered(self) -> float:
        """Share of the prompts that are to be answered which still are not."""
        return self.unanswered / self.n_to_answer

    @property
    def share_lost(self) -> float:
        """Share of the harmful prompts that are to stay refused which no longer are; 0 where none are."""
        return 0.0 if self.refused is None else 1 - self.refused / self.n_to_refuse


def point_of(values: Mapping[str, Any]) -> FrontierPoint:
    """Return the point that `asdict` made these plain values of."""
    return FrontierPoint(**{**values, "attn": tuple(values["attn"]), "mlp": tuple(values["mlp"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class RefinementReport:
    """Strengths for each layer and role, and how they were chosen.

    Attributes:
        model: As it was named.
        direction_sha256: Of the direction that was refined.
        goal: What that direction was found for: to remove refusals, or to repair false ones.
        position: Post-instruction position of the means that each layer's own direction comes from.
        refusal_tokens: Texts of the tokens that the refusal metric asks for.
        chosen: The point that the file's strengths are.
        frontier: All points, from the strongest pressure to the weakest.
        plain: The direction itself at strength 1 in all layers, without the embeddings, on the same prompts.
        counts: Part -> prompts that were used of those that were drawn.
        arguments: Prompts and options as arguments of the command.
        versions: Of what computed it.
    """

    model: str
    direction_sha256: str
    goal: Goal
    position: int
    refusal_tokens: tuple[str, ...]
    chosen: FrontierPoint
    frontier: tuple[FrontierPoint, ...]
    plain: FrontierPoint
    counts: Mapping[str, tuple[int, int]]
    arguments: tuple[str, ...]
    versions: Mapping[str, str]
