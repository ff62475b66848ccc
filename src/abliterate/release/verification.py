"""Verifying an orthogonalized checkpoint: its files, and what it does when it runs.

(a), (b) its files (see `file_checks`); (c) the directions in its residual stream on real prompts, beside its
base; (d) its logits beside those of the base with the directions ablated by hooks. docs/exactness.md says when the
stream must be clean and when the logits must be equal; where they need not be, (c) and (d) report and do not judge.
Of a partial edit what is left in the stream is measured, and the verdict says that it is partial.
`report` says how clean is clean.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from abliterate.checkpoints.checkpoint import is_gguf
from abliterate.checkpoints.model_source import ModelSource
from abliterate.directions import Direction, load_direction, orthonormalize
from abliterate.editing.record import RECORD_NAME, AbliterationRecord, read_record
from abliterate.errors import InputError
from abliterate.formats.gguf_checkpoint import open_weights
from abliterate.models.options import ModelOptions
from abliterate.progress import SILENT, ProgressReporter
from abliterate.release.file_checks import verify_files
from abliterate.release.options import VerificationOptions
from abliterate.release.recorded_edits import find_base, recorded_remainder, recorded_subspace
from abliterate.release.report import (
    LogitCheck,
    StreamCheck,
    VerificationReport,
    check_partial,
    logit_failures,
    stream_failures,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Sine of the angle below which two subspaces are the same; directions are stored in float32.
_SAME_SUBSPACE = 1e-6


def verify_checkpoint(
    *,
    checkpoint: Path,
    base: ModelSource | Path | str | None = None,
    directions: "Sequence[Direction | Path]" = (),
    options: VerificationOptions | None = None,
    model_options: ModelOptions | None = None,
    progress: ProgressReporter = SILENT,
) -> VerificationReport:
    """Verify a checkpoint that `orthogonalize_checkpoint` wrote. A failed check is in the report and raises nothing.

    Args:
        checkpoint: The directory.
        base: What it was made from; by default what its record names, from the Hub if need be.
        directions: Directions that must span what the record says was removed.
        options: See `VerificationOptions`.
        model_options: How to load and run the models.
        progress: Where to show progress.

    Raises:
        InputError: There is no record, it is of an adapter, or the base is not there or not the one that was edited.
        CheckpointError: A checkpoint cannot be read.
        ModelError: A model does not load or run.
        HubError: The base cannot be fetched.
        PromptSetError: The prompts cannot be read.
    """
    options = options or VerificationOptions()
    record = read_record(checkpoint.parent if is_gguf(checkpoint) else checkpoint)
    if record.is_adapter:
        raise InputError(
            f"{checkpoint}: is an adapter, which was merged and measured when it was written and holds no weights to "
            "verify; orthogonalize its base without --format adapter and verify that"
        )
    subspace = recorded_subspace(record)
    failures = _compare_directions(record, subspace, directions)
    source = find_base(record, base)
    original = open_weights(source.path)
    files = verify_files(record, base=original, progress=progress)
    failures += files.failures
    remainder = recorded_remainder(record, original)
    stream: StreamCheck | None = None
    logits: LogitCheck | None = None
    notes: tuple[str, ...] = ()
    if not options.quick and not failures:
        from abliterate.release.verification_runs import ModelRuns

        run = ModelRuns(
            record=record,
            source=source,
            subspace=subspace,
            options=options,
            model_options=model_options or ModelOptions(),
            progress=progress,
        )
        stream, logits, notes = run.measure(files)
        failures += stream_failures(checkpoint, stream) + logit_failures(checkpoint, logits)
    elif not options.quick:
        notes = ("the models were not run, because the files failed already",)
    return VerificationReport(
        checkpoint=str(checkpoint),
        base=source.name,
        base_revision=source.revision,
        k=len(subspace),
        direction_given=bool(directions),
        files=files,
        stream=stream,
        logits=logits,
        notes=notes,
        failures=tuple(failures),
        passed=not failures,
        verdict="failed" if failures else "verified" if remainder is None else "partial",
        partial=check_partial(remainder, stream),
    )


def _compare_directions(
    record: AbliterationRecord, subspace: "NDArray[np.float64]", directions: "Sequence[Direction | Path]"
) -> list[str]:
    if not directions:
        return []
    import torch

    d_model = subspace.shape[1]
    loaded = [each if isinstance(each, Direction) else load_direction(each, d_model=d_model) for each in directions]
    given = orthonormalize(torch.stack([each.vector for each in loaded]))[0]
    recorded = torch.from_numpy(subspace)
    missing = float(torch.linalg.matrix_norm(given - (given @ recorded.T) @ recorded, ord=2))
    if len(given) == len(subspace) and missing <= _SAME_SUBSPACE:
        return []
    return [
        f"{record.directory}: the {len(given)} directions given do not span the {len(subspace)} that {RECORD_NAME} "
        f"says were removed (sine of the angle between them {missing:.2g}); give those that it was made with"
    ]
