"""A GGUF file written as a checkpoint: it is what the file holds, and whole or not there."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from abliterate.checkpoints.checkpoint import open_checkpoint
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.errors import CheckpointError, InputError, ModelError
from abliterate.models.conversion import convert_gguf
from abliterate.models.gguf_loading import load_gguf
from abliterate.models.loading import class_of
from tests.support.gguf_models import ARCHITECTURES, F16, Q8_0, logits, tiny, write, write_gguf
from tests.support.tiny_models import make_tokenizer, random_direction


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_checkpoint_runs_as_the_file_does(tmp_path, model_type):
    source = write(tmp_path, tiny(model_type), kind=Q8_0)
    report = convert_gguf(source=source, output=tmp_path / "out")
    file = load_gguf(source, name="tiny", choose_class=class_of)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(written), logits(file))
    assert (report.model_type, report.n_parameters) == (model_type, written.num_parameters())


def test_everything_that_belongs_to_it_goes_along(tmp_path):
    source = write(tmp_path, change=lambda writer: (writer.add_eot_token_id(3), writer.add_license("mit")))
    report = convert_gguf(source=source, output=tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    tokenizer, own = AutoTokenizer.from_pretrained(tmp_path / "out"), make_tokenizer()
    assert tokenizer.chat_template == own.chat_template
    assert tokenizer("I cannot help\n with <|im_end|> that.") == own("I cannot help\n with <|im_end|> that.")
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (settings.eos_token_id, settings.pad_token_id, settings.bos_token_id) == ([2, 3], 2, None)
    assert (tmp_path / "out" / "README.md").read_text().startswith('---\nlicense: "mit"\n---\n# tiny\n')
    assert str(tmp_path) not in "".join(
        file.read_text() for file in (tmp_path / "out").iterdir() if file.suffix in {".json", ".md"}
    )
    assert report.eos_token_ids == (2, 3)
    assert report.has_chat_template
    assert report.n_bytes == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())


@pytest.mark.parametrize(("dtype", "stored"), [("float32", "F32"), ("bfloat16", "BF16"), ("float16", "F16")])
def test_the_number_format_is_the_one_asked_for(tmp_path, dtype, stored):
    convert_gguf(source=write(tmp_path, kind=F16), output=tmp_path / "out", dtype=dtype)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {stored}  # noqa: SIM118


def test_large_ones_are_sharded_and_can_be_edited(tmp_path):
    report = convert_gguf(source=write(tmp_path), output=tmp_path / "out", shard_size="100KB")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert report.n_shards == len(checkpoint.shards) > 1
    orthogonalize_checkpoint(source=tmp_path / "out", direction=_direction(tmp_path), output=tmp_path / "edited")
    assert (tmp_path / "edited" / "abliteration.json").is_file()


def _direction(tmp_path):
    from safetensors.torch import save_file

    save_file({"direction": random_direction().float()}, tmp_path / "direction.safetensors")
    return tmp_path / "direction.safetensors"


def test_without_a_template_it_is_written_and_said(tmp_path):
    source = write_gguf(tmp_path / "m.gguf", tiny(), make_tokenizer(template=None))
    report = convert_gguf(source=source, output=tmp_path / "out")
    assert not report.has_chat_template
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


def test_nothing_is_left_of_what_fails(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="lacks"):
        convert_gguf(source=write(tmp_path, leave_out="output_norm.weight"), output=tmp_path / "out")

    def fail(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", fail)
    with pytest.raises(CheckpointError, match=r"No space left on device; .*out was left as it was"):
        convert_gguf(source=write(tmp_path), output=tmp_path / "deep" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_what_is_there_is_replaced_only_if_asked_for(tmp_path):
    source, out = write(tmp_path), tmp_path / "out"
    convert_gguf(source=source, output=out)
    (out / "stale.txt").write_text("x")
    with pytest.raises(InputError, match=r"exists; .*--overwrite"):
        convert_gguf(source=source, output=out)
    convert_gguf(source=source, output=out, overwrite=True)
    assert not (out / "stale.txt").exists()


def test_a_model_that_does_not_fit_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr("abliterate.models.machine.free_bytes", lambda _device: 1000)
    with pytest.raises(ModelError, match="its weights take about"):
        convert_gguf(source=write(tmp_path), output=tmp_path / "out")
