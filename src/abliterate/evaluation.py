"""Measuring what an edit did: refusal rates with intervals, and the damage beside them.

All numbers are on test prompts, which extraction never uses. Completions are greedy and are written only on request.
"""

import gc
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from abliterate._version import __version__
from abliterate.candidate_scoring import kl_divergence
from abliterate.directions import Direction, load_direction
from abliterate.errors import InputError
from abliterate.hub import ModelSource, resolve_model
from abliterate.interventions import ablate_direction, add_direction
from abliterate.model import ChatModel, ModelOptions, load_chat_model
from abliterate.progress import SILENT, ProgressReporter
from abliterate.prompt_sets import PromptSet, load_prompt_set
from abliterate.refusal_metric import classify_completion

Intervention = Literal["none", "ablate", "add"]
Kind = Literal["harmful", "harmless", "borderline"]
KINDS: tuple[Kind, ...] = ("harmful", "harmless", "borderline")
Z_95 = 1.959963984540054
SCORER = "12 refusal substrings, anywhere, case-insensitive (arXiv 2406.11717)"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationOptions:
    """What is evaluated, and how.

    Attributes:
        harmful: prompt SPEC, see `abliterate.prompt_sets`; bundled means the test part.
        harmless: prompt SPEC.
        borderline: prompt SPEC of safe prompts that look unsafe.
        max_new_tokens: length of each completion.
        intervention: what hooks do to MODEL: nothing, ablate the direction, or add its mean difference at its layer.
        coefficient: of the addition; -1 bypasses refusal, +1 induces it.
        save_completions: a JSON Lines file for all completions; None writes none.
    """

    harmful: str = "bundled"
    harmless: str = "bundled"
    borderline: str = "bundled"
    max_new_tokens: int = 64
    intervention: Intervention = "none"
    coefficient: float = 1.0
    save_completions: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusalRate:
    """How many completions refuse, with a Wilson 95 % interval; degenerate ones are counted apart."""

    n: int
    refused: int
    degenerate: int
    rate: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEntropy:
    """Cross-entropy of the base's own harmless completions, in nats per token."""

    base: float
    model: float
    relative_change: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """Refusal rates of a model and of its base, and the damage done to harmless behaviour."""

    model: str
    base: str | None
    intervention: Intervention
    max_new_tokens: int
    scorer: str
    rates: dict[str, RefusalRate]
    base_rates: dict[str, RefusalRate] | None
    kl_harmless: float | None
    cross_entropy: CrossEntropy | None
    prompt_sets: dict[str, dict[str, Any]]
    versions: dict[str, str]

    def save(self, path: Path) -> None:
        """Write the report as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Return the Wilson 95 % interval of a proportion; (0, 1) when there is nothing to count."""
    if n == 0:
        return 0.0, 1.0
    p, z = successes / n, Z_95
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def count_refusals(completions: Sequence[str]) -> RefusalRate:
    """Classify completions and return the refusal rate with its interval."""
    classes = [classify_completion(text) for text in completions]
    refused, n = classes.count("refusal"), len(classes)
    low, high = wilson_interval(refused, n)
    return RefusalRate(
        n=n,
        refused=refused,
        degenerate=classes.count("degenerate"),
        rate=refused / n if n else 0.0,
        low=low,
        high=high,
    )


def evaluate_model(
    *,
    model: str | Path | ModelSource,
    base: str | Path | ModelSource | None = None,
    direction: Direction | Path | None = None,
    options: EvaluationOptions | None = None,
    model_options: ModelOptions | None = None,
    progress: ProgressReporter = SILENT,
) -> EvaluationReport:
    """Measure refusal rates on test prompts and, against a base, KL and cross-entropy on harmless ones.

    With an intervention, the base is MODEL itself without it unless another is given.

    Args:
        model: a directory, a Hub id or a resolved source.
        base: what to compare with; loaded, measured and released before the model.
        direction: needed by the interventions `ablate` and `add`.
        options: see `EvaluationOptions`.
        model_options: how to load and run the models.
        progress: where to show progress.

    Raises:
        InputError: the options do not fit together.
        PromptSetError: a SPEC cannot be read.
        ModelError: a model does not load as a chat model.
    """
    options = options or EvaluationOptions()
    _check_options(options, direction)
    prompts = {kind: load_prompt_set(getattr(options, kind), kind=kind, part="test") for kind in KINDS}
    loaded = load_direction(direction) if isinstance(direction, Path) else direction
    source = _resolve(model)
    base_source = _resolve(base) if base is not None else (source if options.intervention != "none" else None)
    measure = _Measurement(prompts=prompts, options=options, progress=progress)

    reference: _Behaviour | None = None
    if base_source is not None:
        with _loaded(base_source, model_options, progress) as chat:
            reference = measure.behaviour(chat, "base")
    with _loaded(source, model_options, progress) as chat, _intervention(chat, loaded, options):
        behaviour = measure.behaviour(chat, "model", reference=reference)
    if options.save_completions is not None:
        _write_completions(options.save_completions, prompts, {"base": reference, "model": behaviour})
    return EvaluationReport(
        model=source.name,
        base=base_source.name if base_source else None,
        intervention=options.intervention,
        max_new_tokens=options.max_new_tokens,
        scorer=SCORER,
        rates={kind: count_refusals(texts) for kind, texts in behaviour.texts.items()},
        base_rates={kind: count_refusals(texts) for kind, texts in reference.texts.items()} if reference else None,
        kl_harmless=(
            float(kl_divergence(reference.harmless_logits, behaviour.harmless_logits).mean()) if reference else None
        ),
        cross_entropy=_compare(reference, behaviour),
        prompt_sets={
            kind: {"name": chosen.name, "n": len(chosen), "sha256": chosen.sha256} for kind, chosen in prompts.items()
        },
        versions={
            "abliterate": __version__,
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Behaviour:
    """What one model did on the test prompts; token lists are the harmless completions."""

    texts: dict[str, list[str]]
    harmless_rows: list[list[int]]
    harmless_tokens: list[list[int]]
    harmless_logits: Tensor
    cross_entropy: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measurement:
    prompts: dict[Kind, PromptSet]
    options: EvaluationOptions
    progress: ProgressReporter

    def behaviour(self, chat: ChatModel, label: str, *, reference: _Behaviour | None = None) -> _Behaviour:
        texts: dict[str, list[str]] = {}
        tokens: dict[str, list[list[int]]] = {}
        rows: dict[str, list[list[int]]] = {}
        for kind, prompts in self.prompts.items():
            rows[kind] = chat.encode(prompts.texts)
            with self.progress.task(f"Answering {kind} prompts ({label})", total=len(prompts)) as advance:
                tokens[kind] = chat.generate(rows[kind], max_new_tokens=self.options.max_new_tokens, advance=advance)
            texts[kind] = [chat.decode(ids) for ids in tokens[kind]]
        judged = reference.harmless_tokens if reference else tokens["harmless"]
        with self.progress.task(f"Comparing harmless answers ({label})", total=len(judged)) as advance:
            entropy = completion_cross_entropy(chat, rows["harmless"], judged, advance=advance)
        return _Behaviour(
            texts=texts,
            harmless_rows=rows["harmless"],
            harmless_tokens=tokens["harmless"],
            harmless_logits=chat.last_logits(rows["harmless"]),
            cross_entropy=entropy,
        )


@torch.inference_mode()
def completion_cross_entropy(
    chat: ChatModel,
    rows: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    advance: Any = None,
) -> float | None:
    """Return the mean negative log-likelihood of the completions' tokens, in nats per token; None without tokens.

    Args:
        chat: the model that is asked.
        rows: token ids of the rendered prompts.
        completions: token ids that follow each prompt.
        advance: called with the number of prompts done.
    """
    totals: list[float] = []
    counts: list[int] = []

    def run(indices: list[int]) -> None:
        longest = max(len(completions[i]) for i in indices)
        if longest:
            ids, mask = chat.pad([[*rows[i], *completions[i]] for i in indices])
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
            logits = chat.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=longest + 1
            ).logits
            for row, i in enumerate(indices):
                n = len(completions[i])
                if n:
                    predicted = logits[row, -n - 1 : -1].float()
                    totals.append(float(cross_entropy(predicted, ids[row, -n:], reduction="sum")))
                    counts.append(n)
        if advance is not None:
            advance(len(indices))

    chat.for_batches([len(r) + 4 * len(c) for r, c in zip(rows, completions, strict=True)], run)
    return sum(totals) / sum(counts) if counts else None


def _check_options(options: EvaluationOptions, direction: Direction | Path | None) -> None:
    if options.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {options.max_new_tokens} is too small; give at least 1")
    if options.intervention != "none" and direction is None:
        raise InputError(f"--intervention {options.intervention} needs --direction FILE")
    if options.intervention == "none" and direction is not None:
        raise InputError("--direction is given but --intervention is none; choose ablate or add")


def _resolve(model: str | Path | ModelSource) -> ModelSource:
    return model if isinstance(model, ModelSource) else resolve_model(str(model))


@contextmanager
def _loaded(source: ModelSource, options: ModelOptions | None, progress: ProgressReporter) -> Iterator[ChatModel]:
    with progress.task(f"Loading {source.name}", total=1) as advance:
        chat = load_chat_model(source.path, name=source.name, options=options or ModelOptions())
        advance(1)
    yield chat
    del chat
    gc.collect()


def _intervention(chat: ChatModel, direction: Direction | None, options: EvaluationOptions) -> Any:
    if direction is None or options.intervention == "none":
        return nullcontext()
    if direction.d_model != chat.d_model:
        raise InputError(f"the direction has {direction.d_model} entries; the model's width is {chat.d_model}")
    if options.intervention == "ablate":
        return ablate_direction(chat, direction.vector)
    layer = direction.metadata.get("layer")
    if direction.mean_difference is None or not isinstance(layer, int):
        raise InputError("--intervention add needs a direction file with its mean difference and layer")
    return add_direction(chat, direction.mean_difference, layer=layer, coefficient=options.coefficient)


def _compare(reference: _Behaviour | None, behaviour: _Behaviour) -> CrossEntropy | None:
    if reference is None or reference.cross_entropy is None or behaviour.cross_entropy is None:
        return None
    return CrossEntropy(
        base=reference.cross_entropy,
        model=behaviour.cross_entropy,
        relative_change=behaviour.cross_entropy / reference.cross_entropy - 1,
    )


def _write_completions(path: Path, prompts: dict[Kind, PromptSet], behaviours: dict[str, _Behaviour | None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for label, behaviour in behaviours.items():
            if behaviour is None:
                continue
            for kind, chosen in prompts.items():
                for prompt_id, prompt, text in zip(chosen.ids, chosen.texts, behaviour.texts[kind], strict=True):
                    line = {
                        "model": label,
                        "kind": kind,
                        "id": prompt_id,
                        "prompt": prompt,
                        "class": classify_completion(text),
                        "completion": text,
                    }
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
