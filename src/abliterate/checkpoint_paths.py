"""Which files of a directory belong to it: regular ones, and no links that lead out of it.

A directory that came from elsewhere can hold links to anything on this machine, and copying it would copy that. The
Hub's cache is made of links, too: from `models--OWNER--NAME/snapshots/COMMIT` into `models--OWNER--NAME/blobs`, which
is where they may lead and nowhere else.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from abliterate.errors import CheckpointError

# Where an unfinished directory of this tool keeps its journal.
_OWN = ".abliterate"
_SKIPPED_DIRECTORIES = {".git", ".cache", _OWN}
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def has_file(directory: Path, name: str) -> bool:
    """Return whether a directory has a file called `name`.

    Raises:
        CheckpointError: It has something of that name that is no regular file, or a link that leads out of it.
    """
    path = directory / name
    if not os.path.lexists(path):
        return False
    if not stays_inside(directory, path):
        raise CheckpointError(
            f"{path}: is a link that leads out of its directory, and such links are not followed; copy the file there, "
            "or give the directory that it leads to"
        )
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not stat.S_ISREG(mode):
        raise _not_regular(path, mode)
    return True


def stays_inside(directory: Path, path: Path) -> bool:
    """Return whether a path, its links followed, lies in a directory, or in the blobs of the Hub's cache beside it."""
    try:
        root, target = directory.resolve(), path.resolve()
    except (OSError, RuntimeError):  # a loop of links
        return False
    if target.is_relative_to(root):
        return True
    repository = root.parent.parent
    is_snapshot = root.parent.name == "snapshots" and repository.name.startswith("models--")
    return is_snapshot and target.is_relative_to(repository / "blobs")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; never waits, as opening a named pipe would.

    Raises:
        OSError: It cannot be opened.
        CheckpointError: It is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise _not_regular(path, mode)
    return os.fdopen(descriptor, "rb")


def regular_files(directory: Path) -> Iterator[tuple[str, bool]]:
    """Walk over all files below a directory, but not through links to directories, nor into what tools keep there.

    Yields:
        Relative POSIX path, and whether the file may be read: False for a link that leads out of the directory.
    """
    for parent, subdirectories, files in os.walk(directory):
        subdirectories[:] = sorted(set(subdirectories) - _SKIPPED_DIRECTORIES)
        for name in sorted(set(files) - {_OWN}):
            path = Path(parent) / name
            if path.is_file():
                yield path.relative_to(directory).as_posix(), stays_inside(directory, path)


def _not_regular(path: Path, mode: int) -> CheckpointError:
    kind = _KINDS.get(stat.S_IFMT(mode), "something else")
    return CheckpointError(f"{path}: is {kind}, where a file is expected; download the checkpoint again")
