"""Making files out of stretches with several threads: some compute, others copy and read back what is computed.

A file's stretches are settled in file order, each as soon as its own tasks are done and those before it are settled, so
the hash of the file is known with its last byte. What is settled begins to go to the disk at once, and one more thread
waits for it to arrive there. What comes out does not depend on how many threads there are.
"""

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from abliterate.byte_ranges import SourceFile, TargetFile
from abliterate.hashed_files import WrittenFile
from abliterate.progress import Advance
from abliterate.stretches import Fill, Stretch, Traffic, Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class NewFile:
    """A file to be made.

    Attributes:
        name: Its path below the target directory.
        sources: Open files that its stretches read; they must be the same when it is done. Closed with it.
        stretches: They cover it from its first byte to its last.
    """

    name: str
    sources: tuple[SourceFile, ...]
    stretches: tuple[Stretch, ...]

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return self.stretches[-1].end if self.stretches else 0


# So many files may wait for the disk before another is begun.
_MOST_OPEN = 8
# So many files, the oldest with anything to compute, are computed at a time: enough that they end together, few enough
# that some end soon.
_FILES_AT_ONCE = 4

Done = Callable[[NewFile, WrittenFile], None]
_Task = Callable[[Worker], None]


def assemble_files(files: Iterable[NewFile], *, target: Path, workers: int, done: Done, advance: Advance) -> Traffic:
    """Make files in a directory, each flushed to the disk, and what is computed of them read back and checked.

    Args:
        files: What to make; the next is asked for only when the tasks of those before have been given out.
        target: The directory; none of the files may be there.
        workers: Number of threads that compute; as many again copy and read back, so that the disk never waits for one.
        done: Told of each file that is whole, by one thread at a time.
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
        self.target = TargetFile(path, size=file.size)
        self.hash = hashlib.sha256()
        fills = [stretch.fills() for stretch in file.stretches]
        self.fills = deque((index, fill) for index, each in enumerate(fills) for fill in each)
        self.unfilled = [len(each) for each in fills]
        self.next_to_settle = 0
        self.is_busy = False

    @property
    def is_ready(self) -> bool:
        """Whether the next stretch can be settled, or all have been."""
        if self.is_busy:
            return False
        return self.next_to_settle == len(self.unfilled) or not self.unfilled[self.next_to_settle]

    @property
    def left(self) -> int:
        """Bytes that are not settled."""
        stretches = self.file.stretches
        return self.file.size - stretches[self.next_to_settle].start if self.next_to_settle < len(stretches) else 0

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
        """Do one task after another until none is left or one has failed; stretches' own, if `computes`, first."""
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
            stretch = file.file.stretches[file.next_to_settle]
            stretch.settle(file.target, worker, hash_bytes=file.hash.update)
            file.target.begin_sync(stretch.start, stretch.end - stretch.start)
            with self._telling:
                self._advance(stretch.end - stretch.start)
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
            self._done(file.file, written)
        with self._changed:
            self._open.remove(file)
            self._changed.notify_all()
        file.close()
