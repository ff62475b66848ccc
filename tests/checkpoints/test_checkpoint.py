import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from abliterate.checkpoints.checkpoint import open_checkpoint
from abliterate.checkpoints.stored_tensors import read_tensor
from abliterate.errors import CheckpointError
from tests.support.tiny_models import save_tiny_llama


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
    repository = tmp_path_factory.mktemp("hub") / "models--owner--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123"
    repository.mkdir()
    directory.rename(blobs)
    (snapshot / "sub").mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    (blobs / "x").write_text("x")
    (snapshot / "sub" / "x.txt").symlink_to("../../../blobs/x")
    checkpoint = open_checkpoint(snapshot)
    assert [tensor.name for tensor in checkpoint.tensors()] == ["a", "b"]
    assert "sub/x.txt" in checkpoint.side_files
    assert checkpoint.outside_links == ()


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
        (lambda d: write_index(d, {"a": "x.safetensors", "b": ["y.safetensors"]}), "names the shard"),
        (lambda d: write_index(d, {"a": "x.safetensors", "b": {}, "c": 1}), r"names the shard \{\}"),
        (lambda d: write_index(d, {"a": "x.safetensors", "b": 1, "c": True}), "names the shard 1,"),
        (lambda d: write_index(d, {"a": "two.safetensors", "b": "one.safetensors"}), "says that tensor a is in two"),
        (
            lambda d: write_index(d, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}),
            "names tensor c, which no shard has; the release is so",
        ),
        (
            lambda d: save_file({"b": torch.ones(1), "z": torch.ones(1)}, d / "two.safetensors"),
            "does not name tensor z, which a shard has; the release is so",
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
