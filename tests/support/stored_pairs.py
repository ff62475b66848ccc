"""Pairs of stored matrices for the tests of `inspection`."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from abliterate.checkpoints.safetensors_file import TensorInfo, read_shard
from abliterate.inspection.numbers import MatrixPair, matrices_of


def stored(path: Path, weight: torch.Tensor) -> TensorInfo:
    """Write a tensor into a file of its own."""
    save_file({"w": weight.contiguous()}, path)
    return read_shard(path).tensors[0]


def pairs_of(work: Path, old: torch.Tensor, new: torch.Tensor) -> list[MatrixPair]:
    """Store two tensors and return them as pairs of matrices."""
    infos = stored(work / "old.safetensors", old), stored(work / "new.safetensors", new)
    return matrices_of(*infos, old_directory=work, new_directory=work)


def pair_of(work: Path, old: torch.Tensor, new: torch.Tensor) -> MatrixPair:
    """Store two matrices."""
    (pair,) = pairs_of(work, old, new)
    return pair


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return normal random numbers, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
