"""What transformers found in the files of a model, or how it failed; what it did not find it fills with random numbers.

That is silent but for a warning, so a model of other names (MLX's, another prefix, another class's) runs, and what is
measured on it is noise. Here each parameter that is missing is an error with its likely cause.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.checkpoints.checkpoint import is_of_mlx
from abliterate.errors import ModelError
from abliterate.files import printable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OF_MLX = "the files are in MLX's layout, which only MLX loads; use the release they were converted from"
# Buffers that a model computes as it is made; older releases stored some of them.
_COMPUTED = {"inv_freq", "original_inv_freq", "position_ids", "masked_bias", "bias", "cos_cached", "sin_cached"}


def check_complete(model: "PreTrainedModel", report: Mapping[str, Any], *, path: Path, name: str) -> None:
    """Raise unless every parameter of a loaded model came from its files.

    Args:
        model: The model.
        report: What `from_pretrained` returned with `output_loading_info`.
        path: The model's directory.
        name: What to call it in messages.

    Raises:
        ModelError: Some did not, and are random; the message names the likely cause.
    """
    buffers = {each for each, _ in model.named_buffers()}
    missing = sorted(
        each
        for each in report["missing_keys"]
        if not (each in buffers and each.rpartition(".")[2].removesuffix("_buffer") in _COMPUTED)
    )
    if not missing:
        return
    total = len(model.state_dict())
    examples = ", ".join(printable(each) for each in missing[:2])
    raise ModelError(
        f"{name}: of the {total} tensors of the model {len(missing)} are not in its files under the names that "
        f"transformers looks for ({examples}) and would be random numbers; "
        f"{_cause(missing, report['unexpected_keys'], path)}"
    )


def _cause(missing: Collection[str], unexpected: Collection[str], path: Path) -> str:
    if is_of_mlx(path):
        return OF_MLX
    for wanted in missing:
        for found in unexpected:
            if found.endswith(f".{wanted}") or wanted.endswith(f".{found}") or _tail(found) == _tail(wanted):
                return (
                    f"the files hold {printable(found)}, which may be the same under another prefix; save the "
                    "model again with the class of transformers that config.json names, or use the original release"
                )
    return (
        "the files are incomplete, or config.json is that of another model; use the release as it was published, or "
        "save it again with transformers"
    )


def _tail(name: str) -> str:
    """Return a name from the layer's index on, which stays where prefixes differ."""
    parts = name.split(".")
    start = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
    return ".".join(parts[start:])
