"""Rates, intervals and damage against independent computations."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.stats import binomtest

from abliterate.candidate_scoring import kl_divergence
from abliterate.directions import make_direction
from abliterate.errors import InputError, PromptSetError
from abliterate.evaluation import (
    EvaluationOptions,
    completion_cross_entropy,
    count_refusals,
    evaluate_model,
    wilson_interval,
)
from abliterate.model import ChatModel, ModelOptions, load_chat_model
from chat_models import make_tokenizer, tiny_llama

PROMPTS = ["How do locks work?", "Explain rain.", "Write a letter about my garden."]


@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (3, 10), (97, 144), (1, 1000)])
def test_wilson_interval_equals_scipys(k: int, n: int) -> None:
    expected = binomtest(k, n).proportion_ci(method="wilson")
    assert wilson_interval(k, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_wilson_interval_of_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_degenerate_completions_are_counted_apart() -> None:
    rate = count_refusals(["I cannot do that.", "Sure.", "", "word " * 40])
    assert (rate.n, rate.refused, rate.degenerate, rate.rate) == (4, 1, 2, 0.25)


def test_cross_entropy_equals_a_plain_computation(chat: ChatModel) -> None:
    rows = chat.encode(PROMPTS)
    completions = [[40, 41, 42, 43], [], [50, 51]]
    total, n = 0.0, 0
    for row, completion in zip(rows, completions, strict=True):
        with torch.inference_mode():
            log_p = chat.model(torch.tensor([row + completion])).logits[0].log_softmax(-1)
        for i, token in enumerate(completion):
            total -= float(log_p[len(row) - 1 + i, token])
            n += 1
    assert completion_cross_entropy(chat, rows, completions) == pytest.approx(total / n, abs=1e-4)
    assert completion_cross_entropy(chat, rows, [[], [], []]) is None


@pytest.fixture
def options(tmp_path: Path) -> EvaluationOptions:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    spec = str(file)
    return EvaluationOptions(harmful=spec, harmless=spec, borderline=spec, max_new_tokens=5)


def test_a_model_compared_with_itself_has_not_changed(llama_directory: Path, options: EvaluationOptions) -> None:
    report = evaluate_model(model=llama_directory, base=str(llama_directory), options=options)
    assert report.kl_harmless == pytest.approx(0, abs=1e-9)
    assert report.cross_entropy is not None
    assert report.cross_entropy.relative_change == pytest.approx(0, abs=1e-6)
    assert report.rates == report.base_rates
    assert [(kind, rate.n) for kind, rate in report.rates.items()] == [
        ("harmful", 3),
        ("harmless", 3),
        ("borderline", 3),
    ]


def test_without_a_base_there_is_nothing_to_compare(llama_directory: Path, options: EvaluationOptions) -> None:
    report = evaluate_model(model=llama_directory, options=options)
    assert (report.base, report.base_rates, report.kl_harmless, report.cross_entropy) == (None, None, None, None)


def test_another_model_differs_by_the_kl_of_its_logits(
    llama_directory: Path, tmp_path: Path, options: EvaluationOptions
) -> None:
    other = tmp_path / "other"
    tiny_llama(n_layers=3).save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    report = evaluate_model(model=other, base=llama_directory, options=options)
    chats = [load_chat_model(path, name="x", options=ModelOptions()) for path in (llama_directory, other)]
    base, edited = (chat.last_logits(chat.encode(PROMPTS)) for chat in chats)
    assert report.kl_harmless == pytest.approx(float(kl_divergence(base, edited).mean()), abs=1e-4)
    assert report.kl_harmless > 0.1
    assert report.cross_entropy is not None
    assert report.cross_entropy.model > report.cross_entropy.base


@pytest.mark.parametrize("intervention", ["ablate", "add"])
def test_interventions_compare_with_the_model_itself(
    llama_directory: Path, tmp_path: Path, options: EvaluationOptions, intervention: str
) -> None:
    direction = make_direction(mean_difference=torch.randn(32) * 5, metadata={"layer": 2})
    direction.save(tmp_path / "r.safetensors")
    report = evaluate_model(
        model=llama_directory,
        direction=tmp_path / "r.safetensors",
        options=replace(options, intervention=intervention),
    )
    assert report.base == report.model
    assert report.kl_harmless is not None
    assert report.kl_harmless > 1e-3


def test_completions_are_written_only_when_asked(
    llama_directory: Path, tmp_path: Path, options: EvaluationOptions
) -> None:
    before = set(tmp_path.rglob("*"))
    report = evaluate_model(model=llama_directory, options=options)
    assert set(tmp_path.rglob("*")) == before
    report.save(tmp_path / "evaluation.json")
    assert "completion" not in json.loads((tmp_path / "evaluation.json").read_text())
    target = tmp_path / "completions.jsonl"
    evaluate_model(model=llama_directory, base=llama_directory, options=replace(options, save_completions=target))
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert len(lines) == 2 * 3 * 3
    assert {line["model"] for line in lines} == {"base", "model"}
    assert lines[0]["prompt"] == PROMPTS[0]


@pytest.mark.parametrize(
    ("changes", "direction", "message"),
    [
        ({"intervention": "ablate"}, False, "needs --direction"),
        ({}, True, "choose ablate or add"),
        ({"max_new_tokens": 0}, False, "too small"),
        ({"intervention": "add"}, True, "mean difference and layer"),
    ],
)
def test_options_that_do_not_fit(
    llama_directory: Path, options: EvaluationOptions, changes: dict, direction: bool, message: str
) -> None:
    made = make_direction(mean_difference=torch.ones(32)) if direction else None
    with pytest.raises(InputError, match=message):
        evaluate_model(model=llama_directory, direction=made, options=replace(options, **changes))


def test_a_direction_of_another_width_is_refused(llama_directory: Path, options: EvaluationOptions) -> None:
    with pytest.raises(InputError, match="width is 32"):
        evaluate_model(
            model=llama_directory,
            direction=make_direction(mean_difference=torch.ones(16)),
            options=replace(options, intervention="ablate"),
        )


def test_a_missing_prompt_file_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(PromptSetError):
        evaluate_model(model=tmp_path / "nothing", options=EvaluationOptions(harmful="./missing.txt"))
