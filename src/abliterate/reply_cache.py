"""Replies kept on disk, so that an interrupted evaluation goes on where it stopped.

Nothing is kept unless a folder is named for it, since replies to harmful prompts are among what is kept. One file
holds the replies of one model under one set of conditions; its name is a hash of all of them, weights included, so a
change of any makes a new file. Each line holds one reply as token ids, under the hash of its rendered prompt.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from abliterate.checkpoints.hashed_files import hash_file
from abliterate.errors import InputError
from abliterate.progress import SILENT, ProgressReporter

_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.py")
_WRITTEN_ABOUT_IT = frozenset(("abliteration.json", "evaluation.json"))


class ReplyCache:
    """The replies of one model under one set of conditions; use it as a context manager.

    Args:
        directory: where the file lies; made if need be, readable by its owner alone.
        conditions: everything a reply depends on but its prompt, as values JSON can hold.

    Raises:
        InputError: the folder or the file cannot be written.
    """

    def __init__(self, directory: Path, conditions: Mapping[str, Any]) -> None:
        text = json.dumps(dict(conditions), sort_keys=True, ensure_ascii=False)
        self.path = directory / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.jsonl"
        self.hits = 0
        self._replies: dict[str, list[int]] = {}
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._read()
            self._file = _open_for_append(self.path)
        except OSError as error:
            raise InputError(f"--cache {directory}: cannot be used: {error.strerror or error}") from error

    def __enter__(self) -> "ReplyCache":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def get(self, row: Sequence[int]) -> list[int] | None:
        """Return the reply to a rendered prompt (token ids), or None if it is not kept."""
        reply = self._replies.get(_key(row))
        self.hits += reply is not None
        return reply

    def put(self, row: Sequence[int], reply: Sequence[int]) -> None:
        """Keep a reply; it is on the disk when this returns."""
        key = _key(row)
        self._replies[key] = list(reply)
        self._file.write(json.dumps({"prompt": key, "reply": list(reply)}) + "\n")
        self._file.flush()

    def _read(self) -> None:
        if not self.path.is_file():
            return
        kept = 0
        with self.path.open("rb") as file:
            for line in file:
                # A run that was killed while it wrote leaves half a line, and it is the last.
                if not line.endswith(b"\n"):
                    break
                entry = json.loads(line)
                self._replies[entry["prompt"]] = entry["reply"]
                kept += len(line)
        os.truncate(self.path, kept)


def model_fingerprint(directory: Path, *, progress: ProgressReporter = SILENT) -> str:
    """Return a SHA-256 over the names and contents of a model's files: weights, configuration, tokenizer, code."""
    files = sorted({path for pattern in _MODEL_FILES for path in directory.glob(pattern) if path.is_file()})
    files = [path for path in files if path.name not in _WRITTEN_ABOUT_IT]
    digest = hashlib.sha256()
    total = sum(path.stat().st_size for path in files)
    with progress.task(f"Hashing {directory.name}", total=total, unit="bytes") as advance:
        for path in files:
            digest.update(f"{path.name}\0{hash_file(path, advance=advance)}\n".encode())
    return digest.hexdigest()


def _key(row: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps(list(row)).encode()).hexdigest()


def _open_for_append(path: Path) -> IO[str]:
    return open(path, "a", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600))
