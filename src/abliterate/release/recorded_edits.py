"""What a record says was edited, as the objects that plans and checks use, and the base that it names.

A record is a file that anyone can change. What it names must be what its options select in the base: a writer that
is neither edited nor named would pass every other check of the files. The base is known by its config.json.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from abliterate.architectures.writers import ROLES, PostNorm, Remainder, ResidualWriter, StreamMap, map_checkpoint
from abliterate.checkpoints.checkpoint import Checkpoint
from abliterate.checkpoints.model_source import ModelSource, resolve_model
from abliterate.editing.edits import Kind, edits_of_writers
from abliterate.editing.options import EditOptions
from abliterate.editing.plan import select_writers
from abliterate.editing.record import RECORD_NAME, AbliterationRecord, decode_subspace
from abliterate.errors import CheckpointError, InputError
from abliterate.formats.gguf_checkpoint import config_sha256, holds_weights, open_weights
from abliterate.formats.quantized import plain_view

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_AGAIN = "run `abliterate orthogonalize` again"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedTensor:
    """An edited tensor as its record describes it (`record.EditedTensor.to_json`): a claim, which is to be checked.

    Attributes:
        writer: What it belongs to and how it reaches the residual stream.
        kind: What was done to it.
        stored_as: Of a quantised tensor the names of those that are stored.
        component_before: |U W|/|W|; None where nothing was projected.
        component_after: |U W'|/|W'|; None where nothing was projected.
    """

    writer: ResidualWriter
    kind: Kind
    stored_as: tuple[str, ...]
    component_before: float | None
    component_after: float | None

    @property
    def name(self) -> str:
        """Its name on disk, in the edited checkpoint."""
        return self.writer.tensor_name

    @property
    def is_projected(self) -> bool:
        """Whether directions were taken out of it."""
        return self.component_after is not None


def recorded_subspace(record: AbliterationRecord) -> "NDArray[np.float64]":
    """Return the orthonormal rows [k, d_model] that the record says were removed.

    Raises:
        InputError: They are missing or malformed.
    """
    encoded = record.content.get("subspace")
    if not isinstance(encoded, dict):
        raise InputError(f"{record.directory / RECORD_NAME}: has no subspace; {_AGAIN}")
    return decode_subspace(encoded)


def recorded_tensors(record: AbliterationRecord) -> tuple[RecordedTensor, ...]:
    """Return what the record says of each edited tensor.

    Raises:
        InputError: There are none, or one is malformed.
    """
    try:
        tensors = tuple(_read_tensor(entry) for entry in record.content["tensors"])
    except (KeyError, TypeError, ValueError) as error:
        raise _malformed(record, "list of edited tensors", error) from error
    if not tensors:
        raise InputError(f"{record.directory / RECORD_NAME}: names no edited tensor; {_AGAIN}")
    return tensors


def recorded_options(record: AbliterationRecord) -> EditOptions:
    """Return the options that the checkpoint was made with.

    Raises:
        InputError: They are malformed.
    """
    try:
        options = record.content["options"]
        if not {"components", "layers"} <= options.keys():
            raise KeyError("components or layers")
        return EditOptions.of_record(options)
    except (AttributeError, KeyError, TypeError, ValueError, InputError) as error:
        raise _malformed(record, "options", error) from error


def differences_from_plan(record: AbliterationRecord, base: Checkpoint) -> list[str]:
    """Return a line for each tensor that the options select in the base and the record does not name, or the reverse.

    Raises:
        InputError: The record is malformed.
        CheckpointError: The base is not one that can be planned for.
    """
    options = recorded_options(record)
    named = {tensor.name: tensor.kind for tensor in recorded_tensors(record)}
    if options.add is not None:
        return [f"{record.directory}: tensor {name} is no addition" for name, kind in named.items() if kind != "added"]
    base, stream = _stream_of(base, options)
    tensors = tuple(base.tensors())
    planned = edits_of_writers(
        select_writers(stream, options=options, model=str(base.path)),
        stream=stream,
        tensors={tensor.name: tensor for tensor in tensors},
        policy=options.tied,
    )
    is_partial = stream.remainder is not None
    problems = []
    if options.partial != is_partial:
        problems.append(
            f"{record.directory}: the edit is {'partial' if options.partial else 'whole'} according to {RECORD_NAME}, "
            f"and of a model of type {stream.model_type} it is {'partial' if is_partial else 'whole'}; {_AGAIN}"
        )
    wanted = {edit.name: edit.kind for edit in planned.edits}
    stored = {edit.name: () if options.quantized == "dequantize" else edit.stored_as for edit in planned.edits}
    problems += [
        f"{record.directory}: tensor {tensor.name} is stored as {tensor.stored_as or 'itself'} according to "
        f"{RECORD_NAME}, and must be as {stored[tensor.name] or 'itself'}; {_AGAIN}"
        for tensor in recorded_tensors(record)
        if tensor.stored_as != stored.get(tensor.name, tensor.stored_as)
    ]
    for name in [*wanted, *(name for name in named if name not in wanted)]:
        if wanted.get(name) != named.get(name):
            problems.append(
                f"{record.directory}: tensor {name} is {named.get(name, 'not edited')} according to {RECORD_NAME}, "
                f"and must be {wanted.get(name, 'left alone')}; {_AGAIN}"
            )
    return problems


def recorded_remainder(record: AbliterationRecord, base: Checkpoint) -> Remainder | None:
    """Return what an edit of the base leaves though every writer is edited; None where it leaves nothing.

    Raises:
        InputError: The record is malformed.
        CheckpointError: The base is not one that can be planned for.
    """
    options = recorded_options(record)
    return _stream_of(base, options)[1].remainder if options.partial else None


def _stream_of(base: Checkpoint, options: EditOptions) -> tuple[Checkpoint, StreamMap]:
    if options.quantized != "refuse":
        base = plain_view(base)
    return base, map_checkpoint(base, unverified=options.unverified, partial=options.partial)


def _read_tensor(entry: Mapping[str, Any]) -> RecordedTensor:
    for key, known in (("kind", get_args(Kind)), ("role", ROLES)):
        if entry[key] not in known:
            raise ValueError(f"unknown {key} {entry[key]!r}")
    before, after = entry.get("component_before"), entry.get("component_after")
    return RecordedTensor(
        writer=ResidualWriter(
            tensor_name=str(entry["name"]),
            role=entry["role"],
            layer=entry["layer"],
            residual_axis=int(entry["residual_axis"]),
            norm_chain=tuple(PostNorm(**norm) for norm in entry["norm_chain"]),
        ),
        kind=entry["kind"],
        stored_as=tuple(str(name) for name in entry.get("stored_as", ())),
        component_before=None if before is None else float(before),
        component_after=None if after is None else float(after),
    )


def _malformed(record: AbliterationRecord, what: str, error: Exception) -> InputError:
    return InputError(f"{record.directory / RECORD_NAME}: its {what} cannot be read ({error}); {_AGAIN}")


def find_base(record: AbliterationRecord, given: ModelSource | Path | str | None) -> ModelSource:
    """Return the base model: the one given, or the one that the record names; it must be the one that was edited.

    Raises:
        InputError: It is not there, or its config.json is not the one that was edited.
        HubError: It cannot be fetched.
    """
    named, revision = str(record.content["base"]["model"]), record.content["base"].get("revision")
    if isinstance(given, ModelSource):
        source = given
    elif given is not None:
        # Of the same repository, what was edited is the commit in the record and not what `main` is today.
        source = resolve_model(str(given), revision=revision if str(given) == named else None)
    elif revision or holds_weights(Path(named)):
        source = resolve_model(named, revision=revision)
    else:
        raise InputError(
            f"{record.directory / RECORD_NAME}: names the base model {named}, which is not there; "
            "name a directory or a Hub id that holds it with --base"
        )
    if not is_base(source.path, record):
        raise InputError(
            f"{source.name}: is not the model that was edited: its config.json (of a GGUF file the header) is not the "
            f"one in {record.directory / RECORD_NAME}; name the right one with --base"
        )
    return source


def find_local_base(record: AbliterationRecord) -> Checkpoint | None:
    """Return the base that the record names if that is a directory and still what was edited, else None."""
    base = record.content["base"]
    path = Path(str(base["model"]))
    if base.get("revision") or not is_base(path, record):
        return None
    try:
        return open_weights(path)
    except CheckpointError:
        return None


def is_base(path: Path, record: AbliterationRecord) -> bool:
    """Return whether config.json, or the header of a GGUF file, is the one of the model that was edited."""
    base = record.content["base"]
    # The first was its name until a direction's file had another hash by it.
    recorded = base.get("config_sha256", base.get("config_file_sha256"))
    return holds_weights(path) and config_sha256(path) == recorded
