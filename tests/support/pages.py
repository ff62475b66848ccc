"""Reports with numbers made up for layout, and a parser that sees pages as a browser would."""

import random
from dataclasses import replace
from html.parser import HTMLParser

from abliterate.evaluation.audit_report import (
    AuditedIntervention,
    AuditOptions,
    AuditReport,
    Method,
    decide,
    is_bearable,
)
from abliterate.evaluation.candidate_ranking import CandidateSummary, ScreenedCandidate, Stability
from abliterate.evaluation.capability import CapabilityReport, TaskScore
from abliterate.evaluation.drift import CrossEntropy, Divergence, Findings, measure
from abliterate.evaluation.judges import JudgedRate, JudgeReport
from abliterate.evaluation.report import KINDS, EvaluationReport, count_by_category, count_replies, refusal_change
from abliterate.evaluation.statistics import Agreement
from abliterate.extraction.options import Thresholds
from abliterate.extraction.reply_classes import read_reply
from abliterate.extraction.score_report import ScoreTable
from abliterate.extraction.selection import CandidateScore
from abliterate.interventions.trace_report import (
    HeadAttention,
    LayerProfile,
    SetContributions,
    SuffixInfo,
    TokenTrace,
    TopHead,
    TracedSet,
    TraceReport,
)

CATEGORIES = ("fraud", "hacking", "weapons", "identity_forgery")
VOID = {"meta", "br", "rect", "circle", "line", "path", "polygon", "i"}


class Page(HTMLParser):
    """All tags with their attributes, the text under each heading, and whether every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.balanced = True
        self.feed(text)
        self.balanced = self.balanced and not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.balanced = self.balanced and bool(self.open) and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)

    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def evaluation_report(*, with_base: bool = True, model: str = "out/edited") -> EvaluationReport:
    rng = random.Random(1)
    texts = ["I cannot help with that.", "Here is how it is done.", "", "the " * 40]

    def replies(weights):
        chosen = [read_reply(text) for text in rng.choices(texts, weights=weights, k=144)]
        return [replace(reply, within={8: False, 32: reply.refused, 256: reply.refused}) for reply in chosen]

    base = {"harmful": replies((96, 4, 0, 0)), "harmless": replies((1, 99, 0, 0)), "borderline": replies((9, 90, 0, 1))}
    edited = {
        "harmful": replies((3, 90, 1, 6)),
        "harmless": replies((0, 98, 0, 2)),
        "borderline": replies((1, 97, 1, 1)),
    }
    categories = tuple(CATEGORIES[i % 4] for i in range(144))
    by_category = {
        kind: count_by_category(categories, edited[kind], base[kind] if with_base else None) for kind in KINDS
    }
    divergence = Divergence(first_token=0.0312, continuation=0.0421, n_tokens=4000, per_prompt=32)
    own = CrossEntropy(base=0.512, model=0.533, relative_change=0.041, n_tokens=9000)
    texts = {"bundled": CrossEntropy(base=3.1, model=3.15, relative_change=0.016, n_tokens=4000)}
    findings = Findings(
        divergence=divergence if with_base else None,
        own_answers=own if with_base else None,
        texts=texts,
        replies=edited,
        base_replies=base if with_base else None,
    )
    judged = JudgedRate(n=144, declined=20, undecided=10, rate=20 / 144, low=0.09, high=0.2)
    return EvaluationReport(
        model=model,
        base="org/base" if with_base else None,
        intervention="none",
        max_new_tokens=256,
        scorer="12 refusal substrings",
        rates={kind: count_replies(edited[kind]) for kind in KINDS},
        base_rates={kind: count_replies(base[kind]) for kind in KINDS} if with_base else None,
        changes={kind: refusal_change(base[kind], edited[kind]) for kind in KINDS} if with_base else {},
        categories=by_category,
        kl_harmless=0.0312 if with_base else None,
        divergence=divergence if with_base else None,
        cross_entropy=own if with_base else None,
        text_cross_entropy=texts,
        measurements=measure(findings),
        judges=(
            JudgeReport(
                judge="org/guard",
                style="guard",
                question="the judge says safe",
                rates=dict.fromkeys(KINDS, judged),
                base_rates=dict.fromkeys(KINDS, judged) if with_base else None,
                changes={},
                agreement={kind: Agreement(n=260, agreed=240, kappa=0.71) for kind in (*KINDS, "all")},
            ),
        ),
        capability=CapabilityReport(
            scores=(
                TaskScore(
                    task="arc_easy", metric="acc", n=500, model=0.61, base=0.62, difference=-0.01, low=-0.03, high=0.01,
                    p_value=0.43,
                ),
            ),
            limit=500,
            harness="lm-eval 0.4.13",
        ),
        excluded=dict.fromkeys(KINDS, 0),
        prompt_sets={kind: {"name": f"bundled:{kind}/test", "n": 144, "sha256": "c" * 64} for kind in KINDS},
        versions={"abliterate": "0.1.0"},
    )  # fmt: skip


def score_table(*, passing: bool = True) -> ScoreTable:
    rng = random.Random(2)
    scores = [
        CandidateScore(
            position=position,
            layer=layer,
            bypass=None if layer > 24 else -abs(layer - 18) / 4 + rng.random() + position,
            induce=None if layer > 24 else 4 - abs(layer - 16) / 2 + rng.random(),
            kl=None if layer > 24 or layer % 7 == 3 else 0.02 + (layer / 12) ** 4 / 20,
        )
        for position in (-4, -3, -2, -1)
        for layer in range(30)
    ]
    selected = next(score for score in scores if (score.position, score.layer) == (-1, 14))
    return ScoreTable(
        scores=scores,
        selected=selected if passing else None,
        thresholds=Thresholds(),
        n_layers=30,
        baseline_harmful=5.2,
        baseline_harmless=-7.9,
        tokens=("<|im_end|>", "\n", "<|im_start|>", "assistant"),
        title="build/demo/model",
    )


def audit_report(*, refuses: bool = True) -> AuditReport:
    texts = ["I cannot help with that.", "Here is how it is done.", "", "the " * 40]
    options = AuditOptions()

    def replies(*counts):
        return [read_reply(text) for text, count in zip(texts, counts, strict=True) for _ in range(count)]

    base = replies(*((95, 4, 0, 1) if refuses else (10, 88, 1, 1)))
    unchanged = count_replies(base)

    def intervention(
        method: Method, rank: int, key: tuple[int, int] | None, counts: tuple[int, ...], rise: float
    ) -> AuditedIntervention:
        found = replies(*counts)
        rate = count_replies(found)
        coherence = 1 - rate.degenerate / rate.n
        bearable = is_bearable(coherence=coherence, cross_entropy_rise=rise, thresholds=options.thresholds)
        remaining = rate.refused / (rate.n - rate.degenerate) / unchanged.rate
        return AuditedIntervention(
            method=method,
            rank=rank,
            position=None if key is None else key[0],
            layer=None if key is None else key[1],
            harmful=rate,
            change=refusal_change(base, found),
            remaining=remaining,
            coherence=coherence,
            divergence=Divergence(first_token=0.123, continuation=0.2, n_tokens=900, per_prompt=32),
            cross_entropy=CrossEntropy(base=0.5, model=0.5 + rise, relative_change=rise / 0.5, n_tokens=900),
            cross_entropy_rise=rise,
            bearable=bearable,
            defeats=bearable and remaining <= options.thresholds.max_remaining,
        )

    interventions = (
        (
            intervention("single", 1, (-1, 16), (31, 67, 1, 1), 0.071),
            intervention("rank", 2, None, (4, 90, 3, 3), 0.212),
            intervention("addition", 1, (-1, 16), (1, 30, 29, 40), 0.913),
        )
        if refuses
        else ()
    )
    screened = ScreenedCandidate(
        position=-1, layer=16, bypass=-2.5, induce=7.1, kl=0.06, separation=3.21, answered=12, n_prompts=16
    )
    verdict, reason = decide(unchanged, interventions, options.thresholds)
    return AuditReport(
        model="org/model",
        revision="d" * 40,
        dtype="bfloat16",
        verdict=verdict,
        reason=reason,
        harmful=unchanged,
        harmless=count_replies(replies(2, 98, 0, 0)),
        induced=count_replies(replies(88, 12, 0, 0)) if refuses else None,
        lowest_refusal=0.0426 if refuses else 0.102,
        interventions=interventions,
        candidates=CandidateSummary(
            n_candidates=115,
            n_passing=7,
            share_passing=7 / 115,
            refusal_tokens=("I",),
            filtered=True,
            screened=(screened,),
        )
        if refuses
        else None,
        stability=Stability(n_resamples=200, mean_cosine=0.987, low_cosine=0.971) if refuses else None,
        options=options,
        prompt_sets={kind: {"name": f"bundled:{kind}/test", "n": 100, "sha256": "c" * 64} for kind in KINDS[:2]},
        versions={"abliterate": "0.1.0"},
    )


def trace_report(*, model: str = "org/model", with_heads: bool = True) -> TraceReport:
    """A trace of three layers of two heads on two sets."""

    def traced(name: str, sign: float) -> TracedSet:
        profile = LayerProfile(mean=(0.0, sign * 0.2, sign * 0.5, sign * 0.4), sd=(0.01, 0.05, 0.1, 0.1))
        heads = ((0.1 * sign, -0.2), (0.4 * sign, 0.0), (0.0, 0.1))
        contributions = SetContributions(
            component=profile,
            embedding=0.1,
            heads=heads,
            biases=(0.0, 0.0, 0.0),
            mlps=(0.1, 0.2, 0.1),
            largest_gap=1e-6,
        )
        attention = HeadAttention(layer=1, head=0, template=0.1, instruction=0.2, suffix=0.0, post_instruction=0.7)
        return TracedSet(
            name=name,
            suffix="none",
            n_prompts=8,
            cosines={"last": profile},
            contributions=contributions if with_heads else None,
            attention=(attention,) if with_heads else None,
        )

    return TraceReport(
        model=model,
        direction_sha256="00" * 32,
        layer=2,
        n_layers=3,
        n_heads=2,
        post_instruction_tokens=("<end>", model),
        suffix=SuffixInfo(text=model, n_tokens=3),
        sets=(traced("harmful", 1.0), traced("harmless", -1.0)),
        top_heads=(TopHead(layer=1, head=0, contribution=0.4), TopHead(layer=0, head=0, contribution=0.1)),
        heads_unavailable=None if with_heads else "no table of its heads",
        attention_unavailable=None,
        prompt=TokenTrace(layer=2, tokens=("How", model), components=(0.5, -0.5), cosines=((0.0,) * 4,) * 2),
    )
