"""What it takes to move bytes between files and memory without the page cache.

A page of the cache costs more than the copy into it: it must be found, zeroed and, on a guest, backed by its host.
A file that is read once and one that is not read soon are better moved by the disk itself, which asks for positions,
lengths and memory at block boundaries. Where a system or file system cannot do that, nothing here is used.
"""

import contextlib
import ctypes
import mmap
import os
import platform
import sys
from pathlib import Path

# A multiple of what any common disk asks for.
BOUNDARY = 4096

# The system call has the same number on every architecture of Linux but one. It is there since version 6.5.
_CACHESTAT = 451
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" and platform.machine() != "alpha" else None


class AlignedMemory:
    """Memory that begins at a block boundary, taken once and used again and again."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, BOUNDARY)

    def take(self, size: int) -> memoryview:
        """Return `size` bytes, the same memory each time, with what its last user left."""
        if size > len(self._map):
            self._map = mmap.mmap(-1, size)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                # Columns of a matrix are far apart. It is only advice.
                with contextlib.suppress(OSError):
                    self._map.madvise(mmap.MADV_HUGEPAGE)
        return memoryview(self._map)[:size]


def open_direct(path: Path, flags: int) -> int | None:
    """Open a file that is there so that the page cache is left out; None where that cannot be."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return None


def is_cached(descriptor: int, offset: int, count: int) -> bool:
    """Return whether most of a range of a file lies in the page cache; False where the kernel does not say."""
    if _LIBC is None:
        return False
    wanted = (ctypes.c_uint64 * 2)(offset, count)
    found = (ctypes.c_uint64 * 5)()
    if _LIBC.syscall(_CACHESTAT, descriptor, ctypes.byref(wanted), ctypes.byref(found), 0):
        return False
    pages: int = found[0]
    return 2 * pages * mmap.PAGESIZE >= count


def address(data: memoryview) -> int | None:
    """Return where in memory the bytes lie, or None if they may not be written to."""
    return None if data.readonly else ctypes.addressof(ctypes.c_char.from_buffer(data))


def round_up(value: int) -> int:
    """Return the next block boundary."""
    return -(-value // BOUNDARY) * BOUNDARY
