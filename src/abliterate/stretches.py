"""What a new file is made of: stretches, each filled by tasks in any order and then read back once, in file order.

A stretch knows what its bytes must be, so what is read back is held against that; the same reading feeds the
file's SHA-256. No byte is written twice, and no stretch is ever in memory whole but those that are a few bytes long.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from abliterate.byte_ranges import SourceFile, TargetFile
from abliterate.errors import VerificationError
from abliterate.scratch import Scratch

_COPY_BYTES = 32 << 20
_CHECK_BYTES = 1 << 20


@dataclass(slots=True, kw_only=True)
class Traffic:
    """Bytes moved: read into and written out of this process, and copied by the kernel without passing through it."""

    read: int = 0
    written: int = 0
    copied: int = 0

    def add(self, other: "Traffic") -> None:
        """Count what another counted."""
        self.read += other.read
        self.written += other.written
        self.copied += other.copied


@dataclass(slots=True, kw_only=True)
class Worker:
    """What one thread keeps from task to task: its buffers, the memory it computes in, and what it moved."""

    traffic: Traffic = field(default_factory=Traffic)
    scratch: Scratch = field(default_factory=Scratch)
    _buffers: dict[str, bytearray] = field(default_factory=dict)

    def buffer(self, name: str, size: int) -> memoryview:
        """Return a buffer of `size` bytes, the same memory for a name each time, with what its last user left."""
        if len(self._buffers.get(name, b"")) < size:
            self._buffers[name] = bytearray(size)
        return memoryview(self._buffers[name])[:size]


Fill = Callable[[TargetFile, Worker], None]


class Stretch(ABC):
    """A range of a new file.

    Args:
        start: Its first byte in the new file.
        end: The byte behind its last.
    """

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
    """A range of another file, copied by the kernel where it can.

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

    def fills(self) -> Sequence[Fill]:
        """See `Stretch.fills`."""
        return [self._fill]

    def check(self, written: memoryview, *, offset: int, worker: Worker) -> None:
        """See `Stretch.check`."""
        original = worker.buffer("original", len(written))
        self._source.read_into(original, self._source_start + offset)
        worker.traffic.read += len(original)
        if not _equal(written, original):
            at = next(index for index, pair in enumerate(zip(written, original, strict=True)) if pair[0] != pair[1])
            raise VerificationError(
                f"{self._describe(offset + at)} differs, and no edit of it was planned; disk or memory may be faulty, "
                "or the model was changed meanwhile; run again"
            )

    def _fill(self, target: TargetFile, worker: Worker) -> None:
        count = self.end - self.start
        copied = target.copy(self._source, start=self._source_start, offset=self.start, count=count)
        worker.traffic.copied += copied
        worker.traffic.read += count - copied
        worker.traffic.written += count - copied


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

    return [
        CopiedRange(
            start=offset + first - start,
            end=offset + min(first + _COPY_BYTES, end) - start,
            source=source,
            source_start=first,
            describe=describe_from(first),
        )
        for first in range(start, max(end, start + 1), _COPY_BYTES)
    ]


def read_back(
    stretch: Stretch, target: TargetFile, worker: Worker, *, hash_bytes: Callable[[memoryview], None]
) -> None:
    """Read a stretch back once: for the file's hash, and for its own check.

    Raises:
        VerificationError: It is not what it must be.
    """
    for first in range(stretch.start, stretch.end, stretch.check_bytes):
        chunk = worker.buffer(f"written {stretch.check_bytes}", min(stretch.check_bytes, stretch.end - first))
        target.read_into(chunk, first)
        worker.traffic.read += len(chunk)
        hash_bytes(chunk)
        stretch.check(chunk, offset=first - stretch.start, worker=worker)
    stretch.finish()


def _equal(one: memoryview, other: memoryview) -> bool:
    # A whole bytearray is compared at the speed of memory, views entry by entry.
    return one.obj == other if len(one.obj) == len(one) else one.tobytes() == other.tobytes()  # type: ignore[arg-type]
