"""The tensors of a safetensors file as torch has them: one at a time, decoded where stored in few bits."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

from abliterate.checkpoints.file_ranges import became_shorter
from abliterate.checkpoints.safetensors_file import TensorInfo
from abliterate.errors import CheckpointError

if TYPE_CHECKING:
    from abliterate.checkpoints.encoding import Encoding

# What else an encoding may read; by name, because a torch that lacks one must still do the rest.
_CODE_DTYPES = {
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
}  # fmt: skip
TORCH_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def read_tensor(directory: Path, info: TensorInfo) -> Tensor:
    """Read one floating-point tensor from its shard in `directory`; one with an encoding is decoded to float32.

    Raises:
        CheckpointError: The file cannot be read or has become shorter, or what is stored cannot be decoded.
    """
    if info.encoding is not None:
        codes, companions = read_codes(directory, info.encoding)
        try:
            numbers = info.encoding.decode(codes, companions)
        except ValueError as error:
            raise CheckpointError(f"{directory / info.shard}: tensor {info.encoding.codes.name}: {error}") from error
        return numbers.transpose(-1, -2) if info.encoding.turned else numbers
    path = directory / info.shard
    try:
        with path.open("rb") as file:
            return _read_tensor(file, path, info)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_codes(directory: Path, encoding: "Encoding") -> tuple[Tensor, list[Tensor]]:
    """Read codes and their companions as they are stored.

    Raises:
        CheckpointError: A file cannot be read or has become shorter.
    """
    codes, *companions = (read_tensor(directory, each) for each in encoding.stored)
    return codes, companions


def read_rows(directory: Path, info: TensorInfo, rows: Sequence[int]) -> Tensor:
    """Read some rows (along the first axis) of one floating-point tensor, in the order given, and no others.

    Raises:
        CheckpointError: The file cannot be read or has become shorter.
    """
    size = (info.end - info.start) // info.shape[0]
    row = replace(info, shape=info.shape[1:])
    path = directory / info.shard
    try:
        with path.open("rb") as file:
            places = ((info.start + index * size) for index in rows)
            parts = [_read_tensor(file, path, replace(row, start=start, end=start + size)) for start in places]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    return torch.stack(parts)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes as a file stores them."""
    data: memoryview = tensor.contiguous().flatten().view(torch.uint8).numpy().data
    return data


def _read_tensor(reader: BinaryIO, path: Path, info: TensorInfo) -> Tensor:
    data = bytearray(info.end - info.start)
    reader.seek(info.start)
    if reader.readinto(data) != len(data):  # type: ignore[attr-defined]
        raise became_shorter(path)
    dtype = TORCH_DTYPES.get(info.dtype) or getattr(torch, _CODE_DTYPES[info.dtype])
    if not data:
        return torch.empty(info.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(info.shape)
