"""Activation addition as weights: the oracle is the addition by hooks to the base's activations."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from abliterate.architectures.writers import PostNorm, ResidualWriter, StreamMap
from abliterate.checkpoints.checkpoint import open_checkpoint
from abliterate.directions import Direction, make_direction
from abliterate.editing.edits import ADDITIONS, plan_addition
from abliterate.editing.options import EditOptions
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.editing.record import OrthogonalizationReport
from abliterate.errors import AbliterateError, DirectionError, InputError, UnsupportedArchitectureError
from abliterate.models.chat_model import ChatModel, make_chat_model
from abliterate.models.hooks import add_direction
from tests.support.loaded_models import TOKENS, load, logits, stored, tree
from tests.support.tiny_models import D_MODEL, N_LAYERS, make_tokenizer, random_direction, save_tiny_model


def dose(layer: int = 2, scale: float = 0.7) -> Direction:
    return make_direction(mean_difference=scale * random_direction(), metadata={"layer": layer})


def add(base: Path, out: Path, direction: Direction, coefficient: float = 1.0) -> OrthogonalizationReport:
    return orthogonalize_checkpoint(source=base, direction=direction, output=out, options=EditOptions(add=coefficient))


def by_hooks(base: Path, direction: Direction, coefficient: float) -> torch.Tensor:
    model = load(base)
    chat: ChatModel = make_chat_model(model, make_tokenizer())
    assert direction.mean_difference is not None
    with add_direction(
        chat, direction.mean_difference.double(), layer=direction.metadata["layer"], coefficient=coefficient
    ):
        return logits(model)


_GPT2_SIZES = {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 64}
EXTRAS = {
    "bloom": {"hidden_size": D_MODEL, "n_layer": N_LAYERS, "n_head": 4},
    "codegen": {**_GPT2_SIZES, "n_ctx": 64, "rotary_dim": 4},
    "gpt_bigcode": _GPT2_SIZES,
    "gpt_neo": {"hidden_size": D_MODEL, "num_layers": N_LAYERS, "num_heads": 4, "attention_types": [[["global"], 3]]},
    "gptj": {**_GPT2_SIZES, "rotary_dim": 4},
    "opt": {"ffn_dim": 80, "word_embed_proj_dim": D_MODEL},
    "granite_swa": {"residual_multiplier": 0.4, "logits_scaling": 0.5},
    "cwm": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "granite": {"residual_multiplier": 0.4, "logits_scaling": 0.5},
}


@pytest.mark.parametrize("coefficient", [1.0, -2.5])
@pytest.mark.parametrize("layer", [1, N_LAYERS - 1])
@pytest.mark.parametrize("model_type", sorted(ADDITIONS))
def test_it_equals_the_addition_by_hooks(tmp_path, model_type, layer, coefficient):
    base = save_tiny_model(
        tmp_path / "base", model_type, dtype=torch.float64, max_shard_size="60KB", **EXTRAS.get(model_type, {})
    )
    out, direction = tmp_path / "out", dose(layer)
    add(base, out, direction, coefficient)
    expected, plain, edited = by_hooks(base, direction, coefficient), logits(load(base)), logits(load(out))
    assert (expected - plain).abs().max() > 0.05
    # The norms of most of these compute in float32, whatever the model's dtype.
    assert (expected - edited).abs().max() < 1e-5
    if model_type == "gpt2":
        assert (expected - edited).abs().max() < 1e-10


@pytest.mark.parametrize(("model_type", "options"), [("gpt2", {}), ("llama", {"mlp_bias": True})])
def test_a_stored_bias_is_all_that_changes(tmp_path, model_type, options):
    base = save_tiny_model(tmp_path / "base", model_type, **options)
    report = add(base, tmp_path / "out", dose())
    name = "transformer.h.1.mlp.c_proj.bias" if model_type == "gpt2" else "model.layers.1.mlp.down_proj.bias"
    assert [(tensor.name, tensor.edit.kind, tensor.edit.writer.layer) for tensor in report.tensors] == [
        (name, "added", 1)
    ]
    assert report.config_changes == {}
    before, after = stored(base), stored(tmp_path / "out")
    assert before.keys() == after.keys()
    assert {key for key in before if not torch.equal(before[key], after[key])} == {name}
    expected = before[name].double() + dose().mean_difference.double()
    torch.testing.assert_close(after[name], expected.float(), rtol=0, atol=0)


def test_where_the_config_can_switch_biases_on_all_of_them_are_added(tmp_path):
    base = save_tiny_model(tmp_path / "base", dtype=torch.bfloat16, max_shard_size="30KB")
    out = tmp_path / "out"
    report = add(base, out, dose(), -1.0)
    new = {
        f"model.layers.{layer}.mlp.{module}.bias"
        for layer in range(N_LAYERS)
        for module in ("gate_proj", "up_proj", "down_proj")
    }
    assert {tensor.name for tensor in report.tensors} == new
    assert any("mlp_bias is switched on" in note for note in report.notes)
    before, after = open_checkpoint(base), open_checkpoint(out)
    assert len(before.shards) > 1
    for name in new:
        weight = before.tensor(name.replace("bias", "weight"))
        bias = after.tensor(name)
        assert (bias.shard, bias.shape, bias.dtype) == (weight.shard, weight.shape[:1], "BF16")
    old_tensors, new_tensors = stored(base), stored(out)
    assert all(torch.equal(old_tensors[name], new_tensors[name]) for name in old_tensors)
    dosed = "model.layers.1.mlp.down_proj.bias"
    assert torch.equal(new_tensors[dosed], (-dose().mean_difference).to(torch.bfloat16))
    assert all(not new_tensors[name].any() for name in new - {dosed})
    config = json.loads((base / "config.json").read_text())
    assert json.loads((out / "config.json").read_text()) == config | {"mlp_bias": True}
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model(TOKENS).logits.isfinite().all()


def refused(base: Path, direction: Direction, error: type[AbliterateError], message: str) -> None:
    before = tree(base.parent)
    with pytest.raises(error, match=message) as raised:
        add(base, base.parent / "out", direction)
    assert "\n" not in str(raised.value)
    assert tree(base.parent) == before


@pytest.mark.parametrize(
    ("direction", "error", "message"),
    [
        (dose(0), InputError, "layer 0's input, and no MLP comes before"),
        (dose(N_LAYERS), InputError, "layer 3, and the model has 3 layers"),
        (make_direction(mean_difference=random_direction()), DirectionError, "no mean_difference or no layer"),
    ],
)
def test_directions_that_cannot_be_added_are_refused(tmp_path, direction, error, message):
    refused(save_tiny_model(tmp_path / "base"), direction, error, message)


def test_a_bare_direction_file_says_not_how_much(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    save_file({"direction": random_direction()}, tmp_path / "bare.safetensors", metadata={"abliterate": '{"layer": 1}'})
    with pytest.raises(DirectionError, match="does not say how much to add"):
        orthogonalize_checkpoint(
            source=base, direction=tmp_path / "bare.safetensors", output=tmp_path / "out", options=EditOptions(add=1.0)
        )
    assert not (tmp_path / "out").exists()


def test_architectures_without_such_a_bias_are_refused(tmp_path):
    base = save_tiny_model(tmp_path / "base", "qwen2")
    refused(base, dose(), UnsupportedArchitectureError, "qwen2 cannot be put into its weights: additions are known")


def test_a_bias_that_its_config_left_out_is_refused(tmp_path):
    base = save_tiny_model(tmp_path / "base", "starcoder2", use_bias=False)
    refused(base, dose(), UnsupportedArchitectureError, "is not stored, and config.json of starcoder2")


def stream_of(*writers: ResidualWriter) -> StreamMap:
    return StreamMap(
        model_type="llama",
        text_section=(),
        text_type="llama",
        d_model=D_MODEL,
        n_layers=N_LAYERS,
        tied_embeddings=False,
        embedding="embed",
        head=None,
        writers=writers,
        left_alone=(),
    )


def writer(name: str, *norms: str) -> ResidualWriter:
    chain = tuple(PostNorm(weight=norm) for norm in norms)
    return ResidualWriter(tensor_name=name, role="mlp", layer=1, residual_axis=0, norm_chain=chain)


@pytest.mark.parametrize(
    ("writers", "message"),
    [
        ((writer("l.1.down.weight", "l.1.post_norm.weight"),), r"the norm l\.1\.post_norm\.weight stands between"),
        ((writer("l.1.experts.0.w2.weight"), writer("l.1.experts.1.w2.weight")), "2 MLP out-projections"),
        ((writer("l.1.experts.down_proj"),), "0 MLP out-projections"),
    ],
)
def test_what_weights_cannot_express_is_refused(writers, message):
    with pytest.raises(UnsupportedArchitectureError, match=message):
        plan_addition(
            coefficient=1.0,
            direction=dose(),
            stream=stream_of(*writers),
            tensors={},
            config={},
            path=Path("model"),
        )


@pytest.mark.parametrize(
    "options", [{"strength": 0.5}, {"tied": "untie"}, {"layers": (0, 1)}, {"preserve_norms": True}]
)
def test_options_of_a_projection_do_not_go_with_it(options):
    with pytest.raises(InputError, match="an addition projects nothing"):
        EditOptions(add=1.0, **options)


@pytest.mark.parametrize("coefficient", [0.0, float("nan"), float("inf")])
def test_coefficients_that_add_nothing_or_no_number(coefficient):
    with pytest.raises(InputError, match="add is"):
        EditOptions(add=coefficient)


def test_one_direction_at_a_time(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    with pytest.raises(InputError, match="takes one direction, and 2 were given"):
        orthogonalize_checkpoint(
            source=base, direction=[dose(), dose()], output=tmp_path / "out", options=EditOptions(add=1.0)
        )
