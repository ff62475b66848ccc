"""Checkpoints broken at random: bytes and structure of headers, index and config, and what stands in a file's place.

Every choice comes from the `random.Random` that is given, so that a seed, or hypothesis, can make it again. Links are
made to a harmless directory beside the checkpoint only.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from safetensors.torch import load_file, save_file

from tests.support.quantized_models import save_quantized_llama
from tests.support.tiny_models import save_tiny_model

INDEX = "model.safetensors.index.json"
HARMLESS = "harmless"

_NUMBERS = [0, 1, -1, 2, 3, 8, 31, 32, 33, 61, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**12, 10**30, 0.5, 1e30]
_TEXTS = [
    "", ".", "..", "../../x", "../harmless/file.safetensors", "/etc/passwd", "x\0y", "\x1b[31m", "a\nb", "\u202e",
    "n" * 300, "llama", "gpt2", "gemma2", "mixtral", "llava", "new_type", "F16", "F32", "F64", "I32", "F4", "F8_E4M3",
    "pt", "gptq", "model.safetensors", "model.layers.0.mlp.down_proj.weight", "model.layers.99.mlp.down_proj.weight",
    "model.layers.0.mlp.down_proj.bias", "lm_head.weight", "model.norm.weight", "silu", "1", "true",
]  # fmt: skip
_KEYS = [
    "hidden_size", "num_hidden_layers", "model_type", "tie_word_embeddings", "text_config", "quantization_config",
    "num_local_experts", "mlp_bias", "attention_bias", "layer_types", "auto_map", "weight_map", "metadata",
    "__metadata__", "dtype", "shape", "data_offsets", "total_size", "residual_multiplier",
    "quant_method", "format", "bits", "group_size", "config_groups", "weights", "num_bits", "strategy",
]  # fmt: skip


def make_bases(directory: Path) -> list[Path]:
    """Save the sound checkpoints that are broken later, of several layouts and architectures."""
    bases = [
        save_tiny_model(directory / "llama", max_shard_size="30KB"),
        save_tiny_model(directory / "tied", tied=True, mlp_bias=True, num_hidden_layers=2),
        save_tiny_model(directory / "gpt2", "gpt2", tied=True),
        save_tiny_model(directory / "gemma2", "gemma2", tied=True, max_shard_size="40KB"),
        save_tiny_model(directory / "mixtral", "mixtral", num_local_experts=2, num_hidden_layers=2),
    ]
    return [*bases, _make_wrapper(directory / "wrapper", bases[1])]


def make_quantized_bases(directory: Path) -> list[Path]:
    """Save sound checkpoints in quantised layouts that 32 columns can have."""
    kinds = ("int4 groups", "int4 groups with zeros", "int8 rows", "gptq", "awq", "nvfp4", "modelopt nvfp4",
             "packed mxfp4", "fp4 in bytes", "modelopt fp8", "mxfp8", "per tensor", "compressed",
             "int4 rows")  # fmt: skip
    return [save_quantized_llama(directory / kind, kind, hidden_size=32) for kind in kinds]


def _make_wrapper(directory: Path, text_model: Path) -> Path:
    directory.mkdir()
    text_config = json.loads((text_model / "config.json").read_text())
    config = {"model_type": "llava", "tie_word_embeddings": True, "text_config": text_config}
    (directory / "config.json").write_text(json.dumps(config))
    tensors = load_file(text_model / "model.safetensors")
    renamed = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def make_harmless(beside: Path) -> None:
    """Make the directory that planted links lead to."""
    (beside / HARMLESS).mkdir()
    save_file({}, beside / HARMLESS / "file.safetensors")
    (beside / HARMLESS / "config.json").write_text("{}")


def break_checkpoint(directory: Path, random: Random) -> list[str]:
    """Break a checkpoint in one to three ways, and return their names."""
    ways: list[Callable[[Path, Random], object]] = [
        _header_bytes, _header_length, _header_structure, _header_structure, _file_size, _index, _config, _config,
        _config_bytes, _replace_file, _shards, _tensor, _tensor, _tensor, _tensor_bytes, _side_file,
    ]  # fmt: skip
    chosen = [random.choice(ways) for _ in range(random.choice((1, 1, 1, 2, 3)))]
    for way in chosen:
        way(directory, random)
    return [way.__name__.removeprefix("_") for way in chosen]


def break_safetensors(path: Path, random: Random) -> None:
    """Break a safetensors file that lies alone in its directory: header, sizes, names, shapes, types, values."""
    ways = (_header_bytes, _header_length, _header_structure, _header_structure, _tensor, _tensor, _tensor_bytes)
    random.choice((*ways, _file_size, _metadata, _metadata))(path.parent, random)


def _metadata(directory: Path, random: Random) -> None:
    """Break the JSON that is kept as a text in a header's metadata."""

    def broken(header: Any) -> bytes:
        key = random.choice(sorted(header["__metadata__"]))
        header["__metadata__"][key] = _break_json(json.loads(header["__metadata__"][key]), random).decode()
        return json.dumps(header).encode()

    _change_header(directory, random, broken)


def _change_header(directory: Path, random: Random, change: Callable[[Any], bytes]) -> None:
    """Give one shard another header; one that cannot be read, or changed so, is left as it is."""
    path = _pick_shard(directory, random)
    if path is None:
        return
    content, end = _with_end_of_header(path)
    try:
        text = change(json.loads(content[8:end]))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, IndexError):
        return
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[end:])


def break_file(path: Path, random: Random) -> None:
    """Break a file: its structure where it is JSON or lines of JSON, now and then its bytes, its length, all of it."""
    content = path.read_bytes()
    kind = random.randrange(10)
    if kind == 0:
        path.write_bytes(
            random.choice((b"", b"[]", b"{}", b"null", b"\xff\xfe", b"[" * 100_000, content[:-1], content * 2))
        )
    elif kind == 1:
        path.write_bytes(content[: random.randrange(len(content) + 1)])
    elif kind < 4:
        path.write_bytes(_break_bytes(content, random))
    elif path.suffix == ".json":
        _break_json_file(path, random)
    elif path.suffix == ".jsonl":
        lines = content.split(b"\n")
        which = random.randrange(len(lines))
        try:
            lines[which] = _break_json(json.loads(lines[which]), random)
        except (ValueError, RecursionError):
            lines[which] = _break_bytes(lines[which], random)
        path.write_bytes(b"\n".join(lines))
    else:
        path.write_bytes(_break_bytes(content, random))


def _pick_shard(directory: Path, random: Random) -> Path | None:
    shards = [path for path in sorted(directory.glob("*.safetensors")) if path.is_file() and not path.is_symlink()]
    return random.choice(shards) if shards else None


def _header_bytes(directory: Path, random: Random) -> None:
    if path := _pick_shard(directory, random):
        content, end = _with_end_of_header(path)
        path.write_bytes(_break_bytes(content[:end], random) + content[end:])


def _with_end_of_header(path: Path) -> tuple[bytes, int]:
    """A shard's bytes, and where its header ends, by its own account but within the file."""
    content = path.read_bytes()
    return content, min(len(content), 8 + int.from_bytes(content[:8], "little"))


def _header_length(directory: Path, random: Random) -> None:
    if path := _pick_shard(directory, random):
        content = path.read_bytes()
        length = random.choice([*(abs(int(n)) for n in _NUMBERS), len(content), random.randrange(2**16)])
        path.write_bytes(struct.pack("<Q", length % 2**64) + content[8:])


def _header_structure(directory: Path, random: Random) -> None:
    _change_header(directory, random, lambda header: _break_json(header, random))


def _tensor(directory: Path, random: Random) -> None:
    """Change a tensor's name, shape or dtype so that header, index and size still agree."""
    path = _pick_shard(directory, random)
    if path is None:
        return
    content, end = _with_end_of_header(path)
    try:
        header = json.loads(content[8:end])
        name = random.choice(sorted(header.keys() - {"__metadata__"}))
        entry = header.pop(name)
        shape = list(entry["shape"])
        if random.random() < 0.3:
            entry["shape"] = random.choice((shape[::-1], [*shape, 1], [1, *shape], [_product(shape)]))
        if random.random() < 0.3:
            entry["dtype"] = random.choice(("I32", "U32", "F32"))
        new = random.choice(
            (name, name, *_TEXTS, name.replace("0", "1"), name.replace("proj", "prod"), f"model.{name}")
        )
        header[new] = entry
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, IndexError):
        return
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[end:])
    index = directory / INDEX
    if _is_plain(index):
        old, changed = json.dumps(name).encode(), json.dumps(new).encode()
        index.write_bytes(index.read_bytes().replace(old + b":", changed + b":", 1))


def _side_file(directory: Path, random: Random) -> None:
    """Put a file or link of an odd name or content beside the weights."""
    names: list[bytes] = [
        b"README.md", b"abliteration.json", b"evaluation.json", b"\xff.txt", b"a\nb\x1b[31m.txt", b"n" * 255,
        b".hidden", b"model.safetensors.tmp", b"modeling.py", b"adapter_config.json", b"sub", b"config.json.partial",
        b".abliterate",
    ]  # fmt: skip
    path = os.path.join(os.fsencode(directory), random.choice(names))
    contents = (
        b"",
        b"{}",
        b"[" * 2000,
        b"---\nlicense: [\n---\n",
        b'---\nlicense: "\\e[1m"\n---\n',
        b"raise SystemExit",
    )
    if os.path.lexists(path):
        return
    kind = random.randrange(4)
    if kind == 0:
        os.symlink(random.choice((b"config.json", b"../" + HARMLESS.encode() + b"/config.json", b"/dev/null")), path)
    elif kind == 1:
        os.makedirs(os.path.join(path, b"deep", b"\xe9"))
        Path(os.fsdecode(path), "deep", "file.txt").write_text("x")
    else:
        Path(os.fsdecode(path)).write_bytes(random.choice(contents))


def _product(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _tensor_bytes(directory: Path, random: Random) -> None:
    """Write NaN, infinities or anything over the weights."""
    if path := _pick_shard(directory, random):
        content = bytearray(path.read_bytes())
        start = random.randrange(len(content) + 1)
        junk = random.choice((b"\xff" * 64, b"\0\0\x80\x7f" * 16, random.randbytes(64)))
        if start > 8 + int.from_bytes(content[:8], "little"):
            content[start : start + len(junk)] = junk[: len(content) - start]
            path.write_bytes(bytes(content))


def _file_size(directory: Path, random: Random) -> None:
    if path := _pick_shard(directory, random):
        content = path.read_bytes()
        path.write_bytes(random.choice((content[: random.randrange(len(content) + 1)], content + b"\0" * 8, b"")))


def _index(directory: Path, random: Random) -> None:
    path = directory / INDEX
    if not _is_plain(path):
        names = [shard.name for shard in directory.glob("*.safetensors")] or ["x.safetensors"]
        path.unlink(missing_ok=True) if not path.is_dir() else None
        if not path.exists():
            path.write_text(json.dumps({"weight_map": {"model.norm.weight": random.choice(names)}}))
        return
    if random.random() < 0.3:
        path.write_bytes(_break_bytes(path.read_bytes(), random))
    else:
        _break_json_file(path, random)


def _config(directory: Path, random: Random) -> None:
    if _is_plain(directory / "config.json"):
        _break_json_file(directory / "config.json", random)


def _config_bytes(directory: Path, random: Random) -> None:
    path = directory / "config.json"
    if _is_plain(path):
        path.write_bytes(_break_bytes(path.read_bytes(), random))


def _replace_file(directory: Path, random: Random) -> None:
    path = directory / random.choice(sorted(p.name for p in directory.iterdir()) or ["config.json"])
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    harmless = directory.parent / HARMLESS
    make: list[Callable[[], object]] = [
        lambda: None,
        path.mkdir,
        lambda: os.mkfifo(path),
        lambda: path.symlink_to(path.name),
        lambda: path.symlink_to("nothing"),
        lambda: path.symlink_to(harmless / "file.safetensors"),
        lambda: path.symlink_to(f"../{HARMLESS}/config.json"),
        lambda: path.symlink_to(harmless),
        lambda: path.write_bytes(b""),
    ]
    random.choice(make)()


def _shards(directory: Path, random: Random) -> None:
    path = _pick_shard(directory, random)
    if path is None:
        return
    other = directory / random.choice(
        ("model.safetensors", "other.safetensors", "pytorch_model.bin", "sub.safetensors")
    )
    if not other.exists() and not other.is_symlink():
        random.choice((shutil.copyfile, os.rename))(path, other)
        return
    second = _pick_shard(directory, random)
    if second is not None and second != path:
        first_bytes, second_bytes = path.read_bytes(), second.read_bytes()
        path.write_bytes(second_bytes)
        second.write_bytes(first_bytes)


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _break_bytes(content: bytes, random: Random) -> bytes:
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 5))):
        position = random.randrange(len(data) + 1)
        kind = random.randrange(5)
        if kind == 0 and position < len(data):
            data[position] = random.randrange(256)
        elif kind == 1:
            del data[position : position + random.randrange(1, 20)]
        elif kind == 2:
            data[position:position] = random.choice(
                (b"\0", b"\xff", b"[" * 2000, b'"', b"{", b"}", b",", b"\x1b", b"\\ud800")
            )
        elif kind == 3:
            data[position:position] = data[position : position + random.randrange(1, 60)]
        elif position < len(data):
            data[position] ^= 1 << random.randrange(8)
    return bytes(data)


def _break_json_file(path: Path, random: Random) -> None:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return
    path.write_bytes(_break_json(value, random))


def _break_json(value: Any, random: Random) -> bytes:
    try:
        for _ in range(random.choice((1, 1, 1, 2, 4))):
            value = _break_value(value, random)
        text = json.dumps(value)
    except RecursionError:  # nested again and again
        text = '{"a": ' * 1500 + "1" + "}" * 1500
    if random.random() < 0.1:
        # A name that occurs twice.
        text = text.replace("{", '{"' + random.choice(_KEYS) + '": 1, "' + random.choice(_KEYS) + '": 2, ', 1)
    return text.encode()


def _break_value(value: Any, random: Random) -> Any:
    places = _places(value)
    if not places or random.random() < 0.02:
        return _any_value(value, random)
    parent, key = random.choice(places)
    kind = random.randrange(8)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[random.choice([*_KEYS, *_TEXTS])] = parent.pop(key)
    elif kind == 2:
        other, other_key = random.choice(places)
        parent[key] = json.loads(json.dumps(other[other_key])) if other_key in _indices(other) else None
    elif kind == 3 and isinstance(parent, dict):
        parent[random.choice([*_KEYS, *_TEXTS])] = _any_value(parent[key], random)
    else:
        parent[key] = _any_value(parent[key], random)
    return value


def _indices(parent: Any) -> Any:
    return parent.keys() if isinstance(parent, dict) else range(len(parent))


def _places(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, (dict, list)):
            found += [(item, key) for key in _indices(item)]
            pending += item.values() if isinstance(item, dict) else item
    return found


def _any_value(old: Any, random: Random) -> Any:
    kind = random.randrange(9)
    if kind == 0 and type(old) is int:
        return old + random.choice((-1, 1, 8, -old, old, -2 * old))
    if kind == 1 and isinstance(old, str):
        return old + random.choice(_TEXTS)
    nested: Any = old
    for _ in range(random.choice((1, 1, 3, 70, 400))):
        nested = [nested] if kind == 2 else {"a": nested}
    values = [None, True, False, [], {}, float("inf"), float("nan"), "\ud800", [1, 2], {"a": 1}]
    if kind in {2, 3}:
        return nested
    return random.choice([*_NUMBERS, *(-n for n in _NUMBERS), *_TEXTS, *values])
