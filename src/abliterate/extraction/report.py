"""What an extraction is asked for and what it reports, as plain values."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from abliterate.arguments import cli_arguments
from abliterate.checkpoints.model_source import ModelSource
from abliterate.checkpoints.provenance import values_sha256, versions
from abliterate.directions import Direction, make_direction
from abliterate.errors import NoDirectionError
from abliterate.extraction.candidates import Robustness
from abliterate.extraction.judgement import RefusalEvidence
from abliterate.extraction.options import DirectionRecipe, ExtractionOptions, RepairOptions, Thresholds
from abliterate.extraction.refusal import RefusalToken
from abliterate.extraction.score_report import ScoreTable
from abliterate.extraction.screening import Confirmation
from abliterate.extraction.selection import CandidateScore, best_by_each_score, nearest_candidates, rounded_up
from abliterate.models.chat_model import ChatModel
from abliterate.prompt_sets import ExtractionPrompts


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptCounts:
    """Prompts sampled and kept after filtering, of one kind and part."""

    sampled: int
    kept: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """The mean refusal metric of the unchanged model on the validation prompts."""

    harmful: float
    harmless: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JointScores:
    """Bypass and KL with all chosen directions ablated together; see `CandidateScore`."""

    bypass: float
    kl: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractionReport:
    """The result of an extraction, as plain values; the tensors are in the directions.

    Attributes:
        model: what the directions were found in.
        revision: commit of the model on the Hub; None for a local one.
        n_layers: number of decoder blocks.
        d_model: width of the residual stream.
        post_instruction_tokens: texts of the post-instruction tokens, first to last.
        response_prefix: what is forced after the template, so that the next token starts the answer.
        refusal_tokens: the tokens that start refusals.
        refusal: how prompts were found to be refused, and what candidates were scored by.
        counts: kind and part of prompts -> how many were sampled and kept.
        baseline: see `Baseline`.
        thresholds: as asked for; that of induce counts from `refusal.zero`.
        recipe: how candidates were made.
        selected: the best candidate that passes.
        further: with a rank above one, the other chosen candidates, the best first.
        together: with a rank above one, the scores of ablating all of them.
        confirmed: what replies are under the best candidates, where they were looked at.
        raced: whether candidates were scored on as many prompts as it took to decide; see `racing`.
        n_passing: how many candidates are known to pass; without `exhaustive` scoring stops at what is needed.
        n_scored: how many candidates have any score.
        exhaustive: whether every candidate below the layer limit was scored.
        direction_norm: of the selected candidate, un-normalised.
        scores: one entry per position and layer.
        robustness: how direction and choice vary with the prompts; None unless asked for.
    """

    model: str
    revision: str | None
    n_layers: int
    d_model: int
    post_instruction_tokens: tuple[str, ...]
    response_prefix: str
    refusal_tokens: tuple[RefusalToken, ...]
    refusal: RefusalEvidence
    counts: dict[str, PromptCounts]
    baseline: Baseline
    thresholds: Thresholds
    recipe: DirectionRecipe
    selected: CandidateScore
    further: tuple[CandidateScore, ...] = ()
    together: JointScores | None = None
    confirmed: tuple[Confirmation, ...] = ()
    raced: bool = False
    n_passing: int
    n_scored: int
    exhaustive: bool
    direction_norm: float
    scores: tuple[CandidateScore, ...]
    robustness: Robustness | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Extraction:
    """Directions, the best first, the report of how they were found, and the scores as `score_report` writes them."""

    directions: tuple[Direction, ...]
    report: ExtractionReport
    score_table: ScoreTable

    @property
    def direction(self) -> Direction:
        """The best direction; the only one unless `rank` asked for more."""
        return self.directions[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairScore:
    """What ablating a candidate does to validation prompts.

    Attributes:
        position: post-instruction position, negative.
        layer: block whose input it was read from.
        bypass: mean refusal metric, in nats, on the borderline prompts that the unchanged model refuses; where `kept`
            is None, on the first of them.
        kept: the same on the harmful prompts that it refuses; None where it was not needed.
        lost: by how much the share of these whose metric is above its zero falls.
        kl: mean KL(base || ablated), in nats, of the first answer token on harmless prompts, or the first of them.
    """

    position: int
    layer: int
    bypass: float
    kept: float | None = None
    lost: float | None = None
    kl: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairConfirmation:
    """What the replies are with a candidate ablated, on validation prompts that the unchanged model refuses.

    Attributes:
        position: post-instruction position, negative.
        layer: block whose input it was read from.
        borderline: borderline prompts that are still refused.
        n_borderline: how many there are.
        harmful: harmful prompts that are still refused.
        n_harmful: how many there are.
    """

    position: int
    layer: int
    borderline: int
    n_borderline: int
    harmful: int
    n_harmful: int

    @property
    def lost(self) -> float:
        """The share of harmful prompts that are no longer refused."""
        return 1 - self.harmful / max(1, self.n_harmful)


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairReport:
    """The result of a repair, as plain values.

    Attributes:
        model: what it was found in.
        refusal_tokens: texts of the tokens that start refusals.
        zero: the refusal metric's zero, in nats.
        counts: prompts of each part: sampled, and kept, which are those refused of `harmful` and `borderline`, and
            those answered of `harmless`.
        answered: borderline prompts that are answered, by part.
        baseline: mean refusal metric of the unchanged model, on borderline and on harmful validation prompts.
        options: as asked for.
        selected: what was chosen.
        confirmed: the replies under the best that pass.
        direction_norm: of the chosen candidate, un-normalised.
        share_left: of the length of the difference between refused and answered borderline prompts, what is left where
            the true refusal direction is taken out.
        scores: of all candidates.
    """

    model: str
    refusal_tokens: tuple[str, ...]
    zero: float
    counts: Mapping[str, PromptCounts]
    answered: Mapping[str, int]
    baseline: Mapping[str, float]
    options: RepairOptions
    selected: RepairScore
    confirmed: tuple[RepairConfirmation, ...]
    direction_norm: float
    share_left: float
    scores: tuple[RepairScore, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """A direction of false refusals, and how it was found."""

    direction: Direction
    report: RepairReport


class NoCandidatePassesError(NoDirectionError):
    """No candidate passes; carries all scores, and the nearest candidates with what each fails and by how much."""

    def __init__(self, score_table: ScoreTable, *, evidence: RefusalEvidence) -> None:
        self.score_table = score_table
        self.evidence = evidence
        self.nearest = nearest_candidates(
            score_table.scores,
            thresholds=score_table.thresholds,
            n_layers=score_table.n_layers,
            gap=score_table.gap,
        )
        message = "no candidate direction passes the selection"
        if self.nearest:
            best = self.nearest[0].candidate
            failed = ", ".join(self.nearest[0].failed)
            message += f"; nearest: position {best.position}, layer {best.layer} ({failed})"
        accepting = " ".join(self.accepting)
        remedy = f"{accepting} would accept it" if accepting else "other prompts (--harmful, --harmless) may find one"
        super().__init__(f"{message}; {remedy}")

    @property
    def accepting(self) -> list[str]:
        """The command-line arguments that would accept the nearest candidate; empty where none would."""
        if not self.nearest or not math.isfinite(self.nearest[0].distance):
            return []
        found = self.nearest[0]
        score, changed = found.candidate, Thresholds()
        if "kl" in found.beyond and score.kl is not None:
            changed = replace(changed, kl=rounded_up(score.kl))
        if "induce" in found.beyond and score.induce is not None:
            changed = replace(changed, induce=math.floor((score.induce - self.evidence.zero) * 1000) / 1000)
        if "layer" in found.beyond:
            share = 1 - (score.layer + 1) / self.score_table.n_layers
            changed = replace(changed, prune_layers=max(0.0, math.floor(share * 1000) / 1000))
        return cli_arguments(changed)

    @property
    def report(self) -> dict[str, Any]:
        """What is nearest and by how much it fails, as plain values."""
        return {
            "error": "no candidate direction passes the selection",
            "thresholds": self.score_table.thresholds,
            "baseline": {
                "harmful": self.score_table.baseline_harmful,
                "harmless": self.score_table.baseline_harmless,
            },
            "refusal": self.evidence,
            "nearest": self.nearest,
            "best": best_by_each_score(self.score_table.scores),
            "accepting": self.accepting,
        }


def directions_of(
    *,
    candidates: Tensor,
    report: ExtractionReport,
    chat: ChatModel,
    prompts: ExtractionPrompts,
    options: ExtractionOptions,
    arguments: Sequence[str],
    source: ModelSource | None,
) -> tuple[Direction, ...]:
    """Return the chosen candidates as directions, each of which carries its provenance.

    Args:
        candidates: [n_pos, n_layers, d_model], un-normalised.
        report: the result of the extraction.
        chat: the model it was found in.
        prompts: the prompts it was found with.
        options: how it was found.
        arguments: the same as the arguments of the command.
        source: where the model came from.
    """
    n_positions, n_layers = candidates.shape[:2]
    grids = {
        name: torch.full((n_positions, n_layers), float("nan"), dtype=torch.float64)
        for name in ("bypass", "induce", "kl")
    }
    for score in report.scores:
        for name, grid in grids.items():
            value = getattr(score, name)
            if value is not None:
                grid[score.position, score.layer] = value
    chosen = (report.selected, *report.further)
    metadata = {
        **provenance(chat=chat, source=source, model=report.model, arguments=arguments, seed=options.seed),
        "recipe": asdict(report.recipe),
        "thresholds": asdict(report.thresholds),
        "baseline": asdict(report.baseline),
        "refusal_tokens": [{"id": token.token_id, "text": token.text} for token in report.refusal_tokens],
        "refusal": asdict(report.refusal),
        "raced": report.raced,
        "confirmed": [asdict(one) for one in report.confirmed],
        "exhaustive": options.scores_all,
        "robustness": asdict(report.robustness) if report.robustness else None,
        "counts": {name: asdict(counts) for name, counts in report.counts.items()},
        "prompt_sets": {
            name: {"name": chosen.name, "sha256": chosen.sha256}
            for name in ("harmful_train", "harmless_train", "harmful_validation", "harmless_validation")
            for chosen in (getattr(prompts, name),)
        },
        # Of each prompt, so that `evaluate` can leave out what the direction was found with.
        "prompt_hashes": list(prompts.hashes),
    }
    return tuple(
        make_direction(
            mean_difference=candidates[score.position, score.layer],
            candidates=candidates,
            scores=grids,
            metadata=metadata | asdict(score) | {"number": number, "rank": len(chosen)},
        )
        for number, score in enumerate(chosen, 1)
    )


def provenance(
    *, chat: ChatModel, source: ModelSource | None, model: str, arguments: Sequence[str], seed: int
) -> dict[str, Any]:
    """Return what a direction's file says of the model that it was found in, and of the command.

    Args:
        chat: the model.
        source: where it came from.
        model: what it is called.
        arguments: those of the command.
        seed: of the draw of prompts.
    """
    return {
        "model": model,
        "revision": source.revision if source else None,
        "model_type": chat.model.config.model_type,
        # A record has `config_file_sha256`, of the file's bytes.
        "config_values_sha256": _config_hash(source),
        "d_model": chat.d_model,
        "n_layers": chat.n_layers,
        "arguments": list(arguments),
        "post_instruction_tokens": list(chat.chat_format.post_instruction_tokens),
        "response_prefix": chat.chat_format.response_prefix,
        "thinking_disabled": chat.chat_format.thinking_disabled,
        "system_prompt": chat.system_prompt,
        "dtype": str(chat.model.dtype).removeprefix("torch."),
        "seed": seed,
        "versions": versions("abliterate", "python", "torch", "transformers"),
    }


def _config_hash(source: ModelSource | None) -> str | None:
    # A GGUF file has none.
    if source is None or source.path.is_file():
        return None
    config = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    return values_sha256(config)
