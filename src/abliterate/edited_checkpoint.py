"""Carrying out an edit plan: a new directory, shard by shard, with each tensor edited on the way.

Nothing here reads what was written; `orthogonalization` does, before the directory appears.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abliterate.abliteration_record import EVALUATION_NAME, RECORD_NAME
from abliterate.checkpoint import CONFIG_NAME, INDEX_NAME, with_changes
from abliterate.checkpoint_checks import directions_through
from abliterate.edit_plan import EditPlan
from abliterate.errors import CheckpointError
from abliterate.hashed_files import WrittenFile, copy_file, write_file
from abliterate.progress import Advance
from abliterate.projection import component_and_norm, project_out
from abliterate.safetensors_file import TORCH_DTYPES, NewTensor, read_tensor, rewrite_shard, tensor_bytes
from abliterate.tensor_edits import TensorEdit


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeEdit:
    """What came out of one edit in memory: |U W| and |W| (None where nothing is projected), and the new bytes' hash."""

    before: tuple[float, float] | None
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenCheckpoint:
    """What was written: hash and size of each file by name, and what each edit did by the name of its tensor."""

    shards: dict[str, WrittenFile]
    side_files: dict[str, WrittenFile]
    made: dict[str, MadeEdit]


def write_edited_checkpoint(plan: EditPlan, target: Path, *, advance: Advance) -> WrittenCheckpoint:
    """Write what a plan makes of its checkpoint, all but the record, to the empty directory `target`.

    Args:
        plan: The plan.
        target: An empty directory.
        advance: Told the bytes of shards written.

    Raises:
        CheckpointError: The source changed meanwhile, or a tensor that is edited is not finite.
    """
    made: dict[str, MadeEdit] = {}
    makers = _makers(plan, made)
    shards = {
        shard.file_name: rewrite_shard(
            shard,
            source=plan.checkpoint.path,
            target=target,
            edits={edit.name: makers[edit.name] for edit in plan.edits if not edit.is_new},
            added=_new_tensors(plan, shard.file_name, makers),
            advance=advance,
        )
        for shard in plan.checkpoint.shards
    }
    return WrittenCheckpoint(shards=shards, side_files=_write_side_files(plan, target), made=made)


def _makers(plan: EditPlan, made: dict[str, MadeEdit]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return for each edit the function from the base's tensor to the new one; what it did is put into `made`."""
    chains = {edit.norm_chain for edit in plan.edits if edit.project}
    directions = directions_through(plan.checkpoint, plan.subspace, chains=chains)

    def maker(edit: TensorEdit) -> Callable[[Tensor], Tensor]:
        def make(old: Tensor) -> Tensor:
            basis = directions[edit.norm_chain] if edit.project else None
            new, before = _apply_edit(plan, edit, old, basis)
            made[edit.name] = MadeEdit(before=before, sha256=hashlib.sha256(tensor_bytes(new)).hexdigest())
            return new

        return make

    return {edit.name: maker(edit) for edit in plan.edits}


def _apply_edit(
    plan: EditPlan, edit: TensorEdit, old: Tensor, directions: Tensor | None
) -> tuple[Tensor, tuple[float, float] | None]:
    if directions is None:
        # One rounding, and nothing else: a bias and its dose are added in float64.
        return (old if edit.dose is None else (old.double() + edit.dose).to(old.dtype)), None
    before = component_and_norm(old, directions=directions, residual_axis=edit.residual_axis)
    if not math.isfinite(before[1]):
        raise CheckpointError(
            f"{plan.checkpoint.path}: tensor {edit.name} holds NaN or infinite values; download the checkpoint again"
        )
    new = project_out(
        old,
        directions=directions,
        residual_axis=edit.residual_axis,
        strength=plan.options.strength,
        preserve_norms=plan.options.preserve_norms,
    )
    return new, before


def _new_tensors(
    plan: EditPlan, shard_name: str, makers: Mapping[str, Callable[[Tensor], Tensor]]
) -> tuple[NewTensor, ...]:
    def make(edit: TensorEdit) -> Callable[[], Tensor]:
        def from_source() -> Tensor:
            if edit.source is None:
                return makers[edit.name](torch.zeros(edit.info.shape, dtype=TORCH_DTYPES[edit.info.dtype]))
            return makers[edit.name](read_tensor(plan.checkpoint.path, edit.source))

        return from_source

    new = [edit for edit in plan.edits if edit.is_new and edit.info.shard == shard_name]
    return tuple(NewTensor(info=edit.info, make=make(edit)) for edit in new)


def _write_side_files(plan: EditPlan, partial: Path) -> dict[str, WrittenFile]:
    checkpoint = plan.checkpoint
    left_out = {RECORD_NAME, EVALUATION_NAME} if RECORD_NAME in checkpoint.side_files else set()
    changed = {}
    if plan.config_changes:
        changed[CONFIG_NAME] = json.dumps(with_changes(checkpoint.config, plan.config_changes), indent=2) + "\n"
    if checkpoint.index is not None and any(edit.is_new for edit in plan.edits):
        changed[INDEX_NAME] = json.dumps(_extended_index(plan, checkpoint.index), indent=2) + "\n"
    written = {}
    for name in checkpoint.side_files:
        if name in left_out:
            continue
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        if name in changed:
            written[name] = write_file(partial / name, changed[name].encode())
        else:
            written[name] = copy_file(checkpoint.path / name, partial / name)
    return written


def _extended_index(plan: EditPlan, index: dict[str, Any]) -> dict[str, Any]:
    new = [edit for edit in plan.edits if edit.is_new]
    weight_map = index["weight_map"] | {edit.name: edit.info.shard for edit in new}
    metadata = dict(index.get("metadata") or {})
    for key, more in (
        ("total_size", sum(edit.nbytes for edit in new)),
        ("total_parameters", sum(math.prod(edit.info.shape) for edit in new)),
    ):
        if isinstance(metadata.get(key), int):
            metadata[key] += more
    return {**index, **({"metadata": metadata} if metadata else {}), "weight_map": dict(sorted(weight_map.items()))}
