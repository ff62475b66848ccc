import errno
import os
from pathlib import Path

import pytest

import abliterate.byte_ranges
from abliterate.byte_ranges import SourceFile, TargetFile
from abliterate.errors import CheckpointError

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source").write_bytes(CONTENT)
    with SourceFile(tmp_path / "source") as file:
        yield file


@pytest.mark.parametrize("error", [None, 0, errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_range_is_copied_whether_the_kernel_can_or_not(source, tmp_path, monkeypatch, error):
    if error == 0:
        monkeypatch.delattr(os, "copy_file_range")
    elif error is not None:

        def refuse(*_arguments):
            raise OSError(error, os.strerror(error))

        monkeypatch.setattr(os, "copy_file_range", refuse)
    with TargetFile(tmp_path / "target", size=100) as target:
        by_kernel = target.copy(source, start=1000, offset=10, count=80)
    assert by_kernel == (80 if error is None else 0)
    assert (tmp_path / "target").read_bytes() == b"\0" * 10 + CONTENT[1000:1080] + b"\0" * 10


def test_a_kernel_that_copies_a_little_at_a_time_and_then_nothing(source, tmp_path, monkeypatch):
    copy, left = os.copy_file_range, [7, 5, 0]

    def a_little(one, other, count, start, offset):
        allowed = left.pop(0)
        return copy(one, other, min(count, allowed), start, offset) if allowed else 0

    monkeypatch.setattr(os, "copy_file_range", a_little)
    with TargetFile(tmp_path / "target", size=100) as target:
        assert target.copy(source, start=3, offset=0, count=100) == 12
    assert (tmp_path / "target").read_bytes() == CONTENT[3:103]


def test_short_writes_are_continued(tmp_path, monkeypatch):
    monkeypatch.setattr(
        abliterate.byte_ranges, "write_some", lambda descriptor, data, offset: os.pwrite(descriptor, data[:3], offset)
    )
    with TargetFile(tmp_path / "target", size=20) as target:
        target.write(memoryview(CONTENT[:10]), 5)
    assert (tmp_path / "target").read_bytes() == b"\0" * 5 + CONTENT[:10] + b"\0" * 5


@pytest.mark.parametrize(("answer", "message"), [(0, "nothing could be written"), (errno.ENOSPC, "No space left")])
def test_a_write_that_fails_names_the_file(tmp_path, monkeypatch, answer, message):
    def fail(*_arguments):
        if answer:
            raise OSError(answer, os.strerror(answer))
        return 0

    monkeypatch.setattr(abliterate.byte_ranges, "write_some", fail)
    with TargetFile(tmp_path / "target", size=20) as target:
        with pytest.raises(OSError, match=message) as raised:
            target.write(memoryview(CONTENT[:10]), 0)
    assert raised.value.filename == str(tmp_path / "target")


def test_a_source_that_ends_too_early(source, tmp_path):
    os.truncate(tmp_path / "source", 50)
    with pytest.raises(CheckpointError, match="became shorter"):
        source.read_into(memoryview(bytearray(20)), 40)
    with TargetFile(tmp_path / "target", size=100) as target:
        with pytest.raises(CheckpointError, match="became shorter"):
            target.copy(source, start=0, offset=0, count=100)
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        source.check_unchanged()


def test_a_source_that_was_written_to_is_noticed(source, tmp_path):
    source.check_unchanged()
    (tmp_path / "source").write_bytes(CONTENT[::-1])
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        source.check_unchanged()


def test_a_source_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        SourceFile(tmp_path / "none")


def test_a_target_never_replaces_a_file(tmp_path: Path):
    (tmp_path / "target").write_bytes(b"x")
    with pytest.raises(FileExistsError):
        TargetFile(tmp_path / "target", size=3)
    assert (tmp_path / "target").read_bytes() == b"x"
