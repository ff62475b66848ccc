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
