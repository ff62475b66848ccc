"""What judges say of replies: rates with intervals, paired change, and agreement with the refusal substrings.

Degenerate replies are not shown to a judge: it would call gibberish safe (see arXiv 2505.19056).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from abliterate.judges import Judge, Style, Verdict
from abliterate.progress import SILENT, ProgressReporter
from abliterate.proportions import Agreement, PairedChange, cohens_kappa, paired_change, wilson_interval
from abliterate.reply_classes import DEGENERATE, Reply


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedRate:
    """How many replies a judge found declined; n counts all replies, those not shown or not decided too."""

    n: int
    declined: int
    undecided: int
    rate: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeReport:
    """What one judge says of all replies.

    Attributes:
        judge: directory or Hub id.
        style: how it was asked.
        question: what it means that a reply was declined, in words.
        rates: kind of prompts -> the model's rate.
        base_rates: the same of the base, or None.
        changes: kind -> paired change, exact McNemar.
        agreement: kind, and `all` -> agreement with the substrings over the replies both decided, base and model.
    """

    judge: str
    style: Style
    question: str
    rates: dict[str, JudgedRate]
    base_rates: dict[str, JudgedRate] | None
    changes: dict[str, PairedChange]
    agreement: dict[str, Agreement]


def judge_replies(
    judge: Judge,
    *,
    name: str,
    prompts: Mapping[str, Sequence[str]],
    replies: Mapping[str, Sequence[Reply]],
    base_replies: Mapping[str, Sequence[Reply]] | None,
    progress: ProgressReporter = SILENT,
) -> JudgeReport:
    """Let a judge decide about the replies of a model, and of its base where there is one.

    Args:
        judge: the judge.
        name: what to call it.
        prompts: kind -> prompts.
        replies: kind -> the model's replies, in the prompts' order.
        base_replies: the same of the base, or None.
        progress: where to show progress.
    """
    verdicts, base_verdicts = {}, {}
    for kind, texts in prompts.items():
        verdicts[kind] = _decide(judge, texts, replies[kind], f"Judging {kind} replies (model)", progress)
        if base_replies is not None:
            base = base_replies[kind]
            base_verdicts[kind] = _decide(judge, texts, base, f"Judging {kind} replies (base)", progress)
    rated = {
        kind: _both_decided(replies[kind], verdicts[kind])
        + (_both_decided(base_replies[kind], base_verdicts[kind]) if base_replies is not None else [])
        for kind in prompts
    }
    rated["all"] = [pair for pairs in rated.values() for pair in pairs]
    return JudgeReport(
        judge=name,
        style=judge.style,
        question=judge.question,
        rates={kind: _rate(found) for kind, found in verdicts.items()},
        base_rates={kind: _rate(found) for kind, found in base_verdicts.items()} if base_verdicts else None,
        changes={
            kind: paired_change([v is True for v in found], [v is True for v in verdicts[kind]])
            for kind, found in base_verdicts.items()
        },
        agreement={kind: cohens_kappa([a for a, _ in pairs], [b for _, b in pairs]) for kind, pairs in rated.items()},
    )


def _decide(
    judge: Judge, prompts: Sequence[str], replies: Sequence[Reply], task: str, progress: ProgressReporter
) -> list[Verdict]:
    shown = [i for i, reply in enumerate(replies) if reply.reply_class not in DEGENERATE]
    verdicts: list[Verdict] = [None] * len(replies)
    with progress.task(task, total=len(shown)) as advance:
        decided = judge.decide([(prompts[i], replies[i].answer) for i in shown], advance=advance) if shown else []
    for i, verdict in zip(shown, decided, strict=True):
        verdicts[i] = verdict
    return verdicts


def _both_decided(replies: Sequence[Reply], verdicts: Sequence[Verdict]) -> list[tuple[bool, bool]]:
    return [(reply.refused, verdict) for reply, verdict in zip(replies, verdicts, strict=True) if verdict is not None]


def _rate(verdicts: Sequence[Verdict]) -> JudgedRate:
    declined, n = sum(verdict is True for verdict in verdicts), len(verdicts)
    low, high = wilson_interval(declined, n)
    undecided = sum(verdict is None for verdict in verdicts)
    return JudgedRate(n=n, declined=declined, undecided=undecided, rate=declined / n if n else 0.0, low=low, high=high)
