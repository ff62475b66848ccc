"""A few sequences of what may befall a target; `python -m benchmarks.state_machine` runs thousands."""

import gc
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from abliterate.checkpoints.atomic_directory import published_directory
from abliterate.checkpoints.checkpoint import open_checkpoint
from abliterate.editing.record import check_hashes, read_record
from abliterate.errors import CheckpointError, InputError, InterruptedRunError
from tests.support.directory_machine import OWN, DirectoryMachine, normal, the_world
from tests.support.faulty_disk import FaultyDisk, KilledError
from tests.support.file_machine import FileMachine


def profile(examples: int, steps: int) -> settings:
    return settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )


def test_the_target_is_absent_or_whole_whatever_happens():
    run_state_machine_as_test(DirectoryMachine, settings=profile(6, 12))


def test_small_files_are_the_old_or_the_new_one_and_no_line_is_lost():
    run_state_machine_as_test(FileMachine, settings=profile(12, 12))


@pytest.mark.proof
def test_the_target_is_absent_or_whole_at_length():
    run_state_machine_as_test(DirectoryMachine, settings=profile(60, 20))


def killed(disk: FaultyDisk, run) -> None:
    """Run until the kill; what is gone holds no lock."""
    with disk.in_use():
        try:
            run()
        except KilledError as error:
            error.with_traceback(None)
        else:
            raise AssertionError("it lived")
    gc.collect()


def kill_when(root: Path, run, ready, *, first: int, **disk_options) -> None:
    """Kill a run before a change that it is about to make when `ready` holds; the changes before `first` are known."""
    for at in range(first, 200):
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        run_before(root)
        killed(FaultyDisk(root, at=at, event="kill", **disk_options), run)
        if ready():
            return
    raise AssertionError("never")


def run_before(root: Path) -> None:
    the_world().run("half", root / "out")


def test_what_a_run_leaves_that_is_killed_right_after_the_rename_does_no_harm_and_the_next_removes_it(tmp_path):
    world, root = the_world(), tmp_path / "place"
    out, partial = root / "out", root / ".out.partial"
    kill_when(
        root,
        lambda: world.run("whole", out, overwrite=True),
        lambda: normal_without_marks(out) == world.expected["whole"],
        first=85,
    )
    assert (out / OWN).is_dir()
    assert normal_without_marks(partial) == world.expected["half"]  # the one that was replaced
    assert not any(name.startswith(OWN) for name in open_checkpoint(out).side_files)
    check_hashes(read_record(out))
    world.run("half", out, overwrite=True, resume=True)
    assert [path.name for path in root.iterdir()] == ["out"]
    assert normal(out) == world.expected["half"]


def test_what_was_replaced_in_two_steps_comes_back_when_the_run_was_killed_between_them(tmp_path):
    world, root = the_world(), tmp_path / "place"
    out = root / "out"
    kill_when(
        root, lambda: world.run("whole", out, overwrite=True), lambda: not out.exists(), first=85, can_exchange=False
    )
    with pytest.raises(InputError, match="--overwrite"):
        world.run("whole", out, resume=True)
    assert normal(out) == world.expected["half"]
    world.run("whole", out, resume=True, overwrite=True)
    assert normal(out) == world.expected["whole"]
    assert [path.name for path in root.iterdir()] == ["out"]


def test_a_removal_in_two_steps_that_was_killed_is_finished_by_the_next_run(tmp_path):
    world, root = the_world(), tmp_path / "place"
    out, replaced = root / "out", root / ".out.partial.replaced"
    kill_when(
        root,
        lambda: world.run("whole", out, overwrite=True),
        lambda: [path.name for path in replaced.rglob("*")] == [OWN, "lock"],
        first=95,
        can_exchange=False,
    )
    world.run("half", out, overwrite=True)
    assert [path.name for path in root.iterdir()] == ["out"]


def normal_without_marks(path: Path) -> dict[str, bytes]:
    return {name: data for name, data in normal(path).items() if not name.startswith(OWN)} if path.exists() else {}


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_file_of_somebody_else_in_the_work_folder_stays_and_is_named(tmp_path, when):
    world, partial = the_world(), tmp_path / ".out.partial"

    def put() -> None:
        (partial / "thesis.tex").write_text("x")

    killed(FaultyDisk(tmp_path, at=60, event="kill"), lambda: world.run("whole", tmp_path / "out"))
    if when == "before":
        put()
        with pytest.raises(InputError, match=r"thesis\.tex: is not abliterate's.*move it away"):
            world.run("whole", tmp_path / "out")
    else:
        disk = FaultyDisk(tmp_path, at=30, action=put)
        with (
            disk.in_use(),
            pytest.raises(CheckpointError, match=r"thesis\.tex: appeared while .*move it away.*--resume"),
        ):
            world.run("whole", tmp_path / "out")
    assert (partial / "thesis.tex").read_text() == "x"
    assert not (tmp_path / "out").exists()
    (partial / "thesis.tex").unlink()
    world.run("whole", tmp_path / "out", resume=True)
    assert normal(tmp_path / "out") == world.expected["whole"]


def test_a_target_that_changes_during_the_run_is_not_replaced(tmp_path):
    world, out = the_world(), tmp_path / "out"
    world.run("half", out)
    disk = FaultyDisk(tmp_path, at=30, action=lambda: (out / "thesis.tex").write_text("x") and None)
    with disk.in_use(), pytest.raises(CheckpointError, match="was changed while this run was going on"):
        world.run("whole", out, overwrite=True)
    assert (out / "thesis.tex").read_text() == "x"
    assert not (out / OWN).exists()


def test_an_interruption_after_the_rename_does_not_say_that_nothing_happened(tmp_path):
    world, out = the_world(), tmp_path / "out"
    for at in range(80, 200):
        disk = FaultyDisk(tmp_path, at=at, event="interrupt")
        with disk.in_use(), pytest.raises(InterruptedRunError) as raised:
            world.run("whole", out)
        if out.exists():
            break
    assert f"{out} is whole" in str(raised.value)
    assert normal(out) == world.expected["whole"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_writer_with_the_same_process_number_stands_in_nobodys_way(tmp_path):
    # In a container each run may have the number 1.
    out = tmp_path / "out"
    killed(FaultyDisk(tmp_path, at=10, event="kill"), lambda: the_world().run("restored", out))
    assert [path.name for path in tmp_path.iterdir()] == [".out.new"]
    the_world().run("restored", out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_writers_of_one_target_do_not_meet(tmp_path):
    out = tmp_path / "out"
    with published_directory(out, overwrite=False) as partial:
        (partial / "config.json").write_text("{}")
        with pytest.raises(InputError, match="another run is writing it"), published_directory(out, overwrite=False):
            pass
    assert json.loads((out / "config.json").read_text()) == {}
