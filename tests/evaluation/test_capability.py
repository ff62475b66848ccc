"""lm-evaluation-harness on a tiny local task; the arithmetic of paired differences without it."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from scipy import stats

from abliterate.directions import make_direction
from abliterate.errors import InputError, MissingDependencyError
from abliterate.evaluation import capability
from abliterate.evaluation.capability import _samples, _score, run_tasks
from abliterate.evaluation.report import EvaluationOptions, TaskOptions
from abliterate.evaluation.run import evaluate_model
from abliterate.models.chat_model import ChatModel

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness (extra eval) is not installed"
)


def test_paired_differences_equal_scipys() -> None:
    generator = torch.Generator().manual_seed(0)
    base = {i: float(v) for i, v in enumerate(torch.rand(40, generator=generator))}
    model = {i: v + 0.1 * float(torch.randn(1, generator=generator)) for i, v in base.items()}
    found = _score("task", "f1", base, model)
    test = stats.ttest_rel([*model.values()], [*base.values()])
    assert found.difference is not None
    assert found.low is not None
    standard_error = found.difference / test.statistic
    assert (found.difference - found.low) / 1.959963984540054 == pytest.approx(abs(standard_error))
    assert found.p_value is None


def test_right_and_wrong_answers_get_the_exact_test() -> None:
    base = dict(enumerate([1.0] * 12 + [0.0] * 8))
    model = dict(enumerate([1.0] * 5 + [0.0] * 14 + [1.0]))
    found = _score("task", "acc", base, model)
    assert found.p_value == pytest.approx(stats.binomtest(1, 8, 0.5).pvalue)
    assert (found.base, found.model) == (0.6, 0.3)
    assert _score("task", "acc", None, model).difference is None
    assert _score("task", "acc", {0: 1.0}, model).base is None


def test_only_numbers_a_document_are_paired() -> None:
    documents = [
        {"doc_id": 0, "metrics": ["acc", "perplexity"], "acc": 1, "perplexity": (1.0, 2), "filter": "none"},
        {"doc_id": 0, "metrics": ["exact"], "exact": 0.0, "filter": "strict"},
    ]
    assert _samples({"t": documents}) == {("t", "acc"): {0: 1.0}, ("t", "exact, strict"): {0: 0.0}}


def test_without_the_harness_it_is_named(llama_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(capability.importlib.util, "find_spec", lambda n: None if n == "lm_eval" else find_spec(n))
    with pytest.raises(MissingDependencyError, match=r"abliterate\[eval\]"):
        evaluate_model(model=llama_directory, options=EvaluationOptions(tasks=TaskOptions(tasks=("x",))))


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """Twelve questions with two choices each, in a file."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    lines = [{"question": f"What is {i} and {i}?", "choices": ["a sum", "rain"], "label": i % 2} for i in range(12)]
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    (folder / "sums.yaml").write_text(
        "task: sums\n"
        "dataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {data}\n"
        "output_type: multiple_choice\n"
        "test_split: test\n"
        'doc_to_text: "Question: {{question}}\\nAnswer:"\n'
        "doc_to_target: label\n"
        "doc_to_choice: choices\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    return folder


def score_by_hand(chat: ChatModel) -> list[float]:
    right = []
    for i in range(12):
        context = chat.tokenizer(f"Question: What is {i} and {i}?\nAnswer:")["input_ids"]
        likelihoods = []
        for choice in ("a sum", "rain"):
            ids = chat.tokenizer(f"Question: What is {i} and {i}?\nAnswer: {choice}")["input_ids"]
            with torch.inference_mode():
                log_p = chat.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            likelihoods.append(sum(float(log_p[t - 1, ids[t]]) for t in range(len(context), len(ids))))
        right.append(float(likelihoods.index(max(likelihoods)) == i % 2))
    return right


@needs_harness
def test_a_local_task_equals_a_count_by_hand(llama_chat: ChatModel, task: Path) -> None:
    found = run_tasks(llama_chat, options=TaskOptions(tasks=("sums",), path=task))
    assert found == {("sums", "acc"): dict(enumerate(score_by_hand(llama_chat)))}
    few = run_tasks(llama_chat, options=TaskOptions(tasks=("sums",), path=task, limit=5))
    assert len(few["sums", "acc"]) == 5


@needs_harness
def test_base_and_edited_in_one_run(llama_directory: Path, tmp_path: Path, task: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Explain rain.\n")
    spec = str(prompts)
    direction = make_direction(mean_difference=torch.randn(32, generator=torch.Generator().manual_seed(1)))
    report = evaluate_model(
        model=llama_directory,
        direction=direction,
        options=EvaluationOptions(
            harmful=spec,
            harmless=spec,
            borderline=spec,
            texts=(),
            max_new_tokens=2,
            intervention="ablate",
            tasks=TaskOptions(tasks=("sums",), path=task),
        ),
    )
    assert report.capability is not None
    (score,) = report.capability.scores
    assert (score.task, score.metric, score.n) == ("sums", "acc", 12)
    assert score.base is not None
    assert score.difference == pytest.approx(score.model - score.base)
    assert score.p_value is not None


@needs_harness
def test_an_unknown_task_is_named(llama_chat: ChatModel) -> None:
    with pytest.raises(InputError, match="no task named no_such_task"):
        run_tasks(llama_chat, options=TaskOptions(tasks=("no_such_task",)))
