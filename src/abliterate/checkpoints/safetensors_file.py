"""One safetensors file: its header, and which tensors it holds.

A file is 8 bytes of length, a JSON header, which names every tensor with its dtype, shape and byte range, and
the bytes of the tensors. Those are read elsewhere (`stored_tensors`): what is said here needs no torch.
"""

import json
import math
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from abliterate.checkpoints.file_ranges import became_shorter
from abliterate.errors import CheckpointError
from abliterate.files import open_regular, parse_json, shown

if TYPE_CHECKING:
    from abliterate.checkpoints.encoding import Encoding

_LENGTH_BYTES = 8
# How the file begins that git leaves in the place of a large one, and more than it can be long.
_LFS, _MAX_POINTER_BYTES = b"version https://git-lfs", 1024
# As torch holds sizes; more axes than it takes.
_MAX_SIZE, _MAX_AXES = 1 << 63, 64
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
_CHUNK_BYTES = 16 << 20
_DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
# Those of plain weights, and the bytes of a number; torch has each of them, by the names in `stored_tensors`.
PLAIN_DTYPES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One tensor as its shard's header describes it; `start` and `end` are byte offsets in the file.

    With an `encoding` it stands for the numbers that several stored tensors mean; name, dtype and shape are then those
    that it would have as a plain tensor, and the offsets those of the codes.
    """

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    encoding: "Encoding | None" = None

    @property
    def stored_dtype(self) -> str:
        """What the file calls the way in which it is stored; `dtype`, unless it has an encoding."""
        return self.dtype if self.encoding is None else self.encoding.stored_dtype

    @property
    def plain_bytes(self) -> int:
        """Bytes of a tensor of this dtype and shape."""
        return math.prod(self.shape) * _DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One file of weights, as a rule safetensors.

    Attributes:
        file_name: Its name.
        header_bytes: All that precedes the weights.
        metadata: What its header says besides; None for nothing.
        tensors: In file order.
        padding: Bytes after the last tensor, of which the safetensors format has none.
    """

    file_name: str
    header_bytes: bytes
    metadata: dict[str, str] | None
    tensors: tuple[TensorInfo, ...]
    padding: int = 0

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return (self.tensors[-1].end if self.tensors else len(self.header_bytes)) + self.padding


def read_shard(path: Path) -> Shard:
    """Read and check the header of one safetensors file.

    Raises:
        CheckpointError: The file is truncated, is not safetensors, or its header contradicts itself.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(_LENGTH_BYTES)
            header_bytes = prefix + file.read(header_end(path, prefix, size=size) - len(prefix))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    return parse_shard(path, header_bytes, size=size)


def header_end(path: Path, beginning: bytes, *, size: int) -> int:
    """Return where in a file its header ends and its tensors begin, which its first 8 bytes tell.

    Args:
        path: The file, for messages.
        beginning: Its first bytes, or all of a shorter file.
        size: Its size.

    Raises:
        CheckpointError: The header would be longer than the file, or than the format allows.
    """
    if beginning.startswith(_LFS[:_LENGTH_BYTES]) and size < _MAX_POINTER_BYTES:
        raise lfs_pointer(path)
    length = int.from_bytes(beginning[:_LENGTH_BYTES], "little")
    if len(beginning) < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
        raise damaged_file(path, f"its header claims {length} bytes, the file has {size}")
    return _LENGTH_BYTES + length


def parse_shard(path: Path, header_bytes: bytes, *, size: int) -> Shard:
    """Read what stands before a file's tensors, and check it against the file's size.

    Args:
        path: The file; its last part names the shard.
        header_bytes: Its length and header.
        size: Its size.

    Raises:
        CheckpointError: The header is not one, or contradicts itself or the size.
    """
    header = parse_object(header_bytes[_LENGTH_BYTES:], path=path, what="its header")
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise damaged_file(path, "its __metadata__ is not a map of strings")
    tensors = describe_tensors(path, header, data_start=len(header_bytes))
    position = tensors[-1].end if tensors else len(header_bytes)
    if position != size:
        raise damaged_file(path, f"its header describes {position} bytes, the file has {size}")
    return Shard(file_name=path.name, header_bytes=header_bytes, metadata=metadata, tensors=tensors)


def describe_tensors(path: Path, header: Mapping[str, Any], *, data_start: int) -> tuple[TensorInfo, ...]:
    """Return the tensors that a header, without its `__metadata__`, describes, in file order.

    Args:
        path: The file, for messages.
        header: Name -> dtype, shape and data_offsets.
        data_start: Where in the file the tensors begin.

    Raises:
        CheckpointError: An entry is malformed, or the tensors overlap or leave gaps.
    """
    shard = path.name
    tensors = sorted(
        (_tensor_info(path, shard, name, entry, data_start) for name, entry in header.items()),
        key=operator.attrgetter("start", "end"),
    )
    position = data_start
    for tensor in tensors:
        if tensor.start != position:
            raise damaged_file(path, f"tensor {tensor.name} starts at byte {tensor.start}, expected {position}")
        position = tensor.end
    return tuple(tensors)


def encoded_parts(info: TensorInfo) -> list[TensorInfo]:
    """Return the parts of a tensor with an encoding, matrices of a stack for example, each as a tensor of its own."""
    if info.encoding is None:
        return [info]
    return [
        replace(info, shape=shape, start=each.codes.start, end=each.codes.end, encoding=each)
        for shape, each in info.encoding.parts(info.shape)
    ]


def same_bytes(directory: Path, first: TensorInfo, second: TensorInfo) -> bool:
    """Return whether two stored tensors have the same dtype, shape and bytes; of quantised ones, codes and companions.

    Reading ends at the first difference.

    Raises:
        CheckpointError: A file cannot be read or has become shorter.
    """
    pairs = [(first, second)]
    if first.encoding is not None and second.encoding is not None:
        pairs = list(zip(first.encoding.stored, second.encoding.stored, strict=False))
    if (first.encoding is None) != (second.encoding is None) or any(
        (one.dtype, one.shape) != (other.dtype, other.shape) for one, other in pairs
    ):
        return False
    return all(_same_range(directory, one, other) for one, other in pairs)


def _same_range(directory: Path, first: TensorInfo, second: TensorInfo) -> bool:
    path = directory / first.shard
    try:
        with path.open("rb") as one, (directory / second.shard).open("rb") as other:
            one.seek(first.start)
            other.seek(second.start)
            for position in range(first.start, first.end, _CHUNK_BYTES):
                size = min(_CHUNK_BYTES, first.end - position)
                part = one.read(size)
                if len(part) != size:
                    raise became_shorter(path)
                if part != other.read(size):
                    return False
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    return True


def new_header(metadata: Mapping[str, str] | None, tensors: Sequence[TensorInfo]) -> bytes:
    """Return the length and header of a shard that holds these tensors one behind the other.

    Args:
        metadata: What stands in the header besides; None for nothing.
        tensors: In file order; their offsets mean nothing.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    return _header_with(header, tensors, position=0)


def extended_header(shard: Shard, added: Sequence[TensorInfo]) -> bytes:
    """Return the length and header of a shard that has more tensors behind its own.

    Args:
        shard: The shard as it is.
        added: The tensors it gets besides, in this order; their offsets mean nothing.
    """
    header = json.loads(shard.header_bytes[_LENGTH_BYTES:])
    return _header_with(header, added, position=shard.size - len(shard.header_bytes))


def _header_with(header: dict[str, Any], added: Sequence[TensorInfo], *, position: int) -> bytes:
    for info in added:
        size = math.prod(info.shape) * _DTYPE_BITS[info.dtype] // 8
        header[info.name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # The format wants the tensors to begin at a multiple of eight bytes.
    text += b" " * (-len(text) % _LENGTH_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _tensor_info(path: Path, shard: str, name: str, entry: Any, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict):
        raise damaged_file(path, f"the header's entry of {name} is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise damaged_file(path, f"tensor {name} has the unknown dtype {shown(dtype)}")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2 or len(shape) > _MAX_AXES:
        raise damaged_file(path, f"tensor {name} has a malformed shape or data_offsets")
    start, end = offsets
    if (end - start) * 8 != math.prod(shape) * _DTYPE_BITS[dtype]:
        raise damaged_file(path, f"tensor {name} ({dtype} {shown(shape)}) does not fill its {end - start} bytes")
    return TensorInfo(
        name=name,
        shard=shard,
        dtype=dtype,
        shape=tuple(shape),
        start=data_start + start,
        end=data_start + end,
    )


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    if not isinstance(value, list):
        return False
    for item in value:  # noqa: SIM110 - there are two lists a tensor, and a generator takes three times as long
        if type(item) is not int or not 0 <= item < _MAX_SIZE:
            return False
    return True


def parse_object(data: bytes, *, path: Path, what: str = "it", infinities: bool = False) -> dict[str, Any]:
    """Return the JSON object that a file of a checkpoint, or a part of it, must be.

    Args:
        data: The JSON document.
        path: The file, for messages.
        what: The part of it, for messages.
        infinities: See `files.parse_json`.

    Raises:
        CheckpointError: It is not JSON, or means different things to different programs.
    """
    if data.startswith(_LFS):
        raise lfs_pointer(path)
    try:
        value = parse_json(data, infinities=infinities)
    except ValueError as error:
        raise damaged_file(path, f"{what} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise damaged_file(path, f"{what} is not a JSON object")
    return value


def lfs_pointer(path: Path) -> CheckpointError:
    """Return the error about a file that is a pointer to one in Git's large file storage."""
    return CheckpointError(
        f"{path}: is a pointer of Git LFS and not the file itself, which was never downloaded; run `git lfs pull` in "
        f"{path.parent}"
    )


def is_lfs_pointer(path: Path) -> bool:
    """Return whether a file is a pointer to one in Git's large file storage."""
    try:
        with path.open("rb") as file:
            return file.read(len(_LFS)) == _LFS
    except OSError:
        return False


def damaged_file(path: Path, reason: str) -> CheckpointError:
    """Return the error about a file of a checkpoint whose content cannot be what was written."""
    return CheckpointError(f"{path}: {reason}; the file is damaged or incomplete, download it again")
