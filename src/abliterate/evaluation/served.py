"""`evaluate` where the replies come from a server: the same prompts, classes, intervals and parts.

What needs the model's own numbers is measured as far as the server gives the likeliest first tokens: its verdict on
harmful and harmless prompts, and KL to a base that is served, too, as a lower bound. All else is left out, and said.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from abliterate.arguments import cli_arguments
from abliterate.checkpoints.model_source import ModelSource, as_source
from abliterate.checkpoints.provenance import versions
from abliterate.directions import Direction, load_direction
from abliterate.editing.record import shards_sha256
from abliterate.errors import InputError, InterruptedRunError, ServerError
from abliterate.evaluation.chat_server import TOP, ChatServer, Message, Request, ServedReplies, ServedReply, connect
from abliterate.evaluation.counting import Asked, Said, choose_prompts, completions_of, count, load_prompts
from abliterate.evaluation.drift import Findings, measure
from abliterate.evaluation.held_out import record_of, used_for_checkpoint, used_prompts
from abliterate.evaluation.judges import JudgeOptions, JudgeReport, ServedJudge, judge_replies, load_judge
from abliterate.evaluation.recognition import QUESTIONS, Verdicts, compare_verdicts
from abliterate.evaluation.replies import write_completions
from abliterate.evaluation.report import (
    BUDGETS,
    OPENING,
    REPETITION,
    SCORER,
    EvaluationOptions,
    EvaluationReport,
    ServedBy,
)
from abliterate.extraction.reply_classes import Reply, read_reply
from abliterate.files import check_writable
from abliterate.progress import SILENT, ProgressReporter
from abliterate.prompt_sets import load_openings

_LEAST = 1e-6
"""A probability that is smaller than this is rounding of the server's."""
_NO_LOGITS = "cross-entropy, KL over replies, what a base finds of them: a server gives replies, and no logits"
_NO_TOKENS = "KL of the first token, the verdict on what is harmful: the server gives no log-probabilities"
_NO_CUTS = "rates by length of reply: the server does not say the tokens of its replies"


def evaluate_server(
    *,
    options: EvaluationOptions,
    model: str | Path | ModelSource | None = None,
    direction: Direction | Path | None = None,
    system_prompt: str | None = None,
    progress: ProgressReporter = SILENT,
) -> EvaluationReport:
    """Measure the refusal rates of a served model on held-out prompts, beside those of a served base.

    Args:
        options: `server` says where; see `EvaluationOptions`.
        model: the checkpoint that is served, where it is at hand: its record says which prompts to leave out.
        direction: a direction whose prompts are left out.
        system_prompt: put before each conversation.
        progress: where to show progress.

    Raises:
        InputError: the options do not fit together, or need a model in this process.
        PromptSetError: a SPEC cannot be read, or all its prompts were used in extraction.
        ServerError: a server cannot be reached, fails, or answers something else.
    """
    _check_options(options)
    sets = load_prompts(options)
    loaded = load_direction(direction) if isinstance(direction, Path) else direction
    source = None if model is None else as_source(model)
    used = used_prompts(loaded.metadata) if loaded else frozenset()
    if source is not None:
        used |= used_for_checkpoint(source.path)
    asked = choose_prompts(sets, options, used=used, progress=progress)
    connected = partial(connect, options=options.server, progress=progress)
    served = options.server
    model_server = connected(str(served.url), model=served.api_model)
    base_server, judge = None, None
    if served.base_url is not None or served.base_api_model is not None:
        flag = "--server" if served.base_url is None else "--base-server"
        base_server = connected(served.base_url or str(served.url), model=served.base_api_model, flag=flag)
        if (base_server.url, base_server.model) == (model_server.url, model_server.model):
            raise InputError(
                f"--base-server: is the model itself, {model_server.model}; name its base with --base-api-model"
            )
    if served.judge_url is not None:
        found = connected(served.judge_url, model=served.judge_api_model, flag="--judge-server")
        judge = ServedJudge(found, prompt=options.judge_prompt, cache=options.cache)
    return _Run(
        source=source,
        asked=asked,
        model=model_server,
        base=base_server,
        judge=judge,
        direction=loaded,
        options=options,
        system_prompt=system_prompt,
        progress=progress,
    ).evaluate()


def _check_options(options: EvaluationOptions) -> None:
    plain = EvaluationOptions()
    if options.server.url is None:
        raise InputError("--server URL is missing")
    for flag, given in (
        ("--intervention", options.intervention != plain.intervention),
        ("--lm-eval", bool(options.tasks.tasks)),
        ("--text", options.texts != plain.texts),
    ):
        if given:
            raise InputError(f"{flag}: needs the model in this process; leave it out, or --server")
    if options.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {options.max_new_tokens} is too small; give at least 1")
    if options.thinking:
        raise InputError(
            "--thinking: how a served model is let think is the server's; tell it with --server-body, such as "
            '\'{"chat_template_kwargs": {"enable_thinking": true}}\''
        )
    if options.save_completions is not None:
        check_writable(options.save_completions, flag="--save-completions")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    """What one of the two servers said."""

    said: Said
    first: list[dict[str, float]] | None
    verdicts: Verdicts | None
    has_tokens: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """One evaluation by servers."""

    source: ModelSource | None
    asked: Asked
    model: ChatServer
    base: ChatServer | None
    judge: ServedJudge | None
    direction: Direction | None
    options: EvaluationOptions
    system_prompt: str | None
    progress: ProgressReporter

    def evaluate(self) -> EvaluationReport:
        """Ask the base, the model and the judges, one after another.

        Raises:
            InterruptedRunError: a signal came; what a cache holds is kept.
            ServerError: a server failed; likewise.
        """
        cache = self.options.cache
        kept = f"replies are kept in {cache}: the same command goes on from there"
        left = kept if cache else "nothing is kept; --cache DIR keeps replies"
        try:
            base = None if self.base is None else self._side(self.base, "base")
            model = self._side(self.model, "model")
            if self.options.save_completions is not None:
                said = {"base": base.said if base else None, "model": model.said}
                write_completions(self.options.save_completions, completions_of(self.asked, said))
            return self._report(base, model, self._judged(base, model))
        except KeyboardInterrupt as error:
            raise InterruptedRunError.of(error, left) from error
        except ServerError as error:
            raise ServerError(f"{error}; {left}") from error

    def _side(self, server: ChatServer, label: str) -> _Side:
        folder = self.options.cache
        asking = _Asking(
            server=server,
            label=label,
            system_prompt=self.system_prompt,
            limit=self.options.max_new_tokens,
            cache=None if folder is None else ServedReplies(folder, server, system_prompt=self.system_prompt),
            progress=self.progress,
        )
        harmless = self.asked.prompts["harmless"].texts
        gives_tokens = asking.gives_tokens(harmless[0])
        top = 1 if gives_tokens else 0
        texts = {str(kind): prompts.texts for kind, prompts in self.asked.prompts.items()}
        plain = {
            kind: asking.replies(f"Answering {kind} prompts ({label})", [[_user(text)] for text in chosen], top=top)
            for kind, chosen in texts.items()
        }
        parts = {part.name: asking.part(part.name, part.prompts, texts, plain, top=top) for part in self.asked.parts}
        if asking.cache is not None and asking.cache.hits:
            self.progress.message(f"{label}: {asking.cache.hits} replies taken from {asking.cache.path}")
        has_tokens = all(reply.tokens is not None for found in plain.values() for reply in found)
        return _Side(
            said=Said(
                plain=self._read(plain, has_tokens),
                parts={name: self._read(found, has_tokens) for name, found in parts.items()},
            ),
            first=asking.first_tokens(harmless) if gives_tokens and self.base is not None else None,
            verdicts=asking.verdicts({kind: texts[kind] for kind in ("harmful", "harmless")}) if gives_tokens else None,
            has_tokens=has_tokens,
        )

    def _read(self, replies: Mapping[str, Sequence[ServedReply]], has_tokens: bool) -> dict[str, list[Reply]]:
        budgets = [each for each in BUDGETS if each <= self.options.max_new_tokens] if has_tokens else []
        return {kind: [_classed(reply, budgets) for reply in found] for kind, found in replies.items()}

    def _judged(self, base: _Side | None, model: _Side) -> tuple[JudgeReport, ...]:
        options = JudgeOptions(
            label=self.options.judge_label, prompt=self.options.judge_prompt, cache=self.options.cache
        )
        sources = [as_source(judge) for judge in self.options.judges]
        judges = [(source.name, load_judge(source, options=options, progress=self.progress)) for source in sources]
        if self.judge is not None:
            judges.append((self.judge.name, self.judge))
        return tuple(
            judge_replies(
                judge,
                name=name,
                prompts={kind: chosen.texts for kind, chosen in self.asked.prompts.items()},
                replies=model.said.plain,
                base_replies=base.said.plain if base else None,
                progress=self.progress,
            )
            for name, judge in judges
        )

    def _report(self, base: _Side | None, model: _Side, judges: tuple[JudgeReport, ...]) -> EvaluationReport:
        at_least = None
        if base is not None and base.first is not None and model.first is not None:
            found = [least_divergence(one, other) for one, other in zip(base.first, model.first, strict=True)]
            at_least = math.fsum(found) / len(found)
        recognition = compare_verdicts(base.verdicts if base else None, model.verdicts)
        findings = Findings(
            divergence=None,
            own_answers=None,
            texts={},
            recognition=recognition,
            least_divergence=at_least,
            replies=model.said.plain,
            base_replies=base.said.plain if base else None,
        )
        direction = self.direction
        return EvaluationReport(
            **count(self.asked, model.said, base.said if base else None),
            model=self.source.name if self.source else _short(self.model.model),
            base=None if self.base is None else _short(self.base.model),
            revision=self.source.revision if self.source else None,
            shards_sha256=shards_sha256(record_of(self.source.path)) if self.source else None,
            intervention="none",
            direction=None if direction is None else {"sha256": direction.sha256},
            max_new_tokens=self.options.max_new_tokens,
            system_prompt=self.system_prompt,
            scorer=SCORER,
            recognition=recognition,
            kl_harmless=None,
            cross_entropy=None,
            measurements=measure(findings),
            judges=judges,
            arguments=tuple(cli_arguments(self.options)),
            versions=versions("abliterate"),
            server=_served_by(self.model, model),
            base_server=_served_by(self.base, base) if self.base is not None and base is not None else None,
            kl_first_token_at_least=at_least,
        )


def _served_by(server: ChatServer, side: _Side) -> ServedBy:
    left_out = [_NO_LOGITS]
    left_out += [_NO_TOKENS] if side.verdicts is None else []
    left_out += [] if side.has_tokens else [_NO_CUTS]
    described = {key: _short(each) if isinstance(each, str) else each for key, each in server.described.items()}
    return ServedBy(url=server.url, model=_short(server.model), described=described, left_out=tuple(left_out))


def _short(name: str) -> str:
    """Return a name without the folders of the server's disk."""
    return Path(name).name if name.startswith("/") else name


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _classed(served: ServedReply, budgets: Sequence[int]) -> Reply:
    reply = read_reply(served.text, truncated=served.truncated)
    if served.thinking:
        unfinished = served.truncated and not served.text.strip()
        reply = replace(reply, thinking=served.thinking, thinking_unfinished=unfinished)
    within = {}
    for budget in budgets:
        tokens = served.tokens or ()
        cut = read_reply("".join(tokens[:budget]), truncated=True) if len(tokens) > budget else reply
        within[budget] = cut.refused
    return replace(reply, within=within)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asking:
    """One server, asked for one side of an evaluation.

    Attributes:
        server: the server.
        label: what to call its model in the progress bars.
        system_prompt: put before each conversation.
        limit: length limit of the replies.
        cache: replies that are there already, and where new ones are kept; None keeps none.
        progress: where to show progress.
    """

    server: ChatServer
    label: str
    system_prompt: str | None
    limit: int
    cache: ServedReplies | None
    progress: ProgressReporter

    def replies(
        self, task: str, conversations: Sequence[Sequence[Message]], *, top: int, limit: int | None = None
    ) -> list[ServedReply]:
        """Return the reply to each conversation, those that are kept from there."""
        system = () if self.system_prompt is None else ({"role": "system", "content": self.system_prompt},)
        requests = [
            Request(messages=(*system, *conversation), max_tokens=limit or self.limit, top=top)
            for conversation in conversations
        ]
        with self.progress.task(task, total=len(requests)) as advance:
            return self.server.replies(requests, cache=self.cache, advance=advance)

    def gives_tokens(self, text: str) -> bool:
        """Tell whether the server says the likeliest tokens; some refuse to be asked for them."""
        try:
            (reply,) = self.replies(f"Asking what the server gives ({self.label})", [[_user(text)]], top=TOP, limit=1)
        except ServerError:
            # What else is wrong shows with the first reply.
            return False
        return reply.first is not None and len(reply.first) > 1

    def part(
        self,
        name: str,
        prompts: Mapping[Any, Any],
        plain_texts: Mapping[str, Sequence[str]],
        plain: Mapping[str, Sequence[ServedReply]],
        *,
        top: int,
    ) -> dict[str, list[ServedReply]]:
        """Ask the prompts of a part; see `parts`."""
        texts: dict[str, Sequence[str]] = {str(kind): chosen.texts for kind, chosen in prompts.items()}
        turns: Mapping[str, Sequence[Sequence[Message]]] = {}
        if name == REPETITION:
            turns = {kind: list(map(_turn, plain_texts[kind], found)) for kind, found in plain.items()}
        elif name == OPENING:
            openings = load_openings().texts
            asked = [[_user(text)] for text in openings]
            found = self.replies(f"Answering opening prompts ({self.label})", asked, top=top)
            turns = {kind: list(map(_turn, openings, found)) for kind in texts}

        def before(kind: str, i: int) -> Sequence[Message]:
            return turns[kind][i % len(turns[kind])] if turns else ()

        return {
            kind: self.replies(
                f"Answering {kind} prompts ({self.label}, {name})",
                [[*before(kind, i), _user(text)] for i, text in enumerate(chosen)],
                top=top,
            )
            for kind, chosen in texts.items()
        }

    def first_tokens(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """Return the likeliest first tokens of the reply to each text, with their probabilities."""
        found = self.replies(
            f"Asking for first tokens ({self.label})", [[_user(text)] for text in texts], top=TOP, limit=1
        )
        return [_probabilities(reply) for reply in found]

    def verdicts(self, texts: Mapping[str, Sequence[str]]) -> Verdicts | None:
        """Ask which requests are harmful, as `recognition` does, by the likeliest first tokens."""
        log_odds: dict[str, tuple[float, ...]] = {}
        said: list[float] = []
        for kind, chosen in texts.items():
            answers = []
            for question in QUESTIONS:
                asked = [[_user(question.replace("{request}", text))] for text in chosen]
                found = self.replies(f"Asking what is harmful ({self.label}, {kind})", asked, top=TOP, limit=1)
                odds = [_yes_and_no(_probabilities(reply)) for reply in found]
                said += [yes + no for yes, no, _least in odds]
                answers.append([math.log(max(yes, least)) - math.log(max(no, least)) for yes, no, least in odds])
            log_odds[kind] = tuple(one - other for one, other in zip(*answers, strict=True))
        return Verdicts(log_odds=log_odds, said=math.fsum(said) / len(said)) if said else None


def _turn(user: str, reply: ServedReply) -> tuple[Message, ...]:
    """Return a turn that is over: what was asked, and what the reply says without its thoughts."""
    return (_user(user), {"role": "assistant", "content": read_reply(reply.text).answer})


def _probabilities(reply: ServedReply) -> dict[str, float]:
    found: dict[str, float] = {}
    for token, log_p in reply.first or ():
        found[token] = found.get(token, 0.0) + math.exp(min(log_p, 0.0))
    return found


def _yes_and_no(probabilities: Mapping[str, float]) -> tuple[float, float, float]:
    """Return how likely yes and no are, and the most that what is not listed can be."""
    words = {"yes": 0.0, "no": 0.0}
    for token, p in probabilities.items():
        word = token.strip().lower()
        if word in words:
            words[word] += p
    return words["yes"], words["no"], max(min(probabilities.values(), default=1.0), _LEAST)


def least_divergence(base: Mapping[str, float], model: Mapping[str, float]) -> float:
    """Return the least that KL(base || model) can be, by what is known of both: the likeliest tokens.

    Tokens that both list stand alone, all else is one outcome; KL never grows when outcomes are put together.

    Args:
        base: token -> probability.
        model: the same of the model.
    """
    both = base.keys() & model.keys()
    terms = [base[token] * math.log(base[token] / model[token]) for token in both if base[token] > 0 < model[token]]
    rest, other = (1.0 - math.fsum(found[token] for token in both) for found in (base, model))
    if rest > _LEAST:
        terms.append(rest * math.log(rest / max(other, _LEAST)))
    return max(math.fsum(terms), 0.0)
