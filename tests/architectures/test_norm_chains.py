"""Norms between writers and the stream: models run by transformers, and maps by hand where none would do."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import abliterate.editing.plan
from abliterate.architectures.writers import PostNorm, ResidualWriter, StreamMap
from abliterate.checkpoints.checkpoint import open_checkpoint
from abliterate.directions import make_direction
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.editing.record import read_record
from abliterate.errors import CheckpointError
from tests.support.loaded_models import load, stored, stream_component
from tests.support.tiny_models import D_MODEL, N_LAYERS, random_direction, save_tiny_model

DIRECTION = make_direction(mean_difference=random_direction())


def norms(model_type: str, layer: int) -> dict[str, PostNorm]:
    names = {"attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
    return {
        role: PostNorm(weight=f"model.layers.{layer}.{name}.weight", plus_one=model_type == "gemma2")
        for role, name in names.items()
    }


def stream_of(model_type: str, *, with_norms: bool = True) -> StreamMap:
    writers = [ResidualWriter(tensor_name="model.embed_tokens.weight", role="embed", layer=None, residual_axis=1)]
    for layer in range(N_LAYERS):
        for role, module in (("attn", "self_attn.o_proj"), ("mlp", "mlp.down_proj")):
            chain = (norms(model_type, layer)[role],) if with_norms else ()
            name = f"model.layers.{layer}.{module}.weight"
            writers.append(
                ResidualWriter(tensor_name=name, role=role, layer=layer, residual_axis=0, norm_chain=chain)  # type: ignore[arg-type]
            )
    return StreamMap(
        model_type=model_type,
        text_section=(),
        text_type="llama",
        d_model=D_MODEL,
        n_layers=N_LAYERS,
        tied_embeddings=False,
        embedding="model.embed_tokens.weight",
        head="lm_head.weight",
        writers=tuple(writers),
        left_alone=(),
    )


@pytest.fixture(params=["gemma2", "olmo2"])
def model_type(request) -> str:
    return request.param


@pytest.fixture
def base(tmp_path, model_type) -> Path:
    return save_tiny_model(tmp_path / "base", model_type, dtype=torch.float64, max_shard_size="25KB")


def map_by(monkeypatch, stream: StreamMap) -> None:
    monkeypatch.setattr(abliterate.editing.plan, "map_checkpoint", lambda *_, **__: stream)


@pytest.mark.parametrize("n_directions", [1, 3])
def test_the_stream_is_clean_behind_post_norms(base, model_type, tmp_path, n_directions):
    checkpoint = open_checkpoint(base)
    apart = [
        writer.tensor_name
        for writer in stream_of(model_type).writers
        for norm in writer.norm_chain
        if checkpoint.tensor(writer.tensor_name).shard != checkpoint.tensor(norm.weight).shard
    ]
    assert apart, "some norm must be in another shard than its writer"
    directions = [make_direction(mean_difference=random_direction(seed=seed)) for seed in range(n_directions)]
    report = orthogonalize_checkpoint(source=base, direction=directions, output=tmp_path / "out")
    for direction in directions:
        assert stream_component(load(base), direction.vector) > 1e-2
        # These norms are computed in float32.
        assert stream_component(load(tmp_path / "out"), direction.vector) < 1e-6
    assert all(tensor.survivor < 1e-12 for tensor in report.tensors)
    for name, weight in stored(base).items():
        if "norm" in name:
            assert torch.equal(weight, stored(tmp_path / "out")[name]), "norms are read, never edited"
    entry = read_record(tmp_path / "out").content["tensors"][-1]
    plus_one = model_type == "gemma2"
    (norm,) = entry["norm_chain"]
    assert norm["weight"].endswith("norm.weight")
    assert norm["plus_one"] is plus_one
    assert norm["centered"] is False


def test_without_the_norms_it_would_stay_in_the_stream(base, model_type, tmp_path, monkeypatch):
    map_by(monkeypatch, stream_of(model_type, with_norms=False))
    orthogonalize_checkpoint(source=base, direction=DIRECTION, output=tmp_path / "out")
    assert stream_component(load(tmp_path / "out"), DIRECTION.vector) > 1e-3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda weight: None, "must be a vector of 32, but it is missing"),
        (lambda weight: weight[:5].clone(), r"but it is F64 \[5\]"),
        (lambda weight: weight.long(), r"but it is I64 \[32\]"),
        (lambda weight: weight * float("inf"), "holds NaN or infinite values"),
    ],
)
def test_a_norm_that_cannot_be_read_is_refused_and_nothing_is_written(tmp_path, monkeypatch, damage, message):
    base = save_tiny_model(tmp_path / "base", "gemma2", dtype=torch.float64)
    map_by(monkeypatch, stream_of("gemma2"))
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.1.post_feedforward_layernorm.weight"
    damaged = damage(tensors.pop(name))
    save_file(tensors if damaged is None else tensors | {name: damaged}, base / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        orthogonalize_checkpoint(source=base, direction=DIRECTION, output=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base"}
