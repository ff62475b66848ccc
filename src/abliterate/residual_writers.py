"""Which tensors of a checkpoint write to the residual stream, from names, shapes and the config alone.

The table `ARCHITECTURES` is data: one row per `model_type`, naming each writer on disk with its role and the
axis that indexes the residual stream, and naming everything else that a layer may hold. A tensor that the
row does not name and that could touch the stream (one of its axes has length d_model) is an error, and so is
a layer without its writers: an edit not known to be complete is refused before anything is written.

Every row is a pre-norm architecture: what a writer puts out is added to the stream as it is, at most times a
scalar. Where a norm stands between (see `projection`), or there is no row, the checkpoint is refused.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from abliterate.checkpoint import CONFIG_NAME
from abliterate.errors import CheckpointError, QuantizedCheckpointError, UnsupportedArchitectureError
from abliterate.safetensors_file import TORCH_DTYPES, TensorInfo

Role = Literal["embed", "attn", "mlp"]
ROLES: tuple[Role, ...] = ("embed", "attn", "mlp")


@dataclass(frozen=True, slots=True, kw_only=True)
class PostNorm:
    """A norm that stands between a writer and the residual stream.

    Attributes:
        weight: Name on disk of its weight, gamma.
        plus_one: The norm multiplies by 1 + weight (Gemma 2 and 3), not by weight.
        centered: A LayerNorm, which takes the mean away first; its own bias is a writer without a chain.
    """

    weight: str
    plus_one: bool = False
    centered: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidualWriter:
    """A tensor that writes to the residual stream.

    Attributes:
        tensor_name: Its name on disk.
        role: embed (token and position embeddings), attn or mlp (out-projections and their biases).
        layer: Index of its decoder block; None for embeddings.
        residual_axis: The axis of the stored tensor that indexes the residual stream.
        norm_chain: Norms between the writer and the stream, innermost first.
    """

    tensor_name: str
    role: Role
    layer: int | None
    residual_axis: int
    norm_chain: tuple[PostNorm, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftAlone:
    """A tensor that an edit does not touch though it has an axis of length d_model, and why not."""

    tensor_name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamMap:
    """What a checkpoint's tensors do to the residual stream.

    Attributes:
        model_type: As in config.json.
        text_section: Keys that lead from config.json's top to the part that describes the text model.
        d_model: Width of the residual stream.
        n_layers: Number of decoder blocks.
        tied_embeddings: Whether the output head shares the token embedding's rows.
        embedding: Name of the token embedding's tensor, stored or (tied, head's name stored alone) not.
        head: Name of the output head's tensor, stored or (tied) not; None where the class has no head.
        writers: Every tensor that writes to the residual stream, in file order; of a tied pair, all that is stored.
        left_alone: What could be taken for a writer and is none.
    """

    model_type: str
    text_section: tuple[str, ...]
    d_model: int
    n_layers: int
    tied_embeddings: bool
    embedding: str
    head: str | None
    writers: tuple[ResidualWriter, ...]
    left_alone: tuple[LeftAlone, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterRule:
    """A module that writes to the stream; `residual_axis` is that of its 2-D weight (a bias has but one)."""

    module: str
    role: Role
    residual_axis: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What a checkpoint of one `model_type` holds.

    Attributes:
        model_type: As in config.json.
        tied_by_default: `tie_word_embeddings` where config.json does not say; the config class's own default.
        prefix: What model classes with a head put before the names of the stack; base models put nothing.
        layers: Name of the list of decoder blocks.
        embeddings: Modules outside the layers that write to the stream.
        writers: Modules inside a layer that write to the stream; each layer must have all of them.
        others: Modules inside a layer that do not: readers of the stream, norms, buffers.
        outside: Modules outside the layers that do not write: the final norm and heads.
        size_key: The config's name of d_model.
        depth_key: The config's name of the number of layers.
    """

    model_type: str
    tied_by_default: bool
    prefix: str = "model."
    layers: str = "layers"
    embeddings: tuple[WriterRule, ...] = (WriterRule(module="embed_tokens", role="embed", residual_axis=1),)
    writers: tuple[WriterRule, ...] = (
        WriterRule(module="self_attn.o_proj", role="attn", residual_axis=0),
        WriterRule(module="mlp.down_proj", role="mlp", residual_axis=0),
    )
    others: frozenset[str]
    outside: frozenset[str] = frozenset({"norm", "lm_head", "score"})
    size_key: str = "hidden_size"
    depth_key: str = "num_hidden_layers"


_QKV = frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"})
_GATED = frozenset({"mlp.gate_proj", "mlp.up_proj"})
_NORMS = frozenset({"input_layernorm", "post_attention_layernorm"})
_LLAMA = _QKV | _GATED | _NORMS

_ROWS = (
    Architecture(model_type="llama", tied_by_default=False, others=_LLAMA),
    Architecture(model_type="mistral", tied_by_default=False, others=_LLAMA),
    Architecture(model_type="ministral", tied_by_default=False, others=_LLAMA),
    Architecture(model_type="qwen2", tied_by_default=False, others=_LLAMA),
    Architecture(model_type="qwen3", tied_by_default=False, others=_LLAMA | {"self_attn.q_norm", "self_attn.k_norm"}),
    Architecture(model_type="gemma", tied_by_default=True, others=_LLAMA),
    Architecture(model_type="smollm3", tied_by_default=True, others=_LLAMA),
    # granite adds each write times `residual_multiplier`, a scalar, which commutes with the projection.
    Architecture(model_type="granite", tied_by_default=False, others=_LLAMA),
    Architecture(model_type="helium", tied_by_default=False, others=_LLAMA),
    Architecture(model_type="seed_oss", tied_by_default=False, others=_LLAMA),
    Architecture(model_type="cwm", tied_by_default=False, others=_LLAMA),
    Architecture(model_type="olmo", tied_by_default=False, others=_QKV | _GATED),
    Architecture(model_type="arcee", tied_by_default=False, others=_QKV | _NORMS | {"mlp.up_proj"}),
    Architecture(model_type="phi3", tied_by_default=False, others=_NORMS | {"self_attn.qkv_proj", "mlp.gate_up_proj"}),
    Architecture(
        model_type="starcoder2",
        tied_by_default=True,
        writers=(
            WriterRule(module="self_attn.o_proj", role="attn", residual_axis=0),
            WriterRule(module="mlp.c_proj", role="mlp", residual_axis=0),
        ),
        others=_QKV | _NORMS | {"mlp.c_fc"},
    ),
    Architecture(
        model_type="gpt2",
        tied_by_default=True,
        prefix="transformer.",
        layers="h",
        embeddings=(
            WriterRule(module="wte", role="embed", residual_axis=1),
            WriterRule(module="wpe", role="embed", residual_axis=1),
        ),
        # GPT-2's Conv1D stores [in, out], so the stream is on axis 1.
        writers=(
            WriterRule(module="attn.c_proj", role="attn", residual_axis=1),
            WriterRule(module="mlp.c_proj", role="mlp", residual_axis=1),
        ),
        # `attn.bias` and `attn.masked_bias` are causal masks that old checkpoints stored.
        others=frozenset({"attn.c_attn", "mlp.c_fc", "ln_1", "ln_2", "attn"}),
        outside=frozenset({"ln_f", "lm_head", "score"}),
        size_key="n_embd",
        depth_key="n_layer",
    ),
)
ARCHITECTURES: dict[str, Architecture] = {row.model_type: row for row in _ROWS}

_POST_NORM = (
    "a norm stands between each out-projection and the residual stream, so projecting the weight alone would "
    "leave the direction in the stream, and this version does not handle that"
)
_EXPERTS = "it has experts, which this version does not edit"
_INEXACT = "no edit of its weights keeps the direction out of its residual stream"
_REASONS_TO_MODEL_TYPES = {
    _POST_NORM: (
        "gemma2 gemma3 gemma3_text gemma4 gemma4_text gemma4_unified gemma4_unified_text olmo2 olmo3 "
        "flex_olmo exaone4 glm4 glm4v glm_ocr afmoe hyperclovax"
    ),
    _EXPERTS: (
        "mixtral qwen2_moe qwen3_moe olmoe phimoe deepseek_v2 deepseek_v3 gpt_oss llama4 llama4_text "
        "granitemoe granitemoeshared granitemoehybrid ernie4_5_moe hunyuan_v1_moe dbrx glm4_moe minimax_m2"
    ),
    _INEXACT: ("openai-gpt minimax doge zaya rwkv inkling inkling2 gemma3n gemma3n_text qwen4_exp ctrl xglm"),
}
_REASONS = {
    model_type: reason for reason, model_types in _REASONS_TO_MODEL_TYPES.items() for model_type in model_types.split()
}


def map_stream(*, config: dict[str, Any], tensors: Sequence[TensorInfo], path: Path) -> StreamMap:
    """Return what each tensor of a checkpoint does to the residual stream, from config and headers alone.

    An out-projection's bias is a writer too. Where the config ties the embeddings and the head's tensor is
    stored all the same, the head is listed beside the embedding, because both are one matrix; an untied head
    never is. Layers at or beyond the config's number of layers (multi-token prediction) are left alone.

    Args:
        config: The content of config.json.
        tensors: What the shards' headers list, in file order.
        path: Where the checkpoint lies (or its Hub id), for messages.

    Raises:
        UnsupportedArchitectureError: The model type is not in the table, or a tensor is not in its row.
        QuantizedCheckpointError: A writer is not stored as plain floating-point numbers.
        CheckpointError: A writer is missing or has the wrong shape.
    """
    _refuse_quantization_config(config, tensors, path)
    stack = _read_stack(config, tensors, path)
    writers = []
    for tensor in tensors:
        writer = _writer_of(tensor, stack)
        if writer is not None:
            _check_writer(tensor, writer, stack)
            writers.append(writer)
        elif stack.d_model in tensor.shape and not _is_known(tensor.name, stack):
            raise UnsupportedArchitectureError(
                f"{path / tensor.shard}: tensor {tensor.name} {list(tensor.shape)} is not a known "
                f"part of {stack.row.model_type} and may write to the residual stream, so the edit could be "
                "incomplete; use a checkpoint without it"
            )
    _check_complete(writers, stack)
    return StreamMap(
        model_type=stack.row.model_type,
        text_section=(),
        d_model=stack.d_model,
        n_layers=stack.n_layers,
        tied_embeddings=_is_tied(config, stack.row),
        embedding=f"{stack.prefix}{stack.row.embeddings[0].module}.weight",
        head="lm_head.weight",
        writers=tuple(writers),
        left_alone=(),
    )


def _row_of(config: dict[str, Any], path: Path) -> Architecture:
    model_type = config.get("model_type")
    row = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if row is None:
        reason = _REASONS.get(str(model_type), "its residual writers are not known to be complete")
        raise UnsupportedArchitectureError(
            f"{path / CONFIG_NAME}: model type {model_type!r} cannot be orthogonalized: {reason}; "
            f"use one of {', '.join(sorted(ARCHITECTURES))}"
        )
    return row


def _is_tied(config: dict[str, Any], row: Architecture) -> bool:
    tied = config.get("tie_word_embeddings")
    return row.tied_by_default if tied is None else bool(tied)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stack:
    """One checkpoint's decoder stack: its row, and what the row leaves open."""

    path: Path
    row: Architecture
    d_model: int
    n_layers: int
    prefix: str
    tied_heads: frozenset[str]

    def split(self, name: str) -> tuple[int | None, str]:
        """Split a tensor name into its layer (None outside the layers) and the path within."""
        inner = name.removeprefix(self.prefix)
        # Whole components only, so that layer 1 never takes layers 10 to 19 with it.
        match = re.fullmatch(rf"{re.escape(self.row.layers)}\.([0-9]+)\.(.+)", inner)
        if match is None or not name.startswith(self.prefix):
            return None, inner
        return int(match[1]), match[2]


def _read_stack(config: dict[str, Any], tensors: Sequence[TensorInfo], path: Path) -> _Stack:
    row = _row_of(config, path)
    names = [tensor.name for tensor in tensors]
    prefixes = [p for p in (row.prefix, "") if any(n.startswith(f"{p}{row.layers}.") for n in names)]
    if not prefixes:
        raise UnsupportedArchitectureError(
            f"{path}: no tensor is named {row.prefix}{row.layers}.0..., so this is not the layout "
            f"of {row.model_type} (first: {min(names, default='none')}); save it again with transformers"
        )
    return _Stack(
        path=path,
        row=row,
        d_model=_config_size(config, row.size_key, path),
        n_layers=_config_size(config, row.depth_key, path),
        prefix=prefixes[0],
        tied_heads=_tied_heads(tensors, f"{prefixes[0]}{row.embeddings[0].module}.weight", path)
        if _is_tied(config, row)
        else frozenset(),
    )


def _tied_heads(tensors: Sequence[TensorInfo], embedding: str, path: Path) -> frozenset[str]:
    # A tied pair is one matrix. If only the head's name is stored, transformers loads the embedding from it;
    # if both are, editing one alone would make them differ, and transformers would no longer tie them.
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    head = "lm_head.weight"
    if head in shapes and shapes.get(embedding, shapes[head]) != shapes[head]:
        raise CheckpointError(
            f"{path}: config.json ties the embeddings, but {head} {list(shapes[head])} and "
            f"{embedding} {list(shapes[embedding])} differ in shape; if they are separate matrices, "
            "set tie_word_embeddings to false"
        )
    return frozenset({head} & shapes.keys())


def _config_size(config: dict[str, Any], key: str, path: Path) -> int:
    value = config.get(key)
    if type(value) is not int or value <= 0:
        raise CheckpointError(
            f"{path / CONFIG_NAME}: {key} is {value!r}, expected a positive integer; "
            "take config.json from the model's original release"
        )
    return value


def _writer_of(tensor: TensorInfo, stack: _Stack) -> ResidualWriter | None:
    if tensor.name in stack.tied_heads:
        return ResidualWriter(tensor_name=tensor.name, role="embed", layer=None, residual_axis=1)
    layer, path = stack.split(tensor.name)
    if not tensor.name.startswith(stack.prefix) or (layer is not None and layer >= stack.n_layers):
        return None
    for rule in stack.row.embeddings if layer is None else stack.row.writers:
        if path in {f"{rule.module}.weight", f"{rule.module}.bias"}:
            axis = rule.residual_axis if path.endswith(".weight") else 0
            return ResidualWriter(tensor_name=tensor.name, role=rule.role, layer=layer, residual_axis=axis)
        if path.startswith(f"{rule.module}."):
            raise QuantizedCheckpointError(
                f"{stack.path / tensor.shard}: tensor {tensor.name} belongs to a residual writer that is not "
                "stored as a plain weight (quantised, or an adapter that was not merged); "
                "use the original model"
            )
    return None


def _is_known(name: str, stack: _Stack) -> bool:
    layer, path = stack.split(name)
    if layer is None:
        return path.rpartition(".")[0] in stack.row.outside
    return layer >= stack.n_layers or path.rpartition(".")[0] in stack.row.others


def _refuse_quantization_config(config: dict[str, Any], tensors: Sequence[TensorInfo], path: Path) -> None:
    for key in ("quantization_config", "compression_config"):
        found = config.get(key)
        if found:
            method = found.get("quant_method", "unknown") if isinstance(found, dict) else "unknown"
            plain = next((t for t in tensors if t.dtype not in TORCH_DTYPES), None)
            example = f", for one tensor {plain.name} as {plain.dtype}" if plain else ""
            raise QuantizedCheckpointError(
                f"{path / CONFIG_NAME}: the checkpoint is quantised ({key}, method "
                f"{method}{example}), where rounding would undo the edit; use the model it was quantised from"
            )


def _check_writer(tensor: TensorInfo, writer: ResidualWriter, stack: _Stack) -> None:
    where = f"{stack.path / tensor.shard}: tensor {tensor.name}"
    if tensor.dtype not in TORCH_DTYPES:
        raise QuantizedCheckpointError(
            f"{where} is stored as {tensor.dtype}, and only {', '.join(TORCH_DTYPES)} can be edited; "
            "use the model it was quantised from"
        )
    n_axes = 1 if tensor.name.endswith(".bias") else 2
    if len(tensor.shape) != n_axes or tensor.shape[writer.residual_axis] != stack.d_model:
        raise CheckpointError(
            f"{where} has shape {list(tensor.shape)}, but axis {writer.residual_axis} of {n_axes} must be "
            f"the residual stream of {stack.d_model}; do config.json and the weights belong together?"
        )


def _check_complete(writers: list[ResidualWriter], stack: _Stack) -> None:
    row = stack.row
    # A tied embedding may be stored under the head's name alone.
    embeddings = row.embeddings[1:] if stack.tied_heads else row.embeddings
    required = [f"{stack.prefix}{rule.module}.weight" for rule in embeddings] + [
        f"{stack.prefix}{row.layers}.{layer}.{rule.module}.weight"
        for layer in range(stack.n_layers)
        for rule in row.writers
    ]
    found = {writer.tensor_name for writer in writers}
    missing = [name for name in required if name not in found]
    if missing:
        raise CheckpointError(
            f"{stack.path}: {len(missing)} of {len(required)} residual writers are missing, first "
            f"{missing[0]} (config.json says {stack.n_layers} layers); the checkpoint is incomplete, or not "
            f"a plain {row.model_type}"
        )
