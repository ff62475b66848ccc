"""What the page of a refinement shows: the strengths, the frontier, and the direction beside it."""

from dataclasses import replace
from pathlib import Path

from abliterate.interventions.refinement_report import FrontierPoint, RefinementReport
from abliterate.pages.refinement_page import write_refinement_page

PLAIN = FrontierPoint(
    pressure=None,
    attn=(1.0, 1.0),
    mlp=(1.0, 1.0),
    unanswered=0,
    n_to_answer=30,
    metric=-3.7,
    kl_first=0.26,
    kl=0.18,
    cross_entropy=0.9,
    base_cross_entropy=0.7,
    n_to_stay=31,
)


def refinement_report() -> RefinementReport:
    points = [replace(PLAIN, pressure=p, kl=0.05 * p, unanswered=n) for p, n in ((1.0, 0), (0.3, 1), (0.1, 4))]
    return RefinementReport(
        model="<model>",
        direction_sha256="abc123",
        goal="remove",
        position=-1,
        refusal_tokens=("I", "<s>"),
        chosen=points[1],
        frontier=tuple(points),
        plain=PLAIN,
        counts={"harmful_train": (60, 64)},
        arguments=[],
        versions={"torch": "2.13.0"},
    )


def test_the_chosen_point_stands_beside_the_direction(tmp_path: Path) -> None:
    path = write_refinement_page(refinement_report(), tmp_path / "page", command="abliterate refine M")
    text = path.read_text(encoding="utf-8")
    for words in (
        "A gentler edit of &lt;model&gt;",
        "1 of 30 harmful validation prompts",
        "0.015 nats a token",
        "leaves 0 at 0.180",
        "pressure 0.3, chosen",
        "pressure 0.1",
        "+28.6%",
        "harmful train prompts used",
        "60 of 64",
        "abliterate refine M",
    ):
        assert words in text, words
    assert "<s>" not in text
    assert text.count("<svg") >= 3


def test_a_repair_says_what_stays_refused(tmp_path: Path) -> None:
    plain = replace(PLAIN, refused=29, n_to_refuse=32)
    chosen = replace(plain, pressure=0.1, unanswered=2, refused=31)
    report = RefinementReport(
        model="m",
        direction_sha256="abc123",
        goal="repair",
        position=-1,
        refusal_tokens=("I",),
        chosen=chosen,
        frontier=(chosen,),
        plain=plain,
        counts={},
        arguments=(),
        versions={},
    )
    text = write_refinement_page(report, tmp_path, command="x").read_text(encoding="utf-8")
    for words in ("2 of 30 borderline validation prompts", "31 of 32 are still refused", "29 of 32", "harmful refused"):
        assert words in text, words
