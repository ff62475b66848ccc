"""`inspect --run`: what is left of directions in a running model beside its base, in the stream and in the refusals.

Files say what was done to a model; this says what came of it, on a few prompts. It is no evaluation: `evaluate` has
more prompts, whole replies, and intervals.
"""

import gc
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from abliterate.checkpoints.model_source import ModelSource
from abliterate.directions import orthonormalize
from abliterate.errors import InputError
from abliterate.extraction.behaviour import ReplyRun, count_short_replies
from abliterate.models.loading import open_model
from abliterate.models.options import ModelOptions
from abliterate.processes import ALONE
from abliterate.progress import SILENT, ProgressReporter
from abliterate.prompt_sets import BUNDLED, Kind, load_prompt_set
from abliterate.release.stream_checks import run_prompts

N_PROMPTS = 16
_KINDS: tuple[Kind, Kind] = ("harmful", "harmless")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRun:
    """What one model did.

    Attributes:
        stream: Mean of |R h|/|h| over all tokens of the prompts, at the input of each block and before the final norm.
        refused: How many harmful prompts it refused, in short replies; None where it has no chat template.
        refused_harmless: How many harmless ones.
    """

    stream: tuple[float, ...]
    refused: int | None
    refused_harmless: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReading:
    """A model and its base on the same prompts.

    Attributes:
        directions: recovered: those that were projected out; given: those of --direction, as none were recovered.
        k: How many.
        n_prompts: Prompts of each kind, from the start of the bundled test sets.
        base: What the base did.
        model: What the model did.
        left: Mean of the model's component over all places in the stream, as a share of the base's.
    """

    directions: str
    k: int
    n_prompts: int
    base: ModelRun
    model: ModelRun
    left: float


def read_runs(
    *,
    model: ModelSource,
    base: ModelSource,
    recovered: NDArray[np.float64] | None,
    given: Sequence[Tensor] = (),
    n_prompts: int = N_PROMPTS,
    model_options: ModelOptions | None = None,
    progress: ProgressReporter = SILENT,
) -> RunReading:
    """Run both models, one after the other.

    Args:
        model: The model.
        base: What it was made from.
        recovered: [k, d_model], the directions that were projected out; None where no common ones were.
        given: Directions to look for where none were recovered.
        n_prompts: How many prompts of each kind.
        model_options: How to load and run the models.
        progress: Where to show progress.

    Raises:
        InputError: There is no direction to look for.
        ModelError: A model does not load or run.
    """
    if recovered is None and not given:
        raise InputError(
            f"{model.name}: no direction was recovered that all tensors share, so --run has none to look for; name one "
            "with --direction"
        )
    vectors = torch.stack(list(given)) if recovered is None else torch.from_numpy(recovered)
    subspace = orthonormalize(vectors.double())[0]
    texts = {kind: load_prompt_set(BUNDLED, kind=kind, part="test").texts[:n_prompts] for kind in _KINDS}
    runs = []
    for source in (base, model):
        gc.collect()
        runs.append(_run(source, texts, subspace, model_options or ModelOptions(), progress))
    before, after = (sum(run.stream) for run in runs)
    return RunReading(
        directions="given" if recovered is None else "recovered",
        k=len(subspace),
        n_prompts=n_prompts,
        base=runs[0],
        model=runs[1],
        left=after / before if before else 0.0,
    )


def _run(
    source: ModelSource,
    texts: dict[Kind, tuple[str, ...]],
    subspace: Tensor,
    options: ModelOptions,
    progress: ProgressReporter,
) -> ModelRun:
    # In a call of its own, so that one model is gone before the other is loaded.
    chat = open_model(source, options=options, needs_template=False, progress=progress).chat
    rows = {kind: chat.encode(some) for kind, some in texts.items()}
    together = [row for some in rows.values() for row in some]
    with progress.task(f"Running prompts ({source.name})", total=len(together)) as advance:
        found = run_prompts(chat, together, subspace=subspace, advance=advance)
    refused: dict[Kind, int] | None = None
    if getattr(chat.tokenizer, "chat_template", None):
        run = ReplyRun(chat=chat, ranks=ALONE)
        # Replies to harmful prompts are counted, and gone.
        refused = {
            kind: count_short_replies(run.read(rows[kind], progress=progress, task=f"Replies ({kind})")).refused
            for kind in _KINDS
        }
    return ModelRun(
        stream=found.mean,
        refused=None if refused is None else refused["harmful"],
        refused_harmless=None if refused is None else refused["harmless"],
    )
