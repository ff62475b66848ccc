"""What the projection's arithmetic is made of, whoever does it: the order of its sums, and the axis cut in segments.

`projection` says what the segments are for. It does the arithmetic with torch, anywhere; `fused` does it in compiled
code, which needs no torch, with the same bytes.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Stored = NDArray[Any]

# Terms that are added before the sum goes on in float64: rows that follow each other, or numbers along a vector that
# lie as far apart as there are lanes.
CHUNK_ROWS = 32
N_LANES = 128

# A fibre of which less than this share is left has lost its direction to rounding: its norm is not restored.
LEAST_LEFT = 1e-3

# A segment of the axis ends where it has at most so many times what is left of any direction, or, where many entries
# are left, so many that each is moved by a quarter of a rounding error. The last segment has about two entries.
_MOST_TIMES = 4.0
_LEAST_ENTRIES = 1.0

# How numpy has the numbers of a file; bfloat16 as its bits.
STORED = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}
# How compiled code takes them.
FUSED = {"F16": "<i2", "BF16": "<u2", "F32": "<f4"}


class NormSums:
    """|U W| and |W| of a tensor, Frobenius norms, as sums over its blocks.

    Attributes:
        along_squared: |U W|^2 of the blocks so far.
        total_squared: |W|^2 of them.
    """

    def __init__(self) -> None:
        self.along_squared = self.total_squared = 0.0

    def add(self, along_squared: float, total_squared: float) -> None:
        """Count some vectors."""
        self.along_squared += along_squared
        self.total_squared += total_squared


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """The residual axis in segments, each of which takes away what those before it have put back.

    Attributes:
        directions: U, [k, d_model], in the dtype of the arithmetic: float32, or float64 for what is stored so.
        bounds: Where each begins, and the end of the last.
        inverses: For each, (U_S U_S^T)^-1 with S the axis from there to its end, [segments, k, k].
    """

    directions: NDArray[Any]
    bounds: tuple[int, ...]
    inverses: NDArray[np.float64]


def cut_in_segments(basis: NDArray[np.float64], *, dtype: str) -> Segments:
    """Cut the residual axis where a half, a quarter, an eighth, ... of |U|^2 is left, as long as it is of use.

    It stays in one piece where nothing is rounded but by the arithmetic itself.

    Args:
        basis: U, [k, d_model], orthonormal rows, k at least 1.
        dtype: Of what is stored, as safetensors names it.
    """
    import numpy as np

    k, d_model = basis.shape
    is_rounded = dtype not in ("F32", "F64")
    left = np.square(basis).sum(axis=0)[::-1].cumsum()[::-1] / k
    bounds, grams, share = [0], [basis @ basis.T], 0.5
    while is_rounded and share * d_model >= _LEAST_ENTRIES:
        cut = int((left > share).sum())
        share /= 2
        if not bounds[-1] < cut < d_model:
            continue
        rest = basis[:, cut:]
        rounded = float(left[bounds[-1]] - left[cut])
        if float(np.linalg.eigvalsh(rest @ rest.T).min()) * max(_MOST_TIMES, (d_model - cut) / 16) < rounded:
            continue
        bounds.append(cut)
        grams.append(rest @ rest.T)
    wide = np.float64 if dtype == "F64" else np.float32
    return Segments(
        directions=np.ascontiguousarray(basis, wide),
        bounds=(*bounds, d_model),
        inverses=np.linalg.inv(np.stack(grams)),
    )


@functools.cache
def compiled_module(name: str) -> ModuleType | None:
    """Return a module of compiled code; None where its compiler is not there, or has no folder to keep its work in."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError):
        return None


def kernels_for(dtype: str) -> ModuleType | None:
    """Return `fused` where it can be had and takes numbers of a dtype, as safetensors names it; else None."""
    return compiled_module("abliterate.formats.fused") if dtype in FUSED else None


def bits_of(stored: Stored, *, dtype: str) -> Stored:
    """Return stored numbers as `fused` takes them: float32, or the bits of what numpy has no numbers for."""
    return stored.view(FUSED[dtype])


def project_stored(
    kernels: ModuleType,
    old: Stored,
    new: Stored,
    *,
    segments: Segments,
    residual_axis: int,
    strength: float,
    preserve_norms: bool,
    before: NormSums,
) -> None:
    """Do what `projection.project_out` does, in compiled code.

    Args:
        kernels: What `kernels_for` returned.
        old: The weight, contiguous, as `bits_of` returns it.
        new: Where the result goes, the same; `old` itself will do.
        segments: Those of the axis.
        residual_axis: The axis of the weight that indexes the residual stream.
        strength: See there.
        preserve_norms: See there.
        before: Is told |U W| and |W|.
    """
    import numpy as np

    axis = residual_axis % old.ndim
    d_model, trailing = old.shape[axis], math.prod(old.shape[axis + 1 :])
    is_last = axis == old.ndim - 1
    kernel = kernels.project_vectors if is_last else kernels.project_columns
    shape: Sequence[int] = (1, -1, d_model) if is_last else (-1, d_model, trailing)
    bounds, sums = np.array(segments.bounds, np.int64), np.zeros(2)
    for source, target in zip(old.reshape(shape), new.reshape(shape), strict=True):
        kernel(
            source,
            target,
            segments.directions,
            bounds,
            segments.inverses,
            float(strength),
            bool(preserve_norms),
            LEAST_LEFT,
            sums,
        )
    before.add(*sums.tolist())
