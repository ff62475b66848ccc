"""A hidden directory that one process at a time works in, and that takes away nothing but what is its own.

In it lies `.abliterate`, with a lock and a list of the files that are the tool's. The list is on the disk before any of
these files is, and goes after all of them; so whoever finds the directory after a crash knows what may be removed, and
whatever else lies there was put there by somebody else and stays. A directory that is about to be replaced gets such a
list too, of what it held when the run began.
"""

import json
import os
import re
import sys
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath

from abliterate.errors import InputError
from abliterate.files import parse_json, write_file

OWN = ".abliterate"
LOCK = "lock"
JOURNAL = "journal-0.jsonl"
# Older versions wrote one for each of several processes.
JOURNALS = "journal-*.jsonl"
_LIST = "files.json"
# What `files.write_file` writes before it has its name, and where it is tried whether blocks can be shared.
_UNFINISHED = re.compile(r"\.(.{1,50})\.partial-\d+", re.DOTALL)
_TRIAL = ".shared-*"

# Of a file: which one it is, how long, and when it was changed; None where that does not matter.
State = tuple[int, int, int] | None
Owned = Mapping[str, State]


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
        except OSError:
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


def lock_in(directory: Path, *, parents: bool = True) -> FileLock:
    """Make a directory if it is not there, and lock it: one process at a time works in it.

    Args:
        directory: The directory.
        parents: Make those that lead to it, too.

    Raises:
        BlockingIOError: Another does.
        OSError: It cannot be made.
    """
    while True:
        directory.mkdir(parents=parents, exist_ok=True)
        lock = FileLock(directory / LOCK)
        if lock.is_of(directory / LOCK):
            return lock
        # The other process removed the directory between the two calls.
        lock.release()


def files_in(directory: Path) -> dict[str, State]:
    """Return relative path -> state of every file in a directory, links too, but for those in `.abliterate`.

    Raises:
        OSError: The directory cannot be read.
    """
    found: dict[str, State] = {}
    pending = [(directory, PurePosixPath())]
    while pending:
        path, place = pending.pop()
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if (place / entry.name).parts != (OWN,):
                        pending.append((Path(entry.path), place / entry.name))
                else:
                    state = entry.stat(follow_symlinks=False)
                    found[(place / entry.name).as_posix()] = (state.st_ino, state.st_size, state.st_mtime_ns)
    return found


def claim(directory: Path, files: Owned | None) -> None:
    """Say which files of a directory are the tool's, before they are there; None: whatever will lie there.

    Raises:
        OSError: It cannot be written.
    """
    # As pairs: what others call their files may be no name that a document of ours can have.
    content = json.dumps({"files": None if files is None else list(files.items())})
    # Where somebody has renamed the directory meanwhile, none of its name is made.
    write_file(directory / OWN / _LIST, content, parents=False)


def claimed(directory: Path) -> Owned | None:
    """Return what `claim` said; of a directory that an older version left, None.

    Raises:
        InputError: The list is damaged.
        OSError: It cannot be read.
    """
    path = directory / OWN / _LIST
    try:
        files = parse_json(path.read_bytes())["files"]
        if files is None:
            return None
        return {str(name): None if state is None else (state[0], state[1], state[2]) for name, state in files}
    except FileNotFoundError:
        return None if any((directory / OWN).glob(JOURNALS)) else {}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise InputError(f"{path}: is damaged ({error}); move {directory} away") from error


def has_list(directory: Path) -> bool:
    """Return whether a directory says which of its files are the tool's."""
    return (directory / OWN / _LIST).is_file()


def foreign_files(directory: Path) -> list[str]:
    """Return what lies in a directory and is not the tool's, by its list.

    Raises:
        InputError: The list is damaged.
        OSError: It cannot be read.
    """
    owned = claimed(directory)
    return [] if owned is None else sorted(files_in(directory).keys() - _owned_names(directory, owned))


def remove_own(directory: Path, *, keep: Collection[str] = (), and_itself: bool = True) -> None:
    """Remove what is the tool's, and the directories that are empty then; files that are not stay where they are.

    Args:
        directory: The directory, which this process has locked.
        keep: Files that stay.
        and_itself: Remove `.abliterate` too, and then the directory if nothing is left in it.

    Raises:
        InputError: The list is damaged.
        OSError: Something cannot be removed.
    """
    owned = claimed(directory)
    names = _owned_names(directory, owned) - set(keep)
    for name in sorted(names):
        (directory / name).unlink(missing_ok=True)
    if owned is None or and_itself:
        parents = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_dir()}
    else:
        # Those of files that a killed run had not come to, too: it may have made the directory already.
        parents = {parent.as_posix() for name in {*names, *owned} for parent in PurePosixPath(name).parents}
    for parent in sorted(parents - {".", OWN}, key=len, reverse=True):
        with suppress(OSError):  # it holds what stays
            (directory / parent).rmdir()
    if and_itself:
        remove_marks(directory)
        with suppress(OSError):
            directory.rmdir()


def remove_marks(directory: Path) -> None:
    """Remove `.abliterate`, the lock last, but nothing that somebody else put there.

    Raises:
        OSError: Something cannot be removed.
    """
    own = directory / OWN
    unfinished = [path for path in own.glob(".*.partial-*") if _UNFINISHED.fullmatch(path.name)]
    # Without a list nothing would be known to be the tool's: it goes when all else has gone.
    for path in (*own.glob(JOURNALS), *own.glob(_TRIAL), *unfinished, own / _LIST, own / LOCK):
        path.unlink(missing_ok=True)
    with suppress(OSError):
        own.rmdir()


def _owned_names(directory: Path, owned: Owned | None) -> set[str]:
    there = files_in(directory)
    if owned is None:
        return set(there)
    names = {name for name in there.keys() & owned.keys() if owned[name] in (None, there[name])}
    beginnings = {(path.parent, path.name[:50]) for path in map(PurePosixPath, owned)}
    for path in map(PurePosixPath, there.keys() - names):
        unfinished = _UNFINISHED.fullmatch(path.name)
        if unfinished and (path.parent, unfinished[1]) in beginnings:
            names.add(path.as_posix())
    return names
