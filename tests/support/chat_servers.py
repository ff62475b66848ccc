"""Servers of chats: a scripted one of ours, and two real ones, `transformers serve` and llama.cpp's.

The scripted one answers what a function says, or fails as asked; the real ones run in processes of their own and end
with the test. A test that needs one of them is skipped, with the reason, where its packages are not installed.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

_SECONDS_TO_START = 240


@dataclass
class Scripted:
    """A server that answers what it is told to.

    Attributes:
        url: where it is.
        answer: makes the reply of the messages: a text, or a whole `choices[0]` as a dictionary.
        models: the names that it lists; None: it has no such path.
        model: what it answers as; None: what it was asked for.
        failures: what the next requests get instead of an answer: (status, body, headers), a function of the handler,
            or None: an answer.
        bodies: the requests so far.
        keys: the Authorization header of each.
        most_at_once: how many requests were under way at the same time at most.
        seconds: how long an answer takes.
    """

    url: str
    answer: Callable[[list[dict[str, str]]], Any] = lambda messages: f"Sure: {messages[-1]['content']}"
    models: Sequence[str] | None = ("tiny",)
    model: str | None = None
    failures: list[Any] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    most_at_once: int = 0
    seconds: float = 0.0
    _now: int = 0
    _lock: Any = field(default_factory=threading.Lock)


@contextmanager
def scripted_server(**script: Any) -> Iterator[Scripted]:
    """Run a scripted server until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def send(self, status: int, body: bytes | Any, headers: dict[str, str] | None = None) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            if told.models is None:
                return self.send(404, {"error": "no such path"})
            return self.send(200, {"object": "list", "data": [{"id": name, "owned_by": "us"} for name in told.models]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with told._lock:
                told.bodies.append(body)
                told.keys.append(self.headers.get("Authorization"))
                failure = told.failures.pop(0) if told.failures else None
                told._now += 1
                told.most_at_once = max(told.most_at_once, told._now)
            try:
                time.sleep(told.seconds)
                if callable(failure):
                    return failure(self)
                if failure is not None:
                    return self.send(*failure)
                said = told.answer(body["messages"])
                choice = said if isinstance(said, dict) else {"message": {"content": said}, "finish_reason": "stop"}
                return self.send(200, {"model": told.model or body["model"], "choices": [choice]})
            except (BrokenPipeError, ConnectionResetError):
                return None
            finally:
                with told._lock:
                    told._now -= 1

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    told = Scripted(url=f"http://127.0.0.1:{server.server_address[1]}/v1", **script)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield told
    finally:
        server.shutdown()
        server.server_close()


def _needs(*packages: str) -> None:
    for name in packages:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"the package {name} is not installed")


@contextmanager
def transformers_server(directory: Path) -> Iterator[str]:
    """Serve a checkpoint with `transformers serve`, in float32 on the CPU, and yield its URL."""
    _needs("fastapi", "uvicorn", "openai")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    main = "from transformers.cli.transformers import main; main()"
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    command = [sys.executable, "-c", main, "serve", str(directory), *options]
    with _running(command) as process:
        _wait(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}/v1"


_LLAMA_CPP = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.n_ctx, params.n_parallel = sys.argv[1], 0, 2048, 2
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
print("AT", server.listening_address, flush=True)
time.sleep(3600)
"""


@contextmanager
def llama_cpp_server(file: Path) -> Iterator[str]:
    """Serve a GGUF file with llama.cpp's own server, and yield its URL."""
    _needs("xllamacpp")
    with _running([sys.executable, "-c", _LLAMA_CPP, str(file)], stdout=subprocess.PIPE) as process:
        for line in process.stdout:
            if line.startswith("AT "):
                yield line.split()[1] + "/v1"
                return
        raise AssertionError("llama.cpp did not start")


@contextmanager
def _running(command: list[str], **streams: Any) -> Iterator[Any]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **streams}
    process = subprocess.Popen(command, env=environment, text=True, **quiet)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _wait(url: str, process: Any) -> None:
    for _ in range(_SECONDS_TO_START * 4):
        assert process.poll() is None, "the server ended before it had begun"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.25)
    raise AssertionError("the server did not start")
