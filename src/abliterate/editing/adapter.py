"""An edit written as a LoRA adapter for PEFT: megabytes beside the base instead of a second checkpoint.

W' - W = -s U^T (U W) has the rank of the directions, so two factors hold it exactly (`lora`).
`adapter_model.safetensors` holds them under the names that PEFT gives them, biases whole; `adapter_config.json` names
the modules. Rank and alpha are equal, so nothing is scaled. Merged by PEFT, the adapter gives the orthogonalized
checkpoint up to one rounding, which no feedback follows: how much of the component that leaves is in the report. What
no such change can express is refused.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abliterate.checkpoints.atomic_directory import published_directory
from abliterate.checkpoints.file_assembly import GivenSegment, NewFile, assemble_files
from abliterate.checkpoints.file_ranges import WrittenFile
from abliterate.checkpoints.model_source import ModelSource, read_card_facts
from abliterate.checkpoints.safetensors_file import TensorInfo, read_shard
from abliterate.checkpoints.stored_tensors import TORCH_DTYPES, read_tensor
from abliterate.directions import Direction
from abliterate.editing.adapter_layout import AdaptedWeight, AdapterLayout, lay_out_adapter
from abliterate.editing.checks import directions_through
from abliterate.editing.edits import TensorEdit
from abliterate.editing.lora import MergedWeight, coefficients, merge_factors, pack_factors, unpack_factors
from abliterate.editing.model_card import build_model_card
from abliterate.editing.options import EditOptions
from abliterate.editing.plan import EditPlan, make_edit_plan
from abliterate.editing.plan_report import check_output, planned_report
from abliterate.editing.record import RECORD_NAME, EditedTensor, OrthogonalizationReport, write_record
from abliterate.errors import CheckpointError, InputError, VerificationError
from abliterate.formats.component import component_and_norm
from abliterate.formats.gguf_checkpoint import holds_gguf
from abliterate.formats.projection import project_out
from abliterate.formats.stored_component import residue_bound
from abliterate.progress import SILENT, Advance, ProgressReporter

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"

_PREFIX = "base_model.model."

Directions = Mapping[str, Tensor]


def write_adapter_files(
    plan: EditPlan, layout: AdapterLayout, directory: Path, *, advance: Advance
) -> dict[str, WrittenFile]:
    """Write the factors and the config of an adapter to the empty directory `directory`.

    Args:
        plan: The edit.
        layout: Where its tensors go.
        directory: Where to write.
        advance: Told the bytes of the base's tensors that were read.

    Returns:
        File name -> hash and size, the weights first.

    Raises:
        CheckpointError: A tensor of the base cannot be read or is not finite.
    """
    from safetensors.torch import save

    directions = _directions(plan)
    tensors: dict[str, Tensor] = {}
    for weight in layout.weights:
        basis = directions[weight.edits[0].name]
        found = torch.cat([_coefficients(plan, edit, basis, advance) for edit in weight.edits])
        first, second = pack_factors(found, basis, rank=plan.removed.rank, residual_on_b=weight.residual_on_b)
        name_a, name_b = _factor_names(weight)
        tensors |= {name_a: first, name_b: second}
    for vector in layout.vectors:
        tensors[_PREFIX + vector.key] = _edited_vector(plan, vector.edit, directions, advance)
    config = json.dumps(adapter_config(plan, layout), indent=2, sort_keys=True) + "\n"
    weights = save(tensors, metadata={"format": "pt"})
    return write_contents({WEIGHTS_NAME: weights, CONFIG_NAME: config.encode()}, directory)


def write_contents(contents: Mapping[str, bytes], directory: Path) -> dict[str, WrittenFile]:
    """Write files of known content to a directory where they are not yet, each flushed to the disk and read back.

    Raises:
        VerificationError: What was read back is not what was written.
        OSError: A file cannot be written.
    """
    written: dict[str, WrittenFile] = {}
    assemble_files(
        (
            NewFile(name=name, sources=(), segments=(GivenSegment(start=0, data=data, name=name),))
            for name, data in contents.items()
        ),
        target=directory,
        workers=1,
        done=written.__setitem__,
        advance=lambda _bytes: None,
    )
    return written


def adapter_config(plan: EditPlan, layout: AdapterLayout) -> dict[str, Any]:
    """Return the content of `adapter_config.json`, in the words of PEFT's LoraConfig."""
    rank = plan.removed.rank
    forms = {weight.form for weight in layout.weights}
    parameters = [f"{w.module}.{w.parameter}" for w in layout.weights if w.form == "parameter"]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": plan.source.name,
        "revision": plan.source.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "all" if layout.vectors else "none",
        "fan_in_fan_out": "conv1d" in forms,
        "target_modules": [weight.module for weight in layout.weights if weight.form != "parameter"],
        "target_parameters": parameters or None,
    }


def check_adapter_files(
    plan: EditPlan, layout: AdapterLayout, directory: Path, *, advance: Advance
) -> dict[str, MergedWeight]:
    """Reread an adapter, merge it into the base's tensors as PEFT does, and check that this is the planned edit.

    Args:
        plan: The edit.
        layout: Where its tensors go.
        directory: Where the adapter lies.
        advance: Told the bytes of the base's tensors that were read.

    Returns:
        What each edited tensor of the base becomes, by name; biases are as in an edited checkpoint.

    Raises:
        VerificationError: A factor is not what this edit makes it, or leaves more than rounding explains.
        CheckpointError: A file cannot be read.
    """
    directions = _directions(plan)
    stored = {info.name: info for info in read_shard(directory / WEIGHTS_NAME).tensors}
    merged: dict[str, MergedWeight] = {}
    for weight in layout.weights:
        pair = [_stored_tensor(directory, stored, name) for name in _factor_names(weight)]
        found, spanned = unpack_factors(*pair, experts=weight.experts, residual_on_b=weight.residual_on_b)
        split = [slice(index, index + 1) for index in range(weight.experts)] if len(weight.edits) > 1 else [slice(None)]
        for edit, part in zip(weight.edits, split, strict=True):
            result = merge_factors(
                _read(plan, edit, advance),
                found[part],
                spanned[part],
                directions=directions[edit.name],
                residual_axis=edit.writer.residual_axis,
                strength=plan.options.strength_of(edit.writer),
                rounds_change=weight.rounds_change,
            )
            _check_merged(plan, edit, result, rounds_change=weight.rounds_change)
            merged[edit.name] = result
    for vector in layout.vectors:
        merged[vector.edit.name] = _check_vector(
            plan, vector.edit, directions, advance, directory, stored[_PREFIX + vector.key]
        )
    return merged


def _directions(plan: EditPlan) -> Directions:
    found = directions_through(plan.checkpoint, plan.removed, writers=[edit.writer for edit in plan.edits])
    return {name: torch.from_numpy(directions) for name, directions in found.items()}


def _factor_names(weight: AdaptedWeight) -> tuple[str, str]:
    module = _PREFIX + weight.key
    if weight.form == "embedding":
        return f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def _read(plan: EditPlan, edit: TensorEdit, advance: Advance) -> Tensor:
    tensor = read_tensor(plan.checkpoint.path, edit.info)
    advance(edit.info.end - edit.info.start)
    return tensor


def _coefficients(plan: EditPlan, edit: TensorEdit, basis: Tensor, advance: Advance) -> Tensor:
    weight = _read(plan, edit, advance)
    found = coefficients(
        weight,
        directions=basis,
        residual_axis=edit.writer.residual_axis,
        strength=plan.options.strength_of(edit.writer),
    )
    if not bool(torch.isfinite(found).all()):
        raise _not_finite(plan, edit)
    return found


def _edited_vector(plan: EditPlan, edit: TensorEdit, directions: Directions, advance: Advance) -> Tensor:
    vector = _read(plan, edit, advance)
    if not bool(torch.isfinite(vector).all()):
        raise _not_finite(plan, edit)
    return project_out(
        vector,
        directions=directions[edit.name],
        residual_axis=edit.writer.residual_axis,
        strength=plan.options.strength_of(edit.writer),
    )


def _not_finite(plan: EditPlan, edit: TensorEdit) -> CheckpointError:
    return CheckpointError(
        f"{plan.checkpoint.path}: tensor {edit.name} holds NaN or infinite values; download the checkpoint again"
    )


def _stored_tensor(directory: Path, stored: Mapping[str, TensorInfo], name: str) -> Tensor:
    if name not in stored:
        raise VerificationError(f"{directory / WEIGHTS_NAME}: there is no {name}; write the adapter again")
    return read_tensor(directory, stored[name])


def _check_vector(
    plan: EditPlan, edit: TensorEdit, directions: Directions, advance: Advance, directory: Path, info: TensorInfo
) -> MergedWeight:
    old, new = _read(plan, edit, advance), read_tensor(directory, info)
    basis, axis = directions[edit.name], edit.writer.residual_axis
    result = MergedWeight(
        before=component_and_norm(old, directions=basis, residual_axis=axis),
        after=component_and_norm(new, directions=basis, residual_axis=axis),
        change_error=0.0,
    )
    _check_merged(plan, edit, result, rounds_change=False)
    return result


def _check_merged(plan: EditPlan, edit: TensorEdit, result: MergedWeight, *, rounds_change: bool) -> None:
    strength, d_model = plan.options.strength_of(edit.writer), plan.stream.d_model
    dtype = TORCH_DTYPES[edit.info.dtype]
    bound = residue_bound(
        edit.info.dtype,
        d_model=d_model,
        elements=math.prod(edit.info.shape),
        before=max(1.0, abs(strength)) * result.before.norm,
        after=result.after.norm,
    )
    if rounds_change:
        bound += residue_bound(
            edit.info.dtype,
            d_model=d_model,
            elements=math.prod(edit.info.shape),
            before=0.0,
            after=abs(strength) * result.before.along,
        )
    working = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    exact = 4 * d_model**0.5 * working * abs(strength) * result.before.norm
    left = abs(result.after.along - abs(1 - strength) * result.before.along)
    # Written so that NaN fails, too.
    if not (left <= bound and result.change_error <= exact):
        raise VerificationError(
            f"{WEIGHTS_NAME}: merged into {edit.name}, the adapter leaves {result.after.along:.3g} along what was to "
            f"be removed and differs from the edit by {result.change_error:.3g}, where rounding explains "
            f"{bound:.3g} and {exact:.3g}; disk or memory may be faulty, run again"
        )


CARD_NAME = "README.md"


def write_adapter(
    *,
    source: ModelSource | Path | str,
    direction: Direction | Path | str | Sequence[Direction | Path | str],
    output: Path | str | None,
    options: EditOptions | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    progress: ProgressReporter = SILENT,
) -> OrthogonalizationReport:
    """Write what `orthogonalize_checkpoint` would change as a LoRA adapter that PEFT loads and merges.

    The directory holds adapter_config.json, adapter_model.safetensors, a model card and `abliteration.json`. The
    factors are reread and merged in memory before it appears, whole.

    Args:
        source: The model to edit: a local directory, or what `resolve_model` returned.
        direction: A direction or the file that holds it, or several of them.
        output: Directory to make; may be None in a dry run.
        options: What to edit, and how; all residual writers at strength 1 by default.
        dry_run: Make and return the plan, and write nothing.
        overwrite: Replace `output` if it is a checkpoint, an adapter or an empty directory.
        progress: Shown the bytes read.

    Returns:
        The report; its components and survivors are those of the merged weights in the base's dtype.

    Raises:
        InputError: `output` cannot be used, or the options ask for what is not a low-rank change.
        DirectionError: A direction is malformed, has another width than the model, or adds nothing to the others.
        CheckpointError: The source is incomplete, quantised or of an unsupported type, or writing failed.
        ModelError: transformers does not build the model, or PEFT cannot adapt one of the tensors.
        VerificationError: What was written, reread, is not the edit.
    """
    options = options or EditOptions()
    _check_options(options)
    plan = make_edit_plan(source=source, direction=direction, options=options)
    if holds_gguf(plan.source.path):
        raise InputError(
            f"{plan.source.name}: an adapter is merged into plain weights, and this is a GGUF file; convert it first "
            "(`abliterate convert`), or leave out --format adapter to edit it in place"
        )
    if plan.partial is not None:
        raise InputError(
            f"{plan.source.name}: of a model of type {plan.stream.model_type} an edit is partial, and what it leaves "
            "is measured by `abliterate verify` in a whole checkpoint; leave out --format adapter"
        )
    if output is None and not dry_run:
        raise InputError("no output directory was given; name one with -o, or give --dry-run")
    target = None if output is None else Path(output)
    if target is not None:
        check_output(target, plan.checkpoint.path, overwrite=overwrite)
    layout = lay_out_adapter(plan)
    report = planned_report(plan, target, dry_run=dry_run, format="adapter")
    report = dataclasses.replace(
        report,
        base={**report.base, "auto_class": layout.auto_class},
        notes=(*report.notes, *layout.notes),
    )
    if dry_run or target is None:
        return report
    for note in report.notes:
        progress.message(note)
    names = (WEIGHTS_NAME, CONFIG_NAME, CARD_NAME, RECORD_NAME)
    with published_directory(target, overwrite=overwrite, files=names) as partial:
        return _write(plan, layout, report, partial, progress)


def _check_options(options: EditOptions) -> None:
    way_out = "leave out --format adapter to write a whole checkpoint"
    if options.add is not None:
        raise InputError(f"an addition makes biases that the base may not have, and no adapter adds one; {way_out}")
    if options.preserve_norms:
        raise InputError(f"restoring lengths scales every column, which is no low-rank change; {way_out}")
    if options.quantized != "refuse":
        raise InputError(f"an adapter is merged into plain weights, so --quantized does not go with it; {way_out}")
    if options.tied == "untie":
        raise InputError(
            "an adapter cannot untie: merged by PEFT, the output head is edited with the embedding it shares; "
            f"give --tied edit or skip, or {way_out}"
        )


def _write(
    plan: EditPlan,
    layout: AdapterLayout,
    report: OrthogonalizationReport,
    partial: Path,
    progress: ProgressReporter,
) -> OrthogonalizationReport:
    with progress.task(f"Writing {report.output}", total=report.bytes_edited, unit="bytes") as advance:
        written = write_adapter_files(plan, layout, partial, advance=advance)
    with progress.task(f"Checking {report.output}", total=report.bytes_edited, unit="bytes") as advance:
        merged = check_adapter_files(plan, layout, partial, advance=advance)
    results = ((edit, _result_of(edit, merged, plan)) for edit in plan.edits)
    tensors = (EditedTensor(edit=edit, before=result.before, after=result.after) for edit, result in results)
    report = dataclasses.replace(report, tensors=tuple(tensors))
    card = _write_card(plan, report, partial)
    report = dataclasses.replace(
        report,
        shards={WEIGHTS_NAME: written.pop(WEIGHTS_NAME)},
        side_files={**card, **written},
    )
    write_record(report, partial)
    return report


def _write_card(plan: EditPlan, report: OrthogonalizationReport, partial: Path) -> dict[str, WrittenFile]:
    facts = read_card_facts(plan.checkpoint.path / CARD_NAME)
    title = Path(report.output or "adapter").name
    card = build_model_card(record=report.record(), evaluation=None, facts=facts, title=title)
    return write_contents({CARD_NAME: card.encode()}, partial)


def _result_of(edit: TensorEdit, merged: Mapping[str, MergedWeight], plan: EditPlan) -> MergedWeight:
    if edit.name in merged:
        return merged[edit.name]
    # The other of a tied pair that is stored twice: one matrix once it is loaded.
    return next(merged[name] for name in (plan.stream.embedding, str(plan.stream.head)) if name in merged)
