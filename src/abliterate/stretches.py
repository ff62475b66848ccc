"""What a new file is made of: stretches, each filled by tasks in any order and then read back once, in file order.

A stretch knows what its bytes must be, so what is read back is held against that; the same reading feeds the
file's SHA-256. No byte is written twice, and no stretch is ever in memory whole but those that are a few bytes long.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from abliterate.byte_ranges import SourceFile, TargetFile
from abliterate.direct_io import AlignedMemory, round_up
from abliterate.errors import VerificationError
from abliterate.scratch import Scratch

_COPY_BYTES = 32 << 20
_CHECK_BYTES = 1 << 20
# Read and written at a time; a multiple of what is checked at a time.
_CHUNK_BYTES = 4 << 20


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
    _memories: dict[str, AlignedMemory] = field(default_factory=dict)

    def memory(self, name: str) -> AlignedMemory:
        """Return memory for bytes of files, the same for a name each time."""
        return self._memories.setdefault(name, AlignedMemory())


Fill = Callable[[TargetFile, Worker], None]


class Stretch(ABC):
    """A range of a new file.

    Args:
        start: Its first byte in the new file.
        end: The byte behind its last.
    """

    is_computed = False
    """Whether filling it takes more of a processor, and of memory, than of the disk."""

    def __init__(self, *, start: int, end: int) -> None:
        self.start, self.end = start, end

    @property
    def check_bytes(self) -> int:
        """How many bytes `check` wants at a time; the last time fewer."""
        return _CHECK_BYTES

    @abstractmethod
    def fills(self) -> Sequence[Fill]:
        """Return the tasks that together write every byte of the stretch; any thread may run any of them."""

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

    def finish(self) -> None:  # noqa: B027
        """Judge the stretch as a whole, after its last bytes were checked.

        Raises:
            VerificationError: It is not what it must be.
        """


class GivenBytes(Stretch):
    """Bytes that are known: a header, a small file, a vector."""

    def __init__(self, *, start: int, data: bytes, name: str) -> None:
        super().__init__(start=start, end=start + len(data))
        self._data, self._name = data, name

    def fills(self) -> Sequence[Fill]:
        """See `Stretch.fills`."""
        return [self._fill]

    def check(self, written: memoryview, *, offset: int, worker: Worker) -> None:  # noqa: ARG002
        """See `Stretch.check`."""
        if bytes(written) != self._data[offset : offset + len(written)]:
            raise VerificationError(
                f"{self._name}, reread, is not what was written; disk or memory may be faulty, run again"
            )

    def _fill(self, target: TargetFile, worker: Worker) -> None:
        target.write(memoryview(self._data), self.start)
        worker.traffic.written += len(self._data)


class CopiedRange(Stretch):
    """A range of another file, which the file system shares where it can.

    Args:
        start: Where in the new file.
        end: The byte behind its last in the new file.
        source: The other file; it must stay open until the stretch has been checked.
        source_start: Where in the other file.
        describe: Names what lies at an offset of the stretch, for messages.
    """

    def __init__(
        self, *, start: int, end: int, source: SourceFile, source_start: int, describe: Callable[[int], str]
    ) -> None:
        super().__init__(start=start, end=end)
        self._source, self._source_start, self._describe = source, source_start, describe
        # Of each part that `check` gets, its sum as it was read; empty if the file system shares the range.
        self._sums: list[int] = []

    def fills(self) -> Sequence[Fill]:
        """See `Stretch.fills`."""
        return [self._fill]

    def check(self, written: memoryview, *, offset: int, worker: Worker) -> None:
        """See `Stretch.check`."""
        if self._sums and sum_of_words(written) == self._sums[offset // self.check_bytes]:
            return
        original = self._source.read(self._source_start + offset, len(written), worker.memory("original"))
        worker.traffic.read += len(original)
        differs = torch.frombuffer(written, dtype=torch.uint8) != torch.frombuffer(original, dtype=torch.uint8)
        if bool(differs.any()):
            raise VerificationError(
                f"{self._describe(offset + int(differs.nonzero()[0]))} differs, and no edit of it was planned; disk or "
                "memory may be faulty, or the model was changed meanwhile; run again"
            )

    def _fill(self, target: TargetFile, worker: Worker) -> None:
        count = self.end - self.start
        shared = target.share(self._source, start=self._source_start, offset=self.start, count=count)
        worker.traffic.shared += shared
        if shared:
            worker.traffic.read += count - shared
            worker.traffic.written += count - shared
            return
        for first in range(0, count, _CHUNK_BYTES):
            size = min(_CHUNK_BYTES, count - first)
            data = self._source.read(self._source_start + first, size, worker.memory("copied"))
            parts = (data[at : at + self.check_bytes] for at in range(0, size, self.check_bytes))
            self._sums.extend(map(sum_of_words, parts))
            target.write(data, self.start + first)
            worker.traffic.read += size
            worker.traffic.written += size


def copied_ranges(
    source: SourceFile, *, start: int, end: int, offset: int, describe: Callable[[int], str]
) -> list[CopiedRange]:
    """Cut a range of a file that is copied into stretches short enough that filling and checking overlap.

    Args:
        source: The file, open.
        start: Where the range begins in it.
        end: And ends.
        offset: Where it goes in the new file.
        describe: Names what lies at a byte of `source`, for messages.
    """

    def describe_from(first: int) -> Callable[[int], str]:
        return lambda at: describe(first + at)

    # All but the first begin at a block boundary of the new file.
    cuts = [start, *range(start + round_up(offset) - offset, end, _COPY_BYTES), end]
    return [
        CopiedRange(
            start=offset + first - start,
            end=offset + last - start,
            source=source,
            source_start=first,
            describe=describe_from(first),
        )
        for first, last in itertools.pairwise(cuts)
        if first < last or start == end
    ]


def read_back(
    stretch: Stretch, target: TargetFile, worker: Worker, *, hash_bytes: Callable[[memoryview], None]
) -> None:
    """Read a stretch back once: for the file's hash, and for its own check.

    Raises:
        VerificationError: It is not what it must be.
    """
    for first in range(stretch.start, stretch.end, stretch.check_bytes):
        size = min(stretch.check_bytes, stretch.end - first)
        chunk = target.read(first, size, worker.memory("written"))
        worker.traffic.read += size
        hash_bytes(chunk)
        stretch.check(chunk, offset=first - stretch.start, worker=worker)
    stretch.finish()


def sum_of_words(data: memoryview) -> int:
    """Return the sum of the bytes' 64-bit words, modulo 2^64: one read wrongly or not written changes it."""
    whole = len(data) // 8 * 8
    words = torch.frombuffer(data[:whole], dtype=torch.int64) if whole else torch.zeros(1, dtype=torch.int64)
    return (int(words.sum()) + int.from_bytes(data[whole:], "little")) % (1 << 64)
