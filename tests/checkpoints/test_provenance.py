"""What a result was made from: equal where nothing changed, another where anything did that counts."""

import hashlib
import platform
from pathlib import Path

import pytest
import torch

from abliterate.checkpoints.provenance import model_sha256, quick_model_sha256, values_sha256, versions


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 12_000)
    return tmp_path


def test_the_hash_of_values_is_that_of_their_sorted_json() -> None:
    assert values_sha256({"b": [1, None], "a": "é"}) == values_sha256({"a": "é", "b": (1, None)})
    assert values_sha256([1, 2]) == hashlib.sha256(b"[1, 2]").hexdigest()
    assert values_sha256({"b": 1, "a": "é"}) == hashlib.sha256(rb'{"a": "\u00e9", "b": 1}').hexdigest()
    assert values_sha256([1]) != values_sha256(["1"])


@pytest.mark.parametrize("fingerprint", [model_sha256, quick_model_sha256])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_change_of_a_model_changes_its_hash(model: Path, fingerprint, name: str) -> None:
    before = fingerprint(model)
    assert fingerprint(model) == before
    content = bytearray((model / name).read_bytes())
    content[-1] ^= 1
    (model / name).write_bytes(content)
    assert fingerprint(model) != before


def test_only_the_whole_hash_sees_the_middle_of_a_large_file_and_passes_over_what_is_written_about_it(
    model: Path,
) -> None:
    import os

    before = model_sha256(model), quick_model_sha256(model)
    weights = model / "model.safetensors"
    state = weights.stat()
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert quick_model_sha256(model) == before[1]
    assert model_sha256(model) != before[0]
    changed = model_sha256(model)
    (model / "evaluation.json").write_text("{}")
    (model / "README.md").write_text("x")
    assert model_sha256(model) == changed


def test_versions_stand_in_the_order_asked_for() -> None:
    found = versions("abliterate", "python", "torch", "transformers")
    assert list(found) == ["abliterate", "python", "torch", "transformers"]
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert type(found["torch"]) is str
