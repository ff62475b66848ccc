"""Fixtures shared by all tests: no network but loopback, tiny chat models, and the demo model."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.paths import REPOSITORY

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ.pop("HF_TOKEN", None)

from abliterate.checkpoints.file_ranges import PlainFile
from abliterate.checkpoints.linux_file import LinuxFile
from abliterate.directions import make_direction
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.models.chat_model import ChatModel, make_chat_model
from tests.support.chat_models import make_tokenizer, tiny_gpt2, tiny_llama
from tests.support.loaded_models import content
from tests.support.tiny_models import random_direction, save_tiny_model


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
    directory = tmp_path / "tiny-llama"
    tiny_llama().save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def demo_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model; `make demo` leaves one in build/, which is taken when it is there."""
    built = REPOSITORY / "build" / "demo" / "model"
    if (built / "config.json").is_file():
        return built
    from abliterate.models.demo import build_demo_model

    directory = tmp_path_factory.mktemp("demo") / "model"
    build_demo_model(output=directory)
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
