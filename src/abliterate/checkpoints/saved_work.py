"""What a long run has computed so far, in a directory of its own, so that the same command goes on from there.

    KEY.json               what the parts depend on: model files, prompts, options, versions
    NAME.safetensors       tensors, as one recording
    values.jsonl           plain values by name, one line for each group that was saved together
    lock                   held by the process that works in it

Replies of a model are never among them: they are written to disk only where someone asks for that.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.checkpoints.work_folder import LOCK, FileLock, lock_in
from abliterate.errors import InputError, InterruptedRunError
from abliterate.files import JsonLines, write_file
from abliterate.processes import Ranks
from abliterate.progress import SILENT, ProgressReporter

if TYPE_CHECKING:
    from torch import Tensor

_KEY = "KEY.json"
_VALUES = "values.jsonl"


def work_directory(output: Path) -> Path:
    """Return where a run that writes `output` keeps its interim results."""
    return output.with_name(output.name + ".work")


@contextmanager
def saved_work(
    directory: Path | None, *, key: Mapping[str, Any], ranks: Ranks | None = None, progress: ProgressReporter = SILENT
) -> Iterator["SavedWork"]:
    """Yield what is saved, deleted when the body succeeds; when it fails, or a signal comes, it stays for the next try.

    Args:
        directory: where the parts are; None saves nothing.
        key: what they depend on; see `SavedWork`.
        ranks: the processes that share the run. The first reads and writes, and tells the others which values it found.
        progress: see `SavedWork`.

    Raises:
        InputError: see `SavedWork`.
        InterruptedRunError: a signal came, and something is kept.
    """
    ranks = ranks or Ranks()
    saved = SavedWork(directory if ranks.is_first else None, key=key, progress=progress)
    try:
        saved.agree(ranks)
        try:
            yield saved
        except KeyboardInterrupt as error:
            if saved.directory is None or not (saved.directory / _KEY).is_file():
                raise
            kept = f"what was computed is kept in {saved.directory}: the same command goes on from there"
            raise InterruptedRunError.of(error, kept) from error
        saved.discard()
    finally:
        saved.release()


class SavedWork:
    """A directory of finished parts, or nothing at all when there is no directory.

    Args:
        directory: where the parts are; None saves nothing.
        key: what they depend on, as plain JSON values. Parts saved under another key are deleted.
        progress: is told when saved work is used, or cannot be.

    Raises:
        InputError: the directory holds something else, or cannot be written, or another process works in it.
    """

    def __init__(self, directory: Path | None, *, key: Mapping[str, Any], progress: ProgressReporter = SILENT) -> None:
        self._directory = directory
        self._values: dict[str, Any] = {}
        self._lock: FileLock | None = None
        if directory is None:
            return
        self._lines = JsonLines(directory / _VALUES, remedy="delete the file, and what it holds is computed again")
        try:
            self._open(directory, dict(json.loads(json.dumps(key))), progress)
        except OSError as error:
            raise InputError(f"{directory}: cannot keep interim results here: {error.strerror or error}") from error

    def _open(self, directory: Path, key: dict[str, Any], progress: ProgressReporter) -> None:
        saved = _read_key(directory)
        if saved is None and directory.exists() and any(path.name != LOCK for path in directory.iterdir()):
            raise InputError(f"{directory}: is there and holds no interim results; move it out of the way")
        try:
            self._lock = lock_in(directory)
        except BlockingIOError as error:
            raise InputError(
                f"{directory}: another run is working there; wait for that one, or choose another -o"
            ) from error
        try:
            self._fill(directory, key, progress)
        except BaseException:
            self.release()
            raise

    def _fill(self, directory: Path, key: dict[str, Any], progress: ProgressReporter) -> None:
        # Read again: until now another process may have worked here.
        saved = _read_key(directory)
        if saved == key:
            for values in self._lines.resume(dict):
                self._values |= values
            n_recordings = len(list(directory.glob("*.safetensors")))
            progress.message(f"continuing: {n_recordings} recordings and {len(self._values)} values are in {directory}")
            return
        if saved is not None:
            changed = sorted(name for name in {*key, *saved} if key.get(name) != saved.get(name))
            progress.message(f"starting anew: {', '.join(changed)} changed since {directory} was written")
        for path in directory.iterdir():
            if path.name != LOCK:
                path.unlink()
        write_file(directory / _KEY, json.dumps(key, indent=1, sort_keys=True))

    @property
    def directory(self) -> Path | None:
        """Where it lies; None where nothing is saved."""
        return self._directory

    def tensors(self, name: str) -> "dict[str, Tensor] | None":
        """Return the tensors saved under this name, or None."""
        if self._directory is None or not (self._directory / f"{name}.safetensors").is_file():
            return None
        from safetensors.torch import load_file

        return load_file(self._directory / f"{name}.safetensors")

    def save_tensors(self, name: str, tensors: "Mapping[str, Tensor]") -> None:
        """Save some tensors, whole or not at all."""
        if self._directory is not None:
            from safetensors.torch import save

            write_file(self._directory / f"{name}.safetensors", save(dict(tensors)))

    def value(self, name: str) -> Any:
        """Return the plain JSON value saved last under this name, or None."""
        return self._values.get(name)

    def save_values(self, values: Mapping[str, Any]) -> None:
        """Save plain JSON values by name, all or none; a name that is there gets the new value."""
        self._values |= values
        if self._directory is not None:
            self._lines.append(dict(values))

    def agree(self, ranks: Ranks) -> None:
        """Take the first process's values, so that all know the same of what was saved before."""
        self._values = ranks.first_says(self._values)

    @contextmanager
    def useless_after(self, *errors: type[Exception]) -> Iterator[None]:
        """Delete the directory where the body fails in a way in which it would fail again, whatever is saved."""
        try:
            yield
        except errors:
            self.discard()
            raise

    def discard(self) -> None:
        """Delete the directory."""
        if self._directory is not None:
            if self._lock is not None:
                self._lock.prepare_removal()
            shutil.rmtree(self._directory, ignore_errors=True)
            self.release()

    def release(self) -> None:
        """Let other processes work in the directory."""
        if self._lock is not None:
            self._lock.release()


def _read_key(directory: Path) -> dict[str, Any] | None:
    try:
        key = json.loads((directory / _KEY).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    return key if isinstance(key, dict) else None
