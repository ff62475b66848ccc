"""A system that is not Linux: no fcntl, no names of `os` that only some systems have, and the same bytes."""

import os
import subprocess
import sys

from abliterate.release.reverting import revert_checkpoint
from tests.support.loaded_models import content, tree
from tests.support.paths import REPOSITORY

# Taken away when torch, which has its own ways to find out where it is, has been imported.
POOR = """
import os, sys, types
import sysconfig, zoneinfo
import torch, transformers, safetensors.torch

sysconfig.get_config_vars()
sys.modules["fcntl"] = None
locked = []
sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=lambda *arguments: locked.append(arguments))
for name in (
    "O_CLOEXEC", "O_NONBLOCK", "O_DIRECT", "O_DIRECTORY", "pread", "preadv", "pwrite", "pwritev", "posix_fadvise",
    "POSIX_FADV_RANDOM", "sched_getaffinity",
):
    delattr(os, name)
from abliterate.cli import app
sys.platform = "win32"
try:
    app.main()
finally:
    assert "abliterate.checkpoints.linux_file" not in sys.modules
    # What is replaced is locked, too.
    assert "orthogonalize" not in sys.argv or len(locked) == 1 + ("--overwrite" in sys.argv)
"""


def run(*arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-c", POOR, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": "src"},
        cwd=REPOSITORY,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_orthogonalize_and_revert_give_the_same_bytes(sharded, direction_file, undisturbed, tmp_path):
    edited, restored, expected = tmp_path / "edited", tmp_path / "restored", tmp_path / "expected"
    run("orthogonalize", sharded, "--direction", direction_file, "-o", edited)
    assert content(edited) == undisturbed
    run("orthogonalize", sharded, "--direction", direction_file, "-o", edited, "--overwrite")
    assert content(edited) == undisturbed
    run("revert", edited, "--base", sharded, "-o", restored)
    revert_checkpoint(checkpoint=edited, base=sharded, output=expected)
    assert tree(restored) == tree(expected)
    assert {path.name for path in tmp_path.iterdir()} == {"edited", "restored", "expected"}
