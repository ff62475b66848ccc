"""Small files of our own as a state machine: reports, tables and directions are the old or the new one, whole, and a
file that grows by lines holds every line that was said to be in it, whatever happens in the middle of a write."""

import json
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from abliterate.directions import load_direction, make_direction
from abliterate.errors import AbliterateError
from abliterate.files import JsonLines, read_json_report, write_csv, write_json
from tests.support.faulty_disk import FaultyDisk, KilledError

EVENT = st.sampled_from([None, "kill", "full", "interrupt", "io"])
# A little more than there are changes in one write.
AT = st.integers(1, 7)
VALUES = st.dictionaries(st.text("ab é\u4e2d", max_size=3), st.integers() | st.text(max_size=30), max_size=3)


class FileMachine(RuleBasedStateMachine):
    """See the module."""

    steps = 0
    happened: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="abliterate-files-"))
        self.lines = JsonLines(self.root / "lines.jsonl")
        # What is in the files, as far as is known: of the lines those that are there, and one that may be.
        self.report: Any = None
        self.table: str | None = None
        self.number: int | None = None
        self.written: list[Any] = []
        self.perhaps: list[Any] = []
        self.must_resume = True
        (self.root / "theirs").write_text("theirs")

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    @rule(value=VALUES, event=EVENT, at=AT)
    def write_a_report(self, value: dict[str, Any], event: str | None, at: int) -> None:
        path = self.root / "report.json"
        done = self._do(lambda: write_json(path, value), event, at)
        found = read_json_report(path) if path.exists() else None
        self.report = self._one_of(found, self.report, value, done)

    @rule(cell=st.text(max_size=5), event=EVENT, at=AT)
    def write_a_table(self, cell: str, event: str | None, at: int) -> None:
        path, other = self.root / "table.csv", self.root / "calm.csv"
        write_csv(other, ["a", "b"], [[cell, 1]])
        new = other.read_bytes().decode()
        other.unlink()
        done = self._do(lambda: write_csv(path, ["a", "b"], [[cell, 1]]), event, at)
        self.table = self._one_of(path.read_bytes().decode() if path.exists() else None, self.table, new, done)

    @rule(number=st.integers(1, 1000), event=EVENT, at=AT)
    def save_a_direction(self, number: int, event: str | None, at: int) -> None:
        path = self.root / "refusal.safetensors"
        direction = make_direction(mean_difference=torch.tensor([float(number), 1.0]))
        done = self._do(lambda: direction.save(path), event, at)
        found = None
        if path.exists():
            vector = load_direction(path).vector
            found = round(float(vector[0] / vector[1]))
        self.number = self._one_of(found, self.number, number, done)

    @rule(value=VALUES, event=EVENT, at=AT)
    def add_a_line(self, value: dict[str, Any], event: str | None, at: int) -> None:
        if self.must_resume:
            self.go_on_with_the_lines(None, 1)
            if self.must_resume:
                return
        done = self._do(lambda: self.lines.append(value), event, at)
        if done:
            self.written.append(value)
        elif event == "kill":
            self.must_resume, self.perhaps = True, [value]
        else:
            self.perhaps = [value]
        self._look_at_the_lines()

    @rule(event=EVENT, at=AT)
    def go_on_with_the_lines(self, event: str | None, at: int) -> None:
        if self._do(lambda: self.lines.resume(lambda value: value), event, at):
            self.must_resume = False
        self._look_at_the_lines()

    def _look_at_the_lines(self) -> None:
        found = self.lines.read(lambda value: value)
        assert found in (self.written, self.written + self.perhaps), f"{found} are there, not {self.written}"
        self.written, self.perhaps = found, []

    def _one_of(self, found: Any, old: Any, new: Any, done: bool) -> Any:
        new = json.loads(json.dumps(new))
        assert found == new if done else found in (old, new), f"{found!r} is there, not {old!r} or {new!r}"
        return found

    def _do(self, write: Any, event: str | None, at: int) -> bool:
        FileMachine.steps += 1
        disk = FaultyDisk(self.root, at=at if event else None, event=event)
        done = False
        with disk.in_use():
            try:
                write()
                done = True
            except (OSError, AbliterateError, KeyboardInterrupt, KilledError):
                assert disk.happened
        if disk.happened:
            FileMachine.happened[str(disk.event)] += 1
        assert (self.root / "theirs").read_text() == "theirs"
        if event != "kill":
            self._no_more_litter()
        for path in self.root.glob(".*.partial-*"):
            path.unlink()
        return done

    def _no_more_litter(self) -> None:
        names = {path.name for path in self.root.iterdir()}
        assert names <= {"theirs", "report.json", "table.csv", "refusal.safetensors", "lines.jsonl"}, names
