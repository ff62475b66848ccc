"""Which modules of a loaded model write to the stream, by the names of its parameters."""

import pytest

from abliterate.architectures.modules import map_modules
from abliterate.errors import UnsupportedArchitectureError

D = 8
NORMS = ("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


def ways(model_type: str, parameters: dict[str, tuple[int, ...]], **config) -> list[tuple[str, str, int]]:
    prefix = "model.layers.0."
    shapes = {f"{prefix}{name}": shape for name, shape in parameters.items()}
    modules = map_modules(config={"model_type": model_type, **config}, shapes=shapes, d_model=D, name="it")
    writers = modules.of_block("model.layers", 0)
    return [(w.parameter.removeprefix(prefix), w.module.removeprefix(prefix), w.output) for w in writers]


def test_the_owner_of_each_tensor_that_is_edited_writes() -> None:
    found = ways(
        "llama",
        {
            "self_attn.q_proj.weight": (D, D),
            "self_attn.o_proj.weight": (D, D),
            "self_attn.o_proj.bias": (D,),
            "mlp.up_proj.weight": (20, D),
            "mlp.down_proj.weight": (D, 20),
            "post_attention_layernorm.weight": (D,),
        },
    )
    assert found == [
        ("self_attn.o_proj.weight", "self_attn.o_proj", 0),
        ("self_attn.o_proj.bias", "self_attn.o_proj", 0),
        ("mlp.down_proj.weight", "mlp.down_proj", 0),
    ]


def test_behind_a_norm_the_norm_writes() -> None:
    shapes = {"self_attn.o_proj.weight": (D, D), "mlp.down_proj.weight": (D, 20)}
    found = ways("gemma2", shapes | {f"{name}.weight": (D,) for name in NORMS})
    assert [way for _, way, _ in found] == ["post_attention_layernorm", "post_feedforward_layernorm"]


def test_a_norm_inside_of_a_sub_layer_counts_too() -> None:
    found = ways("axk1", {"mlp.experts.down_proj": (4, D, 20), "mlp.post_mlp_layernorm.weight": (D,)})
    assert found == [("mlp.experts.down_proj", "mlp.post_mlp_layernorm", 0)]


def test_experts_write_through_what_holds_them() -> None:
    stack = {"mlp.experts.down_proj": (4, D, 20), "mlp.shared_experts.down_proj.weight": (D, 20)}
    assert [way for _, way, _ in ways("qwen3_moe", stack)] == ["mlp", "mlp.shared_experts.down_proj"]
    apart = {"block_sparse_moe.experts.2.w2.weight": (D, 20)}
    assert [way for _, way, _ in ways("mixtral", apart)] == ["block_sparse_moe"]


def test_what_a_quantised_or_adapted_module_holds_is_the_modules() -> None:
    held = {
        "self_attn.o_proj.qweight": (1, 8),
        "self_attn.o_proj.scales": (1, 8),
        "self_attn.q_proj.qweight": (1, 8),
        "mlp.down_proj.base_layer.weight": (D, 20),
        "mlp.down_proj.lora_B.default.weight": (D, 2),
        "mlp.down_proj.weight_scale_inv": (1, 1),
    }
    assert {way for _, way, _ in ways("llama", held)} == {"self_attn.o_proj", "mlp.down_proj"}
    stacked = {"mlp.experts.down_proj_blocks": (4, D, 2, 16), "mlp.experts.down_proj_scales": (4, D, 2)}
    assert {way for _, way, _ in ways("gpt_oss", stacked)} == {"mlp"}
    packed = {"self_attn.o_proj.weight": (32, 1), "mlp.down_proj.weight": (80, 1)}
    assert [way for _, way, _ in ways("llama", packed)] == ["self_attn.o_proj", "mlp.down_proj"]


def test_experts_that_end_in_a_latent_space_do_not_write() -> None:
    shapes = {"mixer.experts.down_proj": (4, 5, 20), "mixer.fc2_latent_proj.weight": (D, 5)}
    assert [way for _, way, _ in ways("nemotron_h", shapes)] == ["mixer.fc2_latent_proj"]


def test_a_bias_that_is_handed_on_is_found_among_the_outputs() -> None:
    found = ways("gpt_neox_japanese", {"attention.dense_bias": (D,), "attention.dense.weight": (D, D)})
    assert found == [("attention.dense_bias", "attention", 2), ("attention.dense.weight", "attention.dense", 0)]


def test_towers_and_prediction_layers_are_left_out() -> None:
    shapes = {
        "model.vision_tower.layers.0.mlp.down_proj.weight": (D, 20),
        "model.language_model.layers.0.mlp.down_proj.weight": (D, 20),
        "mtp.layers.0.mlp.down_proj.weight": (D, 20),
    }
    config = {"model_type": "llava", "text_config": {"model_type": "llama"}}
    modules = map_modules(config=config, shapes=shapes, d_model=D, name="it")
    assert modules.stacks == ("model.language_model.layers",)
    assert len(modules.of_block("model.language_model.layers", 0)) == 1


def test_an_unknown_type_is_mapped_by_the_rules_common_to_all() -> None:
    assert [way for _, way, _ in ways("brand_new", {"mlp.down_proj.weight": (D, 20)})] == ["mlp.down_proj"]


@pytest.mark.parametrize(
    ("model_type", "config", "reason"),
    [
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "normalised input"),
        ("opt", {"word_embed_proj_dim": 4}, "a projection stands between"),
    ],
)
def test_what_is_refused_for_an_edit_is_refused_for_hooks(model_type, config, reason) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=rf"^it: .*{model_type}.* cannot be ablated: .*{reason}"):
        ways(model_type, {"mlp.down_proj.weight": (D, 20)}, **config)


def test_what_passes_a_convolution_or_is_a_part_of_a_branch_writes_by_that() -> None:
    shapes = {"self_attn.o_proj.weight": (D, D), "mlp.down_proj.weight": (D, 20), "attn_sconv.conv1d.weight": (D, 1, 4)}
    found = ways("inkling_text", shapes)
    assert [way for _, way, _ in found] == ["attn_sconv", "mlp.down_proj"]
    branch = {"laurel.linear_right.weight": (D, 4), "laurel.post_laurel_norm.weight": (D,)}
    assert ways("gemma3n_text", branch) == [("laurel.linear_right.weight", "laurel", 0)]


def test_what_writes_outside_the_blocks_is_among_what_starts_the_stream() -> None:
    names = ("embed_tokens", "altup_projections.0", "altup_projections.1", "altup_unembed_projections.0", "norm")
    shapes = {f"model.{name}.weight": (D, D) for name in names}
    modules = map_modules(config={"model_type": "gemma3n_text"}, shapes=shapes, d_model=D, name="it")
    assert modules.embeddings == tuple(f"model.{name}" for name in names[:-1])
