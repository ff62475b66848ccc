import errno
import fcntl
import hashlib
import os
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import abliterate.checkpoints.file_ranges
import abliterate.checkpoints.linux_file
from abliterate.checkpoints.file_ranges import (
    AlignedMemory,
    PlainFile,
    can_share_blocks,
    hash_file,
    in_threads,
    open_file,
)
from abliterate.checkpoints.linux_file import LinuxFile
from abliterate.errors import CheckpointError

CONTENT = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def each_class(any_file):
    """Every test runs with both classes of files."""


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source").write_bytes(CONTENT)
    with open_file(tmp_path / "source") as file:
        yield file


def clone_range(descriptor: int, code: int, request: bytes) -> int:
    """As a file system does that shares blocks: whole ones alone, at block boundaries of both files."""
    assert code == abliterate.checkpoints.linux_file._FICLONERANGE
    other, start, count, offset = struct.unpack("=qQQQ", request)
    assert start % 4096 == count % 4096 == offset % 4096 == 0
    return os.pwrite(descriptor, os.pread(other, count, start), offset) * 0


@pytest.mark.parametrize(
    ("start", "offset", "count", "shared"),
    [(0, 0, 10_240, 8192), (1000, 5096, 9_000, 4096), (4096, 0, 4096, 4096), (1000, 5096, 5_000, 0), (1, 2, 9_000, 0)],
)
def test_a_range_is_shared_in_whole_blocks_and_its_ends_are_copied(
    source, tmp_path, monkeypatch, start, offset, count, shared
):
    monkeypatch.setattr(fcntl, "ioctl", clone_range)
    with open_file(tmp_path / "target", size=20_000) as target:
        if type(target) is PlainFile:
            assert not target.share(source, start=start, offset=offset, count=count)
            return
        assert target.share(source, start=start, offset=offset, count=count) == shared
    expected = CONTENT[start : start + count] if shared else bytes(count)
    assert (tmp_path / "target").read_bytes() == bytes(offset) + expected + bytes(20_000 - offset - count)


@pytest.mark.parametrize("error", [errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY])
def test_where_nothing_can_be_shared_nothing_is_written(source, tmp_path, monkeypatch, error):
    def refuse(*_arguments):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    with open_file(tmp_path / "target", size=10_240) as target:
        assert target.share(source, start=0, offset=0, count=10_240) == 0
    assert not any((tmp_path / "target").read_bytes())


def test_short_writes_are_continued(tmp_path, monkeypatch):
    monkeypatch.setattr(
        abliterate.checkpoints.file_ranges,
        "write_some",
        lambda descriptor, data, offset: os.pwrite(descriptor, data[:3], offset),
    )
    with open_file(tmp_path / "target", size=20) as target:
        target.write(memoryview(CONTENT[:10]), 5)
    assert (tmp_path / "target").read_bytes() == b"\0" * 5 + CONTENT[:10] + b"\0" * 5


@pytest.mark.parametrize(("answer", "message"), [(0, "nothing could be written"), (errno.ENOSPC, "No space left")])
def test_a_write_that_fails_names_the_file(tmp_path, monkeypatch, answer, message):
    def fail(*_arguments):
        if answer:
            raise OSError(answer, os.strerror(answer))
        return 0

    monkeypatch.setattr(abliterate.checkpoints.file_ranges, "write_some", fail)
    with open_file(tmp_path / "target", size=20) as target:
        with pytest.raises(OSError, match=message) as raised:
            target.write(memoryview(CONTENT[:10]), 0)
    assert raised.value.filename == str(tmp_path / "target")


def test_a_source_that_ends_too_early(source, tmp_path):
    os.truncate(tmp_path / "source", 50)
    with pytest.raises(CheckpointError, match="became shorter"):
        source.read_into(memoryview(bytearray(20)), 40)
    with pytest.raises(CheckpointError, match="became shorter"):
        source.read(0, 100, AlignedMemory())
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        source.check_unchanged()


def test_a_source_that_was_written_to_is_noticed(source, tmp_path):
    source.check_unchanged()
    (tmp_path / "source").write_bytes(CONTENT[::-1])
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        source.check_unchanged()


def test_a_source_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        open_file(tmp_path / "none")


def test_a_target_never_replaces_a_file(tmp_path: Path):
    (tmp_path / "target").write_bytes(b"x")
    with pytest.raises(FileExistsError):
        open_file(tmp_path / "target", size=3)
    assert (tmp_path / "target").read_bytes() == b"x"


def test_the_door_gives_what_the_system_is_served_best_by(source, any_file):
    assert type(source) is any_file
    assert any_file in (LinuxFile, PlainFile)


def test_whether_blocks_can_be_shared_is_tried_and_leaves_nothing(tmp_path, monkeypatch, any_file):
    monkeypatch.setattr(fcntl, "ioctl", lambda *_: 0)
    (tmp_path / "source").write_bytes(CONTENT)
    assert can_share_blocks(tmp_path / "source", tmp_path) is (any_file is LinuxFile)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_positions_of_several_threads_do_not_mix(source):
    def all_right(first: int) -> bool:
        memory = AlignedMemory()
        return all(source.read(at, 100, memory) == CONTENT[at : at + 100] for at in range(first, 10_000, 7))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(all_right, range(8)))


def test_a_file_is_hashed_with_progress(tmp_path):
    content = bytes(range(256)) * 4096
    (tmp_path / "a").write_bytes(content)
    seen = []
    assert hash_file(tmp_path / "a", advance=seen.append) == hashlib.sha256(content).hexdigest()
    assert sum(seen) == len(content)
    assert hash_file(tmp_path / "a") == hash_file(tmp_path / "a", advance=seen.append)


class TestInThreads:
    """Several threads do what one would, and it comes out in the same order."""

    def test_results_come_in_the_order_of_the_items_from_several_threads(self, monkeypatch):
        monkeypatch.setattr(abliterate.checkpoints.file_ranges, "n_cores", lambda: 2)
        both = threading.Barrier(2, timeout=60)

        def meet(item: int) -> int:
            both.wait()
            return -item

        assert list(in_threads(meet, range(6))) == [0, -1, -2, -3, -4, -5]

    def test_the_first_error_in_their_order_is_raised_and_what_has_not_begun_is_not_done(self, monkeypatch):
        monkeypatch.setattr(abliterate.checkpoints.file_ranges, "n_cores", lambda: 1)
        done = []

        def fail_at_two(item: int) -> int:
            done.append(item)
            if item == 2:
                raise CheckpointError("two")
            time.sleep(0.001)
            return item

        found = []
        with pytest.raises(CheckpointError, match="two"):
            found.extend(in_threads(fail_at_two, range(1000)))
        assert len(done) < 1000
