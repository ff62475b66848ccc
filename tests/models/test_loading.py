"""The way in to a loaded model, for all stages."""

from dataclasses import replace
from pathlib import Path

import pytest

from abliterate.checkpoints.hub import ModelSource
from abliterate.errors import InputError, ModelError
from abliterate.models.chat_model import ChatModel
from abliterate.models.loading import load_weights, open_model
from abliterate.models.options import ModelOptions
from abliterate.models.streamed_model import StreamedChat


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
