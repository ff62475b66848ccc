"""KL and cross-entropy against plain computations, one sequence at a time."""

import pytest
import torch

from abliterate.errors import InputError, ModelError
from abliterate.evaluation.drift import (
    BaseDistributions,
    CrossEntropy,
    Divergence,
    Findings,
    Surprise,
    compare_surprise,
    completion_surprise,
    measure,
    text_surprise,
)
from abliterate.models.chat_model import ChatModel, make_chat_model
from abliterate.models.hooks import ablate_direction
from abliterate.prompt_sets import load_plain_texts
from tests.support.tiny_models import make_tokenizer, tiny_llama

PROMPTS = ["How do locks work?", "Explain rain.", "Write a letter about my garden."]
COMPLETIONS = [[40, 41, 42, 43], [], [50, 51]]


def log_probabilities(chat: ChatModel, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return chat.model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)


def test_cross_entropy_equals_a_plain_computation(chat: ChatModel) -> None:
    rows = chat.encode(PROMPTS)
    expected = []
    for row, completion in zip(rows, COMPLETIONS, strict=True):
        log_p = log_probabilities(chat, row + completion)
        expected.append(-sum(float(log_p[len(row) - 1 + i, token]) for i, token in enumerate(completion)))
    found = completion_surprise(chat, rows, COMPLETIONS)
    assert found.nats == pytest.approx(expected, abs=1e-3)
    assert found.tokens == (4, 0, 2)
    assert found.mean == pytest.approx(sum(expected) / 6, abs=1e-4)
    assert found.per_token(1) is None
    assert completion_surprise(chat, rows, [[], [], []]).mean is None


def test_text_cross_entropy_has_no_template_and_a_limit(chat: ChatModel) -> None:
    texts = ["Rain begins high above the ground.", "x", "word " * 400]
    expected, n = 0.0, 0
    for text in (texts[0], texts[2]):
        ids = chat.tokenizer(text)["input_ids"][:256]
        log_p = log_probabilities(chat, ids)
        expected -= sum(float(log_p[i, token]) for i, token in enumerate(ids[1:]))
        n += len(ids) - 1
    found = text_surprise(chat, texts)
    assert sum(found.tokens) == n
    assert found.mean == pytest.approx(expected / n, abs=1e-4)


def test_the_bundled_sample_is_there() -> None:
    texts = load_plain_texts("bundled")
    assert len(texts) == len(set(texts.texts)) == 40
    assert sum(len(text.split()) for text in texts.texts) > 3000


@pytest.mark.parametrize("per_prompt", [1, 2, 32])
def test_kl_over_the_bases_answers_equals_a_plain_computation(chat: ChatModel, per_prompt: int) -> None:
    rows = chat.encode(PROMPTS)
    direction = torch.randn(chat.d_model, generator=torch.Generator().manual_seed(0))
    first, rest = [], []
    for row, completion in zip(rows, COMPLETIONS, strict=True):
        tokens = row + completion[: max(0, min(len(completion), per_prompt) - 1)]
        base = log_probabilities(chat, tokens)[len(row) - 1 :]
        with ablate_direction(chat, direction):
            other = log_probabilities(chat, tokens)[len(row) - 1 :]
        kl = (base.exp() * (base - other)).sum(-1)
        first.append(float(kl[0]))
        rest += kl.tolist()
    with BaseDistributions(rows=rows, completions=COMPLETIONS, per_prompt=per_prompt) as distributions:
        own = distributions.record(chat)
        with ablate_direction(chat, direction):
            found, surprise = distributions.compare(chat)
            alone = completion_surprise(chat, rows, COMPLETIONS)
        unchanged, same = distributions.compare(chat)
    assert found.first_token == pytest.approx(sum(first) / 3, rel=2e-2)
    assert found.continuation == pytest.approx(sum(rest) / len(rest), rel=2e-2)
    assert found.n_tokens == len(rest) == {1: 3, 2: 5, 32: 7}[per_prompt]
    assert found.first_token > 1e-2
    assert unchanged.continuation == pytest.approx(0, abs=1e-6)
    # What is found of the answers is found of all of each, however few distributions are kept.
    assert surprise.tokens == alone.tokens == (4, 0, 2)
    assert surprise.nats == pytest.approx(alone.nats, abs=1e-4)
    assert own == same
    assert own.nats == pytest.approx(completion_surprise(chat, rows, COMPLETIONS).nats, abs=1e-4)
    assert own.nats != pytest.approx(surprise.nats, abs=1e-2)


def test_tokens_that_all_prompts_begin_with_are_run_once(
    llama_chat: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = list(range(5, 25))
    rows = [[*shared, 30 + i, 40] for i in range(3)]
    expected = [
        completion_surprise(llama_chat, [row], [said]).nats[0] for row, said in zip(rows, COMPLETIONS, strict=True)
    ]
    run, n_tokens = ChatModel._forward, []

    def counting(chat: ChatModel, batch: list[list[int]], **named: object) -> torch.Tensor:
        n_tokens.append(sum(map(len, batch)))
        return run(chat, batch, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(ChatModel, "_forward", counting)
    found = completion_surprise(llama_chat, rows, COMPLETIONS)
    assert found.nats == pytest.approx(expected, abs=1e-4)
    # Of the prompts two tokens each, of the answers all but the last; the empty one is not run.
    assert sum(n_tokens) == 2 + 3 + 2 + 1


def test_models_of_different_vocabularies_are_not_compared(llama_chat: ChatModel) -> None:
    other = tiny_llama()
    other.resize_token_embeddings(420)
    with BaseDistributions(rows=[[5, 6]], completions=[[7]]) as distributions:
        distributions.record(llama_chat)
        with pytest.raises(ModelError, match="420 output tokens and the base 400"):
            distributions.compare(make_chat_model(other, make_tokenizer()))


def test_a_full_disk_is_said(llama_chat: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def tell(self) -> int:
            return 0

        def write(self, _data: bytes) -> int:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            pass

    monkeypatch.setattr("abliterate.evaluation.drift.tempfile.TemporaryFile", Full)
    with BaseDistributions(rows=[[5, 6]], completions=[[7]]) as distributions:
        with pytest.raises(InputError, match=r"No space left.*TMPDIR"):
            distributions.record(llama_chat)


def test_comparison_without_a_base() -> None:
    found = compare_surprise(None, Surprise(nats=(6.0,), tokens=(3,)))
    assert found is not None
    assert (found.base, found.model, found.relative_change, found.n_tokens) == (None, 2.0, None, 3)
    assert compare_surprise(None, Surprise(nats=(), tokens=())) is None


def test_measurements_carry_their_own_unit_and_what_is_missing_is_left_out() -> None:
    own = CrossEntropy(base=2.0, model=2.5, relative_change=0.25, n_tokens=10)
    text = CrossEntropy(base=None, model=3.0, relative_change=None, n_tokens=10)
    apart = Divergence(first_token=0.1, continuation=0.2, n_tokens=7, per_prompt=32)
    found = measure(Findings(divergence=apart, own_answers=own, texts={"t.txt": text}, replies={}, base_replies=None))
    assert [measurement.cells() for measurement in found] == [
        ("KL(base || model), harmless, first token", "nats a token", "", "0.1000", ""),
        ("KL(base || model), harmless, the base's answers (up to 32 tokens)", "nats a token", "", "0.2000", ""),
        ("cross-entropy, the base's own harmless answers", "nats a token", "2.0000", "2.5000", "+25.0%"),
        ("cross-entropy, texts t.txt", "nats a token", "", "3.0000", ""),
    ]
    nothing = Findings(divergence=None, own_answers=None, texts={}, replies={}, base_replies=None)
    assert measure(nothing) == ()
