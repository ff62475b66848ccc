"""The way in to a loaded model, for all stages."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from abliterate.checkpoints.model_source import ModelSource
from abliterate.directions import make_direction
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.errors import InputError, ModelError
from abliterate.models.chat_model import ChatModel
from abliterate.models.loading import load_tokenizer, load_weights, open_model
from abliterate.models.options import ModelOptions
from abliterate.models.streamed_model import StreamedChat
from tests.support.tiny_models import CHATML, make_tokenizer, random_direction, save_chat_model, tiny_llama


def test_a_directory_a_source_and_a_loaded_model_all_open(llama_directory: Path, llama_chat: ChatModel) -> None:
    options = ModelOptions(device="cpu")
    source = ModelSource(path=llama_directory, name="org/model", revision="abc")
    by_path, by_text = (open_model(given, options=options) for given in (llama_directory, str(llama_directory)))
    assert (
        by_path.source == by_text.source == ModelSource(path=llama_directory, name=str(llama_directory), revision=None)
    )
    opened = open_model(source, options=options)
    assert (opened.name, opened.revision, opened.source) == ("org/model", "abc", source)
    assert opened.chat.d_model == llama_chat.d_model
    given = open_model(llama_chat, options=options)
    assert given.chat is llama_chat
    assert (given.source, given.revision) == (None, None)


def test_layers_are_streamed_only_where_the_stage_can(llama_directory: Path) -> None:
    options = ModelOptions(device="cpu", stream_layers=True)
    assert isinstance(open_model(llama_directory, options=options, can_stream=True).chat, StreamedChat)
    assert not isinstance(open_model(llama_directory, options=options).chat, StreamedChat)
    whole = replace(options, stream_layers=False)
    assert not isinstance(open_model(llama_directory, options=whole, can_stream=True).chat, StreamedChat)


def test_what_cannot_be_opened_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        open_model(tmp_path / "nothing", options=ModelOptions())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="my-model does not load as a judge"):
        load_weights(tmp_path, name="my-model", options=ModelOptions(device="cpu"), kind="a judge")


class TestTemplateOfItsOwnFile:
    """A template beside the tokenizer, as processors of vision models keep it."""

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("chat_template.jinja", CHATML),
            ("chat_template.json", json.dumps({"chat_template": CHATML})),
            ("processor_config.json", json.dumps({"chat_template": CHATML, "processor_class": "X"})),
        ],
    )
    def test_it_is_read_and_copied_along(self, tmp_path: Path, name: str, content: str) -> None:
        base, out = tmp_path / "base", tmp_path / "out"
        tiny_llama().save_pretrained(base)
        make_tokenizer(template=None).save_pretrained(base)
        assert not (base / "chat_template.jinja").exists()
        (base / name).write_text(content)
        options = ModelOptions(device="cpu")
        assert open_model(base, options=options).chat.tokenizer.chat_template == CHATML
        orthogonalize_checkpoint(source=base, direction=make_direction(mean_difference=random_direction()), output=out)
        assert (out / name).read_text() == content
        assert open_model(out, options=options).chat.tokenizer.chat_template == CHATML

    def test_the_tokenizer_s_own_comes_first(self, tmp_path: Path) -> None:
        save_chat_model(tmp_path, tiny_llama())
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
        template = load_tokenizer(tmp_path, name="x", options=ModelOptions()).chat_template
        assert template == make_tokenizer().chat_template

    @pytest.mark.parametrize("content", ["{", "[]", '{"chat_template": null}', '{"chat_template": ""}'])
    def test_a_file_without_one_is_none(self, tmp_path: Path, content: str) -> None:
        tiny_llama().save_pretrained(tmp_path)
        make_tokenizer(template=None).save_pretrained(tmp_path)
        (tmp_path / "chat_template.json").write_text(content)
        with pytest.raises(ModelError, match="has no chat template"):
            open_model(tmp_path, options=ModelOptions(device="cpu"))


def test_a_format_that_transformers_does_not_read_is_refused_by_name(tmp_path: Path) -> None:
    # It would warn, and take the codes for the numbers that they stand for.
    model = save_chat_model(tmp_path / "m", tiny_llama(n_layers=1))
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8"}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"is quantised .*modelopt.* in a way that transformers does not read"):
        load_weights(model, name="m", options=ModelOptions(device="cpu"))
