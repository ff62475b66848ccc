"""Choosing among candidates: scored, by whichever way holds for this model, and confirmed by replies."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from abliterate.checkpoints.saved_work import SavedWork
from abliterate.errors import NoDirectionError
from abliterate.extraction.behaviour import SHORT_REPLY, ReplyRun
from abliterate.extraction.candidates import independent_candidates
from abliterate.extraction.judgement import Judgement
from abliterate.extraction.options import ExtractionOptions, Thresholds
from abliterate.extraction.refusal import FirstTokens, measure_refusal, refusal_metric
from abliterate.extraction.report import Baseline
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
from abliterate.extraction.shared_runs import Scorer, ScoringRun, able_candidates
from abliterate.models.chat_model import ChatModel
from abliterate.models.hooks import Recording
from abliterate.models.stream_probe import StreamProbe
from abliterate.models.streamed_model import StreamedChat
from abliterate.processes import Ranks
from abliterate.progress import SILENT, ProgressReporter
from abliterate.prompt_sets import ExtractionPrompts

KINDS = ("harmful", "harmless")
N_CONFIRMED = 3
"""So many candidates are confirmed by replies where the replies filter the prompts."""
N_NEAREST = 8
"""Of so many candidates all scores are computed where none passes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationRows:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What was scored and what was chosen of it.

    Attributes:
        scores: one entry per position and layer.
        passing: those that are known to pass, the best first.
        chosen: as many of them as are asked for, independent of each other; fewer where there are no more.
        confirmed: what replies are under the best, where they were looked at.
        thresholds: what they were judged by: the induce threshold counts from the measure's zero.
        baseline: the measure in the unchanged model.
        scoring: the round of scoring.
    """

    scores: list[CandidateScore]
    passing: list[CandidateScore]
    chosen: list[CandidateScore]
    confirmed: list[Confirmation]
    thresholds: Thresholds
    baseline: Baseline
    scoring: ScoringRun


@dataclass(frozen=True, slots=True, kw_only=True)
class Chooser:
    """Chooses among the candidates of one extraction.

    Attributes:
        chat: the model.
        probe: what was found about its blocks; None where layers are streamed.
        prompts: training and validation prompts.
        options: how to choose.
        judgement: what refusing is in this model.
        recordings: of the prompts of all parts.
        candidates: [n_pos, n_layers, d_model], un-normalised.
        saved: where scores are kept.
        ranks: the processes that share the work.
        progress: where to show progress.
    """

    chat: ChatModel
    probe: StreamProbe | None
    prompts: ExtractionPrompts
    options: ExtractionOptions
    judgement: Judgement
    recordings: Mapping[str, Recording]
    candidates: Tensor
    saved: SavedWork
    ranks: Ranks
    progress: ProgressReporter

    def choose(self) -> Choice:
        """Score the candidates, confirm the best, and choose.

        Raises:
            NoDirectionError: fewer candidates than asked for are independent of each other.
        """
        rows = self._rows()
        evidence, given = self.judgement.evidence, self.options.thresholds
        thresholds = replace(given, induce=given.induce + evidence.zero)
        screener = Screener(
            replies=ReplyRun(chat=self.chat, ranks=self.ranks, max_new_tokens=evidence.reply_tokens or SHORT_REPLY),
            candidates=self.candidates,
            harmful_rows=rows.harmful,
            harmless_rows=rows.harmless,
        )
        scorer = self._scorer(rows, screener)
        scoring = self._scoring(scorer, thresholds)
        unchanged = self._unchanged(rows)
        if self.races and isinstance(scorer, CandidateScorer):
            scores, passing = scoring.race(
                self.candidates,
                scorer,
                n_wanted=max(1, self._n_confirmed),
                certainty="99.5 %" if evidence.filter == "replies" else "99.99 %",
                unchanged=unchanged["harmless"].tolist(),
            )
        else:
            scores = scoring.score(self.candidates)
            passing = passing_candidates(scores, thresholds=thresholds, n_layers=self.chat.n_layers)
        if not passing:
            scores = self._complete_nearest(scoring, scores)
        confirmed = self._confirm(screener, scoring, passing)
        passing = order_confirmed(passing, confirmed)
        chosen = self._independent(passing)
        if passing and len(chosen) < self.options.rank:
            raise NoDirectionError(
                f"of {len(passing)} candidates that pass, {len(chosen)} are independent of each other; "
                f"ask for fewer with --rank {len(chosen)}, or accept more with --kl-threshold"
            )
        return Choice(
            scores=scores,
            passing=passing,
            chosen=chosen,
            confirmed=confirmed,
            thresholds=thresholds,
            baseline=Baseline(**{kind: float(values.mean()) for kind, values in unchanged.items()}),
            scoring=scoring,
        )

    @property
    def races(self) -> bool:
        """Whether candidates are scored on as many prompts as it takes."""
        return (
            self.judgement.measure is not None
            and not isinstance(self.chat, StreamedChat)
            and self.options.rank == 1
            and not self.options.scores_all
        )

    @property
    def _n_confirmed(self) -> int:
        if self.judgement.measure is None or isinstance(self.chat, StreamedChat):
            return 0
        if self.options.confirm is None:
            return N_CONFIRMED if self.judgement.evidence.filter == "replies" else 0
        return self.options.confirm

    def _rows(self) -> ValidationRows:
        kept: dict[str, list[list[int]]] = {}
        asked: dict[str, list[list[int]]] = {}
        for kind in KINDS:
            part = f"{kind}_validation"
            rows = self.chat.encode(getattr(self.prompts, part).texts)
            prefaces = self.judgement.prefaces.get(part, [[] for _ in rows])
            keep = self.judgement.kept[part].tolist()
            kept[kind] = [row for row, kept in zip(rows, keep, strict=True) if kept]
            asked[kind] = [[*r, *p] for r, p, kept in zip(rows, prefaces, keep, strict=True) if kept]
        return ValidationRows(**kept, bypass=asked["harmful"], induce=asked["harmless"])

    def _unchanged(self, rows: ValidationRows) -> dict[str, Tensor]:
        """Return the measure in the unchanged model, [n] of each kind of validation prompts."""
        measure = self.judgement.measure
        if measure is None:
            return {"harmful": torch.ones(len(rows.bypass)), "harmless": -torch.ones(len(rows.induce))}
        if isinstance(measure, FirstTokens):
            logits = {kind: self._validation(kind).logits for kind in KINDS}
            return {kind: refusal_metric(logits[kind], token_ids=measure.token_ids) for kind in KINDS}
        asked = {"harmful": rows.bypass, "harmless": rows.induce}
        return {kind: measure_refusal(self.chat, measure, asked[kind]) for kind in KINDS}

    def _validation(self, kind: str) -> Recording:
        """Return the recording of the validation prompts of one kind that are kept."""
        recording, keep = self.recordings[f"{kind}_validation"], self.judgement.kept[f"{kind}_validation"]
        return Recording(activations=recording.activations[keep], logits=recording.logits[keep])

    def _scorer(self, rows: ValidationRows, screener: Screener) -> Scorer:
        measure, base_logits = self.judgement.measure, self._validation("harmless").logits
        if measure is None:
            return ReplyScorer(screener=screener, base_harmless_logits=base_logits)
        if isinstance(self.chat, StreamedChat):
            assert isinstance(measure, FirstTokens)
            return StreamedScorer(
                chat=self.chat,
                candidates=self.candidates,
                harmful_rows=rows.harmful,
                harmless_rows=rows.harmless,
                base_harmless_logits=base_logits,
                token_ids=measure.token_ids,
            )
        return CandidateScorer(
            chat=self.chat,
            candidates=self.candidates,
            harmful_rows=rows.bypass,
            harmless_rows=rows.harmless,
            inducing_rows=rows.induce,
            measure=measure,
            probe=self.probe,
        )

    def _scoring(self, scorer: Scorer, thresholds: Thresholds) -> ScoringRun:
        among = None
        if self.judgement.measure is None:
            able = able_candidates(self.candidates, thresholds=thresholds)
            validation = {kind: self._validation(kind) for kind in KINDS}
            among = propose(separations(self.candidates, able, **validation), N_CANDIDATES)

        def enough(passing: Sequence[CandidateScore]) -> bool:
            if len(self._independent(passing)) < self.options.rank:
                return False
            if self._n_confirmed < 2 or len(passing) >= self._n_confirmed:
                return True
            # Those whose KL is not known yet may be as good as the best, as far as can be told.
            best, done = (passing[0].position, passing[0].layer), scoring.prompt_scores
            unknown = [key for name, key in done if name == "bypass" and ("kl", key) not in done]
            return not any(_alike(scoring, best, key) for key in unknown)

        scoring = ScoringRun(
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
        return scoring

    def _independent(self, passing: Sequence[CandidateScore]) -> list[CandidateScore]:
        by_key = {(score.position, score.layer): score for score in passing}
        return [by_key[key] for key in independent_candidates(self.candidates, list(by_key), rank=self.options.rank)]

    def _confirm(
        self, screener: Screener, scoring: ScoringRun, passing: Sequence[CandidateScore]
    ) -> list[Confirmation]:
        """Look at the replies under the best candidate and those that are like it within noise."""
        keys = [(score.position, score.layer) for score in passing]
        keys = [key for key in keys if _alike(scoring, keys[0], key)][: self._n_confirmed]
        return screener.confirm(keys, progress=self.progress) if keys else []

    def _complete_nearest(self, scoring: ScoringRun, scores: list[CandidateScore]) -> list[CandidateScore]:
        """Compute what is missing of the candidates that come nearest, so that it can be said how far they are."""
        if isinstance(self.chat, StreamedChat):
            return scores
        known = [score for score in scores if score.induce is not None and not math.isnan(score.induce)]
        known.sort(key=lambda score: -(score.induce or 0.0))
        return scoring.complete(scores, [(score.position, score.layer) for score in known[:N_NEAREST]])


def _alike(scoring: ScoringRun, best: Candidate, other: Candidate) -> bool:
    return alike(scoring.prompt_scores["bypass", best], scoring.prompt_scores["bypass", other])
