"""Files and their SHA-256, by which a record vouches for them."""

import hashlib
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
