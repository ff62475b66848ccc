"""`abliterate push`: arguments in, exit code, stdout and stderr out."""

import json

import pytest
import typer
from typer.testing import CliRunner

from abliterate.cli.push import push
from abliterate.errors import AbliterateError, HubError, InputError
from tests.support.fake_hub import FakeHub, evaluation_report, write_checkpoint

app = typer.Typer()
app.command()(push)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with FakeHub() as server:
        server.use(monkeypatch, tmp_path)
        yield server


@pytest.fixture
def out(tmp_path):
    return write_checkpoint(tmp_path / "out")


def run(*arguments, fails: type[AbliterateError] | None = None):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if fails is not None:
        assert isinstance(result.exception, fails)
    elif result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_dry_run_without_a_hub(out):
    result = run(out, "org/pushed", "--dry-run")
    assert result.exit_code == 0
    for words in ("model-00001-of-00002.safetensors", "README.md", "Dry run", "(private)", "Safety notice"):
        assert words in result.stdout
    assert "no evaluation" in result.stderr


def test_dry_run_as_json(out):
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


def test_push(hub, out):
    hub.add_repo("org/pushed", {"old.txt": b"x"}, private=True)
    result = run(out, "org/pushed")
    assert result.exit_code == 0
    assert "(private, existing), commit" in " ".join(result.stdout.split())
    assert "left there: old.txt" in " ".join(result.stderr.split())
    assert "model-00002-of-00002.safetensors" in hub.repos["org/pushed"].files
    assert "hf_test" not in result.output


def test_push_as_json(hub, out):
    report = json.loads(run(out, "org/pushed", "--json").stdout)
    assert report["created"] is True
    assert report["commit"] == hub.repos["org/pushed"].refs["main"]


def test_evaluation_option(hub, out, tmp_path):
    measured = tmp_path / "measured.json"
    measured.write_text(json.dumps(evaluation_report()))
    assert json.loads(run(out, "x", "--dry-run", "--json", "--evaluation", measured).stdout)["evaluated"]
    run(out, "x", "--evaluation", tmp_path / "nowhere.json", fails=InputError)


def test_errors_reach_the_one_boundary(hub, out, tmp_path, monkeypatch):
    run(tmp_path, "org/pushed", fails=InputError)
    monkeypatch.delenv("HF_TOKEN")
    run(out, "org/pushed", fails=HubError)


@pytest.mark.parametrize("arguments", [[], ["out"], ["out", "org/x", "--no-such-option"]])
def test_wrong_usage(arguments):
    assert run(*arguments).exit_code == 2
