"""Tensors of two checkpoints brought together, whatever they are called."""

from abliterate.checkpoints.safetensors_file import TensorInfo
from abliterate.inspection.pairing import pair_tensors


def info(name: str, *shape: int) -> TensorInfo:
    size = 2
    for length in shape:
        size *= length
    return TensorInfo(name=name, shard="a.safetensors", dtype="BF16", shape=shape, start=0, end=size)


LAYERS = [info(f"model.layers.{layer}.mlp.down_proj.weight", 8, 16) for layer in range(3)]
BASE = [info("model.embed_tokens.weight", 10, 8), *LAYERS, info("model.norm.weight", 8), info("lm_head.weight", 10, 8)]


def renamed(change):
    return [info(change(each.name), *each.shape) for each in BASE]


def test_equal_names_are_brought_together_in_the_models_order():
    found = pair_tensors(BASE, BASE[::-1], stream=None)
    assert [pair.new.name for pair in found.pairs] == [each.name for each in BASE[::-1]]
    assert (found.added, found.missing, found.renamed, found.reshaped) == ((), (), (), ())


def test_prefixes_may_differ_also_for_some_of_the_tensors():
    found = pair_tensors(BASE, renamed(lambda name: name.replace("model.", "model.language_model.")), stream=None)
    assert len(found.pairs) == len(BASE)
    assert all(pair.new.name.replace("language_model.", "") == pair.old.name for pair in found.pairs)
    assert found.renamed == (("model.", "model.language_model."),)
    bare = pair_tensors(BASE, renamed(lambda name: name.removeprefix("model.")), stream=None)
    assert len(bare.pairs) == len(BASE)


def test_an_end_that_many_have_says_nothing():
    base = [info("a.0.weight", 4, 4), info("b.0.weight", 4, 4)]
    found = pair_tensors(base, [info("c.0.weight", 4, 4)], stream=None)
    assert not found.pairs
    assert [each.name for each in found.added] == ["c.0.weight"]
    assert len(found.missing) == 2


def test_rows_more_are_padding_and_other_shapes_are_named():
    model = [info("model.embed_tokens.weight", 12, 8), *LAYERS[:2], info(LAYERS[2].name, 8, 20)]
    found = pair_tensors(BASE, model, stream=None)
    embedding = found.pairs[0]
    assert (embedding.padding, embedding.old.shape, embedding.new.shape) == (2, (10, 8), (10, 8))
    assert embedding.new.end == 10 * 8 * 2
    assert found.reshaped == (LAYERS[2].name,)
    assert {each.name for each in found.missing} == {"model.norm.weight", "lm_head.weight"}


QKV = [info(f"model.layers.0.self_attn.{part}_proj.weight", rows, 8) for part, rows in (("q", 8), ("k", 4), ("v", 4))]
FUSED = info("model.layers.0.self_attn.qkv_proj.weight", 16, 8)


def test_what_one_side_has_in_one_is_paired_part_by_part_on_either_side():
    for base, model in (([*BASE, *QKV], [*BASE, FUSED]), ([*BASE, FUSED], [*BASE, *QKV])):
        found = pair_tensors(base, model, stream=None)
        assert (found.fused, found.added, found.missing) == ((FUSED.name,), (), ())
        pairs = [pair for pair in found.pairs if "self_attn" in pair.old.name]
        assert [pair.old.name for pair in pairs] == [pair.new.name for pair in pairs] == [each.name for each in QKV]
        parts = [pair.new if model[-1] is FUSED else pair.old for pair in pairs]
        assert [(part.start, part.end, part.shape) for part in parts] == [
            (0, 128, (8, 8)), (128, 192, (4, 8)), (192, 256, (4, 8)),
        ]  # fmt: skip


def test_what_is_in_one_is_taken_apart_under_other_prefixes_and_only_where_rows_go_together():
    elsewhere = info("language_model.layers.0.self_attn.qkv_proj.weight", 16, 8)
    found = pair_tensors(QKV, [elsewhere], stream=None)
    assert len(found.pairs) == 3
    assert found.fused == (elsewhere.name,)
    for model in (info(FUSED.name, 20, 8), info(FUSED.name, 16, 9), info(FUSED.name), info("model.qkv_proj.bias", 16)):
        found = pair_tensors(QKV, [model], stream=None)
        assert (found.fused, found.pairs, [each.name for each in found.added]) == ((), (), [model.name])
    two_towers = [info(each.name.replace("model", tower), *each.shape) for each in QKV for tower in ("one", "two")]
    assert not pair_tensors(two_towers, [elsewhere], stream=None).fused
