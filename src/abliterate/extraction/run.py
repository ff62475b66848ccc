"""Finding the refusal direction: difference in means, filtering, scoring, selection (Arditi et al. 2024, section 2)."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from abliterate.arguments import cli_arguments
from abliterate.checkpoints.hub import ModelSource
from abliterate.checkpoints.provenance import quick_model_sha256, versions
from abliterate.directions import orthonormalize
from abliterate.errors import InputError, NoDirectionError, RefusalBehaviourError
from abliterate.extraction.candidates import (
    Robustness,
    candidate_directions,
    independent_candidates,
    measure_robustness,
)
from abliterate.extraction.options import ExtractionOptions, PromptSources
from abliterate.extraction.refusal import refusal_metric, refusal_tokens_of, require_both_behaviours
from abliterate.extraction.report import (
    Baseline,
    Extraction,
    ExtractionReport,
    JointScores,
    NoCandidatePassesError,
    PromptCounts,
    directions_of,
)
from abliterate.extraction.saved_work import SavedWork
from abliterate.extraction.score_report import ScoreTable
from abliterate.extraction.scoring import CandidateScorer, StreamedScorer
from abliterate.extraction.selection import CandidateScore, passing_candidates
from abliterate.extraction.shared_runs import PARTS, RecordingRun, Scorer, ScoringRun
from abliterate.models.chat_model import ChatModel, find_response_prefix, with_response_prefix
from abliterate.models.hooks import Recording
from abliterate.models.loading import open_model
from abliterate.models.options import ModelOptions
from abliterate.models.stream_probe import StreamProbe, probe_stream
from abliterate.models.streamed_model import StreamedChat
from abliterate.processes import Ranks, find_ranks
from abliterate.progress import SILENT, ProgressReporter
from abliterate.prompt_sets import ExtractionPrompts, PromptSet, split_for_extraction

MIN_PROMPTS = 8
"""Fewer prompts than this on one side after filtering are too few to take a mean of."""
N_PREFIX_PROMPTS = 8


def extract_direction(
    *,
    model: "str | Path | ModelSource | ChatModel",
    harmful: str = "bundled",
    harmless: str = "bundled",
    options: ExtractionOptions | None = None,
    model_options: ModelOptions | None = None,
    progress: ProgressReporter = SILENT,
    work_directory: Path | None = None,
    deliver: Callable[[Extraction], None] = lambda _extraction: None,
) -> Extraction:
    """Find the direction in the residual stream that mediates refusal.

    Where a launcher started several processes (`torchrun`), they share the work, and each returns the whole.

    Args:
        model: a directory, a Hub id, a resolved source or a loaded model.
        harmful: prompt SPEC, see `abliterate.prompt_sets`.
        harmless: prompt SPEC.
        options: how to extract; default: the paper's values.
        model_options: how to load and run the model.
        progress: where to show progress.
        work_directory: where to keep recordings and scores as they are computed; an extraction that was interrupted
            goes on from there, and the directory is deleted at the end. None, or a loaded model: nothing is kept.
        deliver: given the result before that directory is deleted: if it cannot be saved, the work is not lost.

    Raises:
        NoDirectionError: no candidate passes the selection.
        RefusalBehaviourError: the model refuses nothing, or everything.
        PromptSetError: too few prompts, or a SPEC that cannot be read.
        ModelError: the model does not load as a chat model.
    """
    options = options or ExtractionOptions()
    _check_options(options)
    prompts = split_for_extraction(harmful, harmless, n_train=options.n_train, n_val=options.n_val, seed=options.seed)
    for note in prompts.notes:
        progress.message(note)
    model_options = model_options or ModelOptions()
    ranks = find_ranks(device=model_options.device)
    spill = None if work_directory is None else work_directory.absolute().parent
    opened = open_model(
        model, options=model_options, extracts=True, can_stream=True, spill_directory=spill, progress=progress
    )
    source, chat = opened.source, opened.chat
    # A small model of the kind has been looked at where layers are streamed.
    probe = None if isinstance(chat, StreamedChat) else probe_stream(chat)
    chat = force_response_prefix(chat, prompts, progress)
    saved = SavedWork(
        work_directory if source is not None and ranks.is_first else None,
        key=_work_key(source, prompts, options, model_options),
        progress=progress,
    )
    run = _Run(
        chat=chat,
        probe=probe,
        prompts=prompts,
        options=options,
        arguments=(
            *cli_arguments(PromptSources(harmful=harmful, harmless=harmless)),
            *cli_arguments(options),
            *cli_arguments(replace(model_options, system_prompt=chat.system_prompt)),
        ),
        progress=progress,
        saved=saved,
        ranks=ranks,
    )
    try:
        extraction = run.extract(source)
    except (InputError, RefusalBehaviourError):
        # Nothing that is there would help the next attempt; after "no candidate passes" it would.
        saved.discard()
        raise
    deliver(extraction)
    saved.discard()
    if isinstance(chat, StreamedChat):
        progress.message(f"the weights were read {chat.weights.reads} times")
    return extraction


def _work_key(
    source: ModelSource | None, prompts: ExtractionPrompts, options: ExtractionOptions, model_options: ModelOptions
) -> dict[str, Any]:
    return {
        "model": None if source is None else {"files": quick_model_sha256(source.path), "revision": source.revision},
        "prompts": {name: getattr(prompts, name).sha256 for name in PARTS},
        "refusal tokens": options.refusal_tokens,
        "filter": options.filter_prompts,
        "recipe": asdict(options.recipe),
        "model options": asdict(model_options),
        "versions": versions("abliterate", "python", "torch", "transformers"),
    }


def _check_options(options: ExtractionOptions) -> None:
    for name, value, low in (("n-train", options.n_train, MIN_PROMPTS), ("n-val", options.n_val, 1)):
        if value < low:
            raise InputError(f"--{name} {value} is too small; give at least {low}")
    if not 0 <= options.thresholds.prune_layers < 1:
        raise InputError(f"--prune-layers {options.thresholds.prune_layers:g} must be at least 0 and below 1")
    if options.recipe.winsorize is not None and not 0 <= options.recipe.winsorize < 0.5:
        raise InputError(f"--winsorize {options.recipe.winsorize:g} must be at least 0 and below 0.5")
    for name, value, low in (("rank", options.rank, 1), ("bootstrap", options.n_bootstrap, 0)):
        if value < low:
            raise InputError(f"--{name} {value} must be at least {low}")


def force_response_prefix(chat: ChatModel, prompts: ExtractionPrompts, progress: ProgressReporter) -> ChatModel:
    """Return the model with what starts all of its answers forced: the token after it tells them apart."""
    few = [*prompts.harmful_train.texts[:N_PREFIX_PROMPTS], *prompts.harmless_train.texts[:N_PREFIX_PROMPTS]]
    prefix = find_response_prefix(chat, few)
    if prefix:
        progress.message(f"every answer starts with {prefix!r}; it is forced, and the token after it is scored")
    return with_response_prefix(chat, prefix)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """One extraction on a loaded model."""

    chat: ChatModel
    probe: StreamProbe | None
    prompts: ExtractionPrompts
    options: ExtractionOptions
    arguments: tuple[str, ...]
    progress: ProgressReporter
    saved: SavedWork
    ranks: Ranks

    def extract(self, source: ModelSource | None) -> Extraction:
        """Record, filter, take the means, score and choose."""
        recordings = RecordingRun(
            chat=self.chat, prompts=self.prompts, saved=self.saved, ranks=self.ranks, progress=self.progress
        ).record()
        harmful, harmless = recordings["harmful_train"], recordings["harmless_train"]
        tokens = refusal_tokens_of(
            chat=self.chat,
            prompts=self.prompts,
            harmful=harmful,
            harmless=harmless,
            named=self.options.refusal_tokens,
            describe=not isinstance(self.chat, StreamedChat),
        )
        token_ids = [token.token_id for token in tokens]
        training, counts = self._training(harmful, harmless, token_ids)
        candidates = candidate_directions(**training, recipe=self.options.recipe)
        rows, base_logits, baseline = self._validation(recordings, token_ids, counts)
        scorer = self._scorer(candidates, rows, base_logits, token_ids)
        thresholds, n_layers = self.options.thresholds, self.chat.n_layers
        scoring = ScoringRun(
            scorer=scorer,
            saved=self.saved,
            ranks=self.ranks,
            thresholds=thresholds,
            n_layers=n_layers,
            exhaustive=self.options.scores_all,
            enough=lambda passing: len(self._choose(candidates, passing)) == self.options.rank,
            # Streamed layers show their own progress.
            progress=SILENT if isinstance(self.chat, StreamedChat) else self.progress,
        )
        scores = scoring.score(candidates)
        passing = passing_candidates(scores, thresholds=thresholds, n_layers=n_layers)
        table = ScoreTable(
            scores=scores,
            selected=passing[0] if passing else None,
            thresholds=thresholds,
            n_layers=n_layers,
            baseline_harmful=baseline.harmful,
            baseline_harmless=baseline.harmless,
            tokens=self.chat.chat_format.post_instruction_tokens,
            title=source.name if source else str(self.chat.model.config._name_or_path),
            recipe=self.options.recipe.in_words,
        )
        if not passing:
            raise NoCandidatePassesError(table)
        chosen = self._choose(candidates, passing)
        self._require_rank(chosen, len(passing))
        report = ExtractionReport(
            model=table.title,
            revision=source.revision if source else None,
            n_layers=n_layers,
            d_model=self.chat.d_model,
            post_instruction_tokens=self.chat.chat_format.post_instruction_tokens,
            response_prefix=self.chat.chat_format.response_prefix,
            refusal_tokens=tuple(tokens),
            counts=counts,
            baseline=baseline,
            thresholds=thresholds,
            recipe=self.options.recipe,
            selected=chosen[0],
            further=tuple(chosen[1:]),
            together=self._together(scorer, candidates, chosen),
            n_passing=len(passing),
            n_scored=sum(score.induce is not None for score in scores),
            exhaustive=self.options.scores_all,
            direction_norm=float(candidates[chosen[0].position, chosen[0].layer].norm()),
            scores=tuple(scores),
            robustness=self._robustness(training, scoring, chosen[0]),
        )
        directions = directions_of(
            candidates=candidates,
            report=report,
            chat=self.chat,
            prompts=self.prompts,
            options=self.options,
            arguments=self.arguments,
            source=source,
        )
        return Extraction(directions=directions, report=report, score_table=table)

    def _scorer(
        self, candidates: Tensor, rows: dict[str, list[list[int]]], base_logits: Tensor, token_ids: Sequence[int]
    ) -> Scorer:
        prompts: dict[str, Any] = {"harmful_rows": rows["harmful"], "harmless_rows": rows["harmless"]}
        if isinstance(self.chat, StreamedChat):
            return StreamedScorer(
                chat=self.chat,
                candidates=candidates,
                base_harmless_logits=base_logits,
                token_ids=token_ids,
                **prompts,
            )
        return CandidateScorer(chat=self.chat, candidates=candidates, token_ids=token_ids, probe=self.probe, **prompts)

    def _choose(self, candidates: Tensor, passing: Sequence[CandidateScore]) -> list[CandidateScore]:
        by_key = {(score.position, score.layer): score for score in passing}
        return [by_key[key] for key in independent_candidates(candidates, list(by_key), rank=self.options.rank)]

    def _require_rank(self, chosen: Sequence[CandidateScore], n_passing: int) -> None:
        if len(chosen) < self.options.rank:
            raise NoDirectionError(
                f"of {n_passing} candidates that pass, {len(chosen)} are independent of each other; "
                f"ask for fewer with --rank {len(chosen)}, or accept more with --kl-threshold"
            )

    @staticmethod
    def _together(scorer: Scorer, candidates: Tensor, chosen: Sequence[CandidateScore]) -> JointScores | None:
        if len(chosen) == 1:
            return None
        vectors = torch.stack([candidates[score.position, score.layer] for score in chosen])
        scores = scorer.score_together(orthonormalize(vectors)[0])
        return JointScores(bypass=fmean(scores["bypass"]), kl=fmean(scores["kl"]))

    def _robustness(
        self, training: dict[str, Tensor], scoring: ScoringRun, chosen: CandidateScore
    ) -> Robustness | None:
        if not self.options.n_bootstrap:
            return None
        return measure_robustness(
            **{kind: values[:, chosen.position, chosen.layer] for kind, values in training.items()},
            recipe=self.options.recipe,
            scores=scoring.scores_by_candidate(),
            thresholds=self.options.thresholds,
            n_layers=self.chat.n_layers,
            n_resamples=self.options.n_bootstrap,
            seed=self.options.seed,
        )

    def _training(
        self, harmful: Recording, harmless: Recording, token_ids: Sequence[int]
    ) -> tuple[dict[str, Tensor], dict[str, PromptCounts]]:
        """Filter the training prompts; return the activations to take means of, and how many prompts they are of."""
        keep_harmful = self._keep(harmful.logits, token_ids, sign=1)
        keep_harmless = self._keep(harmless.logits, token_ids, sign=-1)
        self._require(keep_harmful, keep_harmless, minimum=MIN_PROMPTS, part="training")
        kept = {"harmful": harmful.activations[keep_harmful], "harmless": harmless.activations[keep_harmless]}
        return kept, {
            "harmful_train": PromptCounts(sampled=len(keep_harmful), kept=int(keep_harmful.sum())),
            "harmless_train": PromptCounts(sampled=len(keep_harmless), kept=int(keep_harmless.sum())),
        }

    def _keep(self, logits: Tensor, token_ids: Sequence[int], *, sign: int) -> Tensor:
        if not self.options.filter_prompts:
            return torch.ones(len(logits), dtype=torch.bool)
        return sign * refusal_metric(logits, token_ids=token_ids) > 0

    def _require(self, keep_harmful: Tensor, keep_harmless: Tensor, *, minimum: int, part: str) -> None:
        require_both_behaviours(
            n_harmful=int(keep_harmful.sum()),
            n_harmless=int(keep_harmless.sum()),
            total_harmful=len(keep_harmful),
            total_harmless=len(keep_harmless),
            minimum=min(minimum, len(keep_harmful), len(keep_harmless)),
            part=part,
        )

    def _validation(
        self, recordings: dict[str, Recording], token_ids: Sequence[int], counts: dict[str, PromptCounts]
    ) -> tuple[dict[str, list[list[int]]], Tensor, Baseline]:
        """Filter the validation prompts; return their rows, the harmless ones' logits, and the baseline."""
        kept: dict[str, list[list[int]]] = {}
        keeps: dict[str, Tensor] = {}
        means: dict[str, float] = {}
        for kind, sign in (("harmful", 1), ("harmless", -1)):
            name = f"{kind}_validation"
            prompts: PromptSet = getattr(self.prompts, name)
            logits = recordings[name].logits
            keeps[kind] = self._keep(logits, token_ids, sign=sign)
            rows = self.chat.encode(prompts.texts)
            kept[kind] = [row for row, keep in zip(rows, keeps[kind].tolist(), strict=True) if keep]
            counts[name] = PromptCounts(sampled=len(rows), kept=len(kept[kind]))
            means[kind] = float(refusal_metric(logits[keeps[kind]], token_ids=token_ids).mean())
        self._require(keeps["harmful"], keeps["harmless"], minimum=MIN_PROMPTS, part="validation")
        return kept, recordings["harmless_validation"].logits[keeps["harmless"]], Baseline(**means)
