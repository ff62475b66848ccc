"""A checkpoint as files: `config.json`, safetensors shards, and everything that lies beside them.

The layout is read from the shards' headers alone (see `safetensors_file`) and checked against the index.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterate.errors import CheckpointError
from abliterate.safetensors_file import Shard, TensorInfo, damaged_file, read_shard

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_SKIPPED_DIRECTORIES = {".git", ".cache"}


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
    check_tensor_names(path, shards, index)
    return Checkpoint(
        path=path,
        config=config,
        shards=shards,
        index=index,
        side_files=tuple(sorted(set(_regular_files(path)) - set(shard_names))),
    )


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
        raise damaged_file(path, f"it is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise damaged_file(path, "it is not a JSON object")
    return value


def with_changes(config: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a config in which each dotted path (`text_config.tie_word_embeddings`) has its new value."""
    changed = dict(config)
    for path, value in changes.items():
        section = changed
        *parents, key = path.split(".")
        for parent in parents:
            section[parent] = dict(section.get(parent) or {})
            section = section[parent]
        section[key] = value
    return changed


def _shard_names(path: Path) -> tuple[list[str], dict[str, Any] | None]:
    has_index = (path / INDEX_NAME).is_file()
    if not has_index and (path / SINGLE_NAME).is_file():
        return [SINGLE_NAME], None
    if not has_index:
        raise CheckpointError(_no_weights_message(path))
    index = read_json_object(path / INDEX_NAME)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged_file(path / INDEX_NAME, "it has no weight_map")
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


def check_tensor_names(path: Path, shards: tuple[Shard, ...], index: dict[str, Any] | None) -> None:
    """Check that each tensor is in one shard, and in the one that the index names.

    Raises:
        CheckpointError: It is not.
    """
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
