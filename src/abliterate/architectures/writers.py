"""Which tensors of a checkpoint write to the residual stream, from names, shapes and the config alone.

`table` holds what is known of a model type and `names` reads a tensor's name; here names, shapes and config come
together. A tensor that is not known and could touch the stream (one of its axes has length d_model) is an error, and so
is a layer without its writers or an expert that is not there: an edit not known to be complete is refused before
anything is written.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterate.architectures import vocabulary
from abliterate.architectures.config import TextModel, read_text_model
from abliterate.architectures.names import NormChains, Part, PostNorm, Role, TensorName, parse_name
from abliterate.architectures.table import Architecture
from abliterate.checkpoints.checkpoint import CONFIG_NAME, Checkpoint
from abliterate.checkpoints.safetensors_file import PLAIN_DTYPES, TensorInfo
from abliterate.errors import CheckpointError, QuantizedCheckpointError, UnsupportedArchitectureError
from abliterate.files import shown, uncollected
from abliterate.formats.quantized import CONFIG_KEYS, base_in_words, is_handled, quantization_of

_SUBLAYERS: dict[Role, str] = {"attn": "attention (or another mixer)", "mlp": "an MLP"}


def refuse_quantization_config(config: Mapping[str, Any], tensors: Sequence[TensorInfo], path: Path) -> None:
    """Raise if config.json says that the checkpoint is quantised, and say what can be done about it.

    Raises:
        QuantizedCheckpointError: It does.
    """
    for key in CONFIG_KEYS:
        found = config.get(key)
        if found:
            method = (quantization_of(config) or ("unknown",))[0]
            method = method if method.isprintable() else shown(method)
            plain = next((t for t in tensors if t.dtype not in PLAIN_DTYPES), None)
            example = f", for one tensor {plain.name} as {plain.dtype}" if plain else ""
            way_out = ", or give --quantized requantize or --quantized dequantize" if is_handled(config) else ""
            raise QuantizedCheckpointError(
                f"{path / CONFIG_NAME}: the checkpoint is quantised ({key}, method "
                f"{method}{example}), where rounding would undo the edit; {base_in_words(config)}{way_out}"
            )


def check_layers(
    matrices: Mapping[str, TensorName], stacks: Sequence[str], *, n_layers: int, row: Architecture, path: Path
) -> None:
    """Raise unless every layer has a writer of attention (or another mixer) and one of an MLP.

    Raises:
        CheckpointError: A layer lacks one, or both where the architecture has layers of one sub-layer only.
    """
    found = {(name.stack, name.layer, name.role) for name in matrices.values()}
    for stack in stacks:
        for layer in range(n_layers):
            missing = [words for role, words in _SUBLAYERS.items() if (stack, layer, role) not in found]
            if len(missing) > int(row.single):
                raise CheckpointError(
                    f"{path}: {stack}.{layer} (config.json says {n_layers} layers) has no residual writer of "
                    f"{' and of '.join(missing)}; the checkpoint is incomplete, or not a plain {row.model_type}"
                )


def check_experts(
    matrices: Mapping[str, TensorName], shapes: Mapping[str, tuple[int, ...]], *, expected: int | None, path: Path
) -> None:
    """Raise unless every layer with experts has as many of them as config.json says.

    Raises:
        CheckpointError: It has more or fewer.
    """
    numbered: dict[str, set[int]] = defaultdict(set)
    counts: dict[str, int] = {}
    for tensor_name, name in matrices.items():
        if name.expert is not None:
            numbered[f"{name.stack}.{name.layer}.{name.path}"].add(name.expert)
        elif len(shapes[tensor_name]) == 3 and "shared_experts" not in name.path.split("."):
            counts[tensor_name] = shapes[tensor_name][0]
    counts |= {where: len(experts) for where, experts in numbered.items()}
    for where, count in counts.items():
        if count != expected:
            says = "names no number of experts" if expected is None else f"says {expected}"
            raise CheckpointError(
                f"{path}: {where} has {count} experts, but config.json {says}; the checkpoint is incomplete, "
                "or belongs to another config"
            )


__all__ = [
    "ROLES",
    "LeftAlone",
    "PostNorm",
    "Remainder",
    "ResidualWriter",
    "Role",
    "StreamMap",
    "map_checkpoint",
    "map_stream",
]

ROLES: tuple[Role, ...] = ("embed", "attn", "mlp")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidualWriter:
    """A tensor that writes to the residual stream.

    Attributes:
        tensor_name: Its name on disk.
        role: embed (token and position embeddings, and what makes other streams of them), attn or mlp (out-projections
            and their biases).
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
class Remainder:
    """What keeps writing along a direction though every writer is edited.

    Attributes:
        reason: Why no edit of weights can clean it, after "it" or "its".
        modules: What it is that writes, names within the checkpoint, numbers as `*`.
    """

    reason: str
    modules: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamMap:
    """What a checkpoint's tensors do to the residual stream.

    Attributes:
        model_type: As in config.json.
        text_section: Keys that lead from config.json's top to the part that describes the text model.
        text_type: The text model's own type, as in the table.
        d_model: Width of the residual stream.
        n_layers: Number of decoder blocks.
        tied_embeddings: Whether the output head shares the token embedding's rows.
        embedding: Name of the token embedding's tensor, stored or (tied, head's name stored alone) not.
        head: Name of the output head's tensor, stored or (tied) not; None where the class has no head.
        writers: Every tensor that writes to the residual stream, in file order; of a tied pair, all that is stored.
        left_alone: What could be taken for a writer and is not one.
        head_differs: The config ties the embeddings, but head and embedding are both stored and are not the same, so
            they are not tied.
        verified: The architecture is in the table; otherwise it was mapped by the rules common to all.
        remainder: What an edit of all the writers leaves; None where it leaves nothing.
    """

    model_type: str
    text_section: tuple[str, ...]
    text_type: str
    d_model: int
    n_layers: int
    tied_embeddings: bool
    embedding: str
    head: str | None
    writers: tuple[ResidualWriter, ...]
    left_alone: tuple[LeftAlone, ...]
    head_differs: bool = False
    verified: bool = True
    remainder: Remainder | None = None

    def notes(self) -> tuple[str, ...]:
        """Return what the user should know about what was found."""
        if not self.head_differs:
            return ()
        return (
            f"config.json ties the embeddings, but {self.head} is stored beside {self.embedding} and differs from it, "
            "so they are not tied, and the output head is left as it is",
        )


SameBytes = Callable[[TensorInfo, TensorInfo], bool]
"""Whether two stored tensors have the same dtype, shape and bytes."""


@uncollected()
def map_stream(
    *,
    config: dict[str, Any],
    tensors: Sequence[TensorInfo],
    path: Path,
    same_bytes: SameBytes,
    unverified: bool = False,
    partial: bool = False,
) -> StreamMap:
    """Return what each tensor of a checkpoint does to the residual stream, from config and headers alone.

    An out-projection's bias is a writer too. Where the config ties the embeddings and the head's tensor is
    stored all the same, with the same bytes, the head is listed beside the embedding, because both are one matrix; an
    untied head never is, nor one that differs, which transformers does not tie. Layers at or beyond the config's
    number of layers (multi-token prediction) are left alone.

    Args:
        config: The content of config.json.
        tensors: What the shards' headers list, in file order.
        path: Where the checkpoint lies (or its Hub id), for messages.
        same_bytes: Compares two of the tensors; asked only where head and embedding are both stored and tied.
        unverified: Map a model type that is not in the table, by the rules common to all. Nothing proves then that
            the map is complete; `tiny_twin` tries it on a small model.
        partial: Map a model type of whose stream no edit of weights can clean all.

    Raises:
        UnsupportedArchitectureError: The model type is not known or needs `partial`, or a tensor is not known.
        QuantizedCheckpointError: A writer is not stored as plain floating-point numbers.
        CheckpointError: A writer is missing or has the wrong shape.
    """
    refuse_quantization_config(config, tensors, path)
    model = read_text_model(config=config, path=path, unverified=unverified, partial=partial)
    return _Mapper(model, tensors, path, same_bytes).map()


def map_checkpoint(checkpoint: Checkpoint, *, unverified: bool = False, partial: bool = False) -> StreamMap:
    """Return what each tensor of a checkpoint that lies on this machine does to the stream; see `map_stream`."""
    return map_stream(
        config=checkpoint.config,
        tensors=tuple(checkpoint.tensors()),
        path=checkpoint.path,
        same_bytes=checkpoint.same_bytes,
        unverified=unverified,
        partial=partial,
    )


class _Mapper:
    """One checkpoint's tensors beside its text model; `map` brings them together."""

    def __init__(self, model: TextModel, tensors: Sequence[TensorInfo], path: Path, same_bytes: SameBytes) -> None:
        self.model, self.row, self.path = model, model.row, path
        self.tensors = tensors
        self.writing_parts = _WRITING if self.row.positions else _WRITING - {Part.POSITION_EMBEDDING}
        self.names = {tensor.name: parse_name(tensor.name, has_towers=model.has_towers) for tensor in tensors}
        self.shapes = {tensor.name: tensor.shape for tensor in tensors}
        self.stacks = sorted({name.stack for name in self.names.values() if name.stack})
        self.embedding, self.head = self._embedding_and_head()
        self.head_differs = model.tied_embeddings and self._head_differs(same_bytes)
        self.tied = model.tied_embeddings and not self.head_differs
        self.d_model = model.d_model or self.shapes[self._stored_embedding()][1]
        self.n_layers = model.n_layers or 1 + max((n.layer or 0 for n in self.names.values()), default=0)
        self.chains = NormChains(self.names, post_norm=self.row.post_norm, plus_one=self.row.plus_one)

    def map(self) -> StreamMap:
        writers = []
        left_alone = []
        for tensor in self.tensors:
            writer = self._writer_of(tensor)
            if writer is not None:
                self._check_writer(tensor, writer)
                writers.append(writer)
            elif self.d_model in tensor.shape and (reason := self._left_alone(tensor)):
                left_alone.append(LeftAlone(tensor_name=tensor.name, reason=reason))
        matrices = {w.tensor_name: self.names[w.tensor_name] for w in writers if self._is(w.tensor_name, Part.WRITER)}
        check_layers(matrices, self.stacks, n_layers=self.n_layers, row=self.row, path=self.path)
        check_experts(matrices, self.shapes, expected=self.model.n_experts, path=self.path)
        return StreamMap(
            model_type=self.model.model_type,
            text_section=self.model.section,
            text_type=self.row.model_type,
            d_model=self.d_model,
            n_layers=self.n_layers,
            tied_embeddings=self.tied,
            embedding=self.embedding,
            head=self.head,
            writers=tuple(writers),
            left_alone=tuple(left_alone),
            head_differs=self.head_differs,
            verified=self.model.verified,
            remainder=self._remainder(),
        )

    def _remainder(self) -> Remainder | None:
        if self.row.remains is None:
            return None
        found = {
            f"{name.stack}.*.{module}": None
            for name in self.names.values()
            for module in self.row.remains_in
            if name.layer is not None and name.layer < self.n_layers and f"{name.path}.".startswith(f"{module}.")
        }
        return Remainder(reason=self.row.remains, modules=tuple(found))

    def _embedding_and_head(self) -> tuple[str, str | None]:
        stacks = self.stacks
        if not stacks:
            raise UnsupportedArchitectureError(
                f"{self.path}: no tensor is named as a layer of a {self.row.model_type} model is, such as "
                f"model.layers.0... (first: {min(self.shapes, default='none')}); save the checkpoint again with "
                "transformers"
            )
        if len(stacks) > self.row.stacks and self.model.verified:
            raise UnsupportedArchitectureError(
                f"{self.path}: layers are named in {len(stacks)} ways ({', '.join(stacks)}), where a "
                f"{self.row.model_type} model has {self.row.stacks}; use the checkpoint as it was released"
            )
        embeddings = [n for n in self.shapes if self._is(n, Part.TOKEN_EMBEDDING)]
        heads = [n for n in self.shapes if self._is(n, Part.HEAD) and not self.names[n].is_bias]
        if len(embeddings) > 1:
            raise UnsupportedArchitectureError(
                f"{self.path}: holds {len(embeddings)} token embeddings ({', '.join(embeddings)}), and which of "
                "them starts the residual stream is not known; use the checkpoint as it was released"
            )
        if self.row.positions and self.model.verified and not self._has(Part.POSITION_EMBEDDING):
            raise CheckpointError(
                f"{self.path}: no position embedding was found, and a {self.row.model_type} model has one; "
                "download the checkpoint again"
            )
        if not embeddings and not (heads and self.model.tied_embeddings):
            raise CheckpointError(
                f"{self.path}: no token embedding was found (such as model.embed_tokens.weight), so the checkpoint "
                "is incomplete; download it again"
            )
        prefix = stacks[0].rpartition(".")[0]
        embedding = embeddings[0] if embeddings else f"{prefix}.{self.row.embedding}.weight".removeprefix(".")
        return embedding, heads[0] if heads else _head_beside(embedding)

    def _head_differs(self, same_bytes: SameBytes) -> bool:
        # A tied pair is one matrix. If only the head's name is stored, transformers loads the embedding from it;
        # if both are, it compares them, and does not tie what differs.
        infos = {tensor.name: tensor for tensor in self.tensors if tensor.name in {self.embedding, self.head}}
        return len(infos) > 1 and not same_bytes(*infos.values())

    def _stored_embedding(self) -> str:
        return self.embedding if self.embedding in self.shapes else str(self.head)

    def _has(self, part: Part) -> bool:
        return any(name.part is part for name in self.names.values())

    def _is(self, tensor_name: str, part: Part) -> bool:
        return self.names[tensor_name].part is part

    def _writer_of(self, tensor: TensorInfo) -> ResidualWriter | None:
        name = self.names[tensor.name]
        if name.layer is not None and name.layer >= self.n_layers:
            return None
        if name.part is Part.COMPANION:
            raise QuantizedCheckpointError(
                f"{self._where(tensor)} belongs to a residual writer that is not "
                "stored as a plain weight (quantised, or an adapter that was not merged); "
                "use the original model"
            )
        role = name.role
        if name.part is Part.HEAD and self.tied and not name.is_bias:
            role = "embed"
        elif name.part in {Part.POST_NORM, Part.EMBEDDING_NORM} and name.is_bias:
            role = "embed" if name.layer is None else "mlp"
        elif role is None or name.part not in self.writing_parts:
            return None
        axis = self._axis(tensor, name)
        if self.row.latent_experts and name.expert is not None and tensor.shape[axis] != self.d_model:
            return None
        return ResidualWriter(
            tensor_name=tensor.name, role=role, layer=name.layer, residual_axis=axis, norm_chain=self.chains.of(name)
        )

    def _axis(self, tensor: TensorInfo, name: TensorName) -> int:
        if name.part is Part.OUTSIDE_WRITER:
            return 0
        if name.part not in {Part.WRITER, Part.TOKEN_EMBEDDING, Part.POSITION_EMBEDDING, Part.HEAD}:
            return len(tensor.shape) - 1
        if name.layer is None:
            return 1
        if len(tensor.shape) == 3:
            return self._fused_axis(tensor)
        return vocabulary.AXES.get(name.path, 1 if self.row.conv1d else 0)

    def _fused_axis(self, tensor: TensorInfo) -> int:
        matching = [axis for axis in (1, 2) if tensor.shape[axis] == self.d_model]
        if len(matching) == 1:
            return matching[0]
        # Square: what stands beside it, with both of its halves, tells the order of its axes.
        module = tensor.name.removesuffix(".weight")
        reader = module.rpartition(".")[0] + "." + vocabulary.FUSED_READERS.get(module.rpartition(".")[2], "")
        shape = self.shapes.get(reader, self.shapes.get(f"{reader}.weight", ()))
        if len(shape) == 3 and (shape[1] == self.d_model) != (shape[2] == self.d_model):
            return 2 if shape[1] == self.d_model else 1
        return self.row.fused_axis

    def _left_alone(self, tensor: TensorInfo) -> str | None:
        name = self.names[tensor.name]
        if name.layer is not None and name.layer >= self.n_layers:
            return f"layer {name.layer} is beyond the model's {self.n_layers}: it predicts tokens further ahead"
        is_unexpected = (name.part is Part.POST_NORM and not self.row.post_norm) or name.part is Part.POSITION_EMBEDDING
        if is_unexpected or name.part is Part.UNKNOWN:
            raise self._unknown(tensor)
        return _REASONS.get(name.part)

    def _unknown(self, tensor: TensorInfo) -> UnsupportedArchitectureError:
        return UnsupportedArchitectureError(
            f"{self._where(tensor)} {list(tensor.shape)} is not a known "
            f"part of {self.row.model_type} and may write to the residual stream, so the edit could be "
            "incomplete; use a checkpoint without it"
        )

    def _check_writer(self, tensor: TensorInfo, writer: ResidualWriter) -> None:
        if tensor.dtype not in PLAIN_DTYPES:
            raise QuantizedCheckpointError(
                f"{self._where(tensor)} is stored as {tensor.dtype}, and only {', '.join(PLAIN_DTYPES)} can be "
                "edited; use the model it was quantised from"
            )
        name = self.names[tensor.name]
        is_vector = name.part in {Part.BIAS, Part.STREAM_START, Part.POST_NORM, Part.EMBEDDING_NORM}
        axes = {1, 2} if is_vector else {2, 3} if name.layer is not None and name.expert is None else {2}
        if len(tensor.shape) not in axes or tensor.shape[writer.residual_axis] != self.d_model:
            raise CheckpointError(
                f"{self._where(tensor)} has shape {list(tensor.shape)}, but axis {writer.residual_axis} of {min(axes)} "
                f"must be the residual stream of {self.d_model}; do config.json and the weights belong together?"
            )

    def _where(self, tensor: TensorInfo) -> str:
        return f"{self.path / tensor.shard}: tensor {tensor.name}"


_WRITING = {
    *(Part.WRITER, Part.BIAS, Part.TOKEN_EMBEDDING, Part.POSITION_EMBEDDING, Part.STREAM_START, Part.OUTSIDE_WRITER),
}
_REASONS = {
    Part.TOWER: "it is part of an image, video or audio tower, its projector or a speech decoder, which the text path "
    "does not use",
    Part.PREDICTION: "it predicts tokens further ahead, and does not write to the residual stream",
    Part.HEAD: "the output head reads the residual stream",
    Part.READER_COMPANION: "it belongs to a quantised weight that reads the residual stream",
}


def _head_beside(embedding: str) -> str:
    outer = embedding.partition(".")[0]
    return f"{outer}.lm_head.weight" if outer in {"language_model", "thinker"} else "lm_head.weight"
