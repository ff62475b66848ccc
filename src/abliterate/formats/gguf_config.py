"""The config of the model in a GGUF file, as transformers reads it, and what it leaves out put right.

transformers takes half a minute to read a vocabulary that it then only counts, so it is given the file without one,
and the embedding tells how many tokens there are.
"""

import functools
import json
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from abliterate.errors import ModelError
from abliterate.files import known_error, shown
from abliterate.formats.gguf_file import F32, GgufFile, GgufTensor, damaged_gguf, is_count, read_gguf

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FREQUENCIES = "rope_freqs.weight"


def read_gguf_config(path: Path, *, name: str, header: GgufFile | None = None) -> "PretrainedConfig":
    """Return the config of the model in a GGUF file, its rotary frequencies included.

    Raises:
        InputError: the file cannot be read.
        ModelError: transformers does not know the architecture, or its config cannot say what the file holds.
        MissingDependencyError: the package `gguf` is not installed.
    """
    header = header or read_gguf(path)
    config = config_of(header, header.tensors, name=name)
    with loads_as_a_model(name):
        _say_rotary(header, config)
    return config


def config_of(header: GgufFile, tensors: Sequence[GgufTensor], *, name: str) -> "PretrainedConfig":
    """Return what a header says of its model, but for rotary frequencies.

    Args:
        header: of the file, of a split model the first.
        tensors: of the whole model.
        name: what to call it in messages.

    Raises:
        InputError: the file cannot be read.
        ModelError: transformers does not know the architecture.
    """
    from transformers import AutoConfig

    with loads_as_a_model(name):
        with tempfile.TemporaryDirectory(prefix="abliterate-gguf-") as directory:
            _write_without_vocabulary(header, tensors, Path(directory) / "model.gguf")
            config = AutoConfig.from_pretrained(directory, gguf_file="model.gguf")
        config._name_or_path = ""
        text = config.get_text_config(decoder=True)
        # Each has tensors of its own; and the names of all of them are made before any is looked for.
        if not is_count(text.num_hidden_layers, len(tensors)):
            raise damaged_gguf(header.path, f"{shown(text.num_hidden_layers)} blocks for {len(tensors)} tensors")
        rows = next(
            (tensor.shape[0] for tensor in tensors if tensor.name == "token_embd.weight" and tensor.shape), None
        )
        if rows is not None and header.own("vocab_size") is None:
            text.vocab_size = rows
        _complete(header, config)
    return cast("PretrainedConfig", config)


_LONGEST_VALUE = 4096


def _write_without_vocabulary(header: GgufFile, tensors: Sequence[GgufTensor], target: Path) -> None:
    """Write what a config is read from: all values but long ones of the tokenizer, and that there are the tensors."""
    kept = [
        (begins, ends)
        for key, (begins, ends) in header.ranges.items()
        if not (key.startswith("tokenizer.") and ends - begins > _LONGEST_VALUE)
    ]
    with header.path.open("rb") as source, target.open("wb") as file:
        file.write(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(kept)))
        for begins, ends in kept:
            source.seek(begins)
            file.write(source.read(ends - begins))
        for tensor in tensors:
            text = tensor.name.encode()
            file.write(struct.pack("<Q", len(text)) + text)
            # Nobody reads what is in them: each is as if it were one number.
            file.write(struct.pack("<IQIQ", 1, 1, F32, 0))
        alignment = header.metadata.get("general.alignment", 32)
        file.write(bytes(2 * alignment + 4))


@functools.lru_cache(maxsize=4)
def names_of_class(architecture: str, config_text: str, n_blocks: int) -> dict[str, str]:
    """Return GGUF's name of each tensor of a model -> that of transformers, by a model without weights.

    Args:
        architecture: as GGUF calls it.
        config_text: the config as JSON.
        n_blocks: how many it has.
    """
    import gguf
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    by_name = gguf.get_tensor_name_map(known[architecture], n_blocks)
    content = json.loads(config_text)
    config = AutoConfig.for_model(content.pop("model_type"), **content)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    found: dict[str, str] = {}
    for key in model.state_dict():
        stem, dot, suffix = key.rpartition(".")
        if suffix not in {"weight", "bias"}:
            stem, dot, suffix = key, ".", "weight"
        name = by_name.get_name(stem)
        if name is not None:
            found.setdefault(f"{name}{dot}{suffix}", key)
    return found


_CLASSES_OF_27B = {"gemma2": 46, "gemma3": 62}
_OF_EXPERTS = {
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}


def _complete(header: GgufFile, config: Any) -> None:
    """Put right what transformers leaves at the default of the config's class, whatever the file says."""
    for key, stored in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if f"tokenizer.ggml.{stored}_token_id" not in header.metadata:
            setattr(config, f"{key}_token_id", None)
    for key, stored in _OF_EXPERTS.items():
        if header.own(stored) and hasattr(config, key):
            setattr(config, key, int(header.own(stored)))
    width = header.own("attention.key_length")
    if width and header.architecture in {"qwen3", "gemma2", "gemma3"}:
        config.head_dim = int(width)
        if layers := _CLASSES_OF_27B.get(header.architecture):
            # GGUF has no key for it; its readers tell the largest of each by its depth.
            largest = config.num_hidden_layers == layers
            config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if largest else int(width)


@contextmanager
def loads_as_a_model(name: str) -> Iterator[None]:
    """Name in one line what transformers makes of a file that it does not read.

    Raises:
        ModelError: it does not.
    """
    failure = f"{name} does not load as a causal language model"
    with known_error(failure):
        try:
            yield
        except KeyError as error:
            raise ModelError(f"{failure}: {error.args[0] if error.args else 'something'} is missing") from error


@contextmanager
def alone(path: Path) -> Iterator[tuple[str, str]]:
    """Yield a directory in which the file lies alone, and its name there.

    A tokenizer.json or config.json that happens to lie beside it would be taken in the place of what is in the file.
    """
    with tempfile.TemporaryDirectory(prefix="abliterate-gguf-") as directory:
        try:
            (Path(directory) / "model.gguf").symlink_to(path.resolve())
        except OSError:  # a system or account that makes no links
            yield str(path.resolve().parent), path.name
            return
        yield directory, "model.gguf"


_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def _say_rotary(header: GgufFile, config: Any) -> None:
    """Put into the config what a GGUF says of rotary frequencies and transformers does not read.

    Raises:
        ModelError: no config can say it.
    """
    if any(tensor.name.startswith("rope_factors_") for tensor in header.tensors):
        raise ModelError(_rotary_refusal(header, "the factors of LongRoPE"))
    kind, factor = header.own("rope.scaling.type"), header.own("rope.scaling.factor")
    found: dict[str, Any] = {}
    if header.tensor(FREQUENCIES) is not None:
        found = _llama3_factors(header, config)
    elif kind not in {None, "none"} and factor not in {None, 0.0, 1.0}:
        if kind not in {"linear", "yarn"}:
            raise ModelError(_rotary_refusal(header, f"scaling of the kind {kind}"))
        found = {"rope_type": kind, "factor": float(factor)}
        if kind == "yarn" and (original := header.own("rope.scaling.original_context_length")):
            found["original_max_position_embeddings"] = int(original)
    if not found:
        return
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        raise ModelError(_rotary_refusal(header, f"scaling of the kind {found['rope_type']}"))
    # Where layers differ, those with a sliding window are not scaled.
    whole = parameters.get("full_attention", parameters)
    whole.update(found)


def _llama3_factors(header: GgufFile, config: Any) -> dict[str, Any]:
    """Return what the config of Llama 3 says in place of one factor a frequency, if it comes to the same."""
    import numpy as np
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    stored = cast(GgufTensor, header.tensor(FREQUENCIES))
    if stored.kind != F32:
        raise ModelError(_rotary_refusal(header, f"{FREQUENCIES} in another format than float32"))
    values = np.fromfile(header.path, dtype="<f4", count=prod(stored.shape), offset=stored.offset)
    factors = torch.from_numpy(values).double()
    if bool((factors == 1).all()):
        return {}
    parameters = dict(config.rope_parameters)
    found = {"rope_type": "llama3", "factor": round(float(factors.max()), 4), **_LLAMA3}
    config.rope_parameters = parameters | found
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    config.rope_parameters = parameters
    width = 2 * len(factors)
    plain = parameters["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    if len(scaled) != len(factors) or not torch.allclose(plain / scaled.double(), factors, rtol=1e-3):
        raise ModelError(_rotary_refusal(header, f"{FREQUENCIES}, which is not as Llama 3 scales"))
    return found


def _rotary_refusal(header: GgufFile, what: str) -> str:
    return (
        f"{header.path}: holds {what} for its rotary positions, which transformers does not read from a GGUF file; "
        "use the original checkpoint"
    )
