"""What an extraction has computed so far, on disk, so that an interrupted one goes on where it stopped.

    KEY.json               what the values depend on: model files, prompts, options, versions
    NAME.safetensors       one recording: activations and logits of one set of prompts
    scores.jsonl           one line per group of candidates, written when the group is done

Thresholds are no part of the key: they choose among scores and do not change them.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from abliterate.checkpoints.json_lines import JsonLines
from abliterate.errors import InputError
from abliterate.extraction.selection import Candidate, PromptScores, ScoreName
from abliterate.files import write_file
from abliterate.progress import SILENT, ProgressReporter

_KEY = "KEY.json"
_SCORES = "scores.jsonl"


class SavedWork:
    """A directory of finished parts, or nothing at all when there is no directory.

    Args:
        directory: where the parts are; None saves nothing.
        key: what the values depend on, as plain JSON values. Parts saved under another key are deleted.
        progress: is told when saved work is used, or cannot be.

    Raises:
        InputError: the directory holds something else, or cannot be written.
    """

    def __init__(self, directory: Path | None, *, key: Mapping[str, Any], progress: ProgressReporter = SILENT) -> None:
        self._directory = directory
        self._scores: dict[tuple[ScoreName, Candidate], tuple[float, ...]] = {}
        if directory is None:
            return
        self._lines = JsonLines(directory / _SCORES, remedy="delete the file, and its scores are computed again")
        try:
            self._open(directory, dict(json.loads(json.dumps(key))), progress)
        except OSError as error:
            raise InputError(f"{directory}: cannot keep interim results here: {error.strerror or error}") from error

    def _open(self, directory: Path, key: dict[str, Any], progress: ProgressReporter) -> None:
        saved = _read_key(directory)
        if saved == key:
            for scores in self._lines.resume(_scores_of):
                self._scores |= scores
            n_recordings = len(list(directory.glob("*.safetensors")))
            progress.message(f"continuing: {n_recordings} recordings and {len(self._scores)} scores are in {directory}")
            return
        if directory.exists():
            if saved is None and any(directory.iterdir()):
                raise InputError(f"{directory}: is there and holds no interim results; move it out of the way")
            changed = sorted(name for name in {*key, *(saved or {})} if key.get(name) != (saved or {}).get(name))
            if saved is not None:
                progress.message(f"starting anew: {', '.join(changed)} changed since {directory} was written")
            shutil.rmtree(directory)
        directory.mkdir(parents=True)
        write_file(directory / _KEY, json.dumps(key, indent=1, sort_keys=True))

    def recording(self, name: str) -> dict[str, Tensor] | None:
        """Return the tensors saved under this name, or None."""
        if self._directory is None or not (self._directory / f"{name}.safetensors").is_file():
            return None
        return safetensors.torch.load_file(self._directory / f"{name}.safetensors")

    def save_recording(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Save some tensors, whole or not at all."""
        if self._directory is not None:
            write_file(self._directory / f"{name}.safetensors", safetensors.torch.save(dict(tensors)))

    def scores(self, name: ScoreName, candidate: Candidate) -> PromptScores | None:
        """Return a candidate's saved scores of this name, or None unless all are there."""
        names: tuple[ScoreName, ...] = ("bypass", "kl") if name == "ablated" else (name,)
        if any((each, candidate) not in self._scores for each in names):
            return None
        return {each: self._scores[each, candidate] for each in names}

    def save_scores(self, candidates: Sequence[Candidate], values: Sequence[PromptScores]) -> None:
        """Save the scores of one group of candidates."""
        for candidate, scores in zip(candidates, values, strict=True):
            self._scores |= {(name, candidate): prompts for name, prompts in scores.items()}
        if self._directory is not None:
            self._lines.append([[*c, v] for c, v in zip(candidates, map(dict, values), strict=True)])

    def discard(self) -> None:
        """Delete the directory: the work is done."""
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


def _read_key(directory: Path) -> dict[str, Any] | None:
    try:
        key = json.loads((directory / _KEY).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    return key if isinstance(key, dict) else None


def _scores_of(line: Any) -> dict[tuple[ScoreName, Candidate], tuple[float, ...]]:
    return {
        (name, (position, layer)): tuple(prompts)
        for position, layer, values in line
        for name, prompts in values.items()
    }
