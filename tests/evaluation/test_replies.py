"""Replies that are kept on disk: found again, and a torn line costs one reply and nothing else."""

from pathlib import Path

import pytest

from abliterate.errors import InputError
from abliterate.evaluation.replies import ReplyCache


def test_a_torn_line_costs_one_reply(tmp_path: Path) -> None:
    cache = ReplyCache(tmp_path, {"model": "a"})
    cache.put([1, 2], [3])
    cache.put([4], [5, 6])
    whole = cache.path.read_bytes()
    for torn in (whole[:-9], whole[:-9] + b"\n"):
        cache.path.write_bytes(torn)
        again = ReplyCache(tmp_path, {"model": "a"})
        assert again.get([1, 2]) == [3]
        assert again.get([4]) is None
        again.put([4], [5, 6])
        assert again.path.read_bytes() == whole


def test_damage_elsewhere_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    cache = ReplyCache(tmp_path, {"model": "a"})
    cache.put([1, 2], [3])
    cache.put([4], [5, 6])
    cache.path.write_bytes(b'{"prompt": "abc", "rep\n' + cache.path.read_bytes())
    with pytest.raises(InputError, match=r"\.jsonl, line 1: is damaged .*; delete the file, and its replies"):
        ReplyCache(tmp_path, {"model": "a"})


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"--cache .*: cannot be used"):
        ReplyCache(tmp_path / "file", {"model": "a"})
