"""Which norms stand between a writer and the residual stream, read off the names of the writer's own layer.

For y = gamma * x / rms(x), r . y = 0 exactly when (gamma * r) . x = 0, so an edit must know gamma (see `projection`).
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from abliterate import architectures as table
from abliterate.tensor_names import Part, TensorName


@dataclass(frozen=True, slots=True, kw_only=True)
class PostNorm:
    """A norm that stands between a writer and the residual stream.

    Attributes:
        weight: Name on disk of its weight, gamma.
        plus_one: The norm multiplies by 1 + weight (Gemma 2 and 3), not by weight.
        centered: A LayerNorm, which takes the mean away first; its own bias is a writer without a chain.
    """

    weight: str
    plus_one: bool = False
    centered: bool = False


class NormChains:
    """The norms of one checkpoint, and which of them a writer's output passes on its way to the stream."""

    def __init__(self, names: Mapping[str, TensorName], *, post_norm: bool, plus_one: bool) -> None:
        """Collect the norms among `names` (name on disk -> what it says).

        Args:
            names: Every tensor of the checkpoint.
            post_norm: Norms may stand after a sub-layer; otherwise all of a layer's norms are taken for pre-norms.
            plus_one: The norms after a sub-layer multiply by 1 + weight.
        """
        self._post_norm = post_norm
        self._of_layer: dict[tuple[str, int], dict[str, PostNorm]] = defaultdict(dict)
        self._of_embedding: tuple[PostNorm, ...] = ()
        for tensor_name, name in names.items():
            if name.is_bias or name.part not in {Part.NORM, Part.POST_NORM, Part.EMBEDDING_NORM}:
                continue
            if name.layer is None:
                self._of_embedding += (PostNorm(weight=tensor_name, centered=True),)
            else:
                centered = tensor_name.removesuffix(".weight") + ".bias" in names
                norm = PostNorm(weight=tensor_name, plus_one=plus_one, centered=centered)
                self._of_layer[name.stack, name.layer][name.path] = norm

    def of(self, name: TensorName) -> tuple[PostNorm, ...]:
        """Return the norms between a writer (or a norm's own bias) and the stream, innermost first."""
        if name.part in {Part.TOKEN_EMBEDDING, Part.HEAD}:
            return self._of_embedding
        if name.layer is None or not self._post_norm:
            return ()
        norms = self._of_layer[name.stack, name.layer]
        if name.part is Part.POST_NORM:
            is_inner = name.path in {table.DENSE_POST_NORM, table.EXPERT_POST_NORM}
            return tuple(_first(norms, table.MLP_POST_NORMS)) if is_inner else ()
        if name.path in table.SIDE_POST_NORMS:
            return tuple(_first(norms, (table.SIDE_POST_NORMS[name.path],)))
        if name.role == "attn":
            own = tuple(_first(norms, table.ATTENTION_POST_NORMS))
            shared = not own and any(norm in norms for norm in table.MLP_OWN_NORMS)
            return tuple(_first(norms, (table.SHARED_NORM,))) if shared else own
        part = table.EXPERT_POST_NORM if "experts" in name.path.split(".") else table.DENSE_POST_NORM
        return (*_first(norms, (part,)), *_first(norms, table.MLP_POST_NORMS))


def _first(norms: Mapping[str, PostNorm], names: Sequence[str]) -> Iterator[PostNorm]:
    found = next((name for name in names if name in norms), None)
    if found is not None:
        yield norms[found]
