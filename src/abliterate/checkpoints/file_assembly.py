"""Files made of segments by several threads: some compute, others copy and read back what is computed.

A segment is copied, given or computed. What is copied is read once, hashed and written as it passes. What is computed
is read back from the file and held against what it must be, by the same reading that feeds the hash. No byte is
written twice, and no segment of more than a few bytes is ever whole in memory.

A file's segments are settled in file order, each as soon as its own tasks are done and those before it are settled,
so the hash of the file is known with its last byte. One more thread waits for whole files to arrive on the disk. What
comes out does not depend on how many threads there are.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from abliterate.checkpoints.file_ranges import AlignedMemory, PlainFile, WrittenFile, open_file, round_up
from abliterate.errors import VerificationError
from abliterate.progress import Advance

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_SEGMENT_BYTES = 32 << 20
# Read at a time.
_COPY_BYTES = 4 << 20
_ZEROS = memoryview(bytes(_COPY_BYTES))
# Checked at a time: it stays in the cache between the hash and the check.
_CHECK_BYTES = 1 << 20


@dataclass(slots=True, kw_only=True)
class Traffic:
    """Bytes moved: read into and written out of this process, and shared between files by the file system."""

    read: int = 0
    written: int = 0
    shared: int = 0

    def add(self, other: Traffic) -> None:
        """Count what another counted."""
        self.read += other.read
        self.written += other.written
        self.shared += other.shared


class Scratch:
    """Memory that one thread computes in, block after block."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return [size], the same memory for a name each time, with what its last user left."""
        import torch

        key = (name, dtype, device)
        if key not in self._kept or len(self._kept[key]) < size:
            self._kept[key] = torch.empty(size, dtype=dtype, device=device)
        return self._kept[key][:size]


@dataclass(slots=True, kw_only=True)
class Worker:
    """What one thread keeps from task to task: its buffers, the memory it computes in, and what it moved."""

    traffic: Traffic = field(default_factory=Traffic)
    scratch: Scratch = field(default_factory=Scratch)
    _memories: defaultdict[str, AlignedMemory] = field(default_factory=lambda: defaultdict(AlignedMemory))

    def memory(self, name: str) -> AlignedMemory:
        """Return memory for bytes of files, the same for a name each time."""
        return self._memories[name]


Fill = Callable[[PlainFile, Worker], None]


class Segment(ABC):
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
    def settle(self, target: PlainFile, worker: Worker, *, hash_bytes: Callable[[memoryview], None]) -> None:
        """Bring its bytes to the file's hash, in their order; called in file order, when all its tasks are done.

        Raises:
            VerificationError: What was written is not what it must be.
            CheckpointError: What is copied cannot be read.
            OSError: It cannot be written.
        """


class GivenSegment(Segment):
    """Bytes that are known, and few: a header, a changed config, a vector."""

    def __init__(self, *, start: int, data: bytes, name: str) -> None:
        super().__init__(start=start, end=start + len(data))
        self._data, self._name = data, name

    def settle(self, target: PlainFile, worker: Worker, *, hash_bytes: Callable[[memoryview], None]) -> None:
        """See `Segment.settle`."""
        target.write(memoryview(self._data), self.start)
        written = target.read(self.start, len(self._data), worker.memory("written"))
        if written != self._data:
            raise changed_on_the_way(self._name)
        hash_bytes(written)
        worker.traffic.written += len(self._data)
        worker.traffic.read += len(self._data)


class CopiedSegment(Segment):
    """A range of another file, which the file system shares where it can.

    Args:
        start: Where in the new file.
        end: The byte behind its last in the new file.
        source: The other file; it must stay open until the segment is settled.
        source_start: Where in the other file.
    """

    def __init__(self, *, start: int, end: int, source: PlainFile, source_start: int) -> None:
        super().__init__(start=start, end=end)
        self._source, self._source_start = source, source_start

    def settle(self, target: PlainFile, worker: Worker, *, hash_bytes: Callable[[memoryview], None]) -> None:
        """See `Segment.settle`: what is read once is both hashed and written, and a hole stays a hole."""
        count = self.end - self.start
        shared = target.share(self._source, start=self._source_start, offset=self.start, count=count)
        for first in range(0, count, _COPY_BYTES):
            size = min(_COPY_BYTES, count - first)
            if self._source.is_hole(self._source_start + first, size):
                # The new file was one hole when it got its size.
                hash_bytes(_ZEROS[:size])
                continue
            data = self._source.read(self._source_start + first, size, worker.memory("copied"))
            if not shared:
                target.write(data, self.start + first)
                worker.traffic.written += size
            hash_bytes(data)
            worker.traffic.read += size
        worker.traffic.shared += shared


class ComputedSegment(Segment):
    """A range whose bytes are computed by its tasks, and read back from the file, once, when its turn comes."""

    @property
    def check_bytes(self) -> int:
        """How many bytes `check` wants at a time; the last time fewer."""
        return _CHECK_BYTES

    @abstractmethod
    def fills(self) -> Sequence[Fill]:
        """See `Segment.fills`."""

    @abstractmethod
    def check(self, written: memoryview, *, offset: int, worker: Worker) -> None:
        """Hold bytes that were read back against what they must be; called in file order.

        Args:
            written: The bytes.
            offset: Where they begin, counted from the segment's first byte.
            worker: The calling thread's.

        Raises:
            VerificationError: They are others.
        """

    def finish(self) -> None:
        """Judge the segment as a whole, after its last bytes were checked.

        Raises:
            VerificationError: It is not what it must be.
        """

    def settle(self, target: PlainFile, worker: Worker, *, hash_bytes: Callable[[memoryview], None]) -> None:
        """See `Segment.settle`."""
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


def copied_segments(source: PlainFile, *, start: int, end: int, offset: int) -> list[CopiedSegment]:
    """Cut a range of a file that is copied into segments between which other files may have their turn.

    Args:
        source: The file, open.
        start: Where the range begins in it.
        end: And ends.
        offset: Where it goes in the new file.
    """
    # All but the first begin at a block boundary of the new file.
    cuts = [start, *range(start + round_up(offset) - offset, end, _SEGMENT_BYTES), end]
    return [
        CopiedSegment(start=offset + first - start, end=offset + last - start, source=source, source_start=first)
        for first, last in itertools.pairwise(cuts)
        if first < last or start == end
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewFile:
    """A file to be made.

    Attributes:
        name: Its path below the target directory.
        sources: Open files that its segments read; they must be the same when it is done. Closed with it.
        segments: They cover it from its first byte to its last.
    """

    name: str
    sources: tuple[PlainFile, ...]
    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return self.segments[-1].end if self.segments else 0


# How many files may be open, some of them waiting for the disk, before another is begun.
_MOST_OPEN = 8
# How many files, the oldest that have anything to compute, are computed at a time: enough that they end together, few
# enough that some end soon.
_FILES_AT_ONCE = 4

Done = Callable[[str, WrittenFile], None]
_Task = Callable[[Worker], None]


def assemble_files(files: Iterable[NewFile], *, target: Path, workers: int, done: Done, advance: Advance) -> Traffic:
    """Make files in a directory, each flushed to the disk, and what is computed of them read back and checked.

    Args:
        files: What to make; the next is asked for only when the tasks of those before have been given out.
        target: The directory; none of the files may be there.
        workers: Number of threads that compute; as many again copy and read back, so that the disk never waits for one.
        done: Told the name of each file that is whole and what was written, by one thread at a time.
        advance: Told the bytes that were written and checked, by one thread at a time.

    Returns:
        What was moved.

    Raises:
        CheckpointError: A source cannot be read or was changed.
        VerificationError: What was read back is not what it must be.
        OSError: A file cannot be written.
    """
    assembly = _Assembly(files, target=target, done=done, advance=advance)
    crew = [Worker() for _ in range(2 * workers)]
    threads = [
        threading.Thread(target=assembly.work, args=(worker,), kwargs={"computes": index < workers}, name="writer")
        for index, worker in enumerate(crew)
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as error:
        assembly.stop(error)
        raise
    finally:
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        assembly.close()
    traffic = Traffic()
    for worker in crew:
        traffic.add(worker.traffic)
    return traffic


class _OpenFile:
    """A file that is being made."""

    def __init__(self, file: NewFile, directory: Path) -> None:
        self.file = file
        path = directory / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        self.target = open_file(path, size=file.size)
        self.hash = hashlib.sha256()
        fills = [segment.fills() for segment in file.segments]
        self.fills = deque((index, fill) for index, each in enumerate(fills) for fill in each)
        self.unfilled = [len(each) for each in fills]
        self.next_to_settle = 0
        self.is_busy = False

    @property
    def is_ready(self) -> bool:
        """Whether the next segment can be settled, or all have been."""
        if self.is_busy:
            return False
        return self.next_to_settle == len(self.unfilled) or not self.unfilled[self.next_to_settle]

    @property
    def left(self) -> int:
        """Bytes that are not settled."""
        segments = self.file.segments
        return self.file.size - segments[self.next_to_settle].start if self.next_to_settle < len(segments) else 0

    def close(self) -> None:
        for each in (self.target, *self.file.sources):
            each.close()


def _longest(files: Iterable[_OpenFile]) -> _OpenFile | None:
    """Return the file with most left to do, so that none is left to be done alone in the end."""
    return max(files, key=lambda file: file.left, default=None)


class _Assembly:
    """The work that is left, shared by the threads."""

    def __init__(self, files: Iterable[NewFile], *, target: Path, done: Done, advance: Advance) -> None:
        self._files, self._target, self._done, self._advance = iter(files), target, done, advance
        self._changed = threading.Condition()
        self._telling = threading.Lock()
        self._open: list[_OpenFile] = []
        self._error: BaseException | None = None
        self._finisher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="finisher")

    def work(self, worker: Worker, *, computes: bool) -> None:
        """Do one task after another until none is left or one has failed; segments' own, if `computes`, first."""
        try:
            while (task := self._next_task(computes=computes)) is not None:
                task(worker)
        except BaseException as error:
            self.stop(error)

    def stop(self, error: BaseException) -> None:
        """Let no further task begin."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def close(self) -> None:
        """Close what is still open, and raise what made a thread stop."""
        self._finisher.shutdown()
        for each in self._open:
            each.close()
        if self._error is not None:
            raise self._error

    def _next_task(self, *, computes: bool) -> _Task | None:
        with self._changed:
            while self._error is None:
                if computes and (file := _longest(islice((each for each in self._open if each.fills), _FILES_AT_ONCE))):
                    return self._fill_of(file, *file.fills.popleft())
                if file := _longest(each for each in self._open if each.is_ready):
                    file.is_busy = True
                    return self._settling_of(file)
                if len(self._open) < _MOST_OPEN and (new := next(self._files, None)) is not None:
                    self._open.append(_OpenFile(new, self._target))
                    self._changed.notify_all()
                    continue
                if not self._open:
                    return None
                self._changed.wait()
        return None

    def _fill_of(self, file: _OpenFile, index: int, fill: Fill) -> _Task:
        def task(worker: Worker) -> None:
            fill(file.target, worker)
            with self._changed:
                file.unfilled[index] -= 1
                self._changed.notify_all()

        return task

    def _settling_of(self, file: _OpenFile) -> _Task:
        if file.next_to_settle == len(file.unfilled):
            return lambda _worker: self._finish_later(file)

        def task(worker: Worker) -> None:
            segment = file.file.segments[file.next_to_settle]
            segment.settle(file.target, worker, hash_bytes=file.hash.update)
            with self._telling:
                self._advance(segment.end - segment.start)
            with self._changed:
                file.next_to_settle += 1
                file.is_busy = False
                self._changed.notify_all()

        return task

    def _finish_later(self, file: _OpenFile) -> None:
        def finish() -> None:
            try:
                if self._error is None:
                    self._finish(file)
            except BaseException as error:
                self.stop(error)

        self._finisher.submit(finish)

    def _finish(self, file: _OpenFile) -> None:
        file.target.sync()
        for source in file.file.sources:
            source.check_unchanged()
        written = WrittenFile(sha256=file.hash.hexdigest(), bytes=file.file.size)
        with self._telling:
            self._done(file.file.name, written)
        with self._changed:
            self._open.remove(file)
            self._changed.notify_all()
        file.close()
