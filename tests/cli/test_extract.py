"""`abliterate extract` as a user and a script see it."""

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from abliterate.directions import load_direction, make_direction
from abliterate.extraction.choosing import Chooser
from abliterate.models.chat_model import ChatModel
from abliterate.models.loading import load_chat_model
from abliterate.models.options import ModelOptions
from abliterate.prompt_sets import split_for_extraction
from tests.support.command_line import CommandLine, Outcome

TINY = ["--n-train", "8", "--n-val", "3", "--no-filter", "--refusal-token", "I"]
ANY = ["--kl-threshold", "1e9", "--induce-threshold", "-1e9"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, call_main: CommandLine, llama_directory: Path, tmp_path: Path):
    def call(*arguments: object, command: str = "extract") -> Outcome:
        monkeypatch.chdir(tmp_path)
        return call_main(command, llama_directory, *arguments)

    return call


def recorded_means(directory: Path, layer: int, position: int) -> list[np.ndarray]:
    """Per-prompt activations through `output_hidden_states`, harmful and harmless."""
    prompts = split_for_extraction("bundled", "bundled", n_train=8, n_val=3, seed=42)
    chat = load_chat_model(directory, name="x", options=ModelOptions())
    with torch.inference_mode():
        return [
            np.stack(
                [
                    chat.model(torch.tensor([row]), output_hidden_states=True)
                    .hidden_states[layer][0, position]
                    .double()
                    .numpy()
                    for row in chat.encode(part.texts)
                ]
            )
            for part in (prompts.harmful_train, prompts.harmless_train)
        ]


def test_projected_and_winsorised_together(run, llama_directory: Path, tmp_path: Path) -> None:
    options = ("--variant", "projected", "--winsorize", "0.2", "--json", "--report", tmp_path / "report")
    code, out, error = run("-o", "r.safetensors", *TINY, *ANY, *options)
    assert code == 0, error
    document = json.loads(out)
    assert document["recipe"] == {"variant": "projected", "winsorize": 0.2}
    assert document["direction_files"] == [document["direction_file"]] == ["r.safetensors"]
    direction = load_direction(tmp_path / "r.safetensors")
    assert direction.metadata["recipe"] == document["recipe"]
    assert (direction.metadata["number"], direction.metadata["rank"]) == (1, 1)
    chosen = document["selected"]
    means = [
        np.clip(values, *np.quantile(values, [0.2, 0.8], axis=0)).mean(0)
        for values in recorded_means(llama_directory, chosen["layer"], chosen["position"])
    ]
    unit = means[1] / np.linalg.norm(means[1])
    expected = means[0] - means[1] - ((means[0] - means[1]) @ unit) * unit
    np.testing.assert_allclose(direction.mean_difference.double().numpy(), expected, atol=1e-4)
    page = (tmp_path / "report" / "index.html").read_text()
    assert "difference in means without the harmless mean, winsorised at 0.2" in page
    scores = json.loads((tmp_path / "report" / "scores.json").read_text())
    assert scores["recipe"].endswith("winsorised at 0.2")


def test_the_table_names_the_recipe_and_the_default_is_the_papers(run) -> None:
    code, out, _ = run("-o", "r.safetensors", *TINY, *ANY)
    assert code == 0
    assert "candidates: difference in means;" in " ".join(out.split())


@pytest.mark.parametrize("exhaustive", [(), ("--exhaustive",)])
def test_rank_writes_files_that_orthogonalize_projects_together(run, tmp_path: Path, exhaustive) -> None:
    code, out, error = run(
        "-o", "r.safetensors", *TINY, *ANY, "--rank", 3, "--json", "--report", tmp_path / "report", *exhaustive
    )
    assert code == 0, error
    document = json.loads(out)
    names = [f"r.{i}.safetensors" for i in (1, 2, 3)]
    assert document["direction_files"] == names
    assert not (tmp_path / "r.safetensors").exists()
    directions = [load_direction(tmp_path / name) for name in names]
    chosen = [document["selected"], *document["further"]]
    for number, (direction, score) in enumerate(zip(directions, chosen, strict=True), 1):
        assert (direction.metadata["number"], direction.metadata["rank"]) == (number, 3)
        assert (direction.metadata["position"], direction.metadata["layer"]) == (score["position"], score["layer"])
        candidate = direction.candidates[score["position"], score["layer"]]
        torch.testing.assert_close(direction.vector, candidate / candidate.norm())
    assert [score["bypass"] for score in chosen] == sorted(score["bypass"] for score in chosen)
    vectors = torch.stack([direction.vector for direction in directions])
    assert torch.linalg.svdvals(vectors).min() > 0.2
    page = (tmp_path / "report" / "index.html").read_text()
    assert "direction 3" in page
    assert "all together" in page
    given = [part for name in names for part in ("--direction", name)]
    code, out, error = run(*given, "-o", "edited", "--json", command="orthogonalize")
    assert code == 0, error
    assert json.loads(out)["subspace"]["k"] == 3
    base, edited = (load_chat_model(tmp_path / name, name=name, options=ModelOptions()) for name in (
        "tiny-llama", "edited",
    ))  # fmt: skip
    basis = torch.linalg.qr(vectors.T).Q.T
    rows = base.encode(["How do locks work?"])
    states = {
        name: torch.stack(
            chat.model(torch.tensor(rows), output_hidden_states=True).hidden_states[:-1]
        ).detach()  # the last one is behind the final norm
        for name, chat in (("base", base), ("edited", edited))
    }
    assert (states["edited"] @ basis.T).abs().max() < 1e-4 < 0.1 < (states["base"] @ basis.T).abs().max()


def test_the_scores_of_all_together_are_those_of_the_ablated_model(run, llama_directory: Path, tmp_path: Path) -> None:
    from abliterate.extraction.refusal import refusal_metric
    from abliterate.extraction.scoring import kl_divergence
    from abliterate.models.hooks import ablate_direction

    code, out, _ = run("-o", "r.safetensors", *TINY, *ANY, "--rank", 2, "--json")
    assert code == 0
    document = json.loads(out)
    prompts = split_for_extraction("bundled", "bundled", n_train=8, n_val=3, seed=42)
    chat = load_chat_model(llama_directory, name="x", options=ModelOptions())
    token = [document["refusal_tokens"][0]["token_id"]]
    first, second = (load_direction(tmp_path / f"r.{i}.safetensors").vector for i in (1, 2))
    rest = second - (second @ first) * first
    harmful, harmless = (chat.encode(part.texts) for part in (prompts.harmful_validation, prompts.harmless_validation))
    base = chat.last_logits(harmless)
    with ablate_direction(chat, first), ablate_direction(chat, rest):
        bypass = refusal_metric(chat.last_logits(harmful), token_ids=token).mean()
        kl = kl_divergence(base, chat.last_logits(harmless)).mean()
    assert document["together"]["bypass"] == pytest.approx(float(bypass), abs=1e-4)
    assert document["together"]["kl"] == pytest.approx(float(kl), abs=1e-4)


def test_more_directions_than_are_independent_is_exit_code_three(run, tmp_path: Path) -> None:
    code, _, error = run("-o", "r.safetensors", *TINY, *ANY, "--rank", 30)
    assert code == 3
    assert "independent of each other; ask for fewer with --rank" in error
    assert not list(tmp_path.glob("r*.safetensors"))


def test_other_recipes_are_not_scored_from_saved_work(run, tmp_path: Path) -> None:
    impossible = ("--kl-threshold", "1e-9", "--induce-threshold", "-1e9")
    assert run("-o", "r.safetensors", *TINY, *impossible)[0] == 3
    code, _, error = run("-o", "r.safetensors", *TINY, *impossible, "--variant", "projected")
    assert code == 3
    assert "starting anew: recipe changed" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--winsorize", "0.5"), "--winsorize 0.5"), (("--winsorize", "-0.1"), "--winsorize -0.1")],
)
def test_quantiles_that_leave_nothing_are_refused(run, options, message: str) -> None:
    code, out, error = run("-o", "r.safetensors", *TINY, *options)
    assert (code, out) == (1, "")
    assert message in error


def test_bootstrap_is_in_the_report_the_file_the_page_and_the_table(run, tmp_path: Path) -> None:
    thresholds = ("--kl-threshold", "1e9", "--induce-threshold", "-12")
    options = ("-o", "r.safetensors", *TINY, *thresholds, "--bootstrap", 50)
    code, out, error = run(*options, "--json", "--report", tmp_path / "report")
    assert code == 0, error
    document = json.loads(out)
    found = document["robustness"]
    assert found["n_resamples"] == 50
    assert -1 <= found["low_cosine"] <= found["mean_cosine"] <= found["high_cosine"] <= 1
    assert sum(winner["share"] for winner in found["winners"]) + found["share_none"] == pytest.approx(1)
    assert document["exhaustive"] is True
    assert sum(score["kl"] is not None for score in document["scores"]) == document["n_scored"] > 1
    assert load_direction(tmp_path / "r.safetensors").metadata["robustness"] == found
    assert "How much hangs on the prompts" in (tmp_path / "report" / "index.html").read_text()
    code, out, _ = run(*options)
    assert code == 0
    assert "50 resamplings of the prompts" in out
    assert f"mean {found['mean_cosine']:.4f}" in out


def test_without_bootstrap_nothing_is_resampled(run, tmp_path: Path) -> None:
    code, out, _ = run("-o", "r.safetensors", *TINY, *ANY, "--json")
    assert (code, json.loads(out)["robustness"]) == (0, None)


def test_streamed_layers_choose_what_the_model_in_memory_chooses(run, tmp_path: Path) -> None:
    options = (*TINY, "--kl-threshold", "1e9", "--induce-threshold", "-12", "--json")
    (code, out, _), (streamed_code, streamed_out, error) = (
        run("-o", "a.safetensors", *options),
        run("-o", "b.safetensors", *options, "--stream-layers"),
    )
    assert (code, streamed_code) == (0, 0)
    one, other = (json.loads(text)["selected"] for text in (out, streamed_out))
    assert (one["position"], one["layer"]) == (other["position"], other["layer"])
    assert "the weights were read 4 times" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors", "tiny-llama"]


def test_places_that_cannot_be_written_are_found_before_the_work(run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("abliterate.extraction.run.extract_direction", lambda **_: pytest.fail("the work was begun"))
    (tmp_path / "results").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    for arguments, message in (
        (("-o", "results"), "error: results: is a directory; give -o a file"),
        (("-o", "r.safetensors", "--report", "notes.txt"), "error: notes.txt: is no directory"),
        (("-o", "notes.txt"), "error: notes.txt: exists and is no direction file"),
        (("-o", "tiny-llama/model.safetensors"), "error: tiny-llama/model.safetensors: exists and is no direction"),
        (("-o", "notes.txt", "--goal", "repair"), "error: notes.txt: exists and is no direction file"),
        (("-o", "notes.txt/r.safetensors"), "error: notes.txt/r.safetensors: cannot be written: Not a directory"),
        (("-o", "notes.txt/r.safetensors", "--goal", "repair"), "error: notes.txt/r.safetensors: cannot be written"),
        (("-o", "r.safetensors", "--report", "notes.txt/report"), "error: notes.txt/report: cannot be written"),
    ):
        code, out, error = run(*arguments, *TINY, *ANY)
        assert (code, out) == (1, "")
        assert error.startswith(message)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("goal", ["remove", "repair"])
def test_nothing_but_a_direction_file_is_replaced(
    run, llama_directory: Path, tmp_path: Path, monkeypatch, goal
) -> None:
    for name in ("run.extract_direction", "repair.extract_repair"):
        monkeypatch.setattr(f"abliterate.extraction.{name}", lambda **_: pytest.fail("the work was begun"))
    weights = llama_directory / "model.safetensors"
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(weights)
    before = {path: path.read_bytes() for path in (weights, tmp_path / "notes.txt")}
    for name, message in (
        (weights, "exists and is no direction file, so it is not replaced; choose another -o"),
        ("link", "exists and is no direction file"),
        ("notes.txt", "exists and is no direction file"),
        (llama_directory / "r.safetensors", "lies in the model's own directory"),
        (llama_directory / "new" / "r.safetensors", "lies in the model's own directory"),
        (llama_directory, f"give -o a file to write, such as {tmp_path / 'refusal.safetensors'}"),
    ):
        result = run("-o", name, *TINY, *ANY, "--goal", goal)
        assert (result.exit_code, result.stdout) == (1, "")
        assert message in result.error_line
    assert before == {path: path.read_bytes() for path in before}
    assert not (llama_directory / "new").exists()


def test_an_older_direction_file_is_replaced(run, tmp_path: Path) -> None:
    make_direction(mean_difference=torch.ones(7)).save(tmp_path / "r.safetensors")
    code, _, error = run("-o", "r.safetensors", *TINY, *ANY)
    assert code == 0, error
    assert load_direction(tmp_path / "r.safetensors").d_model == 32


def test_a_second_extraction_to_one_file_is_refused_in_one_line(run, tmp_path: Path, monkeypatch) -> None:
    results = []
    choose = Chooser.choose

    def meanwhile(self):
        if not results:
            results.append(None)
            results[0] = run("-o", "r.safetensors", *TINY, *ANY, "--seed", "7")
        return choose(self)

    monkeypatch.setattr(Chooser, "choose", meanwhile)
    code, _, error = run("-o", "r.safetensors", *TINY, *ANY)
    assert code == 0, error
    assert (results[0].exit_code, results[0].stdout) == (1, "")
    assert "r.safetensors.work: another run is working there; wait for that one" in results[0].error_line
    assert load_direction(tmp_path / "r.safetensors").metadata["seed"] == 42
    assert not (tmp_path / "r.safetensors.work").exists()


def test_prompts_that_are_rendered_otherwise_are_recorded_anew(run, llama_directory: Path) -> None:
    """As by a template that writes today's date."""
    impossible = ("--kl-threshold", "1e-9", "--induce-threshold", "-1e9")
    assert run("-o", "r.safetensors", *TINY, *impossible)[0] == 3
    assert "continuing: 4 recordings" in run("-o", "r.safetensors", *TINY, *impossible)[2]
    render = ChatModel.encode
    dated = mock.patch.object(ChatModel, "encode", lambda chat, prompts: [[5, *row] for row in render(chat, prompts)])
    with dated:
        error = run("-o", "r.safetensors", *TINY, *impossible)[2]
    assert "starting anew: rendered prompts changed" in error


@pytest.mark.parametrize("what", ["direction", "report"])
def test_what_cannot_be_saved_is_not_lost(run, tmp_path: Path, monkeypatch, what: str) -> None:
    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device", "scores.json")

    where = {
        "direction": "abliterate.directions.write_file",
        "report": "abliterate.extraction.score_report.write_json",
    }
    with monkeypatch.context() as patch:
        patch.setattr(where[what], full)
        code, out, error = run("-o", "r.safetensors", *TINY, *ANY, "--report", "report")
    assert (code, out) == (1, "")
    assert "error: " in error
    assert "No space left on device; choose another" in error
    code, _, error = run("-o", "r.safetensors", *TINY, *ANY, "--report", "report")
    assert code == 0, error
    assert "continuing: 4 recordings" in error
    assert not (tmp_path / "r.safetensors.work").exists()


def test_damaged_weights_are_said_to_be(run, llama_directory: Path) -> None:
    weights = llama_directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, _, error = run("-o", "r.safetensors", *TINY, *ANY)
    assert code == 1
    assert "the weights are damaged or incomplete" in error.splitlines()[-1]
    assert sum(line.startswith("error:") for line in error.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--filter", "words"], 2, "'words' is not one of"),
        (["--confirm", "-1"], 2, "--confirm"),
        (["--filter", "replies", "--stream-layers"], 1, "--filter replies cannot go with --stream-layers"),
        (["--filter", "auto"], 1, "does not refuse"),
        (["--filter", "replies"], 1, "by their replies, 0 of 8 harmful training prompts are refused"),
    ],
)
def test_ways_of_filtering_that_cannot_be_are_refused_in_one_line(run, options, code, says) -> None:
    result = run("-o", "r.safetensors", "--n-train", "8", "--n-val", "3", *options)
    assert result.exit_code == code
    assert result.stdout == ""
    assert says in " ".join(result.stderr.split())
    assert not Path("r.safetensors").exists()


def test_what_was_no_filter_is_filter_none(run, tmp_path: Path) -> None:
    for name, option in (("a", ["--no-filter"]), ("b", ["--filter", "none"])):
        assert run("-o", name, "--n-train", "8", "--n-val", "3", "--refusal-token", "I", *ANY, *option).exit_code == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_on_exit_3_the_command_that_accepts_the_nearest_is_shown(run, tmp_path: Path) -> None:
    result = run("-o", "r.safetensors", *TINY, "--kl-threshold", "1e-9", "--induce-threshold", "-1e9", "--json")
    assert result.exit_code == 3
    document = json.loads(result.stdout)
    first = document["nearest"][0]
    assert set(first) == {"candidate", "failed", "beyond", "distance"}
    assert first["beyond"]["kl"] > 0
    assert set(document["best"]) == {"bypass", "induce", "kl"}
    again = run("-o", "r.safetensors", *TINY, "--induce-threshold", "-1e9", *document["accepting"])
    assert again.exit_code == 0
    plain = run("-o", "s.safetensors", *TINY, "--kl-threshold", "1e-9", "--induce-threshold", "-1e9")
    assert "the nearest is accepted by: abliterate extract" in " ".join(plain.stdout.split())
    assert (tmp_path / "r.safetensors").exists()
