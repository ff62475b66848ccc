"""Ranges of bytes of open files: read, written, and copied by the kernel, each at its own place.

Positions are given with each call, so several threads can work on one file. A range that the kernel copies never
passes through this process, and shares its blocks with the original where the file system can do that.
"""

import contextlib
import errno
import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from abliterate.errors import CheckpointError

_CHUNK_BYTES = 4 << 20

# Of ioctl, in linux/fs.h: let one file have the blocks of another.
_FICLONE = 0x40049409

# What a kernel or file system answers that cannot copy this way, or not between these two files.
_CANNOT_COPY = {errno.ENOSYS, errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF, errno.ETXTBSY, errno.EPERM}


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

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise unreadable(path, error) from error
        self._state = self._look()

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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

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

    def __init__(self, path: Path, *, size: int) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        os.ftruncate(self.descriptor, size)
        self._state = self._look()

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of `data` at `offset`.

        Raises:
            OSError: The disk is full or faulty; the error names the file.
        """
        done = 0
        while done < len(data):
            try:
                count = write_some(self.descriptor, data[done:], offset + done)
            except OSError as error:
                raise self._named(error) from error
            if not count:
                raise OSError(errno.EIO, "nothing could be written", str(self.path))
            done += count

    def copy(self, source: SourceFile, *, start: int, offset: int, count: int) -> int:
        """Copy `count` bytes of `source` from `start` on to `offset`, in the kernel where it can.

        Returns:
            How many of them the kernel copied.

        Raises:
            CheckpointError: The source cannot be read, or ends too early.
            OSError: The disk is full or faulty; the error names the file.
        """
        done = 0
        # Linux alone has it.
        by_kernel = getattr(os, "copy_file_range", None)
        while by_kernel is not None and done < count:
            try:
                copied = by_kernel(source.descriptor, self.descriptor, count - done, start + done, offset + done)
            except OSError as error:
                if error.errno not in _CANNOT_COPY:
                    raise self._named(error) from error
                break
            if not copied:
                # Some file systems copy nothing and say no more; a file that has ended is found by reading it.
                break
            done += copied
        self._copy_by_hand(source, start=start + done, offset=offset + done, count=count - done)
        return done

    def begin_sync(self, offset: int, count: int) -> None:
        """Have the kernel begin to bring a range to the disk, so that `sync` has less to wait for; where it can."""
        if count and hasattr(os, "posix_fadvise"):
            # Of pages that are not on the disk yet this drops none, and begins to write them. It is only advice.
            with contextlib.suppress(OSError):
                os.posix_fadvise(self.descriptor, offset, count, os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        """Wait until all that was written is on the disk.

        Raises:
            OSError: It cannot be brought there; the error names the file.
        """
        try:
            os.fsync(self.descriptor)
        except OSError as error:
            raise self._named(error) from error

    def _copy_by_hand(self, source: SourceFile, *, start: int, offset: int, count: int) -> None:
        buffer = memoryview(bytearray(min(count, _CHUNK_BYTES)))
        for done in range(0, count, _CHUNK_BYTES):
            chunk = buffer[: min(_CHUNK_BYTES, count - done)]
            source.read_into(chunk, start + done)
            self.write(chunk, offset + done)

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
