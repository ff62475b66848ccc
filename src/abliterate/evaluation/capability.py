"""What a model can do beside refusing: tasks of lm-evaluation-harness, on base and edited model alike.

The harness runs on the loaded model itself, so hooks act, and no chat template is applied (as for table 8 of
Arditi et al. 2024). The differences are paired by document: much tighter than two separate intervals.
"""

import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from abliterate.errors import InputError, MissingDependencyError
from abliterate.evaluation.report import TaskOptions
from abliterate.evaluation.statistics import Z_95, mcnemar_p_value
from abliterate.files import in_one_line
from abliterate.models.chat_model import ChatModel
from abliterate.progress import SILENT, ProgressReporter

_DOCUMENTS_PER_BATCH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task: its name.
        metric: its name, as the harness writes it.
        n: number of documents.
        model: the model's score.
        base: the base's, or None.
        difference: model - base, or None.
        low: lower end of the 95 % interval of the difference, paired by document (normal approximation).
        high: upper end.
        p_value: exact McNemar test, where each document is right or wrong; else None.
    """

    task: str
    metric: str
    n: int
    model: float
    base: float | None
    difference: float | None
    low: float | None
    high: float | None
    p_value: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CapabilityReport:
    """The scores of all tasks, and how they were run."""

    scores: tuple[TaskScore, ...]
    limit: int | None
    harness: str


TaskSamples = dict[tuple[str, str], dict[int, float]]
"""(task, metric) -> document -> value."""


def require_harness() -> None:
    """Check that lm-evaluation-harness is there.

    Raises:
        MissingDependencyError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingDependencyError("--lm-eval needs lm-evaluation-harness: pip install 'abliterate[eval]'")


def run_tasks(
    chat: ChatModel, *, options: TaskOptions, label: str = "model", progress: ProgressReporter = SILENT
) -> TaskSamples:
    """Run the tasks on a loaded model and return one value a document.

    Args:
        chat: the model; hooks that are attached to it act.
        options: see `TaskOptions`.
        label: what to call the model in the progress bar.
        progress: where to show progress.

    Raises:
        InputError: a task is not known or cannot be run.
        MissingDependencyError: lm-evaluation-harness is not installed.
    """
    require_harness()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    try:
        manager = TaskManager(include_path=None if options.path is None else str(options.path))
    except (OSError, ValueError) as error:
        raise InputError(f"--lm-eval-path {options.path}: {_one_line(error)}") from error
    unknown = [task for task in options.tasks if task not in manager.all_tasks]
    if unknown:
        raise InputError(
            f"--lm-eval: no task named {', '.join(unknown)}; `lm_eval ls tasks` lists them, and --lm-eval-path DIR "
            "adds your own"
        )
    model = HFLM(pretrained=chat.model, tokenizer=chat.tokenizer, batch_size=chat.batch_size or _DOCUMENTS_PER_BATCH)
    with progress.task(f"Running {', '.join(options.tasks)} ({label})", total=1) as advance:
        try:
            results = simple_evaluate(
                model=model,
                tasks=list(options.tasks),
                task_manager=manager,
                limit=options.limit,
                bootstrap_iters=0,
                log_samples=True,
            )
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"--lm-eval {','.join(options.tasks)} cannot be run: {_one_line(error)}") from error
        advance(1)
    return _samples((results or {}).get("samples", {}))


def compare_tasks(base: TaskSamples | None, model: TaskSamples, *, options: TaskOptions) -> CapabilityReport:
    """Put the scores of base and model beside each other, paired by document.

    Args:
        base: the base's values, or None.
        model: the model's values.
        options: how both were run.
    """
    from importlib.metadata import version

    scores = [_score(task, metric, (base or {}).get((task, metric)), found) for (task, metric), found in model.items()]
    return CapabilityReport(scores=tuple(scores), limit=options.limit, harness=f"lm-eval {version('lm-eval')}")


def _score(task: str, metric: str, base: dict[int, float] | None, model: dict[int, float]) -> TaskScore:
    n, mean = len(model), sum(model.values()) / len(model)
    if base is None or base.keys() != model.keys():
        return TaskScore(
            task=task, metric=metric, n=n, model=mean, base=None, difference=None, low=None, high=None, p_value=None
        )
    differences = [model[document] - base[document] for document in model]
    difference = sum(differences) / n
    half = Z_95 * _standard_error(differences)
    return TaskScore(
        task=task,
        metric=metric,
        n=n,
        model=mean,
        base=sum(base.values()) / n,
        difference=difference,
        low=difference - half,
        high=difference + half,
        p_value=_mcnemar(differences, [*model.values(), *base.values()]),
    )


def _standard_error(values: Sequence[float]) -> float:
    n = len(values)
    if n < 2:
        return math.inf
    mean = sum(values) / n
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)


def _mcnemar(differences: Sequence[float], values: Sequence[float]) -> float | None:
    if not set(values) <= {0.0, 1.0}:
        return None
    return mcnemar_p_value(differences.count(-1.0), differences.count(1.0))


def _samples(samples: dict[str, list[dict[str, Any]]]) -> TaskSamples:
    """Return what is one number a document; a metric of the whole corpus, as a word perplexity, is not."""
    found: TaskSamples = {}
    for task, documents in samples.items():
        for document in documents:
            for metric in document.get("metrics", []):
                value = document.get(metric)
                if isinstance(value, (bool, int, float)) and math.isfinite(value):
                    name = metric if document.get("filter", "none") == "none" else f"{metric}, {document['filter']}"
                    found.setdefault((task, name), {})[int(document["doc_id"])] = float(value)
    return found


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {in_one_line(error)}"
