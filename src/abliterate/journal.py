"""What is finished of a directory that is being written, line by line on the disk, so that a later run can go on.

The first line says what the work is made from; each other line is a file that was whole and flushed when the line was
written. A line that a crash cut off is no line.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Key = Mapping[str, str]
Entry = dict[str, Any]


class Journal:
    """A new journal.

    Args:
        path: Its file; one that is there is replaced.
        key: What the work is made from, part by part; work with another key cannot be gone on with.

    Raises:
        OSError: It cannot be written.
    """

    def __init__(self, path: Path, *, key: Key) -> None:
        self._path = path
        self.n_entries = 0
        path.write_bytes(b"")
        self._append({"key": dict(key)})

    def add(self, name: str, entry: Entry) -> None:
        """Say that the file `name` is whole; on the disk when this returns.

        Raises:
            OSError: It cannot be written.
        """
        self._append({"name": name, **entry})
        self.n_entries += 1

    def _append(self, line: Mapping[str, Any]) -> None:
        with self._path.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def read_journals(directory: Path, *, pattern: str) -> tuple[dict[str, str] | None, dict[str, Entry]]:
    """Read the journals of one work.

    Args:
        directory: Where they are.
        pattern: Of their file names.

    Returns:
        The key, None where there is no journal or they do not agree; and the entries by the names of the files.
    """
    keys: list[Any] = []
    entries: dict[str, Entry] = {}
    for path in sorted(directory.glob(pattern)):
        if not (whole := _lines(path)):
            continue
        first, *lines = whole
        keys.append(first.get("key"))
        entries |= {line["name"]: line for line in lines if isinstance(line.get("name"), str)}
    if not keys or not isinstance(keys[0], dict) or any(key != keys[0] for key in keys):
        return None, {}
    return keys[0], entries


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_bytes().split(b"\n")[:-1]:
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict):
            break
        lines.append(line)
    return lines
