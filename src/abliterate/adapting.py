"""The edit of `orthogonalization` as a LoRA adapter: megabytes beside the base instead of a second checkpoint.

W' - W = -s U^T (U W) has the rank of the directions, so two factors hold it exactly; `lora_factors` has the layout.
Merged by PEFT, the adapter gives the orthogonalized checkpoint up to one rounding, which no feedback follows: how much
of the component that leaves is in the report. What no such change can express is refused.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from abliterate.abliteration_record import EditedTensor, OrthogonalizationReport, write_record
from abliterate.adapter_files import WEIGHTS_NAME, check_adapter_files, write_adapter_files, write_contents
from abliterate.adapter_modules import AdapterLayout, lay_out_adapter
from abliterate.checkpoint_checks import ratio
from abliterate.checkpoints.atomic_directory import published_directory
from abliterate.checkpoints.hashed_files import WrittenFile
from abliterate.checkpoints.hub import ModelSource, read_card_facts
from abliterate.directions import Direction
from abliterate.edit_plan import EditOptions, EditPlan, make_edit_plan
from abliterate.errors import InputError
from abliterate.lora_factors import MergedWeight
from abliterate.model_card import build_model_card
from abliterate.planned_report import check_output, planned_report
from abliterate.progress import SILENT, ProgressReporter

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
        source: The model to edit: a local directory, or what `hub.resolve_model` returned.
        direction: A direction or the file that holds it, or several of them.
        output: Directory to make; may be None in a dry run.
        options: What to edit, and how; all residual writers at strength 1 by default.
        dry_run: Make and return the plan, and write nothing.
        overwrite: Replace `output` if it is a checkpoint, an adapter or an empty directory.
        progress: Shown the bytes read.

    Returns:
        The report; its components and survivors are those of the merged weights in the base's dtype.

    Raises:
        InputError: `output` cannot be used, or the options ask for what is no low-rank change.
        DirectionError: A direction is malformed, has another width than the model, or adds nothing to the others.
        CheckpointError: The source is incomplete, quantised or of an unsupported type, or writing failed.
        ModelError: transformers does not build the model, or PEFT cannot adapt one of the tensors.
        VerificationError: What was written, reread, is not the edit.
    """
    options = options or EditOptions()
    _check_options(options)
    plan = make_edit_plan(source=source, direction=direction, options=options)
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
    with published_directory(target) as partial:
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
    report = dataclasses.replace(
        report, tensors=tuple(_measured(tensor, _result_of(tensor, merged, plan)) for tensor in report.tensors)
    )
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


def _result_of(tensor: EditedTensor, merged: Mapping[str, MergedWeight], plan: EditPlan) -> MergedWeight:
    if tensor.name in merged:
        return merged[tensor.name]
    # The other of a tied pair that is stored twice: one matrix once it is loaded.
    return next(merged[name] for name in (plan.stream.embedding, str(plan.stream.head)) if name in merged)


def _measured(tensor: EditedTensor, result: MergedWeight) -> EditedTensor:
    return dataclasses.replace(
        tensor,
        component_before=ratio(result.along_before, result.norm_before),
        component_after=ratio(result.along_after, result.norm_after),
        survivor=ratio(result.along_after, result.along_before),
    )
