"""Finding the refusal direction: difference in means, filtering, scoring, selection (Arditi et al. 2024, section 2)."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from abliterate.arguments import cli_arguments
from abliterate.checkpoints.model_source import ModelSource
from abliterate.checkpoints.provenance import quick_model_sha256, values_sha256
from abliterate.checkpoints.saved_work import SavedWork, saved_work
from abliterate.directions import orthonormalize
from abliterate.errors import InputError, RefusalBehaviourError
from abliterate.extraction.behaviour import PARTS, ReplyRun
from abliterate.extraction.candidates import Robustness, candidate_directions, measure_robustness
from abliterate.extraction.choosing import Choice, Chooser
from abliterate.extraction.judgement import MIN_PROMPTS, Judge
from abliterate.extraction.options import ExtractionOptions, PromptSources
from abliterate.extraction.report import (
    Extraction,
    ExtractionReport,
    JointScores,
    NoCandidatePassesError,
    PromptCounts,
    directions_of,
)
from abliterate.extraction.score_report import ScoreTable
from abliterate.extraction.shared_runs import RecordingRun
from abliterate.models.chat_model import ChatModel, conditions_of, with_response_prefix
from abliterate.models.greedy import find_response_prefix
from abliterate.models.loading import open_model
from abliterate.models.options import ModelOptions
from abliterate.models.stream_probe import StreamProbe, probe_stream
from abliterate.models.streamed_model import StreamedChat
from abliterate.processes import Ranks, find_ranks
from abliterate.progress import SILENT, ProgressReporter
from abliterate.prompt_sets import ExtractionPrompts, PromptSet, split_for_extraction

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
        InterruptedRunError: a signal came; what was computed is kept.
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
    arguments = (
        *cli_arguments(PromptSources(harmful=harmful, harmless=harmless)),
        *cli_arguments(options),
        *cli_arguments(replace(model_options, system_prompt=chat.system_prompt)),
    )
    kept = work_directory if source is not None else None
    key = _work_key(source, chat, prompts, options, model_options)
    with saved_work(kept, key=key, ranks=ranks, progress=progress) as saved:
        run = _Run(
            chat=chat,
            probe=probe,
            prompts=prompts,
            options=options,
            arguments=arguments,
            progress=progress,
            saved=saved,
            ranks=ranks,
        )
        # After "no candidate passes" it would help the next attempt.
        with saved.useless_after(InputError, RefusalBehaviourError):
            extraction = run.extract(source)
        deliver(extraction)
    if isinstance(chat, StreamedChat):
        progress.message(f"the weights were read {chat.weights.reads} times")
    return extraction


def _work_key(
    source: ModelSource | None,
    chat: ChatModel,
    prompts: ExtractionPrompts,
    options: ExtractionOptions,
    model_options: ModelOptions,
) -> dict[str, Any]:
    return {
        **run_key(source, chat, {name: getattr(prompts, name) for name in PARTS}, model_options),
        "refusal tokens": options.refusal_tokens,
        "filter": options.filter,
        "recipe": asdict(options.recipe),
    }


def run_key(
    source: ModelSource | None, chat: ChatModel, parts: Mapping[str, PromptSet], model_options: ModelOptions
) -> dict[str, Any]:
    """Return what everything depends on that a run computes with some prompts: the key of what it keeps."""
    return {
        "model": None if source is None else {"files": quick_model_sha256(source.path), "revision": source.revision},
        "prompts": {name: prompts.sha256 for name, prompts in parts.items()},
        # A template may put in what changes from day to day, as the date.
        "rendered prompts": {name: values_sha256(chat.encode(prompts.texts)) for name, prompts in parts.items()},
        "model options": asdict(model_options),
        **conditions_of(chat),
    }


def _check_options(options: ExtractionOptions) -> None:
    for name, value, low in (("n-train", options.n_train, MIN_PROMPTS), ("n-val", options.n_val, 1)):
        if value < low:
            raise InputError(f"--{name} {value} is too small; give at least {low}")
    if not 0 <= options.thresholds.prune_layers < 1:
        raise InputError(f"--prune-layers {options.thresholds.prune_layers:g} must be at least 0 and below 1")
    if options.recipe.winsorize is not None and not 0 <= options.recipe.winsorize < 0.5:
        raise InputError(f"--winsorize {options.recipe.winsorize:g} must be at least 0 and below 0.5")
    n_confirm = options.confirm or 0
    for name, value, low in (
        ("rank", options.rank, 1),
        ("bootstrap", options.n_bootstrap, 0),
        ("confirm", n_confirm, 0),
    ):
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
        replying = self.options.filter in ("auto", "replies") and not isinstance(self.chat, StreamedChat)
        recording = RecordingRun(
            chat=self.chat,
            prompts=self.prompts,
            saved=self.saved,
            ranks=self.ranks,
            progress=self.progress,
            replying=ReplyRun(chat=self.chat, ranks=self.ranks) if replying else None,
        )
        recordings = recording.record()
        judgement = Judge(
            chat=self.chat,
            prompts=self.prompts,
            recordings=recordings,
            replies=recording.replies,
            options=self.options,
            ranks=self.ranks,
            progress=self.progress,
        ).judge()
        evidence = judgement.evidence
        self.progress.message(f"prompts are filtered by {evidence.filter}: {evidence.reason}")
        training = {
            kind: recordings[f"{kind}_train"].activations[judgement.kept[f"{kind}_train"]]
            for kind in ("harmful", "harmless")
        }
        candidates = candidate_directions(**training, recipe=self.options.recipe)
        chooser = Chooser(
            chat=self.chat,
            probe=self.probe,
            prompts=self.prompts,
            options=self.options,
            judgement=judgement,
            recordings=recordings,
            candidates=candidates,
            saved=self.saved,
            ranks=self.ranks,
            progress=self.progress,
        )
        choice = chooser.choose()
        table = ScoreTable(
            scores=choice.scores,
            selected=choice.passing[0] if choice.passing else None,
            thresholds=choice.thresholds,
            n_layers=self.chat.n_layers,
            baseline_harmful=choice.baseline.harmful,
            baseline_harmless=choice.baseline.harmless,
            tokens=self.chat.chat_format.post_instruction_tokens,
            title=source.name if source else str(self.chat.model.config._name_or_path),
            recipe=self.options.recipe.in_words,
        )
        if not choice.passing:
            raise NoCandidatePassesError(table, evidence=judgement.evidence)
        best = choice.chosen[0]
        report = ExtractionReport(
            model=table.title,
            revision=source.revision if source else None,
            n_layers=self.chat.n_layers,
            d_model=self.chat.d_model,
            post_instruction_tokens=self.chat.chat_format.post_instruction_tokens,
            response_prefix=self.chat.chat_format.response_prefix,
            refusal_tokens=judgement.tokens,
            refusal=judgement.evidence,
            counts={
                part: PromptCounts(sampled=len(kept), kept=int(kept.sum())) for part, kept in judgement.kept.items()
            },
            baseline=choice.baseline,
            thresholds=self.options.thresholds,
            recipe=self.options.recipe,
            selected=best,
            further=tuple(choice.chosen[1:]),
            together=self._together(choice, candidates),
            confirmed=tuple(choice.confirmed),
            raced=chooser.races,
            n_passing=len(choice.passing),
            n_scored=sum(score.induce is not None for score in choice.scores),
            exhaustive=self.options.scores_all,
            direction_norm=float(candidates[best.position, best.layer].norm()),
            scores=tuple(choice.scores),
            robustness=self._robustness(training, choice),
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

    @staticmethod
    def _together(choice: Choice, candidates: Tensor) -> JointScores | None:
        if len(choice.chosen) == 1:
            return None
        vectors = torch.stack([candidates[score.position, score.layer] for score in choice.chosen])
        scores = choice.scoring.scorer.score_together(orthonormalize(vectors)[0])
        return JointScores(bypass=fmean(scores["bypass"]), kl=fmean(scores["kl"]))

    def _robustness(self, training: dict[str, Tensor], choice: Choice) -> Robustness | None:
        if not self.options.n_bootstrap:
            return None
        best = choice.chosen[0]
        return measure_robustness(
            **{kind: values[:, best.position, best.layer] for kind, values in training.items()},
            recipe=self.options.recipe,
            scores=choice.scoring.scores_by_candidate(),
            thresholds=choice.thresholds,
            n_layers=self.chat.n_layers,
            n_resamples=self.options.n_bootstrap,
            seed=self.options.seed,
        )
