"""What happens to one tensor of a checkpoint: the unit that plans are made of and that `edited_files` carries out.

Tied embeddings are one matrix. The published method edits it, so the head changes too and the logits are not those of
directional ablation. `untie` gives each of the two a tensor of its own, of which the head's keeps the rows as they
were: then the logits are the ablated ones to rounding. `skip` leaves the pair as it is, and the direction in the
stream.

Activation addition as weights: the paper adds the difference in means to the input of block l at all positions (arXiv
2406.11717, equation 3). The last thing that block l-1 adds to the stream is the output of its MLP's out-projection,
so the same vector in that module's bias does the same, once, for every token. `ADDITIONS` lists the model types for
which this holds and is tested. Where the bias is stored, it is edited. Where config.json can switch biases on, every
bias that the switch brings is added, and all but this one are zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from abliterate.architectures.writers import ResidualWriter, StreamMap
from abliterate.checkpoints.encoding import EditableEncoding
from abliterate.checkpoints.safetensors_file import PLAIN_DTYPES, TensorInfo
from abliterate.editing.options import TiedPolicy
from abliterate.errors import (
    CheckpointError,
    DirectionError,
    InputError,
    QuantizedCheckpointError,
    UnsupportedArchitectureError,
)
from abliterate.files import shown

if TYPE_CHECKING:
    from jaxtyping import Float32
    from torch import Tensor

    from abliterate.directions import Direction

Kind = Literal["projected", "added", "untied"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEdit:
    """One tensor that will not be as it is in the base, or is not in the base at all.

    Attributes:
        writer: What it belongs to and how it reaches the residual stream, under the name that it will have.
        info: Name, shard, dtype and shape that it will have; the offsets of a new tensor mean nothing.
        source: The base's tensor it is made from; None makes it from zeros.
        kind: projected; untied: a tensor of its own for one of a tied pair; added: a bias of an addition.
        project: Whether the directions are projected out of it.
        dose: What is added, a number for each entry of the residual axis; None adds nothing.
    """

    writer: ResidualWriter
    info: TensorInfo
    source: TensorInfo | None
    kind: Kind
    project: bool = False
    dose: tuple[float, ...] | None = None

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
        """Of a quantised tensor the names of the stored ones that its edit rewrites, codes and scales; else empty."""
        encoding = self.info.encoding
        return tuple(each.name for each in encoding.rewritten) if isinstance(encoding, EditableEncoding) else ()

    @property
    def stored_dtype(self) -> str:
        """How it is stored, as the file names it; of a tensor that is stored quantised often the dtype of its codes."""
        return self.info.stored_dtype

    @property
    def nbytes(self) -> int:
        """Bytes it takes up in its shard; of a tensor that is stored quantised those of its codes."""
        if self.info.encoding is not None:
            return self.info.end - self.info.start
        return self.info.plain_bytes

    def described(self) -> dict[str, Any]:
        """Return what every list of tensors says of one: `plan --json` and the record begin with it."""
        info, writer = self.info, self.writer
        return {
            "name": info.name,
            "role": writer.role,
            "layer": writer.layer,
            "residual_axis": writer.residual_axis,
            "shape": info.shape,
            "dtype": self.stored_dtype,
            "shard": info.shard,
        }

    def to_json(self) -> dict[str, Any]:
        """Return it as `plan --json` lists it."""
        return {
            **self.described(),
            "bytes": self.nbytes,
            "norm_chain": [asdict(norm) for norm in self.writer.norm_chain],
        }


def check_codes(edits: Sequence[TensorEdit], *, path: Path) -> None:
    """Check that each edit of a quantised tensor is one that its encoding makes.

    Raises:
        QuantizedCheckpointError: A matrix is stored in a way that is not written, or with the residual stream along
            its rows, or is to be untied.
    """
    for edit in edits:
        if edit.info.encoding is None:
            continue
        if not isinstance(edit.info.encoding, EditableEncoding):
            raise QuantizedCheckpointError(
                f"{path / edit.info.shard}: tensor {edit.name} is stored as {edit.stored_dtype}, which is not written "
                "here; use the model it was quantised from, or a file of another type"
            )
        rows = len(edit.info.shape) - (1 if edit.info.encoding.turned else 2)
        if edit.writer.residual_axis != rows or edit.is_new:
            raise QuantizedCheckpointError(
                f"{path / edit.info.shard}: tensor {edit.name} is stored quantised along the residual stream and not "
                "across it, so it cannot be edited; use the model it was quantised from"
            )


def projection_of(writer: ResidualWriter, info: TensorInfo) -> TensorEdit:
    """Return the edit that projects the directions out of a stored residual writer."""
    return TensorEdit(writer=writer, info=info, source=info, kind="projected", project=True)


# Of the multiplier in config.json; released models have 0.01 to 100.
_MAX_SCALE = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class AdditionRule:
    """How a model type can add a constant to its residual stream.

    Attributes:
        model_type: As in config.json.
        switch: Key of config.json that gives the MLP's modules biases; None where they always have them.
        modules: The modules of a layer's MLP that the switch gives biases, beside the out-projection.
        multiplier: Key of config.json by which the MLP's output is multiplied before it is added.
    """

    model_type: str
    switch: str | None = None
    modules: tuple[str, ...] = ()
    multiplier: str | None = None


_GATED = ("gate_proj", "up_proj")
_RULES = (
    *(
        AdditionRule(model_type=name, switch="mlp_bias", modules=_GATED)
        for name in ("llama", "helium", "seed_oss", "cwm", "smollm3")
    ),
    *(
        AdditionRule(model_type=name, switch="mlp_bias", modules=_GATED, multiplier="residual_multiplier")
        for name in ("granite", "granite_swa")
    ),
    *(
        AdditionRule(model_type=name, switch="mlp_bias", modules=("up_proj",))
        for name in ("arcee", "nemotron", "jais2")
    ),
    *(
        AdditionRule(model_type=name)
        for name in (
            *("bloom", "codegen", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "opt", "persimmon"),
            *("phi", "starcoder2"),
        )
    ),
)
ADDITIONS: dict[str, AdditionRule] = {rule.model_type: rule for rule in _RULES}


@dataclass(frozen=True, slots=True, kw_only=True)
class Addition:
    """The edits that add a vector to the input of one block.

    Attributes:
        layer: The block.
        edits: Biases that are changed or new, in the order of the tensors they belong to.
        config_changes: Dotted path in config.json -> new value.
        notes: What the user should know.
    """

    layer: int
    edits: tuple[TensorEdit, ...]
    config_changes: dict[str, Any]
    notes: tuple[str, ...]


def plan_addition(
    *,
    coefficient: float,
    direction: Direction,
    stream: StreamMap,
    tensors: Mapping[str, TensorInfo],
    config: dict[str, Any],
    path: Path,
) -> Addition:
    """Return the edits that add `coefficient` times the difference in means where it was found.

    Args:
        coefficient: 1 adds the difference in means (induces refusal), -1 takes it away.
        direction: Must hold its difference in means and, as metadata, its layer.
        stream: What the checkpoint's tensors do.
        tensors: Name -> what the headers say.
        config: The content of config.json.
        path: The checkpoint, for messages.

    Raises:
        DirectionError: The direction does not say how much to add, or where.
        InputError: Its layer is 0, before which there is no block, or not one of this model's.
        UnsupportedArchitectureError: The architecture cannot express the addition.
        CheckpointError: A matrix that gets a bias beside it is missing or malformed.
    """
    layer, mean_difference = _where_and_what(direction, stream)
    rule, weight = _out_projection(stream, layer=layer, path=path)
    scale = config.get(rule.multiplier, 1.0) if rule.multiplier else 1.0
    if type(scale) not in {int, float} or not 0 < abs(scale) < _MAX_SCALE:
        raise UnsupportedArchitectureError(
            f"{path}: {rule.multiplier} is {shown(scale)}, expected a number other than 0 that the MLP's output is "
            "multiplied by; take config.json from the model's original release"
        )
    dose = tuple((coefficient / scale * mean_difference.double()).tolist())
    bias = weight.tensor_name.removesuffix("weight") + "bias"
    if bias in tensors:
        edit = _bias_edit(tensors[bias], tensors[bias], layer=layer - 1, dose=dose)
        return Addition(layer=layer, edits=(edit,), config_changes={}, notes=())
    if rule.switch is None:
        raise UnsupportedArchitectureError(
            f"{path}: {bias} is not stored, and config.json of {stream.model_type} cannot switch it on alone; "
            "an addition to its activations needs hooks"
        )
    edits = _switched_on(rule, weight, stream=stream, tensors=tensors, bias=bias, dose=dose, path=path)
    switch = ".".join((*stream.text_section, rule.switch))
    note = f"{rule.switch} is switched on in config.json, and {len(edits) - 1} of the {len(edits)} new biases are zero"
    return Addition(layer=layer, edits=edits, config_changes={switch: True}, notes=(note,))


def _where_and_what(direction: Direction, stream: StreamMap) -> tuple[int, Float32[Tensor, " d_model"]]:
    layer = direction.metadata.get("layer")
    if direction.mean_difference is None or type(layer) is not int:
        raise DirectionError(
            "the direction file has no mean_difference or no layer, so it does not say how much to add and where; "
            "take one that `abliterate extract` wrote"
        )
    if layer == 0:
        raise InputError(
            "the direction is that of layer 0's input, and no MLP comes before it whose bias could add to it; "
            "choose a direction of a later layer"
        )
    if not 0 < layer < stream.n_layers:
        raise InputError(f"the direction is that of layer {layer}, and the model has {stream.n_layers} layers")
    return layer, direction.mean_difference


def _out_projection(stream: StreamMap, *, layer: int, path: Path) -> tuple[AdditionRule, ResidualWriter]:
    """Return the one weight through which the MLP of the block before `layer` writes to the stream."""
    rule = ADDITIONS.get(stream.model_type)
    writers = [writer for writer in stream.writers if writer.role == "mlp" and writer.layer == layer - 1]
    weights = [writer for writer in writers if writer.tensor_name.endswith(".weight")]
    behind_norm = next((writer.norm_chain[-1].weight for writer in writers if writer.norm_chain), None)
    if behind_norm is not None:
        reason = f"the norm {behind_norm} stands between the MLP and the residual stream and would rescale the addition"
    elif len(weights) != 1:
        reason = f"layer {layer - 1} has {len(weights)} MLP out-projections (experts?), and none that every token uses"
    elif rule is None:
        reason = f"additions are known to be exact for {', '.join(sorted(ADDITIONS))} only"
    else:
        return rule, weights[0]
    raise UnsupportedArchitectureError(
        f"{path}: an addition to the activations of {stream.model_type} cannot be put into its weights: {reason}; "
        "add it by hooks (abliterate.models.hooks.add_direction)"
    )


def _switched_on(
    rule: AdditionRule,
    weight: ResidualWriter,
    *,
    stream: StreamMap,
    tensors: Mapping[str, TensorInfo],
    bias: str,
    dose: tuple[float, ...],
    path: Path,
) -> tuple[TensorEdit, ...]:
    leaf = weight.tensor_name.removesuffix(".weight").rpartition(".")[2]
    edits = []
    for writer in stream.writers:
        if writer.role != "mlp" or writer.layer is None or not writer.tensor_name.endswith(f".{leaf}.weight"):
            continue
        mlp = writer.tensor_name.removesuffix(f"{leaf}.weight")
        for module in (*rule.modules, leaf):
            beside = tensors.get(f"{mlp}{module}.weight")
            if beside is None or len(beside.shape) != 2 or beside.dtype not in PLAIN_DTYPES:
                found = "missing" if beside is None else f"{beside.dtype} {list(beside.shape)}"
                raise CheckpointError(
                    f"{path}: {mlp}{module}.weight must be a matrix of floating-point numbers for {rule.switch} to be "
                    f"switched on, but it is {found}; download the checkpoint again"
                )
            info = replace(beside, name=f"{mlp}{module}.bias", shape=beside.shape[:1])
            is_dose = info.name == bias
            edits.append(_bias_edit(info, None, layer=writer.layer, dose=dose if is_dose else None))
    return tuple(edits)


def _bias_edit(
    info: TensorInfo, source: TensorInfo | None, *, layer: int, dose: tuple[float, ...] | None
) -> TensorEdit:
    writer = ResidualWriter(tensor_name=info.name, role="mlp", layer=layer, residual_axis=0)
    return TensorEdit(writer=writer, info=info, source=source, kind="added", dose=dose)


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterEdits:
    """The edits of some residual writers, and what else they make necessary.

    Attributes:
        edits: In file order, new tensors last.
        config_changes: Dotted path in config.json -> new value.
        notes: What the user should know.
    """

    edits: tuple[TensorEdit, ...]
    config_changes: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def edits_of_writers(
    writers: Sequence[ResidualWriter], *, stream: StreamMap, tensors: Mapping[str, TensorInfo], policy: TiedPolicy
) -> WriterEdits:
    """Return the edits that project the selected writers, with the tied pair as `policy` says.

    Args:
        writers: What the options select.
        stream: What the checkpoint's tensors do.
        tensors: Name -> what the headers say.
        policy: edit, untie or skip; without a tied pair among the writers it changes nothing.

    Raises:
        InputError: The model class has no head that could be untied.
    """
    pair = {stream.embedding, stream.head} if stream.tied_embeddings else set()
    selected = [writer for writer in writers if writer.tensor_name in pair]
    others = [writer for writer in writers if writer.tensor_name not in pair]
    if not selected or policy == "edit":
        notes = ["the embeddings are tied, so the output head is edited with them"] if selected else []
        if not selected and policy != "edit":
            notes = [f"no tied embedding is edited, so --tied {policy} changes nothing"]
        edits = tuple(projection_of(writer, tensors[writer.tensor_name]) for writer in writers)
        return WriterEdits(edits=edits, notes=tuple(notes))
    if policy == "skip":
        note = "the tied embeddings are left as they are, so the direction is still in the residual stream"
        return WriterEdits(
            edits=tuple(projection_of(writer, tensors[writer.tensor_name]) for writer in others), notes=(note,)
        )
    return _untied(others, selected, stream=stream, tensors=tensors)


def _untied(
    others: Sequence[ResidualWriter],
    selected: Sequence[ResidualWriter],
    *,
    stream: StreamMap,
    tensors: Mapping[str, TensorInfo],
) -> WriterEdits:
    if stream.head is None:
        raise InputError(f"{stream.model_type}: the model has no output head to untie; leave out --tied untie")
    writer = next((each for each in selected if each.tensor_name == stream.embedding), selected[0])
    stored = tensors[writer.tensor_name]
    edits = [projection_of(each, tensors[each.tensor_name]) for each in others]
    if stored.name == stream.embedding:
        edits.append(projection_of(writer, stored))
    if stored.name != stream.embedding or stream.head not in tensors:
        is_head = stored.name == stream.embedding
        name = stream.head if is_head else stream.embedding
        edits.append(
            TensorEdit(
                writer=replace(writer, tensor_name=name, norm_chain=() if is_head else writer.norm_chain),
                info=replace(stored, name=name),
                source=stored,
                kind="untied",
                project=not is_head,
            )
        )
    sections = {stream.text_section[:depth] for depth in range(len(stream.text_section) + 1)}
    changes = {".".join((*section, "tie_word_embeddings")): False for section in sorted(sections)}
    note = "the embeddings were tied and are no longer: the output head keeps the base model's rows"
    order = {name: position for position, name in enumerate(tensors)}
    edits.sort(key=lambda edit: (edit.is_new, order.get(edit.name, 0)))
    return WriterEdits(edits=tuple(edits), config_changes=changes, notes=(note,))
