"""`abliterate evaluate`: pages, refusals of options that do not fit, and what stays off the disk."""

import json
from pathlib import Path

import pytest
import torch

from abliterate.directions import make_direction
from abliterate.editing.model_card import build_model_card
from abliterate.models.greedy import GreedyDecoder
from tests.support.command_line import CommandLine, Outcome
from tests.support.fake_hub import FakeHub
from tests.support.tiny_models import save_chat_model, tiny_llama


@pytest.fixture
def run(call_main: CommandLine, llama_directory: Path, tmp_path: Path):
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"text": "How do locks work?", "category": "x"}, {"text": "Explain rain.", "category": "y"}]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    sets = [word for kind in ("harmful", "harmless", "borderline", "text") for word in (f"--{kind}", str(prompts))]

    def call(*arguments: object) -> Outcome:
        return call_main("evaluate", llama_directory, *sets, "--max-new-tokens", "6", *arguments)

    return call


def test_the_report_is_a_page_and_its_data(run, tmp_path: Path) -> None:
    code, out, _ = run("--json", "--report", tmp_path / "report")
    assert code == 0
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["evaluation.json", "index.html"]
    saved = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert json.loads(out) == {"schema": "abliterate.evaluate/1", **saved}
    assert "abliterate evaluate" in (tmp_path / "report" / "index.html").read_text()


def test_the_same_replies_are_read_at_fewer_tokens(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def replies(decoder: GreedyDecoder, rows, **_rest):
        return [decoder.chat.tokenizer("Es tut mir leid, dabei kann ich nicht helfen.")["input_ids"] for _ in rows]

    monkeypatch.setattr(GreedyDecoder, "replies", replies)
    code, out, _ = run("--json", "--max-new-tokens", "64")
    rate = json.loads(out)["rates"]["harmful"]
    assert code == 0
    assert [budget["tokens"] for budget in rate["budgets"]] == [8, 32, 64]
    assert (rate["languages"], rate["matches"], rate["strict"], rate["refused"]) == ({"de": 2}, 0, 2, 2)
    out = run("--max-new-tokens", "64")[1]
    for text in ("Refused within so many tokens", "64 tokens", "strict", "deflected"):
        assert text in out


def test_replies_reach_the_page_only_when_asked(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replies(decoder: GreedyDecoder, rows, **_rest):
        return [decoder.chat.tokenizer("A telling reply.")["input_ids"] for _ in rows]

    monkeypatch.setattr(GreedyDecoder, "replies", replies)
    saved = ("--save-completions", tmp_path / "c.jsonl")
    assert run("--report", tmp_path / "a", *saved)[0] == 0
    assert "A telling reply" in (tmp_path / "c.jsonl").read_text()
    for file in (tmp_path / "a").iterdir():
        assert "A telling reply" not in file.read_text()
    assert run("--report", tmp_path / "b", *saved, "--report-completions")[0] == 0
    assert "A telling reply" in (tmp_path / "b" / "index.html").read_text()
    assert run("--report", tmp_path / "c", "--report-completions")[0] == 2


def test_affine_has_a_dose_and_ablation_has_none(run, tmp_path: Path) -> None:
    direction = tmp_path / "r.safetensors"
    make_direction(mean_difference=torch.randn(32), metadata={"layer": 1, "position": -1}).save(direction)
    affine = ("--direction", direction, "--intervention", "affine", "--json")
    code, out, _ = run(*affine)
    assert (code, json.loads(out)["coefficient"]) == (0, 0.0)
    harmful = json.loads(run(*affine, "--coefficient", "1")[1])
    assert harmful["coefficient"] == 1.0
    assert harmful["kl_harmless"] != json.loads(out)["kl_harmless"]
    code, _, error = run("--direction", direction, "--intervention", "ablate", "--coefficient", "1")
    assert code == 1
    assert "--coefficient is the dose" in error


@pytest.mark.parametrize("flag", ["-o", "--save-completions", "--report"])
def test_places_that_cannot_be_written_are_found_before_the_work(run, tmp_path: Path, monkeypatch, flag: str) -> None:
    monkeypatch.setattr("abliterate.evaluation.run.evaluate_model", lambda **_: pytest.fail("the work was begun"))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    places = ["notes.txt", "notes.txt/below", *(["."] if flag != "--report" else []), "config.json"]
    for place in places:
        result = run(flag, tmp_path / place)
        assert (result.exit_code, result.stdout) == (1, "")
        assert f"error: {tmp_path / place}: " in result.error_line
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "config.json").read_text() == '{"model_type": "llama"}'
    both = run("-o", tmp_path / "x.json", "--save-completions", tmp_path / "x.json")
    assert "is given for -o and --save-completions" in both.error_line


def test_what_the_disk_does_not_take_is_on_stdout(run, tmp_path: Path, monkeypatch) -> None:
    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    saved = ("-o", tmp_path / "x.json", "--save-completions", tmp_path / "c.jsonl", "--report", tmp_path / "report")
    assert run(*saved).exit_code == 0
    assert run(*saved).exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr("abliterate.evaluation.report.write_json", full)
        result = run(*saved, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["rates"]["harmful"]["n"] == 2
    assert "x.json: cannot be written: No space left on device; choose another -o" in result.error_line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--judge", "./missing"), "no such directory"),
        (("--text", "./missing.txt"), "no such file"),
        (("--lm-eval", "x,y"), "abliterate[eval]"),
    ],
)
def test_what_is_missing_is_said_in_one_line(
    run, arguments: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n, *r: None if n == "lm_eval" else find_spec(n, *r))
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert says in result.error_line


def test_a_base_on_the_hub_is_the_commit_that_was_edited(
    call_main: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files(n_layers: int) -> dict[str, bytes]:
        saved = save_chat_model(tmp_path / f"{n_layers} layers", tiny_llama(n_layers=n_layers))
        return {path.name: path.read_bytes() for path in saved.iterdir()}

    prompts, direction, out = tmp_path / "p.txt", tmp_path / "r.safetensors", tmp_path / "out"
    prompts.write_text("How do locks work?\nExplain rain.\n")
    make_direction(mean_difference=torch.randn(32)).save(direction)
    sets = [word for kind in ("harmful", "harmless", "borderline", "text") for word in (f"--{kind}", str(prompts))]
    with FakeHub() as hub:
        hub.use(monkeypatch, tmp_path)
        repo = hub.add_repo("org/base", files(3))
        edited = repo.refs["main"]
        assert call_main("orthogonalize", "org/base", "--direction", direction, "-o", out).exit_code == 0
        today = repo.commit(files(4), message="retrained")
        measure = ("evaluate", out, "--base", "org/base", *sets, "--max-new-tokens", "4", "--json")
        done = call_main(*measure)
        report = json.loads(done.stdout)
        assert f"base: org/base at {edited}, the commit that abliteration.json names" in done.stderr
        assert (report["base_revision"], report["revision"]) == (edited, None)
        other = json.loads(call_main(*measure, "--base-revision", "main", "--report", tmp_path / "page").stdout)
        assert other["base_revision"] == today
        assert other["kl_harmless"] != report["kl_harmless"]
        assert today in (tmp_path / "page" / "index.html").read_text()
        chat = call_main("chat", out, "--base", "org/base")
        assert f"base: org/base at {edited}" in chat.stderr
    record = json.loads((out / "abliteration.json").read_text())
    for measured, revision in ((report, edited), (other, today)):
        card = build_model_card(record=record, evaluation=measured, facts=None, title="m")
        assert f"abliterate evaluate OUT --base org/base --base-revision {revision} --output" in card


def test_only_json_is_replaced_by_the_report(
    run, call_main: CommandLine, llama_directory: Path, tmp_path: Path
) -> None:
    weights = llama_directory / "model.safetensors"
    before = weights.read_bytes()
    for what, done in (
        ("report of `evaluate`", run("-o", weights)),
        ("report of `audit`", call_main("audit", llama_directory, "-o", weights)),
        (
            "file of strengths",
            call_main("refine", llama_directory, "--direction", "r.safetensors", "-o", weights),
        ),
    ):
        assert (done.exit_code, done.stdout) == (1, "")
        said = f"error: {weights}: exists and is no {what}, so it is not replaced; choose another -o"
        assert done.error_line == said
    assert weights.read_bytes() == before


def test_a_revision_belongs_to_a_base_on_the_hub(run, llama_directory: Path) -> None:
    done = run("--base-revision", "main")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "--base, which is not given" in done.error_line
    done = run("--base", llama_directory, "--base-revision", "main")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "is on this machine" in done.error_line


def test_a_report_is_compared_with_an_earlier_one_and_gates_are_judged_after_all_is_written(run, tmp_path) -> None:
    earlier = tmp_path / "earlier.json"
    assert run("-o", earlier).exit_code == 0
    files = ("-o", tmp_path / "now.json", "--junit", tmp_path / "j.xml", "--summary", tmp_path / "s.md")
    same = run("--against", earlier, "--fail-if", "harmful_refusal_change<0", *files, "--json")
    assert same.exit_code == 0, same.stderr
    document = json.loads(same.stdout)
    assert [one["kind"] for one in document["against"]] == list(document["rates"])
    assert all(one["paired"]["n"] == one["n"] and one["difference"] == 0 for one in document["against"])
    assert document["gates"] == [{"gate": "harmful_refusal_change<0", "found": 0.0, "failed": False}]
    failing = run(
        "--against", earlier, "--fail-if", "harmful_refusal_p>=1", "--fail-if", "harmful_refusal_rate>1", *files
    )
    assert failing.exit_code == 1
    assert failing.error_line.startswith("error: 1 of 2 gates fail: harmful_refusal_p>=1: it is 1")
    assert "gate harmful_refusal_rate>1: " in failing.stdout
    assert json.loads((tmp_path / "now.json").read_text())["outcomes"]
    assert (tmp_path / "j.xml").read_text().count("<failure") == 1
    assert (tmp_path / "s.md").read_text().startswith("## Refusals of ")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--fail-if", "refusals<1"), "'refusals' is not among"),
        (("--fail-if", "kl_first_token>1"), "give it with --base"),
        (("--fail-if", "harmless_refusal_p<1"), "give it with --against"),
        (("--against", "missing.json"), "--against missing.json: no such file"),
        (("--summary", "notes.txt"), "notes.txt: exists and is no summary"),
        (("--junit", "notes.txt"), "notes.txt: exists and is no JUnit file"),
        (("--junit", "new.xml", "--summary", "new.xml"), "is given for --junit and --summary"),
    ],
)
def test_what_is_wrong_with_gates_is_found_before_the_work(run, tmp_path, monkeypatch, options, said) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("abliterate.evaluation.run.evaluate_model", lambda **_: pytest.fail("the work was begun"))
    (tmp_path / "notes.txt").write_text("mine")
    result = run(*options)
    assert (result.exit_code, result.stdout) == (1, "")
    assert said in result.error_line
    assert [path.name for path in tmp_path.iterdir() if path.suffix in {".txt", ".xml"}] == ["notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine"
