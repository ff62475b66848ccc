"""Hidden states that wait for their next layer: in memory up to a limit, beyond it in files."""

import tempfile
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from abliterate.errors import InputError

Key = tuple[int, int]

MEMORY_BYTES = 128 << 20


class HiddenStore:
    """Tensors by key. A context manager: leaving it deletes the files.

    Files are read and written whole, not mapped, so that what lies in them takes no memory of this process.

    Args:
        directory: where to make the directory of the files; None: the system's place for temporary files.
        memory_bytes: how much to keep in memory before files are used.
    """

    def __init__(self, directory: Path | None = None, *, memory_bytes: int = MEMORY_BYTES) -> None:
        self._files = tempfile.TemporaryDirectory(prefix=".abliterate-layers-", dir=directory)
        self._left = memory_bytes
        self._in_memory: dict[Key, Tensor] = {}
        self._in_files: dict[Key, tuple[torch.dtype, torch.Size]] = {}

    def __enter__(self) -> "HiddenStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.cleanup()

    @property
    def n_in_files(self) -> int:
        """How many tensors lie in files."""
        return len(self._in_files)

    def put(self, key: Key, hidden: Tensor) -> None:
        """Keep a tensor in the place of what was there under this key.

        Raises:
            InputError: there is no room on the disk.
        """
        hidden = hidden.detach().cpu().contiguous()
        self.drop(key)
        if hidden.nbytes <= self._left:
            self._left -= hidden.nbytes
            self._in_memory[key] = hidden
            return
        try:
            hidden.view(torch.uint8).numpy().tofile(self._path(key))
        except OSError as error:
            raise InputError(
                f"{self._files.name}: hidden states cannot be written here: {error.strerror or error}; "
                "write the output to a disk with more room, or give fewer prompts (--n-val)"
            ) from error
        self._in_files[key] = (hidden.dtype, hidden.shape)

    def get(self, key: Key) -> Tensor:
        """Return the tensor under this key; it stays, and is not to be changed."""
        if key in self._in_memory:
            return self._in_memory[key]
        dtype, shape = self._in_files[key]
        return torch.from_numpy(np.fromfile(self._path(key), dtype=np.uint8)).view(dtype).reshape(shape)

    def drop(self, key: Key) -> None:
        """Forget the tensor under this key, if there is one."""
        if key in self._in_memory:
            self._left += self._in_memory.pop(key).nbytes
        elif self._in_files.pop(key, None) is not None:
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: Key) -> Path:
        return Path(self._files.name) / f"{key[0]}.{key[1]}"
