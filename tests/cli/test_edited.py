"""`abliterate push`: arguments in, exit code, stdout and stderr out; `revert` has a file of its own."""

import functools
import json
from collections.abc import Callable

import pytest

from tests.support.command_line import CommandLine, Outcome
from tests.support.fake_hub import FakeHub, evaluation_report, write_checkpoint


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with FakeHub() as server:
        server.use(monkeypatch, tmp_path)
        yield server


@pytest.fixture
def out(tmp_path):
    return write_checkpoint(tmp_path / "out")


@pytest.fixture
def run(call_main: CommandLine) -> Callable[..., Outcome]:
    return functools.partial(call_main, "push")


def test_dry_run_without_a_hub(run, out):
    result = run(out, "org/pushed", "--dry-run")
    assert result.exit_code == 0
    for words in ("model-00001-of-00002.safetensors", "README.md", "Dry run", "(private)", "Safety notice"):
        assert words in result.stdout
    assert "no evaluation" in result.stderr


def test_dry_run_as_json(run, out):
    (out / "evaluation.json").write_text(json.dumps(evaluation_report()))
    (out / "mine.txt").write_text("x")
    result = run(out, "org/pushed", "--dry-run", "--public", "--commit-message", "Words", "--json")
    report = json.loads(result.stdout)
    assert (report["dry_run"], report["private"], report["evaluated"]) == (True, False, True)
    assert report["commit_message"] == "Words"
    assert report["left_out"] == ["mine.txt"]
    assert {"path": "LICENSE", "bytes": 12} in report["files"]
    assert report["card"].startswith("---\nbase_model: org/base\n")
    assert "left out, not part of the edited checkpoint: mine.txt" in result.stderr


def test_push(run, hub, out):
    hub.add_repo("org/pushed", {"old.txt": b"x"}, private=True)
    result = run(out, "org/pushed")
    assert result.exit_code == 0
    assert "(private, existing), commit" in " ".join(result.stdout.split())
    assert "left there: old.txt" in " ".join(result.stderr.split())
    assert "model-00002-of-00002.safetensors" in hub.repos["org/pushed"].files
    assert "hf_test" not in result.stdout + result.stderr


def test_push_as_json(run, hub, out):
    report = json.loads(run(out, "org/pushed", "--json").stdout)
    assert report["created"] is True
    assert report["commit"] == hub.repos["org/pushed"].refs["main"]


def test_evaluation_option(run, hub, out, tmp_path):
    measured = tmp_path / "measured.json"
    measured.write_text(json.dumps(evaluation_report()))
    assert json.loads(run(out, "x", "--dry-run", "--json", "--evaluation", measured).stdout)["evaluated"]
    result = run(out, "x", "--evaluation", tmp_path / "nowhere.json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "nowhere.json" in result.error_line


def test_errors_reach_the_one_boundary(run, hub, out, tmp_path, monkeypatch):
    result = run(tmp_path, "org/pushed")
    assert result.exit_code == 1
    assert str(tmp_path) in result.error_line
    monkeypatch.delenv("HF_TOKEN")
    result = run(out, "org/pushed")
    assert result.exit_code == 1
    assert "token" in result.error_line


@pytest.mark.parametrize("arguments", [[], ["out"], ["out", "org/x", "--no-such-option"]])
def test_wrong_usage(run, arguments):
    assert run(*arguments).exit_code == 2
