"""Which tensor of one checkpoint is which of another: names with other prefixes, other shards, other dtypes, padding.

Shards and order mean nothing here. Where names differ, the pair of prefixes that brings most tensors of equal shape
together is taken, then the next, until no more agree. Where one side stores several matrices in one, rows after rows,
and the other side has them one by one, each part is a pair.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from abliterate.architectures.writers import StreamMap
from abliterate.checkpoints.safetensors_file import TensorInfo

# A name has a few parts; more suffixes than this are never tried.
_MOST_PARTS = 12
# Matrices that are stored in one, in the order of their rows. Others (of heads in turn) are not taken apart.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPair:
    """One tensor of the model beside that of the base.

    Attributes:
        old: In the base; of a padded one the rows that both have.
        new: In the model; likewise.
        padding: Rows that the model's has more than the base's; below 0 fewer.
        is_copy: The model stores a tied head apart: `old` is the base's embedding.
    """

    old: TensorInfo
    new: TensorInfo
    padding: int = 0
    is_copy: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairing:
    """The tensors of two checkpoints brought together.

    Attributes:
        pairs: In the order of the model's files.
        added: Of the model alone.
        missing: Of the base alone.
        reshaped: Of both, in shapes that do not go together.
        renamed: Prefixes that differ: the base's and the model's.
        fused: Of one side; their parts are compared with the other side's, under the names that those would have.
    """

    pairs: tuple[TensorPair, ...]
    added: tuple[TensorInfo, ...]
    missing: tuple[TensorInfo, ...]
    reshaped: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...]
    fused: tuple[str, ...]


def pair_tensors(base: Iterable[TensorInfo], model: Iterable[TensorInfo], *, stream: StreamMap | None) -> Pairing:
    """Bring the tensors of two checkpoints together.

    Args:
        base: Those of the base.
        model: Those of the model.
        stream: What the base's tensors are; None where that is not known.
    """
    olds, news = {info.name: info for info in base}, {info.name: info for info in model}
    fused = (*_take_apart(olds, news), *_take_apart(news, olds))
    names = {name: name for name in news if name in olds}
    renamed = _rename(names, olds, news)
    copies: dict[str, str] = {}
    left = set(olds) - set(names.values())
    for name in news.keys() - names.keys():
        source = _tied_source(name, names, olds, stream)
        if source is not None and source in left:
            names[name] = source
        elif source is not None:
            copies[name] = source
    pairs, reshaped = [], []
    for name, new in news.items():
        old = olds.get(names.get(name, copies.get(name, "")))
        if old is None:
            continue
        pair = _fit(old, new)
        if pair is None:
            reshaped.append(name)
        else:
            pairs.append(replace(pair, is_copy=name in copies))
    paired = set(names.values()) | set(copies.values())
    return Pairing(
        pairs=tuple(pairs),
        added=tuple(info for name, info in news.items() if name not in names and name not in copies),
        missing=tuple(info for name, info in olds.items() if name not in paired),
        reshaped=tuple(reshaped),
        renamed=renamed,
        fused=fused,
    )


def _take_apart(infos: dict[str, TensorInfo], others: Mapping[str, TensorInfo]) -> list[str]:
    """Put parts in the place of tensors that the other side has in parts; return the names of those."""
    by_place: dict[str, list[TensorInfo]] = defaultdict(list)
    for name, info in others.items():
        by_place[_place(name)].append(info)
    found = []
    for name, whole in list(infos.items()):
        stem, _, leaf = name.rpartition(".")
        before, _, kind = stem.rpartition(".")
        if kind not in _FUSED or name in others:
            continue
        names = [f"{before}.{part}.{leaf}" for part in _FUSED[kind]]
        like = [[others[each]] if each in others else by_place[_place(each)] for each in names]
        parts = _parts(whole, names, [each[0] for each in like]) if all(len(each) == 1 for each in like) else None
        if parts is not None and not any(each in infos for each in names):
            del infos[name]
            infos.update(zip(names, parts, strict=True))
            found.append(name)
    return found


def _place(name: str) -> str:
    """Return what a name has from the number of its layer on."""
    found = re.search(r"(^|\.)\d+\..*", name)
    return found[0] if found else name


def _parts(whole: TensorInfo, names: Iterable[str], like: list[TensorInfo]) -> list[TensorInfo] | None:
    """Return the rows of a tensor as tensors of the shapes of others; None where they do not go together."""
    if whole.encoding is not None or any(each.shape[1:] != whole.shape[1:] or not each.shape for each in like):
        return None
    if not whole.shape or sum(each.shape[0] for each in like) != whole.shape[0]:
        return None
    size, start, parts = (whole.end - whole.start) // max(1, whole.shape[0]), whole.start, []
    for name, each in zip(names, like, strict=True):
        end = start + each.shape[0] * size
        parts.append(replace(whole, name=name, shape=each.shape, start=start, end=end))
        start = end
    return parts


def _rename(
    names: dict[str, str], olds: Mapping[str, TensorInfo], news: Mapping[str, TensorInfo]
) -> tuple[tuple[str, str], ...]:
    """Add to `names` the tensors whose names differ by a prefix; return the prefixes."""
    found: list[tuple[str, str]] = []
    while True:
        left = {name: info for name, info in olds.items() if name not in set(names.values())}
        votes = _votes(left, {name: info for name, info in news.items() if name not in names})
        if not votes:
            return tuple(found)
        (before, after), _ = max(votes.items(), key=lambda vote: (vote[1], vote[0]))
        found.append((before, after))
        for name in news:
            source = before + name.removeprefix(after)
            if name not in names and name.startswith(after) and source in left:
                names[name] = source


def _votes(olds: Mapping[str, TensorInfo], news: Mapping[str, TensorInfo]) -> Counter[tuple[str, str]]:
    by_suffix: dict[str, list[str]] = defaultdict(list)
    for name in olds:
        for suffix in _suffixes(name):
            by_suffix[suffix].append(name)
    votes: Counter[tuple[str, str]] = Counter()
    for name, info in news.items():
        for suffix in _suffixes(name):
            owners = [owner for owner in by_suffix.get(suffix, ()) if olds[owner].shape == info.shape]
            if owners:
                # Of many with the same end, `weight` for example, nothing is known.
                if len(owners) == 1:
                    votes[owners[0].removesuffix(suffix), name.removesuffix(suffix)] += 1
                break
    return votes


def _suffixes(name: str) -> list[str]:
    """Return a name and its ends of at least two parts, the longest first."""
    parts = name.split(".")
    return [".".join(parts[first:]) for first in range(max(0, len(parts) - _MOST_PARTS), max(1, len(parts) - 1))]


def _tied_source(
    name: str, names: Mapping[str, str], olds: Mapping[str, TensorInfo], stream: StreamMap | None
) -> str | None:
    """Return the base's tensor that a head or an embedding is, where the base ties the two and stores one."""
    if stream is None or not stream.tied_embeddings or stream.head is None:
        return None
    leaf = name.rpartition(".")[0].rpartition(".")[2]
    known = {each.rpartition(".")[0].rpartition(".")[2] for each in (stream.embedding, stream.head)}
    stored = stream.embedding if stream.embedding in olds else stream.head
    return stored if leaf in known and name not in names else None


def _fit(old: TensorInfo, new: TensorInfo) -> TensorPair | None:
    """Return two tensors as a pair; of one with more rows than the other those that both have."""
    if old.shape == new.shape:
        return TensorPair(old=old, new=new)
    is_padded = len(old.shape) == len(new.shape) == 2 and old.shape[1] == new.shape[1]
    if not is_padded or old.encoding is not None or new.encoding is not None:
        return None
    rows = min(old.shape[0], new.shape[0])
    return TensorPair(old=_first_rows(old, rows), new=_first_rows(new, rows), padding=new.shape[0] - old.shape[0])


def _first_rows(info: TensorInfo, rows: int) -> TensorInfo:
    size = (info.end - info.start) // max(1, info.shape[0])
    return replace(info, shape=(rows, info.shape[1]), end=info.start + rows * size)
