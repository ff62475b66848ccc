"""The weights of a model that has none in memory: read from the checkpoint for a module, and let go again.

The model is built on the meta device; a parameter is found by its own name, or, where the experts of a mixture are one
tensor in the model and many in the checkpoint, by theirs. What is stored under any other name than the model's is
refused rather than guessed.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from abliterate.architectures.vocabulary import MERGED_EXPERTS
from abliterate.checkpoints.checkpoint import Checkpoint
from abliterate.checkpoints.safetensors_file import TensorInfo
from abliterate.checkpoints.stored_tensors import TORCH_DTYPES, read_rows, read_tensor
from abliterate.errors import ModelError
from abliterate.models.machine import product

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Stored = tuple[tuple[TensorInfo, ...], ...]
"""What a parameter is made of: one tensor, or for each expert those that are put below each other."""


_READ_BYTES = 16 << 20


class LayerWeights:
    """Fills modules of a model on the meta device with what the checkpoint holds, for as long as a `with` lasts.

    Args:
        model: the model. Parameters that are not on the meta device are left alone.
        blocks: its decoder blocks.
        checkpoint: where the weights are.
        device: where they go.

    Raises:
        ModelError: a parameter of a block or of the input embedding is not in the checkpoint under its own name.
    """

    def __init__(
        self,
        *,
        model: "PreTrainedModel",
        blocks: Sequence[nn.Module],
        checkpoint: Checkpoint | None,
        device: torch.device,
    ) -> None:
        self.device = device
        self.reads = 0
        self._model = model
        self._checkpoint = checkpoint
        self._stored = {} if checkpoint is None else {info.name: info for info in checkpoint.tensors()}
        self._path = {id(module): name for name, module in model.named_modules()}
        self._names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names.setdefault(id(parameter), []).append(name)
        self._embedding = model.get_input_embeddings()
        inside = {id(module) for block in blocks for module in block.modules()} | {id(self._embedding)}
        self._outside = [module for module in model.modules() if id(module) not in inside and _own(module)]
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(device)
        # What is missing is found out now, not after hours.
        needed = [self._embedding, *(module for block in blocks for module in block.modules())]
        head = model.get_output_embeddings()
        if head is not None:
            needed.append(head)
        self.plain_head = head if type(head) is nn.Linear else None
        for module in needed:
            for name, weight in module._parameters.items():
                if weight is not None and weight.is_meta:
                    self._find(module, name, weight)

    @contextmanager
    def of_block(self, block: nn.Module) -> Iterator[None]:
        """Hold a decoder block's weights."""
        with ExitStack() as stack:
            for module in block.modules():
                stack.callback(self._fill(module))
            yield

    @contextmanager
    def outside_of_blocks(self) -> Iterator[None]:
        """Hold the weights of those modules outside the blocks that are called, the input embedding excepted.

        An output head that is a plain linear layer is held in the format it is stored in; see `head_in_parts`.
        """
        with ExitStack() as stack:

            def fill(module: nn.Module, _args: Any) -> None:
                if any(tensor is not None and tensor.is_meta for tensor in module._parameters.values()):
                    stack.callback(self._fill(module))

            for module in self._outside:
                stack.callback(module.register_forward_pre_hook(fill).remove)
            yield

    @contextmanager
    def of_embedding(self, token_ids: Iterable[int]) -> Iterator[None]:
        """Hold those rows of the input embedding that some tokens need."""
        embedding = cast(nn.Embedding, self._embedding)
        weight = embedding._parameters["weight"]
        if weight is None or not weight.is_meta or self._checkpoint is None:
            yield
            return
        ids = sorted(set(token_ids))
        ((info,),) = self._find(embedding, "weight", weight)
        rows = read_rows(self._checkpoint.path, info, ids)
        place = torch.zeros(weight.shape[0], dtype=torch.long, device=self.device)
        place[ids] = torch.arange(len(ids), device=self.device)
        padding, embedding.padding_idx = embedding.padding_idx, None
        embedding._parameters["weight"] = self._placed(rows, weight.dtype)
        handle = embedding.register_forward_pre_hook(lambda _module, args: (place[args[0]], *args[1:]))
        try:
            yield
        finally:
            handle.remove()
            embedding._parameters["weight"], embedding.padding_idx = weight, padding

    def head_in_parts(self, hidden: Tensor) -> Tensor:
        """Return what `plain_head` makes of `hidden`, turning some of its rows at a time into the model's format."""
        head = self.plain_head
        assert head is not None
        rows_at_once = max(1, _READ_BYTES // (head.in_features * hidden.element_size()))
        parts = [product(hidden, rows.to(hidden.dtype)) for rows in torch.split(head.weight, rows_at_once)]
        logits = torch.cat(parts, dim=-1)
        return logits if head.bias is None else logits + head.bias.to(hidden.dtype)

    def _fill(self, module: nn.Module) -> Callable[[], None]:
        """Fill a module's own parameters and stored buffers; return what empties it again."""
        parameters, buffers = dict(module._parameters), dict(module._buffers)
        for name, parameter in parameters.items():
            if parameter is not None and parameter.is_meta:
                stored = self._find(module, name, parameter)
                dtype = TORCH_DTYPES[stored[0][0].dtype] if module is self.plain_head else parameter.dtype
                module._parameters[name] = self._placed(self._read(stored, dtype), dtype)
        for name, buffer in buffers.items():
            info = self._stored_as(self._full_name(module, name))
            if buffer is not None and name not in module._non_persistent_buffers_set and info is not None:
                module._buffers[name] = self._read(((info,),), buffer.dtype).to(self.device)

        def empty() -> None:
            module._parameters.update(parameters)
            module._buffers.update(buffers)

        return empty

    def _placed(self, tensor: Tensor, dtype: torch.dtype) -> nn.Parameter:
        return nn.Parameter(tensor.to(self.device, dtype), requires_grad=False)

    def _read(self, stored: Stored, dtype: torch.dtype) -> Tensor:
        if len(stored) == 1:
            return self._read_as(stored[0][0], dtype)
        return torch.stack([torch.cat([self._read_as(part, dtype) for part in expert]) for expert in stored])

    def _read_as(self, info: TensorInfo, dtype: torch.dtype) -> Tensor:
        """Read a tensor in another format, some rows at a time: an output head in both formats would be the peak."""
        assert self._checkpoint is not None
        n_bytes = info.end - info.start
        if not info.shape or n_bytes <= _READ_BYTES:
            return read_tensor(self._checkpoint.path, info).to(dtype)
        read = torch.empty(info.shape, dtype=dtype)
        size = n_bytes // info.shape[0]
        for first in range(0, info.shape[0], step := max(1, _READ_BYTES // size)):
            end = min(info.shape[0], first + step)
            rows = replace(
                info, shape=(end - first, *info.shape[1:]), start=info.start + first * size, end=info.start + end * size
            )
            read[first:end] = read_tensor(self._checkpoint.path, rows)
        return read

    def _full_name(self, module: nn.Module, name: str) -> str:
        path = self._path[id(module)]
        return f"{path}.{name}" if path else name

    def _find(self, module: nn.Module, name: str, parameter: Tensor) -> Stored:
        full_name = self._full_name(module, name)
        # A tied parameter has several names, of which the checkpoint has one.
        for each in (full_name, *self._names.get(id(parameter), [])):
            info = self._stored_as(each)
            if info is None:
                continue
            same_rows = module is self._embedding and info.shape[1:] == tuple(parameter.shape[1:])
            if info.dtype in TORCH_DTYPES and (info.shape == tuple(parameter.shape) or same_rows):
                return ((info,),)
        if name in MERGED_EXPERTS and parameter.dim() == 3 and (experts := self._experts(full_name, parameter)):
            return experts
        model_type = self._model.config.model_type
        raise ModelError(
            f"the checkpoint does not hold {full_name} as the model {model_type} has it (other names, or quantised "
            "tensors); --stream-layers does not support that; load the model, with --device-map auto"
        )

    def _experts(self, full_name: str, parameter: Tensor) -> Stored | None:
        path, _, name = full_name.rpartition(".")
        n_experts, n_out, n_in = parameter.shape
        experts = []
        for i in range(n_experts):
            parts = [self._stored_as(f"{path}.{i}.{part}.weight") for part in MERGED_EXPERTS[name]]
            known = tuple(part for part in parts if part is not None and part.dtype in TORCH_DTYPES)
            shapes = [part.shape for part in known]
            if len(known) < len(parts) or any(len(shape) != 2 or shape[1] != n_in for shape in shapes):
                return None
            if sum(shape[0] for shape in shapes) != n_out or len(set(shapes)) > 1:
                return None
            experts.append(known)
        # One expert alone would look like a tensor that is not merged.
        return tuple(experts) if n_experts > 1 else None

    def _stored_as(self, name: str) -> TensorInfo | None:
        prefix = f"{self._model.base_model_prefix}."
        names = (name, name.removeprefix(prefix), prefix + name)
        return next((self._stored[each] for each in names if each in self._stored), None)


def _own(module: nn.Module) -> bool:
    return any(tensor is not None for tensor in (*module._parameters.values(), *module._buffers.values()))
