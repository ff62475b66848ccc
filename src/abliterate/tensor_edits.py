"""What happens to one tensor of a checkpoint: the unit that plans are made of and that the writer carries out."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from abliterate.residual_writers import PostNorm, ResidualWriter, Role
from abliterate.safetensors_file import TORCH_DTYPES, TensorInfo

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
    def nbytes(self) -> int:
        """Bytes it takes up in its shard."""
        return math.prod(self.info.shape) * TORCH_DTYPES[self.info.dtype].itemsize


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
