"""Activation addition as weights: a constant vector added to the residual stream by a bias.

The paper adds the difference in means to the input of block l at all positions (arXiv 2406.11717, equation 3). The
last thing that block l-1 adds to the stream is the output of its MLP's out-projection, so the same vector in that
module's bias does the same, once, for every token. `ADDITIONS` lists the model types for which this holds and is
tested: where the bias is stored it is edited, and where config.json can switch biases on, all that the switch
brings are added, as zeros but for the one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from abliterate.architectures.writers import ResidualWriter, StreamMap
from abliterate.checkpoints.safetensors_file import TORCH_DTYPES, TensorInfo
from abliterate.directions import Direction
from abliterate.errors import CheckpointError, DirectionError, InputError, UnsupportedArchitectureError
from abliterate.tensor_edits import TensorEdit
from abliterate.untrusted import shown

# Released models have 0.01 to 100.
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
    dose = coefficient / scale * mean_difference.double()
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


def _where_and_what(direction: Direction, stream: StreamMap) -> tuple[int, Tensor]:
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
    dose: Tensor,
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
            if beside is None or len(beside.shape) != 2 or beside.dtype not in TORCH_DTYPES:
                found = "missing" if beside is None else f"{beside.dtype} {list(beside.shape)}"
                raise CheckpointError(
                    f"{path}: {mlp}{module}.weight must be a matrix of floating-point numbers for {rule.switch} to be "
                    f"switched on, but it is {found}; download the checkpoint again"
                )
            info = replace(beside, name=f"{mlp}{module}.bias", shape=beside.shape[:1])
            is_dose = info.name == bias
            edits.append(_bias_edit(info, None, layer=writer.layer, dose=dose if is_dose else None))
    return tuple(edits)


def _bias_edit(info: TensorInfo, source: TensorInfo | None, *, layer: int, dose: Tensor | None) -> TensorEdit:
    return TensorEdit(info=info, source=source, kind="added", role="mlp", layer=layer, residual_axis=0, dose=dose)
