"""What a config says of its text model, and what is said of a config that says too little or something else."""

import pytest

from abliterate.architectures.config import pipeline_tag, read_text_model
from abliterate.errors import CheckpointError, UnsupportedArchitectureError

LLAMA = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 3}


def read(tmp_path, unverified=False, partial=False, **changes):
    config = {key: value for key, value in (LLAMA | changes).items() if value is not None}
    return read_text_model(config=config, path=tmp_path, unverified=unverified, partial=partial)


def test_sizes_are_read_under_the_names_of_each_family(tmp_path):
    model = read(tmp_path)
    assert (model.model_type, model.d_model, model.n_layers, model.n_experts) == ("llama", 32, 3, None)
    assert (model.section, model.has_towers, model.verified) == ((), False, True)
    gpt2 = read(tmp_path, model_type="gpt2", hidden_size=None, num_hidden_layers=None, n_embd=24, n_layer=2)
    assert (gpt2.d_model, gpt2.n_layers) == (24, 2)
    assert read(tmp_path, model_type="mixtral", num_local_experts=8).n_experts == 8


def test_a_tie_that_is_not_named_is_that_of_the_type(tmp_path):
    assert not read(tmp_path).tied_embeddings
    assert read(tmp_path, tie_word_embeddings=True).tied_embeddings
    assert read(tmp_path, model_type="gemma2").tied_embeddings
    assert not read(tmp_path, model_type="gemma2", tie_word_embeddings=False).tied_embeddings


def test_a_wrapper_is_read_in_its_text_section(tmp_path):
    model = read(tmp_path, model_type="llava", hidden_size=7, text_config={**LLAMA, "hidden_size": 48})
    assert (model.model_type, model.row.model_type, model.section) == ("llava", "llama", ("text_config",))
    assert (model.d_model, model.has_towers) == (48, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size is"),
        ({"hidden_size": "32"}, "hidden_size is '32', expected a positive integer"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', expected true or false"),
        ({"model_type": "llava", "text_config": [1]}, "text_config is"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_its_file(tmp_path, changes, message):
    with pytest.raises(CheckpointError) as raised:
        read(tmp_path, **changes)
    assert str(raised.value).startswith(f"{tmp_path / 'config.json'}: {message}")


def test_a_setting_that_would_leave_the_stream_unclean_is_refused_with_its_reason(tmp_path):
    accepted = {"model_type": "opt", "word_embed_proj_dim": 32, "do_layer_norm_before": True}
    assert read(tmp_path, **accepted).verified
    with pytest.raises(UnsupportedArchitectureError, match=r"'opt' with do_layer_norm_before = False cannot be"):
        read(tmp_path, **accepted | {"do_layer_norm_before": False})
    with pytest.raises(UnsupportedArchitectureError, match=r"'opt' with word_embed_proj_dim = 16 cannot be"):
        read(tmp_path, **accepted | {"word_embed_proj_dim": 16})


def test_only_an_unknown_type_can_be_accepted_and_never_with_code_of_its_own(tmp_path):
    with pytest.raises(UnsupportedArchitectureError, match=r"model type 'novel' .* --unverified tries"):
        read(tmp_path, model_type="novel")
    model = read(tmp_path, model_type="novel", unverified=True)
    assert (model.row.model_type, model.verified, model.d_model) == ("novel", False, 32)
    with pytest.raises(UnsupportedArchitectureError, match="auto_map names Python code"):
        read(tmp_path, model_type="novel", unverified=True, auto_map={"AutoConfig": "x.Y"})
    with pytest.raises(UnsupportedArchitectureError) as refused:
        read(tmp_path, model_type="xglm", unverified=True)
    assert "--unverified" not in str(refused.value)


@pytest.mark.parametrize("top", ["gemma3n", "gemma3n_text"])
def test_a_type_that_is_cleaned_in_part_is_accepted_if_asked(tmp_path, top):
    section = {"text_config": LLAMA | {"model_type": "gemma3n_text"}} if top == "gemma3n" else {}
    with pytest.raises(UnsupportedArchitectureError, match=rf"'{top}' cannot be .* LAuReL .* --partial edits all"):
        read(tmp_path, model_type=top, **section)
    with pytest.raises(UnsupportedArchitectureError, match="--partial edits all"):
        read(tmp_path, unverified=True, model_type=top, **section)
    model = read(tmp_path, partial=True, model_type=top, **section)
    assert (model.row.model_type, model.verified, model.d_model) == ("gemma3n_text", True, 32)
    with pytest.raises(UnsupportedArchitectureError, match="learned number"):
        read(tmp_path, partial=True, model_type="doge")


@pytest.mark.parametrize(
    ("config", "tag"),
    [
        ({"model_type": "llama"}, "text-generation"),
        ({"model_type": "llava", "vision_config": {}, "text_config": {}}, "image-text-to-text"),
        ({"model_type": "qwen2_audio", "audio_config": {}}, "audio-text-to-text"),
        ({"model_type": "qwen2_5_omni", "thinker_config": {"audio_config": {}, "vision_config": {}}}, "any-to-any"),
    ],
)
def test_the_task_is_what_a_model_takes(config, tag):
    assert pipeline_tag(config) == tag
