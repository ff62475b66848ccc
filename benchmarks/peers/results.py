"""What a run of the benchmark has measured so far: one JSON document that grows run by run, and that a rerun reads.

    {"format": 1, "conditions": {...}, "base": {...} | null, "runs": [RUN, ...]}

A RUN is one (tool, seed, trials); it has `usage` and `results`, one for each model that the tool left, or an `error`:
the last line of what went wrong. Numbers only: no reply of a model, no path and no name of a machine is in it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abliterate.files import write_json

FORMAT = 1
NAME = "results.json"
KINDS = ("harmful", "harmless", "borderline")
_RATE = ("n", "refused", "answered", "degenerate", "rate", "low", "high")
Key = tuple[str, int, int | None]


class ResultsError(Exception):
    """The results that are there cannot be gone on with; the message says why."""


class Results:
    """The document, and the file it lies in."""

    def __init__(self, path: Path, conditions: Mapping[str, Any]) -> None:
        """Read what is there, or begin.

        Raises:
            ResultsError: What is there was measured on another model, on other prompts or in another way.
        """
        self._path = path
        self.document: dict[str, Any] = {"format": FORMAT, "conditions": dict(conditions), "base": None, "runs": []}
        if not path.is_file():
            return
        try:
            before = read_results(path)
        except ValueError as error:
            raise ResultsError(f"{path}: {error}; remove it, or give another --output") from error
        changed = [name for name in conditions if before["conditions"].get(name) != conditions[name]]
        if changed:
            raise ResultsError(
                f"{path} was measured with another {', '.join(changed)}; give another --output, or the same options"
            )
        self.document = before

    def finished(self, key: Key, *, retry_failed: bool = False) -> bool:
        """Return whether a run is done; one that failed is done too, unless failed ones are to be tried again."""
        run = next((run for run in self.document["runs"] if key_of(run) == key), None)
        return run is not None and not (retry_failed and failed(run))

    def add(self, run: Mapping[str, Any]) -> None:
        """Put a run in, in the place of one with the same key, and write the file."""
        runs = [one for one in self.document["runs"] if key_of(one) != key_of(run)]
        self.document["runs"] = [*runs, dict(run)]
        write_json(self._path, self.document)

    def set_base(self, base: Mapping[str, Any]) -> None:
        """Say what the model itself does; the first evaluation has it."""
        if self.document["base"] is None:
            self.document["base"] = dict(base)


def read_results(path: Path) -> dict[str, Any]:
    """Return a document of results.

    Raises:
        ValueError: It is none.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict) or document.get("format") != FORMAT or "runs" not in document:
        raise ValueError(f"it holds no results of format {FORMAT}")
    return document


def key_of(run: Mapping[str, Any]) -> Key:
    """Return what tells runs apart."""
    return run["tool"], run["seed"], run["trials"]


def failed(run: Mapping[str, Any]) -> bool:
    """Return whether a run, or the evaluation of anything that it left, came to nothing."""
    return run.get("error") is not None or any(result.get("error") is not None for result in run["results"])


def kept(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is kept of the report of `evaluate` about the edited model."""
    return {
        "rates": {kind: {name: report["rates"][kind][name] for name in _RATE} for kind in KINDS},
        "divergence": report["divergence"],
        "cross_entropy": report["cross_entropy"],
        "text_cross_entropy": report["text_cross_entropy"],
    }


def kept_base(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is kept of the report of `evaluate` about the base."""
    return {
        "rates": {kind: {name: report["base_rates"][kind][name] for name in _RATE} for kind in KINDS},
        "cross_entropy": report["cross_entropy"]["base"],
        # A set's name may be a path.
        "prompt_sets": {
            kind: {name: value for name, value in one.items() if name != "name"}
            for kind, one in report["prompt_sets"].items()
        },
    }
