"""Memory to compute in, taken once: new memory for each block costs more than the arithmetic on it."""

import torch
from torch import Tensor


class Scratch:
    """Memory that one thread works in, block after block."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return [size], the same memory for a name each time, with what its last user left."""
        key = (name, dtype, device)
        if key not in self._kept or len(self._kept[key]) < size:
            self._kept[key] = torch.empty(size, dtype=dtype, device=device)
        return self._kept[key][:size]
