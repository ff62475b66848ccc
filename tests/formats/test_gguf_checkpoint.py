"""A GGUF file as a checkpoint: names, shapes and what is refused."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from abliterate.checkpoints.stored_tensors import read_tensor
from abliterate.errors import AbliterateError, CheckpointError
from abliterate.formats.gguf_checkpoint import (
    config_sha256,
    gguf_file_of,
    holds_gguf,
    holds_weights,
    open_gguf,
    open_weights,
)
from tests.support.gguf_models import Q8_0, tiny, write, write_gguf
from tests.support.tiny_models import make_tokenizer, save_tiny_llama


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2"])
def test_tensors_have_the_names_and_the_numbers_of_transformers(tmp_path, model_type):
    model = tiny(model_type)
    checkpoint = open_gguf(write(tmp_path, model))
    weights = {name: tensor for name, tensor in model.state_dict().items()
               if not (name == "lm_head.weight" and model.config.tie_word_embeddings)}  # fmt: skip
    found = {tensor.name: tensor for tensor in checkpoint.tensors()}
    assert found.keys() == weights.keys()
    assert checkpoint.config["model_type"] == model_type
    for name, tensor in found.items():
        assert tensor.shape == tuple(weights[name].shape)
        if ".self_attn.q_proj." in name or ".self_attn.k_proj." in name:
            continue  # of a llama rows are in another order, and nothing reads them here
        assert torch.allclose(read_tensor(checkpoint.path, tensor).float(), weights[name], atol=1e-6), name


def test_a_directory_is_that_of_a_gguf_file_where_no_config_lies_in_it(tmp_path):
    (tmp_path / "d").mkdir()
    file = write(tmp_path / "d", kind=Q8_0)
    (tmp_path / "d" / "README.md").write_text("a model")
    assert holds_gguf(file)
    assert holds_gguf(file.parent)
    assert holds_weights(file.parent)
    assert gguf_file_of(file.parent) == file
    whole = open_weights(file.parent)
    assert whole.side_files == ("README.md",)
    assert open_weights(file).side_files == ()
    assert whole.shards == open_weights(file).shards
    assert config_sha256(file) == hashlib.sha256(whole.shards[0].header_bytes).hexdigest()
    plain = save_tiny_llama(tmp_path / "plain")
    assert not holds_gguf(plain)
    assert config_sha256(plain) == hashlib.sha256((plain / "config.json").read_bytes()).hexdigest()
    assert not holds_weights(tmp_path)


def test_what_transformers_has_no_place_for_is_named(tmp_path):
    more = write(tmp_path, extra={"blk.0.attn_gate.weight": np.zeros((32, 32))})
    with pytest.raises(CheckpointError, match=r"holds blk\.0\.attn_gate\.weight, for which transformers has no place"):
        open_gguf(more)


def test_two_models_in_a_directory_are_told_apart_by_their_files(tmp_path):
    file = write(tmp_path)
    (tmp_path / "second.gguf").write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="holds 2 models in GGUF files; name the file of one of them"):
        open_gguf(tmp_path)
    assert open_gguf(file).shards[0].file_name == "model.gguf"


def test_an_architecture_that_is_not_known_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="a GGUF file of 'mamba' is not edited in place"):
        open_gguf(write(tmp_path, architecture="mamba"))


def test_a_part_that_is_missing_or_misnamed_is_named(tmp_path):
    def part(writer) -> None:
        writer.add_uint16("split.no", 1)
        writer.add_uint16("split.count", 2)

    first = write_gguf(tmp_path / "m-00001-of-00002.gguf", tiny(), make_tokenizer(), change=part)
    with pytest.raises(CheckpointError, match=r"m-00002-of-00002\.gguf, a part of the same model, is not there"):
        open_gguf(first)
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="says that it is part 2 of 2, and its name that it is 1 of 2"):
        open_gguf(first)
    first.unlink()
    with pytest.raises(CheckpointError, match="the first part of the model is not there"):
        open_gguf(tmp_path)


@pytest.mark.parametrize(("change", "said"), [
    (lambda data, at: data[:at] + b"\x20" + data[at + 1 :], "begins before"),
    (lambda data, at: data.replace(b"blk.0.attn_q.weight", b"blk.0.attn_k.weight"), "the same name"),
])  # fmt: skip
def test_tensors_that_share_bytes_or_names_are_damage(tmp_path: Path, change, said):
    file = write(tmp_path)
    data = file.read_bytes()
    # Behind its name a tensor has the number of its axes, their lengths, its type and its offset.
    at = data.index(b"blk.0.attn_k.weight") + len("blk.0.attn_k.weight") + 4 + 2 * 8 + 4
    file.write_bytes(
        change(data, at)[:at] + b"\x00" * 8 + data[at + 8 :] if said == "begins before" else change(data, at)
    )
    with pytest.raises(AbliterateError, match=said):
        open_gguf(file)


def test_a_norm_in_blocks_is_damage_and_no_traceback(tmp_path):
    # Read without its offset it would mean another norm.
    file = write(tmp_path, tiny("gemma2"))
    name = b"blk.0.post_ffw_norm.weight"
    data = file.read_bytes()
    # Behind the name: how many axes, the length of the one, and the type.
    at = data.index(name) + len(name) + 4 + 8
    assert data[at : at + 4] == bytes(4)
    file.write_bytes(data[:at] + bytes([8, 0, 0, 0]) + data[at + 4 :])
    with pytest.raises(AbliterateError, match=r"the norm blk\.0\.post_ffw_norm\.weight is stored as Q8_0"):
        open_gguf(file)
