"""What an edit is going to be, as the report that its record is made from: all that is known before it is made."""

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors
import torch

from abliterate._version import __version__
from abliterate.abliteration_record import (
    FORMAT_VERSION,
    RECORD_NAME,
    EditedTensor,
    Format,
    OrthogonalizationReport,
    encode_subspace,
)
from abliterate.architectures.writers import ROLES
from abliterate.checkpoints.atomic_directory import check_output_directory
from abliterate.checkpoints.checkpoint import CONFIG_NAME, read_json_object
from abliterate.edit_plan import EditPlan
from abliterate.errors import InputError
from abliterate.untrusted import has_file


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
    roles = [edit.role for edit in edits]
    return OrthogonalizationReport(
        output=None if output is None else str(output),
        dry_run=dry_run,
        format_version=FORMAT_VERSION,
        format=format,
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
        config_changes=plan.config_changes,
        tensors=tuple(
            EditedTensor(
                name=edit.name,
                role=edit.role,
                layer=edit.layer,
                residual_axis=edit.residual_axis,
                shape=edit.info.shape,
                dtype=edit.info.encoding.codes.dtype if edit.info.encoding else edit.info.dtype,
                shard=edit.info.shard,
                stored_as=edit.stored_as,
                norm_chain=edit.norm_chain,
                kind=edit.kind,
            )
            for edit in edits
        ),
        shards={},
        side_files={},
        counts={role: roles.count(role) for role in ROLES if role in roles},
        bytes_edited=sum(edit.nbytes for edit in edits),
        bytes_total=sum(shard.size for shard in plan.layout.shards) + sum(edit.nbytes for edit in edits if edit.is_new),
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
    if plan.stream.tied_embeddings:
        stored = {tensor.name for tensor in checkpoint.tensors()}
        is_embedding = plan.stream.embedding in stored
        base["tied_tensor"] = plan.stream.embedding if is_embedding else plan.stream.head
    if has_file(checkpoint.path, RECORD_NAME):
        earlier = read_json_object(checkpoint.path / RECORD_NAME)
        base["abliteration"] = {key: earlier.get(key) for key in ("base", "directions", "options")}
    return base
