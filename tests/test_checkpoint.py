import json
import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from abliterate.checkpoint import copy_file, open_checkpoint, read_shard, read_tensor, rewrite_shard
from abliterate.errors import CheckpointError
from tiny_models import save_tiny_llama


def write_shard(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("sharded") / "model", max_shard_size="30KB")


@pytest.fixture
def directory(tmp_path) -> Path:
    """A small two-shard checkpoint that a test may damage."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    return tmp_path


def write_index(path: Path, weight_map: Any) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_the_layout_agrees_with_the_safetensors_library(sharded):
    checkpoint = open_checkpoint(sharded)
    assert len(checkpoint.shards) > 3
    assert checkpoint.config["model_type"] == "llama"
    weight_map = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    assert checkpoint.index is not None
    assert {tensor.name: tensor.shard for tensor in checkpoint.tensors()} == weight_map
    for shard in checkpoint.shards:
        content = (sharded / shard.file_name).read_bytes()
        assert content.startswith(shard.header_bytes)
        assert shard.size == len(content)
        with safe_open(str(sharded / shard.file_name), framework="pt") as file:
            assert shard.metadata == file.metadata()
            assert [tensor.name for tensor in shard.tensors] == list(file.offset_keys())
            for tensor in shard.tensors:
                expected = file.get_tensor(tensor.name)
                assert torch.equal(read_tensor(sharded, tensor), expected)
                assert content[tensor.start : tensor.end] == expected.numpy().tobytes()


def test_one_tensor_is_found_by_name(sharded):
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.tensor("model.norm.weight").shape == (32,)
    with pytest.raises(KeyError):
        checkpoint.tensor("model.norm")


def test_side_files_are_all_regular_files_but_shards_and_caches(directory):
    for name in ("README.md", "original/params.json", ".git/HEAD", "original/.cache/x", "code.py"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("x")
    (directory / "link.txt").symlink_to(directory / "README.md")
    (directory / "broken").symlink_to(directory / "nothing")
    os.mkfifo(directory / "pipe")
    assert open_checkpoint(directory).side_files == (
        "README.md",
        "code.py",
        "config.json",
        "link.txt",
        "model.safetensors.index.json",
        "original/params.json",
    )


def test_a_hub_cache_snapshot_of_symbolic_links_opens(directory, tmp_path_factory):
    snapshot = tmp_path_factory.mktemp("snapshot")
    for file in directory.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert [tensor.name for tensor in open_checkpoint(snapshot).tensors()] == ["a", "b"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "config.json: it is not valid JSON"),
        (lambda d: (d / "config.json").write_text("[]"), "config.json: it is not a JSON object"),
        (lambda d: (d / "config.json").write_text("[" * 100_000), "config.json: it is not valid JSON"),
        (lambda d: (d / "config.json").write_bytes(b"\xff\xfe{}"), "config.json: it is not valid JSON"),
        (lambda d: (d / "two.safetensors").unlink(), "names the shard two.safetensors, which is not there"),
        (lambda d: write_index(d, {"a": "one.safetensors"} | {"b": "../two.safetensors"}), "do not trust"),
        (lambda d: write_index(d, {"a": "one.safetensors"} | {"b": "/etc/passwd"}), "do not trust"),
        (lambda d: write_index(d, {"a": "one.safetensors"} | {"b": ".."}), "do not trust"),
        (lambda d: write_index(d, {"a": "one.safetensors"} | {"b": "x\0y"}), "do not trust"),
        (lambda d: write_index(d, {"a": "one.safetensors"} | {"b": 3}), "do not trust"),
        (lambda d: write_index(d, {}), "has no weight_map"),
        (lambda d: write_index(d, ["a"]), "has no weight_map"),
        (lambda d: write_index(d, {"a": "two.safetensors", "b": "one.safetensors"}), "says that tensor a is in two"),
        (
            lambda d: write_index(d, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}),
            "says that tensor c is in two.safetensors, but it is in no shard",
        ),
        (
            lambda d: save_file({"b": torch.ones(1), "z": torch.ones(1)}, d / "two.safetensors"),
            "says that tensor z is in no shard",
        ),
        (lambda d: save_file({"a": torch.ones(1)}, d / "two.safetensors"), "tensor a is in one.safetensors and in two"),
        (lambda d: save_file({"a": torch.ones(1)}, d / "model.safetensors"), "holds both model.safetensors and"),
    ],
)
def test_an_inconsistent_checkpoint_is_one_clear_line(directory, damage, message):
    open_checkpoint(directory)
    damage(directory)
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(directory)
    assert "\n" not in str(error.value)
    assert str(directory) in str(error.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "neither model.safetensors nor"),
        (["pytorch_model.bin"], "pickled weights are not read; convert them with python -c"),
        (["adapter_config.json", "adapter_model.safetensors"], "merge it first"),
    ],
)
def test_without_safetensors_weights_the_way_to_get_them_is_said(tmp_path, files, message):
    for name in ["config.json", *files]:
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        open_checkpoint(tmp_path / "nothing")


TWO_FLOATS = b"\0" * 8


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{", b"", "not valid JSON"),
        (b"[]", b"", "not a JSON object"),
        (b"[" * 50_000, b"", "not valid JSON"),
        (b'{"a": \xff}', b"", "not valid JSON"),
        (b'{"a": {}, "a": {}}', b"", "a name occurs twice"),
        ({"a": 3}, b"", "entry of a is not an object"),
        ({"a": entry("F33", [2], 0, 8)}, TWO_FLOATS, "unknown dtype 'F33'"),
        ({"a": entry("F32", [3], 0, 8)}, TWO_FLOATS, "does not fill its 8 bytes"),
        ({"a": entry("F32", [-2, -1], 0, 8)}, TWO_FLOATS, "malformed shape"),
        ({"a": entry("F32", [True, 2], 0, 8)}, TWO_FLOATS, "malformed shape"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, TWO_FLOATS, "malformed shape"),
        ({"a": {"dtype": "F32", "shape": [2]}}, TWO_FLOATS, "malformed shape"),
        ({"a": entry("F32", [2], 4, 12)}, TWO_FLOATS + b"\0" * 4, "tensor a starts at byte"),
        ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, b"\0" * 12, "tensor b starts at byte"),
        ({"a": entry("F32", [1], 8, 4)}, TWO_FLOATS, "does not fill its -4 bytes"),
        ({"a": entry("F32", [2], 0, 8)}, TWO_FLOATS[:-1], "the file has"),
        ({"a": entry("F32", [2], 0, 8)}, TWO_FLOATS + b"x", "the file has"),
        ({"__metadata__": {"format": 3}}, b"", "__metadata__ is not a map of strings"),
        ({"__metadata__": "pt"}, b"", "__metadata__ is not a map of strings"),
    ],
)
def test_a_damaged_header_is_one_clear_line(tmp_path, header, data, message):
    path = write_shard(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as error:
        read_shard(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("length", [10**11, 2**64 - 1, 3])
def test_a_wrong_header_length_is_refused_without_reading_it(tmp_path, length):
    path = write_shard(tmp_path / "x.safetensors", {"a": entry("F32", [2], 0, 8)}, TWO_FLOATS, length=length)
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        read_shard(path)


@pytest.mark.parametrize("content", [b"", b"\0" * 7])
def test_a_file_too_short_for_a_header(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        read_shard(tmp_path / "x.safetensors")


def test_sub_byte_and_empty_tensors_are_measured_in_bits(tmp_path):
    header = {"e": entry("F32", [0, 7], 0, 0), "q": entry("F4", [4], 0, 2), "s": entry("F32", [], 2, 6)}
    shard = read_shard(write_shard(tmp_path / "x.safetensors", header, b"\0" * 6))
    assert [(tensor.name, tensor.shape) for tensor in shard.tensors] == [("e", (0, 7)), ("q", (4,)), ("s", ())]


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=60), st.integers(0, 100), st.binary(max_size=20))
def test_arbitrary_bytes_raise_nothing_but_a_checkpoint_error(tmp_path_factory, inserted, position, tail):
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    write_shard(path, {"a": entry("F32", [2], 0, 8), "__metadata__": {"format": "pt"}}, TWO_FLOATS)
    content = path.read_bytes()
    path.write_bytes(content[:position] + inserted + content[position + len(inserted) :] + tail)
    with suppress(CheckpointError):
        assert read_shard(path).size == path.stat().st_size


def test_a_shard_is_rewritten_byte_for_byte_but_for_its_edits(sharded, tmp_path):
    shard = open_checkpoint(sharded).shards[1]
    edited = shard.tensors[1]
    seen = []
    result = rewrite_shard(
        shard, source=sharded, target=tmp_path, edits={edited.name: lambda tensor: tensor * 2}, advance=seen.append
    )
    old, new = (sharded / shard.file_name).read_bytes(), (tmp_path / shard.file_name).read_bytes()
    assert new[: edited.start] == old[: edited.start]
    assert new[edited.end :] == old[edited.end :]
    assert torch.equal(read_tensor(tmp_path, edited), read_tensor(sharded, edited) * 2)
    assert result.bytes == len(old)
    assert sum(seen) == len(old) - len(shard.header_bytes)


def test_an_edit_that_changes_dtype_is_refused(sharded, tmp_path):
    shard = open_checkpoint(sharded).shards[0]
    edits = {shard.tensors[0].name: lambda tensor: tensor.half()}
    with pytest.raises(CheckpointError, match="changed its shape or dtype"):
        rewrite_shard(shard, source=sharded, target=tmp_path, edits=edits, advance=lambda _: None)


@pytest.mark.parametrize("edit", [False, True])
def test_a_shard_that_shrinks_or_changes_while_it_is_read_is_refused(directory, tmp_path_factory, edit):
    shard = open_checkpoint(directory).shards[0]
    path = directory / shard.file_name
    content = path.read_bytes()
    edits = {"a": lambda tensor: tensor} if edit else {}
    path.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="became shorter"):
        rewrite_shard(shard, source=directory, target=tmp_path_factory.mktemp("t"), edits=edits, advance=lambda _: None)
    path.write_bytes(content.replace(b"F32", b"I32"))
    with pytest.raises(CheckpointError, match="changed while"):
        rewrite_shard(shard, source=directory, target=tmp_path_factory.mktemp("t"), edits=edits, advance=lambda _: None)


def test_a_file_is_copied_with_its_hash(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    result = copy_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"abc"
    assert result.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert result.bytes == 3
