"""What a result was made from, as plain values to write beside it or to compare with later.

A hash of the model's files in one of two strengths, a hash of any plain values, and the versions of what computed it.
"""

import hashlib
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from abliterate._version import __version__
from abliterate.checkpoints.file_ranges import hash_file
from abliterate.progress import SILENT, ProgressReporter

_EDGE_BYTES = 1 << 20
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.py")
_WRITTEN_ABOUT_IT = frozenset(("abliteration.json", "evaluation.json"))


def values_sha256(value: Any) -> str:
    """Return the hex SHA-256 of what JSON can hold; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def model_sha256(path: Path, *, progress: ProgressReporter = SILENT) -> str:
    """Return a SHA-256 over the names and contents of a model's files: weights, configuration, tokenizer, code.

    For results that are kept for long: every file is read whole. What this tool writes about a model is left out. A
    GGUF file is a whole model by itself.
    """
    found = [path] if path.is_file() else [file for pattern in _MODEL_FILES for file in path.glob(pattern)]
    files = sorted({file for file in found if file.is_file() and file.name not in _WRITTEN_ABOUT_IT})
    digest = hashlib.sha256()
    total = sum(file.stat().st_size for file in files)
    with progress.task(f"Hashing {path.name}", total=total, unit="bytes") as advance:
        for file in files:
            digest.update(f"{file.name}\0{hash_file(file, advance=advance)}\n".encode())
    return digest.hexdigest()


def quick_model_sha256(path: Path) -> str:
    """Return a hash of all files of a model: small ones whole; of large ones size, time, and both ends.

    For work that is resumed soon. A checkpoint of hundreds of gigabytes is not read a second time for this; an
    edit that keeps a file's size, its time of change and its first and last megabyte goes unseen.
    """
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file()):
        status = file.stat()
        digest.update(f"{file.name} {status.st_size}\n".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(_EDGE_BYTES))
            if status.st_size > _EDGE_BYTES:
                digest.update(f"{status.st_mtime_ns}".encode())
                opened.seek(max(_EDGE_BYTES, status.st_size - _EDGE_BYTES))
                digest.update(opened.read())
    return digest.hexdigest()


def versions(*names: str) -> dict[str, str]:
    """Return the versions of what computes here, by name.

    Args:
        names: abliterate, python, or packages that are installed.
    """
    known = {"abliterate": __version__, "python": platform.python_version()}
    return {name: known.get(name) or metadata.version(name) for name in names}
