"""Gates and comparisons: what is asked for is found, what is wrong is said before a run, and machines can read it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from abliterate.errors import InputError, VerificationError
from abliterate.evaluation.drift import CrossEntropy, Divergence
from abliterate.evaluation.parts import PartReport
from abliterate.evaluation.recognition import Verdicts, compare_verdicts
from abliterate.evaluation.report import EvaluationReport, count_replies
from abliterate.extraction.reply_classes import read_reply
from abliterate.files import write_json
from abliterate.release.gates import (
    AUDIT_NAMES,
    EVALUATION_NAMES,
    check_measured,
    compare_reports,
    evaluation_numbers,
    evaluation_summary,
    judge_gates,
    parse_gate,
    read_earlier,
    require,
    write_junit,
)

PART = PartReport(
    rates={"harmful": count_replies([read_reply("I cannot."), read_reply("Sure.")])},
    base_rates=None,
    changes={},
    beside_plain={},
    base_beside_plain=None,
    prompt_sets={},
)


def report_of(*refused: bool, **changes: Any) -> EvaluationReport:
    """Make a report of so many harmful prompts, p0, p1, ..., each refused or not."""
    replies = [read_reply("I cannot." if each else "Sure.") for each in refused]
    values: dict[str, Any] = {
        "model": "m",
        "base": "b",
        "intervention": "none",
        "max_new_tokens": 8,
        "scorer": "s",
        "rates": {"harmful": count_replies(replies)},
        "base_rates": None,
        "outcomes": {"harmful": {f"p{i}": reply.reply_class for i, reply in enumerate(replies)}},
        "kl_harmless": 0.1,
        "divergence": Divergence(first_token=0.1, continuation=0.05, n_tokens=9, per_prompt=3),
        "cross_entropy": CrossEntropy(base=1.0, model=1.2, relative_change=0.2, n_tokens=9),
        "prompt_sets": {},
        "versions": {},
    }
    return EvaluationReport(**(values | changes))


def found(text: str, report: EvaluationReport) -> bool:
    (result,) = judge_gates([parse_gate(text, EVALUATION_NAMES)], evaluation_numbers(report))
    return result.failed


def test_a_gate_fails_where_it_holds() -> None:
    report = report_of(True, True, True, False)
    for text, failed in {
        "harmful_refusal_rate<0.9": True,
        "harmful_refusal_rate < 0.75": False,
        "harmful_refusal_rate<=0.75": True,
        "harmful_refusal_rate>=0.75": True,
        "harmful_refusal_rate!=0.75": False,
        "harmful_refusal_low>0.75": False,
        "harmful_refusal_high==1": False,
        "harmful_degenerate_rate>0": False,
        "kl_first_token>0.09": True,
        "kl_continuation>0.09": False,
        "cross_entropy_change>=2e-1": True,
    }.items():
        assert found(text, report) == failed, text


def test_what_was_not_measured_fails() -> None:
    (result,) = judge_gates([parse_gate("borderline_refusal_rate>0.5", EVALUATION_NAMES)], {})
    assert (result.failed, result.found) == (True, "not measured")


def test_a_verdict_is_a_word() -> None:
    gate = parse_gate("verdict==single_direction", AUDIT_NAMES)
    assert judge_gates([gate], {"verdict": "single_direction"})[0].failed
    assert not judge_gates([gate], {"verdict": "not_mediated"})[0].failed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("harmful_refusal_rate", "is not NAME OP VALUE"),
        ("", "is not NAME OP VALUE"),
        ("harmful_refusal_rate=0.9", "is not NAME OP VALUE"),
        ("refusals<0.9", "'refusals' is not among harmful_refusal_rate, "),
        ("harmful_refusal_rate<many", "'many' is no number"),
        ("harmful_refusal_rate<nan", "'nan' is no number"),
        ("__import__('os')<1", "is not NAME OP VALUE"),
        ("harmful_refusal_rate@tlh<1", "the parts are ar, de, es, fr, ru, zh, opening, repetition"),
        ("kl_first_token@de<1", "only rates of `evaluate` can be of a part"),
        ("harmful_refusal_p@de<1", "only rates of `evaluate` can be of a part"),
    ],
)
def test_a_gate_that_is_none_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_gate(text, EVALUATION_NAMES)
    assert "\n" not in str(caught.value)


def test_an_ordered_verdict_is_refused() -> None:
    with pytest.raises(InputError, match="only be == or !="):
        parse_gate("verdict<few_directions", AUDIT_NAMES)


@pytest.mark.parametrize(("text", "missing"), [("kl_first_token>1", "--base"), ("harmful_refusal_p<0.05", "--against")])
def test_what_a_gate_takes_is_asked_for_before_the_run(text: str, missing: str) -> None:
    gates = [parse_gate(text, EVALUATION_NAMES)]
    check_measured(gates, has_base=True, has_earlier=True)
    with pytest.raises(InputError, match=missing):
        check_measured(gates, has_base=missing != "--base", has_earlier=missing != "--against")


def test_a_gate_on_a_part_takes_the_part() -> None:
    report = report_of(True, True, parts={"de": PART, "opening": PART})
    assert found("harmful_refusal_rate@de<0.9", report)
    assert not found("harmful_refusal_rate@opening>0.9", report)
    assert not found("harmful_refusal_rate<0.9", report)
    gates = [
        parse_gate(text, EVALUATION_NAMES) for text in ("harmful_refusal_low@de<1", "harmful_refusal_rate@opening<1")
    ]
    check_measured(gates, has_base=False, has_earlier=False, parts=("de", "opening"))
    for parts, missing in ((("opening",), "--languages de"), (("de",), "--turns")):
        with pytest.raises(InputError, match=missing):
            check_measured(gates, has_base=False, has_earlier=False, parts=parts)
    with pytest.raises(InputError, match="only rates of `evaluate`"):
        parse_gate("harmful_refusal_rate@de<1", AUDIT_NAMES)
    assert "| harmful, de | 2 |  | 50.0% " in evaluation_summary(report)


def test_a_gate_on_what_the_model_knows() -> None:
    knows = Verdicts(log_odds={"harmful": (2.0, 1.0), "harmless": (0.0, -1.0)}, said=1.0)
    forgot = Verdicts(log_odds={"harmful": (0.0, 0.0), "harmless": (0.0, 0.0)}, said=1.0)
    report = report_of(True, recognition=compare_verdicts(knows, forgot))
    assert found("recognition_auc<0.6", report)
    assert found("recognition_change<-0.4", report)
    assert not found("recognition_auc<0.5", report)
    with pytest.raises(InputError, match="--base"):
        check_measured([parse_gate("recognition_change<0", EVALUATION_NAMES)], has_base=False, has_earlier=False)


def test_each_failing_gate_is_named() -> None:
    report = report_of(True, False)
    gates = [parse_gate(f"harmful_refusal_rate<{limit}", EVALUATION_NAMES) for limit in (0.1, 0.6, 0.9)]
    results = judge_gates(gates, evaluation_numbers(report))
    with pytest.raises(VerificationError, match=r"^2 of 3 gates fail: .*<0\.6: it is 0\.5; .*<0\.9: it is 0\.5$"):
        require(results)
    require(results[:1])


def test_reports_are_paired_by_prompt_where_they_agree(tmp_path: Path) -> None:
    write_json(tmp_path / "old.json", asdict(report_of(True, True, True, False, True, True)))
    (one,) = compare_reports(report_of(True, False, False, False), read_earlier(tmp_path / "old.json"))
    assert (one.n, one.n_earlier, one.rate, one.earlier_rate) == (4, 6, 0.25, pytest.approx(5 / 6))
    assert one.paired is not None
    # p0 to p3 are in both: three were refused, one is.
    assert (one.paired.n, one.paired.only_before, one.paired.only_after) == (4, 2, 0)
    assert one.difference == -0.5
    numbers = evaluation_numbers(report_of(True), (one,))
    assert (numbers["harmful_refusal_change"], numbers["harmful_refusal_p"]) == (-0.5, 0.5)


def test_an_older_report_without_outcomes_is_compared_by_its_rates(tmp_path: Path) -> None:
    write_json(tmp_path / "old.json", asdict(report_of(True, True)) | {"outcomes": None})
    (one,) = compare_reports(report_of(True, False), read_earlier(tmp_path / "old.json"))
    assert (one.paired, one.difference) == (None, -0.5)
    assert "harmful_refusal_p" not in evaluation_numbers(report_of(True), (one,))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "cannot be read as JSON"),
        ("{}", "is no report"),
        ('{"rates": {"harmful": 1}}', "is no report"),
        ('{"rates": {"harmful": {"n": 1, "rate": "all"}}}', "is no report"),
        ('{"rates": {"other": {"n": 1, "rate": 0.5}}}', "is no report"),
        ('{"rates": {"harmful": {"n": 1, "rate": 0.5}}, "outcomes": {"harmful": [1]}}', "is no report"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "old.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        read_earlier(path)
    assert "evaluate -o` wrote" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_junit_holds_a_case_for_each_gate_whatever_the_model_is_called(tmp_path: Path) -> None:
    report = report_of(True, False)
    gates = [parse_gate(f"harmful_refusal_rate<{limit}", EVALUATION_NAMES) for limit in (0.1, 0.9)]
    results = judge_gates(gates, evaluation_numbers(report))
    hostile = 'a"<b>&\x00\x1b[31m\ud800'
    write_junit(tmp_path / "j.xml", command="evaluate", model=hostile, results=results)
    root = ElementTree.parse(tmp_path / "j.xml").getroot()
    (suite,) = root
    assert suite.attrib["name"].startswith('abliterate evaluate a"<b>&')
    assert (suite.attrib["tests"], suite.attrib["failures"]) == ("2", "1")
    assert [case.attrib["name"] for case in suite] == [gate.text for gate in gates]
    assert [[child.tag for child in case] for case in suite] == [[], ["failure"]]
    write_junit(tmp_path / "j.xml", command="audit", model="m", results=())
    (suite,) = ElementTree.parse(tmp_path / "j.xml").getroot()
    assert (suite.attrib["tests"], suite.attrib["failures"]) == ("1", "0")


def test_the_summary_is_markdown_in_which_a_name_is_only_a_name(tmp_path: Path) -> None:
    write_json(tmp_path / "old.json", asdict(report_of(True, True)))
    report = report_of(True, False, model="x | <script>\n# [y](http://z)")
    comparisons = compare_reports(report, read_earlier(tmp_path / "old.json"))
    results = judge_gates([parse_gate("harmful_refusal_rate<0.9", EVALUATION_NAMES)], evaluation_numbers(report))
    text = evaluation_summary(report, comparisons, results)
    assert text.splitlines()[0] == "## Refusals of x \\| &lt;script&gt; # \\[y](http://z)"
    assert "| harmful | 2 |  | 50.0% \\[9.5%, 90.5%] | 0 |" in text
    assert "| harmful | 100.0% | 50.0% | -50.0% | 2 | 1 |" in text
    assert "| harmful_refusal_rate&lt;0.9 | 0.5 | fails |" in text


def test_a_report_says_what_became_of_each_prompt_and_holds_no_text() -> None:
    outcomes = json.loads(json.dumps(asdict(report_of(True, False))))["outcomes"]
    assert outcomes == {"harmful": {"p0": "refusal", "p1": "answer"}}
