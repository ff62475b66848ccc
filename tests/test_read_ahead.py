import os
import threading

import pytest

import abliterate.read_ahead
from abliterate.read_ahead import read_ahead


def wait() -> None:
    for thread in threading.enumerate():
        if thread.name == "read-ahead":
            thread.join()


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system has no such request")
def test_the_first_files_are_asked_for_and_no_more_than_fits(tmp_path, monkeypatch):
    for name in ("b.safetensors", "a.safetensors", "c.safetensors", "config.json"):
        (tmp_path / name).write_bytes(b"x" * 100)
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 60, "SC_PAGE_SIZE": 10}.__getitem__)
    monkeypatch.setattr(abliterate.read_ahead, "_REQUEST_BYTES", 40)
    asked = []

    def note(descriptor, offset, length, advice):
        assert advice == os.POSIX_FADV_WILLNEED
        asked.append((os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")), offset))

    monkeypatch.setattr(os, "posix_fadvise", note)
    opened = len(os.listdir("/proc/self/fd"))
    read_ahead(tmp_path)
    wait()
    assert asked == [(f"{name}.safetensors", at) for name, at in (("a", 0), ("a", 40), ("a", 80), ("b", 0), ("b", 40))]
    assert len(os.listdir("/proc/self/fd")) == opened


def test_what_is_not_there_or_cannot_be_read_is_left_alone(tmp_path, monkeypatch):
    read_ahead(tmp_path / "missing")
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    read_ahead(tmp_path)
    wait()
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    read_ahead(tmp_path)
