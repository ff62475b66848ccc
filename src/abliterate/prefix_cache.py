"""The keys and values of tokens that many rows share at their start, computed once."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import Cache, PretrainedConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixCache:
    """Keys and values of one prefix in one or more variants (as under different interventions).

    Attributes:
        cache: a transformers cache with one batch row per variant, or one row in layers where all are alike; it is
            never changed.
        n_tokens: length of the prefix.
    """

    cache: "Cache"
    n_tokens: int

    def for_rows(self, variants: Sequence[int]) -> "Cache":
        """Return a cache for a batch whose row i continues variant `variants[i]`; it may be written to."""
        past = copy.copy(self.cache)
        past.layers = [_rows(layer, variants) for layer in self.cache.layers]
        return past


def empty_cache(config: "PretrainedConfig", *, longest: int) -> "Cache | None":
    """Return a cache to run a prefix into, or None where continuing one would not be exact.

    Padding stands between the prefix and a shorter row. Plain attention masks it; recurrent layers would take it in,
    and a sliding window counts it, which matters as soon as a row is longer than the window.

    Args:
        config: the model's.
        longest: tokens of the longest row, prefix included.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    cache = DynamicCache(config=config)
    if not cache.layers or any(type(layer) not in {DynamicLayer, DynamicSlidingWindowLayer} for layer in cache.layers):
        return None
    windows = [layer.sliding_window for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]
    return None if any(longest > window for window in windows) else cache


def shared_prefix_length(rows: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all rows have in common at the start, leaving at least one token to each."""
    shortest = min(len(row) for row in rows)
    for i in range(shortest - 1):
        if any(row[i] != rows[0][i] for row in rows):
            return i
    return max(0, shortest - 1)


def _rows(layer: Any, variants: Sequence[int]) -> Any:
    chosen = copy.copy(layer)
    if layer.is_initialized and layer.keys.numel():
        # Updating a layer concatenates into new memory, so that views of the shared row are safe here.
        if layer.keys.shape[0] == 1:
            chosen.keys = layer.keys.expand(len(variants), -1, -1, -1)
            chosen.values = layer.values.expand(len(variants), -1, -1, -1)
        else:
            index = torch.tensor(list(variants), device=layer.keys.device)
            chosen.keys, chosen.values = layer.keys[index], layer.values[index]
    return chosen
