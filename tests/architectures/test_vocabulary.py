"""The vocabulary says one thing about each name."""

import pytest

from abliterate.architectures import vocabulary
from abliterate.architectures.names import WRITERS, Part, parse_name


def test_no_name_is_two_things() -> None:
    assert not vocabulary.NORMS & vocabulary.POST_NORMS
    assert not set(WRITERS) & vocabulary.READER_PATHS
    assert not vocabulary.TOKEN_EMBEDDINGS & vocabulary.HEADS
    assert not vocabulary.READERS & (vocabulary.NORMS | vocabulary.POST_NORMS)


def test_each_writer_and_its_bias_is_read_as_one() -> None:
    for path in WRITERS:
        name = "model.layers.3." + path.replace("*", "7")
        assert parse_name(f"{name}.weight").part is Part.WRITER, path
        assert parse_name(f"{name}.bias").part is Part.BIAS, path
    for bias, owner in vocabulary.BIAS_OF.items():
        assert owner in WRITERS
        ending = "" if bias.endswith("_bias") else ".bias"
        assert parse_name(f"model.layers.3.{bias}{ending}").part is Part.BIAS, bias
    assert set(vocabulary.HANDED_ON) <= set(vocabulary.BIAS_OF)


@pytest.mark.parametrize("part", ["vision_tower", "visual", "audio_projector", "multi_modal_projector", "mm_proj"])
def test_towers_are_known_by_name_and_layers_are_none(part: str) -> None:
    assert vocabulary.TOWER.fullmatch(part)
    assert not any(vocabulary.TOWER.fullmatch(name) for name in (*vocabulary.LAYER_LISTS, "language_model", "model"))
