"""Finding candidate directions for an audit and putting the most promising first.

`extract` chooses by the first answer token alone, which says little about a model that explains before it refuses
(arXiv 2505.19056). Here candidates are proposed in two ways, by the published scores and by how well they separate
harmful from harmless validation prompts, and then *screened*: each is ablated, and the harmful validation prompts
that get an answer are counted.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from abliterate.checkpoints.saved_work import SavedWork
from abliterate.directions import orthonormalize
from abliterate.evaluation.replies import generate_replies
from abliterate.extraction.candidates import resampled_cosines
from abliterate.extraction.options import DirectionRecipe, Thresholds
from abliterate.extraction.refusal import FirstTokens, find_refusal_tokens, refusal_metric
from abliterate.extraction.reply_classes import read_completions
from abliterate.extraction.scoring import CandidateScorer
from abliterate.extraction.screening import propose, separations
from abliterate.extraction.selection import CandidateScore, passing_candidates
from abliterate.extraction.shared_runs import RecordingRun, ScoringRun, able_candidates
from abliterate.models.chat_model import ChatModel
from abliterate.models.hooks import Recording, ablate_direction, difference_in_means
from abliterate.models.stream_probe import StreamProbe
from abliterate.processes import ALONE, Ranks
from abliterate.progress import ProgressReporter
from abliterate.prompt_sets import ExtractionPrompts

MIN_FILTERED = 8
"""With fewer prompts than this left on one side, the filter by the refusal metric is not applied."""
N_SCREENING_PROMPTS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ScreenedCandidate:
    """A candidate that was ablated on harmful validation prompts.

    Attributes:
        position: post-instruction position, negative.
        layer: block whose input it was read from.
        bypass: see `CandidateScore`; None where no refusal token was found.
        induce: the same.
        kl: the same.
        separation: difference of the mean components of harmful and harmless validation prompts, in pooled
            standard deviations (Cohen's d).
        answered: harmful validation prompts that got a legible answer that is no refusal.
        n_prompts: how many were asked.
    """

    position: int
    layer: int
    bypass: float | None
    induce: float | None
    kl: float | None
    separation: float
    answered: int
    n_prompts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateSummary:
    """How the candidates were found.

    Attributes:
        n_candidates: those below the layer limit that are no zero vectors.
        n_passing: those that pass the published selection; None where no refusal token was found.
        share_passing: n_passing / n_candidates.
        refusal_tokens: texts of the first tokens that tell refusals; empty where none does.
        filtered: whether the training prompts were filtered by the refusal metric.
        screened: the candidates whose replies were counted, the best first.
    """

    n_candidates: int
    n_passing: int | None
    share_passing: float | None
    refusal_tokens: tuple[str, ...]
    filtered: bool
    screened: tuple[ScreenedCandidate, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stability:
    """Cosine between the best candidate and the same one from resampled training prompts."""

    n_resamples: int
    mean_cosine: float
    low_cosine: float


class CandidateFinder:
    """Records prompts once; proposes, scores and screens candidates.

    Args:
        chat: the model.
        probe: what was found about its blocks.
        prompts: training and validation prompts.
        thresholds: what makes a candidate pass.
        saved: where recordings, scores and what screening showed are kept.
        ranks: the processes that share the work.
        progress: where to show progress.
    """

    def __init__(
        self,
        *,
        chat: ChatModel,
        probe: StreamProbe,
        prompts: ExtractionPrompts,
        thresholds: Thresholds,
        saved: SavedWork,
        progress: ProgressReporter,
        ranks: Ranks = ALONE,
    ) -> None:
        self._chat = chat
        self._probe = probe
        self._prompts = prompts
        self._thresholds = thresholds
        self._progress = progress
        self._saved = saved
        self._ranks = ranks
        recordings = RecordingRun(
            chat=chat, prompts=prompts, saved=self._saved, ranks=ranks, progress=progress
        ).record()
        harmful, harmless = recordings["harmful_train"], recordings["harmless_train"]
        found = find_refusal_tokens(harmful_logits=harmful.logits, harmless_logits=harmless.logits)
        self._token_ids = [token_id for token_id, _, _ in found]
        self._harmful, self._harmless, self._filtered = self._filter(harmful, harmless)
        self.candidates = difference_in_means(harmful=self._harmful, harmless=self._harmless)
        self._grid = able_candidates(self.candidates, thresholds=thresholds)
        self._separation = separations(
            self.candidates,
            self._grid,
            harmful=recordings["harmful_validation"],
            harmless=recordings["harmless_validation"],
        )
        self._scores = {(score.position, score.layer): score for score in self._score()} if found else {}

    def screen(self, *, n_candidates: int, max_new_tokens: int) -> CandidateSummary:
        """Ablate the most promising candidates on harmful validation prompts and count the answers.

        Half of them are those that pass the published selection, the lowest bypass first; the rest are those that
        separate best, one position a layer before a second.

        Args:
            n_candidates: how many.
            max_new_tokens: length limit of each reply.
        """
        passing = passing_candidates(self._scores.values(), thresholds=self._thresholds, n_layers=self._chat.n_layers)
        rows = self._chat.encode(self._prompts.harmful_validation.texts[:N_SCREENING_PROMPTS])
        best = [(score.position, score.layer) for score in passing[: n_candidates // 2]]
        chosen = propose(self._separation, n_candidates, first=best)
        screened = []
        with self._progress.task("Screening candidates", total=len(chosen)) as advance:
            for key in chosen:
                screened.append(self._screen(key, rows, max_new_tokens))
                advance(1)
        screened.sort(key=lambda one: (-one.answered, one.kl if one.kl is not None else 0.0, -one.separation))
        n_passing = len(passing) if self._scores else None
        return CandidateSummary(
            n_candidates=len(self._grid),
            n_passing=n_passing,
            share_passing=None if n_passing is None else n_passing / max(1, len(self._grid)),
            refusal_tokens=tuple(self._chat.decode([i], skip_special_tokens=False) for i in self._token_ids),
            filtered=self._filtered,
            screened=tuple(screened),
        )

    def subspace(self, best: tuple[int, int], rank: int) -> Tensor:
        """Return an orthonormal basis [rank, d_model] that holds the best candidate.

        The rest are the principal directions of all candidates, as unit vectors, without their component along the
        best one. Bases of smaller rank are contained in those of larger rank.
        """
        unit = [self.candidates[key] / self.candidates[key].norm() for key in self._grid]
        first = self.candidates[best] / self.candidates[best].norm()
        rows = torch.stack(unit)
        rest = rows - (rows @ first)[:, None] * first
        principal = torch.linalg.svd(rest, full_matrices=False).Vh[: rank - 1]
        return orthonormalize(torch.cat([first[None], principal]))[0]

    def stability(self, key: tuple[int, int], *, n_resamples: int, seed: int) -> Stability:
        """Resample the training prompts with replacement and compare the candidate's direction."""
        position, layer = key
        found = resampled_cosines(
            harmful=self._harmful[:, position, layer],
            harmless=self._harmless[:, position, layer],
            recipe=DirectionRecipe(),
            n_resamples=n_resamples,
            generator=torch.Generator().manual_seed(seed),
        )
        return Stability(
            n_resamples=n_resamples, mean_cosine=float(found.mean()), low_cosine=float(found.quantile(0.05))
        )

    def _filter(self, harmful: Recording, harmless: Recording) -> tuple[Tensor, Tensor, bool]:
        if self._token_ids:
            keep = [
                sign * refusal_metric(recording.logits, token_ids=self._token_ids) > 0
                for sign, recording in ((1, harmful), (-1, harmless))
            ]
            if min(int(kept.sum()) for kept in keep) >= MIN_FILTERED:
                return harmful.activations[keep[0]], harmless.activations[keep[1]], True
        return harmful.activations, harmless.activations, False

    def _score(self) -> list[CandidateScore]:
        """Score the candidates as `extract` does; bypass and KL of all that induce: how many pass is reported."""
        scorer = CandidateScorer(
            chat=self._chat,
            candidates=self.candidates,
            harmful_rows=self._chat.encode(self._prompts.harmful_validation.texts),
            harmless_rows=self._chat.encode(self._prompts.harmless_validation.texts),
            measure=FirstTokens(tuple(self._token_ids)),
            probe=self._probe,
        )
        scorer.kl_at_once = None
        run = ScoringRun(
            scorer=scorer,
            saved=self._saved,
            thresholds=self._thresholds,
            n_layers=self._chat.n_layers,
            ranks=self._ranks,
            progress=self._progress,
        )
        return run.score(self.candidates)

    def _screen(self, key: tuple[int, int], rows: list[list[int]], max_new_tokens: int) -> ScreenedCandidate:
        score = self._scores.get(key, CandidateScore(position=key[0], layer=key[1]))
        return ScreenedCandidate(
            position=key[0],
            layer=key[1],
            bypass=score.bypass,
            induce=score.induce,
            kl=score.kl,
            separation=self._separation[key],
            answered=self._answered(key, rows, max_new_tokens),
            n_prompts=len(rows),
        )

    def _answered(self, key: tuple[int, int], rows: list[list[int]], max_new_tokens: int) -> int:
        """Return how many prompts get an answer with a candidate ablated, out of what is saved where it is there."""
        name = f"answered {key[0]} {key[1]}"
        known = self._ranks.first_says(self._saved.value(name))
        if known is not None:
            return int(known)
        with ablate_direction(self._chat, self.candidates[key]):
            replies = generate_replies(self._chat, rows, max_new_tokens=max_new_tokens, ranks=self._ranks)
        n_answered = [reply.reply_class for reply in read_completions(self._chat, replies)].count("answer")
        if self._ranks.is_first:
            self._saved.save_values({name: n_answered})
        return n_answered
