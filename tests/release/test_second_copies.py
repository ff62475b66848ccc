"""Weights that lie in a directory a second time: not in an edited checkpoint, and back again in what is restored."""

import shutil
from pathlib import Path

import pytest

from abliterate.checkpoints.checkpoint import open_checkpoint
from abliterate.directions import make_direction
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.editing.plan_report import plan_layout, read_layout
from abliterate.editing.record import read_record
from abliterate.release.file_checks import compare_with_base
from abliterate.release.reverting import revert_checkpoint
from tests.support.loaded_models import tree
from tests.support.tiny_models import random_direction, save_tiny_llama

COPY = "consolidated.safetensors"


@pytest.fixture
def edited(tmp_path: Path) -> tuple[Path, Path]:
    base, out = save_tiny_llama(tmp_path / "base"), tmp_path / "out"
    shutil.copy(base / "model.safetensors", base / COPY)
    (base / "params.json").write_text("{}")
    report = orthogonalize_checkpoint(
        source=base, direction=make_direction(mean_difference=random_direction()), output=out
    )
    assert any(note.startswith(f"left out: {COPY}") for note in report.notes)
    return base, out


def test_they_are_left_out_and_said_to_be(edited):
    base, out = edited
    assert sorted(tree(out)) == sorted([*tree(base).keys() - {COPY}, "abliteration.json"])
    assert open_checkpoint(base).second_copies == (COPY,)
    layout = read_layout(model=str(base))
    assert any(note.startswith(f"left out: {COPY}") for note in plan_layout(layout).notes)
    assert layout.disk_bytes < 2 * (base / COPY).stat().st_size
    assert compare_with_base(read_record(out), base=open_checkpoint(base))[0] == ()


def test_one_that_is_put_back_fails_the_verification(edited):
    base, out = edited
    shutil.copy(base / COPY, out / COPY)
    problems, _ = compare_with_base(read_record(out), base=open_checkpoint(base))
    assert len(problems) == 1
    assert f"{COPY} holds weights again that are not those of this checkpoint" in problems[0]


def test_what_is_restored_has_them_again(edited, tmp_path):
    base, out = edited
    revert_checkpoint(checkpoint=out, output=tmp_path / "restored")
    assert tree(tmp_path / "restored") == tree(base)
