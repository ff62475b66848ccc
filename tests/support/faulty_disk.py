"""A disk on which something happens at a chosen moment: the process is killed, the disk is full, another one acts.

Every change of a file that this process makes below a root is counted, in the order in which it is made: what Python
opens for writing, makes, renames and removes by audit events, and what has none (bytes written, flushes, renames by
renameat2) at the places of the source that do it. From the moment of a kill on nothing changes any more, whatever
`except` and `finally` try to do, as it would be for a process that is gone; its open files are closed, so its locks
are free.
"""

import errno
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from abliterate.checkpoints import atomic_directory, file_ranges
from tests.support.fuzzing import changed_places


class KilledError(BaseException):
    """The process is gone. No `except Exception` on the way catches it, and what does gets no further."""


Action = Callable[[], None]
_NEEDS_ROOM = {"open", "os.mkdir", "write", "write line"}


class FaultyDisk:
    """What happens below a directory, and when.

    Args:
        root: The directory.
        at: The number of the change before which it happens; None: nothing does.
        event: "kill", "full" (from then on), "interrupt" (Ctrl-C), "io" (a flush or rename fails, once).
        action: Instead of an event: what another process does at that moment.
        can_exchange: Whether the file system can let two directories change places.
    """

    def __init__(
        self,
        root: Path,
        *,
        at: int | None = None,
        event: str | None = None,
        action: Action | None = None,
        can_exchange: bool = True,
    ) -> None:
        self.root, self.at, self.event, self.action, self.can_exchange = root, at, event, action, can_exchange
        self.count = 0
        self.happened = False
        self._is_dead = self._is_full = False
        self._acting = 0
        self._lock = threading.Lock()

    def step(self, kind: str, path: Path) -> None:
        """Count a change that is about to be made, and let happen what is to happen before it."""
        if self._acting or not path.is_relative_to(self.root):
            return
        with self._lock:
            if self._is_dead:
                raise KilledError
            if self._is_full and kind in _NEEDS_ROOM:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            self.count += 1
            if self.happened or self.at is None or self.count < self.at:
                return
            if self.event == "full" and kind not in _NEEDS_ROOM:
                return
            if self.event == "io" and kind not in {"flush", "os.rename", "exchange"}:
                return
            self.happened = True
            if self.action is None:
                self._happen(path)
        self._act()

    def _happen(self, path: Path) -> None:
        if self.event == "kill":
            self._is_dead = True
            raise KilledError
        if self.event == "interrupt":
            raise KeyboardInterrupt
        self._is_full = self.event == "full"
        code = errno.ENOSPC if self._is_full else errno.EIO
        raise OSError(code, os.strerror(code), str(path))

    def _act(self) -> None:
        assert self.action is not None
        self._acting += 1
        try:
            self.action()
        finally:
            self._acting -= 1

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let the process work on this disk."""
        if not _hooked:
            sys.addaudithook(_audit)
            _hooked.append(True)
        originals = os.write, os.fsync, file_ranges.write_some, atomic_directory._rename_at
        write, _, write_some, rename_at = originals

        def write_line(descriptor: int, data: Any) -> int:
            was_dead = self._is_dead
            try:
                self.step("write line", _path_of(descriptor))
            except (KilledError, OSError):
                # Part of it gets there, unless the process was gone before.
                if not was_dead:
                    write(descriptor, bytes(data)[: len(data) // 2])
                raise
            return write(descriptor, data)

        def write_range(descriptor: int, data: memoryview, offset: int) -> int:
            self.step("write", _path_of(descriptor))
            return write_some(descriptor, data, offset)

        def flush(descriptor: int) -> None:
            # Nothing here survives a loss of power, so there is nothing to wait for.
            self.step("flush", _path_of(descriptor))

        def exchange(one: Path, other: Path, how: int) -> bool:
            if not self.can_exchange:
                return False
            self.step("exchange", one)
            return rename_at(one, other, how)

        os.write, os.fsync = write_line, flush
        file_ranges.write_some, atomic_directory._rename_at = write_range, exchange
        _disks.append(self)
        try:
            yield
        finally:
            _disks.remove(self)
            os.write, os.fsync, file_ranges.write_some, atomic_directory._rename_at = originals


_disks: list[FaultyDisk] = []
_hooked: list[bool] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _disks or not (event == "open" or event.startswith("os.")):
        return
    for path, directory in changed_places(event, arguments):
        _disks[-1].step(event, Path(os.path.abspath(directory / os.fsdecode(path))))


def _path_of(descriptor: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{descriptor}"))
