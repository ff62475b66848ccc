"""Files written or read together with their SHA-256, by which a record vouches for them."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from abliterate.progress import Advance

_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenFile:
    """What was written to one file."""

    sha256: str
    bytes: int


class HashingWriter:
    """Writes to a file and hashes on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Write all of `data`, which must be bytes or a view of bytes."""
        self._file.write(data)
        self._hash.update(data)
        self._bytes += len(data)

    def finish(self) -> WrittenFile:
        """Flush the file to the disk and say what is in it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return WrittenFile(sha256=self._hash.hexdigest(), bytes=self._bytes)


def copy_file(source: Path, target: Path) -> WrittenFile:
    """Copy one file's content, hashed on the way and flushed to the disk; `target` must not be there."""
    with source.open("rb") as reader, target.open("xb") as file:
        writer = HashingWriter(file)
        for chunk in _chunks(reader):
            writer.write(chunk)
        return writer.finish()


def write_file(path: Path, content: bytes) -> WrittenFile:
    """Write a new file, flushed to the disk; it must not be there."""
    with path.open("xb") as file:
        writer = HashingWriter(file)
        writer.write(content)
        return writer.finish()


def hash_file(path: Path, *, advance: Advance = lambda _bytes: None) -> str:
    """Return the SHA-256 of a file; `advance` is told the bytes read."""
    digest = hashlib.sha256()
    with path.open("rb") as reader:
        for chunk in _chunks(reader):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def _chunks(reader: BinaryIO) -> Iterator[bytes]:
    while chunk := reader.read(_CHUNK_BYTES):
        yield chunk
