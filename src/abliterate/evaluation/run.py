"""Measuring what an edit did: refusal rates with intervals, and the damage beside them.

All numbers are on prompts that extraction did not use. The direction file lists the hashes of those it was extracted
with, and the record of an orthogonalized checkpoint carries them along, so they are left out without being known.
Replies are greedy and are written only on request.
"""

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from abliterate.arguments import cli_arguments
from abliterate.checkpoints.checkpoint import CONFIG_NAME
from abliterate.checkpoints.model_source import ModelSource, as_source
from abliterate.checkpoints.provenance import versions
from abliterate.directions import Direction, load_direction
from abliterate.editing.record import resolve_base, shards_sha256
from abliterate.errors import InputError, InterruptedRunError
from abliterate.evaluation.capability import TaskSamples, compare_tasks, require_harness, run_tasks
from abliterate.evaluation.counting import Asked, Said, choose_prompts, completions_of, count, load_prompts
from abliterate.evaluation.drift import (
    BaseDistributions,
    Divergence,
    Findings,
    Surprise,
    compare_surprise,
    measure,
    text_surprise,
)
from abliterate.evaluation.held_out import record_of, used_for_checkpoint, used_prompts
from abliterate.evaluation.judges import JudgeOptions, JudgeReport, judge_replies, load_judge
from abliterate.evaluation.parts import PartAnswers, answer_part
from abliterate.evaluation.recognition import Verdicts, ask_about, compare_verdicts
from abliterate.evaluation.replies import (
    Answers,
    ReplyCache,
    answer_prompts,
    let_think,
    measure_surprise,
    read_replies,
    reply_conditions,
    write_completions,
)
from abliterate.evaluation.report import (
    SCORER,
    EvaluationOptions,
    EvaluationReport,
    Kind,
)
from abliterate.extraction.reply_classes import Reply
from abliterate.files import check_writable, read_json_report
from abliterate.interventions.steering import default_coefficient, steer, steering_key
from abliterate.models.chat_model import ChatModel
from abliterate.models.loading import load_tokenizer, open_model
from abliterate.models.options import ModelOptions
from abliterate.processes import Ranks, find_ranks
from abliterate.progress import SILENT, ProgressReporter
from abliterate.prompt_sets import PromptSet, load_plain_texts

_COMPARED_PROMPTS = 64

Found = TypeVar("Found")


__all__ = ["EvaluationOptions", "EvaluationReport", "evaluate_model"]


def evaluate_model(
    *,
    model: str | Path | ModelSource,
    base: str | Path | ModelSource | None = None,
    base_revision: str | None = None,
    direction: Direction | Path | None = None,
    options: EvaluationOptions | None = None,
    model_options: ModelOptions | None = None,
    progress: ProgressReporter = SILENT,
) -> EvaluationReport:
    """Measure refusal rates on held-out prompts and, against a base, what else changed.

    With an intervention, the base is MODEL itself without it unless another is given. A base with weights of its own
    is loaded twice, before and after the model, so that only one of them is in memory at a time. Where a launcher
    started several processes, they share the prompts that are replied to; all else each computes; the first writes.

    Args:
        model: a directory, a Hub id or a resolved source.
        base: what to compare with.
        base_revision: branch, tag or commit of a base on the Hub; None: the commit that the model's record names, if
            it names this base.
        direction: needed by the interventions; its prompts are left out of the evaluation.
        options: see `EvaluationOptions`.
        model_options: how to load and run the models.
        progress: where to show progress.

    Raises:
        InputError: the options do not fit together.
        PromptSetError: a SPEC cannot be read, or all its prompts were used in extraction.
        ModelError: a model does not load as a chat model.
    """
    options = options or EvaluationOptions()
    loaded = load_direction(direction) if isinstance(direction, Path) else direction
    _check_options(options, loaded)
    if options.tasks.tasks:
        require_harness()
    sets = load_prompts(options)
    texts = {spec: load_plain_texts(spec) for spec in dict.fromkeys(options.texts)}
    source = as_source(model)
    base_source = source if options.intervention != "none" else None
    if base is not None:
        found = base if isinstance(base, ModelSource) else None
        base_source = found or resolve_base(str(base), revision=base_revision, edited=source, progress=progress)
    elif base_revision is not None:
        raise InputError(f"--base-revision {base_revision}: is of --base, which is not given")
    judges = tuple(as_source(judge) for judge in options.judges)
    used = used_for_checkpoint(source.path) | (used_prompts(loaded.metadata) if loaded else frozenset())
    return _Run(
        source=source,
        base_source=base_source,
        judges=judges,
        direction=loaded,
        asked=choose_prompts(sets, options, used=used, progress=progress),
        texts={spec: chosen.texts for spec, chosen in texts.items()},
        options=options,
        model_options=model_options or ModelOptions(),
        ranks=find_ranks(device=(model_options or ModelOptions()).device),
        progress=progress,
    ).evaluate()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    """What one of the two models did."""

    answers: Answers
    replies: dict[str, list[Reply]]
    parts: dict[str, PartAnswers]
    verdicts: Verdicts | None
    own_answers: Surprise | None
    texts: dict[str, Surprise]
    tasks: TaskSamples

    @property
    def said(self) -> Said:
        """Its replies, classed."""
        return Said(plain=self.replies, parts={name: part.replies for name, part in self.parts.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """One evaluation."""

    source: ModelSource
    base_source: ModelSource | None
    judges: tuple[ModelSource, ...]
    direction: Direction | None
    asked: Asked
    texts: dict[str, tuple[str, ...]]
    options: EvaluationOptions
    model_options: ModelOptions
    ranks: Ranks
    progress: ProgressReporter

    def evaluate(self) -> EvaluationReport:
        """Run the base, the model, the base again over the model's replies, and the judges: one at a time in memory.

        Raises:
            InterruptedRunError: a signal came; what a cache holds is kept.
        """
        try:
            return self._evaluate()
        except KeyboardInterrupt as error:
            cache = self.options.cache
            left = f"replies are kept in {cache}: the same command goes on from there"
            raise InterruptedRunError.of(
                error, left if cache else "nothing is kept; --cache DIR keeps replies"
            ) from error

    def _evaluate(self) -> EvaluationReport:
        self._check_comparable()
        base, model, divergence, device = self._measure()
        gc.collect()
        if self.options.save_completions is not None and self.ranks.is_first:
            said = {"base": base.said if base else None, "model": model.said}
            write_completions(self.options.save_completions, completions_of(self.asked, said))
        return self._report(base, model, divergence, self._judge(base, model, device))

    def _check_comparable(self) -> None:
        """Find before hours of work that the two models do not read the same tokens.

        Raises:
            InputError: they do not.
        """
        base, model = self.base_source, self.source
        if base is None or base == model:
            return
        sizes = {_vocabulary_size(source.path) for source in (base, model)} - {None}
        if len(sizes) > 1:
            raise InputError(
                f"{model.name} and its base {base.name} have {' and '.join(map(str, sorted(sizes, key=str)))} output "
                "tokens and cannot be compared; give --base the model that it was made from"
            )
        of_base, of_model = (
            load_tokenizer(source.path, name=source.name, options=self.model_options) for source in (base, model)
        )
        for text in self._prompts["harmless"].texts[:_COMPARED_PROMPTS]:
            rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in (of_base, of_model)]
            if rows[0] != rows[1]:
                raise InputError(
                    f"{model.name} and its base {base.name} make different tokens of {text[:60]!r} and cannot be "
                    "compared; give --base the model that it was made from"
                )

    def _measure(self) -> tuple[_Side | None, _Side, Divergence | None, str]:
        source, base_source = self.source, self.base_source
        # If they are one, it is loaded once.
        shared = self._load(source) if base_source == source else None
        with ExitStack() as stack:
            base, distributions = None, None
            if base_source is not None:
                base, distributions = self._on(base_source, lambda chat: self._measure_base(chat, stack), shared)
            model, divergence, device = self._on(source, lambda chat: self._measure_model(chat, distributions), shared)
            if base_source is not None:
                model = self._on(base_source, lambda chat: self._read_as_base(chat, model), shared)
        return base, model, divergence, device

    @property
    def _prompts(self) -> dict[Kind, PromptSet]:
        return self.asked.prompts

    def _on(self, source: ModelSource, measure: Callable[[ChatModel], Found], shared: ChatModel | None) -> Found:
        """Measure a model and let it go: no name, here or in a caller, may hold it while the next one is loaded."""
        if shared is not None:
            return measure(shared)
        try:
            return measure(self._load(source))
        finally:
            gc.collect()

    def _load(self, source: ModelSource) -> ChatModel:
        chat = open_model(source, options=self.model_options, progress=self.progress).chat
        if self.options.thinking:
            plain, chat = chat.chat_format, let_think(chat)
            if chat.chat_format.form == plain.form and chat.chat_format.response_prefix == plain.response_prefix:
                self.progress.message(f"{source.name}: --thinking changes nothing; its chat template has no such form")
        return chat

    def _measure_base(self, chat: ChatModel, stack: ExitStack) -> tuple[_Side, BaseDistributions]:
        assert self.base_source is not None
        answers, parts = self._answers(chat, self.base_source, "base", edited=False)
        distributions = stack.enter_context(
            BaseDistributions(rows=answers.rows["harmless"], completions=answers.tokens["harmless"])
        )
        with self.progress.task("Keeping the base's distributions", total=len(answers.rows["harmless"])) as advance:
            own_answers = distributions.record(chat, advance=advance)
        # What it finds of its own replies is known from where it gave them.
        surprise = self._surprise(chat, answers, known={**answers.surprise, "harmless": own_answers})
        side = _Side(
            answers=answers,
            replies=read_replies(chat, answers, surprise=surprise),
            parts=self._read_parts(chat, parts, as_base=True),
            verdicts=self._verdicts(chat, "base"),
            own_answers=own_answers,
            texts=self._text_surprise(chat, "base"),
            tasks=self._tasks(chat, "base"),
        )
        return side, distributions

    def _measure_model(
        self, chat: ChatModel, distributions: BaseDistributions | None
    ) -> tuple[_Side, Divergence | None, str]:
        with self._steered(chat):
            answers, parts = self._answers(chat, self.source, "model", edited=True)
            divergence, own_answers = self._compare(chat, distributions)
            side = _Side(
                answers=answers,
                own_answers=own_answers,
                texts=self._text_surprise(chat, "model"),
                tasks=self._tasks(chat, "model"),
                replies=read_replies(chat, answers),
                parts=self._read_parts(chat, parts, as_base=False),
                verdicts=self._verdicts(chat, "model"),
            )
        return side, divergence, chat.device.type

    def _answers(
        self, chat: ChatModel, source: ModelSource, label: str, *, edited: bool
    ) -> tuple[Answers, dict[str, Answers]]:
        cache = self._cache(chat, source, edited=edited)
        answers = answer_prompts(
            chat,
            {kind: prompts.texts for kind, prompts in self._prompts.items()},
            max_new_tokens=self.options.max_new_tokens,
            label=label,
            cache=cache,
            ranks=self.ranks,
            progress=self.progress,
        )
        parts = {
            part.name: answer_part(
                chat, part, answers, label=label, cache=cache, ranks=self.ranks, progress=self.progress
            )
            for part in self.asked.parts
        }
        if cache is not None and cache.hits:
            self.progress.message(f"{label}: {cache.hits} replies taken from {cache.path}")
        return answers, parts

    def _read_parts(self, chat: ChatModel, parts: dict[str, Answers], *, as_base: bool) -> dict[str, PartAnswers]:
        return {
            name: PartAnswers(
                answers=answers,
                replies=read_replies(chat, answers, surprise=self._surprise(chat, answers) if as_base else None),
            )
            for name, answers in parts.items()
        }

    def _verdicts(self, chat: ChatModel, label: str) -> Verdicts | None:
        if self.options.thinking:
            # Its answer begins with a thought, and not with yes or no.
            return None
        kinds: tuple[Kind, ...] = ("harmful", "harmless")
        asked = {str(kind): self._prompts[kind].texts for kind in kinds}
        with self.progress.task(
            f"Asking what is harmful ({label})", total=2 * sum(map(len, asked.values()))
        ) as advance:
            return ask_about(chat, asked, advance=advance)

    def _cache(self, chat: ChatModel, source: ModelSource, *, edited: bool) -> ReplyCache | None:
        if self.options.cache is None:
            return None
        steering = None
        if edited and self.direction is not None:
            intervention = self.options.intervention
            steering = steering_key(self.direction, intervention=intervention, coefficient=self._coefficient)
        conditions = reply_conditions(
            chat,
            source,
            max_new_tokens=self.options.max_new_tokens,
            steering=steering,
            progress=self.progress,
        )
        return ReplyCache(self.options.cache, conditions, rank=self.ranks.index)

    @property
    def _coefficient(self) -> float | None:
        return default_coefficient(self.options.intervention, self.options.coefficient)

    def _steered(self, chat: ChatModel) -> AbstractContextManager[Any]:
        if self.direction is None or self.options.intervention == "none":
            return nullcontext()
        return steer(
            chat,
            self.direction,
            intervention=self.options.intervention,
            coefficient=self._coefficient,
            progress=self.progress,
        )

    def _compare(
        self, chat: ChatModel, distributions: BaseDistributions | None
    ) -> tuple[Divergence, Surprise] | tuple[None, None]:
        if distributions is None:
            return None, None
        with self.progress.task("Comparing distributions", total=len(self._prompts["harmless"])) as advance:
            return distributions.compare(chat, advance=advance)

    def _text_surprise(self, chat: ChatModel, label: str) -> dict[str, Surprise]:
        found = {}
        for spec, texts in self.texts.items():
            with self.progress.task(f"Reading texts {spec} ({label})", total=len(texts)) as advance:
                found[spec] = text_surprise(chat, texts, advance=advance)
        return found

    def _tasks(self, chat: ChatModel, label: str) -> TaskSamples:
        options = self.options.tasks
        return run_tasks(chat, options=options, label=label, progress=self.progress) if options.tasks else {}

    def _read_as_base(self, chat: ChatModel, model: _Side) -> _Side:
        """Read the model's replies anew, with what the base finds of them."""
        return replace(
            model,
            replies=read_replies(chat, model.answers, surprise=self._surprise(chat, model.answers)),
            parts=self._read_parts(chat, {name: part.answers for name, part in model.parts.items()}, as_base=True),
        )

    def _surprise(
        self, chat: ChatModel, answers: Answers, *, known: dict[str, Surprise] | None = None
    ) -> dict[str, Surprise]:
        return measure_surprise(chat, answers, known=known, progress=self.progress)

    def _judge(self, base: _Side | None, model: _Side, device: str) -> tuple[JudgeReport, ...]:
        options = JudgeOptions(
            label=self.options.judge_label,
            prompt=self.options.judge_prompt,
            device=device,
            cache=self.options.cache,
            ranks=self.ranks,
        )
        reports = []
        for source in self.judges:
            reports.append(
                judge_replies(
                    load_judge(source, options=options, progress=self.progress),
                    name=source.name,
                    prompts={kind: chosen.texts for kind, chosen in self._prompts.items()},
                    replies=model.replies,
                    base_replies=base.replies if base else None,
                    progress=self.progress,
                )
            )
            gc.collect()
        return tuple(reports)

    def _report(
        self, base: _Side | None, model: _Side, divergence: Divergence | None, judges: tuple[JudgeReport, ...]
    ) -> EvaluationReport:
        compared = {
            spec: compare_surprise(base.texts[spec] if base else None, found) for spec, found in model.texts.items()
        }
        own_answers = compare_surprise(base.own_answers, model.own_answers) if base and model.own_answers else None
        texts = {spec: entropy for spec, entropy in compared.items() if entropy is not None}
        recognition = compare_verdicts(base.verdicts if base else None, model.verdicts)
        found = Findings(
            recognition=recognition,
            divergence=divergence,
            own_answers=own_answers,
            texts=texts,
            replies=model.replies,
            base_replies=base.replies if base else None,
        )
        return EvaluationReport(
            **count(self.asked, model.said, base.said if base else None),
            model=self.source.name,
            base=self.base_source.name if self.base_source else None,
            revision=self.source.revision,
            base_revision=self.base_source.revision if self.base_source else None,
            shards_sha256=shards_sha256(record_of(self.source.path)),
            intervention=self.options.intervention,
            coefficient=self._coefficient,
            direction=_describe(self.direction),
            max_new_tokens=self.options.max_new_tokens,
            thinking=self.options.thinking,
            system_prompt=self.model_options.system_prompt,
            scorer=SCORER,
            recognition=recognition,
            kl_harmless=divergence.first_token if divergence else None,
            divergence=divergence,
            cross_entropy=own_answers,
            text_cross_entropy=texts,
            measurements=measure(found),
            judges=judges,
            capability=(
                compare_tasks(base.tasks if base else None, model.tasks, options=self.options.tasks)
                if self.options.tasks.tasks
                else None
            ),
            arguments=tuple(cli_arguments(self.options) + cli_arguments(self.model_options)),
            versions=versions("abliterate", "torch", "transformers"),
        )


def _vocabulary_size(path: Path) -> int | None:
    """Return how many output tokens a model has by its config; None where that does not show, as of a GGUF file."""
    if path.is_file():
        return None
    config = read_json_report(path / CONFIG_NAME)
    thinker = config.get("thinker_config") or config
    sizes = [part.get("vocab_size") for part in (thinker.get("text_config"), thinker) if isinstance(part, dict)]
    return next((size for size in sizes if isinstance(size, int)), None)


def _check_options(options: EvaluationOptions, direction: Direction | None) -> None:
    if options.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {options.max_new_tokens} is too small; give at least 1")
    if options.intervention != "none" and direction is None:
        raise InputError(f"--intervention {options.intervention} needs --direction FILE")
    if options.intervention == "none" and direction is not None:
        raise InputError("--direction is given but --intervention is none; choose ablate, add or affine")
    if options.save_completions is not None:
        check_writable(options.save_completions, flag="--save-completions")
    if options.coefficient is not None and options.intervention not in {"add", "affine"}:
        raise InputError("--coefficient is the dose of --intervention add or affine; leave it out otherwise")


def _describe(direction: Direction | None) -> dict[str, Any] | None:
    if direction is None:
        return None
    known = {key: direction.metadata.get(key) for key in ("model", "position", "layer")}
    return {"sha256": direction.sha256, **known}
