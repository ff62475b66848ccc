"""What any checkpoint has of a direction, read from its files."""

from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file

from abliterate.checkpoints.model_source import ModelSource
from abliterate.directions import make_direction
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.inspection.reading import inspect_model
from abliterate.inspection.report import InspectionReport
from tests.support.gguf_models import F32, Q4_0, Q8_0, tiny, write_gguf
from tests.support.tiny_models import make_tokenizer, random_direction, save_chat_model

D_MODEL = 64
SIZES = {"hidden_size": D_MODEL, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}


def read(model: Path, *, direction: Path, base: Path | None = None) -> InspectionReport:
    sources = [
        None if path is None else ModelSource(path=path, name=path.name, revision=None) for path in (model, base)
    ]
    return inspect_model(model=sources[0], base=sources[1], directions=[direction]).report


@pytest.fixture
def direction(tmp_path) -> Path:
    make_direction(mean_difference=random_direction(D_MODEL)).save(tmp_path / "r.safetensors")
    return tmp_path / "r.safetensors"


@pytest.fixture
def base(tmp_path) -> Path:
    return save_chat_model(tmp_path / "base", tiny(**SIZES))


def quantized(checkpoint: Path, target: Path, kind: gguf.GGMLQuantizationType) -> Path:
    """Store a checkpoint's weights in a GGUF file, as plain quantisation does."""
    model = tiny(**SIZES)
    model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)
    return write_gguf(target, model, make_tokenizer(), kind=kind)


def test_each_writer_is_measured_beside_the_base(tmp_path, base, direction):
    orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out")
    report = read(tmp_path / "out", base=base, direction=direction)
    vector = random_direction(D_MODEL).double()
    unit = vector / vector.norm()
    assert len(report.tensors) == 5
    weights = load_file(base / "model.safetensors")
    for tensor in report.tensors:
        weight = weights[tensor.name].double()
        along = (weight @ unit if tensor.role == "embed" else unit @ weight).norm() / weight.norm()
        assert tensor.base_component == pytest.approx(float(along), rel=1e-6)
        assert tensor.left is not None
        assert tensor.left < 1e-4
        assert tensor.dtype == "F32"
    assert {role.role: role.tensors for role in report.roles} == {"embed": 1, "attn": 2, "mlp": 2}
    assert report.random == D_MODEL**-0.5
    assert report.left is not None
    assert report.left < 1e-4


def test_plain_quantisation_gives_back_what_is_measured(tmp_path, base, direction):
    orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out")
    left = {}
    for kind in (F32, Q8_0, Q4_0):
        file = quantized(tmp_path / "out", tmp_path / f"{kind.name}.gguf", kind)
        report = read(file, base=base, direction=direction)
        assert {tensor.dtype for tensor in report.tensors} == {kind.name}
        assert report.left is not None
        assert all(role.most_left is not None and role.left <= role.most_left for role in report.roles)
        left[kind.name] = report.left
    assert left["F32"] < 1e-4 < 5e-3 < left["Q8_0"] < left["Q4_0"]


def test_without_a_base_there_is_no_share(base, direction):
    report = read(base, direction=direction)
    assert report.left is None
    assert all(tensor.left is None and tensor.base_component is None for tensor in report.tensors)
    # About what random numbers have.
    assert all(0.3 * report.random < role.component < 3 * report.random for role in report.roles)


def test_beside_a_base_of_other_shapes_there_is_no_share(tmp_path, base, direction):
    other = save_chat_model(tmp_path / "other", tiny(**{**SIZES, "intermediate_size": 96}))
    report = read(base, base=other, direction=direction)
    assert report.pair is not None
    assert any("down_proj" in name for name in report.pair.reshaped)
    assert report.left is None
    assert all(tensor.left is None for tensor in report.tensors)


def test_what_is_not_edited_is_read_all_the_same(tmp_path):
    wide = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 64}
    file = write_gguf(tmp_path / "m.gguf", tiny(**wide), make_tokenizer(), kind=gguf.GGMLQuantizationType.IQ2_XXS)
    make_direction(mean_difference=random_direction(256)).save(tmp_path / "r.safetensors")
    report = read(file, direction=tmp_path / "r.safetensors")
    vector = random_direction(256).double()
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}["blk.0.ffn_down.weight"]
    weight = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type).copy()).double()
    found = next(tensor for tensor in report.tensors if tensor.role == "mlp")
    assert found.dtype == "IQ2_XXS"
    assert found.component == pytest.approx(float((vector / vector.norm() @ weight).norm() / weight.norm()), rel=1e-5)
