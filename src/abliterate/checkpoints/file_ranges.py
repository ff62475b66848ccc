"""Ranges of bytes of open files, each read and written at its own place, and the memory that they pass through.

Positions are given with each call, so several threads can work on one file. `open_file` is the one door: it gives the
class that serves this system best, `LinuxFile` on Linux and `PlainFile`, which needs nothing of any system,
elsewhere. Both read and write the same bytes.
"""

import ctypes
import errno
import hashlib
import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from abliterate.errors import CheckpointError
from abliterate.progress import Advance

# A multiple of what any common disk asks for.
BOUNDARY = 4096


class AlignedMemory:
    """Memory that begins at a block boundary, taken once and used again: new memory costs more than arithmetic."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, BOUNDARY)

    def take(self, size: int) -> memoryview:
        """Return `size` bytes, the same memory each time, with what its last user left."""
        if size > len(self._map):
            self._map = mmap.mmap(-1, size)
        return memoryview(self._map)[:size]


def address(data: memoryview) -> int | None:
    """Return where in memory the bytes lie, or None if they may not be written to."""
    return None if data.readonly else ctypes.addressof(ctypes.c_char.from_buffer(data))


def round_up(value: int) -> int:
    """Return the next block boundary."""
    return -(-value // BOUNDARY) * BOUNDARY


def write_some(descriptor: int, data: memoryview, offset: int) -> int:
    """Write part of `data` at `offset` and return how many bytes: the one place from which bytes are written."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, data, offset)
    os.lseek(descriptor, offset, os.SEEK_SET)
    return os.write(descriptor, data)


class PlainFile:
    """An open file that any system can serve: one that is there, or a new one of a known size.

    Args:
        path: The file.
        size: Of a new file, its bytes; it is written in any order and read back. None: the file is there, is only
            read, and must not change until it is closed.

    Raises:
        CheckpointError: A file that should be there cannot be opened.
        OSError: A new file cannot be made, or is there already.
    """

    def __init__(self, path: Path, *, size: int | None = None) -> None:
        self.path = path
        if size is None:
            try:
                self._file = path.open("rb", buffering=0)
            except OSError as error:
                raise unreadable(path, error) from error
        else:
            self._file = path.open("x+b", buffering=0)
            self._file.truncate(size)
        # A position that is set and then used must not be moved by another thread in between.
        self._lock = threading.Lock()
        self._state = self._look()

    @property
    def descriptor(self) -> int:
        """The number by which the system knows the file."""
        return self._file.fileno()

    @property
    def size(self) -> int:
        """Its size when it was opened."""
        return self._state[0]

    def read(self, offset: int, count: int, memory: AlignedMemory) -> memoryview:
        """Return `count` bytes from `offset` on, as far from a block boundary in `memory` as they are in the file.

        Raises:
            CheckpointError: The file cannot be read, or ends too early.
        """
        lead = offset % BOUNDARY
        room = memory.take(round_up(lead + count))
        done = max(lead, self._read_blocks(room, offset - lead, lead + count))
        self.read_into(room[done : lead + count], offset - lead + done)
        return room[lead : lead + count]

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from `offset` on.

        Raises:
            CheckpointError: The file cannot be read, or ends too early.
        """
        done = 0
        while done < len(buffer):
            try:
                count = self._read_some(buffer[done:], offset + done)
            except OSError as error:
                raise unreadable(self.path, error) from error
            if not count:
                raise became_shorter(self.path)
            done += count

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of `data` at `offset`.

        Raises:
            OSError: The disk is full or faulty; the error names the file.
        """
        done = 0
        while done < len(data):
            try:
                written = self._write_some(data[done:], offset + done)
            except OSError as error:
                raise self._named(error) from error
            if not written:
                raise OSError(errno.EIO, "nothing could be written", str(self.path))
            done += written

    def is_hole(self, offset: int, count: int) -> bool:  # noqa: ARG002
        """Return whether a range is known to take no room on the disk, so that it reads as zeros."""
        return False

    def share(self, source: "PlainFile", *, start: int, offset: int, count: int) -> int:  # noqa: ARG002
        """Have `count` bytes of `source` from `start` on at `offset`, in blocks that both files share.

        Returns:
            How many of them are shared; the ends, which fill no block, are copied. 0: this system or file system
            cannot share, or not between these files, and nothing was written.

        Raises:
            CheckpointError: The source cannot be read, or ends too early.
            OSError: The disk is full or faulty; the error names the file.
        """
        return 0

    def sync(self) -> None:
        """Wait until all that was written is on the disk.

        Raises:
            OSError: It cannot be brought there; the error names the file.
        """
        try:
            os.fsync(self.descriptor)
        except OSError as error:
            raise self._named(error) from error

    def check_unchanged(self) -> None:
        """Check that size and time of change are what they were when the file was opened.

        Raises:
            CheckpointError: They are not.
        """
        if self._look() != self._state:
            raise CheckpointError(f"{self.path}: it was changed while it was being read; run again when it is at rest")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _read_blocks(self, room: memoryview, start: int, least: int) -> int:  # noqa: ARG002
        """Read whole blocks from `start` on where that is a faster way; return how many of `least` bytes are there."""
        return 0

    def _read_some(self, buffer: memoryview, offset: int) -> int:
        with self._lock:
            self._file.seek(offset)
            return self._file.readinto(buffer) or 0

    def _write_some(self, data: memoryview, offset: int) -> int:
        with self._lock:
            return write_some(self.descriptor, data, offset)

    def _look(self) -> tuple[int, int]:
        found = os.fstat(self.descriptor)
        return found.st_size, found.st_mtime_ns

    def _named(self, error: OSError) -> OSError:
        return OSError(error.errno, error.strerror, str(self.path))


def open_file(path: Path, *, size: int | None = None) -> PlainFile:
    """Open a file in the way that serves this system best; see `PlainFile` for the arguments and errors."""
    if sys.platform == "linux":
        from abliterate.checkpoints.linux_file import LinuxFile

        return LinuxFile(path, size=size)
    return PlainFile(path, size=size)


def can_share_blocks(source: Path, directory: Path) -> bool:
    """Return whether a file in `directory` can share its blocks with `source`, so that a copy takes no space."""
    if sys.platform == "linux":
        from abliterate.checkpoints.linux_file import clones

        return clones(source, directory)
    return False


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """Return the error about a file that could not be read."""
    return CheckpointError(f"{path}: cannot be read: {error.strerror or error}")


def became_shorter(path: Path) -> CheckpointError:
    """Return the error about a file that ended before it should."""
    return CheckpointError(
        f"{path}: it became shorter while it was being read; the file is damaged or incomplete, download it again"
    )


def is_filled(file: FileIO, memory: memoryview) -> bool:
    """Read on into memory until it is full; return False where the file ends before."""
    done = 0
    while done < len(memory):
        count = file.readinto(memory[done:])
        if not count:
            return False
        done += count
    return True


_CHUNK_BYTES = 1 << 20
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenFile:
    """What was written to one file."""

    sha256: str
    bytes: int


def hash_file(path: Path, *, advance: Advance = lambda _bytes: None) -> str:
    """Return the SHA-256 of a file; `advance` is told the bytes read."""
    digest = hashlib.sha256()
    # Memory that is taken anew for each chunk costs more than reading it.
    memory = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as reader:
        while count := reader.readinto(memory):
            digest.update(memory[:count])
            advance(count)
    return digest.hexdigest()


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield what a function returns of each item, in their order, as many at a time as there are cores."""
    with ThreadPoolExecutor(max_workers=n_cores()) as pool:
        try:
            yield from pool.map(function, items)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def n_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
