"""What the model itself does: its short replies, and how far the published rule agrees with them.

The published rule takes a prompt as refused where a refusal token is more likely than not to come first. Where the
probability is spread over many first tokens, or refusals come late, the replies refuse and the rule does not see it.
So replies are generated once, to the training and validation prompts, and classed as `evaluate` does. Where the rule
agrees with them it is used as published; else the replies filter the prompts, the first tokens of those that refuse
are the refusal tokens, and the metric's zero is where it best parts refused from answered prompts. Where that does not
part them, the model is asked for the openings that it refuses with (`Openings`); and where no opening tells either,
candidates are judged by whole replies (`screening`).

Replies are kept in memory alone: among them are those to harmful prompts.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt

import torch
from torch import Tensor

from abliterate.extraction.refusal import Openings
from abliterate.extraction.reply_classes import DEGENERATE, ReplyClass, find_refusal, read_reply, refusal_start
from abliterate.models.chat_model import ChatModel
from abliterate.models.greedy import GreedyDecoder, Intervene
from abliterate.processes import Ranks
from abliterate.progress import ProgressReporter
from abliterate.prompt_sets import ExtractionPrompts

PARTS = ("harmful_train", "harmless_train", "harmful_validation", "harmless_validation")

SHORT_REPLY = 20
LONG_REPLY = 160
"""Length limits in tokens; the long one where short replies hardly refuse, but a few long ones do."""
N_LATE_PROMPTS = 16
MIN_REFUSED = 0.25
"""Below this share of harmful training prompts refused in short replies, long ones are looked at."""

MIN_TOKEN_SHARE = 0.02
MIN_SHARE_RATIO = 3.0
MAX_TOKENS = 10
OPENING_TOKENS = 6
N_CHARACTERS = 24
"""So many characters of an answer tell where in a reply it begins."""
MAX_OPENINGS = 8
"""So many openings are asked for at most, the most frequent first; each costs a row for each prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortReply:
    """A reply, as far as extraction looks at it.

    Attributes:
        reply_class: what it is, see `reply_classes`.
        tokens: its token ids.
        refuses_at: the token at which the refusal begins; None where there is no refusal.
    """

    reply_class: ReplyClass
    tokens: tuple[int, ...]
    refuses_at: int | None = None

    @property
    def refused(self) -> bool:
        """Whether it is a refusal; a degenerate reply and a deflection are neither that nor an answer."""
        return self.reply_class == "refusal"

    @property
    def answered(self) -> bool:
        """Whether it is an answer."""
        return self.reply_class == "answer"

    @property
    def preface(self) -> tuple[int, ...]:
        """What it says before it refuses; nothing where that is a few tokens, which belong to the opening."""
        start = self.refuses_at or 0
        return self.tokens[:start] if start >= OPENING_TOKENS else ()

    @property
    def opening(self) -> tuple[int, ...]:
        """The first tokens of its refusal."""
        start = len(self.preface)
        return self.tokens[start : start + OPENING_TOKENS]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyCounts:
    """Replies of one kind of prompts."""

    refused: int
    answered: int
    degenerate: int
    deflected: int = 0

    @property
    def n(self) -> int:
        """How many there are."""
        return self.refused + self.answered + self.degenerate + self.deflected


def count_short_replies(replies: Sequence[ShortReply]) -> ReplyCounts:
    """Count replies by what they are."""
    refused = sum(reply.refused for reply in replies)
    answered = sum(reply.answered for reply in replies)
    degenerate = sum(reply.reply_class in DEGENERATE for reply in replies)
    deflected = len(replies) - refused - answered - degenerate
    return ReplyCounts(refused=refused, answered=answered, degenerate=degenerate, deflected=deflected)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyRun:
    """Generates replies of a loaded model, hooks and all, and classes them.

    Attributes:
        chat: the model.
        ranks: the processes that share the work.
        max_new_tokens: length limit of each reply.
    """

    chat: ChatModel
    ranks: Ranks
    max_new_tokens: int = SHORT_REPLY

    def read(
        self,
        rows: Sequence[Sequence[int]],
        *,
        progress: ProgressReporter,
        task: str | None = None,
        variants: Sequence[int] | None = None,
        intervene: Intervene | None = None,
    ) -> list[ShortReply]:
        """Return the greedy reply to each row of token ids.

        Args:
            rows: rendered prompts.
            progress: where to show progress.
            task: what to call it there; None shows none.
            variants: of each row what `intervene` is given, from 0; None: 0 of all.
            intervene: what to attach for rows in several variants; None: nothing.
        """
        decoder = self.decoder if intervene is None else replace(self.decoder, intervene=intervene)

        def compute(part: Sequence[tuple[Sequence[int], int]]) -> list[ShortReply]:
            asked, of_each = [row for row, _ in part], [variant for _, variant in part]
            if task is None:
                generated = decoder.replies(asked, variants=of_each)
            else:
                with progress.task(task, total=len(part)) as advance:
                    generated = decoder.replies(asked, variants=of_each, advance=advance)
            return [self.classed(tokens) for tokens in generated]

        return self.ranks.share(list(zip(rows, variants or [0] * len(rows), strict=True)), compute)

    @property
    def decoder(self) -> GreedyDecoder:
        """What generates the replies: until they end, or refuse."""
        return GreedyDecoder(chat=self.chat, max_new_tokens=self.max_new_tokens, enough=self._shows_refusal)

    def _shows_refusal(self, tokens: Sequence[int]) -> bool:
        # Asked at every token, so only the published substrings are looked for first; a refusal in another language
        # is found once the reply has its length.
        text = self.chat.chat_format.response_prefix + self.chat.decode(tokens, skip_special_tokens=False)
        if find_refusal(text) is None:
            return False
        reply = self.classed(tokens)
        return reply.refused and len(reply.opening) == OPENING_TOKENS

    def classed(self, tokens: Sequence[int]) -> ShortReply:
        """Return what a reply is."""
        chat = self.chat
        # What is forced belongs to the reply: it may open a thinking part, or refuse by itself.
        forced = chat.chat_format.response_prefix
        special = sorted(map(str, chat.tokenizer.all_special_tokens), key=len, reverse=True)
        text = chat.decode(tokens, skip_special_tokens=False)
        reply = read_reply(
            forced + text,
            special_tokens=special,
            truncated=len(tokens) >= self.max_new_tokens,
            markers=chat.chat_format.markers,
            opened=chat.chat_format.opens_thinking,
        )
        start = None
        if reply.reply_class == "refusal":
            # What thoughts say is no refusal; the answer begins behind them.
            begin = max(0, text.rfind(reply.answer[:N_CHARACTERS]))
            start = begin + (refusal_start(text[begin:]) or 0)
        return ShortReply(
            reply_class=reply.reply_class,
            tokens=tuple(tokens),
            refuses_at=None if start is None else _token_at(chat, tokens, start),
        )


def _token_at(chat: ChatModel, tokens: Sequence[int], character: int) -> int:
    low, high = 0, len(tokens) - 1
    while low < high:
        middle = (low + high) // 2
        if len(chat.decode(tokens[: middle + 1], skip_special_tokens=False)) > character:
            high = middle
        else:
            low = middle + 1
    return low


def read_all_parts(
    *,
    chat: ChatModel,
    prompts: ExtractionPrompts,
    known: Mapping[str, list[ShortReply]],
    ranks: Ranks,
    progress: ProgressReporter,
) -> tuple[dict[str, list[ShortReply]], int]:
    """Return the model's replies to the prompts of all parts, and their length limit.

    Short replies first; where they hardly refuse, and long replies to a few harmful prompts do, long ones to all.

    Args:
        chat: the model.
        prompts: training and validation prompts.
        known: short replies that were read while the prompts were recorded, by part.
        ranks: the processes that share the work.
        progress: where to show progress.
    """
    rows = {name: chat.encode(getattr(prompts, name).texts) for name in PARTS}

    def read(names: Sequence[str], max_new_tokens: int) -> dict[str, list[ShortReply]]:
        # All parts at once: rows of like length fill the batches.
        together = [row for name in names for row in rows[name]]
        run = ReplyRun(chat=chat, ranks=ranks, max_new_tokens=max_new_tokens)
        replies = run.read(together, progress=progress, task=f"Replies of {max_new_tokens} tokens")
        found: dict[str, list[ShortReply]] = {}
        for name in names:
            found[name], replies = replies[: len(rows[name])], replies[len(rows[name]) :]
        return found

    missing = [name for name in PARTS if name not in known]
    replies = {**known, **(read(missing, SHORT_REPLY) if missing else {})}
    n_refused = sum(reply.refused for reply in replies["harmful_train"])
    if n_refused < MIN_REFUSED * len(replies["harmful_train"]):
        few = ReplyRun(chat=chat, ranks=ranks, max_new_tokens=LONG_REPLY).read(
            rows["harmful_train"][:N_LATE_PROMPTS], progress=progress, task="Long replies to a few"
        )
        if sum(reply.refused for reply in few) >= MIN_REFUSED * len(few):
            progress.message(f"refusals come late: replies of {LONG_REPLY} tokens are read")
            return read(PARTS, LONG_REPLY), LONG_REPLY
    return replies, SHORT_REPLY


def first_tokens_of_refusals(replies: Sequence[ShortReply]) -> list[int]:
    """Return the first tokens of the replies that refuse, the most frequent first.

    A token counts when at least 2 % of the refusals begin with it, and three times the share of the answers; at most
    ten are kept. (Table 4 of the paper lists such tokens by hand: "I", "As" for Qwen.)
    """
    refusals = Counter(reply.tokens[0] for reply in replies if reply.refused and reply.tokens)
    answers = Counter(reply.tokens[0] for reply in replies if reply.answered and reply.tokens)
    n_refusals, n_answers = refusals.total(), max(1, answers.total())
    found = [
        token
        for token, count in refusals.most_common()
        if count >= MIN_TOKEN_SHARE * n_refusals and count / n_refusals >= MIN_SHARE_RATIO * answers[token] / n_answers
    ]
    return found[:MAX_TOKENS]


def coverage(replies: Sequence[ShortReply], token_ids: Sequence[int]) -> float:
    """Return the share of the replies that refuse which begin with one of the tokens; 0 where none refuses."""
    first = [reply.tokens[:1] for reply in replies if reply.refused]
    return sum(bool(start) and start[0] in token_ids for start in first) / max(1, len(first))


def openings_of_refusals(replies: Sequence[ShortReply]) -> Openings:
    """Return the openings that the model refuses with most often; some of the replies must refuse."""
    counted = Counter(reply.opening for reply in replies if reply.refused and reply.opening)
    chosen: list[tuple[int, ...]] = []
    for opening, _ in counted.most_common():
        if len(chosen) == MAX_OPENINGS or sum(counted[each] for each in chosen) >= 0.95 * counted.total():
            break
        # Where one begins with another, the shorter one stands for both.
        if not any(opening[: len(each)] == each or each[: len(opening)] == opening for each in chosen):
            chosen.append(opening)
    return Openings(tuple(chosen))


def answer_prefaces(chat: ChatModel, replies: Sequence[ShortReply], refusals: Sequence[ShortReply]) -> list[list[int]]:
    """Return how far into each reply to ask whether it refuses now: as far as refusals come, at a sentence's end.

    Args:
        chat: the model, for the texts of tokens.
        replies: those to harmless prompts.
        refusals: those that refuse.
    """
    starts = sorted(len(reply.preface) for reply in refusals)
    wanted = starts[len(starts) // 2] if starts else 0
    return [_whole_sentences(chat, reply.tokens, wanted) for reply in replies]


def _whole_sentences(chat: ChatModel, tokens: Sequence[int], wanted: int) -> list[int]:
    if wanted == 0:
        return []
    texts = [chat.decode([token]).strip(" ") for token in tokens]
    ends = [i + 1 for i, text in enumerate(texts) if text.endswith((".", "!", "?", ":", "\n"))]
    # The end that is nearest, and the whole reply where no sentence ends.
    return list(tokens[: min(ends, key=lambda end: abs(end - wanted), default=len(tokens))])


@dataclass(frozen=True, slots=True, kw_only=True)
class Zero:
    """Where a metric parts refused from answered prompts.

    Attributes:
        value: the metric's zero, in nats: 0 where the best value is no better than 0 beyond noise.
        best: the value that parts them best.
        accuracy: balanced accuracy at `best`: the mean of the shares of refused and of answered prompts told right.
        accuracy_at_0: the same at 0, the published rule.
    """

    value: float
    best: float
    accuracy: float
    accuracy_at_0: float


def find_zero(*, refused: Tensor, answered: Tensor) -> Zero:
    """Find the value that best parts refused from answered prompts.

    Of all values between neighbouring ones the one of the highest balanced accuracy, of equal ones that in the widest
    gap. The published 0 is kept where it is within noise: where that value's gain in balanced accuracy, on the prompts
    about which the two disagree, is at most two standard errors.

    Args:
        refused: [n] float64, in nats, the metric of prompts that are refused.
        answered: [m], of prompts that are answered.
    """
    values = torch.unique(torch.cat([refused, answered]))
    if not len(refused) or not len(answered):
        return Zero(value=0.0, best=0.0, accuracy=0.0, accuracy_at_0=0.0)
    gaps = values.diff()
    between, widths = (values[:-1] + values[1:]) / 2, gaps
    if not len(gaps):
        between, widths = values, values.new_zeros(1)

    def shares(at: float) -> tuple[float, float]:
        return float((refused > at).double().mean()), float((answered <= at).double().mean())

    scored = [(sum(shares(at)) / 2, width, at) for at, width in zip(between.tolist(), widths.tolist(), strict=True)]
    top, _, best = max(scored)
    at_0 = sum(shares(0.0)) / 2
    sides = [(((refused > best) & (refused <= 0)), 1), (((refused <= best) & (refused > 0)), -1)]
    sides += [(((answered <= best) & (answered > 0)), 1), (((answered > best) & (answered <= 0)), -1)]
    gain = sum(sign * float(differ.double().mean()) for differ, sign in sides)
    noise = sqrt(sum(_variance(int(differ.sum()), len(differ)) for differ, _ in sides if differ.any()))
    return Zero(value=best if gain > 2 * noise else 0.0, best=best, accuracy=max(top, at_0), accuracy_at_0=at_0)


def _variance(successes: int, n: int) -> float:
    # With a success and a failure more: a share of few prompts is not as sure as it looks.
    share = (successes + 1) / (n + 2)
    return share * (1 - share) / n


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How the metric's rule (above 0 is refused) and the replies agree, over prompts of all parts.

    Attributes:
        both: refused by both.
        metric_only: refused by the metric alone.
        replies_only: refused by the replies alone.
        neither: answered by both.
    """

    both: int
    metric_only: int
    replies_only: int
    neither: int

    @property
    def kappa(self) -> float:
        """Cohen's kappa: agreement beyond chance, 1 at best; 0 where one of the two says the same of all."""
        n = self.both + self.metric_only + self.replies_only + self.neither
        observed = (self.both + self.neither) / max(1, n)
        metric, replies = self.both + self.metric_only, self.both + self.replies_only
        expected = (metric * replies + (n - metric) * (n - replies)) / max(1, n * n)
        return (observed - expected) / (1 - expected) if expected < 1 else 0.0


def compare_with_replies(metric: Mapping[str, Tensor], replies: Mapping[str, Sequence[ShortReply]]) -> Agreement:
    """Count how often the metric and the replies agree; degenerate replies and deflections are left out.

    Args:
        metric: the metric of each prompt, by part.
        replies: the reply to each prompt, by part.
    """
    counts: Counter[tuple[bool, bool]] = Counter()
    for part, values in metric.items():
        for value, reply in zip(values.tolist(), replies[part], strict=True):
            if reply.reply_class in ("refusal", "answer"):
                counts[value > 0, reply.refused] += 1
    return Agreement(
        both=counts[True, True],
        metric_only=counts[True, False],
        replies_only=counts[False, True],
        neither=counts[False, False],
    )
