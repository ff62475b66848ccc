"""What the name of a tensor says: in which layer it lies, whether it writes to the stream, and through which norms.

Only names are read here; `writers` brings in shapes and the config. Which norms stand between a writer and the residual
stream is read off the names of the writer's own layer: for y = gamma * x / rms(x), r . y = 0 exactly when
(gamma * r) . x = 0, so an edit must know gamma (see `formats.projection`).
"""

import functools
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Literal

from abliterate.architectures import vocabulary

Role = Literal["embed", "attn", "mlp"]


class Part(Enum):
    """What a tensor is, by its name."""

    WRITER = auto()
    BIAS = auto()  # of a writer
    COMPANION = auto()  # stored beside a writer: quantised, or an adapter's
    READER_COMPANION = auto()
    NORM = auto()
    POST_NORM = auto()
    READER = auto()
    TOKEN_EMBEDDING = auto()
    POSITION_EMBEDDING = auto()
    STREAM_START = auto()
    EMBEDDING_NORM = auto()
    OUTSIDE_WRITER = auto()
    HEAD = auto()
    OUTSIDE_READER = auto()
    TOWER = auto()
    PREDICTION = auto()
    UNKNOWN = auto()

    # There is one of each, so that none is looked up by its name: a checkpoint's tensors are counted by the million.
    __hash__ = object.__hash__


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorName:
    """A tensor's name, taken apart.

    Attributes:
        part: What it is.
        stack: What stands before the layer's index, such as `model.layers`; empty outside the layers.
        layer: The layer's index; None outside the layers.
        path: What follows the index, without `.weight` and `.bias`, numbers written as `*`; outside, the name
            without its prefix.
        expert: The number of the expert, where the name has one.
        is_bias: It ends in `.bias`.
        role: What kind of writer it belongs to; None if to none.
    """

    part: Part
    stack: str = ""
    layer: int | None = None
    path: str
    expert: int | None = None
    is_bias: bool = False
    role: Role | None = None


def _roles(text: str, role: Role) -> dict[str, Role]:
    rules: dict[str, Role] = {}
    for parent, leaves in re.findall(r"(?:^|\s)([^\s:]*):((?:\s+[^\s:]+(?!\S*:))+)", text):
        for leaf in leaves.split():
            rules[f"{parent}.{leaf}" if parent else leaf] = role
    return rules


WRITERS: Mapping[str, Role] = _roles(vocabulary.ATTENTION_OUT, "attn") | _roles(vocabulary.MLP_OUT, "mlp")
_IN_LAYER = re.compile(rf"((?:[^.]+\.)*?(?:{'|'.join(vocabulary.LAYER_LISTS)}))\.([0-9]+)\.(.+)")
_EXPERT = re.compile(r"(?:^|\.)experts\.([0-9]+)\.")
_COMPANION = re.compile(
    r"weight_.+|q?weight|qzeros|scales?|scale_inv|g_idx|SCB|absmax|quant_.*|nested_.*|bitsandbytes__.*|.*_(blocks|scales)"
)


def parse_name(name: str, *, has_towers: bool = False) -> TensorName:
    """Take a tensor's name on disk apart.

    Args:
        name: As in the shard's header.
        has_towers: Parts for images or sound may lie beside the text model; without, their names are unknown.
    """
    # Of a model with experts a hundred thousand names differ by their numbers alone, and what they say does not.
    between, numbers = tuple((parts := _NUMBER.split(name))[::2]), parts[1::2]
    pattern = _pattern(between, has_towers)
    if pattern is None:
        return _parse(name, has_towers=has_towers)
    return TensorName(
        part=pattern.part,
        stack=pattern.stack,
        layer=int(numbers[0]) if pattern.in_layer else None,
        path=pattern.path,
        expert=None if pattern.expert is None else int(numbers[pattern.expert]),
        is_bias=pattern.is_bias,
        role=pattern.role,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pattern:
    """What names say that differ by their numbers alone; `expert` is which of the numbers is that of the expert."""

    part: Part
    stack: str
    in_layer: bool
    path: str
    expert: int | None
    is_bias: bool
    role: Role | None


_NUMBER = re.compile(r"(?<![^.])([0-9]+)(?![^.])")


@functools.lru_cache(maxsize=10_000)
def _pattern(between: tuple[str, ...], has_towers: bool) -> _Pattern | None:
    """Return what names have in common with these texts between their numbers; None where it is not all they say."""
    numbers = range(len(between) - 1)
    first = _parse(
        "".join(itertools.chain(*zip(between, (*map(str, numbers), ""), strict=True))), has_towers=has_towers
    )
    # Where a number stands before the layer's, or the whole name is the path, each name says something else.
    if first.layer or _NUMBER.search(first.path):
        return None
    return _Pattern(
        part=first.part,
        stack=first.stack,
        in_layer=first.layer is not None,
        path=first.path,
        expert=first.expert,
        is_bias=first.is_bias,
        role=first.role,
    )


def _parse(name: str, *, has_towers: bool) -> TensorName:
    match = _IN_LAYER.fullmatch(name)
    before = (match[1] if match else name).split(".")
    if any(vocabulary.PREDICTION.fullmatch(part) for part in before):
        return TensorName(part=Part.PREDICTION, path=name)
    if has_towers and any(vocabulary.TOWER.fullmatch(part) for part in before):
        return TensorName(part=Part.TOWER, path=name)
    if match is None:
        return _outside(name)
    if not set(before[:-1]) <= vocabulary.PREFIX_PARTS:
        return TensorName(part=Part.UNKNOWN, path=name)
    return _in_layer(match[1], int(match[2]), match[3])


def _in_layer(stack: str, layer: int, rest: str) -> TensorName:
    expert = _EXPERT.search(rest)
    path, is_bias = _module(_numberless(rest))
    part, role = _part_in_layer(path, is_bias=is_bias)
    return TensorName(
        part=part,
        stack=stack,
        layer=layer,
        path=path,
        expert=int(expert[1]) if expert else None,
        is_bias=is_bias,
        role=role,
    )


def _numberless(path: str) -> str:
    """Return a path with `*` for its numbers; the parts of a table that is stored in parts are numbered too."""
    return re.sub(r"(?<![^.])(shard_)?[0-9]+(?![^.])", lambda match: f"{match[1] or ''}*", path)


def _module(path: str) -> tuple[str, bool]:
    if path.endswith(".weight"):
        return path.removesuffix(".weight"), False
    return path.removesuffix(".bias"), path.endswith(".bias")


def _part_in_layer(path: str, *, is_bias: bool) -> tuple[Part, Role | None]:
    owner = vocabulary.BIAS_OF.get(path)
    if owner is not None and (is_bias or path.endswith("_bias")):
        return Part.BIAS, WRITERS[owner]
    if path in vocabulary.READER_PATHS:
        return Part.READER, None
    if path in WRITERS:
        return (Part.BIAS if is_bias else Part.WRITER), WRITERS[path]
    parent, _, leaf = path.rpartition(".")
    if leaf in vocabulary.POST_NORMS:
        return Part.POST_NORM, None
    if leaf in vocabulary.NORMS or path in vocabulary.NORMS:
        return Part.NORM, None
    if leaf in vocabulary.READERS or path.endswith(".rotary_emb.inv_freq"):
        return Part.READER, None
    owner = writer_behind(path)
    if owner is not None:
        return Part.COMPANION, WRITERS[owner]
    if parent.rpartition(".")[2] in vocabulary.READERS and _COMPANION.fullmatch(leaf):
        return Part.READER_COMPANION, None
    return Part.UNKNOWN, None


def writer_behind(path: str) -> str | None:
    """Return the writer that a companion's path belongs to, such as that of `self_attn.o_proj.qweight`; else None."""
    return next((owner for owner in WRITERS if path.startswith((f"{owner}.", f"{owner}_"))), None)


def _outside(name: str) -> TensorName:
    module, is_bias = _module(_numberless(name))
    parts = module.split(".")
    while len(parts) > 1 and parts[0] in vocabulary.PREFIX_PARTS:
        parts = parts[1:]
    path = ".".join(parts)
    for names, part, role in (
        (vocabulary.EMBEDDING_NORMS | vocabulary.EMBEDDING_RMS_NORMS, Part.EMBEDDING_NORM, "embed"),
        (vocabulary.TOKEN_EMBEDDINGS, Part.TOKEN_EMBEDDING, "embed"),
        (vocabulary.POSITION_EMBEDDINGS, Part.POSITION_EMBEDDING, "embed"),
        (vocabulary.STREAM_STARTS, Part.STREAM_START, "embed"),
        (vocabulary.OUTSIDE_WRITERS, Part.OUTSIDE_WRITER, "embed"),
        (vocabulary.HEADS, Part.HEAD, None),
        (vocabulary.OUTSIDE_READERS, Part.OUTSIDE_READER, None),
    ):
        if path in names:
            return TensorName(part=part, path=path, is_bias=is_bias, role=role)  # type: ignore[arg-type]
        if part in {Part.TOKEN_EMBEDDING, Part.POSITION_EMBEDDING} and any(path.startswith(f"{n}.") for n in names):
            return TensorName(part=Part.COMPANION, path=path, role="embed")
    return TensorName(part=Part.UNKNOWN, path=path, is_bias=is_bias)


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
                centered = name.path not in vocabulary.EMBEDDING_RMS_NORMS
                self._of_embedding += (PostNorm(weight=tensor_name, centered=centered),)
            else:
                centered = tensor_name.removesuffix(".weight") + ".bias" in names
                norm = PostNorm(weight=tensor_name, plus_one=plus_one, centered=centered)
                # A loaded model may keep a norm that stands after a sub-layer inside of it.
                path = name.path.rpartition(".")[2] if name.part is Part.POST_NORM else name.path
                self._of_layer[name.stack, name.layer][path] = norm

    def of(self, name: TensorName) -> tuple[PostNorm, ...]:
        """Return the norms between a writer (or a norm's own bias) and the stream, innermost first."""
        if name.part in {Part.TOKEN_EMBEDDING, Part.HEAD}:
            return self._of_embedding
        if name.layer is None or not self._post_norm:
            return ()
        norms = self._of_layer[name.stack, name.layer]
        if name.part is Part.POST_NORM:
            is_inner = name.path in {vocabulary.DENSE_POST_NORM, vocabulary.EXPERT_POST_NORM}
            return tuple(_first(norms, vocabulary.MLP_POST_NORMS)) if is_inner else ()
        if name.path in vocabulary.SIDE_POST_NORMS:
            return tuple(_first(norms, (vocabulary.SIDE_POST_NORMS[name.path],)))
        if name.role == "attn":
            own = tuple(_first(norms, vocabulary.ATTENTION_POST_NORMS))
            shared = not own and any(norm in norms for norm in vocabulary.MLP_OWN_NORMS)
            return tuple(_first(norms, (vocabulary.SHARED_NORM,))) if shared else own
        part = vocabulary.EXPERT_POST_NORM if "experts" in name.path.split(".") else vocabulary.DENSE_POST_NORM
        return (*_first(norms, (part,)), *_first(norms, vocabulary.MLP_POST_NORMS))


def _first(norms: Mapping[str, PostNorm], names: Sequence[str]) -> Iterator[PostNorm]:
    found = next((name for name in names if name in norms), None)
    if found is not None:
        yield norms[found]
