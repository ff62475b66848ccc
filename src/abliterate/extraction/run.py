"""Finding the refusal direction: difference in means, filtering, scoring, selection (Arditi et al. 2024, section 2)."""

import math
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
from abliterate.extraction.behaviour import PARTS, SHORT_REPLY, ReplyRun
from abliterate.extraction.candidates import (
    Robustness,
    candidate_directions,
    independent_candidates,
    measure_robustness,
)
from abliterate.extraction.judgement import MIN_PROMPTS, Judge, Judgement
from abliterate.extraction.options import ExtractionOptions, PromptSources, Thresholds
from abliterate.extraction.refusal import FirstTokens, measure_refusal, refusal_metric
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
from abliterate.extraction.screening import (
    N_CANDIDATES,
    Confirmation,
    ReplyScorer,
    Screener,
    alike,
    order_confirmed,
    propose,
    separations,
)
from abliterate.extraction.selection import Candidate, CandidateScore, passing_candidates
from abliterate.extraction.shared_runs import RecordingRun, Scorer, ScoringRun, able_candidates
from abliterate.models.chat_model import ChatModel, find_response_prefix, with_response_prefix
from abliterate.models.hooks import Recording
from abliterate.models.loading import open_model
from abliterate.models.options import ModelOptions
from abliterate.models.stream_probe import StreamProbe, probe_stream
from abliterate.models.streamed_model import StreamedChat
from abliterate.processes import Ranks, find_ranks
from abliterate.progress import SILENT, ProgressReporter
from abliterate.prompt_sets import ExtractionPrompts, split_for_extraction

N_PREFIX_PROMPTS = 8
N_CONFIRMED = 3
"""So many candidates are confirmed by replies where the replies filter the prompts."""
N_NEAREST = 8
"""Of so many candidates all scores are computed where none passes."""


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
        "filter": options.filter,
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
        rows = self._rows(judgement)
        baseline = self._baseline(judgement, recordings, rows)
        # The threshold counts from where the metric parts refused from answered prompts.
        given = self.options.thresholds
        thresholds = replace(given, induce=given.induce + evidence.zero)
        screener = Screener(
            replies=ReplyRun(chat=self.chat, ranks=self.ranks, max_new_tokens=evidence.reply_tokens or SHORT_REPLY),
            candidates=candidates,
            harmful_rows=rows.harmful,
            harmless_rows=rows.harmless,
        )
        scoring = self._scoring(candidates, thresholds, judgement, recordings, rows, screener)
        scores = scoring.score(candidates)
        passing = passing_candidates(scores, thresholds=thresholds, n_layers=self.chat.n_layers)
        if not passing:
            scores = self._complete_nearest(scoring, scores)
        confirmed = self._confirm(screener, scoring, passing, self._n_confirmed(judgement))
        passing = order_confirmed(passing, confirmed)
        table = ScoreTable(
            scores=scores,
            selected=passing[0] if passing else None,
            thresholds=thresholds,
            n_layers=self.chat.n_layers,
            baseline_harmful=baseline.harmful,
            baseline_harmless=baseline.harmless,
            tokens=self.chat.chat_format.post_instruction_tokens,
            title=source.name if source else str(self.chat.model.config._name_or_path),
            recipe=self.options.recipe.in_words,
        )
        if not passing:
            raise NoCandidatePassesError(table, evidence=evidence)
        chosen = self._choose(candidates, passing)
        self._require_rank(chosen, len(passing))
        report = ExtractionReport(
            model=table.title,
            revision=source.revision if source else None,
            n_layers=self.chat.n_layers,
            d_model=self.chat.d_model,
            post_instruction_tokens=self.chat.chat_format.post_instruction_tokens,
            response_prefix=self.chat.chat_format.response_prefix,
            refusal_tokens=judgement.tokens,
            refusal=evidence,
            counts={
                part: PromptCounts(sampled=len(kept), kept=int(kept.sum())) for part, kept in judgement.kept.items()
            },
            baseline=baseline,
            thresholds=given,
            recipe=self.options.recipe,
            selected=chosen[0],
            further=tuple(chosen[1:]),
            together=self._together(scoring.scorer, candidates, chosen),
            confirmed=tuple(confirmed),
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

    def _rows(self, judgement: Judgement) -> "_Rows":
        """Return the validation prompts that are kept."""
        kept: dict[str, list[list[int]]] = {}
        asked: dict[str, list[list[int]]] = {}
        for kind in ("harmful", "harmless"):
            part = f"{kind}_validation"
            rows = self.chat.encode(getattr(self.prompts, part).texts)
            prefaces = judgement.prefaces.get(part, [[] for _ in rows])
            keep = judgement.kept[part].tolist()
            kept[kind] = [row for row, kept in zip(rows, keep, strict=True) if kept]
            asked[kind] = [[*r, *p] for r, p, kept in zip(rows, prefaces, keep, strict=True) if kept]
        return _Rows(**kept, bypass=asked["harmful"], induce=asked["harmless"])

    def _baseline(self, judgement: Judgement, recordings: dict[str, Recording], rows: "_Rows") -> Baseline:
        measure = judgement.measure
        if measure is None:
            return Baseline(harmful=1.0, harmless=-1.0)
        if isinstance(measure, FirstTokens):
            means = {
                kind: float(
                    refusal_metric(
                        recordings[f"{kind}_validation"].logits[judgement.kept[f"{kind}_validation"]],
                        token_ids=measure.token_ids,
                    ).mean()
                )
                for kind in ("harmful", "harmless")
            }
            return Baseline(**means)
        return Baseline(
            harmful=float(measure_refusal(self.chat, measure, rows.bypass).mean()),
            harmless=float(measure_refusal(self.chat, measure, rows.induce).mean()),
        )

    def _scoring(
        self,
        candidates: Tensor,
        thresholds: Thresholds,
        judgement: Judgement,
        recordings: dict[str, Recording],
        rows: "_Rows",
        screener: Screener,
    ) -> ScoringRun:
        measure, among = judgement.measure, None
        base_logits = recordings["harmless_validation"].logits[judgement.kept["harmless_validation"]]
        scorer: Scorer
        if measure is None:
            scorer = ReplyScorer(screener=screener, base_harmless_logits=base_logits)
            able = able_candidates(candidates, thresholds=thresholds)
            found = (recordings[f"{kind}_validation"] for kind in ("harmful", "harmless"))
            among = propose(
                separations(candidates, able, **dict(zip(("harmful", "harmless"), found, strict=True))), N_CANDIDATES
            )
        elif isinstance(self.chat, StreamedChat):
            assert isinstance(measure, FirstTokens)
            scorer = StreamedScorer(
                chat=self.chat,
                candidates=candidates,
                harmful_rows=rows.harmful,
                harmless_rows=rows.harmless,
                base_harmless_logits=base_logits,
                token_ids=measure.token_ids,
            )
        else:
            scorer = CandidateScorer(
                chat=self.chat,
                candidates=candidates,
                harmful_rows=rows.bypass,
                harmless_rows=rows.harmless,
                inducing_rows=rows.induce,
                measure=measure,
                probe=self.probe,
            )
        n_confirmed = self._n_confirmed(judgement)

        def enough(passing: Sequence[CandidateScore]) -> bool:
            if len(self._choose(candidates, passing)) < self.options.rank:
                return False
            if n_confirmed < 2 or len(passing) >= n_confirmed:
                return True
            best = passing[0].position, passing[0].layer
            unknown = [
                key for name, key in run.prompt_scores if name == "bypass" and ("kl", key) not in run.prompt_scores
            ]
            return not any(self._alike(run, best, key) for key in unknown)

        run = ScoringRun(
            scorer=scorer,
            saved=self.saved,
            ranks=self.ranks,
            thresholds=thresholds,
            n_layers=self.chat.n_layers,
            exhaustive=self.options.scores_all,
            among=among,
            enough=enough,
            # Streamed layers show their own progress.
            progress=SILENT if isinstance(self.chat, StreamedChat) else self.progress,
        )
        return run

    def _n_confirmed(self, judgement: Judgement) -> int:
        if judgement.measure is None or isinstance(self.chat, StreamedChat):
            return 0
        if self.options.confirm is None:
            return N_CONFIRMED if judgement.evidence.filter == "replies" else 0
        return self.options.confirm

    @staticmethod
    def _alike(scoring: ScoringRun, best: Candidate, other: Candidate) -> bool:
        return alike(scoring.prompt_scores["bypass", best], scoring.prompt_scores["bypass", other])

    def _confirm(
        self, screener: Screener, scoring: ScoringRun, passing: Sequence[CandidateScore], n_confirmed: int
    ) -> list[Confirmation]:
        """Look at the replies under the best candidates, those that are alike within noise."""
        keys = [(score.position, score.layer) for score in passing]
        keys = [key for key in keys[:1] + keys[1:] if self._alike(scoring, keys[0], key)][:n_confirmed]
        return screener.confirm(keys, progress=self.progress) if keys else []

    def _complete_nearest(self, scoring: ScoringRun, scores: list[CandidateScore]) -> list[CandidateScore]:
        """Compute what is missing of the candidates that come nearest, so that it can be said how far they are."""
        if isinstance(self.chat, StreamedChat):
            return scores
        known = [score for score in scores if score.induce is not None and not math.isnan(score.induce)]
        known.sort(key=lambda score: -(score.induce or 0.0))
        return scoring.complete(scores, [(score.position, score.layer) for score in known[:N_NEAREST]])

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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Token ids of the validation prompts that are kept.

    Attributes:
        harmful: the harmful prompts.
        harmless: the harmless prompts.
        bypass: what refusing is asked after with a candidate ablated.
        induce: what it is asked after with a candidate added.
    """

    harmful: list[list[int]]
    harmless: list[list[int]]
    bypass: list[list[int]]
    induce: list[list[int]]
