"""The base model that a record names: found again, and known by its config.json to be the one that was edited."""

import hashlib
from pathlib import Path

from abliterate.checkpoints.checkpoint import CONFIG_NAME, Checkpoint, open_checkpoint
from abliterate.checkpoints.hub import ModelSource, resolve_model
from abliterate.editing.record import RECORD_NAME, AbliterationRecord
from abliterate.errors import CheckpointError, InputError


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
    elif revision or (Path(named) / CONFIG_NAME).is_file():
        source = resolve_model(named, revision=revision)
    else:
        raise InputError(
            f"{record.directory / RECORD_NAME}: names the base model {named}, which is not there; "
            "name a directory or a Hub id that holds it with --base"
        )
    if not is_base(source.path, record):
        raise InputError(
            f"{source.name}: is not the model that was edited: its config.json is not the one in "
            f"{record.directory / RECORD_NAME}; name the right one with --base"
        )
    return source


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
