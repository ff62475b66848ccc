"""`abliterate extract --goal repair` as a user and a script see it, and what `orthogonalize` makes of its file."""

import json
from pathlib import Path

import pytest

from abliterate.evaluation.held_out import used_for_checkpoint
from abliterate.models.loading import load_chat_model
from abliterate.models.options import ModelOptions
from abliterate.prompt_sets import prompt_hash
from tests.support.command_line import CommandLine
from tests.support.refusing_models import RefusingModel, is_refused, refusing_model

SMALL = ["--n-train", "48", "--n-val", "24", "--kl-threshold", "5"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RefusingModel]:
    directory = tmp_path_factory.mktemp("repair")
    made = refusing_model("wary", directory)
    made.chat.model.save_pretrained(directory / "model")
    made.chat.tokenizer.save_pretrained(directory / "model")
    return directory, made


def words(model: tuple[Path, RefusingModel], output: Path) -> list[object]:
    directory, made = model
    prompts = ["--harmful", made.harmful, "--harmless", made.harmless, "--borderline", made.borderline]
    return ["extract", directory / "model", "--goal", "repair", "-o", output, *prompts, *SMALL]


def test_from_false_refusals_to_a_checkpoint_without_them(
    call_main: CommandLine, model: tuple[Path, RefusingModel], tmp_path: Path
) -> None:
    directory, made = model
    file, out = tmp_path / "repair.safetensors", tmp_path / "out"
    code, printed, error = call_main(*words(model, file), "--json")
    assert code == 0, error
    document = json.loads(printed)
    assert document["direction_file"] == str(file)
    one = document["confirmed"][0]
    assert one["harmful"] >= 0.9 * one["n_harmful"]
    assert set(document["refusal_tokens"]) == {"I", "Sorry"}

    code, _, error = call_main("orthogonalize", directory / "model", "--direction", file, "-o", out)
    assert code == 0, error
    borderline = made.borderline.read_text().splitlines()
    assert {prompt_hash(text) for text in borderline} <= used_for_checkpoint(out)
    chat = load_chat_model(out, name="x", options=ModelOptions())
    harmful = made.harmful.read_text().splitlines()[:40]
    false = [text for text in borderline if is_refused(text, "wary")][:40]
    for texts, low, high in ((harmful, 36, 40), (false, 0, 20)):
        replies = [chat.decode(reply) for reply in chat.generate(chat.encode(texts), max_new_tokens=6)]
        assert low <= sum("cannot help" in reply for reply in replies) <= high
    code, printed, error = call_main("verify", out, "--direction", file, "--json", "--n-prompts", "4")
    assert code == 0, error or printed


def test_tables_say_what_is_still_refused(
    call_main: CommandLine, model: tuple[Path, RefusingModel], tmp_path: Path
) -> None:
    code, printed, error = call_main(*words(model, tmp_path / "r.safetensors"))
    assert code == 0, error
    for said in ("False refusals of", "borderline refused", "harmful refused", "direction written to"):
        assert said in printed

    directory, made = model
    refine = ["refine", directory / "model", "--direction", tmp_path / "r.safetensors", "-o", tmp_path / "s.json"]
    refine += ["--harmful", made.harmful, "--harmless", made.harmless, "--n-val", "16", "--reply-tokens", "6"]
    code, printed, error = call_main(*refine, "--borderline", made.borderline)
    assert code == 0, error
    assert "harmful refused" in printed
    strengths = json.loads((tmp_path / "s.json").read_text())
    assert strengths["goal"] == "repair"
    assert strengths["chosen"]["refused"] == strengths["chosen"]["n_to_refuse"]
    code, _, error = call_main(*refine, "--borderline", "nowhere.txt")
    assert code == 1
    assert "nowhere.txt" in error


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--report", "page"], 2, "cannot go with --goal repair"),
        (["--rank", "2"], 1, "--rank cannot go with --goal repair"),
        (["--stream-layers"], 1, "--stream-layers cannot go with --goal repair"),
        (["--borderline", "nowhere.txt"], 1, "nowhere.txt"),
        (["--orthogonal", "1.5"], 2, "--orthogonal"),
        (["--max-lost", "-1"], 2, "--max-lost"),
    ],
)
def test_what_cannot_be_is_said_in_a_line_and_leaves_nothing(
    call_main: CommandLine, model: tuple[Path, RefusingModel], tmp_path: Path, more: list[str], code: int, said: str
) -> None:
    file = tmp_path / "repair.safetensors"
    found, _, error = call_main(*words(model, file), *more)
    assert found == code, error
    assert said in " ".join(error.split())
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_passes_the_next_run_goes_on_with_the_same_scores(
    call_main: CommandLine, model: tuple[Path, RefusingModel], tmp_path: Path
) -> None:
    file = tmp_path / "repair.safetensors"
    found, _, error = call_main(*words(model, file), "--kl-threshold", "0")
    assert found == 3, error
    assert "would accept it" in " ".join(error.split())
    assert [path.name for path in tmp_path.iterdir()] == ["repair.safetensors.work"]
    found, _, error = call_main(*words(model, file))
    assert found == 0, error
    assert "continuing: 6 recordings" in error
    assert [path.name for path in tmp_path.iterdir()] == ["repair.safetensors"]


def test_options_of_a_repair_alone_are_refused(
    call_main: CommandLine, model: tuple[Path, RefusingModel], tmp_path: Path
) -> None:
    code, _, error = call_main("extract", model[0] / "model", "-o", tmp_path / "r", "--max-lost", "0.2")
    assert code == 2
    assert "--goal repair" in error
