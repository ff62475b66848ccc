"""Where the two models of a pair lie, and which of their files need not be read at all.

The Hub knows the SHA-256 of every large file. A shard of a Hub model that has the hash of one of the other model is not
downloaded: where the other one lies on this machine, that is read in its place; where both are on the Hub, its header
and its vectors (norms and biases) are fetched by range requests into a file with a hole where the matrices would be.
Its tensors count as the same bytes. What differs is downloaded into the Hub's cache as usual.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Union

from abliterate.checkpoints.checkpoint import (
    CONFIG_NAME,
    Checkpoint,
    check_tensor_names,
    choose_shards,
    read_json_object,
)
from abliterate.checkpoints.file_ranges import hash_file
from abliterate.checkpoints.model_source import ModelSource, find_local_model, resolve_model
from abliterate.checkpoints.safetensors_file import Shard, header_end, parse_shard, read_shard
from abliterate.editing.record import RECORD_NAME, resolve_base
from abliterate.files import has_file, parse_json, regular_files
from abliterate.formats.gguf_checkpoint import holds_gguf, open_weights
from abliterate.progress import SILENT, ProgressReporter

if TYPE_CHECKING:
    from abliterate.checkpoints.hub import RemoteModel

_SHARDS = ".safetensors"
# Vectors are fetched; what has more bytes than the longest of them is a matrix.
_LARGEST_VECTOR = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSources:
    """The two models.

    Attributes:
        model: The model.
        base: What it is held against; None: nothing.
        opened: Both as checkpoints where files of them are not in their directories; None: they are.
        same_files: Shards of the model that hold the base's bytes, by their hashes.
    """

    model: ModelSource
    base: ModelSource | None
    opened: tuple[Checkpoint, Checkpoint] | None = None
    same_files: frozenset[str] = frozenset()


@contextmanager
def resolve_pair(
    model: str,
    base: str | None,
    *,
    revision: str | None = None,
    base_revision: str | None = None,
    progress: ProgressReporter = SILENT,
) -> Iterator[PairSources]:
    """Find the models of a pair, and download what differs.

    Args:
        model: A directory, a GGUF file or a Hub id.
        base: Likewise; None: there is none.
        revision: Branch, tag or commit of the model on the Hub.
        base_revision: Of the base; None: what the model's record names, else `main`.
        progress: Is told which commit of the base is taken.

    Raises:
        InputError: One is not there.
        HubError: The Hub does not give it.
    """
    local = find_local_model(model, revision=revision)
    local_base = None if base is None else find_local_model(base)
    if base is None or (local is not None and local_base is not None):
        source = local or resolve_model(model, revision=revision)
        found = None
        if base is not None:
            found = resolve_base(base, revision=base_revision, edited=source, progress=progress)
        yield PairSources(model=source, base=found)
        return
    # Imported here alone: models on this machine need no client of the Hub.
    from abliterate.checkpoints import hub

    remote = None if local is not None else hub.inspect_model(model, revision=revision)
    remote_base = None
    if local_base is None:
        wanted = base_revision or _recorded_revision(local or remote, base)
        if wanted is not None and base_revision is None:
            progress.message(f"base: {base} at {wanted}, the commit that {RECORD_NAME} names")
        remote_base = hub.inspect_model(base, revision=wanted)
    elif base_revision is not None:
        resolve_base(base, revision=base_revision, edited=local_base)  # says what is wrong with that
    same = _same_shards(local or remote, local_base or remote_base)
    with TemporaryDirectory(prefix="abliterate-inspect-") as work:
        first = _open(local or remote, same, local_base, Path(work) / "model")
        second = _open(local_base or remote_base, {old: new for new, old in same.items()}, local, Path(work) / "base")
        yield PairSources(
            model=first[0],
            base=second[0],
            opened=(first[1], second[1]),
            same_files=frozenset(name for name in same if name not in first[2])
            | frozenset(str(first[2][name]) for name in same if name in first[2]),
        )


Side = Union[ModelSource, "RemoteModel", None]


def _recorded_revision(side: Side, base: str) -> str | None:
    """Return the commit of the base that a model's record names."""
    content: object = None
    if isinstance(side, ModelSource):
        content = read_json_object(side.path / RECORD_NAME) if has_file(side.path, RECORD_NAME) else None
    elif side is not None and RECORD_NAME in side.sizes:
        try:
            content = parse_json(side.read(RECORD_NAME))
        except ValueError:
            return None
    found = content.get("base") if isinstance(content, dict) else None
    is_named = isinstance(found, dict) and found.get("model") == base and isinstance(found.get("revision"), str)
    return str(found["revision"]) if is_named and isinstance(found, dict) else None


def _same_shards(model: Side, base: Side) -> dict[str, str]:
    """Return the shards of a model that have the hash of one of the base, with that one's name."""
    if any(isinstance(side, ModelSource) and holds_gguf(side.path) for side in (model, base)):
        return {}
    sizes, base_sizes = _sizes(model), _sizes(base)
    common = set(sizes.values()) & set(base_sizes.values())
    by_hash = {_hash(base, name): name for name, size in base_sizes.items() if size in common}
    found = {name: _hash(model, name) for name, size in sizes.items() if size in common}
    return {name: by_hash[digest] for name, digest in found.items() if digest is not None and digest in by_hash}


def _sizes(side: Side) -> dict[str, int]:
    assert side is not None
    if isinstance(side, ModelSource):
        return {file.name: file.stat().st_size for file in side.path.glob(f"*{_SHARDS}")}
    return {name: size for name, size in side.sizes.items() if name in side.wanted and name.endswith(_SHARDS)}


def _hash(side: Side, name: str) -> str | None:
    assert side is not None
    return hash_file(side.path / name) if isinstance(side, ModelSource) else side.hashes.get(name)


def _open(
    side: Side, same: Mapping[str, str], other: ModelSource | None, work: Path
) -> tuple[ModelSource, Checkpoint, dict[str, Path]]:
    """Return a side, its checkpoint, and where those of its shards lie that are not in its directory."""
    if isinstance(side, ModelSource):
        return side, open_weights(side.path), {}
    assert side is not None
    from abliterate.checkpoints import hub

    source = hub.download_without(side.name, revision=side.revision, skipped=sorted(same))
    absent: dict[str, Path] = {}
    for name, partner in same.items():
        if has_file(source.path, name):
            continue
        absent[name] = other.path / partner if other is not None else _with_hole(side, name, work)
    return source, _checkpoint(source.path, absent), absent


def _with_hole(remote: "RemoteModel", name: str, work: Path) -> Path:
    """Fetch a shard's header and vectors into a file of its size."""
    work.mkdir(exist_ok=True)
    path, size = work / name, remote.sizes[name]
    beginning = remote.read_range(name, 0, min(size, 8))
    end = header_end(path, beginning, size=size)
    header = remote.read_range(name, 0, end)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(size)
        for tensor in parse_shard(path, header, size=size).tensors:
            if len(tensor.shape) == 1 and 0 < tensor.end - tensor.start <= _LARGEST_VECTOR:
                file.seek(tensor.start)
                file.write(remote.read_range(name, tensor.start, tensor.end))
    return path


def _checkpoint(path: Path, absent: Mapping[str, Path]) -> Checkpoint:
    """Return the checkpoint in a directory, some shards of which lie elsewhere."""
    if not absent:
        return open_weights(path)
    names, index = choose_shards(
        path, has=lambda name: name in absent or has_file(path, name), read=lambda name: (path / name).read_bytes()
    )
    shards = tuple(_elsewhere(absent[name]) if name in absent else read_shard(path / name) for name in names)
    check_tensor_names(
        path, tuple(replace(shard, file_name=name) for shard, name in zip(shards, names, strict=True)), index
    )
    others = sorted(name for name, is_inside in regular_files(path) if is_inside and name not in names)
    return Checkpoint(
        path=path,
        config=read_json_object(path / CONFIG_NAME),
        shards=shards,
        index=index,
        side_files=tuple(others),
    )


def _elsewhere(file: Path) -> Shard:
    """Return a shard that is named by its whole path, which a directory before it does not change."""
    shard = read_shard(file)
    where = str(file.resolve())
    return replace(shard, file_name=where, tensors=tuple(replace(tensor, shard=where) for tensor in shard.tensors))
