"""How much a choice hangs on the prompts it was made with: the bootstrap.

Prompts are drawn again with replacement. A mean over such a draw is a weighted mean of what was recorded once, so that
all draws together are one matrix product and nothing is run again.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abliterate.direction_recipes import DirectionRecipe, combine_means, winsorized
from abliterate.selection import Candidate, PromptScores, ScoreName, Thresholds


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


def resample_weights(n: int, *, n_resamples: int, generator: torch.Generator) -> Tensor:
    """Return [n_resamples, n] float64: the share of each of n prompts in draws of n with replacement."""
    drawn = torch.randint(n, (n_resamples, n), generator=generator)
    counts = torch.zeros(n_resamples, n, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones(1, dtype=torch.float64).expand_as(drawn)) / n


def resampled_cosines(
    *, harmful: Tensor, harmless: Tensor, recipe: DirectionRecipe, n_resamples: int, generator: torch.Generator
) -> Tensor:
    """Return the cosines between a candidate and the same one made of resampled prompts.

    Winsorised values are clipped once, at the quantiles of all prompts.

    Args:
        harmful: activations at the candidate's position and layer, [n_harmful, d_model].
        harmless: [n_harmless, d_model].
        recipe: how the candidate is made.
        n_resamples: how often to draw.
        generator: makes the draws.

    Returns:
        [n_resamples] float64.
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

    def values(*names: ScoreName) -> list[Tensor]:
        """Mean scores, [n_resamples, n_candidates] each, of the same draws."""
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
    harmful: Tensor,
    harmless: Tensor,
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
