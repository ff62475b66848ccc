"""`abliterate prompts` and `abliterate demo`; the merge of an adapter itself is replaced."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from abliterate import prompt_sets
from abliterate.models.demo import ADAPTER_DIRECTORY, HARDENED_ADAPTER_DIRECTORY, DemoReport
from tests.support.command_line import CommandLine, Outcome

Run = Callable[..., Outcome]


@pytest.fixture
def run(call_main: CommandLine) -> Run:
    return functools.partial(call_main, "prompts")


def test_lists_the_bundled_sets(run: Run) -> None:
    result = run()
    assert result.exit_code == 0
    assert result.stderr == ""
    for word in (
        "harmful",
        "harmless",
        "borderline",
        "train",
        "validation",
        "test",
        "304",
        "sha256",
        "test.de",
        "openings",
    ):
        assert word in result.stdout


def test_json_is_one_document(run: Run) -> None:
    document = json.loads(run("--json").stdout)
    assert document["problems"] == []
    sets = [(s["kind"], s["part"], s["language"]) for s in document["sets"]]
    assert sets[8:10] == [("borderline", "test", "en"), ("harmful", "test", "ar")]
    assert sets[-1] == (None, None, "en")
    assert len(sets) == 9 + 6 * 3 + 1
    assert set(document["sets"][0]) == {
        *("name", "kind", "part", "language", "count", "categories", "mean_words", "duplicates", "sha256"),
    }


def test_bundled_as_spec_and_kind(run: Run) -> None:
    assert run("bundled", "--json").stdout == run("--json").stdout
    document = json.loads(run("--kind", "harmless", "--json").stdout)
    assert [s["part"] for s in document["sets"]] == ["train", "validation", "test", *["test"] * 6]
    assert {s["kind"] for s in document["sets"]} == {"harmless"}


def test_a_set_of_ones_own(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("Tell me [bold]more[/bold].\n" + "word " * 60 + "\nOne two.\nONE TWO!\n")
    result = run(path)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    summary = " ".join(" ".join(lines).split())
    assert "4 prompts, 16.8 words on average, 1 duplicates, sha256" in summary
    assert "  Tell me [bold]more[/bold]." in lines
    assert "\u2026" in result.stdout
    assert "ONE TWO" not in result.stdout
    document = json.loads(run(path, "--json").stdout)
    assert (document["count"], document["duplicates"], document["kind"]) == (4, 1, None)
    assert document["first"][2] == "One two."


def test_a_set_that_cannot_be_used(run: Run, tmp_path: Path) -> None:
    result = run(tmp_path / "none.csv")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "none.csv: no such file" in result.error_line


def test_kind_does_not_go_with_a_file(run: Run) -> None:
    result = run("a.txt", "--kind", "harmful")
    assert result.exit_code == 2
    assert "chooses among the bundled sets" in result.error_line
    assert run("--kind", "rude").exit_code == 2


def test_bundled_sets_with_problems_are_listed_and_fail(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_sets, "find_bundled_problems", lambda: ("x: one", "y: two"))
    result = run("--json")
    assert json.loads(result.stdout)["problems"] == ["x: one", "y: two"]
    assert result.exit_code == 1
    assert result.error_line.startswith("error: x: one (and 1 more; see --json); correct the files")


@pytest.fixture
def asked(monkeypatch):
    """What the command asked for, last."""
    found = {}

    def build(*, output, overwrite, adapter, progress):
        found.update(output=output, overwrite=overwrite, adapter=adapter)
        return DemoReport(path=output, base_model="org/base", adapter_rank=8, n_parameters=134_500_000, n_bytes=10**8)

    monkeypatch.setattr("abliterate.models.demo.build_demo_model", build)
    return found


def test_the_plain_demo_model_is_built_and_described(call_main, asked, tmp_path):
    result = call_main("demo", tmp_path / "model")
    assert result.exit_code == 0
    assert asked == {"output": tmp_path / "model", "overwrite": False, "adapter": ADAPTER_DIRECTORY}
    described = f"{tmp_path / 'model'}: org/base with a rank-8 adapter merged, 134 M parameters, 100 MB\n"
    assert result.stdout == described


def test_the_hardened_demo_model_and_what_is_replaced(call_main, asked, tmp_path):
    result = call_main("demo", tmp_path / "model", "--hardened", "--overwrite", "--json")
    assert asked["adapter"] == HARDENED_ADAPTER_DIRECTORY != ADAPTER_DIRECTORY
    assert asked["overwrite"] is True
    assert json.loads(result.stdout) == {
        "schema": "abliterate.demo/1",
        "path": str(tmp_path / "model"),
        "base_model": "org/base",
        "adapter_rank": 8,
        "n_parameters": 134_500_000,
        "n_bytes": 100_000_000,
    }


def test_a_directory_that_is_there_is_not_replaced_unasked(call_main, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    result = call_main("demo", tmp_path / "model")
    assert (result.exit_code, result.stdout) == (1, "")
    assert str(tmp_path / "model") in result.error_line
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["notes.txt"]
