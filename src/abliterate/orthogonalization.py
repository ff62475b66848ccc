"""Orthogonalizing a checkpoint: a new directory whose weights cannot write along given directions.

Works on files, never on a loaded model. The plan is made from the headers; then each shard is copied byte
for byte except for the residual writers, which are projected (see `projection` for the mathematics and for
when the result equals ablating activations). Names, order, dtypes, offsets, metadata and the index stay as
they were, and so does every other file, unless tensors must be added (an untied head, a bias that is switched
on). The new directory is reread and checked before it appears, whole.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from abliterate.abliteration_record import EditedTensor, OrthogonalizationReport, write_record
from abliterate.atomic_directory import published_directory
from abliterate.checkpoint import open_checkpoint
from abliterate.checkpoint_checks import (
    EditedWriter,
    Survivor,
    compare_bytes,
    compare_layouts,
    measure_survivors,
    ratio,
)
from abliterate.directions import Direction
from abliterate.edit_plan import EditOptions, EditPlan, make_edit_plan
from abliterate.edited_checkpoint import MadeEdit, write_edited_checkpoint
from abliterate.errors import InputError, VerificationError
from abliterate.hub import ModelSource
from abliterate.planned_report import check_output, planned_report
from abliterate.progress import SILENT, ProgressReporter
from abliterate.projection import residue_bound
from abliterate.safetensors_file import TORCH_DTYPES, hash_range
from abliterate.tensor_edits import TensorEdit


def orthogonalize_checkpoint(
    *,
    source: ModelSource | Path | str,
    direction: Direction | Path | str | Sequence[Direction | Path | str],
    output: Path | str | None,
    options: EditOptions | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    progress: ProgressReporter = SILENT,
) -> OrthogonalizationReport:
    """Write a copy of a checkpoint in which nothing that writes to the residual stream has `direction` in it.

    Section 4.1 of arXiv 2406.11717: W <- W - strength * r (r^T W), for the embeddings, the out-projections of
    attention and MLP, and their biases. Several directions are projected out together, and where norms stand
    between a writer and the stream, what is projected out is the direction as seen through them.

    Args:
        source: The model to edit: a local directory, or what `hub.resolve_model` returned.
        direction: A direction or the file that holds it, or several of them.
        output: Directory to make; may be None in a dry run.
        options: What to edit, and how; all residual writers at strength 1 by default.
        dry_run: Make and return the plan, and write nothing.
        overwrite: Replace `output` if it is a checkpoint or an empty directory.
        progress: Shown the bytes written and checked.

    Returns:
        The report; `abliteration.json` in `output` is made from it.

    Raises:
        InputError: `output` cannot be used, or the options select nothing.
        DirectionError: A direction is malformed, has another width than the model, or adds nothing to the others.
        CheckpointError: The source is incomplete, quantised or of an unsupported type, or writing failed.
        VerificationError: What was written, reread, still has the direction in it.
    """
    plan = make_edit_plan(source=source, direction=direction, options=options or EditOptions())
    if output is None and not dry_run:
        raise InputError("no output directory was given; name one with -o, or give --dry-run")
    target = None if output is None else Path(output)
    if target is not None:
        check_output(target, plan.checkpoint.path, overwrite=overwrite)
    report = planned_report(plan, target, dry_run=dry_run)
    if dry_run or target is None:
        return report
    for note in report.notes:
        progress.message(note)
    with published_directory(target) as partial:
        return _write(plan, report, partial, progress)


def _write(
    plan: EditPlan, report: OrthogonalizationReport, partial: Path, progress: ProgressReporter
) -> OrthogonalizationReport:
    with progress.task(f"Writing {report.output}", total=report.bytes_total, unit="bytes") as advance:
        written = write_edited_checkpoint(plan, partial, advance=advance)
    made = written.made
    missed = sorted({edit.name for edit in plan.edits} - made.keys())
    if missed:
        raise VerificationError(f"{partial}: {len(missed)} planned edits were not made, first {missed[0]}")
    with progress.task(f"Checking {report.output}", total=report.bytes_total, unit="bytes") as advance:
        after = _check_written(plan, partial, made, advance)
    report = dataclasses.replace(
        report,
        shards=written.shards,
        side_files=written.side_files,
        tensors=tuple(_measured(tensor, made[tensor.name], after.get(tensor.name)) for tensor in report.tensors),
    )
    write_record(report, partial)
    return report


def _measured(tensor: EditedTensor, made: MadeEdit, after: Survivor | None) -> EditedTensor:
    if made.before is None or after is None:
        return tensor
    return dataclasses.replace(
        tensor,
        component_before=ratio(*made.before),
        component_after=ratio(after.along_after, after.norm_after),
        survivor=ratio(after.along_after, made.before[0]),
    )


def _check_written(
    plan: EditPlan, partial: Path, made: Mapping[str, MadeEdit], advance: Callable[[int], None]
) -> dict[str, Survivor]:
    """Reread what was written: nothing but the planned tensors differs, and nothing of the directions is left."""
    base, written = plan.checkpoint, open_checkpoint(partial)
    problems = compare_layouts(
        base,
        written,
        added={edit.name for edit in plan.edits if edit.is_new},
        config_changes=plan.config_changes,
    ) or compare_bytes(base, written, changed={edit.name for edit in plan.edits}, advance=advance)
    infos = {info.name: info for info in written.tensors()}
    problems += [
        f"{edit.info.shard}: tensor {edit.name}, reread, is not what was written"
        for edit in plan.edits
        if not problems and hash_range(partial, infos[edit.name]) != made[edit.name].sha256
    ]
    if problems:
        raise VerificationError(f"{partial}: {problems[0]}; disk or memory may be faulty, run again")
    projected = [edit for edit in plan.edits if edit.project]
    writers = [
        EditedWriter(name=edit.name, residual_axis=edit.residual_axis, norm_chain=edit.norm_chain) for edit in projected
    ]
    found = measure_survivors(written, base=None, writers=writers, subspace=plan.subspace, advance=advance)
    survivors = {survivor.name: survivor for survivor in found}
    for edit in projected:
        _check_survivor(plan, edit, made[edit.name], survivors[edit.name])
    return survivors


def _check_survivor(plan: EditPlan, edit: TensorEdit, made: MadeEdit, found: Survivor) -> None:
    along, norm = made.before or (0.0, 0.0)
    strength = plan.options.strength
    bound = residue_bound(
        TORCH_DTYPES[found.dtype],
        d_model=plan.stream.d_model,
        elements=math.prod(edit.info.shape),
        before=max(1.0, strength) * norm,
        after=found.norm_after,
    )
    # Lengths that are restored scale what a strength other than 1 leaves, by a factor per column.
    is_known = strength == 1.0 or not plan.options.preserve_norms
    left = abs(found.along_after - abs(1 - strength) * along)
    if not math.isfinite(found.norm_after) or (is_known and left > bound):
        raise VerificationError(
            f"{edit.info.shard}: tensor {edit.name}, reread, has a component of {found.along_after:.3g} along what "
            f"was to be removed, {abs(1 - strength) * along:.3g} was to be left, and rounding to {found.dtype} "
            f"explains {bound:.3g}; disk or memory may be faulty, run again"
        )
