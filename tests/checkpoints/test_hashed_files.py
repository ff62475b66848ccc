import hashlib

from abliterate.checkpoints.hashed_files import hash_file


def test_a_file_is_hashed_with_progress(tmp_path):
    content = bytes(range(256)) * 4096
    (tmp_path / "a").write_bytes(content)
    seen = []
    assert hash_file(tmp_path / "a", advance=seen.append) == hashlib.sha256(content).hexdigest()
    assert sum(seen) == len(content)
    assert hash_file(tmp_path / "a") == hash_file(tmp_path / "a", advance=seen.append)
