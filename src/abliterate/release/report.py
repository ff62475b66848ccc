"""What verifying a checkpoint by running it found, what rounding explains of it, and what fails.

How clean is clean. Every write to the stream rounds: by at most u |h| with the unit roundoff u of the number format
the model runs in (2^-24 for float32, 2^-8 for bfloat16), in directions of its own. A token's 2 L + 1 writes add up
to about sqrt(2 L + 1) u of the largest |h| it has had. Matrix products sum in float32 at best, which counts
eightfold (massive activations: a few large terms among many). What rounding left in the stored weights comes on top;
(b) has measured it in the norm of each weight, and single tokens may have a multiple of that. Codes may be decoded to
bfloat16 by what runs them, whatever it computes in, which rounds once more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from abliterate.architectures.writers import Remainder
from abliterate.checkpoints.safetensors_file import PLAIN_DTYPES
from abliterate.editing.checks import reasons_against_clean_stream, reasons_against_equal_logits
from abliterate.formats.stored_component import roundoff
from abliterate.release.file_checks import QuickCheck, TensorCheck

if TYPE_CHECKING:
    from abliterate.release.stream_checks import LogitComparison, LogitDifference, StreamComponents


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCheck:
    """The directions in the stream at one place: largest and mean |R h|/|h| over all tokens.

    Attributes:
        place: `layer N` for the input of block N, or `final norm` for what goes into it.
        base_max: In the base.
        base_mean: In the base.
        edited_max: In the edited checkpoint.
        edited_mean: In the edited checkpoint.
        ablated_max: In the base ablated by hooks, in the same number format: what rounding alone leaves, just
            after each ablation. None where hooks do not fit the architecture.
        edited_accumulated: Largest |R h| in the edited checkpoint over the largest |h| that the token has had.
    """

    place: str
    base_max: float
    base_mean: float
    edited_max: float
    edited_mean: float
    ablated_max: float | None
    edited_accumulated: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamCheck:
    """(c): the directions in the residual stream, base beside edited.

    Attributes:
        dtype: The number format that the models ran in.
        device: Where they ran.
        n_prompts: Number of prompts.
        n_tokens: Number of tokens.
        layers: One entry per place.
        tolerance: What `edited_accumulated` may be at the most.
        judged: Whether more than that fails.
        reasons: Why not, if not.
    """

    dtype: str
    device: str
    n_prompts: int
    n_tokens: int
    layers: tuple[LayerCheck, ...]
    tolerance: float
    judged: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitCheck:
    """(d): the edited checkpoint's logits beside those of the base ablated by hooks.

    Attributes:
        last: At the last token of each prompt.
        all: At all tokens.
        tolerance: What `all.relative` may be at the most.
        judged: Whether more than that fails.
        reasons: Why not, if not.
    """

    last: LogitDifference
    all: LogitDifference
    tolerance: float
    judged: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialCheck:
    """What a partial edit left of the directions in the residual stream, |R h|/|h| over all places and tokens.

    Attributes:
        reason: Why no edit of weights cleans it.
        modules: What still writes, names within the checkpoint, numbers as `*`.
        base_max: The largest in the base; None if nothing was run, as the following.
        base_mean: The mean in the base.
        edited_max: The largest in the edited checkpoint.
        edited_mean: The mean in the edited checkpoint.
    """

    reason: str
    modules: tuple[str, ...]
    base_max: float | None
    base_mean: float | None
    edited_max: float | None
    edited_mean: float | None


Verdict = Literal["verified", "partial", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerificationReport:
    """What verifying a checkpoint found.

    Attributes:
        checkpoint: The directory.
        base: The model it was held against.
        base_revision: Its commit on the Hub; None for a directory.
        k: Number of directions.
        direction_given: Whether directions were given and span what the record says.
        files: (a) and (b).
        stream: (c); None if nothing was run.
        logits: (d); None if nothing was run, or hooks do not fit the architecture.
        notes: What was not done, and why.
        failures: What failed, a line each, the most telling first.
        passed: Whether nothing did.
        verdict: verified; partial where nothing failed and the edit leaves a part of the stream as it must; failed.
        partial: What it leaves; None where it leaves nothing.
    """

    checkpoint: str
    base: str
    base_revision: str | None
    k: int
    direction_given: bool
    files: QuickCheck
    stream: StreamCheck | None
    logits: LogitCheck | None
    notes: tuple[str, ...]
    failures: tuple[str, ...]
    passed: bool
    verdict: Verdict
    partial: PartialCheck | None = None


def stream_tolerance(tensors: Sequence[TensorCheck], *, dtype: str, n_layers: int) -> float:
    """Return what |R h|, over the largest |h| so far, may be in a clean stream (see above).

    Args:
        tensors: The edited tensors as (b) measured them.
        dtype: What the model ran in, as torch names it.
        n_layers: Number of decoder blocks.
    """
    writes = math.sqrt(2 * n_layers + 1)
    stored = max(
        (check.after.share + check.decoded for check in tensors if not check.expected and check.bound is not None),
        default=0.0,
    )
    return writes * (_roundoff(dtype) + 8 * roundoff("F32")) + 16 * stored


def logit_tolerance(tensors: Sequence[TensorCheck], *, dtype: str, n_layers: int) -> float:
    """Return how far logits may be from equal ones (`LogitDifference.relative`) by rounding of weights and stream.

    Projecting a weight rounds it anew, by at most u of the format it is stored in, and every write to the stream by
    u of the format it runs in; a model's 2 L + 1 writes add up as above, and its layers may amplify that eightfold.
    Codes with scales count as bfloat16.
    """
    stored = (roundoff(check.dtype if check.dtype in PLAIN_DTYPES else "BF16") for check in tensors)
    rounding = max([_roundoff(dtype), *stored]) + 8 * roundoff("F32")
    return float(8 * math.sqrt(2 * n_layers + 1) * rounding)


def _roundoff(dtype: str) -> float:
    import torch

    return float(torch.finfo(getattr(torch, dtype)).eps / 2)


def check_stream(
    record: Mapping[str, Any],
    tensors: Sequence[TensorCheck],
    base: StreamComponents,
    edited: StreamComponents,
    ablated: StreamComponents | None,
    *,
    n_prompts: int,
    device: str,
) -> StreamCheck:
    """Lay out what runs of the base, the edited checkpoint and the ablated base showed, place by place.

    Args:
        record: The content of `abliteration.json`.
        tensors: The edited tensors as (b) measured them.
        base: The base's run.
        edited: The edited checkpoint's run.
        ablated: The run of the base ablated by hooks, if there was one.
        n_prompts: Number of prompts run.
        device: Where.
    """
    n_layers = len(base.largest) - 1
    places = [*(f"layer {layer}" for layer in range(n_layers)), "final norm"]
    reasons = reasons_against_clean_stream(record)
    return StreamCheck(
        dtype=edited.dtype,
        device=device,
        n_prompts=n_prompts,
        n_tokens=edited.n_tokens,
        layers=tuple(
            LayerCheck(
                place=place,
                base_max=base.largest[i],
                base_mean=base.mean[i],
                edited_max=edited.largest[i],
                edited_mean=edited.mean[i],
                ablated_max=ablated.largest[i] if ablated else None,
                edited_accumulated=edited.accumulated[i],
            )
            for i, place in enumerate(places)
        ),
        tolerance=stream_tolerance(tensors, dtype=edited.dtype, n_layers=n_layers),
        judged=not reasons,
        reasons=reasons,
    )


def check_partial(remainder: Remainder | None, stream: StreamCheck | None) -> PartialCheck | None:
    """Lay out what a partial edit left; None where the edit is whole.

    Args:
        remainder: What an edit of the base leaves.
        stream: (c), if it was run.
    """
    if remainder is None:
        return None
    layers = () if stream is None else stream.layers
    if not layers:
        nothing = {"base_max": None, "base_mean": None, "edited_max": None, "edited_mean": None}
        return PartialCheck(reason=remainder.reason, modules=remainder.modules, **nothing)
    import torch

    # `max` would lose a NaN.
    found = torch.tensor([[each.base_max, each.base_mean, each.edited_max, each.edited_mean] for each in layers])
    largest, means = found.max(dim=0).values.tolist(), found.mean(dim=0).tolist()
    return PartialCheck(
        reason=remainder.reason,
        modules=remainder.modules,
        base_max=largest[0],
        base_mean=means[1],
        edited_max=largest[2],
        edited_mean=means[3],
    )


def check_logits(
    record: Mapping[str, Any],
    tensors: Sequence[TensorCheck],
    last: LogitComparison,
    everywhere: LogitComparison,
    *,
    stream: StreamCheck,
) -> LogitCheck:
    """Lay out the comparison of the edited checkpoint's logits with the ablated base's.

    Args:
        record: The content of `abliteration.json`.
        tensors: The edited tensors as (b) measured them.
        last: The comparison at the last tokens.
        everywhere: The comparison at all tokens.
        stream: What the same runs showed of the stream.
    """
    reasons = reasons_against_equal_logits(record)
    return LogitCheck(
        last=last.result(),
        all=everywhere.result(),
        tolerance=logit_tolerance(tensors, dtype=stream.dtype, n_layers=len(stream.layers) - 1),
        judged=not reasons,
        reasons=reasons,
    )


def stream_failures(checkpoint: Path, check: StreamCheck) -> list[str]:
    """Return a line for each place where the stream must be clean and is not."""
    if not check.judged:
        return []
    # Written so that a NaN, which no comparison holds for, fails.
    return [
        f"{checkpoint}: the residual stream at {layer.place} has a component of {layer.edited_accumulated:.3g} "
        f"along what was removed ({layer.base_max:.3g} in the base), and rounding in {check.dtype} explains "
        f"{check.tolerance:.3g}: something that writes to it before was not edited"
        for layer in check.layers
        if not layer.edited_accumulated <= check.tolerance
    ]


def logit_failures(checkpoint: Path, check: LogitCheck | None) -> list[str]:
    """Return a line if the logits must equal those of the ablated base and do not."""
    if check is None or not check.judged or check.all.relative <= check.tolerance:
        return []
    return [
        f"{checkpoint}: its logits differ from those of the ablated base by {check.all.relative:.3g} of their "
        f"size (largest difference {check.all.largest:.3g}), and rounding explains {check.tolerance:.3g}: "
        "something was edited that does not write to the residual stream, or not edited"
    ]
