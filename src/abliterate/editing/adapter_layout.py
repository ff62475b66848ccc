"""Where the edits of a plan go in a LoRA adapter: PEFT names modules of the loaded model, a checkpoint names tensors.

transformers renames tensors as it loads them and stacks experts, so its own mapping is asked, on a model without
weights. What PEFT cannot express is refused here, before anything is read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from abliterate.architectures.names import parse_name
from abliterate.architectures.table import ARCHITECTURES, WRAPPERS
from abliterate.editing.edits import TensorEdit
from abliterate.editing.plan import EditPlan
from abliterate.errors import ModelError
from abliterate.models.loading import auto_class, empty_model

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

Form = Literal["linear", "conv1d", "embedding", "parameter"]

# Where transformers stacks experts as it loads them, PEFT takes layers of these names for experts stored apart, and
# would leave the dense ones out; named as parameters they are adapted, too.
_TAKEN_FOR_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}

_CHECKPOINT = "leave out --format adapter to write a whole checkpoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedWeight:
    """A weight of the loaded model that the adapter changes.

    Attributes:
        module: Path of the module that owns it.
        parameter: Its name there.
        key: The path under which PEFT looks for its factors.
        form: What PEFT does with it: a layer, an embedding, or a parameter of any other module.
        edits: The edits of the tensors it is made of, experts in their order; one where it is stored as it is loaded.
        experts: Matrices stacked in it; 1 for a single one.
        residual_on_b: Whether lora_B spans the residual stream; lora_A does otherwise.
    """

    module: str
    parameter: str
    key: str
    form: Form
    edits: tuple[TensorEdit, ...]
    experts: int
    residual_on_b: bool

    @property
    def rounds_change(self) -> bool:
        """Whether PEFT rounds the change to the weight's dtype before adding it; of layers, the sum alone."""
        return self.form in {"embedding", "parameter"}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredVector:
    """A bias, which has no low-rank change: the adapter holds its new values, under the name that PEFT loads."""

    key: str
    edit: TensorEdit


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLayout:
    """What an adapter holds.

    Attributes:
        weights: The weights that it changes.
        vectors: What it holds whole.
        auto_class: The class of transformers that loads the base as the adapter needs it.
        notes: What that means for its user.
    """

    weights: tuple[AdaptedWeight, ...]
    vectors: tuple[StoredVector, ...]
    auto_class: str
    notes: tuple[str, ...]


def lay_out_adapter(plan: EditPlan) -> AdapterLayout:
    """Find the module of each planned edit, and check that PEFT can express it.

    Raises:
        InputError: The options ask for what is not a low-rank change.
        ModelError: transformers does not know the model, or PEFT cannot adapt one of the tensors.
    """
    mapping = _LoadedNames(plan)
    grouped: dict[str, list[TensorEdit]] = {}
    for edit in plan.edits:
        grouped.setdefault(mapping.loaded_name(edit), []).append(edit)
    weights, vectors = [], []
    for name, edits in grouped.items():
        if mapping.is_vector(name):
            vectors.append((name, edits[0]))
        else:
            weights.append(mapping.adapted(name, edits))
    if len({weight.form for weight in weights} & {"conv1d", "parameter"}) == 2:
        parameter = next(weight for weight in weights if weight.form == "parameter")
        raise _inexpressible(plan, parameter.edits[0], "PEFT adapts no parameter beside layers stored [in, out]")
    wrapped = {weight.module for weight in weights}
    return AdapterLayout(
        weights=tuple(weights),
        vectors=tuple(StoredVector(key=_vector_key(name, wrapped), edit=edit) for name, edit in vectors),
        auto_class=auto_class(plan.checkpoint.path).__name__,
        notes=_notes(plan, weights, vectors),
    )


def _notes(plan: EditPlan, weights: list[AdaptedWeight], vectors: list[tuple[str, TensorEdit]]) -> tuple[str, ...]:
    notes = []
    if plan.stream.tied_embeddings and any(weight.form == "embedding" for weight in weights):
        notes.append(
            "the embeddings are tied: once merged the output head is edited with them, as by --tied edit; "
            "until then it keeps the base's rows"
        )
    if vectors:
        notes.append(f"{len(vectors)} biases are stored whole, because a bias has no low-rank change")
    if any(weight.experts > 1 for weight in weights):
        notes.append("the experts are adapted as transformers 5 stacks them, by PEFT's target_parameters")
    return tuple(notes)


def _vector_key(name: str, wrapped: set[str]) -> str:
    module, _, parameter = name.rpartition(".")
    # PEFT puts the module it adapts into one of its own, as base_layer.
    return f"{module}.base_layer.{parameter}" if module in wrapped else name


def _inexpressible(plan: EditPlan, edit: TensorEdit, reason: str) -> ModelError:
    others = [role for role in plan.options.components if role != edit.writer.role]
    agree = f", or agree to leave it out with --components {','.join(others)}" if others else ""
    return ModelError(
        f"{plan.source.name}: tensor {edit.name} cannot be edited by an adapter: {reason}; {_CHECKPOINT}{agree}"
    )


class _LoadedNames:
    """From a tensor's name on disk to the parameter it becomes, by transformers' own mapping."""

    def __init__(self, plan: EditPlan) -> None:
        wrapper = WRAPPERS.get(plan.stream.model_type)
        if wrapper is not None and wrapper.within is not None:
            raise ModelError(
                f"{plan.source.name}: an adapter of {plan.stream.model_type} would fit its {wrapper.within} alone, and "
                f"not the whole that it is a part of; {_CHECKPOINT}"
            )
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.plan = plan
        self.model: PreTrainedModel = empty_model(plan.checkpoint.path, name=plan.source.name)
        transforms = get_model_conversion_mapping(self.model)
        self.renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        self.converters = [each for each in transforms if isinstance(each, WeightConverter)]
        self.of_pattern = {pattern: each for each in self.converters for pattern in each.source_patterns}
        self.loaded: Mapping[str, torch.Tensor] = self.model.state_dict()
        stream = plan.stream
        self.tied = {stream.embedding, stream.head} if stream.tied_embeddings else set()

    def loaded_name(self, edit: TensorEdit) -> str:
        if edit.name in self.tied:
            # One matrix under two names, of which PEFT merges into the embedding's; the head follows.
            embedding = self.model.get_input_embeddings()
            return next(f"{name}.weight" for name, module in self.model.named_modules() if module is embedding)
        name = self._rename(edit.name)[0]
        if name not in self.loaded:
            raise _inexpressible(self.plan, edit, f"{type(self.model).__name__} of transformers loads no such tensor")
        return name

    def _rename(self, name: str) -> tuple[str, Any]:
        from transformers.core_model_loading import rename_source_key

        prefix, loaded = self.model.base_model_prefix, dict(self.loaded)
        renamed, pattern = rename_source_key(name, self.renamings, self.converters, prefix, loaded)
        if renamed not in loaded and name in loaded:
            renamed, pattern = rename_source_key(name, [], [], prefix, loaded)
        return renamed, self.of_pattern[pattern].operations if pattern else []

    def is_vector(self, name: str) -> bool:
        return self.loaded[name].dim() == 1 or name.endswith("bias")

    def adapted(self, name: str, edits: list[TensorEdit]) -> AdaptedWeight:
        first = edits[0]
        module_name, _, parameter = name.rpartition(".")
        module = self.model.get_submodule(module_name)
        if first.name in self.tied:
            edits, axis = [first], 1
        else:
            edits, axis = self._in_order(name, edits), self._loaded_axis(name, first)
        row = ARCHITECTURES.get(self.plan.stream.model_type)
        if row is not None and row.out_proj_bypassed and module_name.endswith(".out_proj"):
            raise _inexpressible(self.plan, first, f"PEFT does not adapt {module_name} of this model type")
        shape = self.loaded[name].shape
        form = _form_of(module, parameter)
        if self.converters and module_name.rpartition(".")[2] in _TAKEN_FOR_EXPERTS:
            form = "parameter"
        is_stack = len(shape) == 3
        if len(shape) not in {2, 3} or (is_stack and (form != "parameter" or shape[0] < 2)):
            raise _inexpressible(self.plan, first, f"as loaded it has the shape {list(shape)}")
        if is_stack:
            # PEFT takes a stack for [E, out, in] unless its module says that it is transposed.
            residual_on_b = (axis == 1) != bool(getattr(module, "is_transposed", False))
        else:
            residual_on_b = axis == (0 if form in {"linear", "parameter"} else 1)
        return AdaptedWeight(
            module=module_name,
            parameter=parameter,
            key=self._key(name, first, is_stack=is_stack),
            form=form,
            edits=tuple(edits),
            experts=shape[0] if is_stack else 1,
            residual_on_b=residual_on_b,
        )

    def _key(self, name: str, edit: TensorEdit, *, is_stack: bool) -> str:
        from transformers.core_model_loading import rename_source_key

        module = name.rpartition(".")[0]
        # PEFT renames an adapter's keys as transformers renames a checkpoint's, so they must come out as they are.
        if rename_source_key(name, self.renamings, self.converters)[0] == name:
            return module
        if is_stack:
            raise _inexpressible(self.plan, edit, f"PEFT renames {module}")
        return edit.name.rpartition(".")[0]

    def _in_order(self, name: str, edits: list[TensorEdit]) -> list[TensorEdit]:
        shape = self.loaded[name].shape
        if len(edits) == 1 and edits[0].info.shape[:1] == shape[:1]:
            return edits
        numbers = [parse_name(edit.name, has_towers=True).expert for edit in edits]
        if len(edits) != shape[0] or None in numbers:
            reason = f"{len(edits)} tensors are edited of those that {name} {list(shape)} is made of"
            raise _inexpressible(self.plan, edits[0], reason)
        return sorted(edits, key=lambda edit: parse_name(edit.name, has_towers=True).expert or 0)

    def _loaded_axis(self, name: str, edit: TensorEdit) -> int:
        """Return which axis of the loaded parameter indexes the residual stream."""
        wanted = list(self.loaded[name].shape)
        shape, axis = list(edit.info.shape), edit.writer.residual_axis
        for operation in self._rename(edit.name)[1]:
            kind = type(operation).__name__
            if kind == "MergeModulelist" and operation.dim == 0:
                shape, axis = [wanted[0], *shape], axis + 1
            elif kind == "Transpose":
                if operation.check_dims and shape == wanted:
                    continue
                order = list(range(len(shape)))
                order[operation.dim0], order[operation.dim1] = order[operation.dim1], order[operation.dim0]
                shape, axis = [shape[index] for index in order], order.index(axis)
            else:
                raise _inexpressible(self.plan, edit, f"transformers loads it by {kind}")
        if shape != wanted:
            raise _inexpressible(self.plan, edit, f"it is {shape} as stored and {wanted} as loaded")
        return axis


def _form_of(module: "nn.Module", parameter: str) -> Form:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if parameter != "weight":
        return "parameter"
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, Conv1D):
        return "conv1d"
    # PEFT looks token ids up by itself, which is the module's own way only where that is plain or merely scaled.
    is_plain = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    return "embedding" if isinstance(module, nn.Embedding) and is_plain else "parameter"
