"""Finding the direction of false refusals that leaves the true ones where they are.

A model that refuses harmless requests because they look harmful does so in part along a direction of its own: from the
borderline prompts that it answers to those that it refuses. Made orthogonal, at each position and layer, to the
direction from answered harmless to refused harmful prompts, it can be ablated, and harmful prompts stay refused (Wang
et al. 2024, arXiv 2410.03415). Which prompts are refused, the replies say; candidates are scored as those of the
refusal direction are, by what ablating them does to validation prompts:

    bypass     mean refusal metric on borderline prompts that the model refuses; the lowest is wanted
    kept       mean refusal metric on harmful prompts; the share that is refused must hardly fall
    KL         on harmless prompts, as ever

and of the best that pass, replies choose.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from abliterate.arguments import cli_arguments
from abliterate.checkpoints.model_source import ModelSource
from abliterate.checkpoints.saved_work import SavedWork, saved_work
from abliterate.directions import Direction, make_direction, orthogonal_to
from abliterate.errors import InputError, ModelError, NoDirectionError, RefusalBehaviourError
from abliterate.extraction.behaviour import PARTS, ReplyRun, ShortReply, coverage, first_tokens_of_refusals
from abliterate.extraction.candidates import candidate_directions
from abliterate.extraction.judgement import MIN_COVERAGE, MIN_PROMPTS, Judge, Judgement
from abliterate.extraction.options import ExtractionOptions, PromptSources, RepairOptions
from abliterate.extraction.refusal import FirstTokens, describe_tokens
from abliterate.extraction.report import (
    PromptCounts,
    Repair,
    RepairConfirmation,
    RepairReport,
    RepairScore,
    provenance,
)
from abliterate.extraction.run import force_response_prefix, run_key
from abliterate.extraction.scoring import CandidateScorer
from abliterate.extraction.selection import Candidate, PromptScores, ScoreName, rounded_up
from abliterate.extraction.shared_runs import able_candidates
from abliterate.models.chat_model import ChatModel
from abliterate.models.hooks import Recording, ablate_direction, record
from abliterate.models.loading import open_model
from abliterate.models.options import ModelOptions
from abliterate.models.streamed_model import StreamedChat
from abliterate.processes import Ranks, find_ranks
from abliterate.progress import SILENT, ProgressReporter
from abliterate.prompt_sets import ExtractionPrompts, PromptSet, draw_borderline, prompt_hash, split_for_extraction

N_CONFIRMED = 4
"""So many candidates that pass are confirmed by replies, the best first."""
N_FIRST = 8
"""On so many prompts of a kind candidates are scored first: most are far from passing."""
SAID_ELSEWHERE = {"scores", "counts", "options"}
"""What a direction file holds of the report in other places: as grids, as counts, among the arguments."""
AT_ONCE = 8
"""So many candidates are looked at together, the best first, until enough pass."""


def extract_repair(
    *,
    model: "str | Path | ModelSource | ChatModel",
    harmful: str = "bundled",
    harmless: str = "bundled",
    options: ExtractionOptions | None = None,
    repair: RepairOptions | None = None,
    model_options: ModelOptions | None = None,
    progress: ProgressReporter = SILENT,
    work_directory: Path | None = None,
    deliver: Callable[[Repair], None] = lambda _repair: None,
) -> Repair:
    """Find the direction of false refusals, without that of true ones.

    Args:
        model: a directory, a Hub id, a resolved source or a loaded model.
        harmful: prompt SPEC of what has to stay refused, see `abliterate.prompt_sets`.
        harmless: prompt SPEC.
        options: how to extract; what is about several directions, resampling and ways to choose does not apply.
        repair: which borderline prompts, and how much may be lost.
        model_options: how to load and run the model.
        progress: where to show progress.
        work_directory: where to keep recordings and scores until it is done, so that the same call goes on from there;
            None, or a loaded model: nothing is kept.
        deliver: is given the result before what is kept is deleted.

    Raises:
        NoDirectionError: no candidate leaves as many true refusals as asked for and lessens the false ones.
        RefusalBehaviourError: too few borderline prompts are refused, or answered; or nothing is refused at all.
        PromptSetError: too few prompts, or a SPEC that cannot be read.
        ModelError: the model does not load as a chat model, or its first tokens do not tell its refusals.
        InputError: an option that does not go with a repair.
    """
    options, repair = options or ExtractionOptions(), repair or RepairOptions()
    model_options = model_options or ModelOptions()
    _check(options, model_options)
    prompts = split_for_extraction(harmful, harmless, n_train=options.n_train, n_val=options.n_val, seed=options.seed)
    borderline = draw_borderline(repair.borderline, other=prompts, seed=options.seed)
    for note in (*prompts.notes, *borderline.notes):
        progress.message(note)
    opened = open_model(model, options=model_options, extracts=True, progress=progress)
    assert not isinstance(opened.chat, StreamedChat)
    chat = force_response_prefix(opened.chat, prompts, progress)
    ranks = find_ranks(device=model_options.device)
    parts = {part: getattr(prompts, part) for part in PARTS}
    parts |= {"borderline_train": borderline.train, "borderline_validation": borderline.validation}
    key = {
        **run_key(opened.source, chat, parts, model_options),
        "refusal tokens": options.refusal_tokens,
        "filter": options.filter,
        "recipe": asdict(options.recipe),
        "orthogonal": repair.orthogonal,
    }
    arguments = (
        "--goal",
        "repair",
        *cli_arguments(PromptSources(harmful=harmful, harmless=harmless)),
        *cli_arguments(options),
        *cli_arguments(repair),
        *cli_arguments(replace(model_options, system_prompt=chat.system_prompt)),
    )
    kept = work_directory if opened.source is not None else None
    with saved_work(kept, key=key, ranks=ranks, progress=progress) as saved:
        with saved.useless_after(InputError, RefusalBehaviourError):
            run = _prepared(chat, prompts, parts, options, repair, ranks, saved, progress)
            report, vectors = run.find(opened.name)
        source = provenance(chat=chat, source=opened.source, model=opened.name, arguments=arguments, seed=options.seed)
        found = Repair(direction=_direction(report, vectors, run, parts, source), report=report)
        deliver(found)
    return found


def _prepared(
    chat: ChatModel,
    prompts: ExtractionPrompts,
    parts: Mapping[str, PromptSet],
    options: ExtractionOptions,
    repair: RepairOptions,
    ranks: Ranks,
    saved: SavedWork,
    progress: ProgressReporter,
) -> "_Run":
    """Run the prompts, and tell by the replies which are refused and what refusing is measured by."""
    recordings, replies = _record(chat, parts, ranks, saved, progress)
    judgement = Judge(
        chat=chat,
        prompts=prompts,
        recordings={part: recordings[part] for part in PARTS},
        replies={part: replies[part] for part in PARTS},
        options=options,
        ranks=ranks,
        progress=progress,
    ).judge()
    if judgement.measure is None or judgement.evidence.measure != "first tokens":
        raise ModelError(
            "the first tokens of this model's replies do not tell its refusals, and a repair is chosen by these"
        )
    judgement = _with_false_refusals(judgement, chat, recordings, replies, named=bool(options.refusal_tokens))
    return _Run(
        chat=chat,
        ranks=ranks,
        options=options,
        repair=repair,
        judgement=judgement,
        rows={part: chat.encode(texts.texts) for part, texts in parts.items() if part.endswith("validation")},
        recordings=recordings,
        replies=replies,
        saved=saved,
        progress=progress,
    )


def _direction(
    report: RepairReport, vectors: Tensor, run: "_Run", parts: Mapping[str, PromptSet], source: Mapping[str, Any]
) -> Direction:
    """Return what was chosen, with all candidates, their scores and where they come from."""
    metadata = {
        **source,
        "goal": "repair",
        "recipe": asdict(run.options.recipe),
        "thresholds": asdict(run.options.thresholds),
        "refusal_tokens": [{"id": token.token_id, "text": token.text} for token in run.judgement.tokens],
        "refusal": asdict(run.judgement.evidence),
        "counts": {name: asdict(counts) for name, counts in report.counts.items()},
        "repair": {name: value for name, value in asdict(report).items() if name not in SAID_ELSEWHERE},
        "prompt_sets": {part: {"name": texts.name, "sha256": texts.sha256} for part, texts in parts.items()},
        "prompt_hashes": sorted({prompt_hash(text) for texts in parts.values() for text in texts.texts}),
        "position": report.selected.position,
        "layer": report.selected.layer,
        "bypass": report.selected.bypass,
        "kl": report.selected.kl,
    }
    grid = torch.full(vectors.shape[:2], float("nan"), dtype=torch.float64)
    grids = {"bypass": grid, "kl": grid.clone()}
    for score in report.scores:
        for name, values in grids.items():
            value = getattr(score, name)
            if value is not None:
                values[score.position, score.layer] = value
    found = vectors[report.selected.position, report.selected.layer]
    return make_direction(mean_difference=found, candidates=vectors, scores=grids, metadata=metadata)


def _check(options: ExtractionOptions, model_options: ModelOptions) -> None:
    named = {
        "--rank": options.rank != 1,
        "--bootstrap": options.n_bootstrap > 0,
        "--exhaustive": options.exhaustive,
        "--confirm": options.confirm is not None,
        "--filter none": options.filter == "none",
        "--filter metric": options.filter == "metric",
        "--stream-layers": model_options.stream_layers,
    }
    for name, is_there in named.items():
        if is_there:
            raise InputError(f"{name} cannot go with --goal repair, which chooses by the replies; leave it out")


def _record(
    chat: ChatModel, parts: Mapping[str, PromptSet], ranks: Ranks, saved: SavedWork, progress: ProgressReporter
) -> tuple[dict[str, Recording], dict[str, list[ShortReply]]]:
    """Run the prompts of each part once, and go on to their replies."""
    run = ReplyRun(chat=chat, ranks=ranks)
    recordings: dict[str, Recording] = {}
    replies: dict[str, list[ShortReply]] = {}
    with progress.task("Recording prompts", total=sum(map(len, parts.values()))) as advance:
        for part, prompts in parts.items():
            found: dict[int, ShortReply] = {}

            def receive(index: int, reply: list[int], found: dict[int, ShortReply] = found) -> None:
                found[index] = run.classed(reply)

            rows = chat.encode(prompts.texts)
            kept = ranks.first_says(saved.tensors(part))
            if kept is not None:
                # Replies are kept nowhere.
                recordings[part], replies[part] = Recording(**kept), run.read(rows, progress=SILENT)
                advance(len(rows))
                continue
            recordings[part] = record(chat, rows, decoder=run.decoder, receive=receive, advance=advance)
            replies[part] = [found[i] for i in range(len(rows))]
            made = recordings[part]
            # Of a process that is not the first, it saves nothing.
            saved.save_tensors(part, {"activations": made.activations, "logits": made.logits})
    return recordings, replies


def _with_false_refusals(
    judgement: Judgement,
    chat: ChatModel,
    recordings: Mapping[str, Recording],
    replies: Mapping[str, Sequence[ShortReply]],
    *,
    named: bool,
) -> Judgement:
    """Return the judgement with the tokens that false refusals begin with among the refusal tokens."""
    borderline = [reply for part, found in replies.items() if part.startswith("borderline") for reply in found]
    known = [token.token_id for token in judgement.tokens]
    new = [] if named else [token for token in first_tokens_of_refusals(borderline) if token not in known]
    share = coverage(borderline, [*known, *new])
    # Where none is refused, how many are is what has to be said.
    if share < MIN_COVERAGE and any(reply.refused for reply in borderline):
        raise ModelError(
            f"first tokens begin {share:.0%} of the false refusals, and a repair that is chosen by these takes "
            f"{MIN_COVERAGE:.0%}"
        )
    tokens = describe_tokens(new, chat=chat, harmful=recordings["harmful_train"], harmless=recordings["harmless_train"])
    return replace(judgement, tokens=(*judgement.tokens, *tokens), measure=FirstTokens((*known, *new)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """One repair on a loaded model."""

    chat: ChatModel
    ranks: Ranks
    options: ExtractionOptions
    repair: RepairOptions
    judgement: Judgement
    rows: Mapping[str, list[list[int]]]
    recordings: Mapping[str, Recording]
    replies: Mapping[str, Sequence[ShortReply]]
    saved: SavedWork
    progress: ProgressReporter

    def find(self, name: str) -> tuple[RepairReport, Tensor]:
        """Return the report and all candidates, [n_pos, n_layers, d_model] float64, un-normalised."""
        kept = self._kept()
        false, vectors = self._candidates(kept)
        able = able_candidates(vectors, thresholds=self.options.thresholds)
        chosen_rows = {part: _where(self.rows[part], kept[part]) for part in self.rows}
        n_borderline = len(chosen_rows["borderline_validation"])
        measure = self.judgement.measure
        assert measure is not None
        scorer = CandidateScorer(
            chat=self.chat,
            candidates=vectors,
            harmful_rows=[*chosen_rows["borderline_validation"], *chosen_rows["harmful_validation"]],
            harmless_rows=chosen_rows["harmless_validation"],
            measure=measure,
        )
        unchanged = {
            kind: measure.read(
                self.recordings[f"{kind}_validation"].logits[kept[f"{kind}_validation"]],
                torch.arange(len(chosen_rows[f"{kind}_validation"])),
            )
            for kind in ("borderline", "harmful")
        }
        baseline = {kind: float(values.mean()) for kind, values in unchanged.items()}
        scores = self._score(scorer, able, n_borderline=n_borderline, unchanged=unchanged)
        passing = [score for score in scores.values() if self._passes(score, baseline["borderline"])]
        passing = sorted(passing, key=lambda score: score.bypass)[:N_CONFIRMED]
        if not passing:
            raise NoDirectionError(self._nothing(list(scores.values()), baseline["borderline"]))
        with self.progress.task("Confirming by replies", total=len(passing)) as advance:
            confirmed = []
            for score in passing:
                confirmed.append(self._confirm(score, vectors[score.position, score.layer], chosen_rows))
                advance(1)
        enough = [one for one in confirmed if one.lost <= self.repair.max_lost and one.borderline < n_borderline]
        if not enough:
            best = min(confirmed, key=lambda one: (one.lost, one.borderline))
            accepts = f"; --max-lost {rounded_up(best.lost)} accepts that" if best.borderline < n_borderline else ""
            raise NoDirectionError(
                "no candidate leaves the true refusals and lessens the false ones; the best (position "
                f"{best.position}, layer {best.layer}) leaves {best.harmful} of {best.n_harmful} harmful and "
                f"{best.borderline} of {best.n_borderline} borderline prompts refused{accepts}"
            )
        best = min(enough, key=lambda one: (one.borderline, -one.harmful))
        key = best.position, best.layer
        report = RepairReport(
            model=name,
            refusal_tokens=tuple(token.text for token in self.judgement.tokens),
            zero=self.judgement.evidence.zero,
            counts={part: PromptCounts(sampled=len(values), kept=int(values.sum())) for part, values in kept.items()},
            answered={
                part: sum(reply.answered for reply in self.replies[f"borderline_{part}"])
                for part in ("train", "validation")
            },
            baseline=baseline,
            options=self.repair,
            selected=scores[key],
            confirmed=tuple(confirmed),
            direction_norm=float(vectors[key].norm()),
            share_left=float(vectors[key].norm() / false[key].norm()),
            scores=tuple(scores.values()),
        )
        return report, vectors

    def _kept(self) -> dict[str, Tensor]:
        """Return which prompts of each part count, [n] bool: refused, or answered where they are harmless."""
        kept = dict(self.judgement.kept)
        for part in ("train", "validation"):
            found = self.replies[f"borderline_{part}"]
            refused = torch.tensor([reply.refused for reply in found])
            n_answered = sum(reply.answered for reply in found)
            for count, does in ((int(refused.sum()), "refuses"), (n_answered, "answers")):
                if count < min(MIN_PROMPTS, len(found)):
                    raise RefusalBehaviourError(
                        f"by its replies the model {does} {count} of {len(found)} borderline prompts of the {part} "
                        f"part, and {MIN_PROMPTS} are needed to find what its false refusals are; --borderline takes "
                        "others"
                    )
            kept[f"borderline_{part}"] = refused
        return kept

    def _candidates(self, kept: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the differences between refused and answered borderline prompts, and what is to be ablated of them."""
        activations = {part: recording.activations for part, recording in self.recordings.items()}
        answered = torch.tensor([reply.answered for reply in self.replies["borderline_train"]])
        recipe = self.options.recipe
        false = candidate_directions(
            harmful=activations["borderline_train"][kept["borderline_train"]],
            harmless=activations["borderline_train"][answered],
            recipe=recipe,
        )
        true = candidate_directions(
            harmful=activations["harmful_train"][kept["harmful_train"]],
            harmless=activations["harmless_train"][kept["harmless_train"]],
            recipe=recipe,
        )
        return false, orthogonal_to(false, true, share=self.repair.orthogonal)

    def _score(
        self,
        scorer: CandidateScorer,
        able: Sequence[Candidate],
        *,
        n_borderline: int,
        unchanged: Mapping[str, Tensor],
    ) -> dict[Candidate, RepairScore]:
        """Score all on a few prompts, and those that may pass on all of them, the best first, until enough pass."""
        first = range(min(N_FIRST, n_borderline))
        before = fmean(unchanged["borderline"][: len(first)].tolist())
        limit, n_passing = self.options.thresholds.kl, 0
        scores: dict[Candidate, RepairScore] = {}
        with self.progress.task("Scoring candidates", total=None) as advance:
            for group in scorer.groups("bypass", able, first):
                for key, found in zip(group, self._scored(scorer, "bypass", group, first), strict=True):
                    scores[key] = RepairScore(position=key[0], layer=key[1], bypass=fmean(found["bypass"]))
                advance(len(group))
            ordered = sorted((key for key in able if scores[key].bypass < before), key=lambda key: scores[key].bypass)
            few = range(min(N_FIRST, scorer.n_prompts("kl")))
            for start in range(0, len(ordered), AT_ONCE):
                keys = ordered[start : start + AT_ONCE]
                left = []
                for key, found in zip(keys, self._scored(scorer, "kl", keys, few), strict=True):
                    scores[key] = replace(scores[key], kl=fmean(found["kl"]))
                    if fmean(found["kl"]) - 2 * _standard_error(found["kl"]) <= limit:
                        left.append(key)
                advance(len(keys))
                if not left:
                    continue
                self._complete(scorer, left, scores, unchanged)
                n_passing += sum(self._passes(scores[key], float(unchanged["borderline"].mean())) for key in left)
                advance(len(left))
                if n_passing >= N_CONFIRMED:
                    break
            rest = [key for key in ordered if scores[key].kept is None]
            if not n_passing and rest:
                # So that it can be said how far the nearest are.
                self._complete(scorer, sorted(rest, key=lambda key: scores[key].kl or 0.0)[:AT_ONCE], scores, unchanged)
        return scores

    def _complete(
        self,
        scorer: CandidateScorer,
        keys: Sequence[Candidate],
        scores: dict[Candidate, RepairScore],
        unchanged: Mapping[str, Tensor],
    ) -> None:
        """Score candidates on all prompts."""
        n_borderline, zero = len(unchanged["borderline"]), self.judgement.evidence.zero
        found = [self._scored(scorer, name, keys, range(scorer.n_prompts(name))) for name in ("bypass", "kl")]
        for key, metric, kl in zip(keys, *found, strict=True):
            values = torch.tensor(metric["bypass"], dtype=torch.float64)
            kept = values[n_borderline:]
            lost = float((unchanged["harmful"] > zero).double().mean() - (kept > zero).double().mean())
            scores[key] = replace(
                scores[key],
                bypass=float(values[:n_borderline].mean()),
                kept=float(kept.mean()),
                lost=max(0.0, lost),
                kl=fmean(kl["kl"]),
            )

    def _scored(
        self, scorer: CandidateScorer, name: ScoreName, keys: Sequence[Candidate], prompts: range
    ) -> list[PromptScores]:
        """Return the scores of a group on some prompts, out of what is saved where they are there."""
        named = {key: f"{name} {key[0]} {key[1]} of {len(prompts)}" for key in keys}
        if any(self.saved.value(named[key]) is None for key in keys):
            found = scorer.score(name, keys, prompts)
            self.saved.save_values({named[key]: list(each[name]) for key, each in zip(keys, found, strict=True)})
        return [{name: tuple(self.saved.value(named[key]))} for key in keys]

    def _passes(self, score: RepairScore, before: float) -> bool:
        if score.lost is None or score.kl is None:
            return False
        return score.bypass < before and score.lost <= self.repair.max_lost and score.kl <= self.options.thresholds.kl

    def _confirm(self, score: RepairScore, vector: Tensor, rows: Mapping[str, list[list[int]]]) -> RepairConfirmation:
        run = ReplyRun(chat=self.chat, ranks=self.ranks)
        borderline, harmful = rows["borderline_validation"], rows["harmful_validation"]
        with ablate_direction(self.chat, vector):
            found = run.read([*borderline, *harmful], progress=SILENT)
        n = len(borderline)
        return RepairConfirmation(
            position=score.position,
            layer=score.layer,
            borderline=sum(reply.refused for reply in found[:n]),
            n_borderline=n,
            harmful=sum(reply.refused for reply in found[n:]),
            n_harmful=len(harmful),
        )

    def _nothing(self, scores: Sequence[RepairScore], before: float) -> str:
        """Say what comes nearest, and what would accept it."""
        limits, repair = self.options.thresholds, self.repair
        known = [score for score in scores if score.lost is not None and score.kl is not None]
        if not known:
            return "no candidate lessens the false refusals: ablating any leaves their refusal metric where it is"

        def beyond(score: RepairScore) -> float:
            return max(0.0, (score.lost or 0.0) - repair.max_lost) + max(0.0, (score.kl or 0.0) - limits.kl)

        best = min(known, key=beyond)
        accepting = [f"--max-lost {rounded_up(best.lost or 0.0)}"] if (best.lost or 0.0) > repair.max_lost else []
        accepting += [f"--kl-threshold {rounded_up(best.kl or 0.0)}"] if (best.kl or 0.0) > limits.kl else []
        return (
            "no candidate lessens the false refusals and leaves the true ones; nearest: position "
            f"{best.position}, layer {best.layer} (borderline {before:.2f} to {best.bypass:.2f} nats, harmful refused "
            f"{-(best.lost or 0.0):+.0%}, KL {best.kl:.3f}); {' '.join(accepting)} would accept it"
        )


def _where(rows: Sequence[list[int]], kept: Tensor) -> list[list[int]]:
    return [row for row, keep in zip(rows, kept.tolist(), strict=True) if keep]


def _standard_error(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
