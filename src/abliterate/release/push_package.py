"""What goes in a push and what stays, decided from the record, the directory and the evaluation; no weight is read.

What names a folder of this machine goes without it. Beside a checkpoint the same edit may go in GGUF files, its
siblings (`siblings`), each with its own record.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from abliterate.checkpoints.checkpoint import CONFIG_NAME
from abliterate.checkpoints.file_ranges import hash_file
from abliterate.checkpoints.hub import fetch_card_facts
from abliterate.checkpoints.model_source import CardFacts, read_card_facts
from abliterate.editing.record import (
    EVALUATION_NAME,
    RECORD_NAME,
    AbliterationRecord,
    check_sizes,
    read_record,
    shards_sha256,
)
from abliterate.errors import AbliterateError, HubError, InputError, VerificationError
from abliterate.files import parse_json, read_json_report
from abliterate.progress import ProgressReporter

CARD_NAME = "README.md"
_ADAPTER_CONFIG = "adapter_config.json"
_WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".gguf", ".pt", ".pth", ".ckpt", ".onnx", ".h5", ".msgpack", ".npz"}
)


_LOGS = ".tfevents."
"""What TensorBoard's files have in their names, beside that of the host that wrote them."""
_PART = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sibling:
    """The same edit in a GGUF file, which goes beside a checkpoint.

    Attributes:
        record: Its record.
        left_out: Files of its directory that do not go, sorted: all but the weights.
    """

    record: AbliterationRecord
    left_out: tuple[str, ...]

    @property
    def weights(self) -> dict[str, Path]:
        """Its files by their path in the repository, which is the name that they have."""
        return {name: self.record.directory / name for name in self.record.content["shards"]}

    @property
    def record_name(self) -> str:
        """What its record is called in the repository, where `abliteration.json` is the checkpoint's."""
        own, first = PurePosixPath(RECORD_NAME), PurePosixPath(min(self.weights)).stem
        return f"{own.stem}.{_PART.sub('', first)}{own.suffix}"

    def told(self) -> dict[str, Any]:
        """Return the content of the record that goes: no folder of this machine, and of the files those that go."""
        return {**without_folders(self.record.content), "side_files": {}}


@dataclass(frozen=True, slots=True, kw_only=True)
class PushPackage:
    """A checkpoint that may be pushed.

    Attributes:
        checkpoint: The directory.
        record: Its record.
        evaluation: The content of the evaluation report, if there is one.
        evaluation_path: Where that report lies.
        left_out: Files of the directory that do not go, sorted.
        siblings: The same edit in other files, which go along.
    """

    checkpoint: Path
    record: AbliterationRecord
    evaluation: dict[str, Any] | None
    evaluation_path: Path | None
    left_out: tuple[str, ...]
    siblings: tuple[Sibling, ...] = ()

    def sources(self) -> dict[str, Path | None]:
        """Map each path in the repository to its file; None stands for the generated card."""
        paths = self.record.files.keys() - set(self.left_out)
        sources: dict[str, Path | None] = {path: self.checkpoint / path for path in paths}
        sources[RECORD_NAME] = self.checkpoint / RECORD_NAME
        if self.evaluation_path is not None:
            sources[EVALUATION_NAME] = self.evaluation_path
        sources[CARD_NAME] = None
        for sibling in self.siblings:
            sources |= {**sibling.weights, sibling.record_name: sibling.record.directory / RECORD_NAME}
        return sources

    def sha256(self) -> dict[str, str]:
        """Return the hashes of what goes, by path in the repository, but for the card and an evaluation as it is."""
        files = {path: file.sha256 for path, file in self.record.files.items() if path != CARD_NAME}
        for sibling in self.siblings:
            files |= {path: sibling.record.files[path].sha256 for path in sibling.weights}
        return files | {path: hashlib.sha256(content).hexdigest() for path, content in self.rewritten().items()}

    def rewritten(self) -> dict[str, bytes]:
        """Return what goes in other words than it lies here: files that name folders of this machine, without them.

        Raises:
            VerificationError: A file of a local base names one and is no text.
        """
        found = {sibling.record_name: as_json(sibling.told()) for sibling in self.siblings}
        content, sources = without_folders(self.record.content), self.sources()
        # Their names have the host's in them.
        content["side_files"] = {name: entry for name, entry in content["side_files"].items() if _LOGS not in name}
        is_local, own = not content["base"].get("revision"), {_ADAPTER_CONFIG, EVALUATION_NAME}
        folders = self._folders()
        for name in sorted(sources.keys() & (self.record.files.keys() | own)):
            source = sources[name]
            if source is None:
                continue
            if name in own:
                before = read_json_report(source)
                after = without_folders(before)
                told = None if after == before else as_json(after)
            elif is_local and name in content["side_files"]:
                # What a model from the Hub says in its files, everyone can read there.
                told = _without_own_paths(source, folders)
            else:
                continue
            if told is None:
                continue
            found[name] = told
            if name in content["side_files"]:
                digest = hashlib.sha256(told).hexdigest()
                content["side_files"][name] |= {"sha256": digest, "bytes": len(told)}
            if name == CONFIG_NAME:
                changes = _changes(read_json_report(source), parse_json(told))
                content["config_changes"] = {**(content.get("config_changes") or {}), **changes}
        return found if content == self.record.content else {**found, RECORD_NAME: as_json(content)}

    def _folders(self) -> tuple[str, ...]:
        """Return folders of this machine that files of a local base may name, the longest first.

        One right below the root, as `/data`, says nothing of its owner, and a vocabulary may well hold it.
        """
        models = (os.path.expanduser(self.record.content["base"]["model"]), str(self.checkpoint))
        places = [os.path.expanduser("~"), *(os.path.dirname(os.path.abspath(model)) for model in models)]
        found = {place for place in {*places, *map(os.path.realpath, places)} if len(PurePath(place).parts) > 2}
        return tuple(sorted(found, key=len, reverse=True))


_FOLDER_KEYS = {
    "model", "base", "name", "judge", "judges", "arguments", "base_model_name_or_path", "server", "base_server", "url",
}  # fmt: skip
_PATH_KEYS = {
    "_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file", "vocab_file", "best_model_checkpoint",
}  # fmt: skip
_VOCABULARIES = frozenset({"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json"})
"""In these a path may be a token: nothing is replaced."""
_LARGEST_CONFIG = 1 << 22
_LARGEST_TEXT = 1 << 28


def without_folders(value: Any, *, named: bool = False) -> Any:
    """Return what a record or a report holds, in which what names a folder or file of this machine is its last part.

    Of the address of a server the host's name goes.
    """
    if isinstance(value, dict):
        plain = {key: without_folders(item, named=named or key in _FOLDER_KEYS) for key, item in value.items()}
        if isinstance(value.get("model"), str) and "revision" in value and not value["revision"]:
            # No Hub id, so it is a directory, whether or not it is still there.
            plain["model"] = _last_part(value["model"])
        return plain
    if isinstance(value, list):
        return [without_folders(item, named=named) for item in value]
    if not (named and isinstance(value, str) and ("/" in value or os.sep in value)):
        return value
    if value.startswith(("http://", "https://")):
        return _without_host(value)
    try:
        is_here = PurePath(value).is_absolute() or value.startswith(("~", ".")) or Path(value).exists()
    except (OSError, ValueError):
        return value
    return _last_part(value) if is_here else value


def _last_part(path: str) -> str:
    # That of the home directory is the owner's name.
    return "~" if PurePath(path) == PurePath(os.path.expanduser("~")) else PurePath(path).name or path


def _without_host(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:
        return "HOST"
    return f"{parts.scheme}://HOST{parts.path}"


def _without_own_paths(path: Path, folders: Sequence[str]) -> bytes | None:
    """Return what a file of a local base holds without the paths of this machine; None where it names none.

    These are what lies in `folders`, and absolute paths where libraries write down where they read something.
    """
    size, is_vocabulary = path.stat().st_size, path.name in _VOCABULARIES
    is_config = path.suffix == ".json" and size <= _LARGEST_CONFIG and not is_vocabulary
    content = _read_if_json(path) if is_config else None
    if content is not None:
        plain = _values_without(content, folders)
        return None if plain == content else as_json(plain)
    data = path.read_bytes() if size <= _LARGEST_TEXT else b""
    named = [folder for folder in folders if f"{folder}{os.sep}".encode() in data]
    if not named:
        return None
    try:
        text = None if is_vocabulary else data.decode()
    except UnicodeDecodeError:
        text = None
    if text is None:
        raise VerificationError(
            f"{path}: names {named[0]}, a folder of this machine, and is no text in which that could be replaced; take "
            "it out of the base's file and run `abliterate orthogonalize` again (nothing was sent)"
        )
    return _text_without(text, folders).encode()


def _values_without(value: Any, folders: Sequence[str], *, named: bool = False) -> Any:
    if isinstance(value, dict):
        return {key: _values_without(item, folders, named=key in _PATH_KEYS) for key, item in value.items()}
    if isinstance(value, list):
        return [_values_without(item, folders) for item in value]
    if not isinstance(value, str):
        return value
    is_own = value in folders or value.startswith(tuple(folder + os.sep for folder in folders))
    is_path = is_own or (named and PurePath(value).is_absolute())
    return _last_part(value) if is_path else _text_without(value, folders)


def _text_without(text: str, folders: Sequence[str]) -> str:
    for folder in folders:
        text = text.replace(folder + os.sep, "")
    return text


def _changes(before: Mapping[str, Any], after: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """Return dotted path -> new value of what differs, as the record lists changes of config.json."""
    found: dict[str, Any] = {}
    for key, value in after.items():
        if isinstance(value, dict):
            found |= _changes(before[key], value, f"{within}{key}.")
        elif value != before[key]:
            found[within + key] = value
    return found


def _read_if_json(path: Path) -> Any:
    try:
        return read_json_report(path)
    except AbliterateError:
        return None


def as_json(value: Any) -> bytes:
    """Return a value as the files that go hold it."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


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
    unknown = files_beside(record)
    unedited = {path for path in record.content["side_files"] if _holds_weights(path) or _LOGS in path}
    return PushPackage(
        checkpoint=checkpoint,
        record=record,
        evaluation=content,
        evaluation_path=evaluation_path,
        left_out=tuple(sorted(unknown | unedited)),
    )


def files_beside(record: AbliterationRecord) -> set[str]:
    """Return the files in a checkpoint's directory that its record does not name.

    Raises:
        VerificationError: There are weights among them.
    """
    directory = record.directory
    present = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    unknown = present - record.files.keys() - {RECORD_NAME, EVALUATION_NAME}
    if weights := sorted(path for path in unknown if _holds_weights(path)):
        raise VerificationError(
            f"{directory}: weight files that {RECORD_NAME} does not name: {', '.join(weights)}; "
            "move them out of the directory (nothing was sent)"
        )
    return unknown


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
    rewritten = package.rewritten()
    for name, source in package.sources().items():
        target = staging / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name in rewritten:
            target.write_bytes(rewritten[name])
            continue
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
    hashed = evaluation.get("shards_sha256")
    # What an adapter was measured as, merged, has no record; nor has an older evaluation its hash.
    is_known = hashed is not None or ("shards_sha256" in evaluation and not record.is_adapter)
    if is_known and hashed != shards_sha256(record.content):
        raise InputError(f"{path}: measured {measured}, not {checkpoint}; {again}")
    if is_known:
        return evaluation
    if (measured / "config.json").is_file() and not measured.samefile(checkpoint):
        other = measured / RECORD_NAME
        if not other.is_file() or read_json_report(other).get("shards") != record.content["shards"]:
            raise InputError(f"{path}: measured {measured}, not {checkpoint}; {again}")
    return evaluation
