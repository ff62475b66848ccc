"""What the name of a tensor on disk says: in which layer it lies, and whether it writes to the residual stream.

Only names are read here; `residual_writers` brings in shapes and the config. The vocabulary is that of `architectures`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Literal

from abliterate import architectures as table

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
    HEAD = auto()
    OUTSIDE_READER = auto()
    TOWER = auto()
    PREDICTION = auto()
    UNKNOWN = auto()


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


WRITERS: Mapping[str, Role] = _roles(table.ATTENTION_OUT, "attn") | _roles(table.MLP_OUT, "mlp")
_IN_LAYER = re.compile(rf"((?:[^.]+\.)*?(?:{'|'.join(table.LAYER_LISTS)}))\.([0-9]+)\.(.+)")
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
    match = _IN_LAYER.fullmatch(name)
    before = (match[1] if match else name).split(".")
    if any(table.PREDICTION.fullmatch(part) for part in before):
        return TensorName(part=Part.PREDICTION, path=name)
    if has_towers and any(table.TOWER.fullmatch(part) for part in before):
        return TensorName(part=Part.TOWER, path=name)
    if match is None:
        return _outside(name)
    if not set(before[:-1]) <= table.PREFIX_PARTS:
        return TensorName(part=Part.UNKNOWN, path=name)
    return _in_layer(match[1], int(match[2]), match[3])


def _in_layer(stack: str, layer: int, rest: str) -> TensorName:
    expert = _EXPERT.search(rest)
    path, is_bias = _module(re.sub(r"(?<![^.])[0-9]+(?![^.])", "*", rest))
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


def _module(path: str) -> tuple[str, bool]:
    if path.endswith(".weight"):
        return path.removesuffix(".weight"), False
    return path.removesuffix(".bias"), path.endswith(".bias")


def _part_in_layer(path: str, *, is_bias: bool) -> tuple[Part, Role | None]:
    owner = table.BIAS_OF.get(path)
    if owner is not None and (is_bias or path.endswith("_bias")):
        return Part.BIAS, WRITERS[owner]
    if path in table.READER_PATHS:
        return Part.READER, None
    if path in WRITERS:
        return (Part.BIAS if is_bias else Part.WRITER), WRITERS[path]
    parent, _, leaf = path.rpartition(".")
    if leaf in table.POST_NORMS:
        return Part.POST_NORM, None
    if leaf in table.NORMS or path in table.NORMS:
        return Part.NORM, None
    if leaf in table.READERS or path.endswith(".rotary_emb.inv_freq"):
        return Part.READER, None
    for owner in WRITERS:
        if path.startswith((f"{owner}.", f"{owner}_")):
            return Part.COMPANION, WRITERS[owner]
    if parent.rpartition(".")[2] in table.READERS and _COMPANION.fullmatch(leaf):
        return Part.READER_COMPANION, None
    return Part.UNKNOWN, None


def _outside(name: str) -> TensorName:
    module, is_bias = _module(name)
    parts = module.split(".")
    while len(parts) > 1 and parts[0] in table.PREFIX_PARTS:
        parts = parts[1:]
    path = ".".join(parts)
    for names, part, role in (
        (table.EMBEDDING_NORMS, Part.EMBEDDING_NORM, "embed"),
        (table.TOKEN_EMBEDDINGS, Part.TOKEN_EMBEDDING, "embed"),
        (table.POSITION_EMBEDDINGS, Part.POSITION_EMBEDDING, "embed"),
        (table.STREAM_STARTS, Part.STREAM_START, "embed"),
        (table.HEADS, Part.HEAD, None),
        (table.OUTSIDE_READERS, Part.OUTSIDE_READER, None),
    ):
        if path in names:
            return TensorName(part=part, path=path, is_bias=is_bias, role=role)  # type: ignore[arg-type]
        if part in {Part.TOKEN_EMBEDDING, Part.POSITION_EMBEDDING} and any(path.startswith(f"{n}.") for n in names):
            return TensorName(part=Part.COMPANION, path=path, role="embed")
    return TensorName(part=Part.UNKNOWN, path=path, is_bias=is_bias)
