"""Making files out of stretches with several threads: some compute, others copy and read back what is filled.

A file's stretches are read back in file order, each as soon as it and those before it are filled, so the hash of the
file is known when its last byte has been read. What has been read back begins to go to the disk at once, and one more
thread waits for it to arrive there. What comes out does not depend on how many threads there are.
"""

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from abliterate.byte_ranges import SourceFile, TargetFile
from abliterate.hashed_files import WrittenFile
from abliterate.progress import Advance
from abliterate.stretches import Fill, Stretch, Traffic, Worker, read_back


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

Done = Callable[[NewFile, WrittenFile], None]
_Task = Callable[[Worker], None]


def assemble_files(files: Iterable[NewFile], *, target: Path, workers: int, done: Done, advance: Advance) -> Traffic:
    """Make files in a directory, each flushed to the disk, read back and checked.

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
        self.fills = [stretch.fills() for stretch in file.stretches]
        self.unfilled = [len(each) for each in self.fills]
        self.next_check = 0
        self.is_busy = False

    @property
    def is_ready(self) -> bool:
        """Whether the next stretch can be read back, or all have been."""
        if self.is_busy:
            return False
        return self.next_check == len(self.unfilled) or not self.unfilled[self.next_check]

    def close(self) -> None:
        for each in (self.target, *self.file.sources):
            each.close()


class _Assembly:
    """The work that is left, shared by the threads."""

    def __init__(self, files: Iterable[NewFile], *, target: Path, done: Done, advance: Advance) -> None:
        self._files, self._target, self._done, self._advance = iter(files), target, done, advance
        self._changed = threading.Condition()
        self._telling = threading.Lock()
        self._open: list[_OpenFile] = []
        self._computed: deque[tuple[_OpenFile, int, Fill]] = deque()
        self._copied: deque[tuple[_OpenFile, int, Fill]] = deque()
        self._error: BaseException | None = None
        self._finisher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="finisher")

    def work(self, worker: Worker, *, computes: bool) -> None:
        """Do one task after another until none is left or one has failed; what is computed, if `computes`, first."""
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
                if computes and self._computed:
                    return self._fill_of(*self._computed.popleft())
                for each in self._open:
                    if each.is_ready:
                        each.is_busy = True
                        return self._check_of(each)
                if self._copied:
                    return self._fill_of(*self._copied.popleft())
                if len(self._open) < _MOST_OPEN and (file := next(self._files, None)) is not None:
                    self._begin(_OpenFile(file, self._target))
                    continue
                if not self._open:
                    return None
                self._changed.wait()
        return None

    def _begin(self, file: _OpenFile) -> None:
        self._open.append(file)
        for index, (stretch, fills) in enumerate(zip(file.file.stretches, file.fills, strict=True)):
            queue = self._computed if stretch.is_computed else self._copied
            queue.extend((file, index, fill) for fill in fills)
        self._changed.notify_all()

    def _fill_of(self, file: _OpenFile, index: int, fill: Fill) -> _Task:
        def task(worker: Worker) -> None:
            fill(file.target, worker)
            with self._changed:
                file.unfilled[index] -= 1
                self._changed.notify_all()

        return task

    def _check_of(self, file: _OpenFile) -> _Task:
        if file.next_check == len(file.unfilled):
            return lambda _worker: self._finish_later(file)

        def task(worker: Worker) -> None:
            stretch = file.file.stretches[file.next_check]
            read_back(stretch, file.target, worker, hash_bytes=file.hash.update)
            file.target.begin_sync(stretch.start, stretch.end - stretch.start)
            with self._telling:
                self._advance(stretch.end - stretch.start)
            with self._changed:
                file.next_check += 1
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
