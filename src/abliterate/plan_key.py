"""What decides the bytes of an edited checkpoint, as hashes: work may be gone on with only where all are the same."""

import dataclasses
import hashlib
import json
from typing import Any

import torch

from abliterate._version import __version__
from abliterate.abliteration_record import encode_subspace
from abliterate.edit_plan import EditPlan


def plan_key(plan: EditPlan, *, device: str) -> dict[str, str]:
    """Return a hash for each part of what makes up the result, under a word for messages.

    Files of the source go in by size, time of change and, for shards, header: reading them whole would take as long
    as writing the result.

    Args:
        plan: The plan.
        device: Where the arithmetic is done.
    """
    checkpoint = plan.checkpoint
    names = [*(shard.file_name for shard in checkpoint.shards), *checkpoint.side_files]
    states = {name: (checkpoint.path / name).stat() for name in names}
    doses = [None if edit.dose is None else edit.dose.double().tolist() for edit in plan.edits]
    return {
        "model": _hash(
            {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()},
            [hashlib.sha256(shard.header_bytes).hexdigest() for shard in checkpoint.shards],
        ),
        "direction": _hash(encode_subspace(plan.subspace), doses),
        "set of options": _hash(
            dataclasses.asdict(plan.options), plan.config_changes, [edit.name for edit in plan.edits], device
        ),
        "version": _hash(__version__, torch.__version__),
    }


def _hash(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
