"""A directory that appears whole or not at all, and takes the place of an older one only then.

It is written beside its target under a hidden name and gets its own name by one rename; whatever goes wrong
before leaves nothing behind, and the older directory as it was.
"""

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from abliterate.errors import CheckpointError, InputError

# What tells a checkpoint or an adapter, which may be replaced, from a directory that was named by mistake.
MARKERS = ("config.json", "adapter_config.json")

# Of the system call renameat2, which Python does not have.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def check_output_directory(output: Path, *, overwrite: bool) -> None:
    """Check, before any work is done, that a checkpoint may be published as `output`.

    Raises:
        InputError: It exists, and `overwrite` is false or it is neither a checkpoint nor an empty directory.
    """
    if not output.exists() and not output.is_symlink():
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
def published_directory(output: Path) -> Iterator[Path]:
    """Yield a hidden directory that becomes `output` if the body succeeds, and vanishes if it does not.

    A directory that is there already is replaced: ask `check_output_directory` first.

    Raises:
        InputError: Nothing can be written beside `output`.
        CheckpointError: Writing failed, as on a full disk; `output` is as it was.
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
        publish(partial, output)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or output}: {error.strerror or error}; {output} was left as it was"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in new_parents:
            with suppress(OSError):  # it holds the published directory
                parent.rmdir()


def publish(partial: Path, output: Path) -> None:
    """Give a whole directory its name by one rename; an older one of that name is gone afterwards.

    Raises:
        OSError: It could not be done, and the older one is as it was.
    """
    for directory, _, _ in os.walk(partial):
        _sync_directory(Path(directory))
    if not output.exists():
        partial.rename(output)
    elif _exchange(partial, output):
        _sync_directory(output.parent)
        shutil.rmtree(partial, ignore_errors=True)
    else:
        _replace(partial, output)
    _sync_directory(output.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places at once; False where kernel or file system cannot do that."""
    if sys.platform != "linux":
        return False
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        return False
    answer = library.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return bool(answer == 0)


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
