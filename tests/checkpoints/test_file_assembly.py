import hashlib
import os
import threading
import time

import pytest

import abliterate.checkpoints.file_assembly
from abliterate.checkpoints.file_assembly import GivenSegment, NewFile, assemble_files, copied_segments
from abliterate.checkpoints.file_ranges import open_file
from abliterate.errors import CheckpointError, VerificationError

CONTENT = os.urandom(10_000)


@pytest.fixture(autouse=True)
def each_class(any_file):
    """Every test runs with both classes of files."""


def new_file(tmp_path, name: str) -> NewFile:
    """A file of a given head and a copied tail."""
    if not (tmp_path / "source").exists():
        (tmp_path / "source").write_bytes(CONTENT)
    source = open_file(tmp_path / "source")
    head = GivenSegment(start=0, data=name.encode(), name="head")
    tail = copied_segments(source, start=100, end=9_900, offset=head.end)
    return NewFile(name=name, sources=(source,), segments=(head, *tail))


@pytest.fixture
def short_segments(monkeypatch):
    monkeypatch.setattr(abliterate.checkpoints.file_assembly, "_SEGMENT_BYTES", 700)
    monkeypatch.setattr(abliterate.checkpoints.file_assembly, "_COPY_BYTES", 64)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_files_come_out_whole_with_their_hash_whatever_the_number_of_threads(tmp_path, short_segments, workers):
    names = [f"file-{index}" for index in range(20)] + ["below/file"]
    (tmp_path / "out").mkdir()
    done, seen, before = {}, [], threading.enumerate()
    traffic = assemble_files(
        (new_file(tmp_path, name) for name in names),
        target=tmp_path / "out",
        workers=workers,
        done=done.__setitem__,
        advance=seen.append,
    )
    for name in names:
        expected = name.encode() + CONTENT[100:9_900]
        assert (tmp_path / "out" / name).read_bytes() == expected
        assert done[name].sha256 == hashlib.sha256(expected).hexdigest()
        assert done[name].bytes == len(expected)
    total = sum(len(name) + 9_800 for name in names)
    assert sum(seen) == total
    assert traffic.shared + traffic.written == total
    assert not [thread for thread in threading.enumerate() if thread not in before]


def test_an_empty_file(tmp_path):
    (tmp_path / "empty").touch()
    source = open_file(tmp_path / "empty")
    file = NewFile(name="copy", sources=(source,), segments=tuple(copied_segments(source, start=0, end=0, offset=0)))
    done = []
    assemble_files([file], target=tmp_path, workers=2, done=lambda *each: done.append(each), advance=lambda _: None)
    assert (tmp_path / "copy").read_bytes() == b""
    assert done[0][1].sha256 == hashlib.sha256().hexdigest()


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_of_one_thread_stops_all_and_closes_the_files(tmp_path, workers):
    class Failing(GivenSegment):
        def settle(self, target, worker, *, hash_bytes):
            raise VerificationError("wrong")

    opened, before = len(os.listdir("/proc/self/fd")), threading.enumerate()

    def files():
        yield NewFile(name="bad", sources=(), segments=(Failing(start=0, data=b"x", name="bad"),))
        yield new_file(tmp_path, "good")

    with pytest.raises(VerificationError, match="wrong"):
        assemble_files(files(), target=tmp_path, workers=workers, done=lambda *_: None, advance=lambda _: None)
    assert len(os.listdir("/proc/self/fd")) == opened
    assert not [thread for thread in threading.enumerate() if thread not in before]


def test_a_source_that_changes_meanwhile_is_an_error(tmp_path):
    file = new_file(tmp_path, "copy")

    class Meddling(GivenSegment):
        def settle(self, target, worker, *, hash_bytes):
            super().settle(target, worker, hash_bytes=hash_bytes)
            with (tmp_path / "source").open("ab") as source:
                source.write(b"!")

    head = Meddling(start=0, data=b"copy", name="head")
    meddled = NewFile(name="copy", sources=file.sources, segments=(head, *file.segments[1:]))
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        assemble_files([meddled], target=tmp_path, workers=1, done=lambda *_: None, advance=lambda _: None)


def test_a_disk_that_fails_when_all_is_written_stops_the_work(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    done, before = [], threading.enumerate()
    descriptors = len(os.listdir("/proc/self/fd"))

    def fail(_descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"Input/output error: .*file-\d"):
        assemble_files(
            (new_file(tmp_path, f"file-{index}") for index in range(20)),
            target=tmp_path / "out",
            workers=2,
            done=lambda name, _written: done.append(name),
            advance=lambda _bytes: None,
        )
    assert not done
    assert not [thread for thread in threading.enumerate() if thread not in before]
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_few_files_wait_for_a_slow_disk_at_a_time(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    opened, closed, most = 0, 0, []
    fsync = os.fsync

    def made(index: int) -> NewFile:
        nonlocal opened
        opened += 1
        most.append(opened - closed)
        return new_file(tmp_path, f"file-{index}")

    def slow(descriptor):
        time.sleep(0.01)
        fsync(descriptor)

    def finished(_file, _written):
        nonlocal closed
        closed += 1

    monkeypatch.setattr(os, "fsync", slow)
    assemble_files(map(made, range(30)), target=tmp_path / "out", workers=2, done=finished, advance=lambda _bytes: None)
    assert closed == 30
    assert max(most) <= abliterate.checkpoints.file_assembly._MOST_OPEN
