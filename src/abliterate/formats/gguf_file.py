"""A GGUF file as its header describes it, and whether it is whole.

What is looked at is what others pass over in silence: a file that ends early, parts of a split model, blocks that
nothing here decodes.
"""

import importlib.util
import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from abliterate.checkpoints.safetensors_file import is_lfs_pointer, lfs_pointer
from abliterate.errors import InputError, MissingDependencyError, ModelError
from abliterate.files import shown

INSTALL_HINT = "pip install 'abliterate[gguf]'"
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
F32, F16, BF16 = 0, 1, 30
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
        ranges: where in the file each key and its value lie, first byte and end.
        tensors: what is stored, in the order of the file.
        start: where the tensors begin.
        size: bytes of the file.
    """

    path: Path
    metadata: dict[str, Any]
    ranges: dict[str, tuple[int, int]]
    tensors: tuple[GgufTensor, ...]
    start: int
    size: int

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
        return {frozenset({F16}): "float16", frozenset({BF16}): "bfloat16"}.get(frozenset(kinds), "float32")

    def stop_tokens(self) -> list[int]:
        """Return the tokens that end an answer, as the file has them."""
        keys = ("eos_token_id", "eot_token_id", "eom_token_id")
        found = [self.metadata.get(f"tokenizer.ggml.{key}") for key in keys]
        return sorted({int(token) for token in found if token is not None})


def read_gguf(path: Path, *, may_be_a_part: bool = False) -> GgufFile:
    """Read the header of a GGUF file, and check that the file holds all that it tells of.

    Args:
        path: the file.
        may_be_a_part: whether it may be one of the files of a split model.

    Raises:
        InputError: it cannot be read.
        CheckpointError: it is a pointer of Git LFS.
        ModelError: it is no GGUF file, it is damaged, ends too early, or is a part of a split model.
        MissingDependencyError: the package `gguf` is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError(f"{path}: to read a GGUF file the package gguf is needed: {INSTALL_HINT}")
    if is_lfs_pointer(path):
        raise lfs_pointer(path)
    try:
        with path.open("rb") as file:
            header = _read_header(path, file, size=os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (struct.error, UnicodeDecodeError, EOFError) as error:
        raise damaged_gguf(path, f"its header ends too early or is no header ({error})") from error
    _check_counts(header)
    n_parts = header.metadata.get("split.count", 1)
    if n_parts > 1 and not may_be_a_part:
        raise ModelError(
            f"{path}: is one of {n_parts} parts of a model; put them together first (`llama-gguf-split --merge`)"
        )
    if not header.tensors and not (n_parts > 1 and may_be_a_part):
        raise ModelError(f"{path}: holds no weights; give the file with the model itself")
    _check_extents(header)
    return header


def _check_counts(header: GgufFile) -> None:
    """Check the numbers that are counted with here."""
    for key, most in (("split.count", _MOST_ENTRIES), ("general.alignment", _MOST_ENTRIES)):
        if not is_count(header.metadata.get(key, 1), most):
            raise damaged_gguf(header.path, f"its {key} is {shown(header.metadata[key])}")


def is_count(value: Any, most: int) -> bool:
    """Return whether a value of the metadata is a whole number from 0 to `most`."""
    return type(value) is int and 0 <= value <= most


def damaged_gguf(path: Path, reason: str) -> ModelError:
    """Return the error about a GGUF file that cannot be what was written."""
    return ModelError(f"{path}: the GGUF file is damaged: {reason}; download it again")


def _read_header(path: Path, file: BinaryIO, *, size: int) -> GgufFile:
    if file.read(4) != _MAGIC:
        raise ModelError(f"{path}: is not a GGUF file: it does not begin with GGUF; give a .gguf file of a model")
    (version,) = _numbers(file, "I")
    if version not in _VERSIONS:
        raise ModelError(f"{path}: is GGUF of version {version}; versions 2 and 3, little-endian, are read")
    n_tensors, n_values = _numbers(file, "QQ")
    if max(n_tensors, n_values) > _MOST_ENTRIES:
        raise damaged_gguf(path, f"it claims {max(n_tensors, n_values)} entries")
    metadata: dict[str, Any] = {}
    ranges: dict[str, tuple[int, int]] = {}
    for _ in range(n_values):
        begins, key = file.tell(), _string(file)
        (kind,) = _numbers(file, "I")
        metadata[key] = _value(file, kind)
        ranges[key] = begins, file.tell()
    # Of a split model the first part says it for all.
    if not isinstance(metadata.get("general.architecture"), str) and not metadata.get("split.no"):
        raise damaged_gguf(path, "it does not say which architecture it is of")
    tensors = [_tensor(file) for _ in range(n_tensors)]
    aligned = metadata.get("general.alignment")
    alignment = aligned if type(aligned) is int and aligned > 0 else _ALIGNMENT
    start = -(-file.tell() // alignment) * alignment
    return GgufFile(
        path=path,
        metadata=metadata,
        ranges=ranges,
        start=start,
        size=size,
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


def _check_extents(header: GgufFile) -> None:
    """Check that the file is as long as its tensors need, and that their blocks can be decoded."""
    import gguf
    import numpy as np

    sizes = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    for kind in sorted({tensor.kind for tensor in header.tensors}):
        try:
            block = np.zeros((1, sizes[kind][1]), dtype={F32: np.float32, F16: np.float16}.get(kind, np.uint8))
            gguf.dequantize(block, gguf.GGMLQuantizationType(kind))
        except (KeyError, ValueError, NotImplementedError) as error:
            named = {int(known): known.name for known in gguf.GGMLQuantizationType}.get(kind, f"kind {kind}")
            first = next(tensor.name for tensor in header.tensors if tensor.kind == kind)
            raise ModelError(
                f"{header.path}: {first} is stored as {named}, which the package gguf does not decode; "
                "give the model in another quantisation, or a newer gguf"
            ) from error
    if len({tensor.name for tensor in header.tensors}) < len(header.tensors):
        raise damaged_gguf(header.path, "two of its tensors have the same name")
    position, before = header.start, "the header"
    for tensor in sorted(header.tensors, key=lambda tensor: tensor.offset):
        n_entries, n_bytes = sizes[tensor.kind]
        if tensor.shape and tensor.shape[-1] % n_entries:
            raise damaged_gguf(header.path, f"the rows of {tensor.name} are no whole number of blocks")
        if tensor.offset < position:
            raise damaged_gguf(header.path, f"{tensor.name} begins before {before} ends")
        position, before = tensor.offset + prod(tensor.shape) // n_entries * n_bytes, tensor.name
    if position > header.size:
        raise damaged_gguf(header.path, f"it ends after {header.size} bytes, and {before} goes on to {position}")
