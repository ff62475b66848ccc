"""What became of each tensor of a base in a model: every pair read once, by several threads, and what was found.

Bytes are compared first, which is all that a tensor costs that is the same. One that differs is read again from where
the system has just put it, as numbers.
"""

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import local
from typing import Literal

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from abliterate.architectures.names import Part, parse_name
from abliterate.architectures.writers import ResidualWriter, StreamMap
from abliterate.checkpoints.file_ranges import n_cores
from abliterate.editing.checks import read_wide
from abliterate.inspection.change import ABOVE_ROUNDING, MatrixChange, measure_change
from abliterate.inspection.directional import Projection, find_projection, measured_along
from abliterate.inspection.numbers import Array, ByteComparer, MatrixPair, has_few_levels, is_numbers, matrices_of
from abliterate.inspection.pairing import TensorPair
from abliterate.inspection.report import Kind, PartName
from abliterate.progress import Advance

Status = Literal["equal_bytes", "equal_numbers", "changed"]

# More threads than disks and memory can serve gain nothing.
_MOST_THREADS = 8
# Numbers of a model, above which the fused arithmetic saves more time than it takes to be loaded.
_WORTH_FUSING = 1 << 30
# A change of a higher rank than this is not tried along the other axis: nobody projects out so many directions.
_MOST_DIRECTIONS = 4
# What 8 and 4 bits move numbers by where they were stored plain again, as a share of their norm.
_COARSE = {8: 0.045, 4: 0.16}
_PARTS: Mapping[Part, PartName] = {
    Part.HEAD: "head",
    Part.READER: "reader",
    Part.OUTSIDE_READER: "reader",
    Part.NORM: "norm",
    Part.POST_NORM: "norm",
    Part.EMBEDDING_NORM: "norm",
    Part.TOWER: "tower",
    Part.PREDICTION: "prediction",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Finding:
    """What became of one tensor.

    Attributes:
        pair: The tensor on both sides.
        part: What it is.
        layer: Its block; None outside.
        writer: How it writes to the stream; None where it does not.
        status: Whether its bytes, or its numbers, are the same.
        kind: What its change is; None where it has none.
        norm: |W|.
        change: |D|.
        rounding: What rounding makes of it.
        rank: Of a stack the largest; None where it is not low.
        rest: |D| without what that rank holds.
        projections: What was projected out of it, of a stack one for each changed matrix; empty where nothing was.
        vectors: w and d of a writer that is a vector.
    """

    pair: TensorPair
    part: PartName
    layer: int | None
    writer: ResidualWriter | None
    status: Status
    kind: Kind | None = None
    norm: float = 0.0
    change: float = 0.0
    rounding: float = 0.0
    rank: int | None = 0
    rest: float = 0.0
    projections: tuple[Projection, ...] = ()
    vectors: tuple[Array, Array] | None = None

    @property
    def is_edited(self) -> bool:
        """Whether it is changed by more than rounding."""
        return self.kind is not None and self.kind != "rounded"


class PairReader:
    """Reads the pairs of two checkpoints."""

    def __init__(self, *, base: Path, model: Path, stream: StreamMap | None, d_model: int | None) -> None:
        """Take where both lie, what the base's tensors are (None: not known), and the width of the stream."""
        self._base, self._model = base, model
        self._stream, self._d_model = stream, d_model
        self._writers = {} if stream is None else {writer.tensor_name: writer for writer in stream.writers}
        self._thread = local()
        self._fused = False

    def read(self, pairs: Sequence[TensorPair], *, same_files: frozenset[str], advance: Advance) -> list[Finding]:
        """Return what became of each tensor, in the order of `pairs`.

        Args:
            pairs: The tensors.
            same_files: Shards of the model that are known to hold the base's bytes, and need not be there.
            advance: Told the bytes of the model that are done.

        Raises:
            CheckpointError: A file cannot be read, or what is changed holds NaN or infinite values.
        """
        self._fused = sum(math.prod(pair.new.shape) for pair in pairs) >= _WORTH_FUSING
        is_decoded = any(side.encoding is not None for pair in pairs for side in (pair.old, pair.new))
        # Large ones first, so that no thread is left with one at the end.
        order = sorted(range(len(pairs)), key=lambda index: pairs[index].new.start - pairs[index].new.end)
        found: dict[int, Finding] = {}
        with _threads(is_decoded=is_decoded) as pool:
            tasks = {index: pool.submit(self._find, pairs[index], same_files) for index in order}
            try:
                for index, task in tasks.items():
                    found[index] = task.result()
                    advance(pairs[index].new.end - pairs[index].new.start)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return [found[index] for index in range(len(pairs))]

    # What holds no number is found by its sums, and said in one line.
    @np.errstate(all="ignore")
    def _find(self, pair: TensorPair, same_files: frozenset[str]) -> Finding:
        writer = self._writers.get(pair.old.name)
        part, layer = part_of(pair.old.name, writer, self._stream)
        found = Finding(pair=pair, part=part, layer=layer, writer=writer, status="equal_bytes")
        is_vector = writer is not None and len(pair.new.shape) == 1
        stored = (pair.new,) if pair.new.encoding is None else pair.new.encoding.stored
        if all(each.shard in same_files for each in stored) and pair.old.name == pair.new.name:
            return replace(found, vectors=self._vectors(pair)) if is_vector else found
        if not hasattr(self._thread, "comparer"):
            self._thread.comparer = ByteComparer()
        if self._thread.comparer.same((self._base, pair.old), (self._model, pair.new)):
            return replace(found, vectors=self._vectors(pair)) if is_vector else found
        if not is_numbers(pair.old) or not is_numbers(pair.new):
            return replace(found, status="changed", kind="dense", rank=None)
        return self._read_numbers(replace(found, vectors=self._vectors(pair) if is_vector else None))

    def measured_along(self, found: Finding, vectors: Array) -> Finding:
        """Return what was projected out of a tensor, measured along directions [k, d_model] as it writes them."""
        pair = found.pair
        matrices = matrices_of(pair.old, pair.new, old_directory=self._base, new_directory=self._model)
        if len(matrices) != len(found.projections):
            return found
        both = zip(matrices, found.projections, strict=True)
        return replace(found, projections=tuple(measured_along(one, other, vectors.T) for one, other in both))

    def _vectors(self, pair: TensorPair) -> tuple[Array, Array]:
        old = read_wide(self._base, pair.old)
        return old, read_wide(self._model, pair.new) - old

    def _read_numbers(self, found: Finding) -> Finding:
        pair = found.pair
        matrices = matrices_of(pair.old, pair.new, old_directory=self._base, new_directory=self._model)
        axis = self._axis(found)
        seed = zlib.crc32(pair.old.name.encode())
        changes, projections = [], []
        for each in matrices:
            change = _with_grid(each, measure_change(each, axis=axis, seed=seed, fused=self._fused))
            changes.append(change)
            if change.change and change.rank and len(pair.new.shape) > 1:
                projections.append(self._projection(each, change, seed))
        norms = [math.hypot(*(getattr(each, key) for each in changes)) for key in ("norm", "change", "rounding")]
        moved = [each for each in changes if each.change]
        if not moved:
            return replace(found, status="equal_numbers", norm=norms[0])
        kept = tuple(each for each in projections if each is not None)
        whole = len(kept) == len(moved)
        return replace(
            found,
            status="changed",
            kind=_kind(found, moved, kept, is_requantised=_other_grid(pair, matrices[0])),
            norm=norms[0],
            change=norms[1],
            rounding=norms[2],
            rank=None if any(each.is_full for each in moved) else max(each.rank for each in moved),
            rest=math.hypot(*(each.rest for each in moved)),
            projections=kept if whole else (),
        )

    def _axis(self, found: Finding) -> int:
        """Return the axis of its matrices that lies along the stream."""
        shape = found.pair.new.shape
        if found.writer is not None and len(shape) > 1:
            return found.writer.residual_axis - (len(shape) - 2)
        return 1 if len(shape) < 2 or shape[-1] == self._d_model else 0

    def _projection(self, pair: MatrixPair, change: MatrixChange, seed: int) -> Projection | None:
        found = find_projection(pair, change, other=None)
        if found is not None or change.span is None or change.rank > _MOST_DIRECTIONS:
            return found
        other = 1 - change.span.axis
        if pair.shape[other] != self._d_model:
            return None
        return find_projection(pair, change, other=_with_grid(pair, measure_change(pair, axis=other, seed=seed)))


def part_of(name: str, writer: ResidualWriter | None, stream: StreamMap | None) -> tuple[PartName, int | None]:
    """Return what a tensor of the base is, and in which block it lies."""
    if writer is not None:
        return writer.role, writer.layer
    said = parse_name(name, has_towers=True)
    if said.layer is not None and stream is not None and said.layer >= stream.n_layers:
        return "prediction", said.layer
    if said.role is not None and stream is None:
        return said.role, said.layer
    return _PARTS.get(said.part, "other"), said.layer


def _with_grid(pair: MatrixPair, change: MatrixChange) -> MatrixChange:
    """Return a change whose rounding is that of the coarse grid on which the model's numbers lie, where they do."""
    if change.rest_is_rounding or pair.old.info.encoding is not None or pair.new.info.encoding is not None:
        return change
    bits = has_few_levels(pair)
    if bits is None:
        return change
    return replace(change, rounding=_COARSE[bits] * change.norm / ABOVE_ROUNDING, beyond=None)


def _other_grid(pair: TensorPair, matrix: MatrixPair) -> bool:
    """Return whether a tensor is stored in another way than in the base, or as if it had been."""
    if pair.old.stored_dtype != pair.new.stored_dtype or pair.old.encoding is not None or pair.new.encoding is not None:
        return True
    return has_few_levels(matrix) is not None


def _kind(found: Finding, moved: Sequence[MatrixChange], kept: Sequence[Projection], *, is_requantised: bool) -> Kind:
    if is_requantised and all(each.is_rounding for each in moved):
        return "rounded"
    if len(found.pair.new.shape) < 2:
        return "dense"
    if len(kept) == len(moved) and all(each.is_whole for each in kept):
        return "directional"
    explained = all(each.rank and not each.is_full and each.rest_is_rounding for each in moved)
    return "low_rank" if explained else "dense"


@contextmanager
def _threads(*, is_decoded: bool) -> Iterator[ThreadPoolExecutor]:
    """Yield as many threads as there are cores, each of which computes alone."""
    begin = _decode_alone if is_decoded else None
    with (
        threadpool_limits(1, user_api="blas"),
        ThreadPoolExecutor(max_workers=min(n_cores(), _MOST_THREADS), initializer=begin) as pool,
    ):
        yield pool


def _decode_alone() -> None:
    import torch

    torch.set_num_threads(1)
