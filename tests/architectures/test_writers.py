import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from abliterate.architectures.writers import PostNorm, ResidualWriter, StreamMap, map_stream
from abliterate.checkpoints.checkpoint import open_checkpoint
from abliterate.errors import CheckpointError, QuantizedCheckpointError, UnsupportedArchitectureError
from tests.support.conformance import build_model
from tests.support.tiny_models import D_MODEL, N_LAYERS, save_tiny_gpt2, save_tiny_llama, save_tiny_model


def stream_of(path: Path) -> StreamMap:
    checkpoint = open_checkpoint(path)
    return map_stream(
        config=checkpoint.config, tensors=tuple(checkpoint.tensors()), path=path, same_bytes=checkpoint.same_bytes
    )


def writers_of(path: Path) -> dict[str, ResidualWriter]:
    return {writer.tensor_name: writer for writer in stream_of(path).writers}


def change_config(path: Path, **values: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))


def change_tensors(path: Path, *, remove: tuple[str, ...] = (), add: dict[str, torch.Tensor] | None = None) -> None:
    tensors = load_file(path / "model.safetensors")
    for name in remove:
        del tensors[name]
    save_file(tensors | (add or {}), path / "model.safetensors", metadata={"format": "pt"})


def test_llama_writers(tmp_path):
    expected = {"model.embed_tokens.weight": ("embed", None, 1)}
    for layer in range(N_LAYERS):
        expected[f"model.layers.{layer}.self_attn.o_proj.weight"] = ("attn", layer, 0)
        expected[f"model.layers.{layer}.mlp.down_proj.weight"] = ("mlp", layer, 0)
    found = writers_of(save_tiny_llama(tmp_path))
    assert {name: (w.role, w.layer, w.residual_axis) for name, w in found.items()} == expected
    assert all(writer.norm_chain == () for writer in found.values())


def test_llama_biases_are_writers_too(tmp_path):
    found = writers_of(save_tiny_llama(tmp_path, attention_bias=True, mlp_bias=True))
    assert found["model.layers.1.self_attn.o_proj.bias"].residual_axis == 0
    assert found["model.layers.1.mlp.down_proj.bias"].role == "mlp"
    assert len(found) == 1 + 4 * N_LAYERS


def test_gpt2_writers_have_the_stream_on_axis_one_and_positions_count(tmp_path):
    expected = {"transformer.wte.weight": ("embed", None, 1), "transformer.wpe.weight": ("embed", None, 1)}
    for layer in range(N_LAYERS):
        for module in ("attn", "mlp"):
            expected[f"transformer.h.{layer}.{module}.c_proj.weight"] = (module, layer, 1)
            expected[f"transformer.h.{layer}.{module}.c_proj.bias"] = (module, layer, 0)
    found = writers_of(save_tiny_gpt2(tmp_path))
    assert {name: (w.role, w.layer, w.residual_axis) for name, w in found.items()} == expected


def test_names_of_a_base_model_have_no_prefix(tmp_path):
    save_tiny_gpt2(tmp_path, tied=True)
    tensors = load_file(tmp_path / "model.safetensors")
    mask = torch.ones(1, 1, D_MODEL, D_MODEL)  # the causal mask that the original gpt2 file stores
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare | {"h.0.attn.bias": mask}, tmp_path / "model.safetensors")
    found = writers_of(tmp_path)
    assert "h.2.mlp.c_proj.weight" in found
    assert "h.0.attn.bias" not in found
    assert len(found) == 2 + 4 * N_LAYERS


def test_layer_one_is_not_layer_eleven(tmp_path):
    found = writers_of(save_tiny_llama(tmp_path, num_hidden_layers=12))
    assert found["model.layers.1.mlp.down_proj.weight"].layer == 1
    assert found["model.layers.11.mlp.down_proj.weight"].layer == 11
    assert [writer.layer for writer in found.values()].count(1) == 2


def test_layers_beyond_the_configs_count_are_left_alone(tmp_path):
    save_tiny_llama(tmp_path)
    change_config(tmp_path, num_hidden_layers=N_LAYERS - 1)
    assert {w.layer for w in writers_of(tmp_path).values()} == {None, *range(N_LAYERS - 1)}


@pytest.mark.parametrize(("tied", "stored"), [(True, True), (False, False)])
def test_a_stored_head_is_a_writer_only_when_tied(tmp_path, tied, stored):
    save_tiny_llama(tmp_path)
    change_config(tmp_path, tie_word_embeddings=tied)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(tmp_path, add={"lm_head.weight": embedding})
    assert ("lm_head.weight" in writers_of(tmp_path)) == stored
    assert stream_of(tmp_path).tied_embeddings == tied


def test_where_the_config_does_not_say_the_class_default_holds(tmp_path):
    save_tiny_model(tmp_path, "gemma", tied=True)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert stream_of(tmp_path).tied_embeddings


def test_tied_with_only_the_head_stored_the_head_is_the_embedding(tmp_path):
    save_tiny_llama(tmp_path, tied=True)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(tmp_path, remove=("model.embed_tokens.weight",), add={"lm_head.weight": embedding})
    assert writers_of(tmp_path)["lm_head.weight"].role == "embed"


def test_a_head_of_another_shape_is_not_tied(tmp_path):
    save_tiny_llama(tmp_path, tied=True)
    change_tensors(tmp_path, add={"lm_head.weight": torch.ones(7, D_MODEL)})
    stream = stream_of(tmp_path)
    assert stream.head_differs
    assert not stream.tied_embeddings
    assert "lm_head.weight" not in writers_of(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("gemma3n", "LAuReL"),
        ("openai-gpt", "norms act on the residual stream itself"),
        ("brand_new", "not known to be complete"),
        (None, "not known to be complete"),
        (["llama"], "not known to be complete"),
    ],
)
def test_other_model_types_are_refused_by_name(tmp_path, model_type, reason):
    save_tiny_llama(tmp_path)
    change_config(tmp_path, model_type=model_type)
    with pytest.raises(UnsupportedArchitectureError, match=reason) as error:
        writers_of(tmp_path)
    assert repr(model_type) in str(error.value)
    assert "docs/architectures.md" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model_type", "config", "reason"),
    [
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before = False .* act on the residual stream itself"),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim = 16 .* a projection stands between"),
        ("longcat_flash", {"zero_expert_num": 2}, "zero_expert_num = 2 .* identity experts"),
        ("longcat_flash", {}, "zero_expert_num = None .* identity experts"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "normalised input"),
    ],
)
def test_settings_that_no_edit_makes_exact_are_refused_by_name(tmp_path, model_type, config, reason):
    save_tiny_llama(tmp_path)
    change_config(tmp_path, model_type=model_type, **config)
    with pytest.raises(UnsupportedArchitectureError, match=reason):
        writers_of(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "method fp8"),
        ({"compression_config": {"format": "int"}}, "compression_config, method unknown"),
    ],
)
def test_a_quantised_checkpoint_is_refused(tmp_path, config, message):
    save_tiny_llama(tmp_path)
    change_config(tmp_path, **config)
    with pytest.raises(QuantizedCheckpointError, match=message):
        writers_of(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_quantised_writer_is_refused_by_its_name(tmp_path, dtype):
    save_tiny_llama(tmp_path)
    name = "model.layers.2.mlp.down_proj.weight"
    change_tensors(tmp_path, add={name: torch.zeros(D_MODEL, 80).to(dtype)})
    with pytest.raises(QuantizedCheckpointError, match=name):
        writers_of(tmp_path)


@pytest.mark.parametrize("suffix", ["qweight", "weight_scale_inv", "weight.absmax", "lora_A.weight"])
def test_a_companion_of_a_writer_is_refused(tmp_path, suffix):
    save_tiny_llama(tmp_path)
    name = f"model.layers.0.self_attn.o_proj.{suffix}"
    change_tensors(tmp_path, add={name: torch.ones(3)})
    with pytest.raises(QuantizedCheckpointError, match=name):
        writers_of(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.embed_tokens.weight", "no token embedding was found"),
        ("model.layers.0.self_attn.o_proj.weight", r"model.layers.0 .*has no residual writer of attention"),
        ("model.layers.2.mlp.down_proj.weight", r"model.layers.2 .*has no residual writer of an MLP"),
    ],
)
def test_a_missing_writer_is_refused_by_its_place(tmp_path, name, message):
    save_tiny_llama(tmp_path)
    change_tensors(tmp_path, remove=(name,))
    with pytest.raises(CheckpointError, match=message):
        writers_of(tmp_path)


def test_fewer_layers_than_the_config_says(tmp_path):
    save_tiny_llama(tmp_path)
    change_config(tmp_path, num_hidden_layers=40)
    with pytest.raises(CheckpointError, match=r"model.layers.3 .*40 layers.* of attention .* and of an MLP"):
        writers_of(tmp_path)


@pytest.mark.parametrize("value", [None, 0, -1, 2.5, True, "32"])
def test_a_config_without_a_usable_size(tmp_path, value):
    save_tiny_llama(tmp_path)
    change_config(tmp_path, hidden_size=value)
    with pytest.raises(CheckpointError, match="hidden_size is"):
        writers_of(tmp_path)


def test_a_config_of_another_width(tmp_path):
    save_tiny_llama(tmp_path)
    change_config(tmp_path, hidden_size=64)
    with pytest.raises(CheckpointError, match="and the weights belong together"):
        writers_of(tmp_path)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.1.mlp.extra_proj.weight", (D_MODEL, 5)),
        ("model.layers.1.mlp.extra_proj.weight", (5, D_MODEL)),
        ("model.layers.1.post_feedforward_layernorm.weight", (D_MODEL,)),
        ("model.embed_positions.weight", (9, D_MODEL)),
        ("base.embed_tokens.weight", (9, D_MODEL)),
        ("vision_tower.layers.0.mlp.down_proj.weight", (D_MODEL, 5)),
    ],
)
def test_a_tensor_that_could_touch_the_stream_and_is_not_in_the_row_is_refused(tmp_path, name, shape):
    save_tiny_llama(tmp_path)
    writers_of(tmp_path)
    change_tensors(tmp_path, add={name: torch.ones(shape)})
    with pytest.raises(UnsupportedArchitectureError, match=name):
        writers_of(tmp_path)


def test_tensors_that_cannot_touch_the_stream_and_extra_heads_are_left_alone(tmp_path):
    save_tiny_llama(tmp_path)
    before = writers_of(tmp_path)
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "score.weight": torch.ones(2, D_MODEL),
        f"model.layers.{N_LAYERS}.eh_proj.weight": torch.ones(D_MODEL, 2 * D_MODEL),
    }
    change_tensors(tmp_path, add=extra)
    assert writers_of(tmp_path) == before


def test_gpt2_with_cross_attention_is_refused(tmp_path):
    save_tiny_gpt2(tmp_path, add_cross_attention=True)
    with pytest.raises(UnsupportedArchitectureError, match="crossattention"):
        writers_of(tmp_path)


def test_another_layout_of_the_same_type_is_refused(tmp_path):
    save_tiny_llama(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({f"base.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedArchitectureError, match=r"no tensor is named as a layer .*model\.layers\.0"):
        writers_of(tmp_path)


def test_two_token_embeddings_are_one_too_many(tmp_path):
    save_tiny_llama(tmp_path)
    change_tensors(tmp_path, add={"embed_tokens.weight": torch.ones(9, D_MODEL)})
    with pytest.raises(UnsupportedArchitectureError, match="2 token embeddings"):
        writers_of(tmp_path)


def test_experts_that_the_config_does_not_name(tmp_path):
    save_tiny_llama(tmp_path)
    change_tensors(tmp_path, add={"model.layers.1.mlp.experts.down_proj": torch.ones(4, D_MODEL, 5)})
    with pytest.raises(CheckpointError, match=r"has 4 experts, but config\.json names no number"):
        writers_of(tmp_path)


def test_experts_fewer_than_the_config_says(tmp_path):
    save_tiny_model(tmp_path, "mixtral", num_local_experts=4)
    change_tensors(tmp_path, remove=("model.layers.1.block_sparse_moe.experts.3.w2.weight",))
    with pytest.raises(CheckpointError, match=r"layers.1.block_sparse_moe.experts.\*.w2 has 3 experts, .* says 4"):
        writers_of(tmp_path)


def test_layers_of_a_second_stack_are_refused(tmp_path):
    save_tiny_llama(tmp_path)
    change_tensors(tmp_path, add={"model.encoder.layers.0.mlp.down_proj.weight": torch.ones(D_MODEL, 5)})
    with pytest.raises(UnsupportedArchitectureError, match=r"in 2 ways \(model.encoder.layers, model.layers\)"):
        writers_of(tmp_path)


def test_what_is_left_alone_is_listed_with_the_reason(tmp_path):
    save_tiny_llama(tmp_path)
    extra = {
        f"model.layers.{N_LAYERS}.mlp.down_proj.weight": torch.ones(D_MODEL, 5),
        "mtp.fc.weight": torch.ones(D_MODEL, 2 * D_MODEL),
        "model.layers.0.self_attn.q_proj.weight_scale": torch.ones(D_MODEL, 1),
    }
    change_tensors(tmp_path, add=extra)
    reasons = {alone.tensor_name: alone.reason for alone in stream_of(tmp_path).left_alone}
    assert reasons.keys() == {*extra, "lm_head.weight"}
    assert "layer 3 is beyond the model's 3" in reasons[f"model.layers.{N_LAYERS}.mlp.down_proj.weight"]
    assert "predicts tokens further ahead" in reasons["mtp.fc.weight"]
    assert "quantised" in reasons["model.layers.0.self_attn.q_proj.weight_scale"]
    assert reasons["lm_head.weight"] == "the output head reads the residual stream"


def test_norms_after_a_sublayer_are_read_off_its_own_layer(tmp_path):
    found = writers_of(save_tiny_model(tmp_path, "gemma2", tied=True))
    for layer in range(N_LAYERS):
        attention = PostNorm(weight=f"model.layers.{layer}.post_attention_layernorm.weight", plus_one=True)
        mlp = PostNorm(weight=f"model.layers.{layer}.post_feedforward_layernorm.weight", plus_one=True)
        assert found[f"model.layers.{layer}.self_attn.o_proj.weight"].norm_chain == (attention,)
        assert found[f"model.layers.{layer}.mlp.down_proj.weight"].norm_chain == (mlp,)


def test_a_layer_without_a_post_norm_has_no_chain(tmp_path):
    save_tiny_model(tmp_path, "olmo2")
    change_tensors(tmp_path, remove=("model.layers.1.post_feedforward_layernorm.weight",))
    found = writers_of(tmp_path)
    assert found["model.layers.0.mlp.down_proj.weight"].norm_chain != ()
    assert found["model.layers.1.mlp.down_proj.weight"].norm_chain == ()


def test_an_unknown_type_is_mapped_by_the_common_rules_only_if_asked(tmp_path):
    expected = writers_of(save_tiny_llama(tmp_path))
    change_config(tmp_path, model_type="brand_new")
    checkpoint = open_checkpoint(tmp_path)
    tensors = tuple(checkpoint.tensors())
    stream = map_stream(
        config=checkpoint.config, tensors=tensors, path=tmp_path, same_bytes=checkpoint.same_bytes, unverified=True
    )
    assert {writer.tensor_name: writer for writer in stream.writers} == expected
    with pytest.raises(UnsupportedArchitectureError, match="brand_new"):
        map_stream(config=checkpoint.config, tensors=tensors, path=tmp_path, same_bytes=checkpoint.same_bytes)


def test_unverified_does_not_open_a_type_that_is_known_not_to_be_exact(tmp_path):
    save_tiny_llama(tmp_path)
    change_config(tmp_path, model_type="doge")
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(UnsupportedArchitectureError, match="learned number"):
        map_stream(
            config=checkpoint.config,
            tensors=tuple(checkpoint.tensors()),
            path=tmp_path,
            same_bytes=checkpoint.same_bytes,
            unverified=True,
        )


def test_missing_position_embeddings_are_noticed(tmp_path):
    save_tiny_gpt2(tmp_path)
    change_tensors(tmp_path, remove=("transformer.wpe.weight",))
    with pytest.raises(CheckpointError, match="no position embedding"):
        writers_of(tmp_path)


def partial_stream(path):
    checkpoint = open_checkpoint(path)
    return map_stream(
        config=checkpoint.config,
        tensors=tuple(checkpoint.tensors()),
        path=path,
        same_bytes=checkpoint.same_bytes,
        partial=True,
    )


def test_what_an_edit_leaves_is_named_as_it_is_in_the_checkpoint(tmp_path):
    build_model("inkling2_text").save_pretrained(tmp_path)
    remainder = partial_stream(tmp_path).remainder
    assert remainder is not None
    assert remainder.reason.startswith("a convolution of each channel follows the projection")
    assert remainder.modules == ("model.llm.layers.*.attn_sconv", "model.llm.layers.*.mlp_sconv")


def test_an_edit_that_is_asked_for_in_part_is_whole_where_it_can_be(tmp_path):
    expected = writers_of(save_tiny_llama(tmp_path))
    stream = partial_stream(tmp_path)
    assert stream.remainder is None
    assert {writer.tensor_name: writer for writer in stream.writers} == expected
