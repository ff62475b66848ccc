"""Who writes a direction into the residual stream: embedding, attention heads, attention biases, MLPs.

The stream at block l is the embedding plus everything written before: x[l] = e + sum over k < l of (a[k] + m[k]).
Its component r . x[l] is therefore the sum of the writers' own components, their *direct contributions*. Attention's
write is linear in its heads: a = sum over h of W_h z_h + b, where z_h is what head h puts into the out-projection,
so head h contributes r . W_h z_h. Where an RMS norm y = s (g * x) stands between attention and the stream, s is a
number of the token, which is measured; given s the write is linear again, and head h contributes s (g * r) . W_h z_h.

The sum is compared with the component measured in the stream at every block (`Contributions.largest_gap`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from abliterate.architectures.modules import ModuleWriter
from abliterate.errors import ModelError
from abliterate.models.chat_model import ChatModel
from abliterate.models.stream import BlockStream

if TYPE_CHECKING:
    from jaxtyping import Float, Float64

RECURRENT_MIXERS = ("mamba", "mixer", "linear_attn", "temporal_block", "conv", "mlstm_layer")
"""Modules whose out-projection reads no attention heads side by side."""
LINEARITY_TOLERANCE = 0.02
"""Relative; a norm that centres its input misses by far more, and bfloat16 rounds by less."""


class HeadsUnknownError(ModelError):
    """The heads of this architecture cannot be told apart, or do not sum to the stream; it says why, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockParts:
    """The modules of one decoder block that write to the residual stream.

    Attributes:
        attention: the attention module.
        out_projection: its last linear map; its input holds the heads side by side.
        attention_norm: the norm between attention and the stream, or None.
        mlp_writes: the modules whose outputs are the MLP's writes.
        multiplier: what each write is multiplied with as it is added (granite's `residual_multiplier`).
    """

    attention: nn.Module
    out_projection: nn.Module
    attention_norm: nn.Module | None
    mlp_writes: tuple[nn.Module, ...]
    multiplier: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Contributions:
    """Components along the direction at the last token of some prompts, float64 on the CPU.

    Attributes:
        component: Measured in the stream: at each block's input and after the last block.
        embedding: What the first block receives.
        heads: Attention's, without the out-projection's bias.
        biases: Of attention's out-projection.
        mlps: Each block's.
    """

    component: Float64[Tensor, "n n_layers+1"]
    embedding: Float64[Tensor, " n"]
    heads: Float64[Tensor, "n n_layers n_heads"]
    biases: Float64[Tensor, "n n_layers"]
    mlps: Float64[Tensor, "n n_layers"]

    def reconstructed(self) -> Float64[Tensor, "n n_layers+1"]:
        """Return the sum of the contributions at each block's input and after the last block."""
        written = (self.heads.sum(dim=2) + self.biases + self.mlps).cumsum(dim=1)
        return self.embedding[:, None] + torch.nn.functional.pad(written, (1, 0))

    def largest_gap(self) -> float:
        """Return the largest absolute difference between the sum and the measured component."""
        return float((self.reconstructed() - self.component).abs().max())

    @staticmethod
    def join(batches: Sequence[tuple[Sequence[int], Contributions]]) -> Contributions:
        """Join batches, each with the indices of its prompts, in the order of the prompts."""
        order = torch.tensor([i for indices, _ in batches for i in indices]).argsort()
        names = ("component", "embedding", "heads", "biases", "mlps")
        return Contributions(**{name: torch.cat([getattr(b, name) for _, b in batches])[order] for name in names})


def find_block_parts(chat: ChatModel) -> tuple[BlockParts, ...]:
    """Return each block's writers, for the decomposition.

    Raises:
        HeadsUnknownError: the architecture's heads cannot be told apart.
    """
    try:
        blocks = chat.stream.blocks
    except ModelError as error:
        raise HeadsUnknownError(str(error)) from error
    return tuple(_parts_of(chat, block) for block in blocks)


def n_heads_of(chat: ChatModel) -> int | None:
    """Return the number of attention heads of a block, from the config; None where it names none."""
    n_heads = getattr(chat.model.config.get_text_config(decoder=True), "num_attention_heads", None)
    return n_heads if isinstance(n_heads, int) else None


@contextmanager
def capture_contributions(
    chat: ChatModel, parts: tuple[BlockParts, ...], unit: Float64[Tensor, " d_model"]
) -> Iterator[Callable[[Float[Tensor, "n n_layers+1"]], Contributions]]:
    """Watch the writers during one forward pass.

    Args:
        chat: the model.
        parts: from `find_block_parts`.
        unit: the direction, unit norm.

    Yields:
        a function that takes the measured component of the pass just made and returns the contributions at the last
        token.

    Raises:
        HeadsUnknownError: a norm is not linear given its scale, or the heads are not side by side.
    """
    n_heads = n_heads_of(chat)
    if n_heads is None:
        raise HeadsUnknownError(f"{_architecture(chat)}: its config does not say how many attention heads a block has")
    watchers = [_Watcher(part, unit, n_heads, _architecture(chat)) for part in parts]

    def take(component: Float[Tensor, "n n_layers+1"]) -> Contributions:
        taken = [watcher.take() for watcher in watchers]
        heads, biases, mlps = (torch.stack(column, dim=1).cpu() for column in zip(*taken, strict=True))
        component = component.double().cpu()
        return Contributions(component=component, embedding=component[:, 0], heads=heads, biases=biases, mlps=mlps)

    with ExitStack() as stack:
        for watcher in watchers:
            for handle in watcher.attach():
                stack.callback(handle.remove)
        yield take


def check_decomposition(contributions: Contributions, *, norms: Float[Tensor, "n n_layers+1"], chat: ChatModel) -> None:
    """Check that the contributions sum to the measured component, to the rounding of the model's number format.

    Args:
        contributions: what was captured.
        norms: length of the residual stream at the same places.
        chat: the model.

    Raises:
        HeadsUnknownError: they do not: something else writes to the stream of this architecture.
    """
    # Norms are computed in float32 even in a float64 model.
    eps = max(torch.finfo(chat.model.dtype).eps, torch.finfo(torch.float32).eps)
    roundings = (2 * chat.n_layers + 1) ** 0.5 * eps
    gap = (contributions.reconstructed() - contributions.component).abs() / norms.double().cpu().clamp(min=1e-30)
    # Written so that a NaN does not pass.
    if not float(gap.max()) <= 4 * roundings:
        layer = int(gap.max(dim=0).values.argmax())
        raise HeadsUnknownError(
            f"{_architecture(chat)}: embedding, heads and MLPs do not sum to the residual stream (off by "
            f"{float(gap.max()):.1e} of its length at layer {layer}), so something else writes to it"
        )


class _Watcher:
    """Records what one block writes at the last token, as components along the direction."""

    def __init__(self, parts: BlockParts, unit: Float64[Tensor, " d_model"], n_heads: int, architecture: str) -> None:
        self._parts = parts
        self._n_heads = n_heads
        self._architecture = architecture
        self._unit = unit
        self._seen: dict[str, Tensor] = {}
        self._gain: Tensor | None = None
        if parts.attention_norm is not None:
            # An RMS norm of ones is its gain, whether it is stored as g or as g - 1.
            probe = torch.ones(1, 1, len(unit), dtype=_dtype(parts.out_projection), device=unit.device)
            self._gain = parts.attention_norm(probe)[0, 0].double()
        reading = unit if self._gain is None else self._gain * unit
        width = _read_through(parts.out_projection, reading, architecture)
        if len(width) % n_heads:
            raise HeadsUnknownError(f"{architecture}: {n_heads} heads do not share {len(width)} entries evenly")
        self._per_head = width.reshape(n_heads, -1)
        bias = getattr(parts.out_projection, "bias", None)
        self._bias = float(bias.double() @ reading) if bias is not None else 0.0

    def attach(self) -> list[Any]:
        parts = self._parts
        handles = [
            parts.out_projection.register_forward_pre_hook(lambda _m, args: self._keep("heads", args[0])),
            *(module.register_forward_hook(self._add_mlp) for module in parts.mlp_writes),
        ]
        if parts.attention_norm is not None:
            handles.append(parts.attention_norm.register_forward_hook(self._keep_norm))
        return handles

    def _keep(self, name: str, value: Any) -> None:
        tensor = value[0] if isinstance(value, tuple) else value
        if tensor.dim() != 3:
            raise HeadsUnknownError(
                f"{self._architecture}: its blocks flatten the batch, and the head table cannot read them"
            )
        self._seen[name] = tensor[:, -1].double()

    def _add_mlp(self, _module: nn.Module, _args: Any, output: Any) -> None:
        before = self._seen.get("mlp")
        self._keep("mlp", output)
        if before is not None:
            self._seen["mlp"] = before + self._seen["mlp"]

    def _keep_norm(self, _module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._keep("norm_input", args[0])
        self._keep("norm_output", output)

    def take(self) -> tuple[Float64[Tensor, "n n_heads"], Float64[Tensor, " n"], Float64[Tensor, " n"]]:
        """Return heads, bias and MLP, each as components along the direction."""
        seen, multiplier = dict(self._seen), self._parts.multiplier
        self._seen.clear()
        scale = multiplier * self._scale(seen)
        per_head = (seen["heads"].reshape(len(scale), self._n_heads, -1) * self._per_head).sum(dim=-1)
        return scale[:, None] * per_head, scale * self._bias, multiplier * (seen["mlp"] @ self._unit)

    def _scale(self, seen: Mapping[str, Float64[Tensor, "n width"]]) -> Float64[Tensor, " n"]:
        if self._gain is None:
            return self._unit.new_ones(len(seen["mlp"]))
        scaled, output = self._gain * seen["norm_input"], seen["norm_output"]
        scale: Tensor = (scaled * output).sum(-1) / (scaled * scaled).sum(-1).clamp(min=1e-300)
        miss = (output - scale[:, None] * scaled).norm(dim=-1) / output.norm(dim=-1).clamp(min=1e-300)
        if float(miss.max()) > LINEARITY_TOLERANCE:
            raise HeadsUnknownError(
                f"{self._architecture}: the norm after attention is not an RMS norm (off by {float(miss.max()):.1%}), "
                "so attention's write does not split into heads"
            )
        return scale


def _architecture(chat: ChatModel) -> str:
    return str(chat.model.config.model_type)


def _parts_of(chat: ChatModel, stream: BlockStream) -> BlockParts:
    architecture, block = _architecture(chat), type(stream.block).__name__
    attention = {writer.owner: writer for writer in stream.writers if writer.role == "attn"}
    headed = [owner for owner in attention if owner.rpartition(".")[0].rpartition(".")[2] not in RECURRENT_MIXERS]
    mlps = dict.fromkeys(_sublayer(writer) for writer in stream.writers if writer.role == "mlp")
    if len(attention) != 1 or not headed or not mlps or not attention[headed[0]].parameter.endswith(("weight", "bias")):
        raise HeadsUnknownError(
            f"{architecture}: the head table needs one attention module with an out-projection, and an MLP, in every "
            f"block ({block} has {', '.join([*attention, *mlps]) or 'neither'})"
        )
    writer = attention[headed[0]]
    return BlockParts(
        attention=chat.model.get_submodule(writer.owner.rpartition(".")[0]),
        out_projection=chat.model.get_submodule(writer.owner),
        attention_norm=chat.model.get_submodule(writer.module) if writer.has_norm else None,
        mlp_writes=tuple(chat.model.get_submodule(path) for path in mlps),
        multiplier=float(getattr(stream.block, "residual_multiplier", 1.0)),
    )


def _sublayer(writer: ModuleWriter) -> str:
    """Return the module that writes for a whole sub-layer, so that its parts are not counted apart."""
    if writer.has_norm:
        return writer.module
    stack = writer.parameter.split(f".{writer.layer}.")[0]
    return f"{stack}.{writer.layer}." + writer.parameter.removeprefix(f"{stack}.{writer.layer}.").partition(".")[0]


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _read_through(
    projection: nn.Module, reading: Float64[Tensor, " d_model"], architecture: str
) -> Float64[Tensor, " width"]:
    """Return W^T reading, as wide as the heads together, for a linear map stored either way round."""
    weight = getattr(projection, "weight", None)
    if isinstance(projection, nn.Linear) and isinstance(weight, Tensor):
        return weight.double().T @ reading
    if type(projection).__name__ == "Conv1D" and isinstance(weight, Tensor):
        return weight.double() @ reading
    raise HeadsUnknownError(
        f"{architecture}: its out-projection is a {type(projection).__name__}, not a plain linear map, and the head "
        "table cannot split it"
    )
