"""A checkpoint as files: `config.json`, safetensors shards, and everything that lies beside them.

The layout is read from the shards' headers alone (see `safetensors_file`) and checked against the index.
"""

import re
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterate.checkpoints.safetensors_file import (
    Shard,
    TensorInfo,
    damaged_file,
    parse_object,
    read_shard,
    same_bytes,
)
from abliterate.errors import CheckpointError
from abliterate.files import MAX_BYTES, has_file, open_regular, parse_json, regular_files, shown, uncollected

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
GGUF_SUFFIX = ".gguf"

_SECOND_COPY = re.compile(r"consolidated[^/]*\.(safetensors|safetensors\.index\.json|pth)")

# The longest name that common file systems take.
_MAX_FILE_NAME = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint directory, from its headers alone.

    Attributes:
        path: The directory.
        config: The content of `config.json`.
        shards: The safetensors files, by name.
        index: The content of the shard index; None for a single file.
        side_files: Every other regular file below the directory, as relative POSIX paths, sorted.
        outside_links: Links to files outside the directory, which are not followed; likewise.
        second_copies: The same weights again under other names (Mistral's `consolidated.safetensors`); likewise. An
            edit does not reach them, and some engines prefer them.
    """

    path: Path
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    index: dict[str, Any] | None
    side_files: tuple[str, ...]
    outside_links: tuple[str, ...] = ()
    second_copies: tuple[str, ...] = ()

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

    def same_bytes(self, first: TensorInfo, second: TensorInfo) -> bool:
        """Return whether two of its tensors have the same dtype, shape and bytes."""
        return same_bytes(self.path, first, second)


def is_gguf(path: Path) -> bool:
    """Return whether a path is a file that calls itself GGUF, by its name or by its first bytes."""
    if not path.is_file():
        return False
    if path.suffix == GGUF_SUFFIX:
        return True
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def refuse_gguf(path: Path) -> None:
    """Do nothing, unless a path is a GGUF file.

    Raises:
        CheckpointError: It is; the message says how to convert it.
    """
    if is_gguf(path):
        raise CheckpointError(
            f"{path}: is a GGUF file, and here a safetensors checkpoint is read; convert it first: "
            f"{shlex.join(['abliterate', 'convert', str(path), path.stem or 'converted'])}"
        )


@uncollected()
def open_checkpoint(path: Path) -> Checkpoint:
    """Read and check a checkpoint's layout: config, index and shard headers, no weights.

    Raises:
        CheckpointError: Something is missing, inconsistent or unreadable; the message names the file.
    """
    path = Path(path)
    refuse_gguf(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such directory; give the one that holds config.json")
    if not has_file(path, CONFIG_NAME):
        raise CheckpointError(
            f"{path}: no {CONFIG_NAME}, so this is no model checkpoint; "
            "give the directory that `save_pretrained` wrote or the Hub id"
        )
    config = parse_config(_read_small(path / CONFIG_NAME), path=path / CONFIG_NAME)
    shard_names, index = choose_shards(
        path, has=lambda name: has_file(path, name), read=lambda name: _read_small(path / name)
    )
    shards = tuple(read_shard(path / name) for name in shard_names)
    check_tensor_names(path, shards, index)
    is_shard = set(shard_names).__contains__
    others = sorted(entry for entry in regular_files(path) if not is_shard(entry[0]))
    for name, is_inside in others:
        # What is copied is recorded, and no record has such a name; bytes that are not UTF-8 are no characters either.
        if is_inside and not name.isprintable():
            raise CheckpointError(
                f"{path}: the name of the file {shown(name)} has characters that cannot be shown; rename or remove it"
            )
    return Checkpoint(
        path=path,
        config=config,
        shards=shards,
        index=index,
        side_files=tuple(name for name, is_inside in others if is_inside and not _SECOND_COPY.fullmatch(name)),
        outside_links=tuple(name for name, is_inside in others if not is_inside),
        second_copies=tuple(name for name, is_inside in others if is_inside and _SECOND_COPY.fullmatch(name)),
    )


_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def refuse_adapter(path: Path, names: Collection[str]) -> None:
    """Raise if a LoRA adapter lies beside a model's weights: transformers loads both, and an edit would miss it.

    Args:
        path: The model's directory or its Hub id, for messages.
        names: The files in it.

    Raises:
        CheckpointError: One does.
    """
    weights = next((name for name in _ADAPTER_WEIGHTS if name in names), None)
    if weights is not None and _ADAPTER_CONFIG in names:
        raise CheckpointError(
            f"{path}: an adapter ({weights}) lies beside the model's weights and writes to the residual stream too, "
            "and transformers loads both; merge it first (load the base alone, peft's `PeftModel.from_pretrained`, "
            f"`merge_and_unload`, `save_pretrained`), or, if it is not meant, remove it and {_ADAPTER_CONFIG}"
        )


def refuse_pickles(path: Path, *, name: str) -> None:
    """Raise where a directory's weights, or those of an adapter beside them, are not safetensors: a pickle is code.

    Args:
        path: The directory.
        name: What to call it in messages.

    Raises:
        CheckpointError: They are pickled, or config.json or the index names another kind of file.
    """
    if not any(path.glob("*.safetensors")) and any(path.glob("pytorch_model*.bin")):
        raise CheckpointError(_no_weights_message(path))
    if (path / _ADAPTER_CONFIG).is_file() and (path / "adapter_model.bin").exists():
        raise CheckpointError(
            f"{name}: the adapter beside the model's weights is pickled (adapter_model.bin), and pickles are not read; "
            f"save it as safetensors with peft, or, if it is not meant, remove it and {_ADAPTER_CONFIG}"
        )
    named = {CONFIG_NAME: [_read_object(path / CONFIG_NAME).get("transformers_weights")]}
    shards = _read_object(path / INDEX_NAME).get("weight_map")
    named[INDEX_NAME] = list(shards.values()) if isinstance(shards, dict) else []
    for source, files in named.items():
        for file in files:
            if file is not None and not _is_weights_name(file):
                raise CheckpointError(
                    f"{name}: {source} names {shown(file)} as weights, which is not a safetensors file of this "
                    "directory; do not trust this checkpoint"
                )


def _is_weights_name(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.endswith((".safetensors", INDEX_NAME))


def _read_object(path: Path) -> dict[str, Any]:
    """Return a JSON object; an empty one where there is none, or it is broken, of which others tell."""
    try:
        with open_regular(path) as file:
            value = parse_json(file.read(), infinities=True)
    except (OSError, ValueError, CheckpointError):
        return {}
    return value if isinstance(value, dict) else {}


def is_of_mlx(path: Path) -> bool:
    """Return whether the weights in a directory say that MLX wrote them; names and axes may then be its own."""
    for file in sorted(path.glob("*.safetensors"))[:1]:
        try:
            return (read_shard(file).metadata or {}).get("format") == "mlx"
        except CheckpointError:
            return False
    return False


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object.

    Raises:
        CheckpointError: It cannot be read, or holds something else.
    """
    return parse_object(_read_small(path), path=path)


def parse_config(data: bytes, *, path: Path) -> dict[str, Any]:
    """Return the content of a config.json; `path` is for messages.

    Raises:
        CheckpointError: It is not a JSON object, or means different things to different programs.
    """
    # The default of an upper limit, among others of Mamba 2, is infinity; transformers 4 wrote it as such.
    return parse_object(data, path=path, infinities=True)


def parse_index(data: bytes, *, path: Path) -> dict[str, Any]:
    """Return the content of a shard index whose `weight_map` can be followed; `path` is for messages.

    Raises:
        CheckpointError: It is not JSON, has no `weight_map`, or that names what cannot be a shard beside it.
    """
    index = parse_object(data, path=path)
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged_file(path, "it has no weight_map")
    if metadata is not None and not isinstance(metadata, dict):
        raise damaged_file(path, f"its metadata is {shown(metadata)}, expected an object")
    for name in _different(weight_map.values()):
        if not _is_shard_name(name):
            raise CheckpointError(
                f"{path}: names the shard {shown(name)}, which is not a safetensors file of this directory; "
                "do not trust this checkpoint"
            )
    return index


def _different(values: Iterable[Any]) -> Iterable[Any]:
    """Return what differs among some values, in their order, of which there are far more; or all of them."""
    try:
        return dict.fromkeys(values)
    except TypeError:  # a list or an object, which has no hash
        return values


def _is_shard_name(name: Any) -> bool:
    return (
        isinstance(name, str)
        and name.isprintable()
        and name.endswith(".safetensors")
        and not name.startswith(".")
        and len(name.encode()) <= _MAX_FILE_NAME
        and not set(name) & set("/\\")
    )


def _read_small(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(data) > MAX_BYTES:
        raise damaged_file(path, f"it has more than {MAX_BYTES} bytes")
    return data


def with_changes(config: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a config in which each dotted path (`text_config.tie_word_embeddings`) has its new value.

    A value of None takes the key away.
    """
    changed = dict(config)
    for path, value in changes.items():
        section = changed
        *parents, key = path.split(".")
        for parent in parents:
            inner = section.get(parent)
            section[parent] = dict(inner) if isinstance(inner, dict) else {}
            section = section[parent]
        section[key] = value
        if value is None:
            del section[key]
    return changed


def choose_shards(
    path: Path, *, has: Callable[[str], bool], read: Callable[[str], bytes]
) -> tuple[list[str], dict[str, Any] | None]:
    """Return the names of a checkpoint's shards, sorted, and the index that lists them (None for a single file).

    Args:
        path: Where the checkpoint lies (or its Hub id), for messages.
        has: Whether it has a file of this name.
        read: Read a file of this name whole.

    Raises:
        CheckpointError: There are no safetensors weights, the index is damaged or names a shard that is not there,
            or a single file lies beside other shards.
    """
    has_single = has(SINGLE_NAME)
    if not has(INDEX_NAME):
        if not has_single:
            raise CheckpointError(_no_weights_message(path))
        return [SINGLE_NAME], None
    index = parse_index(read(INDEX_NAME), path=path / INDEX_NAME)
    names = sorted(set(index["weight_map"].values()))
    for name in names:
        if not has(name):
            raise CheckpointError(
                f"{path / INDEX_NAME}: names the shard {name}, which is not there; download the checkpoint again"
            )
    if SINGLE_NAME not in names and has_single:
        raise CheckpointError(
            f"{path}: holds both {SINGLE_NAME} and {INDEX_NAME} with other shards, and programs differ in "
            "which they load; remove the one that is not meant"
        )
    return names, index


def _no_weights_message(path: Path) -> str:
    if (path / _ADAPTER_CONFIG).is_file():
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
    found = {tensor.name: shard.file_name for shard in shards for tensor in shard.tensors}
    if len(found) == sum(len(shard.tensors) for shard in shards) and (index is None or index["weight_map"] == found):
        return
    found = {}
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
    for name in sorted(weight_map.keys() & found.keys()):
        if weight_map[name] != found[name]:
            raise CheckpointError(
                f"{path / INDEX_NAME}: says that tensor {name} is in {weight_map[name]}, but it is in {found[name]}; "
                "index and shards are of different releases; download the checkpoint again"
            )
    _check_same_names(path / INDEX_NAME, set(weight_map), set(found))


def _check_same_names(index: Path, listed: Collection[str], found: Collection[str]) -> None:
    # No download is cut off like that: each shard has the length that its header says.
    for names, what in (
        (sorted(set(listed) - set(found)), "names {}, which no shard has"),
        (sorted(set(found) - set(listed)), "does not name {}, which a shard has"),
    ):
        if names:
            more = f" and {len(names) - 1} tensors more" if len(names) > 1 else ""
            raise CheckpointError(
                f"{index}: {what.format(f'tensor {names[0]}{more}')}; the release is so, and programs differ in what "
                "they make of it; load it with transformers and save it anew with `save_pretrained`, which writes an "
                "index that fits"
            )
