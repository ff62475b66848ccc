"""What is asked for before it is needed: the right bytes, once, and of regular files alone."""

import os

import pytest

from abliterate.inspection import ahead
from abliterate.inspection.ahead import Ahead, begin_reading

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


def test_the_first_bytes_of_both_models_are_asked_for_in_turn(tmp_path, asked, monkeypatch):
    monkeypatch.setattr(ahead, "_AHEAD", 40)
    for name, sizes in (("a", (50, 60)), ("b", (200,))):
        (tmp_path / name).mkdir()
        for number, size in enumerate(sizes):
            (tmp_path / name / f"{name}{number}.safetensors").write_bytes(bytes(size))
    (tmp_path / "a" / "other.bin").write_bytes(bytes(50))
    os.mkfifo(tmp_path / "b" / "a.safetensors")  # which nobody writes to, so opening it would wait
    (tmp_path / "b" / "b.safetensors").symlink_to(tmp_path / "nowhere")
    thread = begin_reading([tmp_path / "a", tmp_path / "b", tmp_path / "none"], most=300)
    assert thread is not None
    thread.join(10)
    assert not thread.is_alive()
    assert asked == [
        ("a0.safetensors", 0, 40), ("b0.safetensors", 0, 40), ("a0.safetensors", 40, 50),
        ("b0.safetensors", 40, 80), ("a1.safetensors", 0, 40), ("b0.safetensors", 80, 100), ("a1.safetensors", 40, 50),
    ]  # fmt: skip


def test_a_system_without_the_call_is_asked_nothing(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise")
    assert begin_reading([tmp_path]) is None
    Ahead(0, 0, 10).ask(0)
