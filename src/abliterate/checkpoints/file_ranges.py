"""Ranges of bytes of open files: read, written, and shared between files, each at its own place.

Positions are given with each call, so several threads can work on one file. What is large moves between disk and
memory without the page cache where that can be (see `direct_io`), and all else through it; the two may be mixed in one
file, since the kernel keeps them consistent.

What it takes to move bytes between files and memory without the page cache.

A page of the cache costs more than the copy into it: it must be found, zeroed and, on a guest, backed by its host.
A file that is read once and one that is not read soon are better moved by the disk itself, which asks for positions,
lengths and memory at block boundaries. Where a system or file system cannot do that, nothing here is used.

Memory to compute in, taken once: new memory for each block costs more than the arithmetic on it.
"""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import platform
import struct
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from abliterate.errors import CheckpointError

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


# Less than this is not worth a request to the disk of its own.
_LEAST_DIRECT = 1 << 16

# Of ioctl, in linux/fs.h: let one file have the blocks of another, all of them or a range.
_FICLONE = 0x40049409
_FICLONERANGE = 0x4020940D


def write_some(descriptor: int, data: memoryview, offset: int) -> int:
    """Write part of `data` at `offset` and return how many bytes: the one place from which bytes are written."""
    return os.pwrite(descriptor, data, offset)


class SourceFile:
    """A file that is read, and that must not change until it is closed.

    Args:
        path: The file.

    Raises:
        CheckpointError: It cannot be opened.
    """

    _FLAGS = os.O_RDONLY

    def __init__(self, path: Path) -> None:
        try:
            descriptor = os.open(path, self._FLAGS | os.O_CLOEXEC)
        except OSError as error:
            raise unreadable(path, error) from error
        self._take(path, descriptor)

    def _take(self, path: Path, descriptor: int) -> None:
        self.path, self.descriptor = path, descriptor
        self._state = self._look()
        self._direct = open_direct(path, self._FLAGS) if self.size >= _LEAST_DIRECT else None
        self._goes_direct = self._direct is not None

    def read(self, offset: int, count: int, memory: AlignedMemory) -> memoryview:
        """Return `count` bytes from `offset` on, as far from a block boundary in `memory` as they are in the file.

        Raises:
            CheckpointError: The file cannot be read, or ends too early.
        """
        lead = offset % BOUNDARY
        room = memory.take(round_up(lead + count))
        done = lead
        if self._goes_direct and count >= _LEAST_DIRECT and not is_cached(self.descriptor, offset, count):
            done = max(lead, self._read_direct(room, offset - lead, lead + count))
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
                count = os.preadv(self.descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                raise unreadable(self.path, error) from error
            if not count:
                raise became_shorter(self.path)
            done += count

    @property
    def size(self) -> int:
        """Its size when it was opened."""
        return self._state[0]

    def check_unchanged(self) -> None:
        """Check that size and time of change are what they were when the file was opened.

        Raises:
            CheckpointError: They are not.
        """
        if self._look() != self._state:
            raise CheckpointError(f"{self.path}: it was changed while it was being read; run again when it is at rest")

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)
        if self._direct is not None:
            os.close(self._direct)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _read_direct(self, room: memoryview, start: int, least: int) -> int:
        """Read whole blocks into `room`, until `least` bytes are there or the disk gives no whole block."""
        done = 0
        while self._direct is not None and done < least and done % BOUNDARY == 0:
            try:
                count = os.preadv(self._direct, [room[done:]], start + done)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise unreadable(self.path, error) from error
                self._goes_direct = False
                break
            if not count:
                break
            done += count
        return min(done, least)

    def _look(self) -> tuple[int, int]:
        found = os.fstat(self.descriptor)
        return found.st_size, found.st_mtime_ns


class TargetFile(SourceFile):
    """A new file of a known size that is written in any order and read back.

    Args:
        path: The file; it must not be there.
        size: Its size in bytes.

    Raises:
        OSError: It cannot be made.
    """

    _FLAGS = os.O_RDWR

    def __init__(self, path: Path, *, size: int) -> None:
        descriptor = os.open(path, self._FLAGS | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        os.ftruncate(descriptor, size)
        self._take(path, descriptor)
        # The kernel must not read ahead into ranges that another thread is about to write past the page cache.
        self._advise(0, 0, "POSIX_FADV_RANDOM")

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of `data` at `offset`: past the page cache what lies at block boundaries of both file and memory.

        Raises:
            OSError: The disk is full or faulty; the error names the file.
        """
        place = address(data) if self._goes_direct and len(data) >= _LEAST_DIRECT else None
        is_aligned = place is not None and (place - offset) % BOUNDARY == 0
        done = 0
        while done < len(data):
            descriptor, count = self.descriptor, len(data) - done
            if is_aligned and self._goes_direct and self._direct is not None and count >= BOUNDARY:
                lead = -(offset + done) % BOUNDARY
                descriptor, count = (self.descriptor, lead) if lead else (self._direct, count - count % BOUNDARY)
            try:
                written = write_some(descriptor, data[done : done + count], offset + done)
            except OSError as error:
                if error.errno == errno.EINVAL and descriptor == self._direct:
                    self._goes_direct = False
                    continue
                raise self._named(error) from error
            if not written:
                raise OSError(errno.EIO, "nothing could be written", str(self.path))
            done += written

    def share(self, source: SourceFile, *, start: int, offset: int, count: int) -> int:
        """Have `count` bytes of `source` from `start` on at `offset`, in blocks that both files share.

        Returns:
            How many of them are shared; the ends, which fill no block, are copied. 0: this file system cannot share,
            or not between these files, and nothing was written.

        Raises:
            CheckpointError: The source cannot be read, or ends too early.
            OSError: The disk is full or faulty; the error names the file.
        """
        lead = -start % BOUNDARY
        shared = (count - lead) // BOUNDARY * BOUNDARY
        if (start - offset) % BOUNDARY or shared <= 0:
            return 0
        request = struct.pack("=qQQQ", source.descriptor, start + lead, shared, offset + lead)
        try:
            fcntl.ioctl(self.descriptor, _FICLONERANGE, request)
        except OSError:
            return 0
        for first, end in ((0, lead), (lead + shared, count)):
            part = memoryview(bytearray(end - first))
            source.read_into(part, start + first)
            self.write(part, offset + first)
        return shared

    def begin_sync(self, offset: int, count: int) -> None:
        """Have the kernel begin to bring a range to the disk, so that `sync` has less to wait for; where it can."""
        if count:
            # Of pages that are not on the disk yet this drops none, and begins to write them.
            self._advise(offset, count, "POSIX_FADV_DONTNEED")

    def sync(self) -> None:
        """Wait until all that was written is on the disk.

        Raises:
            OSError: It cannot be brought there; the error names the file.
        """
        try:
            os.fsync(self.descriptor)
        except OSError as error:
            raise self._named(error) from error

    def _advise(self, offset: int, count: int, advice: str) -> None:
        # It is only advice, and not every system takes it.
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(self.descriptor, offset, count, getattr(os, advice))

    def _named(self, error: OSError) -> OSError:
        return OSError(error.errno, error.strerror, str(self.path))


def can_share_blocks(source: Path, directory: Path) -> bool:
    """Return whether a file in `directory` can share its blocks with `source`, so that a copy takes no space.

    Tried with a file that is removed again.
    """
    trial = directory / f".shared-{os.getpid()}"
    try:
        with source.open("rb") as reader, trial.open("xb") as writer:
            fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
    except OSError:
        return False
    finally:
        trial.unlink(missing_ok=True)
    return True


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """Return the error about a file that could not be read."""
    return CheckpointError(f"{path}: cannot be read: {error.strerror or error}")


def became_shorter(path: Path) -> CheckpointError:
    """Return the error about a file that ended before it should."""
    return CheckpointError(
        f"{path}: it became shorter while it was being read; the file is damaged or incomplete, download it again"
    )


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
