"""What a quantised format is to the rest of the program: how it finds its tensors, reads them and writes them again.

Formats live in modules `format_NAME.py` of the package `formats`, a family each, whose `FORMATS` are found by that
name. Each has two parts: `QuantizedFormat` recognises it in a config and in the tensors of a checkpoint, and the
`Encoding` that it returns for a tensor decodes that tensor, and requantises it where it is an `EditableEncoding`.
Everything that differs between formats stands behind these; nobody else asks for a format by its name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, Self

from abliterate.checkpoints.safetensors_file import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding(ABC):
    """How the numbers of one tensor are stored; of a stack of matrices, how those of each are.

    Attributes:
        codes: The stored tensor that holds the codes.
        companions: The stored tensors that the codes mean nothing without, in the order that the format gives them:
            scales, and where it has them zero points or scales of scales. One whose first axis is not the stack's
            belongs to all matrices.
        turned: Whether the codes' matrices lie the other way round than the plain tensor's.
        unused: Names of further tensors that mean nothing without the codes, such as scales of activations; whether or
            not they are there.
    """

    codes: TensorInfo
    companions: tuple[TensorInfo, ...]
    turned: bool = False
    unused: tuple[str, ...] = ()

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """Codes and companions."""
        return self.codes, *self.companions

    @property
    def stored_dtype(self) -> str:
        """What the format calls the way in which the tensor is stored."""
        return self.codes.dtype

    def parts(self, shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], Self]]:
        """Return the parts that are read and written one at a time, one behind the other: shape of each, and how it is.

        Args:
            shape: Of the whole tensor; a stack is taken apart into its matrices.
        """
        if len(shape) < 3:
            return [(shape, self)]
        return [(shape[1:], each) for each in self.matrices(shape[0])]

    def matrices(self, count: int) -> list[Self]:
        """Return how each matrix of a stack is stored."""
        codes = _slices(self.codes, count)
        companions = [_slices(each, count) for each in self.companions]
        parts = zip(codes, *companions, strict=True)
        return [replace(self, codes=first, companions=tuple(others)) for first, *others in parts]

    @abstractmethod
    def decode(self, codes: Tensor, companions: Sequence[Tensor]) -> Tensor:
        """Return the numbers that are stored, float32, as the codes lie.

        Raises:
            ValueError: What belongs to the whole matrix cannot be right.
        """


class EditableEncoding(Encoding):
    """One in which a tensor can be written again without directions; what has none is read and copied, never edited."""

    __slots__ = ()

    @property
    def rewritten(self) -> tuple[TensorInfo, ...]:
        """Those of `stored` that an edit may change; the others keep their bytes."""
        return self.stored

    @abstractmethod
    def refit(
        self, codes: Tensor, companions: Sequence[Tensor], *, directions: Tensor, strength: float
    ) -> tuple[Tensor, ...]:
        """Return the companions that go with the codes of `requantize`, without making those.

        Args:
            codes: Of one matrix whose rows index the residual stream.
            companions: In the order of `companions`.
            directions: U, [k, d_model], orthonormal rows.
            strength: Share of the component that is removed.
        """

    @abstractmethod
    def requantize(self, codes: Tensor, companions: Sequence[Tensor], *, directions: Tensor, strength: float) -> Tensor:
        """Return the codes of one matrix without the directions, rounded so that these do not come back.

        Args:
            codes: See `refit`.
            companions: See `refit`; the old ones.
            directions: See `refit`.
            strength: See `refit`.

        Raises:
            ValueError: The matrix holds NaN or infinite values, or its companions cannot be right.
        """

    @abstractmethod
    def largest_residue(self, *, d_model: int, k: int, along: float, norm: float) -> float:
        """Return the largest |U W'| that `requantize` may leave behind with strength 1.

        Args:
            d_model: Length of the residual axis.
            k: Number of directions.
            along: |U W| before the edit.
            norm: |W|.
        """


def encoded_tensor(encoding: Encoding, *, name: str, shape: tuple[int, ...]) -> TensorInfo:
    """Return the tensor that codes and companions mean, which has this name and shape once it is plain."""
    return replace(encoding.codes, name=name, dtype="BF16", shape=shape, encoding=encoding)


def compressed_formats(content: Mapping[str, Any]) -> frozenset[str]:
    """Return the formats that a config of compressed-tensors names: one, or one for each group where they are mixed."""
    groups = content.get("config_groups")
    named = [content.get("format")]
    if named == ["mixed-precision"] and isinstance(groups, dict):
        named = [group.get("format") for group in groups.values() if isinstance(group, dict)]
    return frozenset(name for name in named if isinstance(name, str))


class EncodingError(ValueError):
    """Codes have companions that do not fit them; the message says which and why."""

    def __init__(self, codes: TensorInfo, companion: TensorInfo, reason: str) -> None:
        super().__init__(
            f"tensor {codes.name} ({codes.dtype} {list(codes.shape)}) has beside it {companion.name} "
            f"({companion.dtype} {list(companion.shape)}), {reason}"
        )


class QuantizedFormat(Protocol):
    """One way of storing weights in few bits."""

    @property
    def names(self) -> tuple[str, ...]:
        """What the format is called in messages; one name for each way in which a config states it."""

    def is_named_by(self, method: str, content: Mapping[str, Any]) -> bool:
        """Return whether a config with this `quant_method` and this further content means this format."""

    def find(
        self, info: TensorInfo, tensors: Mapping[str, TensorInfo], content: Mapping[str, Any]
    ) -> TensorInfo | None:
        """Return what the codes in `info` mean (`encoded_tensor`), or None where it holds no codes of this format.

        Args:
            info: Any tensor of the checkpoint.
            tensors: All of them by name.
            content: What config.json says of the quantisation.

        Raises:
            EncodingError: It holds codes, but not with companions that fit.
        """


def _slices(info: TensorInfo, count: int) -> list[TensorInfo]:
    if info.shape[:1] != (count,):
        return [info] * count
    size = (info.end - info.start) // count
    starts = range(info.start, info.start + count * size, size)
    return [replace(info, shape=info.shape[1:], start=start, end=start + size) for start in starts]
