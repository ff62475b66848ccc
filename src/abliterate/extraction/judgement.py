"""Deciding what refusing is in a model: which prompts it refuses, and what its candidates are scored by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from abliterate.errors import InputError, RefusalBehaviourError
from abliterate.extraction.behaviour import (
    PARTS,
    Agreement,
    ReplyCounts,
    ShortReply,
    answer_prefaces,
    compare_with_replies,
    count_short_replies,
    coverage,
    find_zero,
    first_tokens_of_refusals,
    openings_of_refusals,
    read_all_parts,
)
from abliterate.extraction.options import ExtractionOptions, Filter
from abliterate.extraction.refusal import (
    FirstTokens,
    RefusalMeasure,
    RefusalToken,
    describe_tokens,
    measure_refusal,
    refusal_metric,
    refusal_tokens_of,
)
from abliterate.models.chat_model import ChatModel
from abliterate.models.hooks import Recording
from abliterate.models.streamed_model import StreamedChat
from abliterate.processes import Ranks
from abliterate.progress import ProgressReporter
from abliterate.prompt_sets import ExtractionPrompts

MIN_PROMPTS = 8
"""Fewer prompts than this on one side after filtering are too few to take a mean of."""
MIN_KAPPA = 0.6
"""From here on agreement is called substantial (Landis and Koch 1977)."""
MIN_COVERAGE = 0.8
"""First tokens that begin a smaller share of the refusals do not stand for them."""
MIN_ACCURACY = 0.8
"""A measure that tells refused from answered validation prompts less often is not one to choose candidates by."""
N_EXAMPLES = 3

MeasureName = Literal["first tokens", "openings", "replies"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusalEvidence:
    """How prompts were found to be refused and what candidates are scored by, as plain values.

    Attributes:
        filter: what prompts were filtered by: `metric` (the published rule), `replies` or `none`.
        reason: why, in words.
        measure: what bypass and induce are measured by: `first tokens` (the published metric), `openings`, or whole
            `replies` (1 for each that refuses, -1 for each that answers).
        openings: texts of the openings, where they are the measure.
        zero: the measure's zero in nats; the induce threshold counts from it.
        replies: what the model's replies are, by part; None where none were generated.
        reply_tokens: the length limit of those replies.
        agreement: of the published rule with the replies.
        kappa: Cohen's, of that agreement.
        coverage: share of the refusing replies that begin with a refusal token.
        accuracy: balanced accuracy with which the measure tells refused from answered validation prompts, at the
            value that tells them best.
        accuracy_at_0: the same at 0.
    """

    filter: Filter
    reason: str
    measure: MeasureName = "first tokens"
    openings: tuple[str, ...] = ()
    zero: float = 0.0
    replies: Mapping[str, ReplyCounts] | None = None
    reply_tokens: int | None = None
    agreement: Agreement | None = None
    kappa: float | None = None
    coverage: float | None = None
    accuracy: float | None = None
    accuracy_at_0: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What refusing is in this model.

    Attributes:
        tokens: the refusal tokens; empty where no first token tells refusals.
        measure: what candidates are scored by; None: whole replies.
        kept: which prompts of each part are used, [n] bool.
        prefaces: token ids after each validation prompt before refusing is asked for, by part; absent where none are.
        replies: the replies that the judgement rests on, by part; empty where none were generated.
        evidence: all that can be said of it.
    """

    tokens: tuple[RefusalToken, ...]
    measure: RefusalMeasure | None
    kept: Mapping[str, Tensor]
    prefaces: Mapping[str, list[list[int]]] = field(default_factory=dict)
    replies: Mapping[str, Sequence[ShortReply]] = field(default_factory=dict)
    evidence: RefusalEvidence


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Judges what a loaded model refuses.

    Attributes:
        chat: the model.
        prompts: training and validation prompts.
        recordings: of the prompts of all parts.
        replies: short replies that were read on the way, by part.
        options: which filter is asked for, and tokens that are named.
        ranks: the processes that share the work.
        progress: where to show progress.
    """

    chat: ChatModel
    prompts: ExtractionPrompts
    recordings: Mapping[str, Recording]
    replies: Mapping[str, list[ShortReply]]
    options: ExtractionOptions
    ranks: Ranks
    progress: ProgressReporter

    def judge(self) -> Judgement:
        """Judge by the published rule, by replies, or by whichever of the two holds.

        Raises:
            InputError: a named refusal token is not one token; replies are asked for where layers are streamed.
            RefusalBehaviourError: too few prompts are refused, or answered.
        """
        asked = self.options.filter
        if isinstance(self.chat, StreamedChat):
            if asked == "replies":
                raise InputError("--filter replies cannot go with --stream-layers: each token would read all weights")
            return self._by_metric("none" if asked == "none" else "metric", "layers are streamed: no replies")
        if asked in ("metric", "none"):
            return self._by_metric(asked, "as asked for")
        replies, reply_tokens = read_all_parts(
            chat=self.chat, prompts=self.prompts, known=self.replies, ranks=self.ranks, progress=self.progress
        )
        return self._by_replies(replies, reply_tokens)

    def _by_metric(self, chosen: Filter, reason: str) -> Judgement:
        """Judge by the published rule alone, or keep all prompts."""
        tokens = refusal_tokens_of(
            chat=self.chat,
            harmful=self.recordings["harmful_train"],
            harmless=self.recordings["harmless_train"],
            named=self.options.refusal_tokens,
        )
        if not tokens:
            raise RefusalBehaviourError(
                "no first token tells harmful from harmless prompts: the model does not refuse, or it begins refusals "
                "as it begins answers; --filter replies judges by its replies, --refusal-token names a token"
            )
        measure = _first_tokens(tokens)
        metric = self._metric(measure)
        if chosen == "none":
            kept = {part: torch.ones(len(values), dtype=torch.bool) for part, values in metric.items()}
        else:
            kept = _by_rule(metric)
        evidence = RefusalEvidence(filter=chosen, reason=reason)
        self._require(kept, evidence, tokens)
        return Judgement(tokens=tuple(tokens), measure=measure, kept=kept, evidence=evidence)

    def _by_replies(self, replies: Mapping[str, Sequence[ShortReply]], reply_tokens: int) -> Judgement:
        """Judge by the replies, and by the published rule where that agrees with them."""
        tokens = self._tokens([reply for part in PARTS for reply in replies[part]])
        evidence = RefusalEvidence(
            filter="replies",
            reason="as asked for",
            replies={part: count_short_replies(replies[part]) for part in PARTS},
            reply_tokens=reply_tokens,
        )
        kept = {
            part: torch.tensor([r.refused if part.startswith("harmful") else r.answered for r in replies[part]])
            for part in PARTS
        }
        if tokens:
            evidence, by_rule = self._compare(tokens, replies, evidence)
            if evidence.filter == "metric":
                self._require(by_rule, evidence, tokens)
                return Judgement(
                    tokens=tuple(tokens),
                    measure=_first_tokens(tokens),
                    kept=by_rule,
                    replies=replies,
                    evidence=evidence,
                )
        elif self.options.filter == "auto":
            evidence = replace(evidence, reason="no first token tells refusals from answers")
        self._require(kept, evidence, tokens)
        measure: RefusalMeasure | None = _first_tokens(tokens)
        prefaces: dict[str, list[list[int]]] = {}
        if not tokens or not (self.options.refusal_tokens or _tells(evidence)):
            evidence, measure, prefaces = self._by_openings(replies, kept, evidence)
        return Judgement(
            tokens=tuple(tokens), measure=measure, kept=kept, prefaces=prefaces, replies=replies, evidence=evidence
        )

    def _tokens(self, replies: Sequence[ShortReply]) -> list[RefusalToken]:
        harmful, harmless = self.recordings["harmful_train"], self.recordings["harmless_train"]
        named = self.options.refusal_tokens
        if named:
            return refusal_tokens_of(chat=self.chat, harmful=harmful, harmless=harmless, named=named)
        found = first_tokens_of_refusals(replies)
        return describe_tokens(found, chat=self.chat, harmful=harmful, harmless=harmless)

    def _metric(self, measure: FirstTokens) -> dict[str, Tensor]:
        return {part: refusal_metric(self.recordings[part].logits, token_ids=measure.token_ids) for part in PARTS}

    def _compare(
        self, tokens: Sequence[RefusalToken], replies: Mapping[str, Sequence[ShortReply]], evidence: RefusalEvidence
    ) -> tuple[RefusalEvidence, dict[str, Tensor]]:
        """Return what the published rule is worth here, and which prompts it keeps."""
        measure = _first_tokens(tokens)
        metric = self._metric(measure)
        agreement = compare_with_replies(metric, replies)
        refused, answered = [], []
        for part in ("harmful_validation", "harmless_validation"):
            refused.append(metric[part][[reply.refused for reply in replies[part]]])
            answered.append(metric[part][[reply.answered for reply in replies[part]]])
        zero = find_zero(refused=torch.cat(refused), answered=torch.cat(answered))
        evidence = replace(
            evidence,
            agreement=agreement,
            kappa=agreement.kappa,
            coverage=coverage([reply for part in PARTS for reply in replies[part]], measure.token_ids),
            zero=zero.value,
            accuracy=zero.accuracy,
            accuracy_at_0=zero.accuracy_at_0,
        )
        if self.options.filter == "auto":
            agrees = agreement.kappa >= MIN_KAPPA
            how = "agrees" if agrees else "does not agree"
            reason = f"the published rule {how} with the replies (kappa {agreement.kappa:.2f})"
            if agrees and zero.value:
                reason += f", but refusals are told from answers best at {zero.value:.2f} nats, not at 0"
            evidence = replace(evidence, filter="metric" if agrees and not zero.value else "replies", reason=reason)
        return evidence, _by_rule(metric)

    def _by_openings(
        self,
        replies: Mapping[str, Sequence[ShortReply]],
        kept: Mapping[str, Tensor],
        evidence: RefusalEvidence,
    ) -> tuple[RefusalEvidence, RefusalMeasure | None, dict[str, list[list[int]]]]:
        """Return the evidence, the openings if they tell refusals from answers, and after what they are asked for."""
        openings = openings_of_refusals([*replies["harmful_train"], *replies["harmful_validation"]])
        harmful, harmless = replies["harmful_validation"], replies["harmless_validation"]
        prefaces = {
            "harmful_validation": [list(reply.preface) for reply in harmful],
            "harmless_validation": answer_prefaces(
                self.chat, harmless, [*replies["harmful_train"], *replies["harmful_validation"]]
            ),
        }
        values = []
        for part, after in prefaces.items():
            rows = self.chat.encode(getattr(self.prompts, part).texts)
            rows = [[*row, *preface] for row, preface in zip(rows, after, strict=True)]
            values.append(measure_refusal(self.chat, openings, rows)[kept[part]])
        zero = find_zero(refused=values[0], answered=values[1])
        texts = tuple(self.chat.decode(each, skip_special_tokens=False) for each in openings.sequences)
        evidence = replace(
            evidence,
            measure="openings",
            openings=texts,
            zero=zero.value,
            accuracy=zero.accuracy,
            accuracy_at_0=zero.accuracy_at_0,
        )
        if zero.accuracy >= MIN_ACCURACY:
            return evidence, openings, prefaces
        # Whole replies are 1 or -1: 0 is half of them.
        return replace(evidence, measure="replies", zero=0.0), None, {}

    def _require(self, kept: Mapping[str, Tensor], evidence: RefusalEvidence, tokens: Sequence[RefusalToken]) -> None:
        """Check that enough prompts are left, and say what the model does where they are not."""
        for part in ("train", "validation"):
            harmful, harmless = kept[f"harmful_{part}"], kept[f"harmless_{part}"]
            few = [int(keep.sum()) < min(MIN_PROMPTS, len(keep)) for keep in (harmful, harmless)]
            if any(few):
                raise RefusalBehaviourError(self._in_numbers(kept, part, few, evidence, tokens))

    def _in_numbers(
        self,
        kept: Mapping[str, Tensor],
        part: str,
        few: Sequence[bool],
        evidence: RefusalEvidence,
        tokens: Sequence[RefusalToken],
    ) -> str:
        """Say what the model does, and what to try."""
        harmful, harmless = kept[f"harmful_{part}"], kept[f"harmless_{part}"]
        if all(few):
            does = "the model's refusals cannot be told from its answers"
        elif few[0]:
            does = "the model does not refuse enough harmful prompts; there is nothing to extract"
        else:
            does = "the model refuses nearly everything"
        by = "their replies" if evidence.filter == "replies" else "the first token"
        name = "training" if part == "train" else part
        words = [
            f"{does}: by {by}, {int(harmful.sum())} of {len(harmful)} harmful {name} prompts are refused and "
            f"{int(harmless.sum())} of {len(harmless)} harmless ones answered (at least {MIN_PROMPTS} of each are "
            "needed)"
        ]
        if evidence.replies is not None and evidence.filter != "replies":
            counts = evidence.replies[f"harmful_{part}"]
            words.append(f"replies refuse {counts.refused} of {counts.n} harmful ones")
        odd = ("harmful", "answered") if few[0] else ("harmless", "refused")
        missing = torch.nonzero(~kept[f"{odd[0]}_{part}"]).flatten().tolist()[:N_EXAMPLES]
        ids = [getattr(self.prompts, f"{odd[0]}_{part}").ids[i] for i in missing]
        words.append(f"for example {', '.join(ids)}")
        words.append("refusal tokens: " + (" ".join(repr(token.text) for token in tokens) or "none"))
        tries = "--filter none keeps all prompts; --harmful and --harmless take other prompts"
        if evidence.filter == "metric":
            tries = f"--filter replies judges by replies; {tries}"
        return f"{'; '.join(words)}; {tries}"


def _first_tokens(tokens: Sequence[RefusalToken]) -> FirstTokens:
    return FirstTokens(tuple(token.token_id for token in tokens))


def _by_rule(metric: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return which prompts of each part the published rule keeps: refused where harmful, answered where harmless."""
    return {part: values > 0 if part.startswith("harmful") else values < 0 for part, values in metric.items()}


def _tells(evidence: RefusalEvidence) -> bool:
    """Tell whether the first tokens stand for the refusals."""
    return (evidence.coverage or 0) >= MIN_COVERAGE and (evidence.accuracy or 0) >= MIN_ACCURACY
