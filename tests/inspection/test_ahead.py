"""What is asked for before it is needed: the right bytes, once."""

import os

import pytest

from abliterate.inspection import ahead
from abliterate.inspection.ahead import Ahead

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system has no such call")


@pytest.fixture
def asked(monkeypatch):
    """Which bytes of which file were asked for."""
    found: list[tuple[str, int, int]] = []

    def advise(descriptor, start, size, advice):
        assert advice == os.POSIX_FADV_WILLNEED
        found.append((os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")), start, start + size))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    return found


def test_a_range_is_asked_for_once_and_no_further_than_its_end(tmp_path, asked, monkeypatch):
    monkeypatch.setattr(ahead, "_AHEAD", 100)
    monkeypatch.setattr(ahead, "_AT_ONCE", 30)
    with (tmp_path / "f").open("wb") as file:
        made = Ahead(file.fileno(), 10, 150)
        made.ask(10)
        made.ask(12)
        made.ask(140)
    assert [each[1:] for each in asked] == [(10, 40), (40, 70), (70, 100), (100, 130), (130, 150)]


def test_a_system_without_the_call_is_asked_nothing(monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise")
    Ahead(0, 0, 10).ask(0)
