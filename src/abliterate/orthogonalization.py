"""Orthogonalizing a checkpoint: a new directory whose weights cannot write along given directions.

Works on files, never on a loaded model. The plan is made from the headers; then each shard is copied byte
for byte except for the residual writers, which are projected (see `projection` for the mathematics and for
when the result equals ablating activations). Names, order, dtypes, offsets, metadata and the index stay as
they were, and so does every other file. The new directory is reread and checked before it appears, whole.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from abliterate._version import __version__
from abliterate.abliteration_record import (
    EVALUATION_NAME,
    FORMAT_VERSION,
    RECORD_NAME,
    EditedTensor,
    OrthogonalizationReport,
    encode_subspace,
    write_record,
)
from abliterate.atomic_directory import check_output_directory, published_directory
from abliterate.checkpoint import CONFIG_NAME, Checkpoint, open_checkpoint, read_json_object
from abliterate.checkpoint_checks import (
    EditedWriter,
    Survivor,
    compare_bytes,
    compare_layouts,
    directions_through,
    measure_survivors,
    ratio,
)
from abliterate.directions import Direction
from abliterate.edit_plan import EditOptions, EditPlan, make_edit_plan
from abliterate.errors import CheckpointError, InputError, VerificationError
from abliterate.hashed_files import WrittenFile, copy_file
from abliterate.hub import ModelSource
from abliterate.progress import SILENT, ProgressReporter
from abliterate.projection import component_and_norm, project_out, residue_bound
from abliterate.residual_writers import ROLES, ResidualWriter
from abliterate.safetensors_file import TORCH_DTYPES, rewrite_shard


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
        options: What to edit; all residual writers at strength 1 by default.
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
        _check_output(target, plan.checkpoint.path, overwrite=overwrite)
    report = _planned_report(plan, target, dry_run=dry_run)
    if dry_run or target is None:
        return report
    for note in report.notes:
        progress.message(note)
    with published_directory(target) as partial:
        return _write(plan, report, partial, progress)


def _check_output(output: Path, source: Path, *, overwrite: bool) -> None:
    resolved, base = output.resolve(), source.resolve()
    if resolved == base or base in resolved.parents or resolved in base.parents:
        raise InputError(
            f"{output}: is, contains or lies in the model's own directory {source}; choose another directory"
        )
    check_output_directory(output, overwrite=overwrite)


def _planned_report(plan: EditPlan, output: Path | None, *, dry_run: bool) -> OrthogonalizationReport:
    checkpoint = plan.checkpoint
    infos = {info.name: info for info in checkpoint.tensors()}
    edited = [infos[writer.tensor_name] for writer in plan.writers]
    roles = [writer.role for writer in plan.writers]
    return OrthogonalizationReport(
        output=None if output is None else str(output),
        dry_run=dry_run,
        format_version=FORMAT_VERSION,
        tool={
            "name": "abliterate",
            "version": __version__,
            "torch": torch.__version__,
            "safetensors": safetensors.__version__,
        },
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        base=_describe_base(plan),
        directions=tuple(
            {"sha256": direction.sha256, "d_model": direction.d_model, "metadata": direction.metadata}
            for direction in plan.directions
        ),
        subspace=encode_subspace(plan.subspace),
        options=plan.options,
        tensors=tuple(
            EditedTensor(
                name=info.name,
                role=writer.role,
                layer=writer.layer,
                residual_axis=writer.residual_axis,
                shape=info.shape,
                dtype=info.dtype,
                shard=info.shard,
                norm_chain=writer.norm_chain,
            )
            for writer, info in zip(plan.writers, edited, strict=True)
        ),
        shards={},
        side_files={},
        counts={role: roles.count(role) for role in ROLES if role in roles},
        bytes_edited=sum(info.end - info.start for info in edited),
        bytes_total=sum(shard.size for shard in checkpoint.shards),
        notes=plan.notes(),
    )


def _describe_base(plan: EditPlan) -> dict[str, Any]:
    checkpoint = plan.checkpoint
    base: dict[str, Any] = {
        "model": plan.source.name,
        "revision": plan.source.revision,
        "model_type": plan.stream.model_type,
        "config_sha256": hashlib.sha256((checkpoint.path / CONFIG_NAME).read_bytes()).hexdigest(),
        "tied_embeddings": plan.stream.tied_embeddings,
    }
    if RECORD_NAME in checkpoint.side_files:
        earlier = read_json_object(checkpoint.path / RECORD_NAME)
        base["abliteration"] = {key: earlier.get(key) for key in ("base", "directions", "options")}
    return base


def _write(
    plan: EditPlan, report: OrthogonalizationReport, partial: Path, progress: ProgressReporter
) -> OrthogonalizationReport:
    checkpoint = plan.checkpoint
    before: dict[str, tuple[float, float]] = {}
    chains = {writer.norm_chain for writer in plan.writers}
    directions = directions_through(checkpoint, plan.subspace, chains=chains)
    edits = {
        writer.tensor_name: _edit_of(plan, writer, directions[writer.norm_chain], before) for writer in plan.writers
    }
    with progress.task(f"Writing {report.output}", total=report.bytes_total, unit="bytes") as advance:
        shards = {
            shard.file_name: rewrite_shard(shard, source=checkpoint.path, target=partial, edits=edits, advance=advance)
            for shard in checkpoint.shards
        }
    side_files = _copy_side_files(checkpoint, partial)
    missed = sorted(edits.keys() - before.keys())
    if missed:
        raise VerificationError(f"{partial}: {len(missed)} planned edits were not made, first {missed[0]}")
    with progress.task(f"Checking {report.output}", total=report.bytes_total, unit="bytes") as advance:
        after = _check_written(plan, partial, before, advance)
    report = dataclasses.replace(
        report,
        shards=shards,
        side_files=side_files,
        tensors=tuple(
            dataclasses.replace(
                tensor,
                component_before=ratio(*before[tensor.name]),
                component_after=ratio(after[tensor.name].along_after, after[tensor.name].norm_after),
                survivor=ratio(after[tensor.name].along_after, before[tensor.name][0]),
            )
            for tensor in report.tensors
        ),
    )
    write_record(report, partial)
    return report


def _edit_of(
    plan: EditPlan,
    writer: ResidualWriter,
    directions: Tensor,
    before: dict[str, tuple[float, float]],
) -> Callable[[Tensor], Tensor]:
    def edit(weight: Tensor) -> Tensor:
        axis = writer.residual_axis
        measured = component_and_norm(weight, directions=directions, residual_axis=axis)
        if not math.isfinite(measured[1]):
            raise CheckpointError(
                f"{plan.checkpoint.path}: tensor {writer.tensor_name} holds NaN or infinite values; "
                "download the checkpoint again"
            )
        before[writer.tensor_name] = measured
        return project_out(weight, directions=directions, residual_axis=axis, strength=plan.options.strength)

    return edit


def _copy_side_files(checkpoint: Checkpoint, partial: Path) -> dict[str, WrittenFile]:
    left_out = {RECORD_NAME, EVALUATION_NAME} if RECORD_NAME in checkpoint.side_files else set()
    copied = {}
    for name in checkpoint.side_files:
        if name in left_out:
            continue
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        copied[name] = copy_file(checkpoint.path / name, partial / name)
    return copied


def _check_written(
    plan: EditPlan,
    partial: Path,
    before: Mapping[str, tuple[float, float]],
    advance: Callable[[int], None],
) -> dict[str, Survivor]:
    """Reread what was written: nothing but the planned tensors differs, and nothing of the directions is left."""
    base, written = plan.checkpoint, open_checkpoint(partial)
    changed = {writer.tensor_name for writer in plan.writers}
    problems = compare_layouts(base, written) or compare_bytes(base, written, changed=changed, advance=advance)
    if problems:
        raise VerificationError(f"{partial}: {problems[0]}; disk or memory may be faulty, run again")
    infos = {info.name: info for info in written.tensors()}
    edited = [
        EditedWriter(name=writer.tensor_name, residual_axis=writer.residual_axis, norm_chain=writer.norm_chain)
        for writer in plan.writers
    ]
    survivors = {}
    for found in measure_survivors(written, base=None, writers=edited, subspace=plan.subspace, advance=advance):
        bound = residue_bound(
            TORCH_DTYPES[found.dtype],
            d_model=plan.stream.d_model,
            elements=math.prod(infos[found.name].shape),
            before=before[found.name][1],
            after=found.norm_after,
        )
        if not math.isfinite(found.norm_after) or (plan.options.strength == 1.0 and found.along_after > bound):
            raise VerificationError(
                f"{infos[found.name].shard}: tensor {found.name}, reread, has a component of "
                f"{found.along_after:.3g} along what was removed and rounding to {found.dtype} explains "
                f"{bound:.3g}; disk or memory may be faulty, run again"
            )
        survivors[found.name] = found
    return survivors
