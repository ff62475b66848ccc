import json
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterate.checkpoints.safetensors_file import read_shard
from abliterate.errors import CheckpointError
from tests.support.tiny_models import save_tiny_llama

TWO_FLOATS = b"\0" * 8


def write_shard(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("sharded") / "model", max_shard_size="30KB")


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{", b"", "not valid JSON"),
        (b"[]", b"", "not a JSON object"),
        (b"[" * 50_000, b"", "not valid JSON"),
        (b'{"a": \xff}', b"", "not valid JSON"),
        (b'{"a": {}, "a": {}}', b"", "the name 'a' occurs twice"),
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
