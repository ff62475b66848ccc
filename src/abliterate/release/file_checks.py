"""Verifying an edited checkpoint from its files alone: against its base where there is one, and against its record.

(a) The record names what its options select, and nothing differs from the base but that. (b) The edited tensors,
reread, have of the directions what rounding explains, through their norm chains, and measure what the record says.
And every file has the hash that the record gives.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from abliterate.checkpoints.checkpoint import CONFIG_NAME, INDEX_NAME, Checkpoint
from abliterate.checkpoints.safetensors_file import TensorInfo
from abliterate.editing.checks import (
    compare_bytes,
    compare_layouts,
    measure_survivors,
    rounding_bound,
)
from abliterate.editing.options import EditOptions
from abliterate.editing.plan import RemovedDirections, removed_directions
from abliterate.editing.record import EVALUATION_NAME, RECORD_NAME, AbliterationRecord, check_hashes, check_sizes
from abliterate.errors import VerificationError
from abliterate.formats.gguf_checkpoint import open_weights
from abliterate.formats.quantized import dequantized_layout, plain_view, quantization_of
from abliterate.formats.stored_component import Component, read_numbers, roundoff
from abliterate.progress import SILENT, ProgressReporter
from abliterate.release.recorded_edits import (
    RecordedTensor,
    differences_from_plan,
    recorded_options,
    recorded_subspace,
    recorded_tensors,
)

_AGAIN = "run `abliterate orthogonalize` again"
# A component measured twice differs by the order of float64 sums alone.
_SAME = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorCheck:
    """What rereading one edited tensor showed.

    Attributes:
        recorded: What its record claims of it.
        dtype: What it is stored in.
        before: |U W| and |W| in the base, or as the record says without one.
        after: |U W'| and |W'|.
        expected: What |U W'|/|W'| is meant to be: 0 at strength 1.
        bound: By how much rounding may move it; None where nothing tells (norms preserved at another strength).
        decoded: What an engine that decodes it to bfloat16 puts back of it by that; 0 where no codes are stored.
    """

    recorded: RecordedTensor
    dtype: str
    before: Component
    after: Component
    expected: float
    bound: float | None
    decoded: float

    @property
    def name(self) -> str:
        """Its name on disk, in the edited checkpoint."""
        return self.recorded.name

    @property
    def survivor(self) -> float:
        """|U W'|/|U W|; 0 where there was nothing to remove."""
        return self.after.survivor_of(self.before)

    def to_json(self) -> dict[str, Any]:
        """Return it as `verify --json` lists it."""
        return {
            "name": self.name,
            "role": self.recorded.writer.role,
            "layer": self.recorded.writer.layer,
            "kind": self.recorded.kind,
            "dtype": self.dtype,
            "component_before": self.before.share,
            "component_after": self.after.share,
            "survivor": self.survivor,
            "expected": self.expected,
            "bound": self.bound,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class QuickCheck:
    """What the files showed.

    Attributes:
        against_base: Whether they were held against the base.
        bytes_compared: Bytes of the tensors that had to be the base's, and were compared with it.
        tensors: Every tensor that directions were projected out of.
        failures: What failed, a line each, the most telling first.
    """

    against_base: bool
    bytes_compared: int
    tensors: tuple[TensorCheck, ...]
    failures: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Files:
    """An edited checkpoint, its base if there is one, and what the record says of it."""

    record: AbliterationRecord
    base: Checkpoint | None
    edited: Checkpoint
    tensors: tuple[RecordedTensor, ...]
    options: EditOptions
    removed: RemovedDirections
    progress: ProgressReporter

    @property
    def tied_tensor(self) -> str:
        """The stored one of a tied pair, from which an untied tensor was made."""
        return str(self.record.content["base"].get("tied_tensor"))


def verify_files(
    record: AbliterationRecord,
    *,
    base: Checkpoint | None,
    hashes: bool = True,
    progress: ProgressReporter = SILENT,
) -> QuickCheck:
    """Check an edited checkpoint from its files. A failed check is in the result and raises nothing.

    Args:
        record: The record of the checkpoint.
        base: What it was made from; without one, the files are held against the record alone.
        hashes: Whether to check the hash of every file too; a caller may have done so.
        progress: Shown the bytes read.

    Raises:
        InputError: The record is malformed.
        CheckpointError: A checkpoint cannot be read.
    """
    files = _open_files(record, base, progress)
    problems, compared = ([], 0) if base is None else _against_base(files, base)
    checks: tuple[TensorCheck, ...] = ()
    # In a checkpoint of another layout nothing that the record says can be looked up.
    if not problems:
        checks = _check_tensors(files)
        problems = [line for check in checks for line in _tensor_problems(files, check)]
    if hashes and not problems:
        problems = _check_record(record, progress=progress)
    return QuickCheck(against_base=base is not None, bytes_compared=compared, tensors=checks, failures=tuple(problems))


def compare_with_base(
    record: AbliterationRecord, *, base: Checkpoint, progress: ProgressReporter = SILENT
) -> tuple[tuple[str, ...], int]:
    """Hold an edited checkpoint against its base: all that was not edited, byte for byte.

    Args:
        record: The record of the checkpoint.
        base: What it was made from.
        progress: Shown the bytes compared.

    Returns:
        What differs, a line each, and how many bytes of tensors had to be the same.

    Raises:
        InputError: The record is malformed.
        CheckpointError: A checkpoint cannot be read.
    """
    problems, compared = _against_base(_open_files(record, base, progress), base)
    return tuple(problems), compared


def _open_files(record: AbliterationRecord, base: Checkpoint | None, progress: ProgressReporter) -> _Files:
    options = recorded_options(record)
    return _Files(
        record=record,
        base=base,
        edited=open_weights(record.directory),
        tensors=recorded_tensors(record),
        options=options,
        removed=removed_directions(recorded_subspace(record), options),
        progress=progress,
    )


def _against_base(files: _Files, base: Checkpoint) -> tuple[list[str], int]:
    layout = base
    if files.options.quantized == "dequantize" and quantization_of(base.config) is not None:
        layout = replace(dequantized_layout(plain_view(base)), config=base.config)
        base = plain_view(base)
    names = {tensor.name for tensor in base.tensors()}
    changed = {name for tensor in files.tensors for name in tensor.stored_as or (tensor.name,)}
    added = changed - names
    config_changes = files.record.content.get("config_changes") or {}
    own = {RECORD_NAME, EVALUATION_NAME}
    rewritten = ({CONFIG_NAME} if config_changes else set()) | ({INDEX_NAME} if added or layout != base else set())
    side_files = (set(base.side_files) | files.record.content["side_files"].keys()) - own - rewritten
    copies = {tensor.name: files.tied_tensor for tensor in files.tensors if _is_copy(tensor)}
    total = sum(tensor.end - tensor.start for tensor in base.tensors() if tensor.name not in changed)
    problems = differences_from_plan(files.record, base)
    problems += compare_layouts(layout, files.edited, added=added, config_changes=config_changes)
    problems += [
        f"{files.record.directory}: {name} holds weights again that are not those of this checkpoint; remove it"
        for name in files.edited.second_copies
        if name not in files.record.content["side_files"]
    ]
    if copies.keys() - added or set(copies.values()) - names:
        problems.append(f"{files.record.directory / RECORD_NAME}: names no tied tensor of the base; {_AGAIN}")
    if not problems:
        with files.progress.task("Comparing with the base", total=total, unit="bytes") as advance:
            problems = compare_bytes(
                base, files.edited, changed=changed, copies=copies, other_files=sorted(side_files), advance=advance
            )
        problems += _addition_problems(files, base)
    return [_located(files, problem) for problem in problems], total


def _located(files: _Files, problem: str) -> str:
    directory = str(files.record.directory)
    return problem if problem.startswith(directory) else f"{directory}: {problem}"


def _is_copy(tensor: RecordedTensor) -> bool:
    return tensor.kind == "untied" and not tensor.is_projected


def _addition_problems(files: _Files, base: Checkpoint) -> list[str]:
    """An added bias differs from the base's, or from zero, along the directions only."""
    import numpy as np

    old = {tensor.name: tensor for tensor in base.tensors()}
    problems = []
    for tensor in files.tensors:
        if tensor.kind != "added":
            continue
        info = files.edited.tensor(tensor.name)
        new = read_numbers(files.edited.path, info)
        before = read_numbers(base.path, old[tensor.name]) if tensor.name in old else np.zeros_like(new)
        rounding = 2 * roundoff(info.dtype) * float(np.linalg.norm(new) + np.linalg.norm(before))
        # A bias of another width, as those that config.json switches on beside it, can have nothing added to it.
        subspace = files.removed.subspace
        basis = subspace if new.shape[-1] == subspace.shape[1] else subspace[:0, :1]
        change = new - before
        across = change - (change @ basis.T) @ basis if len(basis) else change
        if not float(np.linalg.norm(across)) <= rounding:
            problems.append(
                f"{info.shard}: tensor {tensor.name} differs from the base's by more than a multiple of the direction"
            )
    return problems


def _check_tensors(files: _Files) -> tuple[TensorCheck, ...]:
    edited = _view(files.edited, files.options)
    base = None if files.base is None else _view(files.base, files.options)
    infos = {tensor.name: tensor for tensor in edited.tensors()}
    in_base = set() if base is None else {tensor.name for tensor in base.tensors()}
    projected = [tensor for tensor in files.tensors if tensor.is_projected]
    d_model = recorded_subspace(files.record).shape[1]
    for tensor in projected:
        axis, shape = tensor.writer.residual_axis, infos[tensor.name].shape if tensor.name in infos else None
        if shape is not None and (not -len(shape) <= axis < len(shape) or shape[axis] != d_model):
            raise VerificationError(
                f"{files.record.directory}: {tensor.name} is {list(shape)}, and axis {axis}, which {RECORD_NAME} "
                f"names, is not the residual stream of {d_model}; {_AGAIN}"
            )
    total = sum(infos[tensor.name].end - infos[tensor.name].start for tensor in projected if tensor.name in infos)
    with files.progress.task("Measuring the edited tensors", total=total, unit="bytes") as advance:
        found = measure_survivors(
            edited,
            base=base,
            writers=[tensor.writer for tensor in projected],
            made_from={tensor.name: files.tied_tensor for tensor in projected if tensor.name not in in_base},
            removed=files.removed,
            advance=advance,
        )
        return tuple(
            _tensor_check(files, tensor, infos[tensor.name], before, after)
            for tensor, (before, after) in zip(projected, found, strict=True)
        )


def _view(checkpoint: Checkpoint, options: EditOptions) -> Checkpoint:
    """Return a checkpoint as its numbers are meant, where it was edited quantised."""
    return checkpoint if options.quantized == "refuse" else plain_view(checkpoint)


def _tensor_check(
    files: _Files, tensor: RecordedTensor, info: TensorInfo, before: Component | None, after: Component
) -> TensorCheck:
    options = files.options
    strength = options.strength_of(tensor.writer)
    if before is None:
        # What is left is orthogonal to what was taken: |W|^2 = |W'|^2 + |U W|^2 (1 - (1 - strength)^2).
        share = min(tensor.component_before or 0.0, 1.0)
        rest = 1.0 - share**2 * (1.0 - (1.0 - strength) ** 2)
        norm = after.norm if options.preserve_norms or rest <= 0 else after.norm / math.sqrt(rest)
        before = Component(share * norm, norm)
    bound = rounding_bound(
        info,
        residual_axis=tensor.writer.residual_axis,
        k=files.removed.rank,
        strength=strength,
        before=before,
        after=after.norm,
    )
    d_model = info.shape[tensor.writer.residual_axis]
    # Restored lengths scale what another strength leaves, by a factor of its own for each vector.
    is_known = strength == 1.0 or not options.preserve_norms
    return TensorCheck(
        recorded=tensor,
        dtype=info.stored_dtype,
        before=before,
        after=after,
        expected=Component(abs(1.0 - strength) * before.along, after.norm).share,
        bound=Component(bound, after.norm).share if is_known else None,
        decoded=0.0 if info.encoding is None else roundoff("BF16") * math.sqrt(files.removed.rank / d_model),
    )


def _tensor_problems(files: _Files, check: TensorCheck) -> Sequence[str]:
    where = f"{files.record.directory}: tensor {check.name}"
    component = check.after.share
    found = f"{where} has a component of {component:.9g} along what was removed"
    if not math.isfinite(component):
        return [f"{where} holds NaN or infinite values; {_AGAIN}"]
    if check.bound is not None and abs(component - check.expected) > check.bound:
        meant = f"{check.expected:.3g} was to be left, and " if check.expected else ""
        return [
            f"{found}; {meant}rounding to {check.dtype} explains {check.bound:.3g}: "
            f"it was not edited, or changed since; {_AGAIN}"
        ]
    recorded = check.recorded.component_after or 0.0
    if abs(component - recorded) > _SAME * recorded + 1e-15:
        return [f"{found}, and {recorded:.9g} according to {RECORD_NAME}: changed since then; {_AGAIN}"]
    return []


def _check_record(record: AbliterationRecord, *, progress: ProgressReporter) -> list[str]:
    try:
        check_sizes(record)
        check_hashes(record, progress=progress)
    except VerificationError as error:
        return [str(error)]
    return []
