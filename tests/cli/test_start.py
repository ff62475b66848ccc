"""What works on files alone starts without torch, and what a plan does grows with the tensors and no faster."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from abliterate.cli.app import yield_soon
from abliterate.directions import load_direction, make_direction
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.editing.plan_report import plan_layout, read_layout
from tests.support.sparse_checkpoints import make_sparse_checkpoint, moe_config
from tests.support.tiny_models import random_direction, save_tiny_model

LOADED = "import sys; from abliterate.cli.app import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"
HEAVY = {"torch", "transformers", "safetensors", "datasets", "accelerate", "numba", "huggingface_hub", "httpx2"}
# Function calls for each tensor: 57, and 166 before names were read by what they have in common.
MOST_CALLS = 75


@pytest.fixture(scope="module")
def edited(tmp_path_factory) -> Path:
    # With norms between writers and the stream, shards, and what Gemma has of its own.
    directory = tmp_path_factory.mktemp("start")
    base = save_tiny_model(directory / "base", model_type="gemma2", max_shard_size="30KB")
    direction = make_direction(mean_difference=random_direction())
    orthogonalize_checkpoint(source=base, direction=direction, output=directory / "out")
    return directory / "out"


def loaded_by(*arguments: object, before: str = "") -> tuple[set[str], str]:
    """Run a command in a process of its own; return the modules that it imported, and what it printed.

    Args:
        arguments: The command.
        before: Python to run first.
    """
    command = [sys.executable, "-c", f"{before}\n{LOADED}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split()), done.stdout


def test_a_plan_imports_neither_torch_nor_numpy_nor_the_client_of_the_hub(edited):
    loaded, printed = loaded_by("plan", edited.with_name("base"))
    assert not loaded & (HEAVY | {"numpy"})
    assert "tensors to edit" in printed


def test_verifying_the_files_imports_no_torch(edited):
    loaded, printed = loaded_by("verify", "--quick", edited)
    assert not loaded & HEAVY
    assert "Verified" in printed


def test_inspecting_what_is_stored_plain_imports_no_torch(edited):
    direction = edited.with_name("recovered.safetensors")
    loaded, printed = loaded_by("inspect", edited, "--base", edited.with_name("base"), "-o", direction)
    assert not loaded & (HEAVY - {"safetensors"})
    assert "directional" in printed
    assert load_direction(direction).d_model == 32
    loaded, _ = loaded_by("inspect", edited, "--direction", direction)
    assert not loaded & (HEAVY - {"safetensors"})


def test_reverting_imports_no_torch(edited, tmp_path):
    loaded, _ = loaded_by("revert", edited, "-o", tmp_path / "restored")
    assert not loaded & HEAVY
    assert (tmp_path / "restored" / "config.json").read_bytes() == (
        edited.with_name("base") / "config.json"
    ).read_bytes()


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_editing_in_compiled_code_imports_no_torch(edited, tmp_path, dtype):
    base = tmp_path / "base"
    shutil.copytree(edited.with_name("base"), base)
    if dtype == "BF16":
        for path in base.glob("*.safetensors"):
            save_file({name: each.bfloat16() for name, each in load_file(path).items()}, path)
    direction = tmp_path / "direction.safetensors"
    make_direction(mean_difference=random_direction()).save(direction)
    command = ["orthogonalize", base, "--direction", direction, "-o", tmp_path / "out"]
    loaded, _ = loaded_by(*command, before="from abliterate.editing import edited_files as e; e._WORTH_FUSING = 0")
    assert "numba" in loaded
    assert not loaded & {"torch", "transformers", "huggingface_hub"}
    orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "with_torch")
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "with_torch" / path.name).read_bytes()


def calls_of_a_plan(base: Path) -> tuple[int, int]:
    """Return how many functions a plan calls, and of how many tensors it is."""
    counted: Counter[str] = Counter()

    def count(_frame: FrameType, event: str, _argument: Any) -> None:
        counted[event] += 1

    sys.setprofile(count)
    try:
        plan_layout(read_layout(model=str(base)))
    finally:
        sys.setprofile(None)
    weight_map = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    return counted["call"] + counted["c_call"], len(weight_map)


def test_a_plan_calls_few_functions_for_each_tensor(tmp_path):
    found = []
    for experts in (16, 16, 64):
        base = tmp_path / f"{len(found)}"
        config = moe_config(hidden=32, layers=4, experts=experts, intermediate=16, heads=4, vocabulary=64)
        make_sparse_checkpoint(base, config, shard_bytes=100_000)
        found.append(calls_of_a_plan(base))
    # The first fills what is kept from one plan to the next.
    (_, (few_calls, few), (many_calls, many)) = found
    assert many > 3 * few > 500
    assert (many_calls - few_calls) / (many - few) < MOST_CALLS


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "20000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, None),
    ],
)
def test_threads_wait_as_the_user_says_or_not_for_long(monkeypatch, given, expected):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        # Set first, so that what the function sets is taken back.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    yield_soon()
    assert os.environ.get("GOMP_SPINCOUNT") == expected
