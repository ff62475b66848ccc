"""The same edit in GGUF files, beside a checkpoint: which of them may go along in a push.

A sibling is what `abliterate orthogonalize FILE.gguf -o DIR` wrote: a GGUF file, whole or in parts, with a record of
its own. That record must say the same edit of the same model as the checkpoint's, as far as two records can: the same
directions and what they span, the same options, and edited tensors of the same sizes in the same layers. What llama.cpp
made of the edited checkpoint has no record, so nothing vouches for it.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from abliterate.checkpoints.checkpoint import GGUF_SUFFIX
from abliterate.editing.options import EditOptions
from abliterate.editing.record import (
    EVALUATION_NAME,
    RECORD_NAME,
    AbliterationRecord,
    as_recorded,
    check_sizes,
    read_record,
)
from abliterate.errors import InputError
from abliterate.files import printable
from abliterate.release.push_package import PushPackage, Sibling, files_beside
from abliterate.release.recorded_edits import recorded_options, recorded_subspace

_SAME_SPAN = 1e-6


def read_siblings(directories: Sequence[Path], *, package: PushPackage) -> tuple[Sibling, ...]:
    """Read the records of siblings, and hold them against the one of the checkpoint that they go beside.

    No weight is read: their hashes and tensors are for the caller to check, as the checkpoint's.

    Args:
        directories: What `orthogonalize FILE.gguf -o DIR` wrote.
        package: The checkpoint that they are to go with.

    Raises:
        InputError: One has no record, is no GGUF file, is another edit or of another model, or has a file of a name
            that goes already.
        VerificationError: A recorded file is missing or has another size, or there are unknown weights.
    """
    found: list[Sibling] = []
    owners = {path.lower(): package.checkpoint for path in package.sources()}
    for directory in directories:
        record = _read_record(directory)
        if difference := next(_differences(package.record, record), None):
            raise InputError(
                f"{directory}: is not the same edit as {package.checkpoint}: {difference}; push it to a repository of "
                "its own (nothing was sent)"
            )
        check_sizes(record)
        sibling = Sibling(record=record, left_out=_left_out(record))
        for path in (*sibling.weights, sibling.record_name):
            other = owners.setdefault(path.lower(), directory)
            if other is not directory:
                raise InputError(
                    f"{directory}: {path} goes already, from {other}; give the base's GGUF file another name and "
                    "orthogonalize that (nothing was sent)"
                )
        found.append(sibling)
    return tuple(found)


def _read_record(directory: Path) -> AbliterationRecord:
    if directory.is_file() or (directory.is_dir() and not (directory / RECORD_NAME).is_file()):
        what = "is a file" if directory.is_file() else f"has no {RECORD_NAME}"
        raise InputError(
            f"{directory}: {what}, and a sibling is a directory with a GGUF file and the record that vouches for it; "
            "`abliterate orthogonalize BASE.gguf --direction FILE -o DIR` makes one of the base's GGUF file (nothing "
            "vouches for what is converted from an edited checkpoint; nothing was sent)"
        )
    record = read_record(directory)
    files = [name for name in record.content["shards"] if not name.endswith(GGUF_SUFFIX) or "/" in name]
    if files:
        what = "an adapter" if record.is_adapter else f"a checkpoint ({printable(files[0])})"
        raise InputError(
            f"{directory}: is {what}, and only GGUF files go beside a checkpoint, because what loads that would load "
            "both; push it to a repository of its own (nothing was sent)"
        )
    return record


def _left_out(record: AbliterationRecord) -> tuple[str, ...]:
    """Return all files of a sibling's directory but its weights and its record."""
    evaluation = {EVALUATION_NAME} if (record.directory / EVALUATION_NAME).is_file() else set()
    return tuple(sorted((record.files.keys() - record.content["shards"].keys()) | files_beside(record) | evaluation))


def _differences(checkpoint: AbliterationRecord, sibling: AbliterationRecord) -> Iterator[str]:
    """Yield what two records say of their edits and bases that cannot be of the same edit of the same model."""
    yield from _other_directions(checkpoint, sibling)
    ours, theirs = checkpoint.content["base"], sibling.content["base"]
    is_tied = bool(ours.get("tied_embeddings") or theirs.get("tied_embeddings"))
    yield from _other_options(recorded_options(checkpoint), recorded_options(sibling), is_tied=is_tied)
    with as_recorded(sibling.directory):
        yield from _other_base(ours, theirs)
        yield from _other_sizes(_sizes(checkpoint), _sizes(sibling))


def _other_directions(checkpoint: AbliterationRecord, sibling: AbliterationRecord) -> Iterator[str]:
    ours, theirs = (sorted(each["sha256"] for each in record.content["directions"]) for record in (checkpoint, sibling))
    if ours != theirs:
        yield f"other directions were removed, SHA-256 {_short(theirs)} and not {_short(ours)}"
        return
    a, b = recorded_subspace(checkpoint), recorded_subspace(sibling)
    # Of the same directions in another order the rows are others, and span the same.
    if a.shape != b.shape or abs(float(((a @ b.T) ** 2).sum()) - len(a)) > _SAME_SPAN:
        yield "its subspace is not the one of the same directions"


def _short(hashes: Sequence[str]) -> str:
    return ", ".join(printable(each[:12]) for each in hashes)


def _other_options(ours: EditOptions, theirs: EditOptions, *, is_tied: bool) -> Iterator[str]:
    for name in ("components", "layers", "strength", "preserve_norms", "add", *(["tied"] if is_tied else [])):
        if (a := getattr(ours, name)) != (b := getattr(theirs, name)):
            yield f"it was made with {name} {_shown(b)} and not {_shown(a)}"
    # What the file of strengths was called says nothing about them.
    a, b = (None if each.strengths is None else replace(each.strengths, file="") for each in (ours, theirs))
    if a != b:
        yield "it was made with other strengths"


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _other_base(ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[str]:
    # llama.cpp's converter writes several types as llama; their sizes must tell.
    a, b = (str(base.get("model_type")).removesuffix("_text") for base in (ours, theirs))
    if b not in {a, "llama"}:
        yield f"its base is of type {printable(b)} and not {printable(a)}"
    earlier = [
        [each["sha256"] for each in (base.get("abliteration") or {}).get("directions") or ()] for base in (ours, theirs)
    ]
    if earlier[0] != earlier[1]:
        yield "one of the two bases had been edited before, or both in other ways"


def _sizes(record: AbliterationRecord) -> Counter[str]:
    """Return how many numbers of each role and layer were edited; experts may be stored apart or in one tensor."""
    sizes: Counter[str] = Counter()
    for tensor in record.content["tensors"]:
        where = "the embeddings" if tensor["layer"] is None else f"{tensor['role']} of layer {tensor['layer']}"
        sizes[printable(where)] += prod(tensor["shape"])
    return sizes


def _other_sizes(ours: Counter[str], theirs: Counter[str]) -> Iterator[str]:
    for where in (*ours, *theirs):
        if ours[where] != theirs[where]:
            yield f"its base is another model: {theirs[where]} numbers were edited in {where} and not {ours[where]}"
            return
