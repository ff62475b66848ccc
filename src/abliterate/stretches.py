"""What a new file is made of: stretches, some written by tasks in any order, all brought to its hash in file order.

What is copied is read once, hashed and written as it passes. What is computed is read back from the file and held
against what it must be, by the same reading that feeds the hash. No byte is written twice, and no stretch is ever in
memory whole but those that are a few bytes long.
"""

import itertools
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from abliterate.byte_ranges import SourceFile, TargetFile
from abliterate.direct_io import AlignedMemory, round_up
from abliterate.errors import VerificationError
from abliterate.scratch import Scratch

_STRETCH_BYTES = 32 << 20
# Read at a time.
_COPY_BYTES = 4 << 20
# Checked at a time: it stays in the cache between the hash and the check.
_CHECK_BYTES = 1 << 20


@dataclass(slots=True, kw_only=True)
class Traffic:
    """Bytes moved: read into and written out of this process, and shared between files by the file system."""

    read: int = 0
    written: int = 0
    shared: int = 0

    def add(self, other: "Traffic") -> None:
        """Count what another counted."""
        self.read += other.read
        self.written += other.written
        self.shared += other.shared


@dataclass(slots=True, kw_only=True)
class Worker:
    """What one thread keeps from task to task: its buffers, the memory it computes in, and what it moved."""

    traffic: Traffic = field(default_factory=Traffic)
    scratch: Scratch = field(default_factory=Scratch)
    _memories: defaultdict[str, AlignedMemory] = field(default_factory=lambda: defaultdict(AlignedMemory))

    def memory(self, name: str) -> AlignedMemory:
        """Return memory for bytes of files, the same for a name each time."""
        return self._memories[name]


Fill = Callable[[TargetFile, Worker], None]


class Stretch(ABC):
    """A range of a new file.

    Args:
        start: Its first byte in the new file.
        end: The byte behind its last.
    """

    def __init__(self, *, start: int, end: int) -> None:
        self.start, self.end = start, end

    def fills(self) -> Sequence[Fill]:
        """Return the tasks that write it, each run by any thread in any order; none if it is written in its turn."""
        return ()

    @abstractmethod
    def settle(self, target: TargetFile, worker: Worker, *, hash_bytes: Callable[[memoryview], None]) -> None:
        """Bring its bytes to the file's hash, in their order; called in file order, when all its tasks are done.

        Raises:
            VerificationError: What was written is not what it must be.
            CheckpointError: What is copied cannot be read.
            OSError: It cannot be written.
        """


class GivenBytes(Stretch):
    """Bytes that are known, and few: a header, a changed config, a vector."""

    def __init__(self, *, start: int, data: bytes, name: str) -> None:
        super().__init__(start=start, end=start + len(data))
        self._data, self._name = data, name

    def settle(self, target: TargetFile, worker: Worker, *, hash_bytes: Callable[[memoryview], None]) -> None:
        """See `Stretch.settle`."""
        target.write(memoryview(self._data), self.start)
        written = target.read(self.start, len(self._data), worker.memory("written"))
        if written != self._data:
            raise changed_on_the_way(self._name)
        hash_bytes(written)
        worker.traffic.written += len(self._data)
        worker.traffic.read += len(self._data)


class CopiedRange(Stretch):
    """A range of another file, which the file system shares where it can.

    Args:
        start: Where in the new file.
        end: The byte behind its last in the new file.
        source: The other file; it must stay open until the stretch is settled.
        source_start: Where in the other file.
    """

    def __init__(self, *, start: int, end: int, source: SourceFile, source_start: int) -> None:
        super().__init__(start=start, end=end)
        self._source, self._source_start = source, source_start

    def settle(self, target: TargetFile, worker: Worker, *, hash_bytes: Callable[[memoryview], None]) -> None:
        """See `Stretch.settle`: what is read once is both hashed and written."""
        count = self.end - self.start
        shared = target.share(self._source, start=self._source_start, offset=self.start, count=count)
        for first in range(0, count, _COPY_BYTES):
            size = min(_COPY_BYTES, count - first)
            data = self._source.read(self._source_start + first, size, worker.memory("copied"))
            if not shared:
                target.write(data, self.start + first)
            hash_bytes(data)
        worker.traffic.read += count
        worker.traffic.written += count - shared
        worker.traffic.shared += shared


class ComputedStretch(Stretch):
    """A range whose bytes are computed by its tasks, and read back from the file, once, when its turn comes."""

    @property
    def check_bytes(self) -> int:
        """How many bytes `check` wants at a time; the last time fewer."""
        return _CHECK_BYTES

    @abstractmethod
    def fills(self) -> Sequence[Fill]:
        """See `Stretch.fills`."""

    @abstractmethod
    def check(self, written: memoryview, *, offset: int, worker: Worker) -> None:
        """Hold bytes that were read back against what they must be; called in file order.

        Args:
            written: The bytes.
            offset: Where they begin, counted from the stretch's first byte.
            worker: The calling thread's.

        Raises:
            VerificationError: They are others.
        """

    def finish(self) -> None:
        """Judge the stretch as a whole, after its last bytes were checked.

        Raises:
            VerificationError: It is not what it must be.
        """

    def settle(self, target: TargetFile, worker: Worker, *, hash_bytes: Callable[[memoryview], None]) -> None:
        """See `Stretch.settle`."""
        at_once = max(1, _COPY_BYTES // self.check_bytes) * self.check_bytes
        for first in range(self.start, self.end, at_once):
            written = target.read(first, min(at_once, self.end - first), worker.memory("written"))
            for at in range(0, len(written), self.check_bytes):
                part = written[at : at + self.check_bytes]
                hash_bytes(part)
                self.check(part, offset=first + at - self.start, worker=worker)
            worker.traffic.read += len(written)
        self.finish()


def changed_on_the_way(name: str) -> VerificationError:
    """Return the error about bytes that were not read back as they were written."""
    return VerificationError(f"{name}, reread, is not what was written; disk or memory may be faulty, run again")


def copied_ranges(source: SourceFile, *, start: int, end: int, offset: int) -> list[CopiedRange]:
    """Cut a range of a file that is copied into stretches between which other files may have their turn.

    Args:
        source: The file, open.
        start: Where the range begins in it.
        end: And ends.
        offset: Where it goes in the new file.
    """
    # All but the first begin at a block boundary of the new file.
    cuts = [start, *range(start + round_up(offset) - offset, end, _STRETCH_BYTES), end]
    return [
        CopiedRange(start=offset + first - start, end=offset + last - start, source=source, source_start=first)
        for first, last in itertools.pairwise(cuts)
        if first < last or start == end
    ]
