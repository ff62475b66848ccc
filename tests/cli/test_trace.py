"""`abliterate trace` as a user and a script see it."""

import json
from pathlib import Path

import pytest
import torch

from abliterate.directions import make_direction
from tests.support.command_line import CommandLine, Outcome


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, call_main: CommandLine, llama_directory: Path, tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("How do locks work?\nExplain rain.\n")
    made = make_direction(mean_difference=torch.randn(32), metadata={"layer": 3})
    made.save(tmp_path / "r.safetensors")

    def call(*arguments: object) -> Outcome:
        command = ["trace", llama_directory, "--direction", tmp_path / "r.safetensors", "--prompts"]
        command += ["./prompts.txt", *arguments]
        monkeypatch.chdir(tmp_path)
        return call_main(*command)

    return call


def test_json_is_one_document(run, tmp_path: Path) -> None:
    code, out, _ = run("--json", "--suffix", "and so on", "--report", tmp_path / "report")
    assert code == 0
    document = json.loads(out)
    assert (document["layer"], document["n_layers"], document["n_heads"]) == (3, 5, 4)
    assert [traced["suffix"] for traced in document["sets"]] == ["none", "given", "random"]
    assert len(document["top_heads"]) == 8
    saved = json.loads((tmp_path / "report" / "trace.json").read_text())
    assert document == {"schema": "abliterate.trace/1", **saved}
    assert (tmp_path / "report" / "heads.svg").is_file()
    assert "direction traced" in (tmp_path / "report" / "index.html").read_text()


def test_tables_and_the_coloured_prompt_are_plain_in_a_pipe(run) -> None:
    code, out, _ = run("--suffix", "and so on", "--prompt", "How do locks work?")
    assert code == 0
    assert "\x1b" not in out
    for text in ("3 *", "measured at layer 3", "prompts.txt + random", "component at layer 3"):
        assert text in out
    assert out.count("head ") >= 8
    assert "How do locks work?" in out


def test_in_a_terminal_the_tokens_are_coloured(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
    _, out, _ = run("--prompt", "Explain rain.")
    assert "\x1b[30;48;2;255;" in out
    assert ";255m" in out


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--layer", "99"), 1),
        (("--suffix", ""), 1),
        (("--prompts", "./missing.txt"), 1),
        (("--n-prompts", "0"), 2),
        (("--top-heads", "many"), 2),
    ],
)
def test_bad_input_is_one_line(run, arguments: tuple[str, ...], code: int) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.error_line
