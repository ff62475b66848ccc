import json
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from abliterate import prompt_sets
from abliterate.cli.prompts import prompts
from abliterate.errors import PromptSetError

Invoke = Callable[..., Result]


@pytest.fixture
def invoke() -> Invoke:
    app = typer.Typer()
    app.command()(prompts)
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def test_lists_the_bundled_sets(invoke: Invoke) -> None:
    result = invoke()
    assert result.exit_code == 0
    assert result.stderr == ""
    for word in ("harmful", "harmless", "borderline", "train", "validation", "test", "304", "sha256"):
        assert word in result.stdout


def test_json_is_one_document(invoke: Invoke) -> None:
    document = json.loads(invoke("--json").stdout)
    assert document["problems"] == []
    assert [(s["kind"], s["part"]) for s in document["sets"]][-1] == ("borderline", "test")
    assert len(document["sets"]) == 7
    assert set(document["sets"][0]) == {
        *("name", "kind", "part", "count", "categories", "mean_words", "duplicates", "sha256"),
    }


def test_bundled_as_spec_and_kind(invoke: Invoke) -> None:
    assert invoke("bundled", "--json").stdout == invoke("--json").stdout
    document = json.loads(invoke("--kind", "harmless", "--json").stdout)
    assert [s["part"] for s in document["sets"]] == ["train", "validation", "test"]
    assert {s["kind"] for s in document["sets"]} == {"harmless"}


def test_a_set_of_ones_own(invoke: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("Tell me [bold]more[/bold].\n" + "word " * 60 + "\nOne two.\nONE TWO!\n")
    result = invoke(str(path))
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    summary = " ".join(" ".join(lines).split())
    assert "4 prompts, 16.8 words on average, 1 duplicates, sha256" in summary
    assert "  Tell me [bold]more[/bold]." in lines
    assert "\u2026" in result.stdout
    assert "ONE TWO" not in result.stdout
    document = json.loads(invoke(str(path), "--json").stdout)
    assert (document["count"], document["duplicates"], document["kind"]) == (4, 1, None)
    assert document["first"][2] == "One two."


def test_a_set_that_cannot_be_used(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke(str(tmp_path / "none.csv"))
    assert isinstance(result.exception, PromptSetError)
    assert result.exception.exit_code == 1
    assert "none.csv: no such file" in str(result.exception)
    assert result.stdout == ""


def test_kind_does_not_go_with_a_file(invoke: Invoke) -> None:
    result = invoke("a.txt", "--kind", "harmful")
    assert result.exit_code == 2
    assert "chooses among the bundled sets" in " ".join(result.stderr.replace("│", " ").split())
    assert invoke("--kind", "rude").exit_code == 2


def test_bundled_sets_with_problems_are_listed_and_fail(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_sets, "find_bundled_problems", lambda: ("x: one", "y: two"))
    result = invoke("--json")
    assert json.loads(result.stdout)["problems"] == ["x: one", "y: two"]
    assert isinstance(result.exception, PromptSetError)
    assert str(result.exception).startswith("x: one (and 1 more; see --json); correct the files")
