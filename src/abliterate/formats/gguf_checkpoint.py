"""A GGUF file as a checkpoint: its tensors under the names that transformers gives them, and how each is stored.

Names and config are those of the class of transformers, by the package `gguf`'s map of names, so that all that is known
of a model type holds for its GGUF file, too. A tensor in blocks is seen through its encoding (`ggml_blocks`), and a
norm that GGUF stores with one added as transformers has it. Of a split model every part is a shard.

What llama.cpp's converter does to a writer of the residual stream, or to a norm behind one, is known for the
architectures in `_NORM_OFFSETS`; others are refused by name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.checkpoints.checkpoint import CONFIG_NAME, GGUF_SUFFIX, Checkpoint, is_gguf, open_checkpoint
from abliterate.checkpoints.encoding import Encoding, encoded_tensor
from abliterate.checkpoints.file_ranges import hash_file
from abliterate.checkpoints.safetensors_file import Shard, TensorInfo
from abliterate.errors import CheckpointError
from abliterate.files import printable, regular_files, shown
from abliterate.formats.gguf_config import FREQUENCIES, config_of, loads_as_a_model, names_of_class
from abliterate.formats.gguf_file import GgufFile, GgufTensor, damaged_gguf, read_gguf

if TYPE_CHECKING:
    from torch import Tensor

# Architecture, as GGUF calls it -> what its norms are stored with in addition.
_NORM_OFFSETS = {
    "llama": 0.0, "qwen2": 0.0, "qwen3": 0.0, "qwen3moe": 0.0, "phi3": 0.0, "stablelm": 0.0,
    "starcoder2": 0.0, "falcon": 0.0, "lfm2": 0.0, "nemotron": 1.0, "gemma2": 1.0, "gemma3": 1.0,
}  # fmt: skip
_PLAIN = {0: "F32", 1: "F16", 30: "BF16"}
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
# Embeddings: a row is a vector of the stream.
_TOKEN_ROWS = {"token_embd.weight", "position_embd.weight"}
# Of experts that transformers keeps in one tensor, GGUF has two.
_HALVES = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj"}


def holds_gguf(path: Path) -> bool:
    """Return whether a path is a GGUF file, or a directory whose weights are in GGUF files."""
    if path.is_dir():
        return not (path / CONFIG_NAME).is_file() and any(path.glob(f"*{GGUF_SUFFIX}"))
    return is_gguf(path)


def holds_weights(path: Path) -> bool:
    """Return whether a path is a model's directory or its GGUF file."""
    return (path / CONFIG_NAME).is_file() or holds_gguf(path)


def open_weights(path: Path) -> Checkpoint:
    """Read and check the layout of a model's weights: of a checkpoint, a GGUF file, or a directory with one.

    Raises:
        CheckpointError: Something is missing, inconsistent or unreadable; the message names the file.
        ModelError: A GGUF file is damaged, or of an architecture that is not read.
        MissingDependencyError: It is a GGUF file, and the package `gguf` is not installed.
    """
    return open_gguf(path) if holds_gguf(path) else open_checkpoint(path)


def config_sha256(path: Path) -> str:
    """Return a hash of what says which model lies at a path: config.json, or the header of its GGUF file."""
    if not holds_gguf(path):
        return hash_file(path / CONFIG_NAME)
    header = read_gguf(_model_files(path)[0], may_be_a_part=True)
    return hashlib.sha256(_header_bytes(header)).hexdigest()


def gguf_file_of(path: Path) -> Path:
    """Return the GGUF file in a directory that a model is loaded from; of a split model its first part.

    Raises:
        CheckpointError: There are several models in it, or parts of one are missing.
    """
    return _model_files(path)[0]


def open_gguf(path: Path) -> Checkpoint:
    """Read the layout of a model in a GGUF file, or in a directory that holds one, whole or in parts.

    Raises:
        CheckpointError: There are several models in it, parts are missing, or it has tensors that cannot be accounted
            for.
        ModelError: A file is damaged, or of an architecture that is not read.
        MissingDependencyError: The package `gguf` is not installed.
    """
    files = _model_files(path)
    headers = [read_gguf(file, may_be_a_part=True) for file in files]
    _check_parts(headers)
    first = headers[0]
    if first.architecture not in _NORM_OFFSETS:
        raise CheckpointError(
            f"{first.path}: a GGUF file of {shown(first.architecture)} is not edited in place, but those of "
            f"{', '.join(sorted(_NORM_OFFSETS))} are; edit the original checkpoint and convert what comes out"
        )
    tensors = tuple(tensor for header in headers for tensor in header.tensors)
    config = config_of(first, tensors, name=str(first.path))
    names = _names(first, tensors, config)
    shards = tuple(_shard(header, names, first.architecture) for header in headers)
    listed = [tensor.name for shard in shards for tensor in shard.tensors]
    if len(set(listed)) < len(listed):
        twice = next(name for name in listed if listed.count(name) > 1)
        raise damaged_gguf(first.path, f"the tensor {printable(twice)} is in it twice")
    others = sorted(regular_files(path)) if path.is_dir() else []
    shard_names = {file.name for file in files}
    return Checkpoint(
        path=files[0].parent,
        config=config.to_dict(),
        shards=shards,
        index=None,
        side_files=tuple(name for name, is_inside in others if is_inside and name not in shard_names),
        outside_links=tuple(name for name, is_inside in others if not is_inside),
    )


def _model_files(path: Path) -> list[Path]:
    """Return the file of a model, or all parts of it in order."""
    if path.is_dir():
        found = sorted(path.glob(f"*{GGUF_SUFFIX}"))
        firsts = [file for file in found if not (part := _PART.fullmatch(file.name)) or int(part["number"]) == 1]
        if len(firsts) != 1:
            raise CheckpointError(
                f"{path}: holds {len(firsts)} models in GGUF files; name the file of one of them"
                if firsts
                else f"{path}: the first part of the model is not there; download it"
            )
        path = firsts[0]
    part = _PART.fullmatch(path.name)
    if part is None:
        return [path]
    count = int(part["count"])
    files = [path.with_name(f"{part['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{path}: {missing[0]}, a part of the same model, is not there; download it")
    return files


def _check_parts(headers: Sequence[GgufFile]) -> None:
    for number, header in enumerate(headers):
        said = header.metadata.get("split.count", 1), header.metadata.get("split.no", 0)
        if said != (len(headers), number) and (len(headers) > 1 or said[0] > 1):
            raise CheckpointError(
                f"{header.path}: says that it is part {said[1] + 1} of {said[0]}, and its name that it is "
                f"{number + 1} of {len(headers)}; give it the name that it had"
            )


def _header_bytes(header: GgufFile) -> bytes:
    try:
        with header.path.open("rb") as file:
            return file.read(header.start)
    except OSError as error:
        raise CheckpointError(f"{header.path}: cannot be read: {error.strerror or error}") from error


def _shard(header: GgufFile, names: dict[str, str], architecture: str) -> Shard:
    ordered = sorted(header.tensors, key=lambda tensor: tensor.offset)
    tensors = tuple(_tensor_info(header, tensor, names[tensor.name], architecture) for tensor in ordered)
    end = tensors[-1].end if tensors else header.start
    return Shard(
        file_name=header.path.name,
        header_bytes=_header_bytes(header),
        metadata=None,
        tensors=tensors,
        padding=header.size - end,
    )


def _tensor_info(header: GgufFile, tensor: GgufTensor, name: str, architecture: str) -> TensorInfo:
    import gguf

    from abliterate.formats.ggml_blocks import BLOCK_TYPES, GgmlEncoding

    n_entries, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.kind)]
    plain = TensorInfo(
        name=name,
        shard=header.path.name,
        dtype=_PLAIN.get(tensor.kind, "U8"),
        shape=tensor.shape,
        start=tensor.offset,
        end=tensor.offset + prod(tensor.shape) // n_entries * n_bytes,
    )
    offset = _NORM_OFFSETS[architecture]
    if offset and name.endswith("norm.weight"):
        if tensor.kind not in _PLAIN:
            raise damaged_gguf(header.path, f"the norm {printable(tensor.name)} is stored as {_type_name(tensor.kind)}")
        return encoded_tensor(OffsetEncoding(codes=plain, companions=(), offset=offset), name=name, shape=tensor.shape)
    if tensor.kind in _PLAIN:
        return plain
    kind = BLOCK_TYPES.get(tensor.kind)
    *rows, width = tensor.shape
    if kind is None:
        # What is only copied or looked at may be stored in any way.
        codes = replace(plain, shape=(*rows, width // n_entries * n_bytes))
        encoding: Encoding = UneditedEncoding(codes=codes, companions=(), kind=tensor.kind)
    else:
        codes = replace(plain, shape=(*rows, width // n_entries, n_bytes))
        encoding = GgmlEncoding(codes=codes, companions=(), kind=kind, turned=tensor.name in _TOKEN_ROWS)
    return encoded_tensor(encoding, name=name, shape=tensor.shape)


def _type_name(kind: int) -> str:
    import gguf

    return str(gguf.GGMLQuantizationType(kind).name)


def _names(header: GgufFile, tensors: Sequence[GgufTensor], config: Any) -> dict[str, str]:
    """Return the name of each tensor in transformers, or in GGUF where transformers has none and needs none."""
    n_blocks = int(config.get_text_config(decoder=True).num_hidden_layers)
    with loads_as_a_model(str(header.path)):
        found = names_of_class(header.architecture, config.to_json_string(use_diff=False), n_blocks)
    names = {}
    for tensor in tensors:
        name = found.get(tensor.name)
        if name is None:
            name = _name_beside(tensor.name, found)
        if name is None:
            raise CheckpointError(
                f"{header.path}: holds {printable(tensor.name)}, for which transformers has no place in a "
                f"{config.model_type}, so it is not known whether it writes to the residual stream; edit the original "
                "checkpoint and convert what comes out"
            )
        names[tensor.name] = name
    return names


def _name_beside(name: str, found: dict[str, str]) -> str | None:
    if name == FREQUENCIES or name.startswith("rope_factors_"):
        return name
    for leaf, half in _HALVES.items():
        if f".{leaf}." in name:
            down = found.get(name.replace(leaf, "ffn_down_exps"))
            return None if down is None else down.replace("down_proj", half)
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class OffsetEncoding(Encoding):
    """See `Encoding`: plain numbers, stored with a constant added, as the norms of Gemma are."""

    offset: float

    def decode(self, codes: Tensor, companions: Sequence[Tensor]) -> Tensor:  # noqa: ARG002
        """See `Encoding.decode`."""
        return codes.float() - self.offset


@dataclass(frozen=True, slots=True, kw_only=True)
class UneditedEncoding(Encoding):
    """See `Encoding`: blocks of a type that is not edited.

    Attributes:
        kind: Its number in a GGUF file.
    """

    kind: int

    @property
    def stored_dtype(self) -> str:
        """See `Encoding.stored_dtype`."""
        return _type_name(self.kind)

    def decode(self, codes: Tensor, companions: Sequence[Tensor]) -> Tensor:  # noqa: ARG002
        """See `Encoding.decode`; as the package gguf does."""
        import gguf
        import torch

        return torch.from_numpy(gguf.dequantize(codes.numpy(), gguf.GGMLQuantizationType(self.kind)))
