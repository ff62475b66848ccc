import shutil
from pathlib import Path

import pytest

from abliterate.checkpoints.model_source import ModelSource
from abliterate.directions import Direction, make_direction
from abliterate.editing.options import EditOptions
from abliterate.editing.plan import EditPlan, make_edit_plan
from abliterate.errors import InputError
from tests.support.tiny_models import N_LAYERS, random_direction, save_tiny_model


@pytest.fixture
def base(tmp_path) -> Path:
    return save_tiny_model(tmp_path / "base")


def plan(source: ModelSource | Path | str, direction: Direction | None = None, **options) -> EditPlan:
    direction = direction or make_direction(mean_difference=random_direction())
    return make_edit_plan(source=source, direction=direction, options=EditOptions(**options))


def test_a_plan_names_each_selected_writer_once(base):
    writers = plan(base, components=("embed", "mlp")).edits
    expected = {"model.embed_tokens.weight", *(f"model.layers.{n}.mlp.down_proj.weight" for n in range(N_LAYERS))}
    assert len(writers) == len(expected)
    assert {writer.name for writer in writers} == expected


def test_a_source_is_a_directory_or_what_was_resolved(base):
    assert plan(str(base)).source == plan(base).source == ModelSource(path=base, name=str(base), revision=None)
    resolved = ModelSource(path=base, name="org/model", revision="abc")
    assert plan(resolved).source is resolved


def test_a_source_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        plan(tmp_path / "none")


def test_a_plain_plan_has_no_notes(base):
    assert plan(base).notes() == ()


def test_unedited_copies_of_the_weights_are_pointed_out(base):
    shutil.copy(base / "model.safetensors", base / "consolidated.safetensors")
    assert any("consolidated.safetensors" in note for note in plan(base).notes())


def test_a_direction_of_another_model_type_is_pointed_out(base):
    other = make_direction(mean_difference=random_direction(), metadata={"model_type": "gpt2"})
    assert any("gpt2" in note for note in plan(base, other).notes())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"components": ()}, "components"),
        ({"components": ("embed", "head")}, "head"),
        ({"layers": (2, 2)}, "2:2 is empty"),
        ({"layers": (-1, 2)}, "-1:2"),
        ({"strength": 0.0}, "strength"),
        ({"strength": float("nan")}, "strength"),
    ],
)
def test_options_that_mean_no_edit_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        EditOptions(**options)
