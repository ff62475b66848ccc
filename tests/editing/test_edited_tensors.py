"""Cut into blocks anywhere, a tensor gives the bytes that it gives whole."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import abliterate.formats.projection
from abliterate.checkpoints.file_ranges import AlignedMemory, open_file
from abliterate.checkpoints.safetensors_file import TensorInfo
from abliterate.checkpoints.stored_tensors import TORCH_DTYPES, tensor_bytes
from abliterate.editing.edited_tensors import blocks_of
from abliterate.formats.component import component_and_norm
from abliterate.formats.projection import project_out
from abliterate.formats.stored_component import ComponentMeter

SHAPES = [((40, 24), 0), ((40, 24), 1), ((24,), 0), ((3, 24, 17), 1), ((5, 7, 24), 2), ((24, 1), 0), ((24, 3, 5), 0)]


def info_of(shape, dtype="BF16", start=0) -> TensorInfo:
    size = math.prod(shape) * TORCH_DTYPES[dtype].itemsize
    return TensorInfo(name="w", shard="x", dtype=dtype, shape=tuple(shape), start=start, end=start + size)


def basis(d_model: int, k: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(d_model)
    return torch.linalg.qr(torch.randn(d_model, k, generator=generator, dtype=torch.float64))[0].T.contiguous()


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(SHAPES), st.sampled_from(["BF16", "F32"]), st.integers(1, 4000), st.integers(1, 9), st.booleans()
)
def test_blocks_give_the_bytes_of_the_whole(tmp_path_factory, shape_axis, dtype, budget, width, preserve_norms):
    shape, axis = shape_axis
    path = tmp_path_factory.mktemp("blocks")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(budget)).to(TORCH_DTYPES[dtype])
    directions = basis(shape[axis], 2)
    prefix = b"header..."
    (path / "source").write_bytes(prefix + bytes(tensor_bytes(weight)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(abliterate.formats.projection, "_BLOCK_ELEMENTS", width * shape[axis])
        whole = project_out(weight, directions=directions, residual_axis=axis, preserve_norms=preserve_norms)
        blocks = blocks_of(info_of(shape, dtype), residual_axis=axis, budget=budget)
        memory = AlignedMemory()
        with open_file(path / "source") as source, open_file(path / "target", size=len(prefix) + weight.nbytes) as to:
            for block in reversed(blocks):
                buffer = block.read(source, memory, start=len(prefix))
                part = torch.frombuffer(buffer, dtype=weight.dtype).view(block.shape)
                project_out(part, directions=directions, residual_axis=1, preserve_norms=preserve_norms, out=part)
                block.write(to, buffer, start=len(prefix))
    assert (path / "target").read_bytes()[len(prefix) :] == bytes(tensor_bytes(whole))
    least = shape[axis] * weight.itemsize
    assert all(block.nbytes <= max(budget, least) for block in blocks)
    assert sum(block.nbytes for block in blocks) == weight.nbytes


def test_an_empty_tensor_has_no_blocks():
    assert blocks_of(info_of((0, 8)), residual_axis=1) == ()


def test_a_tensor_of_the_budget_is_one_range():
    block, *others = blocks_of(info_of((64, 32)), residual_axis=0, budget=64 * 32 * 2)
    assert not others
    assert block.n_pieces == 1


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(SHAPES), st.integers(1, 50), st.integers(1, 3))
def test_the_meter_measures_what_component_and_norm_measures(shape_axis, step, k):
    shape, axis = shape_axis
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float32)
    directions = basis(shape[axis], k)
    meter = ComponentMeter(directions.numpy(), shape=shape, residual_axis=axis, dtype="F32")
    for rows in weight.reshape(-1, meter.row_length).split(step):
        meter.add(rows.numpy())
    found = component_and_norm(weight, directions=directions, residual_axis=axis)
    assert meter.result() == pytest.approx(found, rel=1e-12)
