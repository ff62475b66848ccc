"""Asking the kernel for files before they are needed, so that the disk reads while Python imports."""

import os
import threading
from pathlib import Path

# More than this share of the memory may push other files out of the page cache, and these before they are used.
_MOST_OF_MEMORY = 0.25
# The kernel answers a request with no more than its window, which is a few MiB.
_REQUEST_BYTES = 2 << 20


def read_ahead(directory: Path, *, pattern: str = "*.safetensors") -> None:
    """Have the kernel bring the first files of a directory into memory, in a thread of its own.

    Nothing depends on it: where the system has no such request, or a file cannot be read, nothing happens.
    """
    if hasattr(os, "posix_fadvise"):
        threading.Thread(
            target=_request, args=(sorted(directory.glob(pattern)),), name="read-ahead", daemon=True
        ).start()


def _request(paths: list[Path]) -> None:
    left = int(_MOST_OF_MEMORY * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in paths:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            size = min(os.fstat(descriptor).st_size, left)
            for offset in range(0, size, _REQUEST_BYTES):
                os.posix_fadvise(descriptor, offset, _REQUEST_BYTES, os.POSIX_FADV_WILLNEED)
        except OSError:
            continue
        finally:
            os.close(descriptor)
        left -= size
