"""How candidate directions are made from recorded activations, and how much a choice among them hangs on the prompts.

*difference*: mean(harmful) - mean(harmless), the paper's. *projected*: the same without its component along the
harmless mean, so that ablating it leaves the mean of harmless prompts where it is. Winsorised means clip every
coordinate at its Q and 1 - Q quantiles first, so that a few outlying activations cannot turn the mean. Of several
directions each is a candidate that passes the selection by itself.

The bootstrap draws prompts again with replacement. A mean over such a draw is a weighted mean of what was recorded
once, so all draws together are one matrix product and nothing is run again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from abliterate.directions import orthogonal_to, orthonormalize
from abliterate.extraction.options import DirectionRecipe, Thresholds, Variant
from abliterate.extraction.selection import Candidate, PromptScores, ScoreName

if TYPE_CHECKING:
    from jaxtyping import Float, Float64

MIN_INDEPENDENT_SHARE = 0.5
"""A further direction must have this share of its length outside the span of those before it (an angle of 30 degrees):
neighbouring layers otherwise give the same direction several times."""


def candidate_directions(
    *,
    harmful: Float[Tensor, "n_harmful n_pos n_layers d_model"],
    harmless: Float[Tensor, "n_harmless n_pos n_layers d_model"],
    recipe: DirectionRecipe,
) -> Float64[Tensor, "n_pos n_layers d_model"]:
    """Return the candidate directions, un-normalised.

    Arditi et al. 2024, equation 1; accumulated in float64 as published.

    Args:
        harmful: what was recorded of harmful prompts.
        harmless: the same of harmless ones.
        recipe: how to make them.
    """
    # Layer by layer: in float64 all layers of a large model would not fit at once.
    layers = []
    for layer in range(harmful.shape[2]):
        means = [winsorized(values[:, :, layer].double(), recipe.winsorize).mean(0) for values in (harmful, harmless)]
        layers.append(combine_means(harmful=means[0], harmless=means[1], variant=recipe.variant))
    return torch.stack(layers, dim=1)


def winsorized(values: Float[Tensor, "n ..."], q: float | None) -> Float[Tensor, "n ..."]:
    """Return values clipped, each coordinate by itself, at their q and 1 - q quantiles over the first axis.

    Args:
        values: float32 or float64.
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


def combine_means(
    *, harmful: Float64[Tensor, "*shape d_model"], harmless: Float64[Tensor, "*shape d_model"], variant: Variant
) -> Float64[Tensor, "*shape d_model"]:
    """Return the candidates that some means give.

    Args:
        harmful: means over harmful prompts.
        harmless: means over harmless ones.
        variant: see `DirectionRecipe`.
    """
    difference = harmful - harmless
    if variant == "difference":
        return difference
    return orthogonal_to(difference, harmless)


def independent_candidates(
    candidates: Float[Tensor, "n_pos n_layers d_model"], ordered: Sequence[Candidate], *, rank: int
) -> list[Candidate]:
    """Return the first `rank` candidates that are independent of each other, in their order; fewer if there are not.

    Args:
        candidates: all of them.
        ordered: those to choose from, the best first; the first is always taken.
        rank: how many are wanted.
    """
    if not ordered:
        return []
    vectors = torch.stack([candidates[key] for key in ordered])
    _, left_out = orthonormalize(vectors, tolerance=MIN_INDEPENDENT_SHARE, at_most=rank)
    return [key for index, key in enumerate(ordered) if index not in left_out]


@dataclass(frozen=True, slots=True, kw_only=True)
class Winner:
    """A candidate and the share of resamplings in which it would be chosen."""

    position: int
    layer: int
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Robustness:
    """How the direction and the choice vary with the prompts.

    Attributes:
        n_resamples: how often prompts were drawn again.
        mean_cosine: between the direction and the one of resampled training prompts, at the same position and layer.
        low_cosine: its 5th percentile.
        high_cosine: its 95th percentile.
        winners: what would be chosen by resampled validation prompts, directions as they are; the most frequent first.
        share_none: the share of resamplings in which no candidate passes.
    """

    n_resamples: int
    mean_cosine: float
    low_cosine: float
    high_cosine: float
    winners: tuple[Winner, ...]
    share_none: float


def resample_weights(n: int, *, n_resamples: int, generator: torch.Generator) -> Float64[Tensor, "n_resamples n"]:
    """Return the share of each of n prompts in draws of n with replacement."""
    drawn = torch.randint(n, (n_resamples, n), generator=generator)
    counts = torch.zeros(n_resamples, n, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones(1, dtype=torch.float64).expand_as(drawn)) / n


def resampled_cosines(
    *,
    harmful: Float[Tensor, "n_harmful d_model"],
    harmless: Float[Tensor, "n_harmless d_model"],
    recipe: DirectionRecipe,
    n_resamples: int,
    generator: torch.Generator,
) -> Float64[Tensor, " n_resamples"]:
    """Return the cosines between a candidate and the same one made of resampled prompts.

    Winsorised values are clipped once, at the quantiles of all prompts.

    Args:
        harmful: activations at the candidate's position and layer.
        harmless: the same of harmless prompts.
        recipe: how the candidate is made.
        n_resamples: how often to draw.
        generator: makes the draws.
    """
    clipped = [winsorized(values.double(), recipe.winsorize) for values in (harmful, harmless)]
    whole = combine_means(harmful=clipped[0].mean(0), harmless=clipped[1].mean(0), variant=recipe.variant)
    means = [resample_weights(len(values), n_resamples=n_resamples, generator=generator) @ values for values in clipped]
    drawn = combine_means(harmful=means[0], harmless=means[1], variant=recipe.variant)
    return torch.nn.functional.cosine_similarity(drawn, whole[None], dim=1)


def resampled_winners(
    scores: Mapping[Candidate, PromptScores],
    *,
    thresholds: Thresholds,
    n_layers: int,
    n_resamples: int,
    generator: torch.Generator,
) -> Counter[Candidate | None]:
    """Apply the selection to resampled validation prompts; return how often each candidate is chosen.

    Args:
        scores: bypass, induce and KL of every candidate, prompt by prompt, in the order that breaks ties.
        thresholds: see `Thresholds`.
        n_layers: number of decoder blocks.
        n_resamples: how often to draw.
        generator: makes the draws.

    Returns:
        counts by candidate; None where nothing passes.
    """
    keys: Sequence[Candidate] = list(scores)

    def values(*names: ScoreName) -> list[Float64[Tensor, "n_resamples n_candidates"]]:
        """Mean scores of the same draws."""
        parts = [torch.tensor([scores[key][name] for key in keys], dtype=torch.float64) for name in names]
        weights = resample_weights(parts[0].shape[1], n_resamples=n_resamples, generator=generator)
        return [weights @ part.T for part in parts]

    (bypass,), (induce, kl) = values("bypass"), values("induce", "kl")
    in_time = torch.tensor([layer < thresholds.layer_limit(n_layers) for _, layer in keys])
    # A comparison with NaN is false, so that such a candidate passes nothing.
    passes = (kl <= thresholds.kl) & (induce >= thresholds.induce) & in_time & ~bypass.isnan()
    # numpy's argmin returns the first of equals, which torch's does not promise.
    best = bypass.masked_fill(~passes, torch.inf).numpy().argmin(axis=1)
    found = zip(best.tolist(), passes.any(dim=1).tolist(), strict=True)
    return Counter(keys[place] if any_passes else None for place, any_passes in found)


def measure_robustness(
    *,
    harmful: Float[Tensor, "n_harmful d_model"],
    harmless: Float[Tensor, "n_harmless d_model"],
    recipe: DirectionRecipe,
    scores: Mapping[Candidate, PromptScores],
    thresholds: Thresholds,
    n_layers: int,
    n_resamples: int,
    seed: int,
) -> Robustness:
    """Resample training and validation prompts; see `resampled_cosines` and `resampled_winners`."""
    generator = torch.Generator().manual_seed(seed)
    cosines = resampled_cosines(
        harmful=harmful, harmless=harmless, recipe=recipe, n_resamples=n_resamples, generator=generator
    )
    counts = resampled_winners(
        scores, thresholds=thresholds, n_layers=n_layers, n_resamples=n_resamples, generator=generator
    )
    return Robustness(
        n_resamples=n_resamples,
        mean_cosine=float(cosines.mean()),
        low_cosine=float(cosines.quantile(0.05)),
        high_cosine=float(cosines.quantile(0.95)),
        winners=tuple(
            Winner(position=key[0], layer=key[1], share=count / n_resamples)
            for key, count in counts.most_common()
            if key is not None
        ),
        share_none=counts[None] / n_resamples,
    )
