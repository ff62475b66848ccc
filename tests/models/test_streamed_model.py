"""Streamed layers beside the same model in memory: activations, logits, scores and the choice."""

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from abliterate.errors import CheckpointError, ModelError
from abliterate.extraction.options import ExtractionOptions, Thresholds
from abliterate.extraction.refusal import FirstTokens
from abliterate.extraction.run import extract_direction
from abliterate.extraction.scoring import CandidateScorer, StreamedScorer, record_streamed
from abliterate.models import layer_weights
from abliterate.models.hooks import ablate_subspace, record
from abliterate.models.loading import load_chat_model, load_streamed_model
from abliterate.models.options import ModelOptions
from abliterate.models.streamed_model import StreamedChat, Variant
from tests.support.tiny_models import (
    HARMFUL,
    HARMLESS,
    make_tiny_model,
    save_chat_model,
    tiny_gpt2,
    tiny_llama,
)

TOKENS = [70, 75]
STREAMED = ModelOptions(stream_layers=True)
# Norms of every kind, sliding windows shorter than the prompts, blocks that return tuples, experts in one tensor and in
# many, recurrent layers.
TYPES = ["llama", "gpt2", "gemma2", "gemma3_text", "qwen3", "olmo2", "bloom", "gpt_oss", "qwen3_moe", "mamba"]


def make(model_type: str) -> PreTrainedModel:
    if model_type == "gpt2":
        return tiny_gpt2()
    window = {"sliding_window": 16} if model_type in {"gemma2", "gemma3_text", "gpt_oss"} else {}
    return make_tiny_model(model_type, vocab_size=400, max_position_embeddings=256, eos_token_id=2, **window)


def save(model: PreTrainedModel, directory: Path) -> Path:
    return save_chat_model(directory, model, max_shard_size="60KB")


def load(directory: Path, **options) -> StreamedChat:
    return load_streamed_model(directory, name="tiny", options=STREAMED, **options)


@pytest.mark.parametrize("model_type", TYPES)
def test_everything_equals_the_model_in_memory(tmp_path: Path, model_type: str) -> None:
    save(make(model_type), tmp_path)
    chat, streamed = load_chat_model(tmp_path, name="tiny", options=ModelOptions()), load(tmp_path)
    assert all(parameter.is_meta for parameter in streamed.model.parameters())
    rows = streamed.encode([*HARMFUL, *HARMLESS])
    assert rows == chat.encode([*HARMFUL, *HARMLESS])
    whole, apart = record(chat, rows), record_streamed(streamed, rows)
    assert torch.allclose(apart.activations, whole.activations, atol=1e-4)
    assert torch.allclose(apart.logits, whole.logits, atol=1e-4)
    assert whole.activations[:, :, 1:].abs().max() > 0.1
    if model_type == "mamba":  # it has no attention and no MLP to hook
        return
    candidates = torch.randn(
        chat.chat_format.n_positions, chat.n_layers, chat.d_model, generator=torch.Generator().manual_seed(4)
    ).double()
    given = {
        "candidates": candidates,
        "harmful_rows": rows[:3],
        "harmless_rows": rows[3:],
    }
    ours = CandidateScorer(chat=chat, measure=FirstTokens(tuple(TOKENS)), **given)
    theirs = StreamedScorer(token_ids=TOKENS, chat=streamed, base_harmless_logits=apart.logits[3:], **given)
    keys = [(-1, 0), (-2, 2), (-1, 1), (-3, 1)]
    assert theirs.groups("induce", keys) == [keys]
    for name in ("induce", "ablated"):
        for one, other in zip(ours.score(name, keys), theirs.score(name, keys), strict=True):
            assert one.keys() == other.keys()
            for score, values in one.items():
                assert other[score] == pytest.approx(values, abs=1e-3)
    basis = torch.linalg.qr(candidates[-1, :2].T).Q.T
    one, other = ours.score_together(basis), theirs.score_together(basis)
    assert other["bypass"] == pytest.approx(one["bypass"], abs=1e-3)
    assert other["kl"] == pytest.approx(one["kl"], abs=1e-3)
    assert all(parameter.is_meta for parameter in streamed.model.parameters())
    assert streamed.weights.reads == 4


def options(**changes: object) -> ExtractionOptions:
    return ExtractionOptions(
        **{
            "n_train": 8,
            "n_val": 4,
            "filter": "none",
            "refusal_tokens": ("I",),
            "thresholds": Thresholds(kl=1e9, induce=-12),
            **changes,
        }
    )


@pytest.mark.parametrize("changes", [{}, {"exhaustive": True}, {"rank": 2, "n_bootstrap": 5}])
def test_the_choice_is_the_same_from_a_fixed_number_of_readings(tmp_path: Path, changes: dict) -> None:
    directory = save(tiny_llama(), tmp_path / "model")
    whole = extract_direction(model=directory, options=options(**changes))
    said: list[str] = []
    apart = extract_direction(
        model=directory, options=options(**changes), model_options=STREAMED, progress=_Listener(said),
        work_directory=tmp_path / "work",
    )  # fmt: skip
    assert said[-1] == f"the weights were read {5 if 'rank' in changes else 4} times"
    for one, other in zip(whole.directions, apart.directions, strict=True):
        assert (one.metadata["position"], one.metadata["layer"]) == (
            other.metadata["position"],
            other.metadata["layer"],
        )
        assert torch.allclose(one.vector, other.vector, atol=1e-5)
        assert torch.allclose(one.candidates, other.candidates, atol=1e-4)
    known = 0
    for one, other in zip(whole.report.scores, apart.report.scores, strict=True):
        for name in ("bypass", "induce", "kl"):
            if getattr(one, name) is not None:
                assert getattr(other, name) == pytest.approx(getattr(one, name), abs=1e-3)
                known += 1
    assert known > 10
    assert whole.report.counts == apart.report.counts
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


class _Listener:
    def __init__(self, said: list[str]) -> None:
        self.message = said.append

    def task(self, description, *, total, unit=""):
        from abliterate.progress import SILENT

        return SILENT.task(description, total=total)


def test_hidden_states_that_do_not_fit_into_memory_lie_in_files(tmp_path: Path, monkeypatch) -> None:
    from abliterate.models import streamed_model

    directory = save(tiny_llama(), tmp_path / "model")
    (tmp_path / "spill").mkdir()
    rows = load(directory).encode(HARMLESS)
    variants = [Variant(), Variant(start=2, added=torch.ones(32)), Variant(ablated=torch.eye(32)[:1])]
    expected = load(directory).last_hidden(rows, variants)
    most: list[int] = []

    class Small(streamed_model.HiddenStore):
        def __init__(self, place):
            super().__init__(place, memory_bytes=9000)

        def put(self, key, hidden):
            super().put(key, hidden)
            most.append(len(list((tmp_path / "spill").rglob("*.*"))))

    monkeypatch.setattr(streamed_model, "HiddenStore", Small)
    found = load(directory, spill_directory=tmp_path / "spill").last_hidden(rows, variants)
    assert torch.equal(found, expected)
    assert max(most) > 3
    assert not list((tmp_path / "spill").iterdir())


def test_an_answer_that_always_starts_alike_is_forced(tmp_path: Path) -> None:
    """A head of zeros says the same tokens, whatever it is asked."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[:] = 0
    save(model, tmp_path)
    said: list[str] = []
    whole, apart = (
        extract_direction(model=tmp_path, options=options(), model_options=each, progress=_Listener(said))
        for each in (None, STREAMED)
    )
    assert whole.report.response_prefix == apart.report.response_prefix != ""
    assert whole.report.post_instruction_tokens == apart.report.post_instruction_tokens
    assert said[-1] == "the weights were read 8 times"


def test_weights_are_read_in_parts(tmp_path: Path, monkeypatch) -> None:
    save(tiny_llama().to(torch.bfloat16), tmp_path)
    rows = load(tmp_path).encode(HARMLESS)
    expected = load(tmp_path).last_logits(rows)
    monkeypatch.setattr(layer_weights, "_READ_BYTES", 200)  # three rows of 32, and less than one of 64
    torch.testing.assert_close(load(tmp_path).last_logits(rows), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_an_output_head_stays_in_the_format_it_is_stored_in(tmp_path: Path, monkeypatch, bias: bool) -> None:
    model = tiny_llama().to(torch.bfloat16)
    if bias:
        model = make_tiny_model("phi", vocab_size=400, max_position_embeddings=256, eos_token_id=2).to(torch.bfloat16)
    save(model, tmp_path)
    streamed, seen = load(tmp_path), []
    whole = load_chat_model(tmp_path, name="tiny", options=ModelOptions())
    in_parts = streamed.weights.head_in_parts

    def look(self, hidden):
        seen.append((self.plain_head.weight.dtype, self.plain_head.bias is not None))
        return in_parts(hidden)

    monkeypatch.setattr(layer_weights, "_READ_BYTES", 200)
    monkeypatch.setattr(layer_weights.LayerWeights, "head_in_parts", look)
    rows = streamed.encode(HARMLESS)
    torch.testing.assert_close(streamed.last_logits(rows), whole.last_logits(rows), atol=1e-4, rtol=1e-4)
    assert set(seen) == {(torch.bfloat16, bias)}


def test_a_subspace_is_ablated_as_in_memory(tmp_path: Path) -> None:
    save(tiny_llama(tied=True), tmp_path)
    chat, streamed = load_chat_model(tmp_path, name="tiny", options=ModelOptions()), load(tmp_path)
    rows = chat.encode(HARMLESS)
    basis = torch.linalg.qr(torch.randn(32, 3, generator=torch.Generator().manual_seed(0))).Q.T
    with ablate_subspace(chat, basis):
        expected = chat.last_logits(rows)
    found = next(streamed.logits(streamed.last_hidden(rows, [Variant(ablated=basis)])))
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, chat.last_logits(rows), atol=1e-2)


def test_weights_under_other_names_are_refused_by_name(tmp_path: Path) -> None:
    save(make_tiny_model("mixtral", vocab_size=400), tmp_path)  # stores block_sparse_moe, loads mlp
    with pytest.raises(ModelError, match=r"model mixtral has it .*--device-map auto"):
        load(tmp_path)


def test_a_missing_head_is_found_before_anything_is_run(tmp_path: Path) -> None:
    save(make_tiny_model("gpt_neox", vocab_size=400), tmp_path)  # stores it as embed_out
    with pytest.raises(ModelError, match=r"lm_head\.weight"):
        load(tmp_path)


def test_quantised_and_pickled_weights_are_refused(tmp_path: Path) -> None:
    save(tiny_llama(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ModelError, match="quantised"):
        load(tmp_path)
    for path in tmp_path.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(CheckpointError):
        load(tmp_path)


def test_a_config_by_which_no_small_model_is_built_is_one_line(tmp_path: Path) -> None:
    path = save_chat_model(tmp_path / "m", tiny_llama())
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"head_dim": 0}))
    with pytest.raises(ModelError, match="cannot be run one by one: a small model to try it on does not run") as found:
        load_streamed_model(path, name="m", options=STREAMED)
    assert "\n" not in str(found.value)


def test_blocks_between_which_something_happens_are_refused(tmp_path: Path, monkeypatch) -> None:
    from transformers.models.llama import modeling_llama

    save(tiny_llama(), tmp_path)
    rotary = modeling_llama.LlamaModel.forward

    def forward(self, *args, **kwargs):
        # Halfway up the stream is doubled by the model itself, which no block knows of.
        handle = self.layers[1].register_forward_pre_hook(
            lambda _m, args, kwargs: ((args[0] * 2, *args[1:]), kwargs), with_kwargs=True
        )
        try:
            return rotary(self, *args, **kwargs)
        finally:
            handle.remove()

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", forward)
    with pytest.raises(ModelError, match="layers of llama cannot be run one by one"):
        load(tmp_path)
