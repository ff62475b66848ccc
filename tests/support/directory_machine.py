"""The directory protocol as a state machine: what may lie at a target after any run of commands, faults and neighbours.

Each step runs a command that writes a directory (an edited checkpoint, an adapter, a restored base) at one target, and
something may happen in the middle of it. Afterwards the base is what it was, the target is absent or whole, nothing
that anybody else put there is gone, and what the command said is true.
"""

import atexit
import gc
import os
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from abliterate.directions import Direction, make_direction
from abliterate.editing.adapter import write_adapter
from abliterate.editing.options import EditOptions, WriteOptions
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.errors import AbliterateError
from abliterate.release.reverting import revert_checkpoint
from tests.support.faulty_disk import FaultyDisk, KilledError
from tests.support.loaded_models import content, tree
from tests.support.tiny_models import random_direction, save_tiny_model

OPTIONS = {"whole": EditOptions(), "half": EditOptions(strength=0.5), "untied": EditOptions(tied="untie")}
TAGS = (*OPTIONS, "adapter", "restored")
EVENTS = ("kill", "full", "interrupt", "io")
# Mostly, as most of what can happen happens then.
OVERWRITE = st.sampled_from([True, True, False])
# A little more than there are changes in the longest command.
AT = st.integers(1, 115)
# Of what the tool itself keeps in a directory until it is done.
OWN = ".abliterate"


@dataclass(frozen=True, slots=True)
class World:
    """What never changes: a base, a direction, an edited checkpoint to go back from, and what each command makes."""

    base: Path
    direction: Direction
    edited: Path
    expected: dict[str, dict[str, bytes]]

    def run(self, tag: str, out: Path, *, resume: bool = False, overwrite: bool = False) -> None:
        """Run the command that makes a thing."""
        if tag == "restored":
            revert_checkpoint(checkpoint=self.edited, output=out, overwrite=overwrite)
        elif tag == "adapter":
            write_adapter(source=self.base, direction=self.direction, output=out, overwrite=overwrite)
        else:
            orthogonalize_checkpoint(
                source=self.base,
                direction=self.direction,
                output=out,
                options=OPTIONS[tag],
                overwrite=overwrite,
                writing=WriteOptions(resume=resume, workers=1),
            )


@cache
def the_world() -> World:
    """Make the world, once a process."""
    place = Path(tempfile.mkdtemp(prefix="abliterate-world-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    base = save_tiny_model(
        place / "base", tied=True, dtype=torch.bfloat16, max_shard_size="8KB", num_hidden_layers=1, intermediate_size=48
    )
    (base / "more").mkdir()
    (base / "more" / "notes.txt").write_text("a side file in a directory")
    world = World(base, make_direction(mean_difference=random_direction()), place / "whole" / "out", {})
    for tag in TAGS:
        world.run(tag, place / tag / "out")
        world.expected[tag] = normal(place / tag / "out")
    # What was imported is not looked through each time that what a killed run held is let go.
    gc.collect()
    gc.freeze()
    return world


def normal(path: Path) -> dict[str, bytes]:
    """Return the files of a directory, its record without what differs from run to run."""
    return content(path) if (path / "abliteration.json").exists() else tree(path)


class DirectoryMachine(RuleBasedStateMachine):
    """See the module."""

    steps = 0
    happened: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.world = the_world()
        self.base = tree(self.world.base)
        self.root = Path(tempfile.mkdtemp(prefix="abliterate-machine-"))
        self.parent = self.root / "place"
        self.parent.mkdir()
        self.out = self.parent / "out"
        # What is at the target, as far as is known; and what lies anywhere that no command made.
        self.tag: str | None = None
        self.aside: str | None = None
        self.theirs: set[str] = set()
        self.condemned: set[str] = set()
        self.number = 0

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    # What others do.

    def put(self, directory: Path) -> None:
        """Put a file there that is no concern of the tool's."""
        if directory.is_dir():
            self.number += 1
            name = f"theirs-{self.number}"
            (directory / name).write_text(name)
            self.theirs.add(name)

    def work_folders(self) -> list[Path]:
        """Return the hidden directories beside the target."""
        return sorted(path for path in self.parent.iterdir() if path.name.startswith(".") and path.is_dir())

    @rule(where=st.sampled_from(["out", "work", "parent"]))
    def a_file_appears(self, where: str) -> None:
        self._put(where)
        self._look({self.tag})

    def _put(self, where: str) -> None:
        for directory in {"out": [self.out], "work": self.work_folders(), "parent": [self.parent]}[where]:
            self.put(directory)

    @rule()
    def they_take_their_files_away(self) -> None:
        for path in self._found():
            path.unlink()
        self.theirs = set()
        for folder in self.work_folders():
            if not any(folder.iterdir()):
                folder.rmdir()
        self._look({self.tag})

    @rule()
    def the_target_is_moved_away(self) -> None:
        if self.out.exists():
            shutil.rmtree(self.out)
            self.theirs = {path.name for path in self._found()}
            self.tag = None
        self._look({None})

    # What the commands do.

    def _without_result(self) -> set[str | None]:
        """Return what may be at the target after a command that made nothing, as things are before it.

        What a killed command moved aside is put back by the next that comes so far.
        """
        if self.tag is None and any(path.name.endswith(".replaced") for path in self.work_folders()):
            return {None, self.aside}
        return {self.tag}

    @rule(tag=st.sampled_from(TAGS), resume=st.booleans(), overwrite=OVERWRITE, can_exchange=st.booleans())
    def in_peace(self, tag: str, resume: bool, overwrite: bool, can_exchange: bool) -> None:
        self._command(FaultyDisk(self.root, can_exchange=can_exchange), tag, resume=resume, overwrite=overwrite)

    @rule(
        tag=st.sampled_from(TAGS),
        resume=st.booleans(),
        overwrite=OVERWRITE,
        at=AT,
        event=st.sampled_from(EVENTS),
        can_exchange=st.booleans(),
    )
    def with_a_fault(self, tag: str, resume: bool, overwrite: bool, at: int, event: str, can_exchange: bool) -> None:
        disk = FaultyDisk(self.root, at=at, event=event, can_exchange=can_exchange)
        self._command(disk, tag, resume=resume, overwrite=overwrite)

    @rule(
        tag=st.sampled_from(TAGS),
        resume=st.booleans(),
        overwrite=OVERWRITE,
        at=AT,
        where=st.sampled_from(["out", "work", "parent"]),
    )
    def while_a_file_appears(self, tag: str, resume: bool, overwrite: bool, at: int, where: str) -> None:
        disk = FaultyDisk(self.root, at=at, action=lambda: self._put(where))
        self._command(disk, tag, resume=resume, overwrite=overwrite, meanwhile=disk)

    @rule(tag=st.sampled_from(TAGS), resume=st.booleans(), overwrite=OVERWRITE, at=AT)
    def while_the_parent_is_renamed(self, tag: str, resume: bool, overwrite: bool, at: int) -> None:
        elsewhere = self.root / "elsewhere"
        disk = FaultyDisk(self.root, at=at, action=lambda: self.parent.rename(elsewhere) and None)
        self._command(disk, tag, resume=resume, overwrite=overwrite, back_from=elsewhere)

    @rule(
        tag=st.sampled_from(TAGS),
        other=st.sampled_from(TAGS),
        resume=st.booleans(),
        overwrite=OVERWRITE,
        at=AT,
    )
    def while_another_runs(self, tag: str, other: str, resume: bool, overwrite: bool, at: int) -> None:
        said: list[BaseException | None] = []

        def run_the_other() -> None:
            said.append(self._attempt(other, resume=resume, overwrite=overwrite))

        before, there = self._without_result(), self._names_in_target()
        disk = FaultyDisk(self.root, at=at, action=run_the_other)
        with disk.in_use():
            error = self._attempt(tag, resume=resume, overwrite=overwrite)
        self._count(disk)
        done = ([other] if said and said[0] is None else []) + ([tag] if error is None else [])
        # The first may have been done but for its tidying up when the other came.
        if done:
            self._condemn(there)
        self._look(set(done) or before)

    def _command(
        self,
        disk: FaultyDisk,
        tag: str,
        *,
        resume: bool,
        overwrite: bool,
        meanwhile: FaultyDisk | None = None,
        back_from: Path | None = None,
    ) -> None:
        tag_before, before, there = self.tag, self._without_result(), self._names_in_target()
        with disk.in_use():
            error = self._attempt(tag, resume=resume, overwrite=overwrite)
        self._count(disk)
        if back_from is not None and back_from.exists():
            if self.parent.exists():
                # The place was made again at the name that was given, and the result is there.
                self._look({tag} if error is None else {None})
                shutil.rmtree(self.parent)
                error = error or KeyboardInterrupt()
            back_from.rename(self.parent)
        is_killed = isinstance(error, KilledError)
        if error is None or is_killed:
            self._condemn(there)
        text = "" if error is None else str(error)
        if error is None:
            allowed: set[str | None] = {tag}
        elif is_killed:
            allowed = before | {tag} | (set() if disk.can_exchange else {None})
            self.aside = tag_before or self.aside
        elif "is whole" in text:
            allowed = {tag}
            self._condemn(there)
        else:
            allowed = before
        self._look(allowed)
        if error is None and not disk.happened:
            self._nothing_is_left_but_theirs(tag)

    def _count(self, disk: FaultyDisk) -> None:
        DirectoryMachine.steps += 1
        if disk.happened:
            DirectoryMachine.happened[disk.event or "another acted"] += 1

    def _attempt(self, tag: str, *, resume: bool, overwrite: bool) -> BaseException | None:
        """Run a command; return what it raised, which is an error of ours, Ctrl-C or the end of the process."""
        said: BaseException | None
        try:
            self.world.run(tag, self.out, resume=resume, overwrite=overwrite)
        except (AbliterateError, KeyboardInterrupt, KilledError) as error:
            said = error.with_traceback(None)
        else:
            said = None
        gc.collect()
        assert "\n" not in str(said)
        return said

    # What must hold.

    def _names_in_target(self) -> set[str]:
        return {path.name for path in self.out.iterdir()} if self.out.is_dir() else set()

    def _found(self) -> list[Path]:
        return list(self.root.rglob("theirs-*"))

    def _condemn(self, there: set[str]) -> None:
        """With --overwrite the directory goes with all that lay in it when the command began, at once or later."""
        self.condemned |= self.theirs & there

    def _look(self, allowed: set[str | None]) -> None:
        assert tree(self.world.base) == self.base, "the base was changed"
        found = self._found()
        names = {path.name for path in found}
        assert names >= self.theirs - self.condemned, "what was not the tool's is gone"
        assert names <= self.theirs
        assert all(path.read_text() == path.name for path in found)
        self.tag = self._tag()
        assert self.tag in allowed, f"{self.tag} is there, and one of {allowed} should be"

    def _tag(self) -> str | None:
        if not os.path.lexists(self.out):
            return None
        files = {
            name: data
            for name, data in normal(self.out).items()
            if not Path(name).name.startswith("theirs-") and not name.startswith(OWN)
        }
        tags = [tag for tag in TAGS if self.world.expected[tag] == files]
        assert tags, f"the target is neither absent nor whole: {sorted(files)}"
        return tags[0]

    def _nothing_is_left_but_theirs(self, tag: str) -> None:
        assert not (self.out / OWN).exists() or any((self.out / OWN).glob("theirs-*"))
        # A directory that an earlier run had made for its files is no part of this one.
        assert all(any(path.iterdir()) for path in self.out.rglob("*") if path.is_dir())
        beginning = ".out.partial" if tag in OPTIONS else ".out.new"
        for folder in self.work_folders():
            if not folder.name.startswith(beginning):
                continue
            assert any(folder.rglob("theirs-*")), f"{folder} was left behind: {sorted(tree(folder))}"
