"""An edit with strengths as hooks through which gradients flow: what `orthogonalize --strengths` writes into the files.

W <- W - s u (u^T W) makes of what a writer puts out, y, y - s u (u . y). So the output is hooked, before any norm that
stands between it and the stream, and u is the layer's direction as it is seen through those norms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from abliterate.architectures.modules import ModuleWriter
from abliterate.errors import ModelError
from abliterate.formats.projection import NormFactor, effective_directions
from abliterate.models.chat_model import ChatModel
from abliterate.models.hooks import edit_output

if TYPE_CHECKING:
    from jaxtyping import Float, Float64

ROLES = ("attn", "mlp")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Place:
    """An output that is edited: in which layer and role, whose it is, and the direction as it has it."""

    layer: int
    role: int
    module: nn.Module
    output: int
    unit: Tensor


class SoftEdit:
    """The places of a loaded model that an edit with strengths changes.

    Args:
        chat: the model.
        directions: one for each layer, unit vectors.

    Raises:
        ModelError: what a layer writes reaches the stream in a way that no edit of weights is equal to.
        UnsupportedArchitectureError: the model's type is refused by name.
    """

    def __init__(self, chat: ChatModel, directions: Float64[Tensor, "n_layers d_model"]) -> None:
        self._places = [
            place
            for layer, block in enumerate(chat.stream.blocks)
            for place in _places_of(chat, layer, block.writers, directions[layer])
        ]
        self.n_layers = chat.n_layers

    @contextmanager
    def applied(self, strengths: Float[Tensor, "n_layers 2"]) -> Iterator[None]:
        """Edit each layer's attention and MLP as far as `strengths` says, attn first; gradients flow to it."""
        with ExitStack() as stack:
            for place in self._places:
                remove = _removing(place.unit, strengths[place.layer, place.role])
                stack.callback(edit_output(place.module, remove, output=place.output).remove)
            yield


def _removing(unit: Tensor, strength: Tensor) -> Callable[[Tensor], Tensor]:
    def remove(written: Tensor) -> Tensor:
        here, share = unit.to(written.device, written.dtype), strength.to(written.device, written.dtype)
        return written - share * (written @ here).unsqueeze(-1) * here

    return remove


def _places_of(
    chat: ChatModel, layer: int, writers: Sequence[ModuleWriter], direction: Float64[Tensor, " d_model"]
) -> Iterator[_Place]:
    where: dict[tuple[str, int], ModuleWriter] = {}
    for writer in writers:
        where.setdefault((writer.owner, 0) if writer.norm_chain else (writer.module, writer.output), writer)
    # What holds the experts puts out what a shared expert inside of it has written, too; what a module hands on beside
    # its output is apart from that.
    whole = [path for path, output in where if output == 0]
    for (path, output), writer in where.items():
        if any(path.startswith(f"{other}.") for other in whole):
            continue
        if not writer.norm_chain and not writer.is_added:
            raise ModelError(
                f"{chat.model.config.model_type}: what {writer.parameter} writes reaches the stream through "
                f"{writer.module}, which no edit of weights with strengths is equal to; use another model"
            )
        norms = [
            NormFactor(gamma=_gamma(chat, norm.weight, plus_one=norm.plus_one), centered=norm.centered)
            for norm in writer.norm_chain
        ]
        found = effective_directions(direction[None], norms=norms)
        if len(found):
            role = ROLES.index(writer.role)
            module = chat.model.get_submodule(path)
            yield _Place(layer=layer, role=role, module=module, output=output, unit=found[0])


def _gamma(chat: ChatModel, parameter: str, *, plus_one: bool) -> Tensor:
    weight: Tensor = chat.model.get_parameter(parameter).detach().double().cpu()
    return torch.add(weight, 1.0) if plus_one else weight
