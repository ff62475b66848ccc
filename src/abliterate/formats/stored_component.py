"""How much of a plain weight lies along directions, row by row in the order of its file: |U W| and |W| without torch.

`component` measures a tensor in hand, and what is stored in few bits. Both sum in float64, in another order.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from abliterate.checkpoints.file_ranges import became_shorter, is_filled
from abliterate.checkpoints.safetensors_file import TensorInfo
from abliterate.directions import orthonormal_basis
from abliterate.errors import CheckpointError
from abliterate.formats.segments import STORED, bits_of, kernels_for

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.float64]
    Stored = NDArray[Any]

# Bytes that are read at a time, and elements that are worked on together, which stay in the cache.
_READ_BYTES = 4 << 20
_PART_ELEMENTS = 1 << 16
# Of each dtype the distance from 1 to the next number, and the least normal number.
_EPS = {"F16": 2.0**-10, "BF16": 2.0**-7, "F32": 2.0**-23, "F64": 2.0**-52}
_TINY = {"F16": 2.0**-14, "BF16": 2.0**-126, "F32": 2.0**-126, "F64": 2.0**-1022}


class Component(NamedTuple):
    """How much of a tensor lies along directions U; Frobenius norms.

    Attributes:
        along: |U W|.
        norm: |W|.
    """

    along: float
    norm: float

    @property
    def share(self) -> float:
        """|U W| / |W|, and 0 where W is 0."""
        return self.along / self.norm if self.norm else 0.0

    def survivor_of(self, before: "Component") -> float:
        """Return |U W'| / |U W|, W' being this tensor and W what it was `before`; 0 where there was nothing."""
        return self.along / before.along if before.along else 0.0


def roundoff(dtype: str) -> float:
    """Return the unit roundoff of a dtype, as safetensors names it."""
    return _EPS[dtype] / 2


def residue_bound(dtype: str, *, d_model: int, elements: int, before: float, after: float) -> float:
    """Return the largest |U W'| that rounding can leave behind after `projection.project_out` with strength 1.

    Three terms, by Cauchy-Schwarz over each column of W' (the rows of U are orthonormal). They are those of plain
    rounding, of which feedback leaves a small part:

    * rounding W' to its dtype moves each entry by at most u |w'|, so u |W'| in all (u = 2^-8 for bfloat16,
      2^-11 for float16, 2^-24 for float32, 2^-53 for float64);
    * entries below the smallest normal number move by half the smallest step: that step/2 * sqrt(elements);
    * the coefficients U W come from sums of d_model terms in float32 (or float64): 4 sqrt(d_model) u |W|.

    Args:
        dtype: What the weight is stored in, as safetensors names it.
        d_model: Length of the residual axis.
        elements: Number of entries of the weight.
        before: |W|, Frobenius norm before the edit.
        after: |W'|, Frobenius norm after it.
    """
    rounding = roundoff(dtype) * after
    underflow = _TINY[dtype] * _EPS[dtype] / 2 * elements**0.5
    arithmetic = 4 * d_model**0.5 * roundoff("F64" if dtype == "F64" else "F32") * before
    return float(rounding + underflow + arithmetic)


def read_numbers(directory: Path, info: TensorInfo) -> "Numbers":
    """Return the numbers of a plain tensor, as float64.

    Raises:
        CheckpointError: The file cannot be read or has become shorter.
    """
    import numpy as np

    stored = [rows.ravel() for rows in _rows(directory, info, row_length=max(1, math.prod(info.shape)))]
    parts = [(part.astype(np.uint32) << 16).view(np.float32) if info.dtype == "BF16" else part for part in stored]
    return np.concatenate([np.empty(0), *parts]).reshape(info.shape)


def directions_behind(directions: "Numbers", norms: Sequence[tuple["Numbers", bool]]) -> "Numbers":
    """Return U, the orthonormal directions that a writer's output must not have for the stream to be clean of R.

    Args:
        directions: R, [k, d_model], what the stream shall not have.
        norms: What each norm between writer and stream multiplies by, [d_model], and whether it takes the mean away;
            innermost first.

    Returns:
        U; it has fewer rows than R only if the norms take a direction away by themselves.
    """
    vectors = directions
    for gamma, is_centered in reversed(norms):
        vectors = vectors * gamma
        if is_centered:
            vectors = vectors - vectors.mean(axis=1, keepdims=True)
    return orthonormal_basis(vectors)[0]


def measure(directory: Path, info: TensorInfo, *, directions: "Numbers", residual_axis: int) -> Component:
    """Return |U W| and |W| of a plain tensor as it lies in its file.

    Args:
        directory: Where its shard is.
        info: What the header says of it; its dtype is one of `PLAIN_DTYPES`.
        directions: U, [k, d_model], orthonormal rows.
        residual_axis: The axis of it that indexes the residual stream.

    Raises:
        CheckpointError: The file cannot be read or has become shorter.
        ValueError: The directions are not of the axis' length.
    """
    if directions.shape[1] != info.shape[residual_axis]:
        raise ValueError(
            f"directions have shape {list(directions.shape)}, the residual axis has length {info.shape[residual_axis]}"
        )
    meter = ComponentMeter(directions, shape=info.shape, residual_axis=residual_axis, dtype=info.dtype)
    for rows in _rows(directory, info, row_length=meter.row_length):
        meter.add(rows)
    return meter.result()


class ComponentMeter:
    """Measures |U W| and |W| of a plain tensor that is given row by row in the order of its file.

    Its sums do not depend on how the rows are dealt out, as long as that is done in the same way each time.

    Args:
        directions: U, [k, d_model], orthonormal rows.
        shape: Shape of the tensor.
        residual_axis: The axis of it that indexes the residual stream.
        dtype: What it is stored as.
        fused: See `projection.project_out`.

    Attributes:
        row_length: What a row has: a vector along the residual axis, or what one output of the writer reads.
    """

    def __init__(
        self, directions: "Numbers", *, shape: Sequence[int], residual_axis: int, dtype: str, fused: bool = False
    ) -> None:
        import numpy as np

        self._directions, self._dtype = np.ascontiguousarray(directions, np.float64), dtype
        self._kernels = kernels_for(dtype) if fused else None
        axis = residual_axis % len(shape)
        d_model, trailing = shape[axis], math.prod(shape[axis + 1 :])
        self._d_model, self._is_last = d_model, axis == len(shape) - 1
        self.row_length = d_model if self._is_last else trailing
        self._sums, self._row = np.zeros((len(directions), 0 if self._is_last else trailing)), 0
        self._along_squared = self._total_squared = 0.0
        per_part = max(1, _PART_ELEMENTS // max(1, self.row_length))
        self._wide = np.empty((0 if self._kernels else per_part, self.row_length))
        # Room for bfloat16 as what it is the upper half of.
        self._single = np.empty(self._wide.shape if dtype == "BF16" else (0, self.row_length), np.uint32)

    def add(self, rows: "Stored") -> None:
        """Take the next rows, [n, row_length], as `segments.STORED` says."""
        import numpy as np

        # What is not finite is found by what comes out.
        with np.errstate(all="ignore"):
            if self._kernels is not None:
                self._add_fused(self._kernels, bits_of(rows, dtype=self._dtype))
                return
            for first in range(0, len(rows), len(self._wide)):
                self._add_wide(self._widened(rows[first : first + len(self._wide)]))

    def result(self) -> Component:
        """Return |U W| and |W| of all rows so far."""
        return Component(self._along_squared**0.5, self._total_squared**0.5)

    def _widened(self, rows: "Stored") -> "Numbers":
        import numpy as np

        wide = self._wide[: len(rows)]
        if self._dtype == "BF16":
            rows = np.left_shift(rows, 16, out=self._single[: len(rows)], dtype=np.uint32).view(np.float32)
        wide[:] = rows
        return wide

    def _add_wide(self, rows: "Numbers") -> None:
        import numpy as np

        # Sums of `einsum` and not products of matrices, for which the library has threads of its own, that wait for
        # one another at each part: ten times the processor's time beside ours.
        flat = rows.ravel()
        self._total_squared += float(np.einsum("i,i->", flat, flat))
        if self._is_last:
            self._along_squared += float(np.square(np.einsum("ij,kj->ik", rows, self._directions)).sum())
            return
        for part, directions in self._parts(rows):
            self._sums += np.einsum("km,mn->kn", directions, part)

    def _add_fused(self, kernels: ModuleType, rows: "Stored") -> None:
        import numpy as np

        if self._is_last:
            along_squared, total_squared = kernels.measure_vectors(rows, self._directions)
            self._along_squared += along_squared
            self._total_squared += total_squared
            return
        for part, directions in self._parts(rows):
            self._total_squared += kernels.measure_rows(part, np.ascontiguousarray(directions), self._sums)

    def _parts(self, rows: "Stored") -> "Iterator[tuple[Stored, Numbers]]":
        """Yield rows of one matrix with what U is in them; the sums of a matrix that is whole are counted."""
        while len(rows):
            part = rows[: self._d_model - self._row]
            yield part, self._directions[:, self._row : self._row + len(part)]
            self._row += len(part)
            rows = rows[len(part) :]
            if self._row == self._d_model:
                self._along_squared += float((self._sums * self._sums).sum())
                self._sums[:] = 0.0
                self._row = 0


def _rows(directory: Path, info: TensorInfo, *, row_length: int) -> "Iterator[Stored]":
    """Yield the stored numbers of a tensor as rows, some at a time; what is yielded lasts until the next."""
    import numpy as np

    if info.start == info.end:
        return
    path, item = directory / info.shard, np.dtype(STORED[info.dtype]).itemsize
    per_part = max(1, _PART_ELEMENTS // row_length)
    per_read = max(per_part, _READ_BYTES // (row_length * item) // per_part * per_part)
    n_rows = (info.end - info.start) // (row_length * item)
    memory = bytearray(min(per_read, n_rows) * row_length * item)
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(info.start)
            for first in range(0, n_rows, per_read):
                count = min(per_read, n_rows - first)
                if not is_filled(file, memoryview(memory)[: count * row_length * item]):
                    raise became_shorter(path)
                yield np.frombuffer(memory, STORED[info.dtype], count * row_length).reshape(count, row_length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
