"""Files moved past the page cache hold the bytes that they would, and what cannot be moved so is moved otherwise."""

import errno
import fcntl
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import abliterate.checkpoints.file_ranges
from abliterate.checkpoints.file_ranges import BOUNDARY, AlignedMemory, address, round_up
from abliterate.checkpoints.linux_file import LinuxFile, is_cached, open_direct
from abliterate.errors import CheckpointError

SIZE = 300_000
CONTENT = os.urandom(SIZE)


def can_go_direct(path) -> bool:
    descriptor = open_direct(path, os.O_RDONLY)
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is not None


@pytest.fixture
def source(tmp_path):
    """A file of `CONTENT` that is on the disk and not in the page cache."""
    path = tmp_path / "source"
    path.write_bytes(CONTENT)
    forget(path)
    if not can_go_direct(path):
        pytest.skip("this file system has no direct I/O")
    return path


def forget(path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def direct_reads(monkeypatch) -> list[int]:
    """Return a list that each direct read adds its position to."""
    seen, preadv = [], os.preadv

    def spy(descriptor, buffers, offset, *flags):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            seen.append(offset)
        return preadv(descriptor, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", spy)
    return seen


@settings(deadline=None, max_examples=60)
@given(st.integers(0, SIZE - 1), st.integers(0, SIZE))
def test_any_range_is_read_as_it_is(tmp_path_factory, offset, count):
    path = tmp_path_factory.mktemp("read") / "source"
    path.write_bytes(CONTENT)
    forget(path)
    count = min(count, SIZE - offset)
    memory = AlignedMemory()
    with LinuxFile(path) as file:
        for _ in range(2):
            data = file.read(offset, count, memory)
            assert data == CONTENT[offset : offset + count]
            assert not data or (address(data) - offset) % BOUNDARY == 0


def test_much_is_read_past_the_page_cache_and_little_through_it(source, monkeypatch):
    seen = direct_reads(monkeypatch)
    with LinuxFile(source) as file:
        assert file.read(100, 200_000, AlignedMemory()) == CONTENT[100:200_100]
        assert seen == [0]
        assert file.read(100, 2_000, AlignedMemory()) == CONTENT[100:2_100]
        assert seen == [0]


def test_a_file_that_ends_too_early_is_named(source):
    with LinuxFile(source) as file:
        os.truncate(source, 150_000)
        with pytest.raises(CheckpointError, match="source: it became shorter"):
            file.read(100, 200_000, AlignedMemory())


def test_a_disk_that_cannot_be_read_is_named(source, monkeypatch):
    def fail(*_arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with LinuxFile(source) as file, pytest.raises(CheckpointError, match="source: cannot be read: Input/output error"):
        file.read(100, 200_000, AlignedMemory())


@pytest.mark.parametrize("way", ["short", "unaligned", "refused"])
def test_direct_reads_that_give_less_or_nothing_are_completed(source, monkeypatch, way):
    preadv = os.preadv
    with LinuxFile(source) as file:

        def less(descriptor, buffers, offset):
            if descriptor != file._direct:
                return preadv(descriptor, buffers, offset)
            if way == "refused":
                raise OSError(errno.EINVAL, "Invalid argument")
            if way == "short":
                return preadv(descriptor, [buffers[0][: 3 * BOUNDARY]], offset)
            return preadv(file.descriptor, [buffers[0][: BOUNDARY + 7]], offset)

        monkeypatch.setattr(os, "preadv", less)
        assert file.read(100, 200_000, AlignedMemory()) == CONTENT[100:200_100]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(0, SIZE), st.integers(0, 9000)), max_size=5))
def test_any_ranges_are_written_as_they_are(tmp_path_factory, ranges):
    path = tmp_path_factory.mktemp("write") / "target"
    expected = bytearray(SIZE)
    memory = AlignedMemory()
    with LinuxFile(path, size=SIZE) as file:
        for offset, count, shift in ranges:
            # One in two lies in memory as the disk wants it.
            shift = offset if shift % 2 else shift
            content = CONTENT[: min(count, SIZE - offset)]
            lead = shift % BOUNDARY
            data = memory.take(lead + len(content))[lead:]
            data[:] = content
            file.write(data, offset)
            expected[offset : offset + len(content)] = content
            assert file.read(0, SIZE, AlignedMemory()) == expected
        file.sync()
    assert path.read_bytes() == expected


@pytest.mark.parametrize("most", [3, 5000, BOUNDARY, 100_000])
def test_short_direct_writes_are_continued(tmp_path, source, monkeypatch, most):
    monkeypatch.setattr(
        abliterate.checkpoints.file_ranges,
        "write_some",
        lambda descriptor, data, offset: os.pwrite(descriptor, data[: most if len(data) < 99_000 else 98_304], offset),
    )
    data = AlignedMemory().take(200_100)[100:]
    data[:] = CONTENT[:200_000]
    with LinuxFile(tmp_path / "target", size=SIZE) as file:
        file.write(data, 100)
    assert (tmp_path / "target").read_bytes() == bytes(100) + CONTENT[:200_000] + bytes(SIZE - 200_100)


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOSPC])
def test_a_file_system_that_takes_no_direct_write_gets_another_and_a_full_disk_is_named(
    tmp_path, source, monkeypatch, error
):
    with LinuxFile(tmp_path / "target", size=SIZE) as file:

        def refuse(descriptor, data, offset):
            if descriptor == file._direct:
                raise OSError(error, os.strerror(error))
            return os.pwrite(descriptor, data, offset)

        monkeypatch.setattr(abliterate.checkpoints.file_ranges, "write_some", refuse)
        data = AlignedMemory().take(200_000)
        data[:] = CONTENT[:200_000]
        if error == errno.ENOSPC:
            with pytest.raises(OSError, match=r"No space left.*target"):
                file.write(data, 0)
            return
        file.write(data, 0)
        assert file.read(0, 200_000, AlignedMemory()) == CONTENT[:200_000]


def test_a_file_system_without_direct_io(tmp_path, monkeypatch):
    monkeypatch.setattr("abliterate.checkpoints.linux_file.open_direct", lambda _path, _flags: None)
    (tmp_path / "source").write_bytes(CONTENT)
    with LinuxFile(tmp_path / "source") as source, LinuxFile(tmp_path / "target", size=SIZE) as target:
        target.write(source.read(0, SIZE, AlignedMemory()), 0)
    assert (tmp_path / "target").read_bytes() == CONTENT


def test_files_are_closed(source, tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    with LinuxFile(source), LinuxFile(tmp_path / "target", size=SIZE):
        assert len(os.listdir("/proc/self/fd")) == before + 4
    assert len(os.listdir("/proc/self/fd")) == before


def test_memory_is_taken_once_and_begins_at_a_boundary():
    memory = AlignedMemory()
    one = memory.take(1 << 20)
    one[:3] = b"abc"
    assert memory.take(3) == b"abc"
    assert address(one) == address(memory.take(10))
    assert address(one) % BOUNDARY == 0
    assert address(memoryview(b"abc")) is None
    assert [round_up(value) for value in (0, 1, BOUNDARY, BOUNDARY + 1)] == [0, BOUNDARY, BOUNDARY, 2 * BOUNDARY]


def test_what_is_in_the_page_cache_is_told_where_the_kernel_tells(source):
    descriptor = os.open(source, os.O_RDONLY)
    try:
        before = is_cached(descriptor, 0, SIZE)
        os.pread(descriptor, SIZE, 0)
        after = is_cached(descriptor, 0, SIZE)
    finally:
        os.close(descriptor)
    assert not before or after
    assert is_cached(-1, 0, SIZE) is False
