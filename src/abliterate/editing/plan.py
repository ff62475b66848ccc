"""What an edit will do: which tensors, along which directions, how far; from the files' headers alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.architectures.writers import ResidualWriter, StreamMap, map_checkpoint
from abliterate.checkpoints.checkpoint import Checkpoint, is_gguf, refuse_adapter
from abliterate.checkpoints.model_source import ModelSource
from abliterate.checkpoints.safetensors_file import PLAIN_DTYPES, Shard
from abliterate.directions import Direction, load_direction, orthonormal_basis
from abliterate.editing.edits import (
    Addition,
    TensorEdit,
    WriterEdits,
    check_codes,
    edits_of_writers,
    plan_addition,
)
from abliterate.editing.options import EditOptions
from abliterate.errors import CheckpointError, DirectionError, InputError
from abliterate.files import printable, shown
from abliterate.formats.gguf_checkpoint import holds_gguf, open_weights
from abliterate.formats.quantized import (
    dequantized_config_changes,
    dequantized_layout,
    plain_info,
    plain_view,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


# Sine of the angle below which one direction says nothing that the others do not say: 0.06 degrees.
_LEAST_SINE = 1e-3
_WEIGHT_SUFFIXES = {".safetensors", ".gguf", ".pth", ".pt", ".onnx"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TwinProof:
    """|r . h| / |h| in the stream of a tiny random model, over block inputs, the last block's output, and tokens.

    Attributes:
        before: The largest before the edit.
        after: The largest after it.
        mean_before: The mean before the edit.
        mean_after: The mean after it.
    """

    before: float
    after: float
    mean_before: float
    mean_after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialEdit:
    """What an edit of all the writers leaves in the stream.

    Attributes:
        reason: Why no edit of weights can clean it.
        modules: What keeps writing, names within the checkpoint, numbers as `*`.
        hooks: What hooks would do.
        twin: What was measured on a tiny random model of the config, edited whole; None where nothing was.
    """

    reason: str
    modules: tuple[str, ...]
    hooks: str = (
        "hooks ablate in the stream itself and leave nothing (`abliterate evaluate MODEL --intervention ablate "
        "--direction F`)"
    )
    twin: TwinProof | None = None

    def note(self) -> str:
        """Return what the user should know."""
        measured = "it was not tried on a tiny model"
        if self.twin is not None:
            measured = (
                f"on a tiny random model of this config |r.h|/|h| fell from {self.twin.mean_before:.2g} to "
                f"{self.twin.mean_after:.2g} on average (the largest: {self.twin.before:.2g} to "
                f"{self.twin.after:.2g})"
            )
        return (
            f"partial: {self.reason}; {measured}; `abliterate verify` measures it in this model; what still writes: "
            f"{', '.join(self.modules) or 'nothing that this checkpoint holds'}; {self.hooks}"
        )


def partial_edit(stream: StreamMap, proof: TwinProof | None) -> PartialEdit | None:
    """Return what an edit of a stream leaves; None where it leaves nothing."""
    if stream.remainder is None:
        return None
    return PartialEdit(reason=stream.remainder.reason, modules=stream.remainder.modules, twin=proof)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RemovedDirections:
    """What is taken out of the stream, and of each layer's writers.

    Attributes:
        subspace: R, [k, d_model], orthonormal rows.
        by_layer: [n_layers, d_model], unit rows: what is taken out of each layer's writers in the place of R; None: R
            is taken out of all.
    """

    subspace: NDArray[np.float64]
    by_layer: NDArray[np.float64] | None = None

    @property
    def rank(self) -> int:
        """How many directions are taken out of a writer."""
        return len(self.subspace) if self.by_layer is None else 1

    def of(self, writer: ResidualWriter) -> NDArray[np.float64]:
        """Return what is taken out of a writer, [rank, d_model]; the embeddings count as layer 0."""
        if self.by_layer is None:
            return self.subspace
        layer = writer.layer or 0
        return self.by_layer[layer : layer + 1]


def removed_directions(subspace: NDArray[np.float64], options: EditOptions) -> RemovedDirections:
    """Return what is taken out by an edit.

    Args:
        subspace: R, [k, d_model], orthonormal rows.
        options: The edit's; strengths may come with a direction for each layer.

    Raises:
        InputError: Those are not one unit vector a layer, or have another width.
    """
    strengths = options.strengths
    by_layer = None if strengths is None else strengths.by_layer(d_model=subspace.shape[1])
    return RemovedDirections(subspace=subspace, by_layer=by_layer)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EditPlan:
    """An edit that has been checked and can be made.

    Attributes:
        source: The model as it was named.
        checkpoint: Its layout.
        view: The same with the tensors that are stored quantised as plain ones, where they are to be edited.
        stream: What its tensors do to the residual stream.
        directions: What is projected out, one or several.
        removed: What is taken out, of all writers or of each layer's.
        options: What was asked for.
        edits: Every tensor that will differ or be new, in file order, new ones last.
        config_changes: Dotted path in config.json -> new value.
        edit_notes: What the user should know about the edits.
        partial: What the edit leaves though every writer is edited; None where it leaves nothing.
    """

    source: ModelSource
    checkpoint: Checkpoint
    view: Checkpoint
    stream: StreamMap
    directions: tuple[Direction, ...]
    removed: RemovedDirections
    options: EditOptions
    edits: tuple[TensorEdit, ...]
    config_changes: dict[str, Any]
    edit_notes: tuple[str, ...]
    partial: PartialEdit | None = None

    @property
    def layout(self) -> Checkpoint:
        """What will be on disk, but for tensors that are new: the checkpoint's own layout unless it is dequantised."""
        return dequantized_layout(self.view) if self.is_dequantized else self.checkpoint

    @property
    def is_dequantized(self) -> bool:
        """Whether a quantised checkpoint becomes a plain one."""
        return self.options.quantized == "dequantize" and self.view is not self.checkpoint

    def notes(self) -> tuple[str, ...]:
        """Return what the user should know about this edit."""
        model_type = self.stream.model_type
        notes = [] if self.stream.verified else [unverified_note(model_type)]
        notes += [] if self.partial is None else [self.partial.note()]
        for direction in self.directions:
            extracted_from = direction.metadata.get("model_type")
            if extracted_from is not None and extracted_from != model_type:
                notes.append(f"the direction was extracted from a {extracted_from} model, and this is a {model_type}")
        notes += [*self.stream.notes(), *mlx_notes(self.checkpoint.shards), *self.edit_notes]
        others = [
            name
            for name in self.checkpoint.side_files
            if Path(name).suffix in _WEIGHT_SUFFIXES or Path(name).name.startswith("pytorch_model")
        ]
        if self.checkpoint.outside_links:
            links = ", ".join(shown(name) for name in self.checkpoint.outside_links)
            notes.append(f"not copied, as they are links that lead out of the directory: {links}")
        if self.checkpoint.second_copies:
            notes.append(second_copies_note(self.checkpoint.second_copies))
        if others:
            notes.append(f"copied unedited, though they seem to hold weights: {', '.join(others)}")
        return tuple(notes)


def mlx_notes(shards: Sequence[Shard]) -> tuple[str, ...]:
    """Return what the user should know of files that MLX wrote; nothing of others."""
    if not any((shard.metadata or {}).get("format") == "mlx" for shard in shards):
        return ()
    return (
        "MLX wrote these files, under names that transformers may not load; `verify` and all that runs the model need "
        "the release they were converted from",
    )


def second_copies_note(names: Sequence[str]) -> str:
    """Return what the user should know about second copies of the weights."""
    return (
        f"left out: {', '.join(printable(name) for name in names)}, the same weights again, which would stay unedited "
        "and which some engines load instead"
    )


def unverified_note(model_type: str) -> str:
    """Return what the user should know about the edit of a model type that is not known."""
    return (
        f"model type {model_type!r} is not known and was accepted with --unverified: its residual writers were found "
        "by their names; run `abliterate verify` on the result"
    )


def make_edit_plan(
    *,
    source: ModelSource | Path | str,
    direction: Direction | Path | str | Sequence[Direction | Path | str],
    options: EditOptions,
    proof: TwinProof | None = None,
) -> EditPlan:
    """Read the layouts, and check that checkpoint, directions and options fit one another.

    Args:
        source: The model: a local directory, or what `resolve_model` returned.
        direction: A direction or the file that holds it, or several of them.
        options: What to edit.
        proof: What a tiny model of the checkpoint showed, if it was tried.

    Raises:
        InputError: There is no such directory, or the options select nothing or layers that are not there.
        DirectionError: A direction is malformed, has another width than the model, or lies in the span of others.
        CheckpointError: The source is incomplete, quantised or of an unsupported type, or cannot express an addition.
    """
    model = _as_source(source)
    checkpoint = open_weights(model.path)
    refuse_adapter(checkpoint.path, checkpoint.side_files)
    view = checkpoint if options.quantized == "refuse" else plain_view(checkpoint)
    stream = map_checkpoint(view, unverified=options.unverified, partial=options.partial)
    options = dataclasses.replace(options, unverified=not stream.verified, partial=stream.remainder is not None)
    given = [direction] if isinstance(direction, (Direction, Path, str)) else list(direction)
    directions = tuple(_as_direction(each, d_model=stream.d_model, model=model.name) for each in given)
    _check_strengths(options, stream, directions, model=model.name)
    planned = _plan_edits(view, stream, directions, options, model=model.name)
    edits, config_changes = planned.edits, planned.config_changes
    if options.quantized == "dequantize":
        edits = tuple(dataclasses.replace(edit, info=plain_info(edit.info)) for edit in edits)
        config_changes = config_changes | dequantized_config_changes(checkpoint.config)
    if holds_gguf(model.path):
        _check_gguf(edits, options, path=model.path)
    check_codes(edits, path=view.path)
    return EditPlan(
        source=model,
        checkpoint=checkpoint,
        view=view,
        stream=stream,
        directions=directions,
        removed=removed_directions(_span(directions, given), options),
        options=options,
        edits=edits,
        config_changes=config_changes,
        edit_notes=planned.notes,
        partial=partial_edit(stream, proof),
    )


def _check_gguf(edits: Sequence[TensorEdit], options: EditOptions, *, path: Path) -> None:
    """Refuse what a GGUF file, which is edited tensor by tensor in the place where each lies, cannot become."""
    convert = f"convert it first (`abliterate convert {path.name} DIRECTORY`) and edit what comes out"
    if options.quantized == "dequantize":
        raise InputError(f"{path}: a GGUF file is edited in the types that it has, never dequantised; {convert}")
    if any(edit.is_new for edit in edits):
        raise InputError(f"{path}: the edit adds tensors, for which a GGUF file has no place; {convert}")
    if options.preserve_norms and any(edit.stored_as for edit in edits):
        raise InputError(
            f"{path}: --preserve-norms scales rows, which in few bits would be rounded away again; {convert}"
        )


def _check_strengths(options: EditOptions, stream: StreamMap, directions: Sequence[Direction], *, model: str) -> None:
    strengths = options.strengths
    if strengths is None:
        return
    if [each.sha256 for each in directions] != [strengths.direction_sha256]:
        raise InputError(
            f"{strengths.file}: was found for another direction than the one that is given (SHA-256 "
            f"{strengths.direction_sha256[:16]}); give that one, alone, or run `abliterate refine` for this one"
        )
    if len(strengths.attn) != stream.n_layers:
        raise InputError(
            f"{strengths.file}: has strengths for {len(strengths.attn)} layers, and {model} has {stream.n_layers}; run "
            "`abliterate refine` on this model"
        )


def _plan_edits(
    checkpoint: Checkpoint,
    stream: StreamMap,
    directions: Sequence[Direction],
    options: EditOptions,
    *,
    model: str,
) -> WriterEdits | Addition:
    tensors = {tensor.name: tensor for tensor in checkpoint.tensors()}
    if options.add is not None:
        if len(directions) != 1:
            raise InputError(f"an addition takes one direction, and {len(directions)} were given; give one --direction")
        return plan_addition(
            coefficient=options.add,
            direction=directions[0],
            stream=stream,
            tensors=tensors,
            config=_text_config(checkpoint, stream),
            path=checkpoint.path,
        )
    selected = select_writers(stream, options=options, model=model)
    _check_norms(checkpoint, selected, d_model=stream.d_model)
    planned = edits_of_writers(selected, stream=stream, tensors=tensors, policy=options.tied)
    if not planned.edits:
        raise InputError(
            f"{model}: nothing but the tied embeddings was selected, and --tied skip leaves them; edit or untie them"
        )
    return planned


def _text_config(checkpoint: Checkpoint, stream: StreamMap) -> dict[str, Any]:
    section = checkpoint.config
    for key in stream.text_section:
        section = section[key]
    return section


def select_writers(stream: StreamMap, *, options: EditOptions, model: str) -> tuple[ResidualWriter, ...]:
    """Return the residual writers that the options select, in file order.

    Raises:
        InputError: They select nothing, or layers that are not there; `model` is named in the message.
    """
    if options.layers is not None and options.layers[1] > stream.n_layers:
        raise InputError(
            f"layers {options.layers[0]}:{options.layers[1]} reaches beyond the {stream.n_layers} layers of "
            f"{model}; give a range within 0:{stream.n_layers}"
        )
    selected = tuple(writer for writer in stream.writers if options.includes(writer))
    if not selected:
        raise InputError(
            f"components {','.join(options.components)} and layers {options.layers} select no tensor of "
            f"{model}; embeddings are edited only if the layers start at 0"
        )
    return selected


def _as_source(source: ModelSource | Path | str) -> ModelSource:
    if isinstance(source, ModelSource):
        return source
    if not Path(source).is_dir() and not is_gguf(Path(source)):
        raise InputError(
            f"{source}: there is no such directory; give a checkpoint directory, or resolve a Hub id with "
            "abliterate.checkpoints.model_source.resolve_model"
        )
    return ModelSource(path=Path(source), name=str(source), revision=None)


def _as_direction(direction: Direction | Path | str, *, d_model: int, model: str) -> Direction:
    if not isinstance(direction, Direction):
        return load_direction(Path(direction), d_model=d_model)
    if direction.d_model != d_model:
        raise DirectionError(
            f"the direction has {direction.d_model} entries, but the residual stream of {model} has "
            f"{d_model}; extract a direction from this model"
        )
    return direction


def _span(directions: Sequence[Direction], given: Sequence[Direction | Path | str]) -> NDArray[np.float64]:
    """Return R, [k, d_model], orthonormal rows that span the directions, in their order."""
    import numpy as np

    if not directions:
        raise DirectionError("no direction was given; name a direction file with --direction")
    rows = np.stack([each.numbers["direction"] for each in directions]).astype(np.float64)
    basis, left_out = orthonormal_basis(rows, tolerance=_LEAST_SINE)
    if left_out:
        index = left_out[0]
        name = f"direction {index + 1}" if isinstance(given[index], Direction) else str(given[index])
        raise DirectionError(
            f"{name}: lies in the span of the directions before it (to less than {_LEAST_SINE:g} of its length), "
            "so it adds nothing but rounding; leave it out"
        )
    return basis


def _check_norms(checkpoint: Checkpoint, writers: Sequence[ResidualWriter], *, d_model: int) -> None:
    tensors = {tensor.name: tensor for tensor in checkpoint.tensors()}
    for writer in writers:
        for norm in writer.norm_chain:
            info = tensors.get(norm.weight)
            if info is None or info.shape != (d_model,) or info.dtype not in PLAIN_DTYPES:
                found = "it is missing" if info is None else f"it is {info.dtype} {list(info.shape)}"
                raise CheckpointError(
                    f"{checkpoint.path}: the norm {norm.weight} stands between {writer.tensor_name} and the residual "
                    f"stream and must be a vector of {d_model}, but {found}; download the checkpoint again"
                )
