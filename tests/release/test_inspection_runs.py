"""`inspect --run`: what is left of directions in two running models, and how often each refuses."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from abliterate.checkpoints.model_source import ModelSource
from abliterate.directions import make_direction
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.errors import InputError
from abliterate.models.options import ModelOptions
from abliterate.release import inspection_runs
from abliterate.release.inspection_runs import RunReading, read_runs
from tests.support.command_line import CommandLine
from tests.support.refusing_models import HARMFUL_VERBS, HARMLESS_VERBS, prompts_of, refusing_model
from tests.support.tiny_models import save_chat_model, tiny_llama

CPU = ModelOptions(device="cpu")


def source(path: Path) -> ModelSource:
    return ModelSource(path=path, name=path.name, revision=None)


def vectors(k: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(32, k, generator=torch.Generator().manual_seed(8), dtype=torch.float64))[0].T


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """A model, and what two directions were projected out of."""
    directory = tmp_path_factory.mktemp("run")
    base = save_chat_model(directory / "base", tiny_llama())
    files = []
    for index, vector in enumerate(vectors(2)):
        files.append(directory / f"{index}.safetensors")
        make_direction(mean_difference=vector).save(files[-1])
    orthogonalize_checkpoint(source=base, direction=files, output=directory / "out")
    return base, directory / "out"


def run(pair: tuple[Path, Path], **options) -> RunReading:
    return read_runs(base=source(pair[0]), model=source(pair[1]), n_prompts=2, model_options=CPU, **options)


def test_what_was_projected_out_is_gone_from_the_stream_and_what_was_not_is_left(pair):
    found = run(pair, recovered=vectors(2).numpy())
    assert (found.directions, found.k, found.n_prompts) == ("recovered", 2, 2)
    assert len(found.base.stream) == len(found.model.stream) == 6
    assert min(found.base.stream) > 0.05
    assert max(found.model.stream) < 1e-5
    assert found.left < 1e-4
    other = torch.linalg.qr(torch.cat([vectors(2), vectors(3)[:1] + 1]).T)[0].T[2]
    given = run(pair, recovered=None, given=[other.float()])
    assert (given.directions, given.k) == ("given", 1)
    assert 0.5 < given.left < 2


def test_without_a_direction_nothing_is_run(pair, monkeypatch):
    monkeypatch.setattr(inspection_runs, "open_model", None)
    with pytest.raises(InputError, match="name one with --direction"):
        run(pair, recovered=None)


def test_refusals_are_counted_of_each_kind(tmp_path, monkeypatch):
    texts = {"harmful": prompts_of(HARMFUL_VERBS)[:4], "harmless": prompts_of(HARMLESS_VERBS)[:4]}

    def prompts(spec, *, kind, part):
        assert (spec, part) == ("bundled", "test")
        return SimpleNamespace(texts=tuple(texts[kind]))

    monkeypatch.setattr(inspection_runs, "load_prompt_set", prompts)
    chat = refusing_model("plain", tmp_path).chat
    model = tmp_path / "model"
    chat.model.save_pretrained(model)
    chat.tokenizer.save_pretrained(model)
    vector = torch.ones(chat.d_model)
    found = read_runs(base=source(model), model=source(model), recovered=None, given=[vector], model_options=CPU)
    assert (found.base.refused, found.base.refused_harmless) == (4, 0)
    assert found.model == found.base
    assert found.left == pytest.approx(1)


def test_the_command_runs_both_and_says_so(call_main: CommandLine, pair, monkeypatch):
    monkeypatch.setattr(inspection_runs, "N_PROMPTS", 1)
    monkeypatch.setattr(read_runs, "__kwdefaults__", {**read_runs.__kwdefaults__, "n_prompts": 1})
    base, out = pair
    done = call_main("inspect", out, "--base", base, "--run", "--json")
    assert done.exit_code == 0
    ran = json.loads(done.stdout)["run"]
    assert (ran["directions"], ran["k"], ran["n_prompts"]) == ("recovered", 2, 1)
    assert ran["left"] < 1e-4
    assert "run" not in json.loads(call_main("inspect", out, "--base", base, "--json").stdout)
    shown = call_main("inspect", out, "--base", base, "--run")
    assert (
        "Run on 2 prompts: of what the base's stream has of the recovered directions, 0.00% is in the" in shown.stdout
    )
    # What was read from the files is not lost.
    identical = call_main("inspect", base, "--base", base, "--run")
    assert (identical.exit_code, "verdict: identical" in identical.stdout) == (1, True)
    assert "name one with --direction" in identical.error_line
    assert "name that base with --base" in call_main("inspect", out, "--run").error_line
