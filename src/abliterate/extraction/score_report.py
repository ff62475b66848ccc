"""Candidate scores as JSON and CSV."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.extraction.options import Thresholds
from abliterate.extraction.selection import CandidateScore, failed_thresholds
from abliterate.files import write_csv, write_json

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreTable:
    """All candidates of one extraction and what they are judged by.

    Attributes:
        scores: one entry per (position, layer).
        selected: the chosen one, or None when nothing passes.
        thresholds: see `Thresholds`.
        n_layers: number of decoder blocks.
        baseline_harmful: mean refusal metric of the unchanged model on harmful validation prompts.
        baseline_harmless: the same on harmless ones.
        tokens: texts of the post-instruction tokens, first to last.
        title: the model's name.
        recipe: how the candidates were made, in words.
    """

    scores: Sequence[CandidateScore]
    selected: CandidateScore | None
    thresholds: Thresholds
    n_layers: int
    baseline_harmful: float
    baseline_harmless: float
    tokens: Sequence[str]
    title: str
    recipe: str = "difference in means"

    @property
    def gap(self) -> float:
        """By how much the unchanged model's metric is higher on harmful prompts."""
        return self.baseline_harmful - self.baseline_harmless


def write_score_report(table: ScoreTable, directory: Path) -> list[Path]:
    """Write scores.json and scores.csv to `directory`; return the files."""
    return [_write_json(table, directory), _write_csv(table, directory)]


def _write_json(table: ScoreTable, directory: Path) -> Path:
    def plain(score: CandidateScore) -> dict[str, Any]:
        values = dataclasses.asdict(score)
        # JSON has no NaN; a score that is not a number says so in words.
        values = {k: "NaN" if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}
        return {**values, "failed": failed_thresholds(score, table.thresholds, table.n_layers)}

    document = {
        "model": table.title,
        "recipe": table.recipe,
        "thresholds": dataclasses.asdict(table.thresholds),
        "baseline": {"harmful": table.baseline_harmful, "harmless": table.baseline_harmless},
        "post_instruction_tokens": list(table.tokens),
        "selected": dataclasses.asdict(table.selected) if table.selected else None,
        "scores": [plain(score) for score in table.scores],
    }
    path = directory / "scores.json"
    write_json(path, document)
    return path


def _write_csv(table: ScoreTable, directory: Path) -> Path:
    path = directory / "scores.csv"
    best = table.selected
    chosen = None if best is None else (best.position, best.layer)
    rows = (
        (each.position, each.layer, each.bypass, each.induce, each.kl, int((each.position, each.layer) == chosen))
        for each in table.scores
    )
    write_csv(path, ("position", "layer", "bypass", "induce", "kl", "selected"), rows)
    return path
