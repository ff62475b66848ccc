"""What names on disk are taken for."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterate.architectures import names
from abliterate.architectures.names import NormChains, Part, parse_name


@pytest.mark.parametrize(
    ("name", "part", "layer", "role"),
    [
        ("model.layers.10.self_attn.o_proj.weight", Part.WRITER, 10, "attn"),
        ("model.layers.1.mlp.down_proj.weight", Part.WRITER, 1, "mlp"),
        ("transformer.h.0.attn.c_proj.weight", Part.WRITER, 0, "attn"),
        ("transformer.h.0.mlp.c_proj.bias", Part.BIAS, 0, "mlp"),
        ("model.layers.0.mlp.down_proj.weight_scale_inv", Part.COMPANION, 0, "mlp"),
        ("model.layers.0.self_attn.q_proj.weight", Part.READER, 0, None),
        ("model.layers.0.self_attn.q_proj.qweight", Part.READER_COMPANION, 0, None),
        ("model.layers.0.input_layernorm.weight", Part.NORM, 0, None),
        ("model.embed_tokens.weight", Part.TOKEN_EMBEDDING, None, "embed"),
        ("model.embed_tokens.embed_norm.weight", Part.EMBEDDING_NORM, None, "embed"),
        ("model.llm.embed_norm.weight", Part.EMBEDDING_NORM, None, "embed"),
        ("model.altup_projections.2.weight", Part.OUTSIDE_WRITER, None, "embed"),
        ("model.llm.attn_res.attn_queries.5", Part.OUTSIDE_READER, None, None),
        ("model.layers.0.ple.ple_embedding.ngram_embedding.shard_11.weight", Part.READER, 0, None),
        ("model.llm.layers.2.mlp.experts.w2_weight", Part.WRITER, 2, "mlp"),
        ("model.llm.layers.2.mlp.experts.w2_weight_scale", Part.COMPANION, 2, "mlp"),
        ("transformer.wpe.weight", Part.POSITION_EMBEDDING, None, "embed"),
        ("lm_head.weight", Part.HEAD, None, None),
        ("model.layers.0.mlp.down_project.weight", Part.UNKNOWN, 0, None),
        ("model.strange.layers.0.mlp.down_proj.weight", Part.UNKNOWN, None, None),
        ("down_proj.weight", Part.UNKNOWN, None, None),
    ],
)
def test_what_a_name_is_taken_for(name, part, layer, role):
    parsed = parse_name(name)
    assert (parsed.part, parsed.layer, parsed.role) == (part, layer, role)


def test_an_expert_keeps_its_number_and_the_path_does_not():
    parsed = parse_name("model.layers.3.block_sparse_moe.experts.12.w2.weight")
    assert (parsed.part, parsed.stack, parsed.layer, parsed.expert) == (Part.WRITER, "model.layers", 3, 12)
    assert parsed.path == "block_sparse_moe.experts.*.w2"


def test_a_bias_is_told_from_its_weight():
    assert parse_name("transformer.h.0.mlp.c_proj.bias").is_bias
    assert not parse_name("transformer.h.0.mlp.c_proj.weight").is_bias


def test_a_tower_is_one_only_where_there_can_be_one():
    name = "model.vision_tower.encoder.layers.0.mlp.down_proj.weight"
    assert parse_name(name, has_towers=True).part is Part.TOWER
    assert parse_name(name).part is Part.UNKNOWN


def chains(*names, post_norm):
    return NormChains({name: parse_name(name) for name in names}, post_norm=post_norm, plus_one=True)


def test_a_writer_is_seen_through_the_norms_behind_it_in_its_own_layer():
    layer = "model.layers.1."
    names = [f"{layer}{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")]
    names += [f"{layer}{norm}.weight" for norm in ("pre_feedforward_layernorm", "post_feedforward_layernorm")]
    found = chains(*names, post_norm=True)
    (norm,) = found.of(parse_name(f"{layer}self_attn.o_proj.weight"))
    assert (norm.weight, norm.plus_one, norm.centered) == (f"{layer}post_attention_layernorm.weight", True, False)
    (norm,) = found.of(parse_name(f"{layer}mlp.down_proj.weight"))
    assert norm.weight == f"{layer}post_feedforward_layernorm.weight"
    assert found.of(parse_name("model.layers.2.mlp.down_proj.weight")) == ()
    assert chains(*names, post_norm=False).of(parse_name(f"{layer}mlp.down_proj.weight")) == ()


WORDS = (
    *("model", "layers", "h", "blocks", "decoder", "vision_tower", "mtp", "mtp_1", "visual", "transformer"),
    *("language_model", "self_attn", "o_proj", "mlp", "experts", "shared_experts", "down_proj", "weight", "bias"),
    *("shard_0", "shard_12", "0", "1", "37", "007", "٣", "norm", "embed_tokens", "lm_head", "wte", "", "x\n"),
)


@settings(deadline=None, max_examples=500)
@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=9), st.booleans())
def test_what_names_have_in_common_is_kept_and_nothing_else(words, has_towers):
    # What is kept of a name comes from one with other numbers.
    name = ".".join(words)
    parse_name(re.sub(r"(?<![^.])[0-9]+(?![^.])", "5", name), has_towers=has_towers)
    assert parse_name(name, has_towers=has_towers) == names._parse(name, has_towers=has_towers)
