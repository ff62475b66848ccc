"""A directory that appears whole or not at all, and takes the place of an older one only then, and only if asked to.

It is written beside its target under a hidden name (see `work_folder`) and gets its own name by one rename.
`published_directory` writes `.NAME.new` and leaves nothing behind when something goes wrong. What takes long is a
`partial_run`, which can be resumed.

A process that is killed in the moment after the rename leaves `.abliterate` in the new directory. All that reads a
checkpoint passes over it, and what replaces the directory takes it along.
"""

import ctypes
import errno
import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from abliterate.checkpoints.work_folder import (
    LOCK,
    OWN,
    FileLock,
    State,
    claim,
    files_in,
    foreign_files,
    has_list,
    lock_in,
    remove_marks,
    remove_own,
)
from abliterate.errors import CheckpointError, InputError, InterruptedRunError
from abliterate.files import check_writable

# What tells a checkpoint or an adapter, which may be replaced, from a directory that was named by mistake.
MARKERS = ("config.json", "adapter_config.json", "abliteration.json", "hooks.json")

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
    if not any((output / marker).is_file() for marker in MARKERS) and any(
        path.name != OWN for path in output.iterdir()
    ):
        raise InputError(
            f"{output}: exists and holds no {MARKERS[0]}, so it is no checkpoint and is not replaced; "
            "choose another directory"
        )


class WorkFolder:
    """The hidden directory of one run: locked, told apart from what others put there, and published in the end.

    Args:
        path: Where it is made, unless an earlier run has left it.
        output: The directory to be, beside it.
        overwrite: Replace `output` if it is a checkpoint or an empty directory, with all that it holds by now.

    Raises:
        InputError: Another run works there, or what is there is not the tool's.
        OSError: It cannot be made.
    """

    def __init__(self, path: Path, output: Path, *, overwrite: bool) -> None:
        self.path, self._output, self._overwrite = path, output, overwrite
        self._new_parents = [parent for parent in output.parents if not parent.exists()]
        # Where file systems cannot let two directories change places, the older one waits here for a moment.
        self._replaced = path.with_name(f"{path.name}.replaced")
        self._old_lock: FileLock | None = None
        self._was_published = False
        self._before = self._what_may_go()
        output.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() or (path.is_dir() and not (path / OWN).is_dir() and any(path.iterdir())):
            raise InputError(f"{path}: is where {output} would be written, and is something else; move it away")
        try:
            self._lock = lock_in(path / OWN)
        except BlockingIOError as error:
            raise InputError(
                f"{output}: another run is writing it, in {path}; wait for that one, or choose another directory"
            ) from error
        try:
            if foreign := foreign_files(path):
                raise InputError(
                    f"{path / foreign[0]}: is not abliterate's, and lies where {output} would be written; move it away"
                )
            if self._bring_back():
                self._before = self._what_may_go()
        except BaseException:
            self._lock.release()
            raise

    @property
    def is_published(self) -> bool:
        """Whether `output` is this directory by now."""
        self._was_published = self._was_published or self._lock.is_of(self._output / OWN / LOCK)
        return self._was_published

    def begin(self, files: Collection[str] | None, *, keep: Collection[str] = ()) -> None:
        """Remove what an earlier run has left, and say what this one will write.

        Args:
            files: The names; None: they are not known, and whatever lies there is this run's.
            keep: What is not removed.

        Raises:
            OSError: It cannot be.
        """
        remove_own(self.path, keep=keep, and_itself=False)
        claim(self.path, None if files is None else dict.fromkeys(files))

    def publish(self, *, expected: Collection[str] = ()) -> None:
        """Give the directory its name by one rename, and remove what it replaced.

        Args:
            expected: Files that must be there.

        Raises:
            OSError: It could not be done, and what has that name is as it was, unless `is_published`.
            CheckpointError: Something that is not the tool's came into one of the directories, or went missing, or
                what has that name by now is nothing that may be replaced.
        """
        if foreign := foreign_files(self.path):
            raise _refused(f"{self.path / foreign[0]}: appeared while this run was going on; move it away")
        if missing := [name for name in expected if not (self.path / name).is_file()]:
            raise _refused(f"{self.path / missing[0]}: is gone, and this run had written it")
        for directory, _, _ in os.walk(self.path):
            _sync_directory(Path(directory))
        self._lock.prepare_removal()
        if self._overwrite and os.path.lexists(self._output):
            self._replace()
        else:
            _rename_to_new(self.path, self._output)
        _sync_directory(self._output.parent)
        self.end()

    def end(self) -> None:
        """Let go of it: remove what is not needed any more, which without `publish` is all that this run wrote."""
        is_published = self.is_published
        with suppress(OSError, InputError):
            if self._old_lock is not None:
                for place in (self.path, self._replaced):
                    if is_published and self._old_lock.is_of(place / OWN / LOCK):
                        remove_own(place)
                self._old_lock.release()
            if is_published:
                if self._lock.is_of(self._output / OWN / LOCK):
                    remove_marks(self._output)
            elif self._lock.is_of(self.path / OWN / LOCK):
                self._lock.prepare_removal()
                remove_own(self.path)
        self._lock.release()
        if not is_published:
            for parent in self._new_parents:
                with suppress(OSError):
                    parent.rmdir()

    def keep(self) -> None:
        """Let go of it, and leave it for a run that resumes."""
        self._lock.release()

    def ending(self, error: BaseException, otherwise: str) -> str:
        """Return what became of `output` when a run failed with an error: it is there all the same, or `otherwise`."""
        if not self.is_published:
            return otherwise
        unsure = ", but the disk did not confirm its name" if isinstance(error, OSError) else ""
        return f"{self._output} is whole{unsure}"

    def _replace(self) -> None:
        """Put the directory in the place of an older one, in which nothing has changed since this run began."""
        output = self._output
        try:
            check_output_directory(output, overwrite=True)
            # Never made anew: somebody may have renamed its parent.
            self._old_lock = lock_in(output / OWN, parents=False)
        except InputError as error:
            raise _refused(str(error)) from error
        except BlockingIOError as error:
            raise _refused(f"{output}: another run is about to replace it or has just made it") from error
        try:
            if files_in(output) != self._before:
                raise _refused(f"{output}: was changed while this run was going on, and is not replaced; move it away")
            claim(output, self._before)
            if not _rename_at(self.path, output, _RENAME_EXCHANGE):
                output.rename(self._replaced)
                try:
                    self.path.rename(output)
                except BaseException:
                    self._replaced.rename(output)
                    raise
        finally:
            if not self.is_published:
                with suppress(OSError):
                    remove_marks(output)

    def _what_may_go(self) -> dict[str, State]:
        """Return what the directory that is to be replaced holds; what comes into it later is not replaced."""
        return files_in(self._output) if self._overwrite and self._output.is_dir() else {}

    def _bring_back(self) -> bool:
        """Finish what a run that was killed between two renames has left; return whether the older one is back."""
        if not (self._replaced / OWN).is_dir():
            return False
        if not has_list(self._replaced) or not has_list(self.path):
            # The second rename was made; its list goes when all that is on it has gone.
            remove_own(self._replaced)
            return False
        try:
            _rename_to_new(self._replaced, self._output)
        except FileExistsError as error:
            raise InputError(
                f"{self._replaced}: is what {self._output} was before a run that was killed; move it away"
            ) from error
        remove_marks(self._output)
        if not self._overwrite:
            check_output_directory(self._output, overwrite=False)
        return True


def _refused(message: str) -> CheckpointError:
    """Return an error after which the same run can go on once its cause is out of the way."""
    error = CheckpointError(message)
    error.__cause__ = FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    return error


@contextmanager
def published_directory(output: Path, *, overwrite: bool, files: Collection[str] | None = None) -> Iterator[Path]:
    """Yield a hidden directory that becomes `output` if the body succeeds, and vanishes if it does not.

    Args:
        output: The directory to be; ask `check_output_directory` before any work is done.
        overwrite: Replace what `check_output_directory` lets be replaced; else what appears there meanwhile is kept.
        files: What the body writes; None: that is not known, and whatever comes into the directory is taken for it.

    Raises:
        InputError: Nothing can be written beside `output`, or another run is writing it.
        CheckpointError: Writing failed, as on a full disk, or `output` appeared meanwhile; it is as it was.
    """
    path = output.with_name(f".{output.name}.new")
    try:
        folder = WorkFolder(path, output, overwrite=overwrite)
        try:
            folder.begin(files)
        except BaseException:
            folder.end()
            raise
    except OSError as error:
        raise InputError(f"{path}: cannot be made: {error.strerror or error}; choose another place") from error
    try:
        yield folder.path
        folder.publish(expected=files or ())
    except OSError as error:
        left = folder.ending(error, f"{output} was left as it was")
        raise CheckpointError(f"{error.filename or output}: {error.strerror or error}; {left}") from error
    except KeyboardInterrupt as error:
        if not folder.is_published:
            raise
        raise InterruptedRunError.of(error, folder.ending(error, "")) from error
    finally:
        folder.end()


def _rename_to_new(partial: Path, output: Path) -> None:
    """Rename a directory to a name that nothing has."""
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


def _sync_directory(path: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):
        return  # this system opens no directories
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
