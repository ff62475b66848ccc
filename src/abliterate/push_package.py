"""What a push sends: the files that a checkpoint's record vouches for, its measurements, and a card."""

import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from abliterate.checkpoints.hashed_files import hash_file
from abliterate.checkpoints.hub import CardFacts, fetch_card_facts, read_card_facts
from abliterate.editing.record import (
    EVALUATION_NAME,
    RECORD_NAME,
    AbliterationRecord,
    check_sizes,
    read_json_report,
    read_record,
)
from abliterate.errors import HubError, InputError, VerificationError
from abliterate.progress import ProgressReporter

CARD_NAME = "README.md"
_WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".gguf", ".pt", ".pth", ".ckpt", ".onnx", ".h5", ".msgpack", ".npz"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PushPackage:
    """A checkpoint that may be pushed.

    Attributes:
        checkpoint: The directory.
        record: Its record.
        evaluation: The content of the evaluation report, if there is one.
        evaluation_path: Where that report lies.
        left_out: Files of the directory that do not go, sorted.
    """

    checkpoint: Path
    record: AbliterationRecord
    evaluation: dict[str, Any] | None
    evaluation_path: Path | None
    left_out: tuple[str, ...]

    def sources(self) -> dict[str, Path | None]:
        """Map each path in the repository to its file; None stands for the generated card."""
        paths = self.record.files.keys() - set(self.left_out)
        sources: dict[str, Path | None] = {path: self.checkpoint / path for path in paths}
        sources[RECORD_NAME] = self.checkpoint / RECORD_NAME
        if self.evaluation_path is not None:
            sources[EVALUATION_NAME] = self.evaluation_path
        sources[CARD_NAME] = None
        return sources


def read_push_package(checkpoint: Path, *, evaluation: Path | None = None) -> PushPackage:
    """Decide what goes, from the record, the directory's listing and the evaluation; no weight is read.

    Args:
        checkpoint: A directory that `orthogonalize_checkpoint` wrote.
        evaluation: An evaluation report; default: `evaluation.json` in the directory, if it is there.

    Raises:
        InputError: The directory has no record, or the evaluation cannot be used.
        VerificationError: A recorded file is missing or has another size, or there are unknown weights.
    """
    record = read_record(checkpoint)
    check_sizes(record)
    evaluation_path = evaluation or _own_evaluation(record)
    content = None if evaluation_path is None else _read_evaluation(evaluation_path, record=record)
    known = record.files.keys() | {RECORD_NAME, EVALUATION_NAME}
    present = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    unknown = present - known
    weights = sorted(path for path in unknown if _holds_weights(path))
    if weights:
        raise VerificationError(
            f"{checkpoint}: weight files that {RECORD_NAME} does not name: {', '.join(weights)}; "
            "move them out of the directory (nothing was sent)"
        )
    unedited = {path for path in record.content["side_files"] if _holds_weights(path)}
    return PushPackage(
        checkpoint=checkpoint,
        record=record,
        evaluation=content,
        evaluation_path=evaluation_path,
        left_out=tuple(sorted(unknown | unedited)),
    )


def find_base_card_facts(package: PushPackage, *, online: bool, progress: ProgressReporter) -> CardFacts | None:
    """Find what the base model's card says: beside the checkpoint, in a local base, or on the Hub if `online`."""
    base = package.record.content["base"]
    found: list[CardFacts | None] = []
    # The README.md among the side files is the base model's own card.
    if CARD_NAME in package.record.files:
        found.append(read_card_facts(package.checkpoint / CARD_NAME))
    if not base.get("revision"):
        found.append(read_card_facts(Path(base["model"]) / CARD_NAME))
    licensed = [facts for facts in found if facts and facts.license]
    if not licensed and online and base.get("revision"):
        try:
            found.append(fetch_card_facts(base["model"], revision=base["revision"]))
        except HubError as error:
            progress.message(f"the base model's licence is left out of the card: {error}")
        licensed = [facts for facts in found if facts and facts.license]
    return next(iter([*licensed, *(facts for facts in found if facts)]), None)


def stage_package(package: PushPackage, *, card: str, staging: Path) -> None:
    """Lay out what goes in the directory `staging`, by links where they can be made."""
    # The client uploads folders; with links the card replaces README.md there and not in the checkpoint.
    for name, source in package.sources().items():
        target = staging / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source is None:
            target.write_text(card, encoding="utf-8", newline="\n")
            continue
        try:
            target.symlink_to(source.resolve())
        except OSError:
            shutil.copyfile(source, target)


def _holds_weights(path: str) -> bool:
    return PurePosixPath(path).suffix.lower() in _WEIGHT_SUFFIXES


def _own_evaluation(record: AbliterationRecord) -> Path | None:
    path = record.directory / EVALUATION_NAME
    if not path.is_file():
        return None
    inherited = record.base_evaluation is not None and hash_file(path) == record.base_evaluation.sha256
    return None if inherited else path


def _read_evaluation(path: Path, *, record: AbliterationRecord) -> dict[str, Any]:
    checkpoint = record.directory
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a report that `abliterate evaluate --output` wrote")
    evaluation = read_json_report(path)
    if not isinstance(evaluation.get("rates"), dict):
        raise InputError(f"{path}: no refusal rates in it; write it with `abliterate evaluate --output`")
    again = f"run `abliterate evaluate {checkpoint} --base BASE --output {checkpoint / EVALUATION_NAME}`"
    intervention = evaluation.get("intervention", "none")
    if intervention != "none":
        raise InputError(f"{path}: measured the intervention {intervention!r}, not these weights; {again}")
    measured = Path(str(evaluation.get("model", "")))
    if (measured / "config.json").is_file() and not measured.samefile(checkpoint):
        other = measured / RECORD_NAME
        if not other.is_file() or read_json_report(other).get("shards") != record.content["shards"]:
            raise InputError(f"{path}: measured {measured}, not {checkpoint}; {again}")
    return evaluation
