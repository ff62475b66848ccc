"""A model whose files do not hold all of it is refused, with the cause, instead of being filled with random numbers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from abliterate.directions import make_direction
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.editing.plan_report import read_layout
from abliterate.errors import CheckpointError, ModelError
from abliterate.models.loading import load_weights, open_model
from abliterate.models.options import ModelOptions
from tests.support.conformance import build_model
from tests.support.loaded_models import load
from tests.support.tiny_models import make_tiny_model, random_direction, save_chat_model, save_tiny_llama, tiny_llama

OPTIONS = ModelOptions(device="cpu")


def rename(path: Path, change: Callable[[str], str | None], *, metadata: str = "pt") -> None:
    file = path / "model.safetensors"
    tensors = {new: tensor for name, tensor in load_file(file).items() if (new := change(name)) is not None}
    save_file(tensors, file, metadata={"format": metadata})


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as error:
        load_weights(path, name="my-model", options=OPTIONS)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("my-model: of the ")
    return message


def test_another_prefix(tmp_path):
    save_tiny_llama(tmp_path)
    rename(tmp_path, lambda name: f"student.{name}")
    message = refusal(tmp_path)
    assert "of the 30 tensors of the model 30 are not in its files" in message
    assert "(lm_head.weight, model.embed_tokens.weight)" in message
    assert "the files hold student.lm_head.weight, which may be the same under another prefix" in message


def test_one_missing_tensor(tmp_path):
    save_tiny_llama(tmp_path)
    rename(tmp_path, lambda name: None if name == "model.layers.1.mlp.down_proj.weight" else name)
    message = refusal(tmp_path)
    assert "1 are not in its files" in message
    assert "(model.layers.1.mlp.down_proj.weight)" in message
    assert "the files are incomplete, or config.json is that of another model" in message


def test_the_layout_of_mlx(tmp_path):
    save_tiny_llama(tmp_path)
    rename(tmp_path, lambda name: f"language_model.x.{name}", metadata="mlx")
    assert "in MLX's layout, which only MLX loads" in refusal(tmp_path)


def test_a_model_of_images_in_the_layout_of_mlx(tmp_path):
    build_model("qwen3_5").save_pretrained(tmp_path)
    rename(tmp_path, lambda name: name.replace("model.language_model.", "language_model.model."), metadata="mlx")
    with pytest.raises(ModelError, match="in MLX's layout"):
        load_weights(tmp_path, name="my-model", options=OPTIONS)


def test_an_untied_head_that_is_not_stored(tmp_path):
    save_tiny_llama(tmp_path)
    rename(tmp_path, lambda name: None if name == "lm_head.weight" else name)
    assert "(lm_head.weight)" in refusal(tmp_path)


@pytest.mark.parametrize("stored", ["embedding", "head"])
def test_a_tied_pair_is_stored_once(tmp_path, stored):
    save_tiny_llama(tmp_path, tied=True)
    if stored == "head":
        rename(tmp_path, lambda name: "lm_head.weight" if "embed_tokens" in name else name)
    assert torch.equal(
        load_weights(tmp_path, name="model", options=OPTIONS).lm_head.weight, load(tmp_path).lm_head.weight
    )


@pytest.mark.parametrize("model_type", ["gpt2", "deepseek_v3", "qwen3_5", "mamba2", "gemma3"])
def test_what_transformers_saves_is_complete(tmp_path, model_type):
    build_model(model_type).float().save_pretrained(tmp_path)
    load_weights(tmp_path, name="model", options=OPTIONS)


def save_with_adapter(path: Path) -> None:
    save_chat_model(path, tiny_llama())
    adapted = get_peft_model(tiny_llama(), LoraConfig(target_modules=["o_proj"], r=2, init_lora_weights=False))
    adapted.save_pretrained(path)
    assert (path / "adapter_model.safetensors").is_file()


def test_an_adapter_beside_the_weights_is_loaded_and_neither_edited_around_nor_extracted_from(tmp_path):
    base = tmp_path / "base"
    save_with_adapter(base)
    loaded = load_weights(base, name="model", options=OPTIONS)
    assert any("lora" in name for name, _ in loaded.named_parameters()), "transformers loads both"
    direction = make_direction(mean_difference=random_direction())
    for refused in (
        lambda: orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out"),
        lambda: read_layout(model=str(base)),
        lambda: open_model(base, options=OPTIONS, extracts=True),
    ):
        with pytest.raises(CheckpointError, match=r"an adapter \(adapter_model.safetensors\) lies beside") as error:
            refused()
        assert "merge it first" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_adapters_config_alone_is_no_adapter(tmp_path):
    save_tiny_llama(tmp_path / "base")
    (tmp_path / "base" / "adapter_config.json").write_text(json.dumps({"r": 1}))
    assert read_layout(model=str(tmp_path / "base")).name


def test_a_model_in_another_dtype_is_complete(tmp_path):
    make_tiny_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    load_weights(tmp_path, name="model", options=OPTIONS)
