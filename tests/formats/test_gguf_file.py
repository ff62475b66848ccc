"""The header of a GGUF file, read from its bytes alone."""

import gguf
import pytest

from abliterate.errors import CheckpointError, ModelError
from abliterate.formats.gguf_config import read_gguf_config
from abliterate.formats.gguf_file import damaged_gguf, is_count, read_gguf
from tests.support.gguf_models import Q8_0, tiny, write


def test_tensors_are_those_that_the_package_reads(tmp_path):
    path = write(tmp_path, kind=Q8_0)
    header = read_gguf(path)
    read = gguf.GGUFReader(path).tensors
    assert [(t.name, t.shape, t.kind, t.offset) for t in header.tensors] == [
        (t.name, tuple(int(n) for n in reversed(t.shape)), int(t.tensor_type), int(t.data_offset)) for t in read
    ]


def test_the_config_is_that_of_the_model(tmp_path):
    model = tiny("qwen2", vocab_size=320)
    config = read_gguf_config(write(tmp_path, model), name="m")
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads", "tie_word_embeddings"):
        assert getattr(config, key) == getattr(model.config, key)


@pytest.mark.parametrize(
    ("value", "is_one"), [(0, True), (7, True), (8, False), (-1, False), (True, False), (1.0, False)]
)
def test_a_count_is_a_whole_number_within_its_limit(value, is_one):
    assert is_count(value, 7) == is_one


def test_damage_says_what_to_do(tmp_path):
    error = damaged_gguf(tmp_path / "m.gguf", "it is empty")
    assert isinstance(error, ModelError)
    assert str(error) == f"{tmp_path}/m.gguf: the GGUF file is damaged: it is empty; download it again"


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    (tmp_path / "m.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(CheckpointError, match="is a pointer of Git LFS"):
        read_gguf(tmp_path / "m.gguf")
