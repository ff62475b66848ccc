"""A quantised tensor on its way into a new file: edited in its own layout, or dequantised.

Codes and companions may lie in different files, in any order, so each computes what it needs by itself: new scales take
a pass over the decoded numbers, new codes that pass and the edit.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from abliterate.checkpoints.encoding import Encoding
from abliterate.checkpoints.file_assembly import ComputedSegment, Fill, Worker, changed_on_the_way
from abliterate.checkpoints.file_ranges import PlainFile
from abliterate.checkpoints.safetensors_file import TensorInfo, encoded_matrices, read_codes, tensor_bytes
from abliterate.editing.edited_tensors import Projection
from abliterate.editing.projection import project_out
from abliterate.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedEdit:
    """What is done to a quantised tensor.

    Attributes:
        path: The directory of the checkpoint it is read from.
        info: The tensor, with its encoding.
        projection: What is projected out of it; None decodes it and takes nothing out. `preserve_norms` counts only
            where it is dequantised, and `device` does not: the arithmetic is done on the CPU.
    """

    path: Path
    info: TensorInfo
    projection: Projection | None = None

    @property
    def encoding(self) -> Encoding:
        """How it is stored."""
        if self.info.encoding is None:
            raise TypeError(f"{self.info.name} is stored as it is")
        return self.info.encoding

    @property
    def matrices(self) -> int:
        """How many matrices it is a stack of."""
        return self.info.shape[0] if len(self.info.shape) == 3 else 1

    def stored(self, index: int) -> tuple[Tensor, list[Tensor]]:
        """Return codes and companions of one matrix as they are stored in the checkpoint."""
        matrix = encoded_matrices(self.info)[index]
        return read_codes(self.path, matrix.encoding or self.encoding)

    def decoded(self, index: int) -> Tensor:
        """Return one matrix in bfloat16, the directions projected out if there are any.

        Raises:
            CheckpointError: It holds NaN or infinite values.
        """
        numbers = self.encoding.decode(*self.stored(index)).bfloat16()
        matrix = (numbers.T if self.encoding.turned else numbers).contiguous()
        if not bool(torch.isfinite(matrix).all()):
            raise self._not_finite()
        if self.projection is None:
            return matrix
        return project_out(
            matrix,
            directions=self.projection.directions,
            residual_axis=self.projection.residual_axis - len(self.info.shape) + 2,
            strength=self.projection.strength,
            preserve_norms=self.projection.preserve_norms,
        )

    def refit(self, index: int, companion: int) -> Tensor:
        """Return one of the new companions, such as the scales, of one matrix."""
        made = self._made
        new = self.encoding.refit(*self.stored(index), directions=made.directions, strength=made.strength)
        return new[companion]

    def edit(self, index: int) -> Tensor:
        """Return the new codes of one matrix.

        Raises:
            CheckpointError: It holds NaN or infinite values.
        """
        made = self._made
        try:
            return self.encoding.requantize(*self.stored(index), directions=made.directions, strength=made.strength)
        except ValueError as error:
            raise self._not_finite() from error

    @property
    def _made(self) -> Projection:
        if self.projection is None:
            raise TypeError(f"{self.info.name}: there is nothing to take out")
        return self.projection

    def _not_finite(self) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: tensor {self.encoding.codes.name} holds NaN or infinite values; "
            "download the checkpoint again"
        )


class MadeMatrices(ComputedSegment):
    """A tensor that is made matrix by matrix: new codes or scales, or the numbers they mean.

    Args:
        start: Where it begins in the new file.
        nbytes: Its size.
        make: Index of a matrix -> the matrix, of the dtype that is stored.
        matrices: How many there are.
        name: What the tensor is called in the new file, with the shard.
    """

    def __init__(self, *, start: int, nbytes: int, make: Callable[[int], Tensor], matrices: int, name: str) -> None:
        super().__init__(start=start, end=start + nbytes)
        self._make, self._name = make, name
        self._matrix_bytes = nbytes // matrices
        self._sums: list[int | None] = [None] * matrices
        self._sum_read = 0

    def fills(self) -> Sequence[Fill]:
        """See `ComputedSegment.fills`: a task a matrix."""

        def fill_of(index: int) -> Fill:
            return lambda target, worker: self._fill(index, target, worker)

        return [fill_of(index) for index in range(len(self._sums))]

    def check(self, written: memoryview, *, offset: int, worker: Worker) -> None:  # noqa: ARG002
        """See `ComputedSegment.check`."""
        while written:
            index, at = divmod(offset, self._matrix_bytes)
            part = written[: self._matrix_bytes - at]
            self._sum_read = zlib.crc32(part, self._sum_read if at else 0)
            if at + len(part) == self._matrix_bytes and self._sum_read != self._sums[index]:
                raise changed_on_the_way(self._name)
            written, offset = written[len(part) :], offset + len(part)

    def _fill(self, index: int, target: PlainFile, worker: Worker) -> None:
        data = tensor_bytes(self._make(index))
        self._sums[index] = zlib.crc32(data)
        target.write(data, self.start + index * self._matrix_bytes)
        worker.traffic.read += len(data)
        worker.traffic.written += len(data)
