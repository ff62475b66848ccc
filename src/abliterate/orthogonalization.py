"""Orthogonalizing a checkpoint: a new directory whose weights cannot write along a direction.

Works on files, never on a loaded model. The plan is made from the headers; then each shard is copied byte
for byte except for the residual writers, which are projected (see `projection` for the mathematics and for
when the result equals ablating activations). Names, order, dtypes, offsets, metadata and the index stay as
they were, and so does every other file. The new directory is written beside its target under a hidden name,
reread and checked, and appears by one rename; whatever goes wrong before leaves nothing behind.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from abliterate._version import __version__
from abliterate.checkpoint import (
    CONFIG_NAME,
    TORCH_DTYPES,
    Checkpoint,
    WrittenFile,
    copy_file,
    open_checkpoint,
    read_json_object,
    read_tensor,
    rewrite_shard,
)
from abliterate.directions import Direction, load_direction
from abliterate.errors import CheckpointError, DirectionError, InputError, VerificationError
from abliterate.hub import ModelSource
from abliterate.progress import SILENT, ProgressReporter
from abliterate.projection import component_and_norm, project_out, residue_bound
from abliterate.residual_writers import (
    ROLES,
    ResidualWriter,
    Role,
    architecture_of,
    find_residual_writers,
    has_tied_embeddings,
    layer_count,
    residual_width,
)

RECORD_NAME = "abliteration.json"
FORMAT_VERSION = 1

# Written by `abliterate evaluate` about the weights it lies beside, so it must not move on to others.
_EVALUATION_NAME = "evaluation.json"
_WEIGHT_SUFFIXES = {".safetensors", ".gguf", ".pth", ".pt", ".onnx"}


@dataclass(frozen=True, slots=True, kw_only=True)
class EditOptions:
    """Which residual writers are edited, and how far.

    Attributes:
        components: Roles to edit.
        layers: Half-open range (first, end) of decoder blocks; None edits all. The embeddings count as what
            comes before layer 0: with a range they are edited only if it starts at 0.
        strength: Share of the component that is removed; 1 removes it.

    Raises:
        InputError: A value that means no edit or none that is defined.
    """

    components: tuple[Role, ...] = ROLES
    layers: tuple[int, int] | None = None
    strength: float = 1.0

    def __post_init__(self) -> None:
        unknown = set(self.components) - set(ROLES)
        if unknown or not self.components:
            raise InputError(f"components must be among {', '.join(ROLES)}; found {sorted(unknown) or 'none'}")
        if self.layers is not None and not 0 <= self.layers[0] < self.layers[1]:
            raise InputError(f"layers {self.layers[0]}:{self.layers[1]} is empty; give FIRST:END with FIRST < END")
        if not math.isfinite(self.strength) or self.strength <= 0:
            raise InputError(f"strength is {self.strength}; give a positive number, 1 removes the direction")

    def includes(self, writer: ResidualWriter) -> bool:
        """Return whether these options edit `writer`."""
        if writer.role not in self.components:
            return False
        if self.layers is None:
            return True
        first, end = self.layers
        return first == 0 if writer.layer is None else first <= writer.layer < end


@dataclass(frozen=True, slots=True, kw_only=True)
class EditedTensor:
    """One planned edit; the components, |r.W|/|W| before and after, are None in a dry run."""

    name: str
    role: Role
    layer: int | None
    residual_axis: int
    shape: tuple[int, ...]
    dtype: str
    shard: str
    component_before: float | None = None
    component_after: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OrthogonalizationReport:
    """What was edited, or with `dry_run` what would be.

    The fields from `format_version` to `side_files` make up the record `abliteration.json`.

    Attributes:
        output: The new directory; None if a dry run named none.
        dry_run: Whether nothing was written.
        format_version: Of the record.
        tool: Name and version of the tool and of the libraries that did the arithmetic.
        created: Time of writing, ISO 8601, UTC.
        base: The model that was edited: model, revision, model_type, config_sha256, tied_embeddings, and
            `abliteration`, the earlier edit, if it had been orthogonalized before.
        direction: sha256, d_model and metadata of the direction.
        options: What was asked for.
        tensors: Every edited tensor, in file order.
        shards: File name -> SHA-256 and size of each shard written; empty in a dry run.
        side_files: The same for every other file.
        counts: Role -> number of edited tensors.
        bytes_edited: Bytes of the edited tensors.
        bytes_total: Bytes of all shards.
        notes: What the user should know about this checkpoint.
    """

    output: str | None
    dry_run: bool
    format_version: int
    tool: dict[str, str]
    created: str
    base: dict[str, Any]
    direction: dict[str, Any]
    options: EditOptions
    tensors: tuple[EditedTensor, ...]
    shards: dict[str, WrittenFile]
    side_files: dict[str, WrittenFile]
    counts: dict[str, int]
    bytes_edited: int
    bytes_total: int
    notes: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """Return the content of `abliteration.json`."""
        values = dataclasses.asdict(self)
        outside = {"output", "dry_run", "counts", "bytes_edited", "bytes_total", "notes"}
        return {name: value for name, value in values.items() if name not in outside}


def orthogonalize_checkpoint(
    *,
    source: ModelSource | Path | str,
    direction: Direction | Path | str,
    output: Path | str | None,
    options: EditOptions | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    progress: ProgressReporter = SILENT,
) -> OrthogonalizationReport:
    """Write a copy of a checkpoint in which no residual writer has a component along `direction`.

    Section 4.1 of arXiv 2406.11717: W <- W - strength * r (r^T W), for the embeddings, the out-projections of
    attention and MLP, and their biases. Where the embeddings are tied, the output head changes with them.

    Args:
        source: The model to edit: a local directory, or what `hub.resolve_model` returned.
        direction: A direction, or the file that holds it.
        output: Directory to make; may be None in a dry run.
        options: What to edit; all residual writers at strength 1 by default.
        dry_run: Make and return the plan, and write nothing.
        overwrite: Replace `output` if it is a checkpoint or an empty directory.
        progress: Shown the bytes written and checked.

    Returns:
        The report; `abliteration.json` in `output` is made from it.

    Raises:
        InputError: `output` cannot be used, or the options select nothing.
        DirectionError: The direction is malformed or has another width than the model.
        CheckpointError: The source is incomplete, quantised or of an unsupported type, or writing failed.
        VerificationError: What was written, reread, still has the direction in it.
    """
    plan = _make_plan(_as_source(source), direction, options or EditOptions())
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
    with _published_directory(target) as partial:
        return _write(plan, report, partial, progress)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    source: ModelSource
    checkpoint: Checkpoint
    direction: Direction
    options: EditOptions
    writers: tuple[ResidualWriter, ...]


def _as_source(source: ModelSource | Path | str) -> ModelSource:
    if isinstance(source, ModelSource):
        return source
    if not Path(source).is_dir():
        raise InputError(
            f"{source}: there is no such directory; give a checkpoint directory, or resolve a Hub id with "
            "abliterate.hub.resolve_model"
        )
    return ModelSource(path=Path(source), name=str(source), revision=None)


def _make_plan(source: ModelSource, direction: Direction | Path | str, options: EditOptions) -> _Plan:
    checkpoint = open_checkpoint(source.path)
    writers = find_residual_writers(checkpoint)
    n_layers = layer_count(checkpoint)
    if options.layers is not None and options.layers[1] > n_layers:
        raise InputError(
            f"layers {options.layers[0]}:{options.layers[1]} reaches beyond the {n_layers} layers of "
            f"{source.name}; give a range within 0:{n_layers}"
        )
    selected = tuple(writer for writer in writers if options.includes(writer))
    if not selected:
        raise InputError(
            f"components {','.join(options.components)} and layers {options.layers} select no tensor of "
            f"{source.name}; embeddings are edited only if the layers start at 0"
        )
    return _Plan(
        source=source,
        checkpoint=checkpoint,
        direction=_as_direction(direction, d_model=residual_width(checkpoint), model=source.name),
        options=options,
        writers=selected,
    )


def _as_direction(direction: Direction | Path | str, *, d_model: int, model: str) -> Direction:
    if not isinstance(direction, Direction):
        return load_direction(Path(direction), d_model=d_model)
    if direction.d_model != d_model:
        raise DirectionError(
            f"the direction has {direction.d_model} entries, but the residual stream of {model} has "
            f"{d_model}; extract a direction from this model"
        )
    return direction


def _check_output(output: Path, source: Path, *, overwrite: bool) -> None:
    resolved, base = output.resolve(), source.resolve()
    if resolved == base or base in resolved.parents or resolved in base.parents:
        raise InputError(
            f"{output}: is, contains or lies in the model's own directory {source}; choose another directory"
        )
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise InputError(f"{output}: exists; choose another directory, or replace it with --overwrite")
    if output.is_symlink() or not output.is_dir():
        raise InputError(f"{output}: exists and is not a directory, so it is not replaced; choose another path")
    if not (output / CONFIG_NAME).is_file() and any(output.iterdir()):
        raise InputError(
            f"{output}: exists and holds no {CONFIG_NAME}, so it is no checkpoint and is not replaced; "
            "choose another directory"
        )


def _planned_report(plan: _Plan, output: Path | None, *, dry_run: bool) -> OrthogonalizationReport:
    checkpoint, direction = plan.checkpoint, plan.direction
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
        direction={
            "sha256": direction.sha256,
            "d_model": direction.d_model,
            "metadata": direction.metadata,
        },
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
            )
            for writer, info in zip(plan.writers, edited, strict=True)
        ),
        shards={},
        side_files={},
        counts={role: roles.count(role) for role in ROLES if role in roles},
        bytes_edited=sum(info.end - info.start for info in edited),
        bytes_total=sum(shard.size for shard in checkpoint.shards),
        notes=_notes(plan),
    )


def _describe_base(plan: _Plan) -> dict[str, Any]:
    checkpoint = plan.checkpoint
    base: dict[str, Any] = {
        "model": plan.source.name,
        "revision": plan.source.revision,
        "model_type": architecture_of(checkpoint).model_type,
        "config_sha256": hashlib.sha256((checkpoint.path / CONFIG_NAME).read_bytes()).hexdigest(),
        "tied_embeddings": has_tied_embeddings(checkpoint),
    }
    if RECORD_NAME in checkpoint.side_files:
        earlier = read_json_object(checkpoint.path / RECORD_NAME)
        base["abliteration"] = {key: earlier.get(key) for key in ("base", "direction", "options")}
    return base


def _notes(plan: _Plan) -> tuple[str, ...]:
    notes = []
    model_type = architecture_of(plan.checkpoint).model_type
    extracted_from = plan.direction.metadata.get("model_type")
    if extracted_from is not None and extracted_from != model_type:
        notes.append(f"the direction was extracted from a {extracted_from} model, and this is a {model_type}")
    if has_tied_embeddings(plan.checkpoint) and any(writer.role == "embed" for writer in plan.writers):
        notes.append("the embeddings are tied, so the output head is edited with them")
    others = [
        name
        for name in plan.checkpoint.side_files
        if Path(name).suffix in _WEIGHT_SUFFIXES or Path(name).name.startswith("pytorch_model")
    ]
    if others:
        notes.append(f"copied unedited, though they seem to hold weights: {', '.join(others)}")
    return tuple(notes)


@contextmanager
def _published_directory(output: Path) -> Iterator[Path]:
    """Yield a hidden directory that becomes `output` if the body succeeds, and vanishes if it does not."""
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    new_parents = [parent for parent in output.parents if not parent.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise InputError(
            f"{partial}: cannot be made: {error.strerror or error}; choose another place with -o"
        ) from error
    try:
        yield partial
        _publish(partial, output)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or output}: {error.strerror or error}; {output} was left as it was"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in new_parents:
            with suppress(OSError):  # it holds the published directory
                parent.rmdir()


def _publish(partial: Path, output: Path) -> None:
    _sync_directory(partial)
    replaced = output.with_name(f".{output.name}.replaced-{os.getpid()}")
    had_output = output.exists()
    if had_output:
        output.rename(replaced)
    try:
        partial.rename(output)
    except BaseException:
        if had_output:
            replaced.rename(output)
        raise
    _sync_directory(output.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(
    plan: _Plan, report: OrthogonalizationReport, partial: Path, progress: ProgressReporter
) -> OrthogonalizationReport:
    checkpoint = plan.checkpoint
    before: dict[str, tuple[float, float]] = {}
    edits = {writer.tensor_name: _edit_of(plan, writer, before) for writer in plan.writers}
    with progress.task(f"Writing {report.output}", total=report.bytes_total, unit="bytes") as advance:
        shards = {
            shard.file_name: rewrite_shard(shard, source=checkpoint.path, target=partial, edits=edits, advance=advance)
            for shard in checkpoint.shards
        }
    side_files = _copy_side_files(checkpoint, partial)
    missed = sorted(edits.keys() - before.keys())
    if missed:
        raise VerificationError(f"{partial}: {len(missed)} planned edits were not made, first {missed[0]}")
    with progress.task(f"Checking {report.output}", total=report.bytes_edited, unit="bytes") as advance:
        after = _verify(plan, partial, before, advance)
    report = dataclasses.replace(
        report,
        shards=shards,
        side_files=side_files,
        tensors=tuple(
            dataclasses.replace(
                tensor,
                component_before=_ratio(*before[tensor.name]),
                component_after=_ratio(*after[tensor.name]),
            )
            for tensor in report.tensors
        ),
    )
    record = json.dumps(report.record(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with (partial / RECORD_NAME).open("x", encoding="utf-8") as file:
        file.write(record)
        file.flush()
        os.fsync(file.fileno())
    return report


def _edit_of(plan: _Plan, writer: ResidualWriter, before: dict[str, tuple[float, float]]) -> Callable[[Tensor], Tensor]:
    def edit(weight: Tensor) -> Tensor:
        vector, axis = plan.direction.vector, writer.residual_axis
        measured = component_and_norm(weight, direction=vector, residual_axis=axis)
        if not math.isfinite(measured[1]):
            raise CheckpointError(
                f"{plan.checkpoint.path}: tensor {writer.tensor_name} holds NaN or infinite values; "
                "download the checkpoint again"
            )
        before[writer.tensor_name] = measured
        return project_out(weight, direction=vector, residual_axis=axis, strength=plan.options.strength)

    return edit


def _copy_side_files(checkpoint: Checkpoint, partial: Path) -> dict[str, WrittenFile]:
    left_out = {RECORD_NAME, _EVALUATION_NAME} if RECORD_NAME in checkpoint.side_files else set()
    copied = {}
    for name in checkpoint.side_files:
        if name in left_out:
            continue
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        copied[name] = copy_file(checkpoint.path / name, partial / name)
    return copied


def _verify(
    plan: _Plan, partial: Path, before: dict[str, tuple[float, float]], advance: Callable[[int], None]
) -> dict[str, tuple[float, float]]:
    written = open_checkpoint(partial)
    for old, new in zip(plan.checkpoint.shards, written.shards, strict=True):
        if old.file_name != new.file_name or old.header_bytes != new.header_bytes:
            raise VerificationError(f"{partial}: the header of {new.file_name} is not that of the source")
    after = {}
    infos = {info.name: info for info in written.tensors()}
    for writer in plan.writers:
        info = infos[writer.tensor_name]
        weight = read_tensor(partial, info)
        along, norm = component_and_norm(weight, direction=plan.direction.vector, residual_axis=writer.residual_axis)
        bound = residue_bound(
            TORCH_DTYPES[info.dtype],
            d_model=plan.direction.d_model,
            elements=weight.numel(),
            before=before[info.name][1],
            after=norm,
        )
        if not math.isfinite(norm) or (plan.options.strength == 1.0 and along > bound):
            raise VerificationError(
                f"{info.shard}: tensor {info.name}, reread, has a component of {along:.3g} along the direction "
                f"and rounding to {info.dtype} explains {bound:.3g}; disk or memory may be faulty, run again"
            )
        after[info.name] = (along, norm)
        advance(info.end - info.start)
    return after


def _ratio(along: float, norm: float) -> float:
    return along / norm if norm else 0.0
