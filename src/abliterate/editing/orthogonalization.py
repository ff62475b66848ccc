"""Orthogonalizing a checkpoint: a new directory whose weights cannot write along given directions.

Works on files, never on a loaded model. The plan is made from the headers; then each shard is copied byte
for byte except for the residual writers, which are projected (see `projection` for the mathematics and for
when the result equals ablating activations). Names, order, dtypes, offsets, metadata and the index stay as
they were, and so does every other file, unless tensors must be added (an untied head, a bias that is switched
on). What was edited is read back and measured before the new directory appears, whole. An interrupted run is resumed
only where the hashes of everything that decides its bytes are the same.
"""

import dataclasses
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from abliterate.checkpoints.checkpoint import GGUF_SUFFIX
from abliterate.checkpoints.model_source import ModelSource
from abliterate.checkpoints.partial_run import partial_run
from abliterate.checkpoints.provenance import values_sha256, versions
from abliterate.directions import Direction, encode_rows
from abliterate.editing.checks import compare_layouts, measure_survivors, rounding_bound
from abliterate.editing.edited_files import EditedFiles
from abliterate.editing.options import EditOptions, WriteOptions
from abliterate.editing.plan import EditPlan, TwinProof, make_edit_plan
from abliterate.editing.plan_report import check_output, planned_report
from abliterate.editing.record import (
    RECORD_NAME,
    EditedTensor,
    OrthogonalizationReport,
    Work,
    write_record,
)
from abliterate.errors import InputError, VerificationError
from abliterate.formats.gguf_checkpoint import open_weights
from abliterate.formats.quantized import plain_view
from abliterate.progress import SILENT, ProgressReporter


def plan_key(plan: EditPlan, *, device: str) -> dict[str, str]:
    """Return a hash for each part of what decides the result, under the word that messages use for the part.

    Files of the source go in by size, time of change and, for shards, header: reading them whole would take as long
    as writing the result.

    Args:
        plan: The plan.
        device: Where the arithmetic is done.
    """
    checkpoint = plan.checkpoint
    names = [*(shard.file_name for shard in checkpoint.shards), *checkpoint.side_files]
    states = {name: (checkpoint.path / name).stat() for name in names}
    doses = [edit.dose for edit in plan.edits]
    return {
        "model": values_sha256(
            [
                {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()},
                [hashlib.sha256(shard.header_bytes).hexdigest() for shard in checkpoint.shards],
            ]
        ),
        "direction": values_sha256([encode_rows(plan.removed.subspace), doses]),
        "set of options": values_sha256(
            [dataclasses.asdict(plan.options), plan.config_changes, [edit.name for edit in plan.edits], device]
        ),
        "version": values_sha256(list(versions("abliterate", "torch").values())),
    }


def orthogonalize_checkpoint(
    *,
    source: ModelSource | Path | str,
    direction: Direction | Path | str | Sequence[Direction | Path | str],
    output: Path | str | None,
    options: EditOptions | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    writing: WriteOptions | None = None,
    proof: TwinProof | None = None,
    progress: ProgressReporter = SILENT,
) -> OrthogonalizationReport:
    """Write a copy of a checkpoint in which nothing that writes to the residual stream has `direction` in it.

    Section 4.1 of arXiv 2406.11717: W <- W - strength * r (r^T W), for the embeddings, the out-projections of
    attention and MLP, and their biases. Several directions are projected out together, and where norms stand
    between a writer and the stream, what is projected out is the direction as seen through them.

    Args:
        source: The model to edit: a local directory, or what `resolve_model` returned.
        direction: A direction or the file that holds it, or several of them.
        output: Directory to make; may be None in a dry run.
        options: What to edit, and how; all residual writers at strength 1 by default.
        dry_run: Make and return the plan, and write nothing.
        overwrite: Replace `output` if it is a checkpoint or an empty directory.
        writing: How to write: threads, device, whether to resume an interrupted run.
        proof: What `tiny_twin.prove_on_tiny_twin` measured; of a partial edit the record holds it.
        progress: Shown the bytes written and checked.

    Returns:
        The report; `abliteration.json` in `output` is made from it.

    Raises:
        InputError: `output` cannot be used, or the options select nothing.
        DirectionError: A direction is malformed, has another width than the model, or adds nothing to the others.
        CheckpointError: The source is incomplete, quantised or of an unsupported type, or writing failed.
        VerificationError: What was written, reread, still has the direction in it.
        InterruptedRunError: SIGINT or SIGTERM came; the message says what is kept.
    """
    plan = make_edit_plan(source=source, direction=direction, options=options or EditOptions(), proof=proof)
    if output is None and not dry_run:
        raise InputError("no output directory was given; name one with -o, or give --dry-run")
    target = None if output is None else Path(output)
    if target is not None and target.suffix == GGUF_SUFFIX and not target.is_dir():
        raise InputError(
            f"{target}: -o names a directory, in which the file keeps its name beside its record; leave {GGUF_SUFFIX} "
            "away"
        )
    if target is not None:
        check_output(target, plan.source.path, overwrite=overwrite)
    report = planned_report(plan, target, dry_run=dry_run)
    if dry_run or target is None:
        return report
    for note in report.notes:
        progress.message(note)
    return _write(plan, report, target, writing or WriteOptions(), progress, overwrite=overwrite)


def _write(
    plan: EditPlan,
    report: OrthogonalizationReport,
    target: Path,
    writing: WriteOptions,
    progress: ProgressReporter,
    *,
    overwrite: bool,
) -> OrthogonalizationReport:
    started, cpu = time.perf_counter(), time.process_time()
    files, workers = EditedFiles(plan, device=writing.device), writing.n_workers
    key = plan_key(plan, device=writing.device)
    with partial_run(
        target,
        key=key,
        files=[*files.shard_names, *files.side_names, RECORD_NAME],
        resume=writing.resume,
        workers=workers,
        progress=progress,
        overwrite=overwrite,
    ) as run:
        run.check_space(files.sizes(), source=files.largest, edited=files.bytes_edited, stored=files.bytes_stored())
        finished, traffic = files.write(run.directory, target=target, workers=workers, progress=progress)
        partial = run.directory.path
        made = {tensor.name: tensor for file in finished.values() for tensor in file.edits}
        made |= _measure_requantized(plan, partial, progress)
        _check_written(plan, partial, made)
        written = dataclasses.replace(
            report,
            shards={name: finished[name].written for name in files.shard_names},
            side_files={name: finished[name].written for name in files.side_names},
            tensors=tuple(made[edit.name] for edit in plan.edits),
            work=Work(
                seconds=time.perf_counter() - started,
                cpu_seconds=time.process_time() - cpu,
                bytes_read=traffic.read,
                bytes_written=traffic.written,
                bytes_shared=traffic.shared,
                workers=workers,
                processes=1,
            ),
        )
        write_record(written, partial)
    return written


def _measure_requantized(plan: EditPlan, partial: Path, progress: ProgressReporter) -> dict[str, EditedTensor]:
    """Measure what was made of tensors that are stored quantised, decoded from what lies in the new directory."""
    edits = [edit for edit in plan.edits if edit.project and edit.source is not None and edit.source.encoding]
    if not edits:
        return {}
    with progress.task("Decoding", total=sum(edit.nbytes for edit in edits), unit="bytes") as advance:
        found = measure_survivors(
            plain_view(open_weights(partial)),
            base=plan.view,
            writers=[edit.writer for edit in edits],
            made_from={edit.name: edit.source.name for edit in edits if edit.source},
            removed=plan.removed,
            advance=advance,
        )
        return {
            edit.name: EditedTensor(edit=edit, before=before, after=after)
            for edit, (before, after) in zip(edits, found, strict=True)
        }


def _check_written(plan: EditPlan, partial: Path, made: Mapping[str, EditedTensor]) -> None:
    """Check that all was done that was planned and nothing else; what was edited has been read back already."""
    missed = sorted({edit.name for edit in plan.edits} - made.keys())
    if missed:
        raise VerificationError(f"{partial}: {len(missed)} planned edits were not made, first {missed[0]}")
    problems = compare_layouts(
        dataclasses.replace(plan.layout, config=plan.checkpoint.config),
        open_weights(partial),
        added={edit.name for edit in plan.edits if edit.is_new},
        config_changes=plan.config_changes,
    )
    if problems:
        raise VerificationError(f"{partial}: {problems[0]}; disk or memory may be faulty, run again")
    for edit in plan.edits:
        _check_survivor(plan, made[edit.name])


def _check_survivor(plan: EditPlan, made: EditedTensor) -> None:
    edit, before, after = made.edit, made.before, made.after
    if before is None or after is None:
        return
    strength = plan.options.strength_of(edit.writer)
    bound = rounding_bound(
        edit.info,
        residual_axis=edit.writer.residual_axis,
        k=plan.removed.rank,
        strength=strength,
        before=before,
        after=after.norm,
    )
    # Lengths that are restored scale what a strength other than 1 leaves, by a factor per column.
    is_known = strength == 1.0 or not plan.options.preserve_norms
    wanted = abs(1 - strength) * before.along
    left = abs(after.along - wanted)
    if not math.isfinite(after.norm) or (is_known and left > bound):
        raise VerificationError(
            f"{edit.info.shard}: tensor {edit.name}, reread, has a component of {after.along:.3g} along what "
            f"was to be removed, {wanted:.3g} was to be left, and rounding to {edit.stored_dtype} "
            f"explains {bound:.3g}; disk or memory may be faulty, run again"
        )
