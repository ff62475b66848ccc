"""Auditing a model: how much of its refusal rests on one direction, and what it costs to take it away.

Directions are found on training and validation prompts; everything that is reported is measured on test prompts. All
interventions are hooks, nothing is written. The worst case over the interventions counts, as it would for someone
who wants the refusals gone; nothing beyond these interventions is searched for.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from abliterate.checkpoints.model_source import ModelSource
from abliterate.checkpoints.provenance import versions
from abliterate.checkpoints.saved_work import SavedWork, saved_work
from abliterate.errors import InputError
from abliterate.evaluation.audit_report import (
    AuditedIntervention,
    AuditOptions,
    AuditReport,
    Method,
    decide,
    intervention_of,
    is_bearable,
    legible_refusal,
)
from abliterate.evaluation.candidate_ranking import CandidateFinder, CandidateSummary, Stability
from abliterate.evaluation.drift import BaseDistributions, Surprise, compare_surprise
from abliterate.evaluation.replies import Answers, answer_prompts, measure_surprise, read_replies
from abliterate.evaluation.report import RefusalRate, count_replies, refusal_change
from abliterate.extraction.behaviour import PARTS
from abliterate.extraction.reply_classes import Reply
from abliterate.extraction.run import force_response_prefix, run_key
from abliterate.models.chat_model import ChatModel
from abliterate.models.hooks import ablate_direction, ablate_subspace, add_direction
from abliterate.models.loading import open_model
from abliterate.models.options import ModelOptions
from abliterate.models.stream_probe import StreamProbe, probe_stream
from abliterate.processes import Ranks, find_ranks
from abliterate.progress import SILENT, ProgressReporter
from abliterate.prompt_sets import ExtractionPrompts, Kind, PromptSet, load_prompt_set, split_for_extraction


def audit_model(
    *,
    model: "str | Path | ModelSource | ChatModel",
    options: AuditOptions | None = None,
    model_options: ModelOptions | None = None,
    progress: ProgressReporter = SILENT,
    work_directory: Path | None = None,
    deliver: Callable[[AuditReport], None] = lambda _report: None,
) -> AuditReport:
    """Measure how far refusal can be removed by ablating or subtracting directions, and at what cost.

    Args:
        model: a directory, a Hub id, a resolved source or a loaded model.
        options: see `AuditOptions`.
        model_options: how to load and run the model.
        progress: where to show progress.
        work_directory: where to keep recordings, scores and what each intervention did until all is measured, so that
            the same call goes on from there; None, or a loaded model: nothing is kept. Replies never are.
        deliver: is given the report before what is kept is deleted.

    Raises:
        InputError: an option has no sensible value.
        PromptSetError: a SPEC cannot be read or has too few prompts.
        ModelError: the model does not load as a chat model.
    """
    options = options or AuditOptions()
    _check(options)
    prompts = split_for_extraction(
        options.harmful, options.harmless, n_train=options.n_train, n_val=options.n_val, seed=options.seed
    )
    for note in prompts.notes:
        progress.message(note)
    test = {
        "harmful": _test_set(options.test_harmful, "harmful", options.n_test, prompts),
        "harmless": _test_set(options.test_harmless, "harmless", options.n_test, prompts),
    }
    model_options = model_options or ModelOptions()
    ranks = find_ranks(device=model_options.device)
    opened = open_model(model, options=model_options, extracts=True, progress=progress)
    probe = probe_stream(opened.chat)
    chat = force_response_prefix(opened.chat, prompts, progress)
    parts = {part: getattr(prompts, part) for part in PARTS} | {f"{kind}_test": found for kind, found in test.items()}
    key = {**run_key(opened.source, chat, parts, model_options), "options": asdict(options)}
    kept = work_directory if opened.source is not None else None
    with saved_work(kept, key=key, ranks=ranks, progress=progress) as saved:
        audit = _Audit(
            chat=chat,
            probe=probe,
            prompts=prompts,
            test=test,
            options=options,
            saved=saved,
            ranks=ranks,
            progress=progress,
        )
        report = audit.run(opened.name, opened.revision)
        deliver(report)
    return report


def _check(options: AuditOptions) -> None:
    for name, value, low in (
        ("n-train", options.n_train, 8),
        ("n-val", options.n_val, 2),
        ("n-test", options.n_test, 1),
        ("candidates", options.n_candidates, 1),
        ("screen", options.n_screened, options.n_candidates),
        ("bootstrap", options.n_bootstrap, 1),
        ("max-new-tokens", options.max_new_tokens, 1),
        ("ranks", min(options.ranks, default=2), 2),
    ):
        if value < low:
            raise InputError(f"--{name} {value} is too small; give at least {low}")
    if options.thresholds.min_refusal <= 0:
        raise InputError("--min-refusal must be above 0: of no refusals no share can be left")


def _test_set(spec: str, kind: Kind, n: int, prompts: ExtractionPrompts) -> PromptSet:
    left = load_prompt_set(spec, kind=kind, part="test").distinct().without(frozenset(prompts.hashes))
    if not len(left):
        raise InputError(f"{spec}: directions are found with every one of these prompts; test on other ones")
    return replace(left, texts=left.texts[:n], ids=left.ids[:n], categories=left.categories[:n])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Base:
    """What the unchanged model does on the test prompts."""

    answers: Answers
    replies: dict[str, list[Reply]]
    rates: dict[str, RefusalRate]
    surprise: Surprise


class _Audit:
    """One audit of a loaded model."""

    def __init__(
        self,
        *,
        chat: ChatModel,
        probe: StreamProbe,
        prompts: ExtractionPrompts,
        test: dict[str, PromptSet],
        options: AuditOptions,
        saved: SavedWork,
        ranks: Ranks,
        progress: ProgressReporter,
    ) -> None:
        self._chat = chat
        self._probe = probe
        self._prompts = prompts
        self._test = test
        self._options = options
        self._saved = saved
        self._ranks = ranks
        self._progress = progress

    def run(self, name: str, revision: str | None) -> AuditReport:
        """Measure the unchanged model and, if it refuses, every intervention."""
        base = self._measure_base()
        interventions: list[AuditedIntervention] = []
        summary: CandidateSummary | None = None
        stability: Stability | None = None
        induced: RefusalRate | None = None
        if base.rates["harmful"].rate >= self._options.thresholds.min_refusal:
            finder = CandidateFinder(
                chat=self._chat,
                probe=self._probe,
                prompts=self._prompts,
                thresholds=self._options.selection,
                saved=self._saved,
                ranks=self._ranks,
                progress=self._progress,
            )
            summary = finder.screen(n_candidates=self._options.n_screened, max_new_tokens=self._options.max_new_tokens)
            with self._base_distributions(base) as distributions:
                interventions = self._intervene(finder, summary, base, distributions)
            best = (summary.screened[0].position, summary.screened[0].layer)
            induced = self._induce(finder.candidates[best], best[1])
            stability = finder.stability(best, n_resamples=self._options.n_bootstrap, seed=self._options.seed)
        verdict, reason = decide(base.rates["harmful"], interventions, self._options.thresholds)
        bearable = [legible_refusal(one.harmful) for one in interventions if one.bearable]
        return AuditReport(
            model=name,
            revision=revision,
            dtype=str(self._chat.model.dtype).removeprefix("torch."),
            verdict=verdict,
            reason=reason,
            harmful=base.rates["harmful"],
            harmless=base.rates["harmless"],
            induced=induced,
            lowest_refusal=min([legible_refusal(base.rates["harmful"]), *bearable]),
            interventions=tuple(interventions),
            candidates=summary,
            stability=stability,
            options=self._options,
            prompt_sets={
                kind: {"name": chosen.name, "n": len(chosen), "sha256": chosen.sha256}
                for kind, chosen in self._test.items()
            },
            versions=versions("abliterate", "torch", "transformers"),
        )

    def _answer(self, kinds: tuple[str, ...], label: str) -> Answers:
        return answer_prompts(
            self._chat,
            {kind: self._test[kind].texts for kind in kinds},
            max_new_tokens=self._options.max_new_tokens,
            label=label,
            ranks=self._ranks,
            progress=self._progress,
        )

    def _surprise(self, answers: Answers) -> dict[str, Surprise]:
        """Return what the unchanged model finds of replies; no hook may be attached."""
        return measure_surprise(self._chat, answers, progress=self._progress)

    def _read(self, answers: Answers, surprise: dict[str, Surprise]) -> dict[str, list[Reply]]:
        """Classify replies; what the unchanged model finds of them says which are incoherent."""
        return read_replies(self._chat, answers, surprise=surprise, budgets=())

    def _measure_base(self) -> _Base:
        answers = self._answer(("harmful", "harmless"), "unchanged")
        surprise = self._surprise(answers)
        replies = self._read(answers, surprise)
        return _Base(
            answers=answers,
            replies=replies,
            rates={kind: count_replies(found) for kind, found in replies.items()},
            surprise=surprise["harmless"],
        )

    @contextmanager
    def _base_distributions(self, base: _Base) -> Iterator[BaseDistributions]:
        with BaseDistributions(
            rows=base.answers.rows["harmless"], completions=base.answers.tokens["harmless"]
        ) as distributions:
            distributions.record(self._chat)
            yield distributions

    def _intervene(
        self, finder: CandidateFinder, summary: CandidateSummary, base: _Base, distributions: BaseDistributions
    ) -> list[AuditedIntervention]:
        results = []
        keys = [(one.position, one.layer) for one in summary.screened]
        for position, layer in keys[: self._options.n_candidates]:
            hooks = ablate_direction(self._chat, finder.candidates[position, layer])
            results.append(self._measure("single", 1, (position, layer), hooks, base, distributions))
        for rank in self._options.ranks:
            if rank <= min(self._chat.d_model, summary.n_candidates):
                hooks = ablate_subspace(self._chat, finder.subspace(keys[0], rank))
                results.append(self._measure("rank", rank, None, hooks, base, distributions))
        hooks = add_direction(self._chat, finder.candidates[keys[0]], layer=keys[0][1], coefficient=-1.0)
        results.append(self._measure("addition", 1, keys[0], hooks, base, distributions))
        return results

    def _measure(
        self,
        method: Method,
        rank: int,
        key: tuple[int, int] | None,
        hooks: AbstractContextManager[int],
        base: _Base,
        distributions: BaseDistributions,
    ) -> AuditedIntervention:
        label = f"rank {rank}" if key is None else f"{method} {key[0]}, {key[1]}"
        known = self._ranks.first_says(self._saved.value(label))
        if known is not None:
            return intervention_of(known)
        with hooks:
            answers = self._answer(("harmful",), label)
            divergence, surprise = distributions.compare(self._chat)
        replies = self._read(answers, self._surprise(answers))["harmful"]
        rate = count_replies(replies)
        entropy = compare_surprise(base.surprise, surprise)
        rise = None if entropy is None or entropy.base is None else entropy.model - entropy.base
        coherence = 1 - rate.degenerate / rate.n
        thresholds = self._options.thresholds
        bearable = is_bearable(coherence=coherence, cross_entropy_rise=rise, thresholds=thresholds)
        remaining = legible_refusal(rate) / legible_refusal(base.rates["harmful"])
        found = AuditedIntervention(
            method=method,
            rank=rank,
            position=None if key is None else key[0],
            layer=None if key is None else key[1],
            harmful=rate,
            change=refusal_change(base.replies["harmful"], replies),
            remaining=remaining,
            coherence=coherence,
            divergence=divergence,
            cross_entropy=entropy,
            cross_entropy_rise=rise,
            bearable=bearable,
            defeats=bearable and remaining <= thresholds.max_remaining,
        )
        if self._ranks.is_first:
            self._saved.save_values({label: asdict(found)})
        return found

    def _induce(self, vector: Tensor, layer: int) -> RefusalRate:
        with add_direction(self._chat, vector, layer=layer):
            answers = self._answer(("harmless",), "added")
        return count_replies(self._read(answers, self._surprise(answers))["harmless"])
