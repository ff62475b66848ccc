"""The training of refusing adapters: stopped and started again it comes to what it would have come to at once."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training.train_adapter import parse, schedule, train

OPTIONS = ["--n-prompts", "12", "--n-pairs", "2", "--n-others", "1", "--steps", "3", "--rank", "2"]
OPTIONS += ["--answer-tokens", "2", "--dtype", "float32"]


def run(model: Path, output: Path, *more: str) -> bool:
    return train(parse(["--model", str(model), "--output", str(output), *OPTIONS, *more]))


def test_stopped_after_each_step_it_comes_to_the_same(llama_directory: Path, tmp_path: Path) -> None:
    at_once, in_steps = tmp_path / "at_once", tmp_path / "in_steps"
    assert run(llama_directory, at_once)
    again = ("--minutes", "0", "--answers", str(tmp_path / "answers.json"))
    assert not run(llama_directory, in_steps, *again)
    assert sorted(path.name for path in in_steps.iterdir()) == ["state.safetensors"]
    assert not run(llama_directory, in_steps, *again)
    assert run(llama_directory, in_steps, *again)
    assert not (in_steps / "state.safetensors").exists()
    expected, found = (load_file(path / "adapter_model.safetensors") for path in (at_once, in_steps))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert any(tensor.any() for name, tensor in found.items() if "lora_B" in name)
    assert json.loads((in_steps / "training.json").read_text())["steps"] == 3


@pytest.mark.parametrize(("step", "share"), [(0, 0.05), (19, 0.9965), (250, 0.5), (500, 0.0)])
def test_the_learning_rate_rises_in_a_line_and_falls_in_a_half_wave(step: int, share: float) -> None:
    assert schedule(step, 500) == pytest.approx(share, abs=1e-3)
