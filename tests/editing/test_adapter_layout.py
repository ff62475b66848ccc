"""Where each edit goes in an adapter: module, form and side; and what PEFT cannot express."""

import pytest

from abliterate.directions import make_direction
from abliterate.editing.adapter_layout import AdapterLayout, lay_out_adapter
from abliterate.editing.options import EditOptions
from abliterate.editing.plan import make_edit_plan
from abliterate.errors import ModelError
from tests.support.tiny_models import N_LAYERS, random_direction, save_tiny_model

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def lay_out(path, options=None, **model) -> AdapterLayout:
    base = save_tiny_model(path / "base", **model)
    direction = make_direction(mean_difference=random_direction())
    return lay_out_adapter(make_edit_plan(source=base, direction=direction, options=options or EditOptions()))


def test_of_a_llama_each_writer_is_a_layer_and_the_stream_is_its_output(tmp_path):
    layout = lay_out(tmp_path)
    weights = {weight.module: weight for weight in layout.weights}
    assert len(weights) == 1 + 2 * N_LAYERS
    embedding = weights.pop("model.embed_tokens")
    assert (embedding.form, embedding.residual_on_b, embedding.rounds_change) == ("embedding", True, True)
    for module, weight in weights.items():
        assert (weight.form, weight.residual_on_b, weight.rounds_change) == ("linear", True, False)
        assert (weight.key, weight.parameter, weight.experts) == (module, "weight", 1)
        assert [edit.name for edit in weight.edits] == [f"{module}.weight"]
    assert (layout.vectors, layout.notes, layout.auto_class) == ((), (), "AutoModelForCausalLM")


def test_of_a_gpt2_layers_are_stored_turned_and_biases_whole(tmp_path):
    layout = lay_out(tmp_path, model_type="gpt2")
    blocks = [weight for weight in layout.weights if weight.form != "embedding"]
    assert {(weight.form, weight.residual_on_b) for weight in blocks} == {("conv1d", True)}
    # PEFT puts the layer that it adapts into one of its own.
    keys = [vector.key for vector in layout.vectors]
    assert len(keys) == 2 * N_LAYERS
    assert "transformer.h.0.mlp.c_proj.base_layer.bias" in keys
    assert layout.notes == (f"{2 * N_LAYERS} biases are stored whole, because a bias has no low-rank change",)


def test_a_bias_beside_a_weight_that_is_left_alone_keeps_its_name(tmp_path):
    layout = lay_out(tmp_path, EditOptions(components=("mlp",)), model_type="gpt2")
    assert {weight.module.rpartition(".")[2] for weight in layout.weights} == {"c_proj"}
    assert all(".mlp." in vector.key and ".base_layer." in vector.key for vector in layout.vectors)


def test_experts_are_one_parameter_in_their_order(tmp_path):
    layout = lay_out(tmp_path, model_type="qwen3_moe", **MOE)
    stacks = [weight for weight in layout.weights if weight.experts > 1]
    assert len(stacks) == N_LAYERS
    for layer, weight in enumerate(stacks):
        assert (weight.form, weight.experts, weight.parameter) == ("parameter", 4, "down_proj")
        names = [f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight" for expert in range(4)]
        assert [edit.name for edit in weight.edits] == names
    assert any("experts are adapted as transformers 5 stacks them" in note for note in layout.notes)


def test_tied_embeddings_are_adapted_once_and_it_is_said(tmp_path):
    layout = lay_out(tmp_path, tied=True)
    assert [weight.module for weight in layout.weights].count("model.embed_tokens") == 1
    assert any("the embeddings are tied" in note for note in layout.notes)


def test_what_peft_cannot_express_is_refused_with_what_to_leave_out(tmp_path):
    with pytest.raises(ModelError) as refused:
        lay_out(tmp_path, model_type="mamba", state_size=8, expand=2, conv_kernel=4)
    assert "cannot be edited by an adapter: PEFT does not adapt" in str(refused.value)
    assert "leave out --format adapter to write a whole checkpoint" in str(refused.value)
