"""Broken at random, every format that comes from elsewhere is read or refused.

benchmarks/fuzz_formats.py does it for long. The seeds named here were once faults.
"""

from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.format_fuzzing import FORMATS, make_formats, try_format

_numbers = iter(range(10**9))
# As `python -m benchmarks.fuzz_formats --seed N --tries 1` chooses the format.
FAULTS = [
    *(100148, 102204, 102815, 200203, 200748, 200813, 201125, 202187, 300230, 301439, 301545, 301939, 302249),
    *(302324, 400267, 15021, 1001608, 1004298, 1014213, 1014656, 1019212, 2010458),
]
FAULTS_OF = {
    "prompts": [11, 82],
    "cache": [134, 252, 350, 362, 367, 374],
    "adapter": [11, 20, 22, 23, 54, 58, 101],
    "gguf": [59, 71, 77, 1113],
    "tokenizer": [27, 58, 76, 84, 101, 104, 109, 130, 133, 140, 1152],
    "config": [1, 11, 42, 52, 75, 94, 99, 115, 142, 151, 190, 197, 219, 227, 270],
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[str, Path]:
    return make_formats(tmp_path_factory.mktemp("sound") / "formats")


@pytest.fixture
def work(tmp_path_factory):
    return lambda: tmp_path_factory.getbasetemp() / f"fuzzed-format-{next(_numbers)}"


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_a_broken_file_is_read_or_refused(sound, work, name, seed):
    assert try_format(name, sound[name], work(), Random(seed))


@pytest.mark.parametrize("seed", FAULTS)
def test_what_was_a_fault(sound, work, seed):
    random = Random(seed)
    name = random.choice(list(FORMATS))
    assert try_format(name, sound[name], work(), random)


@pytest.mark.parametrize(("name", "seed"), [(name, seed) for name, seeds in FAULTS_OF.items() for seed in seeds])
def test_what_was_a_fault_of_one_format(sound, work, name, seed):
    random = Random(seed)
    random.choice([name])  # the fuzzer's own choice among one
    assert try_format(name, sound[name], work(), random)
