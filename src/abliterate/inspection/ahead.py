"""Files that the system is asked for before they are needed, so that the disk works while something else does.

What is asked for is read into the page cache and costs no memory of the process. Systems that have no such call (macOS,
Windows) read ahead by themselves, and nothing is asked of them. This module needs no torch, as it is there to be called
before that is loaded.
"""

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from threading import Thread

# So much is asked for before it is needed, and so much of that in one call.
_AHEAD, _AT_ONCE = 8 << 20, 1 << 20
# Of all files together before anything else is done: what a fast disk gives in the seconds that torch takes.
MOST_BYTES = 1 << 30


class Ahead:
    """Asks for a range of an open file, some of it at a time.

    Args:
        descriptor: The file's.
        start: Where the range begins.
        end: And ends.
    """

    def __init__(self, descriptor: int, start: int, end: int) -> None:
        """Ask for nothing yet."""
        self.end = end
        self._descriptor, self._asked = descriptor, start

    def ask(self, position: int) -> None:
        """Ask for what follows a position."""
        while self._asked < min(self.end, position + _AHEAD) and hasattr(os, "posix_fadvise"):
            size = min(_AT_ONCE, self.end - self._asked)
            os.posix_fadvise(self._descriptor, self._asked, size, os.POSIX_FADV_WILLNEED)
            self._asked += size


def begin_reading(directories: Sequence[Path], *, most: int = MOST_BYTES) -> Thread | None:
    """Ask for the first bytes of the weights in some directories, in a thread of their own; errors are left to others.

    Args:
        directories: Where safetensors files lie; what is none is passed over.
        most: So many bytes of all together.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    thread = Thread(target=_ask_for, args=(directories, most // max(1, len(directories))), daemon=True)
    thread.start()
    return thread


def _ask_for(directories: Sequence[Path], each: int) -> None:
    lists = [list(_beginnings(directory, each)) for directory in directories]
    # A part of each in turn, as they will be read.
    for index in range(max(map(len, lists), default=0)):
        for path, start, end in (parts[index] for parts in lists if index < len(parts)):
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            except OSError:
                continue
            try:
                Ahead(descriptor, start, end).ask(end)
            except OSError:
                continue
            finally:
                os.close(descriptor)


def _beginnings(directory: Path, most: int) -> list[tuple[Path, int, int]]:
    """Return parts of the first files, in order."""
    parts: list[tuple[Path, int, int]] = []
    for path in sorted(directory.glob("*.safetensors")):
        try:
            found = path.stat()
        except OSError:
            continue
        size = min(found.st_size, most) if stat.S_ISREG(found.st_mode) else 0
        parts += [(path, start, min(size, start + _AHEAD)) for start in range(0, size, _AHEAD)]
        most -= size
    return parts
