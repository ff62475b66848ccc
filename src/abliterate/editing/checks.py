"""Holding an edited checkpoint against its base, and what its record promises.

The same layout; the same bytes but for what was planned; and how much of the directions the edited tensors still
have, reread from the disk. Each check returns what it found as plain values or lines of text, and decides nothing:
`orthogonalize` runs them on what it wrote before it appears, `verify` on what lies there.

The residual stream is clean if every writer is edited at strength 1. The logits besides equal those of directional
ablation if no norm stands between a writer and the stream and the output head keeps its rows (docs/exactness.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.architectures.writers import ROLES, PostNorm, ResidualWriter
from abliterate.checkpoints.checkpoint import Checkpoint, with_changes
from abliterate.checkpoints.encoding import EditableEncoding
from abliterate.checkpoints.file_ranges import in_threads, is_filled
from abliterate.checkpoints.safetensors_file import PLAIN_DTYPES, TensorInfo, encoded_parts
from abliterate.editing.plan import RemovedDirections
from abliterate.errors import CheckpointError
from abliterate.formats.stored_component import Component, directions_behind, measure, read_numbers, residue_bound
from abliterate.progress import Advance

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_CHUNK_BYTES = 1 << 20
# Of what is stored quantised, the whole numbers of eight bits, whose steps are about what an edit changes.
_FINE = {"I8", "Q8_0"}


def _ignore(_bytes: int) -> None:
    pass


def rounding_bound(
    info: TensorInfo, *, residual_axis: int, k: int, strength: float, before: Component, after: float
) -> float:
    """Return how far rounding may leave |U W'| from what was to be left of it.

    Args:
        info: The edited tensor.
        residual_axis: Its axis that indexes the residual stream.
        k: Number of directions.
        strength: Share of the component that was removed.
        before: |U W| and |W|.
        after: |W'|.
    """
    d_model = info.shape[residual_axis]
    if isinstance(info.encoding, EditableEncoding):
        return max(1.0, abs(strength)) * info.encoding.largest_residue(
            d_model=d_model, k=k, along=before.along, norm=before.norm
        )
    return residue_bound(
        info.dtype if info.dtype in PLAIN_DTYPES else "F32",
        d_model=d_model,
        elements=math.prod(info.shape),
        before=max(1.0, abs(strength)) * before.norm,
        after=after,
    )


def read_norm(checkpoint: Checkpoint, norm: PostNorm) -> tuple[NDArray[np.float64], bool]:
    """Read what a norm multiplies by, from the shard it is in, and whether it takes the mean away.

    Raises:
        CheckpointError: It is not there, or holds NaN or infinite values.
    """
    import numpy as np

    try:
        weight = read_wide(checkpoint.path, checkpoint.tensor(norm.weight))
    except KeyError as error:
        raise CheckpointError(f"{checkpoint.path}: there is no tensor {norm.weight}; download it again") from error
    if not bool(np.isfinite(weight).all()):
        raise CheckpointError(
            f"{checkpoint.path}: tensor {norm.weight} holds NaN or infinite values; download the checkpoint again"
        )
    return 1 + weight if norm.plus_one else weight, norm.centered


def read_wide(path: Path, info: TensorInfo) -> NDArray[np.float64]:
    """Read the numbers of a tensor, as float64, whatever it is stored as.

    Raises:
        CheckpointError: The file cannot be read or has become shorter, or what is stored cannot be decoded.
    """
    if _is_plain(info):
        return read_numbers(path, info)
    from abliterate.checkpoints.stored_tensors import read_tensor

    return read_tensor(path, info).double().numpy()


def _is_plain(info: TensorInfo) -> bool:
    return info.encoding is None and info.dtype in PLAIN_DTYPES


def directions_through(
    checkpoint: Checkpoint, removed: RemovedDirections, *, writers: Iterable[ResidualWriter]
) -> dict[str, NDArray[np.float64]]:
    """Return the directions U [rank, d_model] that each writer must not have, by the name of its tensor.

    Args:
        checkpoint: Where the norms are; base and edited checkpoint hold the same.
        removed: What is taken out.
        writers: Behind those that norms follow, U is what is taken out as it is seen through the norms.

    Raises:
        CheckpointError: A norm is missing or not finite.
    """
    found: dict[tuple[tuple[PostNorm, ...], int | None], NDArray[np.float64]] = {}
    by_name = {}
    for writer in writers:
        key = (writer.norm_chain, None if removed.by_layer is None else writer.layer)
        if key not in found:
            norms = [read_norm(checkpoint, norm) for norm in writer.norm_chain]
            found[key] = directions_behind(removed.of(writer), norms)
        by_name[writer.tensor_name] = found[key]
    return by_name


def compare_layouts(
    base: Checkpoint,
    edited: Checkpoint,
    *,
    added: Collection[str] = (),
    config_changes: Mapping[str, Any] | None = None,
) -> list[str]:
    """Compare shards, tensor names, order, shapes, dtypes, header metadata, index and config.

    Args:
        base: The checkpoint that was edited.
        edited: What came of it.
        added: Tensors that the edited one has besides.
        config_changes: Dotted path in config.json -> the value that it must have instead.

    Returns:
        A line per difference that is not declared; empty if there is none.
    """
    problems = []
    old_shards = {shard.file_name: shard for shard in base.shards}
    new_shards = {shard.file_name: shard for shard in edited.shards}
    problems += [f"{name}: this shard of the base is missing" for name in old_shards.keys() - new_shards.keys()]
    problems += [f"{name}: the base has no such shard" for name in new_shards.keys() - old_shards.keys()]
    found_added = set()
    for name in sorted(old_shards.keys() & new_shards.keys()):
        old, new = old_shards[name], new_shards[name]
        new_tensors = [tensor for tensor in new.tensors if tensor.name not in added]
        found_added |= {tensor.name for tensor in new.tensors if tensor.name in added}
        if old.metadata != new.metadata:
            problems.append(f"{name}: the header's metadata is {new.metadata}, in the base {old.metadata}")
        if len(new_tensors) == len(new.tensors) and old.header_bytes != new.header_bytes:
            problems.append(f"{name}: the header is not that of the base")
        if [_layout(tensor) for tensor in old.tensors] != [_layout(tensor) for tensor in new_tensors]:
            problems += _tensor_differences(name, old.tensors, new_tensors)
    problems += [f"{name}: this tensor was to be added and is missing" for name in sorted(set(added) - found_added)]
    if with_changes(base.config, config_changes or {}) != edited.config:
        problems.append("config.json: differs from the base's by more than the recorded changes")
    return problems + _index_differences(base, edited, added)


def compare_bytes(
    base: Checkpoint,
    edited: Checkpoint,
    *,
    changed: Collection[str],
    copies: Mapping[str, str] | None = None,
    other_files: Collection[str] = (),
    advance: Advance = _ignore,
) -> list[str]:
    """Compare the bytes of every tensor that was not to change, and of other files.

    Args:
        base: The checkpoint that was edited.
        edited: What came of it; its layout must be that of the base (`compare_layouts`).
        changed: Tensors that may differ: planned edits.
        copies: New tensor -> the base's tensor whose bytes it must have.
        other_files: Side files to compare besides, relative paths.
        advance: Told the bytes compared.

    Returns:
        A line per tensor or file that differs; empty if there is none.

    Raises:
        CheckpointError: A file cannot be read.
    """
    new_infos = {tensor.name: tensor for tensor in edited.tensors()}
    old_infos = {tensor.name: tensor for tensor in base.tensors()}
    kept = [old for old in old_infos.values() if old.name not in changed and old.name in new_infos]
    copied = [(name, original) for name, original in (copies or {}).items()]
    pairs = [(old, new_infos[old.name]) for old in kept]
    pairs += [(old_infos[original], new_infos[name]) for name, original in copied]
    same = in_threads(lambda pair: _same_bytes(base.path, edited.path, *pair, advance), pairs)
    problems = [
        f"{new_infos[old.name].shard}: tensor {old.name} differs, and no edit of it was planned"
        for old, is_same in zip(kept, same, strict=False)
        if not is_same
    ]
    problems += [
        f"{new_infos[name].shard}: tensor {name} is not the copy of {original} that it was to be"
        for (name, original), is_same in zip(copied, same, strict=True)
        if not is_same
    ]
    for name in other_files:
        ends = [(path / name).stat().st_size if (path / name).is_file() else -1 for path in (base.path, edited.path)]
        whole = [TensorInfo(name=name, shard=name, dtype="U8", shape=(), start=0, end=end) for end in ends]
        if -1 in ends or ends[0] != ends[1] or not _same_bytes(base.path, edited.path, whole[0], whole[1], advance):
            problems.append(f"{name}: is not the base's file")
    return problems


def measure_survivors(
    edited: Checkpoint,
    *,
    base: Checkpoint | None,
    writers: Sequence[ResidualWriter],
    made_from: Mapping[str, str] | None = None,
    removed: RemovedDirections,
    advance: Advance = _ignore,
) -> Iterator[tuple[Component | None, Component]]:
    """Measure each edited tensor, reread from the disk, and what it was before where there is a base.

    Args:
        edited: The edited checkpoint.
        base: What it was made from; None measures the edited one alone.
        writers: The edited tensors.
        made_from: Name of an edited tensor -> the base's tensor it was made from, where that has another name.
        removed: What was taken out.
        advance: Told the bytes read of the edited checkpoint.

    Yields:
        For each of `writers` |U W| and |W|, None without a base, and |U W'| and |W'|; in float64.

    Raises:
        CheckpointError: A file cannot be read, or a tensor or norm is missing.
    """
    new_infos = {tensor.name: tensor for tensor in edited.tensors()}
    old_infos = {} if base is None else {tensor.name: tensor for tensor in base.tensors()}

    stored = [
        infos[each.tensor_name] for infos in (old_infos, new_infos) for each in writers if each.tensor_name in infos
    ]
    is_plain = all(map(_is_plain, stored))
    measure_one = (_plain_meter if is_plain else _meter)(edited, removed, writers)

    def pairs() -> Iterator[tuple[ResidualWriter, TensorInfo | None, TensorInfo]]:
        for writer in writers:
            info = _find(new_infos, writer.tensor_name, edited)
            name = (made_from or {}).get(writer.tensor_name, writer.tensor_name)
            yield writer, None if base is None else _find(old_infos, name, base), info

    def measured(pair: tuple[ResidualWriter, TensorInfo | None, TensorInfo]) -> tuple[Component | None, Component]:
        writer, old, new = pair
        before = None if old is None or base is None else measure_one(base, old, writer)
        after = measure_one(edited, new, writer)
        advance(new.end - new.start)
        return before, after

    # What is decoded takes four to eight times its room, so there one comes after the other.
    yield from in_threads(measured, pairs()) if is_plain else map(measured, pairs())


Meter = Callable[[Checkpoint, TensorInfo, ResidualWriter], Component]


def _plain_meter(edited: Checkpoint, removed: RemovedDirections, writers: Sequence[ResidualWriter]) -> Meter:
    directions = directions_through(edited, removed, writers=writers)

    def measured(checkpoint: Checkpoint, info: TensorInfo, writer: ResidualWriter) -> Component:
        basis = directions[writer.tensor_name]
        return measure(checkpoint.path, info, directions=basis, residual_axis=writer.residual_axis)

    return measured


def _meter(edited: Checkpoint, removed: RemovedDirections, writers: Sequence[ResidualWriter]) -> Meter:
    import torch

    from abliterate.checkpoints.stored_tensors import read_tensor
    from abliterate.formats.component import component_and_norm

    directions = directions_through(edited, removed, writers=writers)

    def measured(checkpoint: Checkpoint, info: TensorInfo, writer: ResidualWriter) -> Component:
        basis = torch.from_numpy(directions[writer.tensor_name])
        # Of a quantised tensor one part at a time: decoded it has four to eight times the size.
        parts = encoded_parts(info)
        axis = writer.residual_axis - (len(info.shape) - len(parts[0].shape))
        found = [
            component_and_norm(read_tensor(checkpoint.path, part), directions=basis, residual_axis=axis)
            for part in parts
        ]
        return Component(math.hypot(*(each.along for each in found)), math.hypot(*(each.norm for each in found)))

    return measured


def _find(infos: Mapping[str, TensorInfo], name: str, checkpoint: Checkpoint) -> TensorInfo:
    if name not in infos:
        raise CheckpointError(f"{checkpoint.path}: there is no tensor {name}; is it the checkpoint that was recorded?")
    return infos[name]


def _layout(tensor: TensorInfo) -> tuple[str, str, tuple[int, ...], int]:
    return tensor.name, tensor.dtype, tensor.shape, tensor.end - tensor.start


def _tensor_differences(shard: str, old: Sequence[TensorInfo], new: Sequence[TensorInfo]) -> list[str]:
    olds, news = {tensor.name: tensor for tensor in old}, {tensor.name: tensor for tensor in new}
    problems = [f"{shard}: tensor {name} of the base is missing" for name in olds.keys() - news.keys()]
    problems += [f"{shard}: the base has no tensor {name}" for name in news.keys() - olds.keys()]
    for name in sorted(olds.keys() & news.keys()):
        if _layout(olds[name]) != _layout(news[name]):
            problems.append(
                f"{shard}: tensor {name} is {news[name].dtype} {list(news[name].shape)}, "
                f"in the base {olds[name].dtype} {list(olds[name].shape)}"
            )
    return problems or [f"{shard}: the tensors are in another order than in the base"]


def _index_differences(base: Checkpoint, edited: Checkpoint, added: Collection[str]) -> list[str]:
    if (base.index is None) != (edited.index is None):
        return ["the shard index: one of the two checkpoints has none"]
    if base.index is None or edited.index is None:
        return []
    old, new = dict(base.index), dict(edited.index)
    old_map, new_map = old.pop("weight_map"), new.pop("weight_map")
    kept = {name: shard for name, shard in new_map.items() if name not in added}
    if old_map != kept:
        return ["the shard index: its weight_map is not that of the base"]
    if not added and old != new:
        return ["the shard index: its metadata is not that of the base"]
    return []


def _are_decoded(old_path: Path, new_path: Path, old: TensorInfo, new: TensorInfo, advance: Advance) -> bool:
    """Return whether `new` is stored as what `old` means, in bfloat16."""
    from abliterate.checkpoints.stored_tensors import read_tensor, tensor_bytes

    try:
        with (new_path / new.shard).open("rb") as file:
            file.seek(new.start)
            for matrix in encoded_parts(old):
                plain = tensor_bytes(read_tensor(old_path, matrix).bfloat16())
                if file.read(len(plain)) != plain:
                    return False
                advance(matrix.end - matrix.start)
            return file.tell() == new.end
    except OSError as error:
        raise CheckpointError(f"{error.filename or new_path}: cannot be read: {error.strerror or error}") from error


def _same_bytes(old_path: Path, new_path: Path, old: TensorInfo, new: TensorInfo, advance: Advance) -> bool:
    if old.encoding is not None and new.encoding is None:
        return _are_decoded(old_path, new_path, old, new, advance)
    left = old.end - old.start
    if left != new.end - new.start:
        return False
    # Memory that is taken anew for each chunk costs more than reading it.
    buffers = [bytearray(min(left, _CHUNK_BYTES)) for _ in range(2)]
    try:
        with (
            (old_path / old.shard).open("rb", buffering=0) as first,
            (new_path / new.shard).open("rb", buffering=0) as second,
        ):
            first.seek(old.start)
            second.seek(new.start)
            while left:
                count = min(left, _CHUNK_BYTES)
                if count < len(buffers[0]):
                    buffers = [bytearray(count) for _ in range(2)]
                if not (is_filled(first, memoryview(buffers[0])) and is_filled(second, memoryview(buffers[1]))):
                    return False
                if buffers[0] != buffers[1]:
                    return False
                left -= count
                advance(count)
    except OSError as error:
        raise CheckpointError(f"{error.filename or new_path}: cannot be read: {error.strerror or error}") from error
    return True


def reasons_against_clean_stream(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Return why the edited model's stream may still have the directions; empty if it may not.

    Args:
        record: The content of `abliteration.json`.
    """
    options = record.get("options") or {}
    reasons = []
    if options.get("partial"):
        reason = (record.get("partial") or {}).get("reason", "no edit of weights cleans this stream whole")
        reasons.append(f"the edit is partial: {reason}")
    if options.get("strengths"):
        reasons.append("each layer and role is edited as far as a file of strengths says")
    strength = float(options.get("strength", 1.0))
    if strength != 1.0:
        reasons.append(f"strength is {strength:g}, so {abs(1 - strength):.3g} of the component is kept")
    if options.get("layers") is not None:
        first, end = options["layers"]
        reasons.append(f"only layers {first} to {end - 1} were edited")
    left_out = [role for role in ROLES if role not in options.get("components", ROLES)]
    if left_out:
        reasons.append(f"components left out: {', '.join(left_out)}")
    if _is_tied(record) and options.get("tied") == "skip":
        reasons.append("the tied embeddings were skipped")
    if options.get("add"):
        reasons.append("an activation addition puts the direction into the stream on purpose")
    return tuple(reasons)


def reasons_against_equal_logits(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Return why the edited model's logits need not be those of directional ablation; empty if they must be.

    Args:
        record: The content of `abliteration.json`.
    """
    options = record.get("options") or {}
    reasons = list(reasons_against_clean_stream(record))
    if _is_tied(record) and options.get("tied", "edit") == "edit":
        reasons.append("the embeddings are tied, so the output head was edited with them")
    if options.get("preserve_norms"):
        reasons.append("norms were preserved, which scales what is left")
    if any(tensor.get("norm_chain") for tensor in record.get("tensors") or ()):
        reasons.append("norms stand between writers and the stream, so what was taken away is not the component alone")
    if any(tensor.get("stored_as") and tensor.get("dtype") not in _FINE for tensor in record.get("tensors") or ()):
        reasons.append("weights in few bits were rounded anew, by more than what was taken away")
    return tuple(reasons)


def _is_tied(record: Mapping[str, Any]) -> bool:
    return bool((record.get("base") or {}).get("tied_embeddings"))
