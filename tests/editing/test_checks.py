"""What the checks of an edited checkpoint find: everything that differs and was not declared, and nothing else."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from abliterate.architectures.writers import PostNorm, ResidualWriter
from abliterate.checkpoints.checkpoint import open_checkpoint
from abliterate.editing.checks import (
    compare_bytes,
    compare_layouts,
    directions_through,
    measure_survivors,
)
from abliterate.editing.plan import RemovedDirections
from abliterate.errors import CheckpointError
from abliterate.formats.projection import effective_directions, project_out
from tests.support.loaded_models import stored
from tests.support.tiny_models import D_MODEL, random_direction, save_tiny_model

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def base(tmp_path) -> Path:
    return save_tiny_model(tmp_path / "base", max_shard_size="30KB")


@pytest.fixture
def copy(base) -> Path:
    return Path(shutil.copytree(base, base.with_name("copy")))


def change(directory: Path, name: str, edit: Callable[[Tensor], Tensor | None], *, new_name: str | None = None) -> None:
    """Replace one tensor in its shard, with metadata and order as they were; None drops it."""
    shard = open_checkpoint(directory).tensor(name).shard
    with safe_open(str(directory / shard), framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    edited = edit(tensors.pop(name) if new_name is None else tensors[name])
    if edited is not None:
        tensors[new_name or name] = edited
    save_file(tensors, directory / shard, metadata=metadata)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    weight_map = {key: value for key, value in index["weight_map"].items() if value != shard}
    index["weight_map"] = weight_map | dict.fromkeys(tensors, shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def differences(base: Path, copy: Path, **declared) -> list[str]:
    return compare_layouts(open_checkpoint(base), open_checkpoint(copy), **declared)


def test_copies_are_equal(base, copy):
    assert differences(base, copy) == []
    assert len(open_checkpoint(base).shards) > 3
    counted: list[int] = []
    one, other = open_checkpoint(base), open_checkpoint(copy)
    assert compare_bytes(one, other, changed=(), other_files=one.side_files, advance=counted.append) == []
    sizes = [tensor.end - tensor.start for tensor in one.tensors()] + [
        (base / f).stat().st_size for f in one.side_files
    ]
    assert sum(counted) == sum(sizes)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.T.contiguous(), rf"tensor {DOWN} is F32 \[80, 32\], in the base F32 \[32, 80\]"),
        (lambda w: w.half(), rf"tensor {DOWN} is F16 \[32, 80\], in the base F32"),
        (lambda w: None, f"tensor {DOWN} of the base is missing"),
    ],
)
def test_another_layout_is_found(base, copy, edit, message):
    change(copy, DOWN, edit)
    found = differences(base, copy)
    assert any(re.search(message, line) for line in found), found


def test_a_tensor_too_many_is_found_unless_it_was_declared(base, copy):
    change(copy, DOWN, torch.clone, new_name="lm_head.bias")
    assert any("the base has no tensor lm_head.bias" in line for line in differences(base, copy))
    declared = differences(base, copy, added={"lm_head.bias"})
    assert declared == []
    assert differences(base, base, added={"lm_head.bias"}) == [
        "lm_head.bias: this tensor was to be added and is missing"
    ]
    one, other = open_checkpoint(base), open_checkpoint(copy)
    assert compare_bytes(one, other, changed=(), copies={"lm_head.bias": DOWN}) == []
    change(copy, "lm_head.bias", lambda w: w + 1)
    other = open_checkpoint(copy)
    assert any("is not the copy of" in p for p in compare_bytes(one, other, changed=(), copies={"lm_head.bias": DOWN}))


def test_header_metadata_and_order_are_compared(base, copy):
    shard = open_checkpoint(copy).tensor(DOWN).shard
    tensors = {key: value for key, value in stored(copy).items() if open_checkpoint(copy).tensor(key).shard == shard}
    save_file(tensors, copy / shard, metadata={"format": "pt", "by": "someone"})
    assert any("metadata" in line and "someone" in line for line in differences(base, copy))


def test_the_config_may_differ_by_what_was_declared_only(base, copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"mlp_bias": True, "text": {"tied": False}}))
    assert differences(base, copy) == ["config.json: differs from the base's by more than the recorded changes"]
    assert differences(base, copy, config_changes={"mlp_bias": True}) != []
    assert differences(base, copy, config_changes={"mlp_bias": True, "text.tied": False}) == []


def test_one_bit_in_a_tensor_or_a_file_is_found(base, copy):
    info = open_checkpoint(copy).tensor(DOWN)
    data = bytearray((copy / info.shard).read_bytes())
    data[info.end - 1] ^= 1
    (copy / info.shard).write_bytes(data)
    (copy / "generation_config.json").write_text("{}")
    one, other = open_checkpoint(base), open_checkpoint(copy)
    assert compare_layouts(one, other) == []
    assert compare_bytes(one, other, changed=()) == [
        f"{info.shard}: tensor {DOWN} differs, and no edit of it was planned"
    ]
    assert compare_bytes(one, other, changed={DOWN}) == []
    assert compare_bytes(one, other, changed={DOWN}, other_files=["generation_config.json"]) == [
        "generation_config.json: is not the base's file"
    ]


def test_survivors_are_measured_from_the_files_through_norms_in_other_shards(base, copy):
    norm = PostNorm(weight="model.layers.2.input_layernorm.weight", plus_one=True, centered=True)
    checkpoint = open_checkpoint(base)
    assert checkpoint.tensor(norm.weight).shard != checkpoint.tensor(DOWN).shard
    subspace = (random_direction() / random_direction().norm()).double()[None]
    writer = ResidualWriter(tensor_name=DOWN, role="mlp", layer=2, residual_axis=0, norm_chain=(norm,))
    plain = replace(writer, norm_chain=())
    removed = RemovedDirections(subspace=subspace.numpy())
    (seen,) = map(torch.from_numpy, directions_through(checkpoint, removed, writers=[writer]).values())
    (unseen,) = map(torch.from_numpy, directions_through(checkpoint, removed, writers=[plain]).values())
    gamma = 1 + stored(base)[norm.weight].double()
    by_hand = gamma * subspace[0]
    by_hand = by_hand - by_hand.mean()
    torch.testing.assert_close(seen[0], by_hand / by_hand.norm(), rtol=0, atol=1e-12)
    torch.testing.assert_close(unseen, subspace, rtol=0, atol=1e-12)
    change(copy, DOWN, lambda w: project_out(w, directions=seen, residual_axis=0))
    ((before, after),) = measure_survivors(open_checkpoint(copy), base=checkpoint, writers=[writer], removed=removed)
    weight = stored(base)[DOWN].double()
    assert before.norm == pytest.approx(float(weight.norm()), rel=1e-12)
    assert before.along == pytest.approx(float((seen @ weight).norm()), rel=1e-12)
    assert after.survivor_of(before) < 1e-6
    ((before, after),) = measure_survivors(open_checkpoint(copy), base=checkpoint, writers=[plain], removed=removed)
    assert after.survivor_of(before) > 0.05, "along the plain direction it is another component"


def test_what_is_not_there_is_said(base):
    checkpoint = open_checkpoint(base)
    subspace = np.eye(1, D_MODEL)
    writer = ResidualWriter(tensor_name="nowhere", role="mlp", layer=0, residual_axis=0)
    with pytest.raises(CheckpointError, match="no tensor nowhere"):
        list(measure_survivors(checkpoint, base=None, writers=[writer], removed=RemovedDirections(subspace=subspace)))
    behind = replace(writer, norm_chain=(PostNorm(weight="post.weight"),))
    with pytest.raises(CheckpointError, match=r"no tensor post\.weight"):
        directions_through(checkpoint, RemovedDirections(subspace=subspace), writers=[behind])


def test_a_norm_that_is_not_finite_is_refused(base):
    change(base, "model.norm.weight", lambda w: w * float("nan"))
    chain = (PostNorm(weight="model.norm.weight"),)
    writer = ResidualWriter(tensor_name=DOWN, role="mlp", layer=2, residual_axis=0, norm_chain=chain)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds NaN"):
        directions_through(
            open_checkpoint(base),
            RemovedDirections(subspace=np.eye(1, D_MODEL)),
            writers=[writer],
        )
    assert effective_directions(torch.eye(1, 4), norms=[]).dtype == torch.float64
