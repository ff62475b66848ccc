"""Reports with numbers made up for layout, and a parser that sees pages as a browser would."""

import random
from html.parser import HTMLParser

from abliterate.capability import CapabilityReport, TaskScore
from abliterate.distribution_shift import CrossEntropy, Divergence
from abliterate.evaluation_report import KINDS, EvaluationReport, count_by_category, count_replies, refusal_change
from abliterate.proportions import Agreement
from abliterate.reply_classes import read_reply
from abliterate.score_report import ScoreTable
from abliterate.selection import CandidateScore, Thresholds
from abliterate.verdicts import JudgedRate, JudgeReport

CATEGORIES = ("fraud", "hacking", "weapons", "identity_forgery")
VOID = {"meta", "br", "rect", "circle", "line", "path", "i"}


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
        return [read_reply(text) for text in rng.choices(texts, weights=weights, k=144)]

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
        text_cross_entropy={"bundled": CrossEntropy(base=3.1, model=3.15, relative_change=0.016, n_tokens=4000)},
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
