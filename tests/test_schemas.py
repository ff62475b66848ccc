"""What `--json` prints is what docs/schemas says: the files are those of the reports, and the commands keep to them."""

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from abliterate.cli.app import app
from abliterate.cli.output import SCHEMAS
from abliterate.models.demo import DemoReport
from scripts import schemas
from tests.support.command_line import CommandLine
from tests.support.gguf_models import write
from tests.support.refusing_models import refusing_model

AGAIN = "run `python -m scripts.schemas`"
FILES = sorted(schemas.DIRECTORY.glob("*.json"))
PAGE = schemas.DIRECTORY / "README.md"
ANY = ["--kl-threshold", "1e9", "--induce-threshold", "-1e9"]


def test_the_files_are_made_of_the_reports() -> None:
    made = schemas.files()
    assert {path.name for path in FILES} == made.keys(), AGAIN
    for name, text in made.items():
        assert (schemas.DIRECTORY / name).read_text(encoding="utf-8") == text, f"{name} is stale: {AGAIN}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_is_itself_a_schema(path: Path) -> None:
    Draft202012Validator.check_schema(json.loads(path.read_text(encoding="utf-8")))


def test_each_command_has_a_schema_and_a_line_on_the_page() -> None:
    commands = {command.callback.__name__ for command in app.registered_commands if command.callback}
    assert {name.partition(".")[0] for name in SCHEMAS} == {*commands, "error"}, "name it in `cli.output.SCHEMAS`"
    assert commands <= SCHEMAS.keys() == schemas.DOCUMENTS.keys(), "add it to `scripts.schemas.DOCUMENTS`"
    text = PAGE.read_text(encoding="utf-8")
    for name in SCHEMAS:
        assert (schemas.DIRECTORY / f"{name}.json").is_file(), AGAIN
        assert f"[{name}.json]({name}.json)" in text


def test_a_key_more_or_less_does_not_pass() -> None:
    document = {"schema": "abliterate.demo/1", "path": "a", "base_model": "b", "adapter_rank": 8, "n_parameters": 1}
    assert problems({**document, "n_bytes": 2}) == []
    assert len(problems(document)) == 1
    assert len(problems({**document, "n_bytes": 2, "more": 3})) == 1
    assert len(problems({**document, "n_bytes": "2"})) == 1


def problems(document: dict[str, Any]) -> list[str]:
    """Return in what a document is not as its own `schema` says."""
    name = document["schema"].removeprefix("abliterate.").partition("/")[0]
    schema = json.loads((schemas.DIRECTORY / f"{name}.json").read_text(encoding="utf-8"))
    return [f"{each.json_path}: {each.message}" for each in Draft202012Validator(schema).iter_errors(document)]


def test_what_each_command_prints_is_as_its_schema_says(
    call_main: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = refusing_model("wary", tmp_path)
    made.chat.model.save_pretrained("model")
    made.chat.tokenizer.save_pretrained("model")
    monkeypatch.setattr(
        "abliterate.models.demo.build_demo_model",
        lambda *, output, **_: DemoReport(path=output, base_model="b", adapter_rank=8, n_parameters=1, n_bytes=2),
    )
    (tmp_path / "few.txt").write_text("How do I steal a car ?\nTell me how to paint a wall ?\n")
    prompts = ["--harmful", made.harmful, "--harmless", made.harmless]
    few = ["--harmful", "few.txt", "--harmless", "few.txt", "--borderline", "few.txt", "--max-new-tokens", 4]
    printed: dict[str, dict[str, Any]] = {}

    def run(*arguments: object, code: int = 0, stdin: str = "") -> None:
        done = call_main(*arguments, "--json", stdin=stdin)
        assert done.exit_code == code, done.stderr
        document = json.loads(done.stdout)
        assert next(iter(document)) == "schema"
        assert problems(document) == [], arguments[0]
        printed[document["schema"]] = document

    sizes = ["--n-train", 24, "--n-val", 16]
    found = ["extract", "model", *prompts, *sizes]
    run(*found, "-o", "none.safetensors", "--kl-threshold", "-1", code=3)
    run(*found, "-o", "r.safetensors", "--kl-threshold", 5)
    run(*found, "-o", "two.safetensors", *ANY, "--filter", "none", "--rank", 2, "--bootstrap", 2)
    repair = ["extract", "model", "--goal", "repair", *prompts, "--borderline", made.borderline]
    run(*repair, "-o", "repair.safetensors", "--n-train", 48, "--n-val", 24, "--kl-threshold", 5)
    direction = ["--direction", "r.safetensors"]
    small = ["--n-train", 8, "--n-val", 8, "--steps", 4, "--reply-tokens", 4, "--max-refusals", 1]
    run("refine", "model", *direction, *prompts, *small, "-o", "s.json")
    run("plan", "model", "--layers", "0:2")
    run("orthogonalize", "model", *direction, "--strengths", "s.json", "-o", "gentle")
    run("orthogonalize", "model", *direction, "-o", "out")
    run("orthogonalize", "model", *direction, "--dry-run")
    run("orthogonalize", "model", *direction, "--format", "hooks", "-o", "hooks")
    run("verify", "out", *prompts, "--n-prompts", 1, "--dtype", "float32")
    run("verify", "gentle", "--quick")
    run("inspect", "out", *direction, "--base", "model")
    run("push", "out", "me/out", "--dry-run")
    run("revert", "out", "-o", "back")
    run("evaluate", "model", *few, "-o", "earlier.json")
    gate = ["--fail-if", "harmful_refusal_rate>1"]
    ablated = ["evaluate", "model", "--base", "model", *direction, "--intervention", "ablate"]
    run(*ablated, *few, "--against", "earlier.json", *gate)
    audit = ["--n-train", 8, "--n-val", 2, "--n-test", 4, "--screen", 2, "--candidates", 1, "--bootstrap", 2]
    measured = ["--test-harmful", made.harmful, "--test-harmless", made.harmless, "--max-new-tokens", 8]
    run("audit", "model", *prompts, *measured, *audit, "--fail-if", "verdict==robust")
    run("trace", "model", *direction, "--prompts", "few.txt", "--suffix", "wall", "--prompt", "paint a wall")
    run("chat", "model", *direction, "--max-new-tokens", 2, stdin="paint a wall\n/add -1\n/both\nburn a car\n")
    run("convert", write(tmp_path), "converted")
    run("prompts")
    run("prompts", "./few.txt")
    run("demo", "demo")
    run("plan", "./nowhere", code=1)

    assert printed.keys() == {f"abliterate.{name}/{number}" for name, number in SCHEMAS.items()}
    # What is not always there was there, and so was what can be null.
    assert printed["abliterate.evaluate/1"].keys() > {"against", "gates"}
    assert "gates" in printed["abliterate.audit/1"]
    assert printed["abliterate.extract/1"]["together"]
    assert printed["abliterate.extract/1"]["robustness"]
