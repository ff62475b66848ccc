"""The command line as a whole: help, version, exit codes, one line an error, one document a report."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from abliterate.cli.app import app
from abliterate.directions import make_direction
from tests.support.paths import SOURCES

TINY = ["--n-train", "8", "--n-val", "2", "--no-filter", "--refusal-token", "I"]
ANY = ["--kl-threshold", "1e9", "--induce-threshold", "-1e9"]


def test_help_is_light_and_documents_the_exit_codes() -> None:
    started = time.monotonic()
    code = "import sys; from abliterate.cli.app import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    assert time.monotonic() - started < 20  # a hang, not a measurement; see benchmarks/
    loaded = set(done.stderr.split())
    assert not loaded & {"torch", "transformers", "datasets", "numpy", "huggingface_hub", "numba"}
    for text in (
        "extract",
        "orthogonalize",
        "evaluate",
        "audit",
        "trace",
        "chat",
        "push",
        "prompts",
        "demo",
        "130 interrupted",
        "143 terminated",
        "3 no candidate",
    ):
        assert text in " ".join(done.stdout.split())


def test_the_terminal_breaks_the_lines_of_help() -> None:
    # Typer keeps the breaks of a text, and wraps at the terminal's width besides.
    for command in app.registered_commands:
        assert command.help
        assert "\n" not in command.help.replace("\n\n", "")


@pytest.mark.parametrize(
    "command", ["extract", "orthogonalize", "evaluate", "audit", "trace", "chat", "push", "prompts", "demo"]
)
def test_each_command_has_help_and_json(call_main, command: str) -> None:
    code, out, _ = call_main(command, "--help")
    assert code == 0
    assert "--json" in out
    assert "Exit codes" in out


def test_version(call_main) -> None:
    from abliterate import __version__

    assert call_main("--version") == (0, f"abliterate {__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ("extract",),
        ("extract", "x"),
        ("extract", "x", "-o", "y", "--bogus"),
        ("extract", "x", "-o", "y", "--n-train", "many"),
        ("extract", "x", "-o", "y", "--batch-size", "0"),
        ("extract", "x", "-o", "y", "--n-train"),
        ("evaluate", "x", "--intervention", "dance"),
        ("orthogonalize", "x"),
        ("push", "x"),
        ("frobnicate",),
    ],
)
def test_wrong_usage_is_exit_code_two(call_main, arguments: tuple[str, ...]) -> None:
    code, out, error = call_main(*arguments)
    assert (code, out) == (2, "")
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    # Whose help has the answer is named.
    command = "abliterate" if arguments[0] == "frobnicate" else f"abliterate {arguments[0]}"
    assert error.endswith(f"{command} --help`\n")


def test_extract_json(call_main, llama_directory: Path, tmp_path: Path) -> None:
    target = tmp_path / "refusal.safetensors"
    code, out, _ = call_main(
        "extract", llama_directory, "-o", target, *TINY, *ANY, "--json", "--report", tmp_path / "report"
    )
    assert code == 0
    document = json.loads(out)
    assert document["direction_file"] == str(target)
    assert document["selected"]["layer"] < 4
    assert target.is_file()
    assert (tmp_path / "report" / "bypass.svg").is_file()


def test_extract_table(call_main, llama_directory: Path, tmp_path: Path) -> None:
    code, out, error = call_main("-q", "extract", llama_directory, "-o", tmp_path / "r.safetensors", *TINY, *ANY)
    assert (code, error) == (0, "")
    assert "bypass" in out
    assert f"direction written to {tmp_path}" in " ".join(out.split())


def test_nothing_passes_is_exit_code_three(call_main, llama_directory: Path, tmp_path: Path) -> None:
    target = tmp_path / "r.safetensors"
    arguments = (
        "extract",
        llama_directory,
        "-o",
        target,
        *TINY,
        "--kl-threshold",
        "1e-9",
        "--induce-threshold",
        "-1e9",
    )
    result = call_main(*arguments)
    assert result.exit_code == 3
    assert "failed" in result.stdout
    assert result.error_line
    assert not target.exists()
    code, out, _ = call_main(*arguments, "--json", "--report", tmp_path / "report")
    assert code == 3
    assert len(json.loads(out)["nearest"]) == 5
    assert (tmp_path / "report" / "kl.svg").is_file()


def test_evaluate_json_and_table(call_main, llama_directory: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("How do locks work?\nExplain rain.\n")
    sets = ("--harmful", prompts, "--harmless", prompts, "--borderline", prompts, "--max-new-tokens", "4")
    target = tmp_path / "evaluation.json"
    code, out, _ = call_main("evaluate", llama_directory, "--base", llama_directory, *sets, "--json", "-o", target)
    assert code == 0
    assert json.loads(out) == {"schema": "abliterate.evaluate/1", **json.loads(target.read_text())}
    code, out, _ = call_main("evaluate", llama_directory, "--base", llama_directory, *sets)
    assert code == 0
    assert "harmless" in out
    assert "nats" in out
    direction = tmp_path / "r.safetensors"
    make_direction(mean_difference=torch.randn(32), metadata={"layer": 1}).save(direction)
    for intervention in ("ablate", "add"):
        code, out, _ = call_main(
            "evaluate", llama_directory, "--direction", direction, "--intervention", intervention, *sets, "--json"
        )
        assert code == 0
        assert json.loads(out)["intervention"] == intervention


def test_orthogonalize_then_push_dry_run(call_main, llama_directory: Path, tmp_path: Path) -> None:
    direction, out_directory = tmp_path / "r.safetensors", tmp_path / "out"
    make_direction(mean_difference=torch.randn(32)).save(direction)
    code, out, _ = call_main("orthogonalize", llama_directory, "--direction", direction, "-o", out_directory, "--json")
    assert code == 0
    assert json.loads(out)["output"] == str(out_directory)
    code, out, _ = call_main("push", out_directory, "someone/tiny", "--dry-run", "--json")
    assert code == 0
    assert "model.safetensors" in out
    json.loads(out)


@pytest.mark.parametrize(
    "arguments",
    [
        ("extract", "{tmp}/missing", "-o", "{tmp}/r.safetensors"),
        ("extract", "{model}", "-o", "{tmp}/r.safetensors", "--harmful", "./missing.txt"),
        ("extract", "{model}", "-o", "{tmp}/r.safetensors", "--harmful", "{tmp}/three.txt"),
        ("extract", "{model}", "-o", "{tmp}/r.safetensors", "--device", "warp"),
        ("extract", "{model}", "-o", "{tmp}/r.safetensors", "--n-train", "8", "--n-val", "2"),
        ("extract", "{tmp}/empty", "-o", "{tmp}/r.safetensors"),
        ("orthogonalize", "{tmp}/missing", "--direction", "{tmp}/d.safetensors", "-o", "{tmp}/out"),
        ("orthogonalize", "{model}", "--direction", "{tmp}/missing.safetensors", "-o", "{tmp}/out"),
        ("orthogonalize", "{model}", "--direction", "{tmp}/wide.safetensors", "-o", "{tmp}/out"),
        ("orthogonalize", "{model}", "--direction", "{tmp}/three.txt", "-o", "{tmp}/out"),
        ("orthogonalize", "{model}", "--direction", "{tmp}/d.safetensors", "-o", "{model}"),
        ("evaluate", "{tmp}/missing"),
        ("evaluate", "{model}", "--intervention", "ablate"),
        ("evaluate", "{model}", "--harmful", "{tmp}/empty.jsonl"),
        ("push", "{model}", "someone/tiny", "--dry-run"),
        ("push", "{tmp}/missing", "someone/tiny", "--dry-run"),
        ("prompts", "./missing.csv"),
        ("demo", "{tmp}/empty"),
    ],
)
def test_each_bad_input_is_one_line_and_exit_code_one(
    call_main, llama_directory: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "three.txt").write_text("One.\nTwo.\nThree.\n")
    make_direction(mean_difference=torch.randn(32)).save(tmp_path / "d.safetensors")
    make_direction(mean_difference=torch.randn(64)).save(tmp_path / "wide.safetensors")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    result = call_main(*(a.format(tmp=tmp_path, model=llama_directory) for a in arguments))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.error_line
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_an_unexpected_error_is_one_line_too(call_main, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr("abliterate.models.demo.build_demo_model", fail)
    code, out, error = call_main("demo", tmp_path / "x")
    assert (code, out) == (1, "")
    assert (
        error
        == "error: unexpected ZeroDivisionError: division by zero (run again with `abliterate -v ...` for details)\n"
    )
    verbose = call_main("-v", "demo", tmp_path / "x")
    assert verbose.exit_code == 1
    assert "Traceback (most recent call last)" in verbose.stderr
    assert "ZeroDivisionError" in verbose.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_succeeds_ends_well_whatever_stdout_is_encoded_in(
    llama_directory: Path, tmp_path: Path, encoding: str
) -> None:
    make_direction(mean_difference=torch.randn(32)).save(tmp_path / "r.safetensors")
    command = ["orthogonalize", llama_directory, "--direction", tmp_path / "r.safetensors", "-o", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-m", "abliterate", *map(str, command)],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert (done.returncode, b"error" in done.stderr) == (0, False), done.stderr
    assert {"ascii": b"|r\\xb7W|", "latin-1": b"|r\xb7W|"}[encoding] in done.stdout
    assert not any(not line.strip() for line in done.stderr.splitlines())


def test_every_path_knows_the_home_directory(
    call_main, llama_directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A shell expands `--output ~/x`, and leaves `--output=~/x` alone."""
    home, here = tmp_path / "home", tmp_path / "here"
    for directory in (home, here):
        directory.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    make_direction(mean_difference=torch.randn(32)).save(home / "r.safetensors")
    model = Path(shutil.copytree(llama_directory, home / "model")).name
    code, _, error = call_main("orthogonalize", f"~/{model}", "--direction=~/r.safetensors", "--output=~/out")
    assert code == 0, error
    assert call_main("verify", "~/out", "--quick").exit_code == 0
    assert call_main("revert", "~/out", "-o~/restored").exit_code == 0
    assert sorted(path.name for path in home.iterdir()) == ["model", "out", "r.safetensors", "restored"]
    assert list(here.iterdir()) == []
    # Whatever a command takes, this is on the way to it.
    assert all(hasattr(command.callback, "__wrapped__") for command in app.registered_commands)


def test_a_place_that_may_not_be_looked_into_is_no_unexpected_error(
    call_main, llama_directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    is_file = Path.is_file

    def refuse(path: Path) -> bool:
        if path.is_relative_to(llama_directory):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refuse)
    done = call_main("extract", llama_directory, "-o", tmp_path / "r.safetensors")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.error_line.endswith(": Permission denied; check the path and what you may do there")
    assert "unexpected" not in done.error_line


def test_an_interrupt_is_exit_code_130(call_main, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("abliterate.models.demo.build_demo_model", interrupt)
    code, out, error = call_main("demo", tmp_path / "x")
    assert (code, out) == (130, "")
    assert "Traceback" not in error


def test_a_termination_has_its_own_exit_code_in_every_command():
    program = (
        "import os, signal, sys; from abliterate.cli import app; "
        "app.app.command('wait')(lambda: os.kill(os.getpid(), signal.SIGTERM)); "
        "sys.argv = ['abliterate', 'wait']; app.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.returncode == 143
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_stream_that_takes_only_ascii_fails_no_run(llama_directory: Path, tmp_path: Path, options) -> None:
    name = tmp_path / "modèle·"
    llama_directory.rename(name)
    make_direction(mean_difference=torch.ones(32)).save(tmp_path / "r.safetensors")
    command = ["orthogonalize", name, "--direction", tmp_path / "r.safetensors", "-o", tmp_path / "é", *options]
    done = subprocess.run(
        [sys.executable, "-m", "abliterate", *map(str, command)],
        env=os.environ | {"PYTHONIOENCODING": "ascii:strict", "PYTHONPATH": str(SOURCES)},
        check=False,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert (tmp_path / "é" / "abliteration.json").is_file()
    if options:
        assert json.loads(done.stdout)["output"] == str(tmp_path / "é")
