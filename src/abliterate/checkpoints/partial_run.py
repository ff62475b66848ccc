"""A run that writes a directory for hours: it journals each file that is finished, and can be interrupted and resumed.

It writes `.NAME.partial` beside its target. An interrupted run leaves that directory behind, and a run that resumes
trusts nothing in it: it hashes every journalled file and removes the rest of what is its own.

The first line of a journal says what the work is made from; each other line is a file that was whole and flushed when
the line was written. A line that a crash cut off is ignored.
"""

import errno
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from abliterate.checkpoints.atomic_directory import WorkFolder
from abliterate.checkpoints.file_ranges import can_share_blocks, hash_file
from abliterate.checkpoints.work_folder import JOURNAL, JOURNALS, OWN, files_in
from abliterate.errors import CheckpointError, InputError, InterruptedRunError
from abliterate.files import JsonLines, write_file
from abliterate.progress import ProgressReporter

Key = Mapping[str, str]
Entry = dict[str, Any]


class Journal:
    """A new journal.

    Args:
        path: Its file; one that is there is replaced.
        key: What the work is made from, part by part; work with another key cannot be resumed.
        entries: Files that are whole already, by name.

    Raises:
        OSError: It cannot be written.
    """

    def __init__(self, path: Path, *, key: Key, entries: Mapping[str, Entry] | None = None) -> None:
        self._lines = JsonLines(path)
        lines: list[Entry] = [{"key": dict(key)}]
        lines += [{"name": name, **entry} for name, entry in (entries or {}).items()]
        # At once, so that what an earlier run has finished is never forgotten on the way.
        write_file(path, "".join(json.dumps(line) + "\n" for line in lines), parents=False)

    def add(self, name: str, entry: Entry) -> None:
        """Say that the file `name` is whole; on the disk when this returns.

        Raises:
            OSError: It cannot be written.
        """
        self._lines.append({"name": name, **entry})


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
        self.journal = Journal(path / OWN / JOURNAL, key=key, entries=self.kept)

    def has_finished_files(self) -> bool:
        """Return whether there is anything to resume from."""
        return bool(read_journals(self.path / OWN, pattern=JOURNALS)[1])


class PartialRun:
    """A run that writes a directory: it has the lock, and publishes or gives up in the end.

    Args:
        output: The directory to be.
        key: What the run makes it from, part by part.
        files: What it will write; None: that is not known.
        resume: Keep what an earlier run with the same key has finished.
        workers: Threads that hash what is there.
        progress: Told what is found and removed.
        overwrite: Replace `output`; see `WorkFolder`.

    Raises:
        InputError: Nothing can be written beside `output`, or another run is writing it, or something that is not the
            tool's lies there.
    """

    def __init__(
        self,
        output: Path,
        *,
        key: Key,
        resume: bool,
        workers: int,
        progress: ProgressReporter,
        files: Collection[str] | None = None,
        overwrite: bool = False,
    ) -> None:
        self._output, self._files = output, files
        path = partial_path(output)
        try:
            self._folder = WorkFolder(path, output, overwrite=overwrite)
            try:
                kept = _what_is_there(path, key=key, resume=resume, workers=workers, progress=progress)
                self._folder.begin(None if files is None else {*files, *kept}, keep=kept)
                self.directory = PartialDirectory(path, key=key, kept=kept)
                for journal in (path / OWN).glob(JOURNALS):
                    if journal.name != JOURNAL:
                        journal.unlink()
            except BaseException:
                self._folder.keep()
                raise
        except OSError as error:
            raise InputError(f"{path}: cannot be made: {error.strerror or error}; choose another place") from error

    def check_space(self, sizes: Mapping[str, int], *, source: Path, edited: int, stored: int) -> None:
        """Check that what will be written finds room, by what the file system gives to this user.

        Args:
            sizes: Name -> bytes of every file.
            source: One of the files that are copied.
            edited: Bytes that are written in any case; the others take none where files can share their blocks.
            stored: Bytes that the files that are copied take on their disk, fewer than they have where they have holes.

        Raises:
            CheckpointError: There is less room.
        """
        path, kept = self.directory.path, self.directory.kept
        needed = sum(size for name, size in sizes.items() if name not in kept)
        free = shutil.disk_usage(path).free
        if free < needed and source.stat().st_dev == path.stat().st_dev:
            # Holes stay holes; another file system may not know them.
            needed = min(needed, edited + stored)
        if free < needed and can_share_blocks(source, path / OWN):
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
            CheckpointError: Something else has its name by now, or came into it; what is finished is kept.
        """
        self._folder.publish(expected=self._files or ())

    def give_up(self, error: BaseException) -> BaseException:
        """Keep what a later run can resume from, or remove everything, and return the error that says so."""
        path = self.directory.path
        if self._folder.is_published:
            left = self._folder.ending(error, "")
            self._folder.end()
        elif not is_worth_keeping(error):
            # What was read or computed is wrong, and would be again.
            self._folder.end()
            return error
        elif self.directory.has_finished_files():
            self._folder.keep()
            left = (
                f"{self._output} was left as it was, and what is finished is kept in {path}: the same command goes on "
                "from there with --resume"
            )
        else:
            self._folder.end()
            left = f"{self._output} was left as it was, and nothing was kept"
        if isinstance(error, KeyboardInterrupt):
            return InterruptedRunError.of(error, left)
        if isinstance(error, OSError):
            return CheckpointError(f"{error.filename or self._output}: {error.strerror or error}; {left}")
        return CheckpointError(f"{error}; {left}")


@contextmanager
def partial_run(
    output: Path,
    *,
    key: Key,
    resume: bool,
    workers: int,
    progress: ProgressReporter,
    files: Collection[str] | None = None,
    overwrite: bool = False,
) -> Iterator[PartialRun]:
    """Yield a run whose directory appears if the body succeeds; see `PartialRun` for the arguments.

    Raises:
        InputError: Nothing can be written beside `output`, or another run is writing it.
        AbliterateError: The body failed; the message says what is kept (see `PartialRun.give_up`).
    """
    run = PartialRun(
        output, key=key, files=files, resume=resume, workers=workers, progress=progress, overwrite=overwrite
    )
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


def _what_is_there(path: Path, *, key: Key, resume: bool, workers: int, progress: ProgressReporter) -> dict[str, Entry]:
    """Return the entries of files that are whole, and say what becomes of the rest."""
    try:
        found_key, entries = read_journals(path / OWN, pattern=JOURNALS)
    except InputError:
        if resume:
            raise
        found_key, entries = None, {}
    changed = [part for part in key if found_key is None or found_key.get(part) != key[part]]
    if not resume and (entries or files_in(path)):
        progress.message(f"{path}: left by an interrupted run, removed; --resume would have gone on with it")
    elif resume and found_key is None:
        progress.message(f"{path}: nothing to resume; everything is written from the beginning")
    elif resume and changed:
        progress.message(
            f"{path}: what an interrupted run left is from another {', '.join(changed)}, so it was removed and "
            "everything is written from the beginning"
        )
    return _whole_files(path, entries, workers, progress) if resume and not changed else {}


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
