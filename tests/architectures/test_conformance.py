"""Every model type with a text model that the installed transformers knows is either exact or refused by name."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from abliterate.architectures.table import ARCHITECTURES, REFUSED, WRAPPERS, refusal
from abliterate.directions import make_direction
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.errors import UnsupportedArchitectureError
from tests.support import differential
from tests.support.conformance import (
    ALL_TYPES,
    PARTIAL_TYPES,
    REFUSED_TYPES,
    TEXT_TYPES,
    WRAPPER_TYPES,
    build_model,
    check,
    check_partial,
    partial_shortcomings,
    shortcomings,
)
from tests.support.conformance_models import VARIANTS
from tests.support.differential import NOT_RUN, RunResult, check_running, make
from tests.support.matrix import exact_row, partial_row, reason_rows, refused_row, written_rows
from tests.support.tiny_models import random_direction

CHECKED = [*TEXT_TYPES, *WRAPPER_TYPES, *VARIANTS]


def run_of(name: str) -> RunResult | None:
    """Run a type's tiny model in batches and with a cache."""
    if name in NOT_RUN:
        return None
    model_type, changes = VARIANTS.get(name, (name, {}))
    found = check_running(make(model_type, **changes))
    assert differential.shortcomings(found) == [], found
    return found


@pytest.mark.parametrize("name", CHECKED)
def test_the_stream_is_clean_and_each_group_of_edits_is_needed(tmp_path, name):
    model_type, changes = VARIANTS.get(name, (name, {}))
    result = check(model_type, tmp_path, model=build_model(model_type, **changes))
    assert shortcomings(model_type, result) == [], result
    rows = [exact_row(name, result, run_of(name)), *reason_rows(name, result)]
    assert set(rows) <= set(written_rows()), "run `python -m scripts.architecture_matrix`"


@pytest.mark.parametrize("model_type", PARTIAL_TYPES)
def test_without_what_remains_a_partial_edit_is_exact_and_with_it_less_is_left(tmp_path, model_type):
    result = check_partial(model_type, tmp_path)
    assert partial_shortcomings(model_type, result) == [], result
    rows = [
        partial_row(model_type, result, run_of(model_type), refusal(model_type)),
        *reason_rows(model_type, result.whole),
    ]
    assert set(rows) <= set(written_rows()), "run `python -m scripts.architecture_matrix`"


def test_which_types_are_edited_partially():
    families = {model_type.removesuffix("_text").removesuffix("_mm_model") for model_type in PARTIAL_TYPES}
    assert families == {"gemma3n", "inkling", "inkling2", "qwen4_exp"}
    assert len(PARTIAL_TYPES) == 2 * len(families)


@pytest.mark.parametrize("model_type", [*REFUSED_TYPES, *PARTIAL_TYPES])
def test_every_other_type_is_refused_by_name_and_nothing_is_written(tmp_path, model_type):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": model_type, "hidden_size": 32, "num_hidden_layers": 1}))
    save_file({"model.layers.0.mlp.down_proj.weight": torch.ones(32, 2)}, base / "model.safetensors")
    direction = make_direction(mean_difference=random_direction())
    with pytest.raises(UnsupportedArchitectureError) as error:
        orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out")
    assert f"model type {model_type!r} cannot be orthogonalized: {refusal(model_type)}; " in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
    assert ("--partial edits all that an edit can clean" in str(error.value)) == (model_type in PARTIAL_TYPES)
    if model_type in PARTIAL_TYPES:
        return
    assert refused_row(model_type, refusal(model_type)) in written_rows(), "run `python -m scripts.architecture_matrix`"


def test_the_matrix_has_a_row_for_each_type_and_no_other():
    rows = [row.split(" | ") for row in written_rows()]
    names = [row[0].removeprefix("| ") for row in rows if row[1] in {"exact", "partial", "refused"}]
    assert sorted(names) == sorted([*CHECKED, *PARTIAL_TYPES, *REFUSED_TYPES])
    not_extracted = {row[0] for row in rows if row[1] == "exact" and row[2] == "no"}
    assert len(not_extracted) <= 5
    explained = {(row[0], row[1]) for row in rows}
    assert not_extracted <= {name for name, column in explained if column == "extract"}
    not_streamed = {row[0] for row in rows if row[1] == "exact" and row[3] == "no"}
    assert not_streamed - not_extracted <= {name for name, column in explained if column == "stream layers"}


def test_how_many_types_are_exact():
    assert len(TEXT_TYPES) >= 120
    assert len(WRAPPER_TYPES) >= 25
    assert set(WRAPPER_TYPES) <= set(ALL_TYPES)
    assert not set(REFUSED) & (set(ARCHITECTURES) | set(WRAPPERS))


@pytest.mark.parametrize("model_type", TEXT_TYPES)
def test_the_default_tie_of_a_text_type_is_that_of_the_config_class(model_type):
    assert ARCHITECTURES[model_type].tied == bool(AutoConfig.for_model(model_type).tie_word_embeddings)


@pytest.mark.parametrize("model_type", WRAPPER_TYPES)
def test_the_defaults_of_a_wrapper_are_those_of_its_config_class(model_type):
    config = AutoConfig.for_model(model_type)
    wrapper = WRAPPERS[model_type]
    assert wrapper.tied == bool(getattr(config, "tie_word_embeddings", False))
    assert wrapper.text_type == config.get_text_config().model_type


def test_a_type_that_is_not_refused_by_name_in_the_table_says_that_it_is_unknown():
    assert refusal("brand_new") == "its residual writers are not known to be complete"
