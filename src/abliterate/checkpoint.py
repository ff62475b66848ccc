"""A checkpoint as files: `config.json`, safetensors shards, and everything that lies beside them.

The layout is read from the shards' headers (8 bytes of length, then JSON), which name every tensor with its
dtype, shape and byte range. No weight is read before one is asked for, and none is ever changed in place.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import torch
from torch import Tensor

from abliterate.errors import CheckpointError
from abliterate.progress import Advance

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
_CHUNK_BYTES = 16 << 20
_SKIPPED_DIRECTORIES = {".git", ".cache"}
_DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
TORCH_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One tensor as its shard's header describes it; `start` and `end` are byte offsets in the file."""

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One safetensors file; `header_bytes` is all that precedes the weights, `tensors` are in file order."""

    file_name: str
    header_bytes: bytes
    metadata: dict[str, str] | None
    tensors: tuple[TensorInfo, ...]

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return self.tensors[-1].end if self.tensors else len(self.header_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint directory, from its headers alone.

    Attributes:
        path: The directory.
        config: The content of `config.json`.
        shards: The safetensors files, by name.
        index: The content of the shard index; None for a single file.
        side_files: Every other regular file below the directory, as relative POSIX paths, sorted.
    """

    path: Path
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    index: dict[str, Any] | None
    side_files: tuple[str, ...]

    def tensors(self) -> Iterator[TensorInfo]:
        """Iterate over all tensors, shard by shard in file order."""
        for shard in self.shards:
            yield from shard.tensors

    def tensor(self, name: str) -> TensorInfo:
        """Return the tensor called `name`; KeyError when there is none."""
        for tensor in self.tensors():
            if tensor.name == name:
                return tensor
        raise KeyError(name)


def open_checkpoint(path: Path) -> Checkpoint:
    """Read and check a checkpoint's layout: config, index and shard headers, no weights.

    Raises:
        CheckpointError: Something is missing, inconsistent or unreadable; the message names the file.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such directory; give the one that holds config.json")
    if not (path / CONFIG_NAME).is_file():
        raise CheckpointError(
            f"{path}: no {CONFIG_NAME}, so this is no model checkpoint; "
            "give the directory that `save_pretrained` wrote or the Hub id"
        )
    config = read_json_object(path / CONFIG_NAME)
    shard_names, index = _shard_names(path)
    shards = tuple(read_shard(path / name) for name in shard_names)
    _check_tensor_names(path, shards, index)
    return Checkpoint(
        path=path,
        config=config,
        shards=shards,
        index=index,
        side_files=tuple(sorted(set(_regular_files(path)) - set(shard_names))),
    )


def read_shard(path: Path) -> Shard:
    """Read and check the header of one safetensors file.

    Raises:
        CheckpointError: The file is truncated, is not safetensors, or its header contradicts itself.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(_LENGTH_BYTES)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
                raise _damaged(path, f"its header claims {length} bytes, the file has {size}")
            header_bytes = prefix + file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    header = _parse_header(path, header_bytes[_LENGTH_BYTES:])
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise _damaged(path, "its __metadata__ is not a map of strings")
    tensors = sorted(
        (_tensor_info(path, name, entry, len(header_bytes)) for name, entry in header.items()),
        key=lambda tensor: (tensor.start, tensor.end),
    )
    position = len(header_bytes)
    for tensor in tensors:
        if tensor.start != position:
            raise _damaged(path, f"tensor {tensor.name} starts at byte {tensor.start}, expected {position}")
        position = tensor.end
    if position != size:
        raise _damaged(path, f"its header describes {position} bytes, the file has {size}")
    return Shard(file_name=path.name, header_bytes=header_bytes, metadata=metadata, tensors=tuple(tensors))


def read_tensor(directory: Path, info: TensorInfo) -> Tensor:
    """Read one floating-point tensor from its shard in `directory`.

    Raises:
        CheckpointError: The file cannot be read or has become shorter.
    """
    path = directory / info.shard
    try:
        with path.open("rb") as file:
            return _read_tensor(file, path, info)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object.

    Raises:
        CheckpointError: It cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"it is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise _damaged(path, "it is not a JSON object")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenFile:
    """What was written to one file."""

    sha256: str
    bytes: int


def copy_file(source: Path, target: Path) -> WrittenFile:
    """Copy one file's content, hashed on the way and flushed to the disk."""
    with source.open("rb") as reader, target.open("xb") as file:
        writer = _HashingWriter(file)
        while chunk := reader.read(_CHUNK_BYTES):
            writer.write(chunk)
        return writer.finish()


def rewrite_shard(
    shard: Shard,
    *,
    source: Path,
    target: Path,
    edits: Mapping[str, Callable[[Tensor], Tensor]],
    advance: Advance,
) -> WrittenFile:
    """Copy a shard byte for byte, except for the tensors that `edits` names.

    The header is written as it was read, so names, order, dtypes, offsets and metadata stay; an edit must
    give back the shape and dtype it was given. Memory: one edited tensor and its arithmetic.

    Args:
        shard: The shard, as `open_checkpoint` read it.
        source: Directory to read from.
        target: Directory to write to; the file must not be there.
        edits: Tensor name -> function from the stored tensor to the new one.
        advance: Told the bytes written.

    Raises:
        CheckpointError: The source changed since its header was read.
    """
    path = source / shard.file_name
    with path.open("rb") as reader, (target / shard.file_name).open("xb") as file:
        writer = _HashingWriter(file)
        if reader.read(len(shard.header_bytes)) != shard.header_bytes:
            raise _damaged(path, "it was changed while it was being read")
        writer.write(shard.header_bytes)
        for info in shard.tensors:
            edit = edits.get(info.name)
            if edit is None:
                _copy_bytes(reader, writer, path, info.end - info.start, advance)
                continue
            old = _read_tensor(reader, path, info)
            new = edit(old)
            if new.shape != old.shape or new.dtype != old.dtype:
                raise CheckpointError(f"{path}: the edit of {info.name} changed its shape or dtype")
            writer.write(new.contiguous().flatten().view(torch.uint8).numpy().data)
            advance(info.end - info.start)
        return writer.finish()


class _HashingWriter:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._bytes += len(data)

    def finish(self) -> WrittenFile:
        self._file.flush()
        os.fsync(self._file.fileno())
        return WrittenFile(sha256=self._hash.hexdigest(), bytes=self._bytes)


def _copy_bytes(reader: BinaryIO, writer: _HashingWriter, path: Path, count: int, advance: Advance) -> None:
    while count:
        chunk = reader.read(min(count, _CHUNK_BYTES))
        if not chunk:
            raise _damaged(path, "it became shorter while it was being read")
        writer.write(chunk)
        advance(len(chunk))
        count -= len(chunk)


def _read_tensor(reader: BinaryIO, path: Path, info: TensorInfo) -> Tensor:
    data = bytearray(info.end - info.start)
    reader.seek(info.start)
    if reader.readinto(data) != len(data):  # type: ignore[attr-defined]
        raise _damaged(path, "it became shorter while it was being read")
    dtype = TORCH_DTYPES[info.dtype]
    if not data:
        return torch.empty(info.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(info.shape)


def _shard_names(path: Path) -> tuple[list[str], dict[str, Any] | None]:
    has_index = (path / INDEX_NAME).is_file()
    if not has_index and (path / SINGLE_NAME).is_file():
        return [SINGLE_NAME], None
    if not has_index:
        raise CheckpointError(_no_weights_message(path))
    index = read_json_object(path / INDEX_NAME)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _damaged(path / INDEX_NAME, "it has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or name in {"", ".", ".."} or set(name) & set("/\\\0"):
            raise CheckpointError(
                f"{path / INDEX_NAME}: names the shard {name!r}, which is not a file of this directory; "
                "do not trust this checkpoint"
            )
    names = sorted(set(weight_map.values()))
    for name in names:
        if not (path / name).is_file():
            raise CheckpointError(
                f"{path / INDEX_NAME}: names the shard {name}, which is not there; download the checkpoint again"
            )
    if SINGLE_NAME not in names and (path / SINGLE_NAME).is_file():
        raise CheckpointError(
            f"{path}: holds both {SINGLE_NAME} and {INDEX_NAME} with other shards, and programs differ in "
            "which they load; remove the one that is not meant"
        )
    return names, index


def _no_weights_message(path: Path) -> str:
    if (path / "adapter_config.json").is_file():
        return (
            f"{path}: holds an adapter and no model weights; merge it first (peft's `merge_and_unload`, then "
            "`save_pretrained`)"
        )
    if any(path.glob("pytorch_model*.bin")):
        return (
            f"{path}: has pytorch_model.bin only, and pickled weights are not read; convert them with "
            'python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{path}', dtype='auto').save_pretrained('{path}-safetensors')\""
        )
    return (
        f"{path}: neither {SINGLE_NAME} nor {INDEX_NAME} is there; give a directory with safetensors "
        "weights, as `save_pretrained` writes them"
    )


def _check_tensor_names(path: Path, shards: tuple[Shard, ...], index: dict[str, Any] | None) -> None:
    found: dict[str, str] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.name in found:
                raise CheckpointError(
                    f"{path}: tensor {tensor.name} is in {found[tensor.name]} and in {shard.file_name}; "
                    "download the checkpoint again"
                )
            found[tensor.name] = shard.file_name
    if index is None:
        return
    weight_map = index["weight_map"]
    for name in sorted(weight_map.keys() | found.keys()):
        if weight_map.get(name) != found.get(name):
            raise CheckpointError(
                f"{path / INDEX_NAME}: says that tensor {name} is in {weight_map.get(name, 'no shard')}, "
                f"but it is in {found.get(name, 'no shard')}; download the checkpoint again"
            )


def _regular_files(path: Path) -> Iterator[str]:
    # Files are followed through symbolic links (a Hub cache snapshot is made of them), directories are not.
    for directory, subdirectories, files in os.walk(path):
        subdirectories[:] = sorted(set(subdirectories) - _SKIPPED_DIRECTORIES)
        for name in files:
            file = Path(directory) / name
            if file.is_file():
                yield file.relative_to(path).as_posix()


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(pairs) != len({name for name, _ in pairs}):
            raise ValueError("a name occurs twice")
        return dict(pairs)

    try:
        header = json.loads(text, object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    return header


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict):
        raise _damaged(path, f"the header's entry of {name} is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise _damaged(path, f"tensor {name} has the unknown dtype {dtype!r}")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise _damaged(path, f"tensor {name} has a malformed shape or data_offsets")
    if (offsets[1] - offsets[0]) * 8 != math.prod(shape) * _DTYPE_BITS[dtype]:
        raise _damaged(path, f"tensor {name} ({dtype} {shape}) does not fill its {offsets[1] - offsets[0]} bytes")
    start, end = offsets
    return TensorInfo(
        name=name,
        shard=path.name,
        dtype=dtype,
        shape=tuple(shape),
        start=data_start + start,
        end=data_start + end,
    )


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path}: {reason}; the file is damaged or incomplete, download it again")
