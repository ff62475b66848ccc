import hashlib

import pytest

from abliterate.hashed_files import copy_file, hash_file


def test_a_file_is_copied_with_its_hash(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    result = copy_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"abc"
    assert result.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert result.bytes == 3


def test_a_copy_never_overwrites(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    with pytest.raises(FileExistsError):
        copy_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "b"


def test_a_file_is_hashed_with_progress(tmp_path):
    content = bytes(range(256)) * 4096
    (tmp_path / "a").write_bytes(content)
    seen = []
    assert hash_file(tmp_path / "a", advance=seen.append) == hashlib.sha256(content).hexdigest()
    assert sum(seen) == len(content)
    assert hash_file(tmp_path / "a") == hash_file(tmp_path / "a", advance=seen.append)
