"""How candidate directions are made from recorded activations: the paper's way, and named variations of it.

*difference*: mean(harmful) - mean(harmless), the paper's. *projected*: the same without its component along the
harmless mean, so that ablating it leaves the mean of harmless prompts where it is. Winsorised means clip every
coordinate at its Q and 1 - Q quantiles first, so that a few outlying activations cannot turn the mean. Of several
directions each is a candidate that passes the selection by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from abliterate.selection import Candidate

Variant = Literal["difference", "projected"]

MIN_INDEPENDENT_SHARE = 0.5
"""A further direction must have this share of its length outside the span of those before it (an angle of 30 degrees):
neighbouring layers otherwise give the same direction several times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectionRecipe:
    """How each candidate is made; the default is the paper's.

    Attributes:
        variant: `difference`, or `projected`: without the component along the harmless mean.
        winsorize: Q, at least 0 and below 0.5: each coordinate is clipped at its Q and 1 - Q quantiles before the
            mean is taken; None clips nothing.
    """

    variant: Variant = "difference"
    winsorize: float | None = None

    @property
    def in_words(self) -> str:
        """A short name, as reports show it."""
        name = {"difference": "difference in means", "projected": "difference in means without the harmless mean"}
        clipped = "" if self.winsorize is None else f", winsorised at {self.winsorize:g}"
        return name[self.variant] + clipped


def candidate_directions(*, harmful: Tensor, harmless: Tensor, recipe: DirectionRecipe) -> Tensor:
    """Return the candidate directions, un-normalised.

    Args:
        harmful: [n_harmful, n_pos, n_layers, d_model].
        harmless: [n_harmless, n_pos, n_layers, d_model].
        recipe: how to make them.

    Returns:
        [n_pos, n_layers, d_model], float64 (Arditi et al. 2024, equation 1; accumulated in float64 as published).
    """
    # Layer by layer: in float64 all layers of a large model would not fit at once.
    layers = []
    for layer in range(harmful.shape[2]):
        means = [winsorized(values[:, :, layer].double(), recipe.winsorize).mean(0) for values in (harmful, harmless)]
        layers.append(combine_means(harmful=means[0], harmless=means[1], variant=recipe.variant))
    return torch.stack(layers, dim=1)


def winsorized(values: Tensor, q: float | None) -> Tensor:
    """Return values clipped, each coordinate by itself, at their q and 1 - q quantiles over the first axis.

    Args:
        values: [n, ...], float32 or float64.
        q: at least 0 and below 0.5; None returns the values as they are.
    """
    if q is None:
        return values
    flat = values.reshape(len(values), -1)
    clipped = [
        # In parts: torch.quantile takes no more than 16 million values.
        part.clamp(*torch.quantile(part, torch.tensor([q, 1 - q], dtype=part.dtype), dim=0))
        for part in torch.split(flat, 4096, dim=1)
    ]
    return torch.cat(clipped, dim=1).reshape(values.shape)


def combine_means(*, harmful: Tensor, harmless: Tensor, variant: Variant) -> Tensor:
    """Return the candidates that some means give.

    Args:
        harmful: means, [..., d_model] float64.
        harmless: means of the same shape.
        variant: see `DirectionRecipe`.
    """
    difference = harmful - harmless
    if variant == "difference":
        return difference
    unit = harmless / harmless.norm(dim=-1, keepdim=True).clamp(min=1e-300)
    # Twice is enough (Gram-Schmidt): the second pass removes what rounding left of the first.
    for _ in range(2):
        difference = difference - (difference * unit).sum(dim=-1, keepdim=True) * unit
    return difference


def independent_candidates(candidates: Tensor, ordered: Sequence[Candidate], *, rank: int) -> list[Candidate]:
    """Return the first `rank` candidates that are independent of each other, in their order; fewer if there are not.

    Args:
        candidates: [n_pos, n_layers, d_model].
        ordered: those to choose from, the best first; the first is always taken.
        rank: how many are wanted.
    """
    basis = torch.empty(0, candidates.shape[-1], dtype=torch.float64)
    chosen: list[Candidate] = []
    for key in ordered:
        if len(chosen) == rank:
            break
        unit = candidates[key].double() / candidates[key].double().norm()
        rest = unit
        for _ in range(2):
            rest = rest - basis.T @ (basis @ rest)
        if float(rest.norm()) >= MIN_INDEPENDENT_SHARE:
            basis = torch.cat([basis, (rest / rest.norm())[None]])
            chosen.append(key)
    return chosen


def spanning_basis(vectors: Tensor) -> Tensor:
    """Return orthonormal rows [k, d_model], float64, with the span of k independent vectors [k, d_model]."""
    basis: Tensor = torch.linalg.qr(vectors.double().T).Q.T
    return basis
