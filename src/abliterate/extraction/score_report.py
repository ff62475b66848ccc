"""Candidate scores as JSON, CSV and plots: what `extract --report DIR` writes."""

import dataclasses
import importlib.util
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.errors import MissingDependencyError
from abliterate.extraction.options import Thresholds
from abliterate.extraction.selection import CandidateScore, failed_thresholds
from abliterate.files import write_csv, write_file, write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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


def require_plots() -> None:
    """Check that plots can be drawn.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError("--report draws plots with matplotlib: pip install 'abliterate[plots]'")


def write_figure(path: Path, figure: "Figure") -> None:
    """Write a figure as PNG; see `write_file`."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=144)
    write_file(path, content.getvalue())


def write_score_report(table: ScoreTable, directory: Path) -> list[Path]:
    """Write scores.json, scores.csv and one PNG per score to `directory`; return the files.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require_plots()
    return [_write_json(table, directory), _write_csv(table, directory), *_write_plots(table, directory)]


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


def _write_plots(table: ScoreTable, directory: Path) -> list[Path]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: list[tuple[str, str, Callable[[Axes], None]]] = [
        (
            "bypass",
            "Bypass: refusal metric on harmful prompts, ablated",
            lambda axes: _line(axes, table.baseline_harmful, "unchanged model", "dimgray", ":"),
        ),
        (
            "induce",
            "Induce: refusal metric on harmless prompts, added",
            lambda axes: _induce_lines(axes, table),
        ),
        (
            "kl",
            "KL(base || ablated) on harmless prompts (nats)",
            lambda axes: _line(axes, table.thresholds.kl, "threshold", "firebrick", "--"),
        ),
    ]
    written = []
    for name, label, add_lines in panels:
        figure = Figure(figsize=(8, 4.8), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        _draw_scores(axes, table, name)
        add_lines(axes)
        axes.axvline(
            table.thresholds.layer_limit(table.n_layers) - 0.5,
            color="silver",
            linestyle="--",
            label="layer limit",
        )
        if name == "kl":
            axes.set_yscale("symlog", linthresh=0.1)
        axes.set(xlabel="layer", ylabel=label, title=table.title, xlim=(-0.5, table.n_layers - 0.5))
        axes.legend(fontsize="small", ncols=2)
        path = directory / f"{name}.png"
        write_figure(path, figure)
        written.append(path)
    return written


def _draw_scores(axes: "Axes", table: ScoreTable, name: str) -> None:
    for position in sorted({score.position for score in table.scores}):
        # A score that was not needed leaves a gap in the line.
        points = sorted((s.layer, getattr(s, name)) for s in table.scores if s.position == position)
        values = [math.nan if value is None else value for _, value in points]
        if not all(math.isnan(value) for value in values):
            token = table.tokens[position] if -position <= len(table.tokens) else ""
            axes.plot([layer for layer, _ in points], values, marker=".", label=f"{position}: {token!r}")
    if table.selected is not None:
        axes.plot(
            table.selected.layer, getattr(table.selected, name), marker="*", markersize=14, color="black",
            linestyle="", label="selected", zorder=5,
        )  # fmt: skip


def _induce_lines(axes: "Axes", table: ScoreTable) -> None:
    _line(axes, table.baseline_harmless, "unchanged model", "dimgray", ":")
    _line(axes, table.thresholds.induce, "threshold", "firebrick", "--")


def _line(axes: "Axes", height: float, label: str, color: str, style: str) -> None:
    axes.axhline(height, color=color, linestyle=style, label=label)
