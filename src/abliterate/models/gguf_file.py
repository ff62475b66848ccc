"""A GGUF file as a model: what its header says, whether it is whole, and the model and tokenizer that are in it.

transformers reads it and gives dense weights: each stored block is decoded and the order of rows is put back to what
the model class expects. What is looked at here first is what it would pass over in silence: a file that ends early,
parts of a split model, weights that the class has no place for, and rotary frequencies that its config does not hold.
"""

import importlib.util
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from abliterate.errors import InputError, MissingDependencyError, ModelError
from abliterate.files import shown
from abliterate.models.loading_report import known_error

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

INSTALL_HINT = "pip install 'abliterate[gguf]'"
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_F32, _F16, _BF16 = 0, 1, 30
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# Far above any real file; what is more is damage, and must not be allocated.
_LONGEST_STRING, _MOST_ENTRIES, _MOST_DIMENSIONS = 1 << 26, 1 << 26, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """A tensor of a GGUF file.

    Attributes:
        name: as GGUF spells it, such as `blk.0.attn_q.weight`.
        shape: rows first, as torch has it.
        kind: how it is stored, the number that GGUF gives it.
        offset: of its first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    """The header of a GGUF file.

    Attributes:
        path: the file.
        metadata: its values by key; of a list of texts only the length is kept.
        tensors: what is stored, in the order of the file.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]

    @property
    def architecture(self) -> str:
        """The kind of model, as GGUF calls it."""
        return str(self.metadata["general.architecture"])

    @property
    def n_values(self) -> int:
        """How many numbers all tensors hold."""
        return sum(prod(tensor.shape) for tensor in self.tensors)

    def own(self, key: str) -> Any:
        """Return a value that is kept under the name of the architecture; None when it is not there."""
        return self.metadata.get(f"{self.architecture}.{key}")

    def tensor(self, name: str) -> GgufTensor | None:
        """Return the tensor of this name; None when there is none."""
        return next((tensor for tensor in self.tensors if tensor.name == name), None)

    def stored_dtype(self) -> str:
        """Return the half format in which all matrices are stored; float32 where they are not, or are in blocks."""
        kinds = {tensor.kind for tensor in self.tensors if len(tensor.shape) > 1}
        return {frozenset({_F16}): "float16", frozenset({_BF16}): "bfloat16"}.get(frozenset(kinds), "float32")

    def stop_tokens(self) -> list[int]:
        """Return the tokens that end an answer, as the file has them."""
        keys = ("eos_token_id", "eot_token_id", "eom_token_id")
        found = [self.metadata.get(f"tokenizer.ggml.{key}") for key in keys]
        return sorted({int(token) for token in found if token is not None})


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file, and check that the file holds all that it tells of.

    Raises:
        InputError: it cannot be read.
        ModelError: it is no GGUF file, it is damaged, ends too early, or is a part of a split model.
        MissingDependencyError: the package `gguf` is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError(f"{path}: to read a GGUF file the package gguf is needed: {INSTALL_HINT}")
    try:
        with path.open("rb") as file:
            header = _read_header(path, file)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (struct.error, UnicodeDecodeError, EOFError) as error:
        raise _damaged(path, f"its header ends too early or is no header ({error})") from error
    _check_counts(header)
    n_parts = header.metadata.get("split.count", 1)
    if n_parts > 1:
        raise ModelError(
            f"{path}: is one of {n_parts} parts of a model; put them together first (`llama-gguf-split --merge`)"
        )
    if not header.tensors:
        raise ModelError(f"{path}: holds no weights; give the file with the model itself")
    _check_extents(header, size)
    return header


def _check_counts(header: GgufFile) -> None:
    """Check the numbers that are counted with here."""
    for key, most in (("split.count", _MOST_ENTRIES), ("general.alignment", _MOST_ENTRIES)):
        if not _is_count(header.metadata.get(key, 1), most):
            raise _damaged(header.path, f"its {key} is {shown(header.metadata[key])}")


def _is_count(value: Any, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


def _damaged(path: Path, reason: str) -> ModelError:
    return ModelError(f"{path}: the GGUF file is damaged: {reason}; download it again")


def _read_header(path: Path, file: BinaryIO) -> GgufFile:
    if file.read(4) != _MAGIC:
        raise ModelError(f"{path}: is not a GGUF file: it does not begin with GGUF; give a .gguf file of a model")
    (version,) = _numbers(file, "I")
    if version not in _VERSIONS:
        raise ModelError(f"{path}: is GGUF of version {version}; versions 2 and 3, little-endian, are read")
    n_tensors, n_values = _numbers(file, "QQ")
    if max(n_tensors, n_values) > _MOST_ENTRIES:
        raise _damaged(path, f"it claims {max(n_tensors, n_values)} entries")
    metadata: dict[str, Any] = {}
    for _ in range(n_values):
        key = _string(file)
        (kind,) = _numbers(file, "I")
        metadata[key] = _value(file, kind)
    if not isinstance(metadata.get("general.architecture"), str):
        raise _damaged(path, "it does not say which architecture it is of")
    tensors = [_tensor(file) for _ in range(n_tensors)]
    aligned = metadata.get("general.alignment")
    alignment = aligned if type(aligned) is int and aligned > 0 else _ALIGNMENT
    start = -(-file.tell() // alignment) * alignment
    return GgufFile(
        path=path,
        metadata=metadata,
        tensors=tuple(
            GgufTensor(name=name, shape=shape, kind=kind, offset=start + offset)
            for name, shape, kind, offset in tensors
        ),
    )


def _numbers(file: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{form}", _bytes(file, struct.calcsize(f"<{form}")))


def _bytes(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise EOFError(f"{count} bytes are wanted at {file.tell() - len(data)}, {len(data)} are there")
    return data


def _string(file: BinaryIO) -> str:
    (length,) = _numbers(file, "Q")
    if length > _LONGEST_STRING:
        raise EOFError(f"a text of {length} bytes")
    return _bytes(file, length).decode()


def _value(file: BinaryIO, kind: int) -> Any:
    if kind in _NUMBERS:
        return _numbers(file, _NUMBERS[kind])[0]
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        raise EOFError(f"a value of the unknown kind {kind}")
    kind, count = _numbers(file, "IQ")
    if count > _MOST_ENTRIES:
        raise EOFError(f"a list of {count}")
    if kind in _NUMBERS:
        return list(_numbers(file, f"{count}{_NUMBERS[kind]}"))
    if kind == _ARRAY:
        raise EOFError("a list of lists")
    for _ in range(count):
        _value(file, kind)
    return count


def _tensor(file: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
    name = _string(file)
    (n_dimensions,) = _numbers(file, "I")
    if n_dimensions > _MOST_DIMENSIONS:
        raise EOFError(f"a tensor of {n_dimensions} dimensions")
    shape = _numbers(file, f"{n_dimensions}Q")
    kind, offset = _numbers(file, "IQ")
    return name, tuple(reversed(shape)), kind, offset


def _check_extents(header: GgufFile, size: int) -> None:
    """Check that the file is as long as its tensors need, and that their blocks can be decoded."""
    import gguf
    import numpy as np

    sizes = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    for kind in sorted({tensor.kind for tensor in header.tensors}):
        try:
            block = np.zeros((1, sizes[kind][1]), dtype={_F32: np.float32, _F16: np.float16}.get(kind, np.uint8))
            gguf.dequantize(block, gguf.GGMLQuantizationType(kind))
        except (KeyError, ValueError, NotImplementedError) as error:
            named = {int(known): known.name for known in gguf.GGMLQuantizationType}.get(kind, f"kind {kind}")
            first = next(tensor.name for tensor in header.tensors if tensor.kind == kind)
            raise ModelError(
                f"{header.path}: {first} is stored as {named}, which the package gguf does not decode; "
                "give the model in another quantisation, or a newer gguf"
            ) from error
    ends = {t.name: t.offset + prod(t.shape) // sizes[t.kind][0] * sizes[t.kind][1] for t in header.tensors}
    last = max(ends, key=ends.__getitem__)
    if ends[last] > size:
        raise _damaged(header.path, f"it ends after {size} bytes, and {last} goes on to {ends[last]}")


def load_gguf(
    path: Path,
    *,
    name: str,
    choose_class: "Callable[[PretrainedConfig], Any]",
    dtype: str = "float32",
    device_map: str | None = None,
    header: GgufFile | None = None,
) -> "PreTrainedModel":
    """Load the model in a GGUF file, its blocks decoded, as a plain model that can be saved.

    Args:
        path: the file.
        name: what to call the model in messages.
        choose_class: gives the class of transformers for a config.
        dtype: float32, bfloat16 or float16.
        device_map: see `ModelOptions`.
        header: of the file, where it was read before.

    Raises:
        InputError: the file cannot be read.
        ModelError: it is damaged, of a kind that transformers does not read, or does not fill the model.
        MissingDependencyError: the package `gguf` is not installed.
    """
    import torch
    from transformers import GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    header = header or read_gguf(path)
    config = read_gguf_config(path, name=name, header=header)
    with _loads(name), _alone(path) as (directory, file), _no_bar():
        loaded, report = choose_class(config).from_pretrained(
            directory,
            gguf_file=file,
            config=config,
            dtype=getattr(torch, dtype),
            device_map=device_map,
            quantization_config=GgufConfig(dequantize=True),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    with _loads(name):
        _check_report(header, loaded, report, name=name)
    # It is marked as quantised and as not to be saved, although its weights are plain numbers by now.
    loaded.hf_quantizer = None
    for mark in ("is_quantized", "quantization_method"):
        if hasattr(loaded, mark):
            delattr(loaded, mark)
    for section in (loaded.config, config):
        if hasattr(section, "quantization_config"):
            del section.quantization_config
    loaded.config._name_or_path = name
    settings = loaded.generation_config
    settings._from_model_config = False
    stops = sorted({*_as_list(loaded.config.eos_token_id), *header.stop_tokens()})
    if stops:
        settings.eos_token_id = stops[0] if len(stops) == 1 else stops
    return cast("PreTrainedModel", loaded.eval())


def load_gguf_tokenizer(path: Path, *, name: str) -> "PreTrainedTokenizerBase":
    """Load the tokenizer in a GGUF file, its chat template with it.

    Raises:
        InputError: the file cannot be read.
        ModelError: there is none that loads.
        MissingDependencyError: the package `gguf` is not installed.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer

    read_gguf(path)
    with known_error(f"{name} has no tokenizer that loads"), _alone(path) as (directory, file):
        tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=file)
    tokenizer.name_or_path = name
    return cast("PreTrainedTokenizerBase", tokenizer)


def read_gguf_config(path: Path, *, name: str, header: GgufFile | None = None) -> "PretrainedConfig":
    """Return the config of the model in a GGUF file, its rotary frequencies included.

    Raises:
        InputError: the file cannot be read.
        ModelError: transformers does not know the architecture, or its config cannot say what the file holds.
        MissingDependencyError: the package `gguf` is not installed.
    """
    from transformers import AutoConfig

    header = header or read_gguf(path)
    with _loads(name):
        with _alone(path) as (directory, file):
            config = AutoConfig.from_pretrained(directory, gguf_file=file)
        blocks = config.get_text_config(decoder=True).num_hidden_layers
        # Each has tensors of its own; and the names of all of them are made before any is looked for.
        if not _is_count(blocks, len(header.tensors)):
            raise _damaged(path, f"{shown(blocks)} blocks for {len(header.tensors)} tensors")
        _complete(header, config)
        _say_rotary(header, config)
    return cast("PretrainedConfig", config)


_CLASSES_OF_27B = {"gemma2": 46, "gemma3": 62}


def _complete(header: GgufFile, config: Any) -> None:
    """Put right what transformers leaves at the default of the config's class, whatever the file says."""
    for key, stored in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if f"tokenizer.ggml.{stored}_token_id" not in header.metadata:
            setattr(config, f"{key}_token_id", None)
    width = header.own("attention.key_length")
    if width and header.architecture in {"qwen3", "gemma2", "gemma3"}:
        config.head_dim = int(width)
        if layers := _CLASSES_OF_27B.get(header.architecture):
            # GGUF has no key for it; its readers tell the largest of each by its depth.
            largest = config.num_hidden_layers == layers
            config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if largest else int(width)


@contextmanager
def _loads(name: str) -> Iterator[None]:
    failure = f"{name} does not load as a causal language model"
    with known_error(failure):
        try:
            yield
        except KeyError as error:
            raise ModelError(f"{failure}: {error.args[0] if error.args else 'something'} is missing") from error


def _as_list(value: Any) -> list[int]:
    return [int(one) for one in (value if isinstance(value, list | tuple) else [value]) if one is not None]


@contextmanager
def _alone(path: Path) -> Iterator[tuple[str, str]]:
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


@contextmanager
def _no_bar() -> Iterator[None]:
    """Keep transformers from drawing a bar of its own, which its switch for that does not reach."""
    from transformers import modeling_gguf_pytorch_utils

    reader: Any = modeling_gguf_pytorch_utils
    drawn = reader.tqdm
    reader.tqdm = lambda tensors, **_: tensors
    try:
        yield
    finally:
        reader.tqdm = drawn


def _check_report(header: GgufFile, model: Any, report: dict[str, Any], *, name: str) -> None:
    """Refuse a model that the file does not fill, and a file of which the model does not take everything."""
    wrong = {
        "missing_keys": "lacks",
        "unexpected_keys": "holds, but the model does not take,",
        "mismatched_keys": "holds in another shape than its config says",
    }
    for key, what in wrong.items():
        # Of a tensor that does not fit, the shapes are told besides.
        if names := sorted(found if isinstance(found, str) else found[0] for found in report[key]):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ModelError(
                f"{name}: the GGUF file {what} {', '.join(names[:3])}{more}; it would run with weights that nobody "
                "trained, so use another conversion of the model"
            )
    taken = sum(tensor.numel() for tensor in {t.data_ptr(): t for t in model.state_dict().values()}.values())
    passed_over = _passed_over(header, model)
    left = header.n_values - sum(prod(t.shape) for t in passed_over)
    if left > taken:
        raise ModelError(
            f"{name}: the GGUF file holds {left:,} values and the model takes {taken:,} of them, so transformers "
            f"leaves tensors of {header.architecture} out (biases, often); convert the original checkpoint instead"
        )


def _passed_over(header: GgufFile, model: Any) -> list[GgufTensor]:
    """Return the tensors that need no place: kept in the config, a second copy of the embedding, other heads."""
    n_layers = int(model.config.get_text_config(decoder=True).num_hidden_layers)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    found = []
    for tensor in header.tensors:
        parts = tensor.name.split(".")
        beyond = parts[0] == "blk" and parts[1].isdigit() and int(parts[1]) >= n_layers
        if tensor.name == _FREQUENCIES or (tied and tensor.name == "output.weight") or beyond or "nextn" in parts:
            found.append(tensor)
    return found


_FREQUENCIES = "rope_freqs.weight"
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
    if header.tensor(_FREQUENCIES) is not None:
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

    stored = cast(GgufTensor, header.tensor(_FREQUENCIES))
    if stored.kind != _F32:
        raise ModelError(_rotary_refusal(header, f"{_FREQUENCIES} in another format than float32"))
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
        raise ModelError(_rotary_refusal(header, f"{_FREQUENCIES}, which is not as Llama 3 scales"))
    return found


def _rotary_refusal(header: GgufFile, what: str) -> str:
    return (
        f"{header.path}: holds {what} for its rotary positions, which transformers does not read from a GGUF file; "
        "use the original checkpoint"
    )
