"""Hooks for a run-time: an example of 30 lines applies them, and gives what our own hooks give."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file

from abliterate.directions import encode_rows, make_direction
from abliterate.editing.options import EditOptions
from abliterate.editing.strengths import Strengths
from abliterate.errors import InputError, UnsupportedArchitectureError
from abliterate.interventions.hook_export import export_hooks
from abliterate.models.chat_model import make_chat_model
from abliterate.models.hooks import ablate_direction, add_direction
from tests.support.command_line import CommandLine
from tests.support.gguf_models import write
from tests.support.loaded_models import TOKENS, load, logits
from tests.support.paths import REPOSITORY
from tests.support.tiny_models import make_tokenizer, random_direction, save_tiny_model

DIRECTION = make_direction(mean_difference=3.0 * random_direction(), metadata={"layer": 2, "prompt_hashes": ["a", "b"]})


def example() -> Any:
    spec = importlib.util.spec_from_file_location("apply_hooks", REPOSITORY / "examples" / "apply_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hooked_logits(base: Path, folder: Path) -> torch.Tensor:
    model = load(base)
    example().apply_hooks(model, folder)
    return logits(model)


def expected(base: Path, context: Any) -> torch.Tensor:
    chat = make_chat_model(load(base), make_tokenizer())
    with context(chat), torch.no_grad():
        return chat.model(TOKENS).logits


def export(base: Path, folder: Path, direction: Any = DIRECTION, **options: Any) -> dict[str, Any]:
    export_hooks(source=base, direction=direction, output=folder, options=EditOptions(**options))
    return json.loads((folder / "hooks.json").read_text())


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "olmo2", "qwen3_moe", "mamba", "granite", "phi"])
def test_the_example_gives_the_logits_of_ablating(tmp_path, model_type):
    base = save_tiny_model(tmp_path / "base", model_type)
    hooks = export(base, tmp_path / "hooks")
    assert hooks["whole"] is True
    assert hooks["prompt_hashes"] == ["a", "b"]
    wanted = expected(base, lambda chat: ablate_direction(chat, DIRECTION.vector))
    assert torch.allclose(hooked_logits(base, tmp_path / "hooks"), wanted, atol=1e-5)
    assert not torch.allclose(logits(load(base)), wanted, atol=1e-2)


def test_the_example_has_thirty_lines_or_little_more():
    lines = (REPOSITORY / "examples" / "apply_hooks.py").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) <= 32


def test_several_directions_are_removed_together(tmp_path):
    base = save_tiny_model(tmp_path / "base", "llama")
    other = make_direction(mean_difference=random_direction(seed=8) + DIRECTION.vector)
    export(base, tmp_path / "hooks", [DIRECTION, other])
    rows = load_file(tmp_path / "hooks" / "hooks.safetensors")["remove"]
    assert rows.shape == (2, 32)
    assert torch.allclose(rows @ rows.T, torch.eye(2), atol=1e-6)
    for each in (DIRECTION, other):
        assert torch.allclose(rows.T @ (rows @ each.vector), each.vector, atol=1e-6)


def test_roles_layers_and_strength(tmp_path):
    base = save_tiny_model(tmp_path / "base", "llama")
    hooks = export(base, tmp_path / "a", components=("attn",), layers=(1, 3), strength=0.5)
    assert {(place["role"], place["layer"], place["strength"]) for place in hooks["places"]} == {
        ("attn", 1, 0.5),
        ("attn", 2, 0.5),
    }
    assert hooks["whole"] is False
    hooks = export(base, tmp_path / "b", layers=(0, 1))
    assert [(place["module"], place["at"]) for place in hooks["places"]] == [
        ("model.embed_tokens", "output"),
        ("model.layers.0.self_attn.o_proj", "output"),
        ("model.layers.0.mlp.down_proj", "output"),
    ]
    with pytest.raises(InputError, match="select nothing"):
        export(base, tmp_path / "c", layers=(7, 9))


def test_strengths_of_refine(tmp_path):
    base = save_tiny_model(tmp_path / "base", "llama")
    rows = torch.nn.functional.normalize(torch.randn(4, 32, dtype=torch.float64, generator=torch.manual_seed(0)), dim=1)
    n_layers = load(base).config.num_hidden_layers
    strengths = Strengths(
        file="s.json",
        direction_sha256=DIRECTION.sha256,
        embed=0.0,
        attn=(0.5, *[0.0] * (n_layers - 1)),
        mlp=(*[0.0] * (n_layers - 1), 1.2),
        directions=encode_rows(rows[:n_layers].double().numpy()),
    )
    hooks = export(base, tmp_path / "hooks", strengths=strengths)
    assert [(place["role"], place["layer"], place["strength"], place["tensor"]) for place in hooks["places"]] == [
        ("attn", 0, 0.5, "remove.0"),
        ("mlp", n_layers - 1, 1.2, f"remove.{n_layers - 1}"),
    ]
    stored = load_file(tmp_path / "hooks" / "hooks.safetensors")["remove.0"]
    assert torch.allclose(stored[0].double(), rows[0], atol=1e-6)


def test_an_addition_and_its_control_vector(tmp_path):
    base = save_tiny_model(tmp_path / "base", "llama")
    hooks = export(base, tmp_path / "hooks", add=-0.5)
    added = -0.5 * DIRECTION.mean_difference
    wanted = expected(base, lambda chat: add_direction(chat, DIRECTION.mean_difference, layer=2, coefficient=-0.5))
    assert torch.allclose(hooked_logits(base, tmp_path / "hooks"), wanted, atol=1e-5)
    assert hooks["control_vector"] is True
    reader = gguf.GGUFReader(tmp_path / "hooks" / "control_vector.gguf")
    assert reader.get_field("general.architecture").contents() == "controlvector"
    (tensor,) = reader.tensors
    # Behind block 1 is before block 2.
    assert (tensor.name, tensor.tensor_type) == ("direction.1", gguf.GGMLQuantizationType.F32)
    assert torch.allclose(torch.tensor(tensor.data), added.float())
    assert "--control-vector control_vector.gguf" in (tmp_path / "hooks" / "README.md").read_text()


def test_the_first_blocks_have_no_control_vector(tmp_path):
    base = save_tiny_model(tmp_path / "base", "llama")
    direction = make_direction(mean_difference=random_direction(), metadata={"layer": 1})
    assert export(base, tmp_path / "hooks", direction, add=1.0)["control_vector"] is False
    assert not (tmp_path / "hooks" / "control_vector.gguf").exists()


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (DIRECTION, {"preserve_norms": True}, "--preserve-norms: is about weights"),
        (DIRECTION, {"quantized": "requantize"}, "--quantized: is about weights"),
        (DIRECTION, {"tied": "untie"}, "--tied: is about weights"),
        (
            make_direction(mean_difference=random_direction()),
            {"add": 1.0},
            "--add needs a direction file with its mean difference",
        ),
        (make_direction(mean_difference=random_direction(16)), {}, "has 16 entries; the model's width is 32"),
    ],
)
def test_what_hooks_cannot_be(tmp_path, given, options, message):
    base = save_tiny_model(tmp_path / "base", "llama")
    with pytest.raises(InputError, match=message):
        export(base, tmp_path / "hooks", given, **options)
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_a_gguf_file_and_a_type_that_is_refused(tmp_path):
    file = write(tmp_path)
    with pytest.raises(InputError, match="name the checkpoint that the GGUF file was made of"):
        export(file, tmp_path / "hooks")
    base = save_tiny_model(tmp_path / "base", "llama")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "openai-gpt"}))
    with pytest.raises(UnsupportedArchitectureError, match="openai-gpt"):
        export(base, tmp_path / "hooks")
    assert not (tmp_path / "hooks").exists()


def test_the_command(call_main: CommandLine, tmp_path):
    base = save_tiny_model(tmp_path / "base", "llama")
    DIRECTION.save(tmp_path / "r.safetensors")
    words = ("orthogonalize", base, "--direction", tmp_path / "r.safetensors", "--format", "hooks")
    outcome = call_main(*words, "-o", tmp_path / "hooks", "--json")
    assert outcome.exit_code == 0
    assert json.loads(outcome.stdout)["schema"] == "abliterate.orthogonalize.hooks/1"
    assert sorted(path.name for path in (tmp_path / "hooks").iterdir()) == [
        "README.md",
        "hooks.json",
        "hooks.safetensors",
    ]
    assert call_main(*words, "-o", tmp_path / "hooks").exit_code == 1
    again = call_main(*words, "-o", tmp_path / "hooks", "--overwrite")
    assert (again.exit_code, "together what --intervention does" in again.stdout) == (0, True)
    assert call_main(*words, "--dry-run").exit_code == 2
    assert call_main(*words, "-o", tmp_path / "x", "--resume").exit_code == 2
