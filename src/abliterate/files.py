"""Files that others made, read without trust; and small files of our own, written whole or not at all.

JSON that others wrote is an error where it is ambiguous, or only some programs take it: a key that occurs twice means
one thing to one program and another to the next, and a name with terminal control characters can rewrite the line
that reports it. A directory that came from elsewhere can hold links to anything on this machine, so only regular
files belong to it, and links that stay inside, or lead where the Hub's cache keeps its blobs.

A small file of our own is written beside its target under a hidden name, flushed to the disk, and gets its own name
by one rename; whatever goes wrong before leaves the older file as it was and nothing else behind.
"""

import csv
import gc
import io
import itertools
import json
import math
import os
import re
import reprlib
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar

from abliterate.errors import AbliterateError, CheckpointError, InputError, ModelError

# Real ones: 15 levels, 40 characters a number, names of 150 characters, 30 MB.
_MAX_DEPTH = 64
_MAX_DIGITS = 400
_MAX_NAME = 1000
MAX_BYTES = 100_000_000
# A number that is too long has at least so many digits in a row.
_DIGITS_ALIKE = bytes(ord("0") if chr(byte) in "0123456789" else byte for byte in range(256))
_LONG_NUMBER = b"0" * _MAX_DIGITS
HALF_PAIR = re.compile("[\ud800-\udfff]")

Value = TypeVar("Value")


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep Python from looking for cycles while many objects are made and none is dropped, at all of them each time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def parse_json(data: bytes, *, infinities: bool = False) -> Any:
    """Parse a JSON document that must be UTF-8.

    Args:
        data: The document.
        infinities: Let the infinities pass, which are no JSON; configs that transformers 4 wrote have them.

    Raises:
        ValueError: It is not JSON, a key occurs twice, a number is no finite one or absurdly long, a name or string
            cannot be shown or written, or nested too deeply. The message is one line that any terminal can show.
    """
    # The parser of the library is compiled and so are these searches, which tell that nothing need be looked at singly.
    has_long_numbers = _LONG_NUMBER in data.translate(_DIGITS_ALIKE)
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer if has_long_numbers else int,
            parse_float=_floating if not infinities else float,
            parse_constant=_infinity if infinities else _refuse_constant,
        )
    except RecursionError as error:
        raise ValueError("it nests too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from error
    if b"\\u" in data or _is_nested_too_deeply(value):
        _check_values(value)
    return value


def shown(value: Any) -> str:
    """Return a value as a message can show it: on one line, shortened, with nothing that a terminal acts on."""
    return printable(reprlib.repr(value))


def printable(text: str) -> str:
    """Return a text with everything that a terminal might act on, but line breaks and tabs, written as an escape.

    Spaces of any width stay, and so do the joiners that words of some languages and many emoji are written with.
    """
    return "".join(c if _is_plain(c) else c.encode("unicode_escape").decode("ascii") for c in text)


_LONGEST_SAID = 300


def in_one_line(error: BaseException | str) -> str:
    """Return what a library or a file says, as part of a message of ours: one line, shortened, printable."""
    said = printable(" ".join(str(error).split())).rstrip(".")
    return said if len(said) <= _LONGEST_SAID else said[: _LONGEST_SAID - 3] + "..."


@contextmanager
def known_error(failure: str, *, hint: str = "") -> Iterator[None]:
    """Raise whatever goes wrong while a library reads files that came from elsewhere as one known error.

    A broken file makes transformers fail in any way that Python knows, and tokenizers, which is written in Rust, in one
    that is no `Exception`. Signals pass.

    Args:
        failure: What the message begins with.
        hint: What it ends with.

    Raises:
        ModelError: Something went wrong.
    """
    try:
        yield
    except AbliterateError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = in_one_line(error) or type(error).__name__
        raise ModelError(f"{failure}: {said}{hint}") from error


_SECRET_NAME = re.compile("TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL")
_SHORTEST_SECRET = 8
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")


def without_secrets(text: str) -> str:
    """Return a text without tokens and keys: those of the environment, and what looks like one of the Hub.

    What a server answers is shown in errors, and may repeat what it was sent.
    """
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and _SECRET_NAME.search(name.upper()):
            text = text.replace(value, "***")
    return _HUB_TOKEN.sub("hf_***", text)


def _is_plain(character: str) -> bool:
    return character.isprintable() or character in "\n\t\u200c\u200d" or unicodedata.category(character) == "Zs"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    names = "".join(found)
    if len(found) == len(pairs) and names.isprintable() and (len(names) <= _MAX_NAME or _are_short(found)):
        return found
    found = {}
    for name, value in pairs:
        if len(name) > _MAX_NAME:
            raise ValueError(f"a name has {len(name)} characters, {name[:20]!a}...")
        if not name.isprintable():
            raise ValueError(f"the name {name!a} has characters that cannot be shown")
        if name in found:
            raise ValueError(f"the name {name!r} occurs twice")
        found[name] = value
    return found


def _are_short(names: Iterable[str]) -> bool:
    return max(map(len, names)) <= _MAX_NAME


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def _floating(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is not finite")
    return value


def _infinity(name: str) -> float:
    return float(name) if name != "NaN" else _refuse_constant(name)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _is_nested_too_deeply(value: Any) -> bool:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(_MAX_DEPTH):
        inside = itertools.chain.from_iterable(each.values() if type(each) is dict else each for each in level)
        level = [each for each in inside if type(each) is dict or type(each) is list]
    return bool(level)


def _check_values(value: Any) -> None:
    pending = [(value, 1)]
    while pending:
        item, depth = pending.pop()
        if isinstance(item, str):
            if HALF_PAIR.search(item):
                raise ValueError(f"the text {item[:40]!a} holds half of a surrogate pair")
        elif isinstance(item, (dict, list)):
            if depth > _MAX_DEPTH:
                raise ValueError(f"it nests more than {_MAX_DEPTH} levels")
            pending += [(each, depth + 1) for each in (item.values() if isinstance(item, dict) else item)]


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
    # Not every system has these, and the last keeps one that has it from changing line ends.
    flags = (getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NONBLOCK", "O_BINARY"))
    descriptor = os.open(path, sum(flags, os.O_RDONLY))
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


def check_writable(path: Path, *, flag: str, directory: bool = False) -> None:
    """Check before hours of work that something can be written, and leave nothing behind.

    Args:
        path: A file; where something that is no regular file has its name (`/dev/null`, a pipe), that is not opened.
        flag: The option that names it, for the message.
        directory: It is a directory that files will be written to, and need not be there.

    Raises:
        InputError: It cannot be.
    """
    try:
        mode = path.stat().st_mode if path.exists() else None
        if directory and mode is not None and not stat.S_ISDIR(mode):
            raise InputError(f"{path}: is no directory; give {flag} a directory to write")
        if not directory and mode is not None and stat.S_ISDIR(mode):
            raise InputError(f"{path}: is a directory; give {flag} a file to write")
        if mode is not None and not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            return
        real = Path(os.path.realpath(path))
        candidates = (real, *real.parents) if directory else real.parents
        place = next(each for each in candidates if os.path.lexists(each))
        # By chance and not by the process: in a container every run may have the same number.
        trial = place / f".abliterate-trial-{os.urandom(6).hex()}"
        os.close(os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        trial.unlink()
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}; choose another {flag}") from error


def write_file(path: Path, content: bytes | str, *, parents: bool = True) -> None:
    """Write a file; text in UTF-8, its line breaks as they are.

    A new file gets the permissions that the umask leaves, an older one keeps its own. A link is followed, and what is
    no regular file (`/dev/null`, a pipe) is written to in place.

    Args:
        path: The file.
        content: What it will hold.
        parents: Make the directories that lead to it.

    Raises:
        OSError: It cannot be written.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    mode = path.stat().st_mode if path.exists() else None
    if mode is not None and not stat.S_ISREG(mode):
        path.write_bytes(data)
        return
    path = Path(os.path.realpath(path))
    if parents:
        path.parent.mkdir(parents=True, exist_ok=True)
    # Not the whole name: one of the greatest length must still find room.
    partial = path.with_name(f".{path.name[:50]}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            if mode is not None:
                partial.chmod(stat.S_IMODE(mode))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any, *, allow_nan: bool = True) -> None:
    """Write a JSON document, indented, as UTF-8; see `write_file`.

    Args:
        path: The file.
        value: What JSON can hold.
        allow_nan: Write null for NaN and the infinities, which are no JSON.

    Raises:
        OSError: It cannot be written.
        ValueError: A number is not finite, and `allow_nan` is false.
    """
    content = _with_null(value) if allow_nan else value
    write_file(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _with_null(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _with_null(item) for key, item in value.items()}
    return [_with_null(item) for item in value] if isinstance(value, (list, tuple)) else value


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table with its header; see `write_file`.

    Raises:
        OSError: It cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(rows)
    write_file(path, text.getvalue())


def _not_regular(path: Path, mode: int) -> CheckpointError:
    kind = _KINDS.get(stat.S_IFMT(mode), "something else")
    return CheckpointError(f"{path}: is {kind}, where a file is expected; download the checkpoint again")


def read_json_report(path: Path) -> dict[str, Any]:
    """Read a report that abliterate wrote as a JSON object.

    Raises:
        InputError: It cannot be read, or holds something else.
        CheckpointError: It is not a regular file.
    """
    try:
        with open_regular(path) as file:
            content = parse_json(file.read())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no JSON object")
    return content


class JsonLines:
    """A file that grows by one JSON value a line, and is read back after a crash.

    A line is on the disk when `append` returns. A crash can therefore leave one torn line, which is the last, and it is
    ignored. Damage anywhere else has another cause, and is an error that names the line. Lines end with a line feed
    alone; what else Unicode calls a line break (U+2028) may stand inside a JSON string.

    Args:
        path: Its path.
        remedy: What to do when a line is damaged, for the message.
        mode: The permissions of a new file, before the umask.
    """

    def __init__(self, path: Path, *, remedy: str = "delete it", mode: int = 0o666) -> None:
        self.path = path
        self._remedy = remedy
        self._mode = mode

    def start(self) -> None:
        """Make the file, or empty it.

        Raises:
            OSError: It cannot be written.
        """
        os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, self._mode))

    def resume(self, parse: Callable[[Any], Value]) -> list[Value]:
        """Return what is there, make the file if it is not, and cut off a torn line, so that the next one is whole.

        Raises:
            InputError: A line before the last is damaged.
            OSError: It cannot be read or written.
        """
        values, whole = self._read(parse)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, self._mode)
        try:
            if os.fstat(descriptor).st_size != whole:
                os.ftruncate(descriptor, whole)
        finally:
            os.close(descriptor)
        return values

    def read(self, parse: Callable[[Any], Value]) -> list[Value]:
        """Return the values, without a torn one; an empty list where there is no file.

        Args:
            parse: Makes a value of parsed JSON. A TypeError, ValueError, KeyError or AttributeError means that the line
                is damaged.

        Raises:
            InputError: A line before the last is damaged.
            OSError: It cannot be read.
        """
        return self._read(parse)[0]

    def append(self, value: Any) -> None:
        """Write one line; it is on the disk when this returns.

        Raises:
            OSError: It cannot be written; the file is as it was, so that another line can follow.
        """
        line = memoryview(json.dumps(value).encode() + b"\n")
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, self._mode)
        try:
            before = os.fstat(descriptor).st_size
            try:
                while line:
                    line = line[os.write(descriptor, line) :]
                os.fsync(descriptor)
            except BaseException:
                os.ftruncate(descriptor, before)
                raise
        finally:
            os.close(descriptor)

    def _read(self, parse: Callable[[Any], Value]) -> tuple[list[Value], int]:
        """Return the values and how many bytes they take."""
        try:
            *lines, unfinished = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return [], 0
        values: list[Value] = []
        whole = 0
        for number, line in enumerate(lines, 1):
            try:
                values.append(parse(json.loads(line.decode("utf-8"))))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                # A crash of the whole machine can tear the last line and keep its line feed.
                if number == len(lines) and not unfinished:
                    break
                raise InputError(f"{self.path}, line {number}: is damaged ({error}); {self._remedy}") from error
            whole += len(line) + 1
        return values, whole
