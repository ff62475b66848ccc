"""What an edit would do and need, known before anything is downloaded or written: from headers alone.

`plan` shows it, and the record of an edit is made from it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate._version import __version__
from abliterate.architectures.config import pipeline_tag
from abliterate.architectures.writers import ROLES, LeftAlone, ResidualWriter, Role, StreamMap, map_stream
from abliterate.checkpoints.atomic_directory import check_output_directory
from abliterate.checkpoints.checkpoint import (
    CONFIG_NAME,
    Checkpoint,
    check_tensor_names,
    choose_shards,
    parse_config,
    read_json_object,
    refuse_adapter,
)
from abliterate.checkpoints.model_source import CardFacts, find_local_model, read_card_facts
from abliterate.checkpoints.provenance import versions
from abliterate.checkpoints.safetensors_file import Shard, TensorInfo, damaged_file, header_end, parse_shard
from abliterate.directions import encode_rows
from abliterate.editing.edits import TensorEdit, projection_of
from abliterate.editing.options import EditOptions
from abliterate.editing.plan import (
    EditPlan,
    PartialEdit,
    TwinProof,
    mlx_notes,
    partial_edit,
    second_copies_note,
    select_writers,
    unverified_note,
)
from abliterate.editing.record import (
    FORMAT_VERSION,
    RECORD_NAME,
    EditedTensor,
    Format,
    LeftAloneTensors,
    OrthogonalizationReport,
)
from abliterate.errors import InputError
from abliterate.files import MAX_BYTES, has_file, uncollected
from abliterate.formats.gguf_checkpoint import config_sha256, open_weights
from abliterate.formats.quantized import dequantized_layout, plain_view

if TYPE_CHECKING:
    from abliterate.checkpoints.hub import RemoteModel

# Blocks of float32 and buffers of files; 24 to 39 MB were measured beside the two copies of the largest tensor.
_WORKSPACE_BYTES = 40_000_000
# Most headers are shorter, so that one request does; and requests at a time.
_FIRST_RANGE = 100_000
_CONNECTIONS = 8
_CARD = "README.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorGroup:
    """Tensors that differ in the numbers in their names only.

    Attributes:
        pattern: Their name, with `*` where the numbers are.
        role: What they belong to.
        layers: Their layers as text, such as `0-29`; empty for embeddings.
        count: How many they are.
        shape: The shape they share.
        dtype: The dtype they share.
        residual_axis: The axis that indexes the residual stream.
        norms: Patterns of the norms between them and the stream, innermost first.
        bytes: Their size together.
    """

    pattern: str
    role: Role
    layers: str
    count: int
    shape: tuple[int, ...]
    dtype: str
    residual_axis: int
    norms: tuple[str, ...]
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """What an edit would do and need.

    Attributes:
        model: The directory or Hub id, as given.
        revision: The commit on the Hub; None for a directory.
        model_type: As in config.json.
        text_section: Keys that lead to the text model's part of config.json.
        d_model: Width of the residual stream.
        n_layers: Number of decoder blocks.
        tied_embeddings: Whether the output head shares the token embedding's rows.
        embedding: Name of the token embedding's tensor.
        head: Name of the output head's tensor, stored or (tied) not; None without one.
        license: As the model's card says; None where it does not.
        license_name: Its name where `license` is "other".
        license_link: Where its text is.
        gated: "auto" or "manual" where the Hub asks for agreement first; None where not, or for a directory.
        counts: Role -> number of tensors to edit.
        groups: The tensors to edit, those that differ by numbers in their names taken together.
        tensors: Every tensor to edit, in file order.
        not_selected: Residual writers that --components or --layers leave as they are.
        left_alone: What could be taken for a writer and is not one, and why.
        n_shards: Number of weight files.
        bytes_edited: Bytes of the tensors to edit.
        bytes_weights: Bytes of all tensors.
        download_bytes: What would be downloaded; 0 for a directory.
        disk_bytes: What the edited checkpoint takes: weights, headers and side files.
        largest_tensor: Name of the largest tensor to edit.
        memory_bytes: That tensor as it is read and as it is written, and room for the arithmetic. Python and torch
            come on top.
        notes: What the user should know besides.
        partial: What an edit leaves though every writer is edited; None where it leaves nothing.
    """

    model: str
    revision: str | None
    model_type: str
    text_section: tuple[str, ...]
    d_model: int
    n_layers: int
    tied_embeddings: bool
    embedding: str
    head: str | None
    license: str | None
    license_name: str | None
    license_link: str | None
    gated: str | None
    counts: dict[str, int]
    groups: tuple[TensorGroup, ...]
    tensors: tuple[TensorEdit, ...]
    not_selected: tuple[str, ...]
    left_alone: tuple[LeftAlone, ...]
    n_shards: int
    bytes_edited: int
    bytes_weights: int
    download_bytes: int
    disk_bytes: int
    largest_tensor: str
    memory_bytes: int
    notes: tuple[str, ...]
    partial: PartialEdit | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A model's config and headers, wherever they came from.

    Attributes:
        name: The directory or Hub id, as given.
        path: The directory; of a Hub model its id, for messages.
        revision: The commit on the Hub; None for a directory.
        config: The content of config.json.
        shards: What the headers of its weight files say.
        card: What its card says.
        gated: "auto" or "manual" where the Hub asks for agreement first.
        download_bytes: What would be downloaded; 0 for a directory.
        disk_bytes: What a copy of it takes.
        same_bytes: Whether two of its tensors have the same dtype, shape and bytes; of a Hub model, as far as a few
            parts of them tell.
        second_copies: Files that hold the same weights again and are left out.
    """

    name: str
    path: Path
    revision: str | None
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    card: CardFacts
    gated: str | None
    download_bytes: int
    disk_bytes: int
    same_bytes: Callable[[TensorInfo, TensorInfo], bool]
    second_copies: tuple[str, ...] = ()

    def tensors(self) -> tuple[TensorInfo, ...]:
        """Return all tensors, shard by shard in file order."""
        return tuple(tensor for shard in self.shards for tensor in shard.tensors)

    def view(self, options: EditOptions) -> Checkpoint:
        """Return it as a checkpoint, with the tensors that are stored quantised as plain ones where they are edited."""
        whole = Checkpoint(path=self.path, config=self.config, shards=self.shards, index=None, side_files=())
        return whole if options.quantized == "refuse" else plain_view(whole)


def read_layout(*, model: str, revision: str | None = None) -> Layout:
    """Read a model's config and headers; no weight is read or downloaded.

    Args:
        model: A directory, or a Hub id, of which config.json and the shards' headers are fetched.
        revision: Branch, tag or commit of a Hub id.

    Raises:
        InputError: There is no such directory.
        CheckpointError: The model is incomplete or its files contradict themselves.
        HubError: The Hub does not have it, does not give it, or cannot be reached.
    """
    local = find_local_model(model, revision=revision)
    if local is None:
        from abliterate.checkpoints.hub import inspect_model

        return _read_remote(inspect_model(model, revision=revision))
    return _read_local(local.path, local.name)


@uncollected()
def plan_layout(layout: Layout, *, options: EditOptions | None = None, proof: TwinProof | None = None) -> PlanReport:
    """Return what orthogonalizing a model would edit, leave alone and need.

    Args:
        layout: Of the model.
        options: What to edit; all residual writers by default.
        proof: What a tiny model of it showed, if it was tried.

    Raises:
        InputError: The options select nothing or layers that are not there.
        CheckpointError: The model is quantised or of an unsupported type.
    """
    options = options or EditOptions()
    view = layout.view(options)
    infos = {tensor.name: tensor for tensor in view.tensors()}
    stream = map_stream(
        config=view.config,
        tensors=tuple(infos.values()),
        path=layout.path,
        same_bytes=layout.same_bytes,
        unverified=options.unverified,
        partial=options.partial,
    )
    selected = select_writers(stream, options=options, model=layout.name)
    if options.quantized == "dequantize":
        plain = dequantized_layout(view).shards
        grown = sum(shard.size for shard in plain) - sum(shard.size for shard in layout.shards)
        layout = replace(layout, shards=plain, disk_bytes=layout.disk_bytes + grown)
        infos = {tensor.name: tensor for tensor in layout.tensors()}
    return _report(layout, stream, selected, infos, partial_edit(stream, proof))


def _read_local(path: Path, name: str) -> Layout:
    checkpoint = open_weights(path)
    refuse_adapter(path, checkpoint.side_files)
    sizes = [shard.size for shard in checkpoint.shards]
    path = checkpoint.path
    sizes += [(path / file).stat().st_size for file in checkpoint.side_files]
    return Layout(
        name=name,
        path=path,
        revision=None,
        config=checkpoint.config,
        shards=checkpoint.shards,
        card=(read_card_facts(path / _CARD) if _CARD in checkpoint.side_files else None) or CardFacts(),
        gated=None,
        download_bytes=0,
        disk_bytes=sum(sizes),
        same_bytes=checkpoint.same_bytes,
        second_copies=checkpoint.second_copies,
    )


def _read_remote(remote: RemoteModel) -> Layout:
    path = Path(remote.name)
    refuse_adapter(path, remote.sizes)
    config = parse_config(_read_small(remote, CONFIG_NAME), path=path / CONFIG_NAME)
    names, index = choose_shards(path, has=remote.sizes.__contains__, read=lambda name: _read_small(remote, name))
    with ThreadPoolExecutor(max_workers=_CONNECTIONS) as pool:
        shards = tuple(pool.map(lambda name: _read_header(remote, name), names))
    check_tensor_names(path, shards, index)
    total = sum(remote.sizes[name] for name in remote.wanted)
    return Layout(
        name=remote.name,
        path=path,
        revision=remote.revision,
        config=config,
        shards=shards,
        card=remote.card,
        gated=remote.gated,
        download_bytes=total,
        disk_bytes=total,
        same_bytes=lambda first, second: _same_parts(remote, first, second),
    )


def _same_parts(remote: RemoteModel, first: TensorInfo, second: TensorInfo) -> bool:
    size = first.end - first.start
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    length = min(size, _FIRST_RANGE)
    # Two matrices that were trained apart differ everywhere.
    for offset in sorted({0, (size - length) // 2, size - length}) if length else ():
        one, other = (
            remote.read_range(each.shard, each.start + offset, each.start + offset + length) for each in (first, second)
        )
        if one != other:
            return False
    return True


def _read_small(remote: RemoteModel, name: str) -> bytes:
    if remote.sizes[name] > MAX_BYTES:
        raise damaged_file(Path(remote.name) / name, f"it has more than {MAX_BYTES} bytes")
    return remote.read(name)


def _read_header(remote: RemoteModel, name: str) -> Shard:
    path, size = Path(remote.name) / name, remote.sizes[name]
    beginning = remote.read_range(name, 0, min(size, _FIRST_RANGE)) if size else b""
    end = header_end(path, beginning, size=size)
    if end > len(beginning):
        beginning += remote.read_range(name, len(beginning), end)
    return parse_shard(path, beginning[:end], size=size)


def _report(
    layout: Layout,
    stream: StreamMap,
    selected: tuple[ResidualWriter, ...],
    infos: dict[str, TensorInfo],
    partial: PartialEdit | None,
) -> PlanReport:
    tensors = tuple(projection_of(writer, infos[writer.tensor_name]) for writer in selected)
    chosen = {tensor.name for tensor in tensors}
    largest = max((infos[tensor.name] for tensor in tensors), key=lambda info: info.plain_bytes)
    return PlanReport(
        model=layout.name,
        revision=layout.revision,
        model_type=stream.model_type,
        text_section=stream.text_section,
        d_model=stream.d_model,
        n_layers=stream.n_layers,
        tied_embeddings=stream.tied_embeddings,
        embedding=stream.embedding,
        head=stream.head,
        license=layout.card.license,
        license_name=layout.card.license_name,
        license_link=layout.card.license_link,
        gated=layout.gated,
        counts=_counts(tensors),
        groups=group_tensors(tensors),
        tensors=tensors,
        not_selected=tuple(writer.tensor_name for writer in stream.writers if writer.tensor_name not in chosen),
        left_alone=stream.left_alone,
        n_shards=len(layout.shards),
        bytes_edited=sum(tensor.nbytes for tensor in tensors),
        bytes_weights=sum(info.end - info.start for info in layout.tensors()),
        download_bytes=layout.download_bytes,
        disk_bytes=layout.disk_bytes,
        largest_tensor=largest.name,
        memory_bytes=2 * largest.plain_bytes + _WORKSPACE_BYTES,
        notes=_notes(layout, stream, partial),
        partial=partial,
    )


def _counts(edits: Iterable[TensorEdit]) -> dict[str, int]:
    roles = [edit.writer.role for edit in edits]
    return {role: roles.count(role) for role in ROLES if role in roles}


def _notes(layout: Layout, stream: StreamMap, partial: PartialEdit | None) -> tuple[str, ...]:
    notes = [] if stream.verified else [unverified_note(stream.model_type)]
    notes += [] if partial is None else [partial.note()]
    notes += [*stream.notes(), *mlx_notes(layout.shards)]
    notes += [second_copies_note(layout.second_copies)] if layout.second_copies else []
    return tuple(notes)


def group_tensors(tensors: Iterable[TensorEdit]) -> tuple[TensorGroup, ...]:
    """Take together the tensors whose names differ by numbers only, in the order in which each group begins."""
    grouped: dict[tuple[Any, ...], list[TensorEdit]] = {}
    for tensor in tensors:
        writer, info = tensor.writer, tensor.info
        norms = tuple(pattern_of(norm.weight) for norm in writer.norm_chain)
        key = (pattern_of(info.name), writer.role, info.shape, info.stored_dtype, writer.residual_axis, norms)
        grouped.setdefault(key, []).append(tensor)
    return tuple(
        TensorGroup(
            pattern=pattern,
            role=role,
            layers=format_ranges({member.writer.layer for member in members if member.writer.layer is not None}),
            count=len(members),
            shape=shape,
            dtype=dtype,
            residual_axis=axis,
            norms=norms,
            bytes=sum(member.nbytes for member in members),
        )
        for (pattern, role, shape, dtype, axis, norms), members in grouped.items()
    )


def pattern_of(name: str) -> str:
    """Return a tensor name with `*` for each component that is a number."""
    return re.sub(r"(?<![^.])[0-9]+(?![^.])", "*", name)


def group_left_alone(left_alone: Iterable[LeftAlone]) -> tuple[LeftAloneTensors, ...]:
    """Take tensors that differ by numbers in their names, and are left alone for one reason, together."""
    counts = Counter((pattern_of(each.tensor_name), each.reason) for each in left_alone)
    return tuple(
        LeftAloneTensors(tensors=pattern, count=count, reason=reason) for (pattern, reason), count in counts.items()
    )


def format_ranges(numbers: Iterable[int]) -> str:
    """Write numbers as ranges: {0, 1, 2, 5} as `0-2, 5`."""
    ranges: list[list[int]] = []
    for number in sorted(set(numbers)):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def check_output(output: Path, source: Path, *, overwrite: bool) -> None:
    """Check that a result may be published as `output`.

    Raises:
        InputError: It overlaps the model's own directory `source`, or exists and is not to be replaced.
    """
    resolved, base = output.resolve(), source.resolve()
    if resolved == base or base in resolved.parents or resolved in base.parents:
        raise InputError(
            f"{output}: is, contains or lies in the model's own directory {source}; choose another directory"
        )
    check_output_directory(output, overwrite=overwrite)


def planned_report(
    plan: EditPlan,
    output: Path | None,
    *,
    dry_run: bool,
    format: Format = "checkpoint",  # noqa: A002
) -> OrthogonalizationReport:
    """Return the report of an edit before it is made: no component is measured and no file is hashed.

    Args:
        plan: The edit.
        output: Where the result will be; None if that is not said, as in a dry run.
        dry_run: Whether nothing will be written.
        format: Whether a whole checkpoint or an adapter is made.
    """
    edits = plan.edits
    return OrthogonalizationReport(
        output=None if output is None else str(output),
        dry_run=dry_run,
        format_version=FORMAT_VERSION,
        format=format,
        tool={"name": "abliterate", "version": __version__, **versions("torch", "safetensors")},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        base=_describe_base(plan),
        directions=tuple(
            {"sha256": direction.sha256, "d_model": direction.d_model, "metadata": direction.metadata}
            for direction in plan.directions
        ),
        subspace=encode_rows(plan.removed.subspace),
        options=plan.options,
        config_changes=plan.config_changes,
        tensors=tuple(EditedTensor(edit=edit) for edit in edits),
        left_alone=group_left_alone(plan.stream.left_alone),
        shards={},
        side_files={},
        counts=_counts(edits),
        bytes_edited=sum(edit.nbytes for edit in edits),
        bytes_total=sum(shard.size for shard in plan.layout.shards) + sum(edit.nbytes for edit in edits if edit.is_new),
        notes=plan.notes(),
        partial=plan.partial,
    )


def _describe_base(plan: EditPlan) -> dict[str, Any]:
    checkpoint = plan.checkpoint
    base: dict[str, Any] = {
        "model": plan.source.name,
        "revision": plan.source.revision,
        "model_type": plan.stream.model_type,
        "config_file_sha256": config_sha256(plan.source.path),
        "tied_embeddings": plan.stream.tied_embeddings,
        "pipeline_tag": pipeline_tag(checkpoint.config),
    }
    if plan.stream.tied_embeddings:
        stored = {tensor.name for tensor in checkpoint.tensors()}
        is_embedding = plan.stream.embedding in stored
        base["tied_tensor"] = plan.stream.embedding if is_embedding else plan.stream.head
    if has_file(checkpoint.path, RECORD_NAME):
        earlier = read_json_object(checkpoint.path / RECORD_NAME)
        base["abliteration"] = {key: earlier.get(key) for key in ("base", "directions", "options")}
    return base
