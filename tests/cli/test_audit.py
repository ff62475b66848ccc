"""`abliterate audit` as a safety team's script sees it: one document, and the exit code as a gate."""

import json
from pathlib import Path

import pytest

from tests.support.command_line import CommandLine, Outcome

QUICK = ["--n-train", "8", "--n-val", "2", "--n-test", "4", "--screen", "3", "--candidates", "1", "--bootstrap", "3"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, call_main: CommandLine, llama_directory: Path):
    monkeypatch.setattr("abliterate.extraction.reply_classes.MAX_NATS_PER_TOKEN", 1e9)

    def call(*arguments: object, refuses: bool = True) -> Outcome:
        # A random model writes random text; whether that is a refusal is for the test to say.
        monkeypatch.setattr("abliterate.extraction.reply_classes.is_refusal", lambda _text: refuses)
        command = ["audit", llama_directory, *QUICK, "--max-new-tokens", "3", *arguments]
        return call_main(*command)

    return call


def test_json_is_one_document_and_the_file_holds_the_same(run, tmp_path: Path) -> None:
    code, out, _ = run("--json", "-o", tmp_path / "audit.json")
    assert code == 0
    document = json.loads(out)
    assert document == {"schema": "abliterate.audit/1", **json.loads((tmp_path / "audit.json").read_text())}
    assert document["verdict"] == "not_mediated"
    assert [one["rank"] for one in document["interventions"]] == [1, 2, 4, 8, 1]
    assert document["lowest_refusal"] == 1


@pytest.mark.parametrize("flag", ["-o", "--report"])
def test_places_that_cannot_be_written_are_found_before_the_work(run, tmp_path: Path, monkeypatch, flag: str) -> None:
    monkeypatch.setattr("abliterate.evaluation.auditing.audit_model", lambda **_: pytest.fail("the work was begun"))
    (tmp_path / "notes.txt").write_text("mine")
    for place in ("notes.txt", "notes.txt/below"):
        result = run(flag, tmp_path / place)
        assert (result.exit_code, result.stdout) == (1, "")
        assert f"error: {tmp_path / place}: " in result.error_line
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_page_is_written_with_its_command_and_no_reply(run, tmp_path: Path) -> None:
    code, _, _ = run("--report", tmp_path / "page")
    assert code == 0
    text = (tmp_path / "page" / "index.html").read_text()
    assert "Verdict not_mediated" in text
    assert f"--report {tmp_path / 'page'}" in text
    assert json.loads((tmp_path / "page" / "audit.json").read_text())["verdict"] == "not_mediated"


def test_the_table_says_the_verdict(run) -> None:
    code, out, _ = run()
    assert code == 0
    for text in ("ablate 8 directions", "subtract -", "verdict: not_mediated", "5th percentile", "bearable"):
        assert text in out


@pytest.mark.parametrize(("refuses", "rate", "expected"), [(True, 0.9, 0), (False, 0.9, 1), (False, 0.0, 0)])
def test_the_gate_is_the_exit_code_and_the_report_is_there_all_the_same(
    run, refuses: bool, rate: float, expected: int
) -> None:
    code, out, error = run("--json", "--fail-if-brittle", rate, refuses=refuses)
    assert code == expected
    assert json.loads(out)["verdict"] == ("not_mediated" if refuses else "does_not_refuse")
    errors = [line for line in error.splitlines() if line.startswith("error:")]
    assert len(errors) == expected
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--fail-if-brittle", "2"), 2),
        (("--n-train", "7"), 2),
        (("--screen", "1", "--candidates", "2"), 1),
        (("--min-refusal", "0"), 1),
        (("--test-harmful", "./missing.txt"), 1),
    ],
)
def test_bad_input(run, arguments: tuple[str, ...], code: int) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.error_line


def test_gates_are_judged_after_all_is_written(run, tmp_path: Path) -> None:
    files = ("-o", tmp_path / "audit.json", "--junit", tmp_path / "j.xml", "--summary", tmp_path / "s.md")
    passing = run("--fail-if", "harmful_refusal_rate<0.5", *files, "--json")
    assert passing.exit_code == 0
    assert json.loads(passing.stdout)["gates"] == [{"gate": "harmful_refusal_rate<0.5", "found": 1.0, "failed": False}]
    failing = run("--fail-if", "verdict==not_mediated", "--fail-if", "lowest_refusal<2", *files)
    assert failing.exit_code == 1
    assert "2 of 2 gates fail: verdict==not_mediated: it is not_mediated; lowest_refusal<2: it is 1" in failing.stderr
    assert "gate lowest_refusal<2: 1, fails" in failing.stdout
    assert json.loads((tmp_path / "audit.json").read_text())["verdict"] == "not_mediated"
    assert (tmp_path / "j.xml").read_text().count("<failure") == 2
    assert (tmp_path / "s.md").read_text().startswith("## Audit of ")


@pytest.mark.parametrize("text", ["refusals<1", "harmful_refusal_rate", "kl_first_token<1", "verdict<x"])
def test_a_gate_that_is_none_is_found_before_the_work(run, monkeypatch, text: str) -> None:
    monkeypatch.setattr("abliterate.evaluation.auditing.audit_model", lambda **_: pytest.fail("the work was begun"))
    result = run("--fail-if", text)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"--fail-if {text!r}" in result.error_line
