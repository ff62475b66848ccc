"""A file as Linux serves it best: moved past the page cache, and sharing its blocks with others.

A page of the cache costs more than the copy into it: it must be found, zeroed and, on a guest, backed by its host. A
file that is read once and one that is not read soon are better moved by the disk itself, which asks for positions,
lengths and memory at block boundaries. The rest goes through the cache; the two may be mixed in one file, since the
kernel keeps them consistent. Where a file system can do none of this, everything goes through the cache.
"""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import platform
import struct
from pathlib import Path

from abliterate.checkpoints import file_ranges
from abliterate.checkpoints.file_ranges import BOUNDARY, PlainFile, address, unreadable

# Less than this is not worth a request to the disk of its own.
_LEAST_DIRECT = 1 << 16

# Of ioctl, in linux/fs.h: let one file have the blocks of another, all of them or a range.
_FICLONE = 0x40049409
_FICLONERANGE = 0x4020940D


# The system call has the same number on every architecture but one. It is there since version 6.5.
_CACHESTAT = 451
_LIBC = ctypes.CDLL(None) if platform.machine() != "alpha" else None


class LinuxFile(PlainFile):
    """See `PlainFile`."""

    def __init__(self, path: Path, *, size: int | None = None) -> None:
        super().__init__(path, size=size)
        flags = os.O_RDONLY if size is None else os.O_RDWR
        self._direct = open_direct(path, flags) if self.size >= _LEAST_DIRECT else None
        self._goes_direct = self._direct is not None
        if size is not None:
            # The kernel must not read ahead into ranges that another thread is about to write past the page cache.
            # It is only advice, and not every file system takes it.
            with contextlib.suppress(OSError):
                os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def is_hole(self, offset: int, count: int) -> bool:
        """See `PlainFile.is_hole`."""
        try:
            # Nothing here reads or writes at the position that this moves.
            return os.lseek(self.descriptor, offset, os.SEEK_DATA) >= offset + count
        except OSError as error:
            # There is no data up to the end.
            return error.errno == errno.ENXIO and offset + count <= self.size

    def share(self, source: PlainFile, *, start: int, offset: int, count: int) -> int:
        """See `PlainFile.share`."""
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

    def close(self) -> None:
        """See `PlainFile.close`."""
        super().close()
        if self._direct is not None:
            os.close(self._direct)
            self._direct, self._goes_direct = None, False

    def _read_blocks(self, room: memoryview, start: int, least: int) -> int:
        if not self._goes_direct or least < _LEAST_DIRECT or is_cached(self.descriptor, start, least):
            return 0
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

    def _read_some(self, buffer: memoryview, offset: int) -> int:
        return os.preadv(self.descriptor, [buffer], offset)

    def _write_some(self, data: memoryview, offset: int) -> int:
        place = address(data) if self._goes_direct and len(data) >= _LEAST_DIRECT else None
        if self._direct is None or place is None or (place - offset) % BOUNDARY:
            return file_ranges.write_some(self.descriptor, data, offset)
        if lead := -offset % BOUNDARY:
            return file_ranges.write_some(self.descriptor, data[:lead], offset)
        try:
            return file_ranges.write_some(self._direct, data[: len(data) - len(data) % BOUNDARY], offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._goes_direct = False
            return file_ranges.write_some(self.descriptor, data, offset)


def open_direct(path: Path, flags: int) -> int | None:
    """Open a file that is there so that the page cache is left out; None where that cannot be."""
    try:
        return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return None


def is_cached(descriptor: int, offset: int, count: int) -> bool:
    """Return whether most of a range of a file lies in the page cache; False where the kernel does not say.

    Without it a source that is in the cache would be read from the disk again, or one that is not through the cache:
    the first costs 7 to 11 % of an edit, the second 24 % (benchmarks/README.md).
    """
    if _LIBC is None:
        return False
    wanted = (ctypes.c_uint64 * 2)(offset, count)
    found = (ctypes.c_uint64 * 5)()
    if _LIBC.syscall(_CACHESTAT, descriptor, ctypes.byref(wanted), ctypes.byref(found), 0):
        return False
    pages: int = found[0]
    return 2 * pages * mmap.PAGESIZE >= count


def clones(source: Path, directory: Path) -> bool:
    """Return whether a file in `directory` can have the blocks of `source`; tried with one that is removed again."""
    trial = directory / f".shared-{os.getpid()}"
    try:
        with source.open("rb") as reader, trial.open("xb") as writer:
            fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
    except OSError:
        return False
    finally:
        trial.unlink(missing_ok=True)
    return True
