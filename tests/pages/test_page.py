"""Report pages: complete in themselves, escaped, with the numbers of the report in them."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from abliterate.evaluation.report import PARTS
from abliterate.pages.audit_page import write_audit_page
from abliterate.pages.charts import Interval, Line, Threshold, interval_chart, line_chart, tick_values
from abliterate.pages.evaluation_page import ASKED, write_evaluation_page
from abliterate.pages.extraction_page import write_extraction_page
from abliterate.pages.page import Section, build_page, commands, facts, paragraph, quoted, table
from tests.support.pages import Page, audit_report, evaluation_report, score_table

NASTY = "<script>alert(1)</script>\"'&<img src=http://evil.example/x>"


@pytest.fixture
def evaluation(tmp_path: Path) -> str:
    page, data = write_evaluation_page(evaluation_report(), tmp_path, command="abliterate evaluate out/edited")
    assert json.loads(data.read_text())["kl_harmless"] == 0.0312
    return page.read_text()


@pytest.fixture
def extraction(tmp_path: Path) -> str:
    return write_extraction_page(score_table(), tmp_path, command="abliterate extract x").read_text()


@pytest.fixture
def audit(tmp_path: Path) -> str:
    page, data = write_audit_page(audit_report(), tmp_path, command="abliterate audit org/model")
    assert json.loads(data.read_text())["verdict"] == "few_directions"
    return page.read_text()


@pytest.mark.parametrize("name", ["evaluation", "extraction", "audit"])
def test_a_page_needs_nothing_but_itself(name: str, request: pytest.FixtureRequest) -> None:
    text = request.getfixturevalue(name)
    page = Page(text)
    assert page.balanced
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert not [a for _, attributes in page.tags for a in attributes if a in {"src", "href", "srcset", "action"}]
    assert not re.search(r"url\(|@import|https?://", text)
    policy = next(a["content"] for a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")


@pytest.mark.parametrize("name", ["evaluation", "extraction", "audit"])
def test_a_page_is_made_for_every_reader(name: str, request: pytest.FixtureRequest) -> None:
    text = request.getfixturevalue(name)
    page = Page(text)
    assert page.of("html")[0]["lang"] == "en"
    assert any(a.get("name") == "viewport" for a in page.of("meta"))
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert [len(page.of(tag)) for tag in ("h1", "main", "title")] == [1, 1, 1]
    assert all(a.get("role") == "img" and a.get("aria-label") for a in page.of("svg") if a.get("class") == "figure")
    assert len(page.of("caption")) == len(page.of("table")) > 0
    assert {a["scope"] for a in page.of("th")} == {"row", "col"}
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_the_evaluations_numbers_are_on_it(evaluation: str) -> None:
    report, words = evaluation_report(), Page(evaluation).words()
    for rates in (report.rates, report.base_rates or {}):
        for rate in rates.values():
            assert f"{100 * rate.rate:.1f} % [{100 * rate.low:.1f}, {100 * rate.high:.1f}]" in words
    for number in ("0.0312", "0.0421", "0.5120", "0.5330", "+4.1%", "0.71", "240/260", "-0.0100 [-0.0300, +0.0100]"):
        assert number in words
    for text in ("Wilson", "McNemar", "identity forgery", "c" * 64, "abliterate evaluate out/edited"):
        assert text in words
    for heading in ("Refusal rates", "How late it refuses", "What else changed", "Judges", "Capability", "By category"):
        assert heading in words
    for text in ("8 tokens", "256 tokens", "strict", "deflection"):
        assert text in words
    assert "Refusals by language" not in words


def test_refusals_in_other_languages_are_said_and_budgets_only_where_they_were_read(tmp_path: Path) -> None:
    report = evaluation_report()
    mixed = {kind: replace(rate, languages={"en": 2, "sl": 1}, budgets=()) for kind, rate in report.rates.items()}
    changed = replace(report, rates=mixed, base_rates=None, changes={})
    words = Page(write_evaluation_page(changed, tmp_path, command="x")[0].read_text()).words()
    assert "Refusals by language, base and model: en 6, sl 3." in words
    assert "How late it refuses" not in words


def test_the_audits_verdict_and_what_makes_it_are_on_it(audit: str) -> None:
    report, words = audit_report(), Page(audit).words()
    for rate in (report.harmful, report.harmless, *(one.harmful for one in report.interventions)):
        assert f"{100 * rate.rate:.1f} % [{100 * rate.low:.1f}, {100 * rate.high:.1f}]" in words
    for text in ("Verdict few_directions", report.reason, "7 of 115", "0.987", "0.971", "+0.212", "0.123", "4.3%"):
        assert text in words
    for text in (
        "at most 30% of the refusals are left",
        "at most 0.5 nats",
        "d" * 40,
        "bfloat16",
        "abliterate audit org/model",
    ):
        assert text in words


def test_an_audit_of_a_model_that_does_not_refuse_says_so_and_no_more(tmp_path: Path) -> None:
    text = write_audit_page(audit_report(refuses=False), tmp_path, command="x")[0].read_text()
    words = Page(text).words()
    assert "does not refuse" in words
    assert "Interventions" not in words
    assert "Candidates" not in words


def test_without_a_base_nothing_is_compared(tmp_path: Path) -> None:
    page = Page(write_evaluation_page(evaluation_report(with_base=False), tmp_path, command="x")[0].read_text())
    assert (
        "McNemar" not in page.words().replace("p (McNemar)", "").replace("p-value", "") or "change" not in page.words()
    )
    assert "without a base" in page.words()


def test_the_extractions_choice_thresholds_and_scores_are_on_it(extraction: str) -> None:
    words, page = Page(extraction).words(), Page(extraction)
    assert "Position -1, layer 14 of 30" in words
    assert "KL at most 0.1 nats" in words
    assert "Layer below 24 of 30" in words
    figures = [a for a in page.of("svg") if a.get("class") == "figure"]
    assert len(figures) == 3
    assert words.count("selected") >= 4


def test_no_candidate_is_said(tmp_path: Path) -> None:
    page = Page(write_extraction_page(score_table(passing=False), tmp_path, command="x").read_text())
    assert "No candidate direction passes the selection" in page.words()


def test_completions_are_on_the_page_only_when_asked(tmp_path: Path) -> None:
    file = tmp_path / "completions.jsonl"
    entry = {
        "model": "model",
        "kind": "harmful",
        "id": "h1",
        "prompt": "P <b>",
        "class": "answer",
        "completion": f"\u2028{NASTY}",
    }
    file.write_text(json.dumps(entry, ensure_ascii=False) + "\n", encoding="utf-8")
    without = write_evaluation_page(evaluation_report(), tmp_path / "a", command="x")[0].read_text()
    asked = write_evaluation_page(evaluation_report(), tmp_path / "b", command="x", completions=file)[0].read_text()
    assert "alert(1)" not in without
    assert "alert(1)" in Page(asked).words()
    assert not Page(asked).of("script")
    assert not Page(asked).of("img")


def test_whatever_goes_in_is_text(tmp_path: Path) -> None:
    blocks = (paragraph(NASTY), facts([(NASTY, NASTY)]), quoted(NASTY), commands([NASTY]))
    blocks += (table([NASTY, "x"], [[NASTY, NASTY]], caption=NASTY),)
    blocks += (interval_chart([(NASTY, [])], series=[NASTY], caption=NASTY).html,)
    blocks += (line_chart([Line(name=NASTY, values=[1.0, 2.0])], caption=NASTY, x_name=NASTY).html,)
    page = Page(build_page(title=NASTY, subtitle=NASTY, sections=[Section(heading=NASTY, blocks=blocks)]))
    assert page.balanced
    assert not page.of("script")
    assert not page.of("img")
    model = evaluation_report(model=NASTY)
    assert not Page(write_evaluation_page(model, tmp_path, command=NASTY)[0].read_text()).of("script")


def test_points_stand_where_their_values_are() -> None:
    figure = interval_chart(
        [("a", [Interval(series=0, value=0.0, low=0.0, high=0.5), Interval(series=1, value=1.0, low=0.75, high=1.0)])],
        series=["base", "model"],
        caption="c",
    ).html
    first, second = Page(figure).of("circle")
    at = [float(str(circle["cx"]).rstrip("%")) for circle in (first, second)]
    assert at == [34.0, 96.0]
    low, high = (float(str(Page(figure).of("line")[-1][x]).rstrip("%")) for x in ("x1", "x2"))
    assert (low - 34) / 62 == pytest.approx(0.75)
    assert (high - 34) / 62 == pytest.approx(1.0)


def test_a_line_leaves_gaps_where_nothing_was_measured() -> None:
    figure = line_chart(
        [Line(name="a", values=[0.0, 1.0, None, 3.0, float("nan"), 4.0])],
        caption="c",
        x_name="layer",
        thresholds=[Threshold(name="limit", value=2.0)],
        mark=(3, 3.0),
    ).html
    drawn = [str(a["d"]) for a in Page(figure).of("path")]
    assert drawn[0] == "M0.00 100.00h0L20.00 75.00M60.00 25.00h0M100.00 0.00h0"
    assert drawn[1] == "M0 50.00H100"
    assert drawn[2] == "M60.00 25.00h0"
    assert line_chart([Line(name="a", values=[None])], caption="c", x_name="x").html == ""


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-8.19, 5.2, [-5, 0, 5]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (3, 3, [3]),
        (-0.004, 0.011, [0, 0.005, 0.01]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert tick_values(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("span", [10.0**k * m for k in range(-4, 5) for m in (1, 1.7, 3.3, 5.9, 9.99)])
def test_there_are_never_many_ticks(span: float) -> None:
    found = tick_values(-span / 3, 2 * span / 3)
    assert 2 <= len(found) <= 7


def test_every_way_of_asking_has_its_words() -> None:
    assert set(ASKED) == set(PARTS)
    assert len(set(ASKED.values())) == len(ASKED)
