"""Which models tie their embeddings: what the table makes of a config is what transformers does with it."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from abliterate.architectures.config import read_text_model
from abliterate.architectures.table import WRAPPERS
from abliterate.checkpoints.checkpoint import open_checkpoint
from abliterate.directions import make_direction
from abliterate.editing.options import EditOptions
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.editing.plan_report import PlanReport, plan_layout, read_layout
from abliterate.models.loading import class_of
from tests.support.conformance import (
    CLEAN,
    DIRTY,
    TEXT_TYPES,
    WRAPPER_TYPES,
    build_model,
    load_model,
    stream_component,
    text_inputs,
    tiny_config,
)
from tests.support.loaded_models import load, stored
from tests.support.tiny_models import random_direction, save_tiny_llama

KEY = "tie_word_embeddings"
TIED_BY_CLASS = {"qwen3_5", "qwen3_5_moe"}
"""Where top and text section contradict each other, the class for text ties by the one, that for images by the
other; the table goes by the top, as the class does that releases name."""
SECTION_TYPES = sorted(name for name, wrapper in WRAPPERS.items() if wrapper.tie in {"either", "text"})


def ties(config: Any) -> bool:
    with torch.device("meta"):
        model = class_of(config).from_config(config)
    model.tie_weights()
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def says(config: dict[str, Any]) -> bool:
    return read_text_model(config=config, path=Path("tiny")).tied_embeddings


@pytest.mark.parametrize("model_type", WRAPPER_TYPES)
def test_a_wrapper_is_tied_where_transformers_ties_it(model_type):
    config = tiny_config(model_type)
    plain = config.to_dict()
    section = next(key for key in ("text_config", "llm_config", "language_config") if isinstance(plain.get(key), dict))
    plain.pop(KEY, None)
    plain[section].pop(KEY, None)
    wrong = []
    for top in (None, True, False):
        for text in (None, True, False):
            if model_type in TIED_BY_CLASS and (top or False) != (text or False):
                continue
            given = copy.deepcopy(plain)
            given |= {} if top is None else {KEY: top}
            given[section] |= {} if text is None else {KEY: text}
            if says(given) != ties(type(config).from_dict(copy.deepcopy(given))):
                wrong.append((top, text))
    assert wrong == []


@pytest.mark.parametrize("model_type", TEXT_TYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_text_type_is_tied_where_transformers_ties_it(model_type, tied):
    if model_type == "dbrx" and tied:
        pytest.skip("its config class does not allow it")
    config = tiny_config(model_type, tie_word_embeddings=tied)
    assert says(config.to_dict()) == ties(config)


def save_tied_by_section(path: Path, model_type: str) -> None:
    build_model(model_type, tie_word_embeddings=True, text_config={KEY: True}).save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    config[KEY], config["text_config"][KEY] = False, True
    if model_type in {"hunyuan_vl", "paddleocr_vl"}:
        del config[KEY]
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("model_type", SECTION_TYPES)
def test_a_tie_that_the_text_section_alone_declares_is_found_edited_and_untied(tmp_path, model_type):
    base = tmp_path / "base"
    save_tied_by_section(base, model_type)
    direction = make_direction(mean_difference=random_direction(tiny_config(model_type).get_text_config().hidden_size))
    assert plan(base).tied_embeddings
    edited = orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "edited")
    assert any("output head is edited with them" in note for note in edited.notes)
    untied = orthogonalize_checkpoint(
        source=base, direction=direction, output=tmp_path / "untied", options=EditOptions(tied="untie")
    )
    assert untied.config_changes == {KEY: False, f"text_config.{KEY}": False}
    original = load_model(base, model_type)
    rows = original.get_output_embeddings().weight
    assert rows is original.get_input_embeddings().weight
    inputs = text_inputs(original, model_type)
    assert stream_component(original, inputs, direction.vector.double()) > DIRTY
    for name in ("edited", "untied"):
        loaded = load_model(tmp_path / name, model_type)
        assert stream_component(loaded, inputs, direction.vector.double()) < CLEAN
        head, embedding = loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
        assert (head is embedding) == (name == "edited")
        assert torch.equal(head, rows) == (name == "untied")


def plan(path: Path) -> PlanReport:
    return plan_layout(read_layout(model=str(path)))


def store_head(path: Path, head: torch.Tensor) -> None:
    save_file(
        load_file(path / "model.safetensors") | {"lm_head.weight": head},
        path / "model.safetensors",
        metadata={"format": "pt"},
    )


@pytest.mark.parametrize("change", ["one element", "dtype", "nothing"])
def test_a_head_that_differs_from_the_embedding_is_not_tied_whatever_the_config_says(tmp_path, change):
    base, out = save_tiny_llama(tmp_path / "base", tied=True), tmp_path / "out"
    head = stored(base)["model.embed_tokens.weight"].clone()
    if change == "one element":
        head[-1, -1] += 1
    store_head(base, head.double() if change == "dtype" else head)
    report, direction = plan(base), make_direction(mean_difference=random_direction())
    assert report.tied_embeddings == (change == "nothing")
    result = orthogonalize_checkpoint(
        source=base,
        direction=direction,
        output=out,
        options=EditOptions(tied="untie" if change == "nothing" else "edit"),
    )
    assert torch.equal(stored(out)["lm_head.weight"], stored(base)["lm_head.weight"]), "the head keeps its rows"
    names = {tensor.name for tensor in result.tensors}
    assert "model.embed_tokens.weight" in names
    said = [note for note in result.notes if "differs from it, so they are not tied" in note]
    assert len(said) == (0 if change == "nothing" else 1)
    assert tuple(said) == tuple(note for note in report.notes if "differs" in note)
    if change == "one element":
        loaded, original = load(out), load(base)
        assert torch.equal(loaded.lm_head.weight, original.lm_head.weight)
        assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_a_wrapper_whose_class_ties_by_default_and_whose_release_has_a_head_of_its_own(tmp_path):
    base = tmp_path / "base"
    build_model("mistral3", tie_word_embeddings=False).save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    del config[KEY]
    (base / "config.json").write_text(json.dumps(config))
    report = plan(base)
    assert not report.tied_embeddings
    assert report.head is not None
    assert report.head not in {tensor.name for tensor in report.tensors}
    checkpoint = open_checkpoint(base)
    assert not checkpoint.same_bytes(checkpoint.tensor(report.head), checkpoint.tensor(report.embedding))
