"""`abliterate push`: arguments in, exit code, stdout and stderr out; `revert` has a file of its own."""

import functools
import json
from collections.abc import Callable

import pytest

from abliterate.directions import make_direction
from tests.support.command_line import CommandLine, Outcome
from tests.support.fake_hub import FakeHub, evaluation_report, write_checkpoint
from tests.support.gguf_models import tiny, write
from tests.support.tiny_models import random_direction


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


def test_gating_and_collections(run, hub, out):
    slug = "org/mine-1a"
    words = ("org/pushed", "--gated", "manual", "--collection", slug)
    dry = " ".join(run(out, *words, "--dry-run").stdout.split())
    assert f"would go to org/pushed (private, gated: manual) and into the collection {slug}; licence" in dry
    result = run(out, *words)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"{slug}: no such collection" in result.error_line
    assert not hub.repos
    hub.collections[slug] = []
    pushed = " ".join(run(out, *words).stdout.split())
    assert f"(private, gated: manual, new) and into the collection {slug}, commit" in pushed
    assert (hub.repos["org/pushed"].gated, hub.collections[slug]) == ("manual", ["org/pushed"])
    report = json.loads(run(out, *words, "--json").stdout)
    assert (report["gated"], report["collection"]) == ("manual", slug)
    open_one = json.loads(run(out, "x", "--dry-run", "--json").stdout)
    assert (open_one["gated"], open_one["collection"]) == (None, None)


@pytest.mark.parametrize(
    ("words", "code", "match"),
    [
        (("--gated", "maybe"), 2, "--gated"),
        (("--gated", ""), 2, "--gated"),
        (("--collection", "mine"), 1, "'mine' is not the slug of a collection"),
        (("--collection", "a/b\nc"), 1, "is not the slug of a collection"),
        (("--sibling", "nowhere"), 1, "nowhere: no such directory"),
        (("--sibling", "."), 1, "has no abliteration.json"),
        (("--sibling", "out"), 1, "only GGUF files go beside a checkpoint"),
    ],
)
def test_options_that_cannot_be_obeyed(run, hub, out, tmp_path, monkeypatch, words, code, match):
    monkeypatch.chdir(tmp_path)
    result = run(out, "org/pushed", *words)
    assert (result.exit_code, result.stdout) == (code, "")
    assert match in result.error_line
    assert not hub.requests


def test_a_sibling(run, hub, tmp_path, call_main):
    model = tiny("qwen2")
    model.save_pretrained(tmp_path / "base")
    write(tmp_path, model)
    make_direction(mean_difference=random_direction()).save(tmp_path / "d.safetensors")
    for source, out in (("base", "out"), ("model.gguf", "gguf")):
        words = (tmp_path / source, "--direction", tmp_path / "d.safetensors", "-o", tmp_path / out)
        assert call_main("orthogonalize", *words).exit_code == 0
    report = json.loads(run(tmp_path / "out", "org/x", "--sibling", tmp_path / "gguf", "--json").stdout)
    sizes = {file["path"]: file["bytes"] for file in report["files"]}
    assert sizes["model.gguf"] == (tmp_path / "model.gguf").stat().st_size
    assert "abliteration.model.json" in sizes
    assert hub.repos["org/x"].files["model.gguf"] == (tmp_path / "gguf" / "model.gguf").read_bytes()
