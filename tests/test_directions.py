import hashlib
import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from abliterate.directions import (
    Direction,
    decode_rows,
    encode_rows,
    load_direction,
    make_direction,
    orthonormal_basis,
    orthonormalize,
)
from abliterate.errors import DirectionError


def full_direction() -> Direction:
    generator = torch.Generator().manual_seed(0)
    candidates = torch.randn(2, 3, 8, generator=generator, dtype=torch.float64)
    return make_direction(
        mean_difference=candidates[1, 2] * 9,
        candidates=candidates,
        scores={
            "bypass": torch.randn(2, 3, generator=generator, dtype=torch.float64),
            "induce": torch.randn(2, 3, generator=generator, dtype=torch.float64),
            "kl": torch.tensor([[float("nan"), 0.1, 0.2], [0.3, 0.4, 0.5]], dtype=torch.float64),
        },
        metadata={"model": "some/model", "position": -1, "layer": 2, "thresholds": {"kl": float("inf")}},
    )


def test_make_direction_normalises_and_keeps_the_dose():
    difference = torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64)
    direction = make_direction(mean_difference=difference)
    assert torch.equal(direction.vector, torch.tensor([0.6, 0.0, 0.8]))
    assert torch.equal(direction.mean_difference, difference.float())
    assert direction.vector.dtype == direction.mean_difference.dtype == torch.float32
    assert direction.d_model == 3
    assert direction.candidates is None
    assert direction.scores == {}


def test_a_saved_direction_comes_back_whole(tmp_path):
    direction = full_direction()
    path = tmp_path / "new" / "refusal.safetensors"
    direction.save(path)
    loaded = load_direction(path, d_model=8)
    assert torch.equal(loaded.vector, direction.vector)
    assert torch.equal(loaded.mean_difference, direction.mean_difference)
    assert torch.equal(loaded.candidates, direction.candidates)
    assert loaded.scores.keys() == {"bypass", "induce", "kl"}
    for name, score in direction.scores.items():
        assert loaded.scores[name].dtype == torch.float64
        torch.testing.assert_close(loaded.scores[name], score, rtol=0, atol=0, equal_nan=True)
    assert loaded.metadata == direction.metadata
    assert loaded.sha256 == direction.sha256


def test_the_file_has_the_documented_tensors_and_strict_json(tmp_path):
    path = tmp_path / "refusal.safetensors"
    full_direction().save(path)
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    metadata = header.pop("__metadata__")
    assert {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()} == {
        "direction": ("F32", [8]),
        "mean_difference": ("F32", [8]),
        "candidates": ("F32", [2, 3, 8]),
        "scores.bypass": ("F64", [2, 3]),
        "scores.induce": ("F64", [2, 3]),
        "scores.kl": ("F64", [2, 3]),
    }
    assert metadata.keys() == {"abliterate"}
    assert json.loads(metadata["abliterate"])["thresholds"] == {"kl": None}, "infinity is no JSON"


def test_equal_content_gives_equal_bytes(tmp_path):
    full_direction().save(tmp_path / "a.safetensors")
    full_direction().save(tmp_path / "b.safetensors")
    load_direction(tmp_path / "a.safetensors").save(tmp_path / "c.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()


def test_the_hash_is_of_the_float32_bytes():
    direction = full_direction()
    assert direction.sha256 == hashlib.sha256(np.asarray(direction.vector, dtype="<f4").tobytes()).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 250.0])
def test_a_bare_file_of_any_float_dtype_and_norm_is_accepted(tmp_path, dtype, scale):
    vector = (torch.tensor([1.0, 2.0, -2.0, 4.0]) * scale).to(dtype)
    save_file({"direction": vector}, tmp_path / "bare.safetensors")
    direction = load_direction(tmp_path / "bare.safetensors", d_model=4)
    torch.testing.assert_close(direction.vector.double(), vector.double() / vector.double().norm())
    assert float(direction.vector.double().norm()) == pytest.approx(1.0, abs=1e-6)
    assert direction.mean_difference is None
    assert direction.metadata == {}


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_out_of_range_do_not_matter(tmp_path, scale):
    save_file({"direction": torch.tensor([3.0, 4.0]) * scale}, tmp_path / "bare.safetensors")
    torch.testing.assert_close(load_direction(tmp_path / "bare.safetensors").vector, torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.ones(4)}, "no tensor named `direction`"),
        ({"direction": torch.ones(2, 2)}, r"shape \[2, 2\]"),
        ({"direction": torch.ones(())}, r"shape \[\]"),
        ({"direction": torch.ones(0)}, r"shape \[0\]"),
        ({"direction": torch.zeros(4)}, "is zero"),
        ({"direction": torch.tensor([1.0, float("nan"), 0, 0])}, "NaN or infinite"),
        ({"direction": torch.tensor([1.0, float("inf"), 0, 0])}, "NaN or infinite"),
        ({"direction": torch.ones(4, dtype=torch.int64)}, "floating-point"),
        ({"direction": torch.ones(4), "mean_difference": torch.ones(5)}, "`mean_difference` has shape"),
        ({"direction": torch.ones(4), "candidates": torch.ones(2, 3, 5)}, "`candidates` has shape"),
        (
            {"direction": torch.ones(4), "candidates": torch.ones(2, 3, 4), "scores.kl": torch.ones(3, 2)},
            "do not share one",
        ),
        ({"direction": torch.ones(4), "scores.kl": torch.ones(3)}, "do not share one"),
    ],
)
def test_a_malformed_file_is_one_clear_line(tmp_path, tensors, message):
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path)
    with pytest.raises(DirectionError, match=message) as error:
        load_direction(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_wrong_width_names_both_and_the_model_it_came_from(tmp_path):
    path = tmp_path / "refusal.safetensors"
    full_direction().save(path)
    with pytest.raises(DirectionError, match=r"8 entries \(extracted from some/model\).* 4096"):
        load_direction(path, d_model=4096)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 64])
def test_a_file_that_is_not_safetensors(tmp_path, content):
    path = tmp_path / "refusal.safetensors"
    path.write_bytes(content)
    with pytest.raises(DirectionError, match="not a readable safetensors file"):
        load_direction(path)


def test_a_missing_file_and_a_directory(tmp_path):
    with pytest.raises(DirectionError, match="no such file"):
        load_direction(tmp_path / "nothing.safetensors")
    with pytest.raises(DirectionError, match="it is a directory"):
        load_direction(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "no JSON object"),
        ('{"layer": 1, "layer": 2}', "the name 'layer' occurs twice"),
        ("[" * 100_000, "is not JSON"),
        ('{"layer": ' + "9" * 5000 + "}", "has 5000 digits"),
    ],
)
def test_malformed_metadata(tmp_path, text, message):
    save_file({"direction": torch.ones(4)}, tmp_path / "bad.safetensors", metadata={"abliterate": text})
    with pytest.raises(DirectionError, match=message):
        load_direction(tmp_path / "bad.safetensors")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "refusal.safetensors"
    full_direction().save(path)
    before = path.read_bytes()

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("abliterate.files.os.fsync", no_space)
    with pytest.raises(DirectionError, match="No space left on device"):
        make_direction(mean_difference=torch.ones(4)).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_save_replaces_the_old_file(tmp_path):
    path = tmp_path / "refusal.safetensors"
    full_direction().save(path)
    make_direction(mean_difference=torch.ones(4)).save(path)
    assert load_file(path).keys() == {"direction", "mean_difference"}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_orthonormalize_keeps_the_span_the_order_and_the_sign():
    vectors = torch.tensor([[0.0, -3.0, 0.0], [1.0, 1.0, 0.0], [5.0, -2.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    basis, left_out = orthonormalize(vectors)
    assert left_out == (2, 3)
    torch.testing.assert_close(basis, torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]], dtype=torch.float64))
    assert orthonormalize(torch.tensor([[1.0, 0.0], [1.0, 1e-4]]), tolerance=1e-3)[1] == (1,)
    with pytest.raises(ValueError, match="finite"):
        orthonormalize(torch.tensor([[float("inf"), 0.0]]))


def test_orthonormalize_stops_at_as_many_rows_as_are_asked_for():
    vectors = torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    basis, left_out = orthonormalize(vectors, at_most=2)
    assert left_out == (1, 3)
    assert torch.equal(basis, orthonormalize(vectors[[0, 2]])[0])


def test_the_basis_is_orthonormal_and_spans_the_vectors():
    vectors = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    basis, left_out = orthonormalize(vectors)
    assert left_out == ()
    torch.testing.assert_close(basis @ basis.T, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(vectors.double() @ basis.T @ basis, vectors.double())


def test_a_basis_spans_what_the_vectors_do_in_their_order() -> None:
    vectors = np.random.default_rng(0).normal(size=(4, 9)) * [[1e-9], [1e9], [1], [1]]
    vectors[2] = 3 * vectors[0] - 1e-18 * vectors[1]
    basis, left_out = orthonormal_basis(vectors)
    assert left_out == (2,)
    np.testing.assert_allclose(basis @ basis.T, np.eye(3), atol=1e-14)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(units @ basis.T @ basis, units, atol=1e-12)
    assert (np.einsum("ij,ij->i", basis, units[[0, 1, 3]]) > 0).all()
    assert orthonormal_basis(vectors, at_most=1)[1] == (1, 2, 3)
    assert orthonormal_basis(np.array([[1.0, 0.0], [1.0, 1e-4]]), tolerance=1e-3)[1] == (1,)


@pytest.mark.parametrize("vectors", [np.array([[np.nan, 1.0]]), np.array([1.0, 2.0])])
def test_what_spans_nothing_is_refused(vectors: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"directions must be finite and \[n, d_model\]"):
        orthonormal_basis(vectors)


def test_rows_come_back_out_of_json_bit_by_bit() -> None:
    rows = np.random.default_rng(1).normal(size=(2, 5))
    encoded = json.loads(json.dumps(encode_rows(rows[:, ::-1])))
    assert decode_rows(encoded).tobytes() == np.ascontiguousarray(rows[:, ::-1]).tobytes()
    for changed in ({"k": 3}, {"k": 0}, {"dtype": "float32"}, {"base64": "?"}):
        with pytest.raises(ValueError):  # noqa: PT011 - each says it in its own words
            decode_rows({**encoded, **changed})
    with pytest.raises(KeyError):
        decode_rows({})
