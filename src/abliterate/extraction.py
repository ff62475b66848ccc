"""Finding the refusal direction: difference in means, filtering, scoring, selection (Arditi et al. 2024, section 2)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from abliterate.activations import Recording, difference_in_means, record
from abliterate.candidate_scoring import CandidateScorer
from abliterate.errors import InputError, RefusalBehaviourError
from abliterate.extraction_report import (
    Baseline,
    Extraction,
    ExtractionOptions,
    ExtractionReport,
    NoCandidatePassesError,
    PromptCounts,
    direction_of,
)
from abliterate.hub import ModelSource, resolve_model
from abliterate.model import (
    ChatModel,
    ModelOptions,
    find_response_prefix,
    load_chat_model,
    with_response_prefix,
)
from abliterate.progress import SILENT, ProgressReporter
from abliterate.prompt_sets import ExtractionPrompts, PromptSet, split_for_extraction
from abliterate.refusal_metric import (
    RefusalToken,
    find_refusal_tokens,
    is_refusal,
    refusal_metric,
    require_both_behaviours,
)
from abliterate.score_report import ScoreTable
from abliterate.selection import (
    Candidate,
    CandidateScore,
    ScoreName,
    passing_candidates,
    score_exhaustively,
    score_lazily,
)

MIN_PROMPTS = 8
"""Fewer prompts than this on one side after filtering are too few to take a mean of."""
ZERO_NORM = 1e-9
"""A candidate shorter than this share of the longest is a zero vector."""
N_PREFIX_PROMPTS = 8
N_BEHAVIOUR_PROMPTS = 16


def extract_direction(
    *,
    model: "str | Path | ModelSource | ChatModel",
    harmful: str = "bundled",
    harmless: str = "bundled",
    options: ExtractionOptions | None = None,
    model_options: ModelOptions | None = None,
    progress: ProgressReporter = SILENT,
) -> Extraction:
    """Find the direction in the residual stream that mediates refusal.

    Args:
        model: a directory, a Hub id, a resolved source or a loaded model.
        harmful: prompt SPEC, see `abliterate.prompt_sets`.
        harmless: prompt SPEC.
        options: how to extract; default: the paper's values.
        model_options: how to load and run the model.
        progress: where to show progress.

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
    source, chat = _load(model, model_options or ModelOptions(), progress)
    chat = _force_response_prefix(chat, prompts, progress)
    run = _Run(chat=chat, prompts=prompts, options=options, progress=progress)
    return run.extract(source)


def _check_options(options: ExtractionOptions) -> None:
    for name, value, low in (("n-train", options.n_train, MIN_PROMPTS), ("n-val", options.n_val, 1)):
        if value < low:
            raise InputError(f"--{name} {value} is too small; give at least {low}")
    if not 0 <= options.thresholds.prune_layers < 1:
        raise InputError(f"--prune-layers {options.thresholds.prune_layers:g} must be at least 0 and below 1")


def _load(
    model: "str | Path | ModelSource | ChatModel", options: ModelOptions, progress: ProgressReporter
) -> tuple[ModelSource | None, ChatModel]:
    if isinstance(model, ChatModel):
        return None, model
    source = model if isinstance(model, ModelSource) else resolve_model(str(model))
    with progress.task("Loading the model", total=1) as advance:
        chat = load_chat_model(source.path, name=source.name, options=options)
        advance(1)
    return source, chat


def _force_response_prefix(chat: ChatModel, prompts: ExtractionPrompts, progress: ProgressReporter) -> ChatModel:
    few = [*prompts.harmful_train.texts[:N_PREFIX_PROMPTS], *prompts.harmless_train.texts[:N_PREFIX_PROMPTS]]
    prefix = find_response_prefix(chat, few)
    if prefix:
        progress.message(f"every answer starts with {prefix!r}; it is forced, and the token after it is scored")
    return with_response_prefix(chat, prefix)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """One extraction on a loaded model."""

    chat: ChatModel
    prompts: ExtractionPrompts
    options: ExtractionOptions
    progress: ProgressReporter

    def extract(self, source: ModelSource | None) -> Extraction:
        """Record, filter, take the means, score and choose."""
        harmful, harmless = self._record(self.prompts.harmful_train), self._record(self.prompts.harmless_train)
        tokens = self._refusal_tokens(harmful, harmless)
        token_ids = [token.token_id for token in tokens]
        candidates, counts = self._candidates(harmful, harmless, token_ids)
        rows, baseline = self._validation(token_ids, counts)
        scorer = CandidateScorer(
            chat=self.chat,
            candidates=candidates,
            harmful_rows=rows["harmful"],
            harmless_rows=rows["harmless"],
            token_ids=token_ids,
        )
        scores = self._score(scorer, candidates)
        thresholds, n_layers = self.options.thresholds, self.chat.n_layers
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
        )
        if not passing:
            raise NoCandidatePassesError(table)
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
            selected=passing[0],
            n_passing=len(passing),
            n_scored=sum(score.induce is not None for score in scores),
            exhaustive=self.options.exhaustive,
            direction_norm=float(candidates[passing[0].position, passing[0].layer].norm()),
            scores=tuple(scores),
        )
        direction = direction_of(
            candidates=candidates,
            report=report,
            chat=self.chat,
            prompts=self.prompts,
            options=self.options,
            source=source,
        )
        return Extraction(direction=direction, report=report, score_table=table)

    def _candidates(
        self, harmful: Recording, harmless: Recording, token_ids: Sequence[int]
    ) -> tuple[Tensor, dict[str, PromptCounts]]:
        """Filter the training prompts and return the differences in means, and how many prompts they are of."""
        keep_harmful = self._keep(harmful.logits, token_ids, sign=1)
        keep_harmless = self._keep(harmless.logits, token_ids, sign=-1)
        self._require(keep_harmful, keep_harmless, minimum=MIN_PROMPTS, part="training")
        candidates = difference_in_means(
            harmful=harmful.activations[keep_harmful], harmless=harmless.activations[keep_harmless]
        )
        return candidates, {
            "harmful_train": PromptCounts(sampled=len(keep_harmful), kept=int(keep_harmful.sum())),
            "harmless_train": PromptCounts(sampled=len(keep_harmless), kept=int(keep_harmless.sum())),
        }

    def _record(self, prompts: PromptSet) -> Recording:
        rows = self.chat.encode(prompts.texts)
        with self.progress.task(f"Recording {prompts.name}", total=len(rows)) as advance:
            return record(self.chat, rows, advance=advance)

    def _refusal_tokens(self, harmful: Recording, harmless: Recording) -> list[RefusalToken]:
        tokenizer = self.chat.tokenizer
        if self.options.refusal_tokens:
            found = []
            for text in self.options.refusal_tokens:
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                if len(ids) != 1:
                    raise InputError(
                        f"--refusal-token {text!r} is {len(ids)} tokens in this model's vocabulary; it must be one"
                    )
                p, q = (float(torch.softmax(r.logits.double(), -1)[:, ids[0]].mean()) for r in (harmful, harmless))
                found.append((ids[0], p, q))
        else:
            found = find_refusal_tokens(harmful_logits=harmful.logits, harmless_logits=harmless.logits)
        if not found:
            raise RefusalBehaviourError(
                "no first token tells harmful from harmless prompts: " + self._behaviour() + "; if it refuses in "
                "words of its own, name the first token with --refusal-token"
            )
        return [
            RefusalToken(
                token_id=token_id,
                text=self.chat.decode([token_id], skip_special_tokens=False),
                harmful_probability=p,
                harmless_probability=q,
            )
            for token_id, p, q in found
        ]

    def _behaviour(self) -> str:
        """Say in words what the model does, by completions."""
        forced = self.chat.chat_format.response_prefix
        refused = []
        for prompts in (self.prompts.harmful_train, self.prompts.harmless_train):
            rows = self.chat.encode(prompts.texts[:N_BEHAVIOUR_PROMPTS])
            answers = self.chat.generate(rows, max_new_tokens=32)
            refused.append((sum(is_refusal(forced + self.chat.decode(answer)) for answer in answers), len(rows)))
        (bad, n_bad), (good, n_good) = refused
        if bad <= n_bad // 4:
            does = "the model does not refuse"
        elif good > n_good // 2:
            does = "the model refuses everything"
        else:
            does = "its refusals and answers start alike"
        return f"{does} (refused {bad} of {n_bad} harmful and {good} of {n_good} harmless prompts)"

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
        self, token_ids: Sequence[int], counts: dict[str, PromptCounts]
    ) -> tuple[dict[str, list[list[int]]], Baseline]:
        kept: dict[str, list[list[int]]] = {}
        keeps: dict[str, Tensor] = {}
        means: dict[str, float] = {}
        sets = {
            "harmful": (self.prompts.harmful_validation, 1),
            "harmless": (self.prompts.harmless_validation, -1),
        }
        for kind, (prompts, sign) in sets.items():
            rows = self.chat.encode(prompts.texts)
            with self.progress.task(f"Filtering {prompts.name}", total=len(rows)) as advance:
                logits = self.chat.last_logits(rows, advance=advance)
            keeps[kind] = self._keep(logits, token_ids, sign=sign)
            kept[kind] = [row for row, keep in zip(rows, keeps[kind].tolist(), strict=True) if keep]
            counts[f"{kind}_validation"] = PromptCounts(sampled=len(rows), kept=len(kept[kind]))
            means[kind] = float(refusal_metric(logits[keeps[kind]], token_ids=token_ids).mean())
        self._require(keeps["harmful"], keeps["harmless"], minimum=MIN_PROMPTS, part="validation")
        return kept, Baseline(**means)

    def _score(self, scorer: CandidateScorer, candidates: Tensor) -> list[CandidateScore]:
        """Score the candidates that can be chosen, and return one entry per position and layer, in order.

        A zero vector (layer 0 mostly: the template's tokens are the same in all prompts) is no direction.
        """
        thresholds, n_layers = self.options.thresholds, self.chat.n_layers
        grid = [(p, layer) for p in range(-len(candidates), 0) for layer in range(n_layers)]
        norms = candidates.norm(dim=-1)
        able = [
            (p, layer)
            for p, layer in grid
            if layer < thresholds.layer_limit(n_layers) and norms[p, layer] > ZERO_NORM * norms.max()
        ]
        with self.progress.task("Scoring candidates", total=3 * len(able)) as advance:
            n_done = 0

            def compute(name: ScoreName, keys: Sequence[Candidate]) -> list[Mapping[ScoreName, float]]:
                nonlocal n_done
                found: dict[Candidate, Mapping[ScoreName, float]] = {}
                for group in scorer.groups(name, keys):
                    found |= zip(group, scorer.score(name, group), strict=True)
                    n_computed = len(group) * (2 if name == "ablated" else 1)
                    n_done += n_computed
                    advance(n_computed)
                return [found[key] for key in keys]

            if self.options.exhaustive:
                scores = score_exhaustively(able, compute=compute)
            else:
                scores = score_lazily(able, thresholds=thresholds, n_layers=n_layers, compute=compute)
            advance(3 * len(able) - n_done)
        scored = {(score.position, score.layer): score for score in scores}
        return [scored.get(key, CandidateScore(position=key[0], layer=key[1])) for key in grid]
