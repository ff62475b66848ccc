"""What happens to one tensor of a checkpoint: the unit that plans are made of and that the writer carries out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from abliterate.architectures.writers import PostNorm, ResidualWriter, Role
from abliterate.checkpoints.safetensors_file import TORCH_DTYPES, TensorInfo
from abliterate.errors import QuantizedCheckpointError

Kind = Literal["projected", "added", "untied"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TensorEdit:
    """One tensor that will not be as it is in the base, or is not in the base at all.

    Attributes:
        info: Name, shard, dtype and shape that it will have; the offsets of a new tensor mean nothing.
        source: The base's tensor it is made from; None makes it from zeros.
        kind: projected; untied: a tensor of its own for one of a tied pair; added: a bias of an addition.
        role: What it belongs to.
        layer: Its decoder block; None for embeddings.
        residual_axis: The axis that indexes the residual stream.
        norm_chain: Norms between it and the stream, innermost first.
        project: Whether the directions are projected out of it.
        dose: What is added along the residual axis, [d_model] float64; None adds nothing.
    """

    info: TensorInfo
    source: TensorInfo | None
    kind: Kind
    role: Role
    layer: int | None
    residual_axis: int
    norm_chain: tuple[PostNorm, ...] = ()
    project: bool = False
    dose: Tensor | None = None

    @property
    def name(self) -> str:
        """Name on disk, in the edited checkpoint."""
        return self.info.name

    @property
    def is_new(self) -> bool:
        """Whether the base has no tensor of this name."""
        return self.source is None or self.source.name != self.info.name

    @property
    def stored_as(self) -> tuple[str, ...]:
        """Of a quantised tensor the names of the two that are stored, codes and scales; else empty."""
        encoding = self.info.encoding
        return () if encoding is None else (encoding.codes.name, encoding.scales.name)

    @property
    def nbytes(self) -> int:
        """Bytes it takes up in its shard; of a tensor that is stored quantised those of its codes."""
        if self.info.encoding is not None:
            return self.info.end - self.info.start
        return math.prod(self.info.shape) * TORCH_DTYPES[self.info.dtype].itemsize


def check_codes(edits: Sequence[TensorEdit], *, path: Path) -> None:
    """Check that each edit of a quantised tensor is one that `quantized_formats` makes.

    Raises:
        QuantizedCheckpointError: A matrix is stored with the residual stream along its rows, or is to be untied.
    """
    for edit in edits:
        if edit.info.encoding is None:
            continue
        rows = len(edit.info.shape) - (1 if edit.info.encoding.turned else 2)
        if edit.residual_axis != rows or edit.is_new:
            raise QuantizedCheckpointError(
                f"{path / edit.info.shard}: tensor {edit.name} is stored quantised along the residual stream and not "
                "across it, so it cannot be edited; use the model it was quantised from"
            )


def projection_of(writer: ResidualWriter, info: TensorInfo) -> TensorEdit:
    """Return the edit that projects the directions out of a stored residual writer."""
    return TensorEdit(
        info=info,
        source=info,
        kind="projected",
        role=writer.role,
        layer=writer.layer,
        residual_axis=writer.residual_axis,
        norm_chain=writer.norm_chain,
        project=True,
    )


def renamed(info: TensorInfo, name: str) -> TensorInfo:
    """Return a tensor of another name with the shard, dtype and shape of `info`."""
    return replace(info, name=name)
