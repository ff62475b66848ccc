"""One try of what is done to a checkpoint that nobody vouches for: it may end in a result, or in a known error.

Whatever is opened for writing, made, renamed or removed outside the directory for results is found by an audit hook.
"""

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from abliterate.checkpoints.checkpoint import open_checkpoint
from abliterate.directions import Direction, make_direction
from abliterate.editing.options import EditOptions
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.editing.plan_report import plan_layout, read_layout
from abliterate.errors import AbliterateError
from abliterate.formats.quantized import plain_view
from tests.support.checkpoint_mutations import break_checkpoint, make_harmless
from tests.support.tiny_models import random_direction

OPTIONS = (
    EditOptions(),
    EditOptions(),
    EditOptions(tied="untie"),
    EditOptions(tied="skip", strength=0.5),
    EditOptions(layers=(0, 2), components=("mlp",), preserve_norms=True),
    EditOptions(add=1.0),
    EditOptions(unverified=True),
)
QUANTIZED_OPTIONS = (
    EditOptions(),
    EditOptions(quantized="requantize"),
    EditOptions(quantized="requantize", strength=0.5),
    EditOptions(quantized="dequantize"),
    EditOptions(quantized="dequantize", tied="untie", preserve_norms=True),
)
# Audit event -> which of its arguments is a place that it changes, and which the open directory that the place is in.
_CHANGED = {
    "os.mkdir": ((0, 2),),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
    "os.chmod": ((0, 2),),
}
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_watched: list[tuple[Path, list[str]]] = []


def make_fuzz_direction() -> Direction:
    """Return a direction that also goes with additions."""
    return make_direction(mean_difference=random_direction(), metadata={"layer": 1})


def attempt(
    base: Path,
    work: Path,
    random: Random,
    direction: Direction,
    options: Sequence[EditOptions] | None = None,
) -> str:
    """Break a copy of a checkpoint, plan its edit and edit it.

    Args:
        base: The sound checkpoint.
        work: A directory that is not there; it is gone afterwards.
        random: Where all choices come from.
        direction: What is projected out or added.
        options: What is drawn from; None: `OPTIONS`.

    Returns:
        What came of it: "edited", or the kind of error and its message without names and numbers.

    Raises:
        AssertionError: Something was written that should not have been, or an error is not one line.
    """
    checkpoint, results = work / "checkpoint", work / "results"
    results.mkdir(parents=True)
    try:
        shutil.copytree(base, checkpoint)
        make_harmless(work)
        break_checkpoint(checkpoint, random)
        before = listing(work, without=results)
        chosen = random.choice(options or OPTIONS)
        with writes_elsewhere(results) as elsewhere:
            outcome = _edit(checkpoint, results / "out", chosen, direction)
        assert elsewhere == [], elsewhere
        assert listing(work, without=results) == before
        left = sorted(path.name for path in results.iterdir())
        assert left == (["out"] if outcome == "edited" else []), left
        if outcome == "edited":
            assert not any(path.is_symlink() for path in results.rglob("*"))
            was, became = open_checkpoint(checkpoint), open_checkpoint(results / "out")
            was = plain_view(was) if chosen.quantized == "dequantize" else was
            assert {tensor.name for tensor in was.tensors()} <= {tensor.name for tensor in became.tensors()}
        return outcome
    finally:
        shutil.rmtree(work)


def _edit(checkpoint: Path, output: Path, options: EditOptions, direction: Direction) -> str:
    known: list[str] = []
    for run in (
        lambda: open_checkpoint(checkpoint),
        lambda: plan_layout(
            read_layout(model=str(checkpoint)),
            options=EditOptions(unverified=options.unverified, quantized=options.quantized),
        ),
        lambda: orthogonalize_checkpoint(
            source=checkpoint, direction=direction, output=None, options=options, dry_run=True
        ),
        lambda: orthogonalize_checkpoint(source=checkpoint, direction=direction, output=output, options=options),
    ):
        try:
            run()
        except AbliterateError as error:
            message = str(error)
            assert "\n" not in message
            assert len(message) < 3000, len(message)
            known.append(f"{type(error).__name__}: {skeleton(message, checkpoint)}")
    return known[-1] if known else "edited"


def skeleton(message: str, checkpoint: Path) -> str:
    """Return a message without names, numbers and places, so that those of one kind are equal."""
    text = message.replace(str(checkpoint.parent), "")
    words = [word for word in text.split() if word.isascii() and word.replace("-", "").rstrip(",;:.").isalpha()]
    return " ".join(words)


def listing(work: Path, *, without: Path) -> dict[str, tuple[int, int, int]]:
    """Return mode, size and time of all below a directory but what is below another."""
    found = {}
    for path in [work, *work.rglob("*")]:
        if path != work and path != without and without not in path.parents:
            status = path.lstat()
            found[str(path)] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return found


@contextmanager
def writes_elsewhere(allowed: Path) -> Iterator[list[str]]:
    """Yield a list that gets an entry for each attempt of this process to write outside a directory."""
    if not _hooked:
        sys.addaudithook(_audit)
        _hooked.append(True)
    _watched.append((allowed, []))
    try:
        yield _watched[-1][1]
    finally:
        _watched.pop()


_hooked: list[bool] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched:
        return
    allowed, elsewhere = _watched[-1]
    for path, directory in changed_places(event, arguments):
        if path == os.devnull:
            continue
        # The last part is not followed: it is the entry itself that is made or removed.
        entry = directory / os.fsdecode(path)
        place = Path(os.path.realpath(entry.parent)) / entry.name
        if place != allowed and allowed not in place.parents:
            elsewhere.append(f"{event} {os.fsdecode(path)}")


def changed_places(event: str, arguments: tuple[Any, ...]) -> Iterator[tuple[Any, Path]]:
    """Yield each place that an audited event changes, and the directory that it is relative to."""
    if event == "open":
        path, mode, flags = arguments
        is_write = bool(flags & _WRITE_FLAGS) if isinstance(flags, int) else bool(set(mode or "") & set("wax+"))
        if is_write and isinstance(path, (str, bytes)):
            yield path, Path.cwd()
        return
    for index, descriptor in _CHANGED.get(event, ()):
        # -1 stands for none.
        opened = -1 if descriptor is None else arguments[descriptor]
        if not isinstance(arguments[index], int):
            yield arguments[index], Path.cwd() if opened == -1 else Path(os.readlink(f"/proc/self/fd/{opened}"))
