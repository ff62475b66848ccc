"""A directory that appears whole or not at all, and takes the place of an older one only then, and only if asked to.

It is written beside its target under a hidden name and gets its own name by one rename. `published_directory` leaves
nothing behind when something goes wrong. `partial_run` is for what takes long: it writes `.NAME.partial`, which it
locks, and journals each finished file. An interrupted run leaves that directory behind, and a run that resumes trusts
nothing in it: it hashes every journalled file and removes the rest.

The first line of a journal says what the work is made from; each other line is a file that was whole and flushed when
the line was written. A line that a crash cut off is ignored.
"""

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from abliterate.checkpoints.file_ranges import can_share_blocks, hash_file
from abliterate.checkpoints.json_lines import JsonLines
from abliterate.errors import CheckpointError, InputError, InterruptedRunError
from abliterate.files import check_writable
from abliterate.progress import ProgressReporter

# What tells a checkpoint or an adapter, which may be replaced, from a directory that was named by mistake.
MARKERS = ("config.json", "adapter_config.json")

# Of the system call renameat2, which Python does not have.
_AT_FDCWD, _RENAME_NOREPLACE, _RENAME_EXCHANGE = -100, 1, 2
# What it says where kernel or file system have no such rename.
_NOT_THERE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}


def check_output_directory(output: Path, *, overwrite: bool) -> None:
    """Check, before any work is done, that a checkpoint may be published as `output`.

    Raises:
        InputError: It exists, and `overwrite` is false or it is neither a checkpoint nor an empty directory; or
            nothing can be written beside it.
    """
    if not output.exists() and not output.is_symlink():
        check_writable(output.parent, flag="place", directory=True)
        return
    if not overwrite:
        raise InputError(f"{output}: exists; choose another directory, or replace it with --overwrite")
    if output.is_symlink() or not output.is_dir():
        raise InputError(f"{output}: exists and is not a directory, so it is not replaced; choose another path")
    if not any((output / marker).is_file() for marker in MARKERS) and any(output.iterdir()):
        raise InputError(
            f"{output}: exists and holds no {MARKERS[0]}, so it is no checkpoint and is not replaced; "
            "choose another directory"
        )


@contextmanager
def published_directory(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a hidden directory that becomes `output` if the body succeeds, and vanishes if it does not.

    Args:
        output: The directory to be; ask `check_output_directory` before any work is done.
        overwrite: Replace what `check_output_directory` lets be replaced; else what appears there meanwhile is kept.

    Raises:
        InputError: Nothing can be written beside `output`.
        CheckpointError: Writing failed, as on a full disk, or `output` appeared meanwhile; it is as it was.
    """
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    new_parents = [parent for parent in output.parents if not parent.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise InputError(f"{partial}: cannot be made: {error.strerror or error}; choose another place") from error
    try:
        yield partial
        publish(partial, output, overwrite=overwrite)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or output}: {error.strerror or error}; {output} was left as it was"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in new_parents:
            with suppress(OSError):  # it holds the published directory
                parent.rmdir()


def publish(partial: Path, output: Path, *, overwrite: bool) -> None:
    """Give a whole directory its name by one rename.

    Args:
        partial: The directory.
        output: Its name to be.
        overwrite: Replace an older checkpoint of that name, which is gone afterwards; else nothing is replaced.

    Raises:
        OSError: It could not be done, and what has that name is as it was.
        CheckpointError: What has that name by now is nothing that may be replaced.
    """
    for directory, _, _ in os.walk(partial):
        _sync_directory(Path(directory))
    if not overwrite or not os.path.lexists(output):
        _rename_to_new(partial, output)
    else:
        try:
            check_output_directory(output, overwrite=True)
        except InputError as error:
            raise CheckpointError(str(error)) from FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        if _rename_at(partial, output, _RENAME_EXCHANGE):
            _sync_directory(output.parent)
            shutil.rmtree(partial, ignore_errors=True)
        else:
            _replace(partial, output)
    _sync_directory(output.parent)


def _rename_to_new(partial: Path, output: Path) -> None:
    appeared = FileExistsError(
        errno.EEXIST, "appeared while this run was going on, and is not replaced; move it away", str(output)
    )
    try:
        if _rename_at(partial, output, _RENAME_NOREPLACE):
            return
        if os.path.lexists(output):
            raise appeared
        # No system puts a directory in the place of one that holds anything.
        partial.rename(output)
    except OSError as error:
        if error.errno in {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR} and os.path.lexists(output):
            raise appeared from error
        raise


def _rename_at(one: Path, other: Path, how: int) -> bool:
    """Rename by renameat2; False where kernel or file system cannot do that.

    Raises:
        OSError: They can, and it failed.
    """
    if sys.platform != "linux":
        return False
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        return False
    if library.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), how) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_THERE:
        return False
    raise OSError(code, os.strerror(code), str(other))


def _replace(partial: Path, output: Path) -> None:
    replaced = output.with_name(f".{output.name}.replaced-{os.getpid()}")
    output.rename(replaced)
    try:
        partial.rename(output)
    except BaseException:
        replaced.rename(output)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _sync_directory(path: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):
        return  # this system opens no directories
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


Key = Mapping[str, str]
Entry = dict[str, Any]


class Journal:
    """A new journal.

    Args:
        path: Its file; one that is there is replaced.
        key: What the work is made from, part by part; work with another key cannot be resumed.

    Raises:
        OSError: It cannot be written.
    """

    def __init__(self, path: Path, *, key: Key) -> None:
        self._lines = JsonLines(path)
        self.n_entries = 0
        self._lines.start()
        self._lines.append({"key": dict(key)})

    def add(self, name: str, entry: Entry) -> None:
        """Say that the file `name` is whole; on the disk when this returns.

        Raises:
            OSError: It cannot be written.
        """
        self._lines.append({"name": name, **entry})
        self.n_entries += 1


def read_journals(directory: Path, *, pattern: str) -> tuple[dict[str, str] | None, dict[str, Entry]]:
    """Read the journals of one work.

    Args:
        directory: Where they are.
        pattern: Of their file names.

    Returns:
        The key, None where there is no journal or they do not agree; and the entries by the names of the files.

    Raises:
        InputError: A journal is damaged, and not by a crash.
    """
    keys: list[Any] = []
    entries: dict[str, Entry] = {}
    for path in sorted(directory.glob(pattern)):
        if not (whole := JsonLines(path, remedy=_REMEDY).read(_journal_line)):
            continue
        first, *lines = whole
        keys.append(first.get("key"))
        entries |= {line["name"]: line for line in lines if isinstance(line.get("name"), str)}
    if not keys or not isinstance(keys[0], dict) or any(key != keys[0] for key in keys):
        return None, {}
    return keys[0], entries


def _journal_line(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError("not an object")
    return value


_OWN = ".abliterate"
LOCK = "lock"
_JOURNAL = "journal-0.jsonl"
# Older versions wrote one for each of several processes.
_JOURNALS = "journal-*.jsonl"
_REMEDY = "remove that line, or leave out --resume to write everything from the beginning"


class PartialDirectory:
    """The unfinished directory of one run.

    Attributes:
        path: Where it is.
        kept: Entries of files that an earlier run finished, which were hashed again and are unchanged.
        journal: Where the run says what it has finished.
    """

    def __init__(self, path: Path, *, key: Key, kept: Mapping[str, Entry] | None = None) -> None:
        self.path = path
        self.kept = dict(kept or {})
        self.journal = Journal(path / _OWN / _JOURNAL, key=key)
        for name, entry in self.kept.items():
            self.journal.add(name, entry)

    def has_finished_files(self) -> bool:
        """Return whether there is anything to resume from."""
        return bool(read_journals(self.path / _OWN, pattern=_JOURNALS)[1])


class PartialRun:
    """A run that writes a directory: it has the lock, and publishes or gives up in the end.

    Args:
        output: The directory to be.
        key: What the run makes it from, part by part.
        resume: Keep what an earlier run with the same key has finished.
        workers: Threads that hash what is there.
        progress: Told what is found and removed.
        overwrite: See `publish`.

    Raises:
        InputError: Nothing can be written beside `output`, or another run is writing it.
    """

    def __init__(
        self,
        output: Path,
        *,
        key: Key,
        resume: bool,
        workers: int,
        progress: ProgressReporter,
        overwrite: bool = False,
    ) -> None:
        self._output = output
        self._overwrite = overwrite
        self._new_parents = [parent for parent in output.parents if not parent.exists()]
        path = partial_path(output)
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(path, output)
            try:
                kept = _what_is_there(path, key=key, resume=resume, workers=workers, progress=progress)
                self.directory = PartialDirectory(path, key=key, kept=kept)
            except BaseException:
                self._lock.release()
                raise
        except OSError as error:
            raise InputError(f"{path}: cannot be made: {error.strerror or error}; choose another place") from error

    def check_space(self, sizes: Mapping[str, int], *, source: Path, edited: int) -> None:
        """Check that what will be written finds room.

        Args:
            sizes: Name -> bytes of every file.
            source: One of the files that are copied.
            edited: Bytes that are written in any case; the others take none where files can share their blocks.

        Raises:
            CheckpointError: There is less room.
        """
        path, kept = self.directory.path, self.directory.kept
        needed = sum(size for name, size in sizes.items() if name not in kept)
        free = shutil.disk_usage(path).free
        if free < needed and can_share_blocks(source, path):
            needed = min(needed, edited)
        if free < needed:
            raise CheckpointError(
                f"{path.parent}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; make room or "
                "choose another place"
            ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def publish(self) -> None:
        """Let the directory appear.

        Raises:
            OSError: It cannot be; what is finished is kept.
            CheckpointError: Something else has its name by now; what is finished is kept.
        """
        self._lock.prepare_removal()
        publish(self.directory.path, self._output, overwrite=self._overwrite)
        # Not before: until the directory has its name, the journal is what a later run can go on from.
        shutil.rmtree(self._output / _OWN)
        self._lock.release()

    def give_up(self, error: BaseException) -> BaseException:
        """Keep what a later run can resume from, or remove everything, and return the error that says so."""
        path = self.directory.path
        if not is_worth_keeping(error):
            # What was read or computed is wrong, and would be again.
            self._remove()
            return error
        if self.directory.has_finished_files():
            self._lock.release()
            left = f"what is finished is kept in {path}: the same command goes on from there with --resume"
        else:
            self._remove()
            left = "nothing was kept"
        if isinstance(error, KeyboardInterrupt):
            return InterruptedRunError.of(error, f"{self._output} was left as it was, and {left}")
        if isinstance(error, OSError):
            where = error.filename or self._output
            return CheckpointError(f"{where}: {error.strerror or error}; {self._output} was left as it was, and {left}")
        return CheckpointError(f"{error}; {self._output} was left as it was, and {left}")

    def _remove(self) -> None:
        self._lock.prepare_removal()
        shutil.rmtree(self.directory.path, ignore_errors=True)
        self._lock.release()
        for parent in self._new_parents:
            with suppress(OSError):
                parent.rmdir()


@contextmanager
def partial_run(
    output: Path, *, key: Key, resume: bool, workers: int, progress: ProgressReporter, overwrite: bool = False
) -> Iterator[PartialRun]:
    """Yield a run whose directory appears if the body succeeds; see `PartialRun` for the arguments.

    Raises:
        InputError: Nothing can be written beside `output`, or another run is writing it.
        AbliterateError: The body failed; the message says what is kept (see `PartialRun.give_up`).
    """
    run = PartialRun(output, key=key, resume=resume, workers=workers, progress=progress, overwrite=overwrite)
    try:
        yield run
        run.publish()
    except BaseException as error:
        final = run.give_up(error)
        if final is error:
            raise
        raise final from error


def partial_path(output: Path) -> Path:
    """Return where a directory is while it is not whole."""
    return output.with_name(f".{output.name}.partial")


def is_worth_keeping(error: BaseException) -> bool:
    """Return whether a run that failed so can be resumed: a signal or the system stopped it, and not what it read."""
    return isinstance(error, (KeyboardInterrupt, OSError)) or isinstance(error.__cause__, OSError)


class FileLock:
    """A lock on a file, that the system takes back when its process ends.

    Args:
        path: The file; it is made if it is not there.

    Raises:
        BlockingIOError: Another has it.
        OSError: The file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor: int | None = None
        flags = (getattr(os, name, 0) for name in ("O_CLOEXEC", "O_BINARY"))
        self._descriptor = os.open(path, sum(flags, os.O_RDWR | os.O_CREAT), 0o666)
        try:
            _lock_now(self._descriptor)
        except OSError:
            self.release()
            raise
        self._state = os.fstat(self._descriptor)

    def is_of(self, path: Path) -> bool:
        """Return whether the file that is locked is still the one at `path`."""
        try:
            return os.path.samestat(self._state, path.stat())
        except FileNotFoundError:
            return False

    def prepare_removal(self) -> None:
        """Release it now if this system cannot remove open files; otherwise it is held until the directory is gone."""
        if sys.platform == "win32":
            self.release()

    def release(self) -> None:
        """Let others have it; so does letting go of this object, as of an open file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    __del__ = release


def _lock_now(descriptor: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(error.errno, error.strerror) from error
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _lock(path: Path, output: Path) -> FileLock:
    """Make the directory if it is not there, and lock it."""
    is_foreign = (
        path.is_dir()
        and not (path / _OWN).is_dir()
        and not any((path / each).exists() for each in MARKERS)
        and any(path.iterdir())
    )
    if path.is_symlink() or is_foreign:
        raise InputError(f"{path}: is where {output} would be written, and is something else; move it away")
    try:
        return lock_in(path / _OWN)
    except BlockingIOError as error:
        raise InputError(
            f"{output}: another run is writing it, in {path}; wait for that one, or choose another directory"
        ) from error


def lock_in(directory: Path) -> FileLock:
    """Make a directory if it is not there, and lock it: one process at a time works in it.

    Raises:
        BlockingIOError: Another does.
        OSError: It cannot be made.
    """
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / LOCK)
        if lock.is_of(directory / LOCK):
            return lock
        # The other process removed the directory between the two calls.
        lock.release()


def _what_is_there(path: Path, *, key: Key, resume: bool, workers: int, progress: ProgressReporter) -> dict[str, Entry]:
    """Return the entries of files that are whole, and remove all else."""
    try:
        found_key, entries = read_journals(path / _OWN, pattern=_JOURNALS)
    except InputError:
        if resume:
            raise
        found_key, entries = None, {}
    files = [file for file in path.rglob("*") if file.is_file() and file.parent != path / _OWN]
    changed = [part for part in key if found_key is None or found_key.get(part) != key[part]]
    if not resume and (files or entries):
        progress.message(f"{path}: left by an interrupted run, removed; --resume would have gone on with it")
    elif resume and found_key is None:
        progress.message(f"{path}: nothing to resume; everything is written from the beginning")
    elif resume and changed:
        progress.message(
            f"{path}: what an interrupted run left is from another {', '.join(changed)}, so it was removed and "
            "everything is written from the beginning"
        )
    kept = _whole_files(path, entries, workers, progress) if resume and not changed else {}
    for file in files:
        if file.relative_to(path).as_posix() not in kept:
            file.unlink()
    for journal in (path / _OWN).glob(_JOURNALS):
        journal.unlink()
    return kept


def _whole_files(
    path: Path, entries: Mapping[str, Entry], workers: int, progress: ProgressReporter
) -> dict[str, Entry]:
    total = sum(entry.get("bytes", 0) for entry in entries.values())

    with progress.task("Checking what is there", total=total, unit="bytes") as advance:

        def is_whole(name: str) -> bool:
            file = path / name
            if not file.is_file() or file.stat().st_size != entries[name].get("bytes"):
                return False
            return hash_file(file, advance=advance) == entries[name].get("sha256")

        with ThreadPoolExecutor(workers) as pool:
            whole = list(pool.map(is_whole, entries))
    kept = {name: entry for (name, entry), good in zip(entries.items(), whole, strict=True) if good}
    progress.message(f"{path}: {len(kept)} files are finished and were checked")
    return kept
