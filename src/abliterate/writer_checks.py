"""Whether the residual writers that were found are all that a checkpoint must have."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from abliterate.architectures import Architecture
from abliterate.checkpoints.checkpoint import CONFIG_NAME
from abliterate.checkpoints.quantized import CONFIG_KEYS, base_in_words, is_handled
from abliterate.checkpoints.safetensors_file import TORCH_DTYPES, TensorInfo
from abliterate.errors import CheckpointError, QuantizedCheckpointError
from abliterate.tensor_names import Role, TensorName
from abliterate.untrusted import shown

_SUBLAYERS: dict[Role, str] = {"attn": "attention (or another mixer)", "mlp": "an MLP"}


def refuse_quantization_config(config: Mapping[str, Any], tensors: Sequence[TensorInfo], path: Path) -> None:
    """Raise if config.json says that the checkpoint is quantised, and say what can be done about it.

    Raises:
        QuantizedCheckpointError: It does.
    """
    for key in CONFIG_KEYS:
        found = config.get(key)
        if found:
            method = found.get("quant_method", "unknown") if isinstance(found, dict) else "unknown"
            method = method if isinstance(method, str) and method.isprintable() else shown(method)
            plain = next((t for t in tensors if t.dtype not in TORCH_DTYPES), None)
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
        elif len(shapes[tensor_name]) == 3:
            counts[tensor_name] = shapes[tensor_name][0]
    counts |= {where: len(experts) for where, experts in numbered.items()}
    for where, count in counts.items():
        if count != expected:
            says = "names no number of experts" if expected is None else f"says {expected}"
            raise CheckpointError(
                f"{path}: {where} has {count} experts, but config.json {says}; the checkpoint is incomplete, "
                "or belongs to another config"
            )
