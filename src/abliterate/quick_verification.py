"""Verifying an edited checkpoint from its files alone: against its base where there is one, and against its record.

(a) nothing differs from the base but what the record names; (b) the edited tensors, reread, are clean of the
directions through their norm chains, as far as rounding allows, and measure what the record says; and every file
has the hash that the record gives.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abliterate.abliteration_record import (
    EVALUATION_NAME,
    RECORD_NAME,
    AbliterationRecord,
    check_hashes,
    check_sizes,
    decode_subspace,
)
from abliterate.checkpoint import CONFIG_NAME, INDEX_NAME, Checkpoint, open_checkpoint
from abliterate.checkpoint_checks import (
    EditedWriter,
    Survivor,
    compare_bytes,
    compare_layouts,
    measure_survivors,
    ratio,
)
from abliterate.errors import CheckpointError, InputError, VerificationError
from abliterate.progress import SILENT, ProgressReporter
from abliterate.projection import residue_bound
from abliterate.residual_writers import PostNorm
from abliterate.safetensors_file import TORCH_DTYPES

_AGAIN = "run `abliterate orthogonalize` again"

# A component measured twice differs by the order of float64 sums alone.
_SAME = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorCheck:
    """What rereading one edited tensor showed.

    Attributes:
        name: The tensor.
        role: embed, attn or mlp.
        layer: Its decoder block; None for embeddings.
        kind: What was done to it: projected, added or untied.
        dtype: What it is stored in.
        component_before: |U W|/|W| in the base, or as the record says without one.
        component_after: |U W'|/|W'|.
        survivor: |U W'|/|U W|; None where nothing tells |U W|.
        bound: The largest |U W'|/|W'| that rounding explains; None where none is meant to be left.
    """

    name: str
    role: str
    layer: int | None
    kind: str
    dtype: str
    component_before: float | None
    component_after: float
    survivor: float | None
    bound: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuickCheck:
    """What the files showed.

    Attributes:
        against_base: Whether they were held against the base.
        bytes_compared: Bytes that had to be, and were compared with, the base's.
        tensors: Every edited tensor.
        failures: What failed, a line each, the most telling first.
    """

    against_base: bool
    bytes_compared: int
    tensors: tuple[TensorCheck, ...]
    failures: tuple[str, ...]


def recorded_subspace(record: AbliterationRecord) -> Tensor:
    """Return the orthonormal rows [k, d_model], float64, that the record says were removed.

    Raises:
        InputError: They are missing or malformed.
    """
    encoded = record.content.get("subspace")
    if not isinstance(encoded, dict):
        raise InputError(f"{record.directory / RECORD_NAME}: has no subspace; {_AGAIN}")
    return decode_subspace(encoded)


def recorded_tensors(record: AbliterationRecord) -> tuple[Mapping[str, Any], ...]:
    """Return the record's entries of edited tensors.

    Raises:
        InputError: There are none, or one is malformed.
    """
    tensors = record.content.get("tensors")
    keys = {"name", "role", "residual_axis", "norm_chain", "kind"}
    if not (isinstance(tensors, list) and tensors and all(isinstance(t, dict) and keys <= t.keys() for t in tensors)):
        raise InputError(f"{record.directory / RECORD_NAME}: its list of edited tensors is malformed; {_AGAIN}")
    return tuple(tensors)


def verify_files(
    record: AbliterationRecord,
    *,
    base: Checkpoint | None,
    hashes: bool = True,
    progress: ProgressReporter = SILENT,
) -> QuickCheck:
    """Check an edited checkpoint from its files; no tensor is held beside another.

    Args:
        record: The record of the checkpoint.
        base: What it was made from; without one, the files are held against the record alone.
        hashes: Whether to check the hash of every file too; a caller may have done so.
        progress: Shown the bytes read.

    Raises:
        InputError: The record is malformed.
        CheckpointError: A checkpoint cannot be read.
    """
    subspace, entries = recorded_subspace(record), recorded_tensors(record)
    edited = open_checkpoint(record.directory)
    problems, compared = (
        ([], 0) if base is None else _against_base(record, base, edited, entries=entries, progress=progress)
    )
    tensors: tuple[TensorCheck, ...] = ()
    # In a checkpoint of another layout nothing that the record says can be looked up.
    if not problems:
        tensors = _check_tensors(record, base, edited, entries=entries, subspace=subspace, progress=progress)
        problems += [text for check in tensors for text in _tensor_problems(record, check)]
    if hashes and not problems:
        problems = _check_record(record, progress=progress)
    return QuickCheck(against_base=base is not None, bytes_compared=compared, tensors=tensors, failures=tuple(problems))


def _against_base(
    record: AbliterationRecord,
    base: Checkpoint,
    edited: Checkpoint,
    *,
    entries: tuple[Mapping[str, Any], ...],
    progress: ProgressReporter,
) -> tuple[list[str], int]:
    names = {tensor.name for tensor in base.tensors()}
    added = {str(entry["name"]) for entry in entries} - names
    config_changes = record.content.get("config_changes") or {}
    problems = compare_layouts(base, edited, added=added, config_changes=config_changes)
    own = {RECORD_NAME, EVALUATION_NAME}
    rewritten = ({CONFIG_NAME} if config_changes else set()) | ({INDEX_NAME} if added else set())
    side_files = (set(base.side_files) | record.content["side_files"].keys()) - own
    changed = {str(entry["name"]) for entry in entries}
    tensors = [tensor for tensor in base.tensors() if tensor.name not in changed]
    total = sum(tensor.end - tensor.start for tensor in tensors)
    if not problems:
        with progress.task("Comparing with the base", total=total, unit="bytes") as advance:
            problems = compare_bytes(
                base, edited, changed=changed, other_files=sorted(side_files - rewritten), advance=advance
            )
    return problems, total


def _check_tensors(
    record: AbliterationRecord,
    base: Checkpoint | None,
    edited: Checkpoint,
    *,
    entries: tuple[Mapping[str, Any], ...],
    subspace: Tensor,
    progress: ProgressReporter,
) -> tuple[TensorCheck, ...]:
    infos = {tensor.name: tensor for tensor in edited.tensors()}
    in_base = set() if base is None else {tensor.name for tensor in base.tensors()}
    measured = [entry for entry in entries if entry.get("component_after") is not None]
    writers = [
        EditedWriter(
            name=str(entry["name"]),
            residual_axis=int(entry["residual_axis"]),
            norm_chain=tuple(PostNorm(**norm) for norm in entry["norm_chain"]),
            base_name=None if entry["name"] in in_base else _other_of_pair(record),
        )
        for entry in measured
    ]
    total = sum(infos[writer.name].end - infos[writer.name].start for writer in writers if writer.name in infos)
    checks = []
    with progress.task("Measuring the edited tensors", total=total, unit="bytes") as advance:
        found = measure_survivors(edited, base=base, writers=writers, subspace=subspace, advance=advance)
        for entry, survivor in zip(measured, found, strict=True):
            checks.append(_tensor_check(record, entry, survivor, shape=infos[survivor.name].shape))
    return tuple(checks)


def _other_of_pair(record: AbliterationRecord) -> str | None:
    name = record.content["base"].get("tied_tensor")
    return None if name is None else str(name)


def _tensor_check(
    record: AbliterationRecord, entry: Mapping[str, Any], survivor: Survivor, *, shape: tuple[int, ...]
) -> TensorCheck:
    recorded = entry.get("component_before")
    before: float | None = recorded
    if survivor.along_before is not None and survivor.norm_before is not None:
        norm_before, before = survivor.norm_before, ratio(survivor.along_before, survivor.norm_before)
    else:
        # What was removed is orthogonal to what is left, so |W|^2 is the sum of their squares.
        left = math.sqrt(max(1.0 - float(recorded or 0.0) ** 2, 0.0))
        norm_before = survivor.norm_after / left if left else survivor.norm_after
    after = ratio(survivor.along_after, survivor.norm_after)
    exact = _strength(record) == 1.0 and entry["kind"] != "added"
    bound = residue_bound(
        TORCH_DTYPES.get(survivor.dtype, torch.float32),
        d_model=shape[int(entry["residual_axis"])],
        elements=math.prod(shape),
        before=norm_before,
        after=survivor.norm_after,
    )
    share = survivor.ratio
    if share is None and before:
        share = survivor.along_after / (before * norm_before) if norm_before else 0.0
    return TensorCheck(
        name=survivor.name,
        role=str(entry["role"]),
        layer=entry.get("layer"),
        kind=str(entry["kind"]),
        dtype=survivor.dtype,
        component_before=before,
        component_after=after,
        survivor=share,
        bound=ratio(bound, survivor.norm_after) if exact else None,
    )


def _tensor_problems(record: AbliterationRecord, check: TensorCheck) -> list[str]:
    where = f"{record.directory}: tensor {check.name}"
    if not math.isfinite(check.component_after):
        return [f"{where} holds NaN or infinite values; {_AGAIN}"]
    if check.bound is not None and check.component_after > check.bound:
        return [
            f"{where} has a component of {check.component_after:.3g} along what was removed, and rounding to "
            f"{check.dtype} explains {check.bound:.3g}: it was not edited, or changed since; {_AGAIN}"
        ]
    recorded = next(entry for entry in recorded_tensors(record) if entry["name"] == check.name)["component_after"]
    if abs(check.component_after - recorded) > _SAME * recorded + 1e-15:
        return [
            f"{where} has a component of {check.component_after:.9g} along what was removed, in {RECORD_NAME} it is "
            f"{recorded:.9g}: changed since then; {_AGAIN}"
        ]
    return []


def _check_record(record: AbliterationRecord, *, progress: ProgressReporter) -> list[str]:
    try:
        check_sizes(record)
        check_hashes(record, progress=progress)
    except VerificationError as error:
        return [str(error)]
    return []


def _strength(record: AbliterationRecord) -> float:
    options = record.content.get("options")
    return float(options.get("strength", 1.0)) if isinstance(options, dict) else 1.0


def find_local_base(record: AbliterationRecord) -> Checkpoint | None:
    """Return the base that the record names if that is a directory and still what was edited, else None."""
    base = record.content["base"]
    path = Path(str(base["model"]))
    if base.get("revision") or not is_base(path, record):
        return None
    try:
        return open_checkpoint(path)
    except CheckpointError:
        return None


def is_base(path: Path, record: AbliterationRecord) -> bool:
    """Return whether the config.json in a directory is the one of the model that was edited."""
    config = path / CONFIG_NAME
    recorded = record.content["base"].get("config_sha256")
    return config.is_file() and hashlib.sha256(config.read_bytes()).hexdigest() == recorded
