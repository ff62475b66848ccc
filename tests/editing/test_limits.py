"""Many tensors, many shards, few file descriptors, holes and long prompt files; benchmarks/limits.py goes further."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from abliterate.checkpoints.atomic_directory import published_directory
from abliterate.checkpoints.checkpoint import open_checkpoint
from abliterate.checkpoints.file_assembly import NewFile, assemble_files, copied_segments
from abliterate.checkpoints.file_ranges import PlainFile, hash_file, open_file
from abliterate.directions import make_direction
from abliterate.editing.options import EditOptions
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.editing.record import check_hashes, read_record
from abliterate.prompt_files import read_prompt_file
from tests.support.paths import REPOSITORY
from tests.support.sparse_checkpoints import make_sparse_checkpoint, moe_config
from tests.support.tiny_models import random_direction

# As `abliterate`, with a limit that is set before anything is imported.
LIMITED = """
import resource, sys
which, most = getattr(resource, sys.argv[1]), int(sys.argv[2])
resource.setrlimit(which, (most, resource.getrlimit(which)[1]))
sys.argv[1:] = sys.argv[3:]
from abliterate.cli.app import main
main()
"""


def orthogonalize(directory: Path, limit: str, most: int) -> subprocess.CompletedProcess[str]:
    """Edit `base` to `out` in a process that may have no more than `most` of something."""
    command = ["orthogonalize", directory / "base", "--direction", directory / "refusal.safetensors"]
    return subprocess.run(
        [sys.executable, "-c", LIMITED, limit, str(most), *map(str, command), "-o", str(directory / "out")],
        env=os.environ | {"PYTHONPATH": "src", "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )


def stored_bytes(path: Path) -> int:
    return sum(512 * file.stat().st_blocks for file in path.iterdir() if file.is_file())


@pytest.fixture
def has_holes(tmp_path: Path) -> None:
    path = tmp_path / "hole"
    with path.open("wb") as file:
        file.truncate(1 << 20)
    if path.stat().st_blocks or not hasattr(os, "SEEK_DATA"):
        pytest.skip("this file system keeps no holes")
    path.unlink()


def test_more_shards_than_files_may_be_open(tmp_path):
    config = moe_config(hidden=32, layers=3, experts=30, intermediate=16, heads=4, vocabulary=61)
    make_sparse_checkpoint(tmp_path / "base", config, shard_bytes=1)
    assert len(open_checkpoint(tmp_path / "base").shards) >= 300
    make_direction(mean_difference=random_direction(32)).save(tmp_path / "refusal.safetensors")
    done = orthogonalize(tmp_path, "RLIMIT_NOFILE", 64)
    assert done.returncode == 0, done.stderr
    check_hashes(read_record(tmp_path / "out"))
    assert len(open_checkpoint(tmp_path / "out").shards) == len(open_checkpoint(tmp_path / "base").shards)


def test_twenty_thousand_tensors(tmp_path):
    config = moe_config(hidden=16, layers=26, experts=256, intermediate=4, heads=2, vocabulary=61)
    make_sparse_checkpoint(tmp_path / "base", config, shard_bytes=500_000)
    report = orthogonalize_checkpoint(
        source=tmp_path / "base",
        direction=make_direction(mean_difference=random_direction(16)),
        output=tmp_path / "out",
        options=EditOptions(layers=(3, 5)),
    )
    assert len(list(open_checkpoint(tmp_path / "out").tensors())) > 20_000
    assert len(report.tensors) == 2 * 257


@pytest.mark.usefixtures("has_holes")
def test_a_sparse_checkpoint_larger_than_the_disk_is_planned_and_edited_in_part(tmp_path):
    config = moe_config(hidden=1024, layers=12, experts=8, intermediate=256, heads=8, vocabulary=16000)
    size = make_sparse_checkpoint(tmp_path / "base", config, shard_bytes=16 << 20)
    assert stored_bytes(tmp_path / "base") < 1 << 20 < 200 << 20 < size
    report = orthogonalize_checkpoint(
        source=tmp_path / "base",
        direction=make_direction(mean_difference=random_direction(1024)),
        output=tmp_path / "out",
        options=EditOptions(layers=(2, 4), components=("attn", "mlp")),
    )
    edited = sum(tensor.edit.nbytes for tensor in report.tensors)
    # What is edited is written; what is copied takes no more room than it did.
    assert edited <= stored_bytes(tmp_path / "out") < edited + (2 << 20)
    assert report.work.bytes_written < edited + (2 << 20)
    check_hashes(read_record(tmp_path / "out"))


@pytest.mark.usefixtures("any_file", "has_holes")
@pytest.mark.parametrize("size", [10 << 20, (40 << 20) + 5])
def test_a_copy_has_the_holes_and_the_bytes_of_its_source(tmp_path, size, any_file):
    source, out = tmp_path / "source", tmp_path / "out"
    with source.open("wb") as file:
        file.truncate(size)
        for at in (0, 5 << 20, size - 3):
            file.seek(at)
            file.write(b"abc")
    with published_directory(out, overwrite=False) as partial:
        original = open_file(source)
        segments = copied_segments(original, start=0, end=size, offset=0)
        written = {}
        assemble_files(
            [NewFile(name="copy", sources=(original,), segments=tuple(segments))],
            target=partial,
            workers=1,
            done=written.__setitem__,
            advance=lambda _: None,
        )
    assert (out / "copy").read_bytes() == source.read_bytes()
    assert written["copy"].sha256 == hash_file(source)
    if any_file is not PlainFile:
        assert stored_bytes(out) <= 13 << 20


def test_whether_a_range_is_a_hole(tmp_path, has_holes):
    path = tmp_path / "x"
    with path.open("wb") as file:
        file.truncate(3 << 20)
        file.seek(1 << 20)
        file.write(b"x")
    with open_file(path) as file:
        assert file.is_hole(0, 1 << 20)
        assert not file.is_hole(0, (1 << 20) + 1)
        assert file.is_hole(2 << 20, 1 << 20)
        assert not file.is_hole(2 << 20, (1 << 20) + 1)  # it ends before
    with PlainFile(path) as file:
        assert not file.is_hole(0, 1)


def test_sizes_that_a_process_may_not_write_are_one_line(tmp_path):
    config = moe_config(hidden=64, layers=2, experts=4, intermediate=16, heads=4, vocabulary=6000)
    make_sparse_checkpoint(tmp_path / "base", config, shard_bytes=1 << 20)
    make_direction(mean_difference=random_direction(64)).save(tmp_path / "refusal.safetensors")
    done = orthogonalize(tmp_path, "RLIMIT_FSIZE", 300_000)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "File too large" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv"])
def test_a_long_prompt_file_takes_memory_in_proportion(tmp_path, suffix):
    number = 50_000
    texts = [f"Prompt number {n:07d}: how is it that nobody ever asks for this?" for n in range(number)]
    path = tmp_path / f"prompts.{suffix}"
    lines = {"txt": texts, "jsonl": [f'{{"text": "{text}"}}' for text in texts], "csv": ["id,text"]}[suffix]
    lines += [f'{n},"{text}"' for n, text in enumerate(texts)] if suffix == "csv" else []
    path.write_text("\n".join(lines))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    prompts = read_prompt_file(path)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert prompts.texts == tuple(texts)
    assert grown < 40 * path.stat().st_size
