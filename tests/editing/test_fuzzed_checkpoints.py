"""Broken at random, a checkpoint is edited or refused with a known error; nothing is written but the result.

benchmarks/fuzz_checkpoint.py does the same for minutes.
"""

import os
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from abliterate.editing.options import EditOptions
from tests.support import fuzzing
from tests.support.checkpoint_mutations import make_bases, make_quantized_bases
from tests.support.fuzzing import attempt, make_fuzz_direction, writes_elsewhere

_numbers = iter(range(10**9))


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> list[Path]:
    return make_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture
def try_one(bases, tmp_path_factory) -> Callable[[int, int], None]:
    def check(which: int, seed: int) -> None:
        work = tmp_path_factory.getbasetemp() / f"fuzzed-{next(_numbers)}"
        assert attempt(bases[which], work, Random(seed), make_fuzz_direction())

    return check


FUZZ = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=40, **FUZZ)
@given(which=st.integers(0, 5), seed=st.integers(0, 2**32))
def test_a_broken_checkpoint_is_edited_or_refused(try_one, which, seed):
    try_one(which, seed)


@pytest.fixture(scope="module")
def quantized_bases(tmp_path_factory) -> list[Path]:
    return make_quantized_bases(tmp_path_factory.mktemp("quantized"))


@settings(max_examples=40, **FUZZ)
@given(which=st.integers(0, 9), seed=st.integers(0, 2**32))
def test_a_broken_quantised_checkpoint_is_edited_or_refused(quantized_bases, tmp_path_factory, which, seed):
    work = tmp_path_factory.getbasetemp() / f"fuzzed-{next(_numbers)}"
    assert attempt(quantized_bases[which], work, Random(seed), make_fuzz_direction(), fuzzing.QUANTIZED_OPTIONS)


@pytest.mark.proof
@settings(max_examples=400, **FUZZ)
@given(which=st.integers(0, 5), seed=st.integers(0, 2**32))
def test_many_broken_checkpoints_are_edited_or_refused(try_one, which, seed):
    try_one(which, seed)


def test_a_sound_checkpoint_is_edited(bases, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzzing, "break_checkpoint", lambda *_: None)
    monkeypatch.setattr(fuzzing, "OPTIONS", (EditOptions(),))
    for number, base in enumerate(bases):
        assert attempt(base, tmp_path / f"{number}", Random(0), make_fuzz_direction()) == "edited"


def test_writes_outside_the_directory_for_results_are_found(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    with writes_elsewhere(results) as found:
        (results / "x").write_text("x")
        (results / "x").unlink()
        assert found == []
        (tmp_path / "y").write_text("y")
        os.rename(tmp_path / "y", results / "y")
        (results / ".." / "made").mkdir()
        (results / "link").symlink_to(tmp_path)
        (results / "link" / "z").write_text("z")
    assert [entry.split()[0] for entry in found] == ["open", "os.rename", "os.mkdir", "open"]
