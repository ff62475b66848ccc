"""Fixtures shared by all tests: no network but loopback, tiny chat models, and the demo model."""

import hashlib
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock

# Threads that wait for one another over matrices of 32 columns take many times as long as one alone.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ.pop("HF_TOKEN", None)

import torch

from abliterate.checkpoints.file_ranges import PlainFile, hash_file
from abliterate.checkpoints.linux_file import LinuxFile
from abliterate.directions import make_direction
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.models.chat_model import ChatModel, make_chat_model
from tests.support.command_line import CommandLine
from tests.support.loaded_models import content
from tests.support.paths import REPOSITORY
from tests.support.tiny_models import (
    make_tokenizer,
    random_direction,
    save_chat_model,
    save_tiny_model,
    tiny_gpt2,
    tiny_llama,
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that no process waits for it in the end."""
    items.sort(key=lambda item: item.get_closest_marker("demo") is None)


@pytest.fixture(autouse=True, scope="session")
def loopback_only() -> Iterator[None]:
    """Refuse any connection that leaves this machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> Any:
        if isinstance(address, tuple) and address[0] not in {"127.0.0.1", "localhost", "::1"}:
            raise OSError(f"the tests run without network; refused {address}")
        return connect(self, address)

    socket.socket.connect = guarded  # type: ignore[method-assign]
    yield
    socket.socket.connect = connect  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def all_cores_for_the_demo(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let tests of the demo model, which is no tiny one, use every core that no other process tests on."""
    if request.node.get_closest_marker("demo") is None:
        yield
        return
    # Threads of two processes that share a core wait for one another most of the time.
    n_processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // n_processes))
    yield
    torch.set_num_threads(1)


@pytest.fixture
def call_main(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """Run `abliterate` with some arguments; return its exit code, stdout and stderr."""
    return CommandLine(capsys)


@pytest.fixture(params=["llama", "gpt2"])
def chat(request: pytest.FixtureRequest) -> ChatModel:
    """A tiny random chat model of each architecture whose edits are supported."""
    model = {"llama": tiny_llama, "gpt2": tiny_gpt2}[request.param]()
    return make_chat_model(model, make_tokenizer())


@pytest.fixture
def llama_chat() -> ChatModel:
    """A tiny random llama chat model."""
    return make_chat_model(tiny_llama(), make_tokenizer())


@pytest.fixture
def llama_directory(tmp_path: Path) -> Path:
    """A tiny random llama chat model on disk."""
    return save_chat_model(tmp_path / "tiny-llama", tiny_llama())


@pytest.fixture(scope="session")
def demo_directory() -> Path:
    """The demo model, built once for the code and the adapter that it is made of, and kept in build/."""
    from abliterate.models import demo

    made_of = [Path(demo.__file__), *sorted(demo.ADAPTER_DIRECTORY.glob("*.*"))]
    digest = hashlib.sha256("".join(hash_file(path) for path in made_of).encode()).hexdigest()
    directory = REPOSITORY / "build" / "tests" / f"demo-{digest[:16]}"
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Once for all processes that test side by side.
    with FileLock(f"{directory}.lock"):
        if not directory.exists():
            # Under its own name only when it is whole.
            demo.build_demo_model(output=directory)
    return directory


@pytest.fixture(scope="session")
def small_demo_directory() -> Path:
    """A small model that refuses the bundled harmful prompts, trained once for its code, and kept in build/."""
    from tests.support import small_demo

    digest = hash_file(Path(small_demo.__file__))[:16]
    directory = REPOSITORY / "build" / "tests" / f"small-demo-{digest}"
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}.lock"):
        if not directory.exists():
            partial = directory.with_name(f"{directory.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            small_demo.save_small_demo(partial).rename(directory)
    return directory


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama in bfloat16 and many shards, to be left as it is."""
    directory = tmp_path_factory.mktemp("base") / "llama"
    return save_tiny_model(directory, dtype=torch.bfloat16, max_shard_size="8KB")


@pytest.fixture(scope="session")
def direction_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random direction for `sharded`."""
    path = tmp_path_factory.mktemp("direction") / "refusal.safetensors"
    make_direction(mean_difference=random_direction()).save(path)
    return path


@pytest.fixture(scope="session")
def undisturbed(sharded: Path, direction_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes of `sharded` when nothing goes wrong, as `loaded_models.content` reads it."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    orthogonalize_checkpoint(source=sharded, direction=direction_file, output=out)
    return content(out)


@pytest.fixture(params=[LinuxFile, PlainFile], ids=["linux", "plain"])
def any_file(request, monkeypatch) -> type[PlainFile]:
    """The class of files that everything is read and written with: the system's own, then the portable one."""
    if request.param is PlainFile:
        system = SimpleNamespace(platform="plain")
        monkeypatch.setattr("abliterate.checkpoints.file_ranges.sys", system)
    return request.param
