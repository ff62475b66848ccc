"""Extraction on tiny random models: what flows, what is recorded, and what is refused."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from abliterate.directions import load_direction
from abliterate.errors import InputError, ModelError, PromptSetError, RefusalBehaviourError
from abliterate.extraction.options import ExtractionOptions, Thresholds
from abliterate.extraction.report import NoCandidatePassesError
from abliterate.extraction.run import extract_direction
from abliterate.models.chat_model import ChatModel, make_chat_model
from abliterate.models.loading import load_chat_model
from abliterate.models.options import ModelOptions
from tests.support.tiny_models import make_tokenizer, tiny_llama

ANYTHING = Thresholds(kl=1e9, induce=-1e9)
FEW = {"n_train": 8, "n_val": 4, "filter": "none", "refusal_tokens": ("I",)}


def options(**changes: object) -> ExtractionOptions:
    return ExtractionOptions(**{**FEW, "thresholds": ANYTHING, **changes})


def test_the_direction_is_the_difference_in_means_of_the_recorded_prompts(llama_directory: Path) -> None:
    """An independent computation through `output_hidden_states`, prompt by prompt."""
    from abliterate.prompt_sets import split_for_extraction

    extraction = extract_direction(model=llama_directory, options=options())
    selected = extraction.report.selected
    prompts = split_for_extraction("bundled", "bundled", n_train=8, n_val=4, seed=42)
    chat = load_chat_model(llama_directory, name="x", options=ModelOptions())

    def mean(texts: tuple[str, ...]) -> torch.Tensor:
        vectors = []
        for row in chat.encode(texts):
            states = chat.model(torch.tensor([row]), output_hidden_states=True).hidden_states
            vectors.append(states[selected.layer][0, selected.position].detach().double())
        return torch.stack(vectors).mean(0)

    expected = mean(prompts.harmful_train.texts) - mean(prompts.harmless_train.texts)
    direction = extraction.direction
    assert direction.mean_difference is not None
    assert torch.allclose(direction.mean_difference.double(), expected, atol=1e-4)
    assert torch.allclose(direction.vector.double(), expected / expected.norm(), atol=1e-4)
    assert extraction.report.direction_norm == pytest.approx(float(expected.norm()), rel=1e-4)


def test_the_file_holds_everything(llama_directory: Path, tmp_path: Path) -> None:
    extraction = extract_direction(model=llama_directory, options=options(exhaustive=True))
    extraction.direction.save(tmp_path / "refusal.safetensors")
    loaded = load_direction(tmp_path / "refusal.safetensors", d_model=32)
    n_positions = len(extraction.report.post_instruction_tokens)
    assert loaded.candidates is not None
    assert loaded.candidates.shape == (n_positions, 5, 32)
    selected = extraction.report.selected
    for name in ("bypass", "induce", "kl"):
        grid = loaded.scores[name]
        assert grid.shape == (n_positions, 5)
        assert float(grid[selected.position, selected.layer]) == getattr(selected, name)
        assert grid[:, [0, 4]].isnan().all()  # zero vectors, and beyond the layer limit
        assert not grid[:, 1:4].isnan().any()
    metadata = loaded.metadata
    assert (metadata["position"], metadata["layer"]) == (selected.position, selected.layer)
    assert metadata["counts"]["harmful_train"] == {"sampled": 8, "kept": 8}
    assert metadata["prompt_sets"]["harmless_validation"]["sha256"]
    assert metadata["refusal_tokens"][0]["text"] == "I"
    assert metadata["thresholds"] == {"kl": 1e9, "induce": -1e9, "prune_layers": 0.2}
    assert metadata["config_values_sha256"]
    json.dumps(metadata)


def test_racing_and_scoring_everything_choose_the_same(llama_directory: Path) -> None:
    raced = extract_direction(model=llama_directory, options=options())
    exhaustive = extract_direction(model=llama_directory, options=options(exhaustive=True))
    assert raced.report.raced
    assert not exhaustive.report.raced
    one, other = raced.report.selected, exhaustive.report.selected
    assert (one.position, one.layer) == (other.position, other.layer)
    for name in ("bypass", "induce", "kl"):  # batches differ, and with them the last bits
        assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-4)
    assert raced.direction.sha256 == exhaustive.direction.sha256
    assert sum(score.kl is not None for score in exhaustive.report.scores) == 3 * len(
        exhaustive.report.post_instruction_tokens
    )


def test_the_same_seed_gives_the_same_bytes(llama_directory: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        extract_direction(model=llama_directory, options=options()).direction.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    other = extract_direction(model=llama_directory, options=options(seed=7))
    assert other.direction.sha256 != load_direction(tmp_path / "a").sha256


def test_when_nothing_passes_the_nearest_are_named(llama_directory: Path) -> None:
    strict = Thresholds(kl=1e-9, induce=-1e9)
    with pytest.raises(NoCandidatePassesError, match="--kl-threshold") as caught:
        extract_direction(model=llama_directory, options=options(thresholds=strict))
    error = caught.value
    assert error.exit_code == 3
    assert len(error.nearest) == 5
    assert any("KL" in text for text in error.nearest[0].failed)
    distances = [one.distance for one in error.nearest]
    assert distances == sorted(distances)
    assert error.report["best"]["kl"].kl == min(one.kl for one in error.score_table.scores if one.kl is not None)
    # What the message advises accepts that candidate.
    flag, value = error.accepting
    assert flag == "--kl-threshold"
    found = extract_direction(
        model=llama_directory, options=options(thresholds=Thresholds(kl=float(value), induce=-1e9))
    )
    assert found.report.selected.kl <= float(value)


def test_a_model_that_does_not_refuse_is_told_so(llama_directory: Path) -> None:
    with pytest.raises(RefusalBehaviourError, match="does not refuse"):
        extract_direction(model=llama_directory, options=ExtractionOptions(n_train=8, n_val=4, thresholds=ANYTHING))


class _RefusesEverything(ChatModel):
    """A model whose completions are one refusal, whatever it is asked."""

    def generate(self, rows, *, max_new_tokens, advance=None):
        answer = self.tokenizer("I cannot help with that.", add_special_tokens=False)["input_ids"]
        return [answer[:max_new_tokens] for _ in rows]


def test_a_model_that_refuses_everything_is_told_so() -> None:
    chat = make_chat_model(tiny_llama(), make_tokenizer())
    refusing = _RefusesEverything(**{f.name: getattr(chat, f.name) for f in dataclasses.fields(chat)})
    with pytest.raises(RefusalBehaviourError, match="refuses nearly everything"):
        extract_direction(model=refusing, options=ExtractionOptions(n_train=8, n_val=4))


def test_filtering_says_what_is_left(llama_directory: Path) -> None:
    with pytest.raises(RefusalBehaviourError, match="0 of 8 harmful training prompts are refused"):
        extract_direction(model=llama_directory, options=options(filter="auto"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_train": 2}, "--n-train 2 is too small"),
        ({"n_val": 0}, "--n-val 0 is too small"),
        ({"thresholds": Thresholds(prune_layers=1.0)}, "--prune-layers 1"),
        ({"refusal_tokens": ("I cannot help",)}, "it must be one"),
    ],
)
def test_options_that_do_not_fit(llama_directory: Path, changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        extract_direction(model=llama_directory, options=options(**changes))


def test_too_few_prompts(llama_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("One.\nTwo.\nThree.\n")
    with pytest.raises(PromptSetError, match="3"):
        extract_direction(model=llama_directory, harmful=str(tmp_path / "few.txt"), options=options())


def test_a_directory_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError):
        extract_direction(model=tmp_path, options=options())


def test_a_loaded_model_is_taken_as_it_is() -> None:
    chat: ChatModel = make_chat_model(tiny_llama(), make_tokenizer())
    extraction = extract_direction(model=chat, options=options())
    assert extraction.direction.d_model == 32
    assert extraction.direction.metadata["config_values_sha256"] is None


def test_finding_a_planted_direction() -> None:
    """A model whose refusal is one direction by construction: its head reads it, its embeddings write it."""
    chat = make_chat_model(_planted(), make_tokenizer())
    with torch.no_grad():
        extraction = extract_direction(
            model=chat,
            options=ExtractionOptions(n_train=32, n_val=16, filter="none", refusal_tokens=("I",), thresholds=ANYTHING),
        )
    assert extraction.report.selected.bypass < extraction.report.baseline.harmful - 1


def _planted():
    model = tiny_llama()
    tokenizer = make_tokenizer()
    refusal = tokenizer("I", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        model.lm_head.weight[refusal] = 3 * model.lm_head.weight.norm(dim=1).mean() * torch.eye(32)[0]
        for block in model.model.layers:
            block.mlp.down_proj.weight[0] *= 4
    return model
