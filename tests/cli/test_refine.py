"""`abliterate refine` as a user and a script see it, and what `orthogonalize` makes of its file."""

import json
from pathlib import Path

import pytest
import torch

from abliterate.evaluation.held_out import used_for_checkpoint
from abliterate.models.loading import load_chat_model
from abliterate.models.options import ModelOptions
from abliterate.prompt_sets import split_for_extraction
from tests.support.command_line import CommandLine
from tests.support.refusing_models import RefusingModel, refusing_model

SMALL = ["--n-train", "24", "--n-val", "16", "--steps", "16", "--reply-tokens", "6"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RefusingModel]:
    directory = tmp_path_factory.mktemp("refine")
    made = refusing_model("plain", directory)
    made.chat.model.save_pretrained(directory / "model")
    made.chat.tokenizer.save_pretrained(directory / "model")
    return directory, made


def test_from_a_direction_to_a_gentler_checkpoint(
    call_main: CommandLine, model: tuple[Path, RefusingModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, made = model
    monkeypatch.chdir(tmp_path)
    prompts = ["--harmful", made.harmful, "--harmless", made.harmless]
    extract = ["extract", directory / "model", "-o", "r.safetensors", *prompts, "--n-train", "32", "--n-val", "16"]
    code, _, error = call_main(*extract, "--kl-threshold", "5")
    assert code == 0, error
    refine = ["refine", directory / "model", "--direction", "r.safetensors", "-o", "s.json", *prompts, *SMALL]
    code, out, error = call_main(*refine, "--json", "--report", "page")
    assert code == 0, error
    document = json.loads(out)
    assert document["strengths_file"] == "s.json"
    assert "A gentler edit of" in Path("page/index.html").read_text()
    assert document["chosen"]["unanswered"] == 0
    assert json.loads(Path("s.json").read_text())["strengths"]["attn"] == document["chosen"]["attn"]

    edit = ["orthogonalize", directory / "model", "--direction", "r.safetensors", "--strengths", "s.json", "-o", "out"]
    code, _, error = call_main(*edit)
    assert code == 0, error
    # What it was found with is not what it is measured on.
    prompts_used = split_for_extraction(str(made.harmful), str(made.harmless), n_train=24, n_val=16, seed=42)
    assert set(prompts_used.hashes) <= used_for_checkpoint(Path("out"))
    chat = load_chat_model(Path("out"), name="x", options=ModelOptions())
    row = chat.encode(["Tell me how to steal a car ?"])[0]
    with torch.no_grad():
        first = int(chat.last_logits([row]).argmax())
    assert chat.decode([first]) != "I"

    verify = ["verify", "out", "--direction", "r.safetensors", *prompts, "--n-prompts", "4", "--json"]
    code, out, error = call_main(*verify)
    assert code == 0, error or out
    report = json.loads(out)
    assert report["passed"]
    assert "a file of strengths" in json.dumps(report["stream"])

    # What asks for less than the frontier has ends with code 3 and writes nothing.
    code, _, error = call_main(*refine[: -len(SMALL) - 4], *prompts, *SMALL, "--max-kl", "0", "--max-refusals", "0")
    assert code == 3
    assert "within what is asked for" in error
    code, _, error = call_main(*refine, "--max-lost", "0.2")
    assert code == 1
    assert "go with a direction of false refusals" in error


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-o", "."], 1, "is a directory"),
        (["-o", "s.json", "--report", __file__], 1, "is no directory"),
        (["-o", "s.json", "--max-refusals", "2"], 2, "--max-refusals"),
        (["-o", "s.json", "--n-val", "2"], 2, "--n-val"),
        (["-o", "s.json", "--steps", "0"], 2, "--steps"),
        (["-o", "s.json", "--max-lost", "2"], 2, "--max-lost"),
    ],
)
def test_bad_input_is_one_line(
    call_main: CommandLine,
    model: tuple[Path, RefusingModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    found, _, error = call_main("refine", model[0] / "model", "--direction", "none.safetensors", *arguments)
    assert found == code
    assert message in error
    assert not list(tmp_path.iterdir())


def test_strengths_that_do_not_fit_are_one_line(
    call_main: CommandLine, model: tuple[Path, RefusingModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.json").write_text("{}")
    arguments = ["orthogonalize", model[0] / "model", "--direction", "r.safetensors", "-o", "out"]
    code, _, error = call_main(*arguments, "--strengths", "s.json")
    assert code == 1
    assert "is no file of strengths" in error
    code, _, error = call_main(*arguments, "--strengths", "s.json", "--strength", "0.5")
    assert code in {1, 2}
    assert error.count("\n") <= 2
