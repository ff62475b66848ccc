"""A file that grows by one JSON value a line, and is read back after a crash.

A line is on the disk when `append` returns. A crash can therefore leave one torn line, which is the last, and it is
ignored. Damage anywhere else has another cause, and is an error that names the line. Lines end with a line feed alone;
what else Unicode calls a line break (U+2028) may stand inside a JSON string.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from abliterate.errors import InputError

Value = TypeVar("Value")


class JsonLines:
    """One such file.

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
