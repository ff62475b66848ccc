"""A small Hub of our own on 127.0.0.1, which speaks the Hub's protocol to the real `huggingface_hub` client.

    with FakeHub() as hub:
        hub.add_repo("org/name", {"config.json": b"{}"})
        subprocess.run([...], env=hub.environment(tmp_path))     # a process of its own, or
        hub.use(monkeypatch, tmp_path)                           # this process, until the test ends

Tokens: `hf_test` may write to the namespaces `tester` and `org`, `hf_read` may only read; others are refused.
Large files (safetensors, bin, parquet, or over 10 MB) go through Git LFS, in parts if `part_size` is set.
"""

import base64
import fnmatch
import hashlib
import json
import re
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy
import yaml  # type: ignore[import-untyped]
from safetensors.numpy import save_file

WRITE_TOKEN = "hf_test"
READ_TOKEN = "hf_read"
USER = "tester"
NAMESPACES = {USER, "org"}
LARGE = (".safetensors", ".bin", ".parquet", ".gguf")


@dataclass
class Repo:
    """One repository: commits, and the names (branches, tags) that point to them."""

    repo_id: str
    repo_type: str = "model"
    private: bool = False
    gated: bool | str = False
    granted: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        """The files at `main`, by path."""
        return self.commits[self.refs["main"]]

    def commit(self, files: dict[str, bytes], *, message: str, ref: str = "main") -> str:
        """Make `ref` point to a new commit with exactly these files."""
        digest = hashlib.sha1(f"{self.repo_id}\n{message}\n{len(self.messages)}".encode())
        for path, data in sorted(files.items()):
            digest.update(path.encode() + b"\0" + data)
        self.refs[ref] = digest.hexdigest()
        self.commits[self.refs[ref]] = dict(files)
        self.messages.append(message)
        return self.refs[ref]


@dataclass
class Fault:
    """What the next requests whose "METHOD /path" matches `pattern` meet; without a status a cut connection."""

    pattern: str
    status: int | None
    times: int
    error_code: str | None
    message: str


class FakeHub:
    """The server. `requests` lists "METHOD /path" of all that came, `sent` the bytes of the answers to GET by path;
    `lfs` holds the objects by SHA-256, `collections` the models of each by its slug."""

    def __init__(self, *, part_size: int | None = None) -> None:
        self.part_size = part_size
        self.repos: dict[str, Repo] = {}
        self.collections: dict[str, list[str]] = {}
        self.lfs: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[str] = []
        self.sent: dict[str, int] = {}
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add_repo(
        self,
        repo_id: str,
        files: dict[str, bytes] | None = None,
        *,
        repo_type: str = "model",
        private: bool = False,
        gated: bool | str = False,
        revisions: dict[str, dict[str, bytes]] | None = None,
    ) -> Repo:
        """Add a repository; `revisions` are further branches or tags with their own files."""
        repo = Repo(repo_id, repo_type=repo_type, private=private, gated=gated)
        repo.commit(files or {}, message="initial commit")
        for name, contents in (revisions or {}).items():
            repo.commit(contents, message=f"revision {name}", ref=name)
        self.repos[repo_id] = repo
        return repo

    def fail_next(
        self,
        pattern: str,
        *,
        status: int | None = None,
        times: int = 1,
        error_code: str | None = None,
        message: str = "made to fail",
    ) -> None:
        """Fail the next `times` requests whose "METHOD /path" the regular expression finds (-1: all of them).

        Without a status the connection is cut halfway through the request's body.
        """
        self.faults.append(Fault(pattern, status, times, error_code, message))

    def heal(self) -> None:
        """Forget all faults."""
        self.faults.clear()

    def count(self, pattern: str) -> int:
        """Return how many requests came whose "METHOD /path" the regular expression finds."""
        return sum(bool(re.search(pattern, request)) for request in self.requests)

    def environment(self, home: Path, *, token: str | None = WRITE_TOKEN) -> dict[str, str]:
        """Return the variables that send a new process here; add them to its environment."""
        variables = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home / "hf_home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        return variables | ({"HF_TOKEN": token} if token else {})

    def use(self, monkeypatch: Any, home: Path, *, token: str | None = WRITE_TOKEN) -> None:
        """Send this process here until `monkeypatch` ends; retries of the client wait no time."""
        from huggingface_hub import constants
        from huggingface_hub.utils import _http

        cache = home / "hf_home"
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE", "HF_HUB_CACHE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in self.environment(home, token=token).items():
            monkeypatch.setenv(name, value)
        # The library has read its variables at import; these are the constants it keeps them in.
        kept: dict[str, Any] = {
            "ENDPOINT": self.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HOME": str(cache),
            "HF_HUB_CACHE": str(cache / "hub"),
            "HF_TOKEN_PATH": str(cache / "token"),
            "HF_STORED_TOKENS_PATH": str(cache / "stored_tokens"),
            "AGENT_HARNESSES_PATH": str(cache / "agent_harnesses.json"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_OFFLINE": False,
        }
        for name, value in kept.items():
            monkeypatch.setattr(constants, name, value)
        if "datasets" in sys.modules:
            from datasets import config

            monkeypatch.setattr(config, "HF_ENDPOINT", self.endpoint)
            monkeypatch.setattr(
                config, "HUB_DATASETS_URL", f"{self.endpoint}/datasets/{{repo_id}}/resolve/{{revision}}/{{path}}"
            )
            monkeypatch.setattr(config, "HF_DATASETS_CACHE", cache / "datasets")
        clock = SimpleNamespace(**{**vars(time), "sleep": lambda _seconds: None})
        monkeypatch.setattr(_http, "time", clock)

    def take_fault(self, request: str) -> Fault | None:
        """Return the fault this request meets, if any, and count it."""
        with self.lock:
            for fault in self.faults:
                if fault.times != 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None


def write_checkpoint(
    directory: Path, *, base: str = "org/base", revision: str | None = "c" * 40, card: str | None = None
) -> Path:
    """Write what `abliterate orthogonalize` would: two tiny shards, side files and their record."""
    directory.mkdir(parents=True)
    generator = numpy.random.default_rng(0)
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    names = ["model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight"]
    left: dict[str, float] = {}
    for axis, shard, name in zip((1, 0), shards, names, strict=True):
        weight = generator.standard_normal((64, 64)).astype("float32")
        # The direction is the first basis vector; this is its projection, and some rounding.
        along = (slice(None), 0) if axis else 0
        weight[along] = 0
        weight[along] = 1.5e-8 / 8 * numpy.linalg.norm(weight)
        wide = weight.astype("float64")
        left[name] = float(numpy.linalg.norm(wide[along]) / numpy.linalg.norm(wide))
        save_file({name: weight}, directory / shard)
    side_files = {
        "model.safetensors.index.json": json.dumps({"weight_map": dict(zip(names, shards, strict=True))}),
        "config.json": '{"model_type": "llama"}\n',
        "tokenizer.json": "{}\n",
        "LICENSE": "the licence\n",
        "README.md": card if card is not None else "---\nlicense: apache-2.0\n---\n# The base model's card\n",
    }
    for name, text in side_files.items():
        (directory / name).write_text(text)

    def entry(name: str) -> dict[str, Any]:
        data = (directory / name).read_bytes()
        return {"sha256": _sha256(data), "bytes": len(data)}

    record = {
        "format_version": 2,
        "tool": {"name": "abliterate", "version": "0.1.0", "torch": "2.13.0", "safetensors": "0.6.2"},
        "created": "2026-01-02T03:04:05+00:00",
        "base": {
            "model": base,
            "revision": revision,
            "model_type": "llama",
            "config_file_sha256": "a" * 64,
            "tied_embeddings": False,
        },
        "directions": [
            {
                "sha256": "d" * 64,
                "d_model": 64,
                "metadata": {
                    "position": -1,
                    "layer": 20,
                    "bypass": -6.25,
                    "induce": 3.5,
                    "kl": 0.0625,
                    "seed": 42,
                    "thresholds": {"kl": 0.1, "induce": 0.0, "prune_layers": 0.2},
                    "filtered": True,
                    "system_prompt": None,
                },
            }
        ],
        "subspace": {
            "k": 1,
            "d_model": 64,
            "dtype": "float64",
            "base64": base64.b64encode(numpy.eye(1, 64).tobytes()).decode(),
        },
        "options": {"components": ["embed", "attn", "mlp"], "layers": None, "strength": 1.0},
        "tensors": [
            {
                "name": name,
                "role": role,
                "layer": None if role == "embed" else 0,
                "residual_axis": 1 if role == "embed" else 0,
                "shape": [64, 64],
                "dtype": "F32",
                "shard": shard,
                "norm_chain": [],
                "kind": "projected",
                "component_before": 0.125,
                "component_after": left[name],
                "survivor": 1.2e-7,
            }
            for name, role, shard in zip(names, ["embed", "attn"], shards, strict=True)
        ],
        "shards": {name: entry(name) for name in shards},
        "side_files": {name: entry(name) for name in side_files},
    }
    (directory / "abliteration.json").write_text(json.dumps(record, indent=2))
    return directory


def evaluation_report(**changes: Any) -> dict[str, Any]:
    """Return what `abliterate evaluate` would write, with some keys changed."""

    def rate(n: int, refused: int, low: float, high: float) -> dict[str, Any]:
        return {"n": n, "refused": refused, "degenerate": 1, "rate": refused / n, "low": low, "high": high}

    return {
        "model": "OUT",
        "base": "org/base",
        "intervention": "none",
        "max_new_tokens": 64,
        "scorer": "12 refusal substrings (arXiv 2406.11717)",
        "rates": {
            "harmful": rate(128, 4, 0.0122, 0.0776),
            "harmless": rate(128, 0, 0.0, 0.0291),
            "borderline": rate(100, 1, 0.0018, 0.0545),
        },
        "base_rates": {
            "harmful": rate(128, 124, 0.9224, 0.9878),
            "harmless": rate(128, 2, 0.0043, 0.0553),
            "borderline": rate(100, 9, 0.0481, 0.1623),
        },
        "kl_harmless": 0.0312,
        "cross_entropy": {"base": 0.512, "model": 0.533, "relative_change": 0.041},
        "prompt_sets": {"harmful": {"name": "bundled", "n": 128, "sha256": "b" * 64}},
        "versions": {"torch": "2.13.0"},
        **changes,
    }


class _RefusedError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


_API = re.compile(
    r"^/api/(?P<kind>model|dataset|space)s/(?P<repo>[^/]+(?:/[^/]+)?)"
    r"(?:/(?P<verb>revision|tree|preupload|commit|paths-info)/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?$"
)
_SETTINGS = re.compile(r"^/api/models/(?P<repo>[^/]+/[^/]+)/settings$")
_COLLECTION = re.compile(r"^/api/collections/(?P<slug>[^/]+/[^/]+)(?P<items>/items)?$")
_RESOLVE = re.compile(r"^/(?P<kind>datasets/)?(?P<repo>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)$")
_BATCH = re.compile(r"^/(?:datasets/)?(?P<repo>.+)\.git/info/lfs/objects/batch$")


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for an acknowledgement

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    # ------------------------------------------------------------------ request and answer

    def _serve(self) -> None:
        self.url_path = urlsplit(self.path).path
        request = f"{self.command} {self.url_path}"
        self.hub.requests.append(request)
        fault = self.hub.take_fault(request)
        if fault is not None and fault.status is None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        body = self._read_body()
        try:
            if fault is not None and fault.status is not None:
                raise _RefusedError(fault.status, fault.message, fault.error_code)
            self._route(body)
        except _RefusedError as refused:
            headers = {"X-Error-Message": refused.message}
            if refused.code:
                headers["X-Error-Code"] = refused.code
            self._send(refused.status, json.dumps({"error": refused.message}).encode(), headers)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        if self.command == "GET":
            with self.hub.lock:
                self.hub.sent[self.url_path] = self.hub.sent.get(self.url_path, 0) + len(data)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode())

    # ------------------------------------------------------------------ who may do what

    def _token(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        if token not in {None, WRITE_TOKEN, READ_TOKEN}:
            raise _RefusedError(401, "Invalid credentials in Authorization header")
        return token

    def _repo(self, repo_id: str, kind: str, *, write: bool = False) -> Repo:
        token = self._token()
        repo = self.hub.repos.get(repo_id)
        if repo is None or repo.repo_type != kind or (repo.private and token is None):
            raise _RefusedError(404 if token else 401, "Repository not found", "RepoNotFound")
        if write and (token != WRITE_TOKEN or repo_id.split("/")[0] not in NAMESPACES):
            raise _RefusedError(403, "You don't have the rights to write to this repository")
        return repo

    def _commit_of(self, repo: Repo, revision: str) -> str:
        revision = unquote(revision)
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            raise _RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # ------------------------------------------------------------------ routes

    def _route(self, body: bytes) -> None:
        path = self.url_path
        if path == "/api/whoami-v2":
            if self._token() is None:
                raise _RefusedError(401, "Invalid username or password.")
            self._json({"type": "user", "name": USER, "orgs": [{"name": "org"}]})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._validate_yaml(json.loads(body)["content"])
        elif match := _SETTINGS.match(path):
            self._settings(match["repo"], json.loads(body))
        elif match := _COLLECTION.match(path):
            self._collection(match["slug"], json.loads(body) if match["items"] else None)
        elif match := _BATCH.match(path):
            self._lfs_batch(match["repo"], json.loads(body))
        elif path.startswith("/lfs/"):
            self._lfs_object(path, body)
        elif match := _API.match(path):
            self._api(match, body)
        elif match := _RESOLVE.match(path):
            self._resolve(match)
        else:
            raise _RefusedError(404, f"no such route: {path}")

    def _create(self, payload: dict[str, Any]) -> None:
        namespace = payload.get("organization") or USER
        repo_id = f"{namespace}/{payload['name']}"
        if self._token() != WRITE_TOKEN or namespace not in NAMESPACES:
            raise _RefusedError(403, f"You don't have the rights to create a model under the namespace {namespace!r}")
        url = f"{self.hub.endpoint}/{repo_id}"
        if repo_id in self.hub.repos:
            self._json({"error": "You already created this model repo", "url": url}, status=409)
            return
        kind = payload.get("type", "model")
        self.hub.add_repo(
            repo_id,
            {".gitattributes": b"*.safetensors filter=lfs\n"},
            repo_type=kind,
            private=payload.get("visibility") == "private",
        )
        self._json({"url": url, "name": repo_id})

    def _settings(self, repo_id: str, payload: dict[str, Any]) -> None:
        repo = self._repo(repo_id, "model", write=True)
        if self.command != "PUT" or payload.keys() - {"gated"} or payload["gated"] not in ("auto", "manual", False):
            raise _RefusedError(400, f"{self.command} {payload}")
        repo.gated = payload["gated"]
        self._json({})

    def _collection(self, slug: str, added: dict[str, Any] | None) -> None:
        token = self._token()
        if slug not in self.hub.collections:
            raise _RefusedError(404, "Collection not found")
        items = self.hub.collections[slug]
        if added is not None:
            if token != WRITE_TOKEN or slug.split("/")[0] not in NAMESPACES:
                raise _RefusedError(403, "You don't have the rights to change this collection")
            name = added["item"]["id"]
            if added["item"]["type"] != "model" or name not in self.hub.repos:
                raise _RefusedError(404, "no such model")
            if name in items:
                raise _RefusedError(409, "already there")
            items.append(name)
        listed = [{"_id": f"{n}", "id": item, "type": "model", "position": n} for n, item in enumerate(items)]
        about = {"title": slug, "owner": {"name": slug.split("/")[0]}, "position": 0, "private": False, "theme": "blue"}
        dated = {"lastUpdated": "2026-01-02T03:04:05.000Z", "upvotes": 0}
        self._json({"slug": slug, "items": listed, **about, **dated})

    def _validate_yaml(self, content: str) -> None:
        errors = []
        try:
            metadata = yaml.safe_load(content.split("---")[1]) if content.startswith("---\n") else {}
            if metadata.get("base_model_relation", "finetune") not in {
                "finetune",
                "adapter",
                "merge",
                "quantized",
            }:
                errors.append({"message": '"base_model_relation" is not one the Hub knows'})
        except yaml.YAMLError as error:
            errors.append({"message": str(error)})
        self._json({"errors": errors, "warnings": []}, status=400 if errors else 200)

    def _api(self, match: re.Match[str], body: bytes) -> None:
        verb = match["verb"]
        repo = self._repo(unquote(match["repo"]), match["kind"], write=verb in {"preupload", "commit"})
        commit = self._commit_of(repo, match["revision"] or "main")
        if verb in {None, "revision"}:
            self._json(self._info(repo, commit))
        elif verb == "tree":
            prefix = f"{unquote(match['path'])}/" if match["path"] else ""
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in {
                "true",
                "1",
            }
            self._json(_tree(repo.commits[commit], prefix, recursive=recursive))
        elif verb == "paths-info":
            wanted = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            entries = _tree(repo.commits[commit], "", recursive=True)
            self._json([entry for entry in entries if entry["path"] in wanted])
        elif verb == "preupload":
            self._preupload(repo, json.loads(body))
        else:
            self._commit(repo, unquote(match["revision"]), body)

    def _info(self, repo: Repo, commit: str) -> dict[str, Any]:
        files = repo.commits[commit]
        front_matter = re.match(rb"---\n(.*?)\n---", files.get("README.md", b""), flags=re.DOTALL)
        return {
            "_id": "0",
            "id": repo.repo_id,
            "modelId": repo.repo_id,
            "sha": commit,
            "private": repo.private,
            "gated": "manual" if repo.gated is True else repo.gated,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [{"rfilename": path} for path in sorted(files)],
            "cardData": yaml.safe_load(front_matter[1]) if front_matter else {},
        }

    def _preupload(self, repo: Repo, payload: dict[str, Any]) -> None:
        ignored = repo.files.get(".gitignore", b"").decode().split()
        answer = []
        for file in payload["files"]:
            path, held = file["path"], repo.files.get(file["path"])
            large = _is_large(path, file["size"])
            answer.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": any(fnmatch.fnmatch(path, pattern) for pattern in ignored),
                    "oid": None if held is None else _sha256(held) if large else _blob_id(held),
                }
            )
        self._json({"files": answer})

    def _lfs_batch(self, repo_id: str, payload: dict[str, Any]) -> None:
        self._repo(repo_id, "model", write=True)
        objects = []
        for item in payload["objects"]:
            oid, size = item["oid"], item["size"]
            entry: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.lfs:
                base = f"{self.hub.endpoint}/lfs"
                upload: dict[str, Any] = {"href": f"{base}/basic/{oid}"}
                if self.hub.part_size is not None and size > self.hub.part_size:
                    count = -(-size // self.hub.part_size)
                    header = {str(n): f"{base}/part/{oid}/{n}" for n in range(1, count + 1)}
                    upload = {
                        "href": f"{base}/complete/{oid}",
                        "header": {"chunk_size": str(self.hub.part_size), **header},
                    }
                entry["actions"] = {"upload": upload, "verify": {"href": f"{base}/verify/{oid}"}}
            objects.append(entry)
        transfer = "basic" if self.hub.part_size is None else "multipart"
        self._json({"transfer": transfer, "objects": objects})

    def _lfs_object(self, path: str, body: bytes) -> None:
        _, _, action, oid, *rest = path.split("/")
        if action == "part":
            self.hub.parts.setdefault(oid, {})[int(rest[0])] = body
            self._send(200, b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})
            return
        if action == "verify":
            if len(self.hub.lfs.get(oid, b"")) != json.loads(body)["size"]:
                raise _RefusedError(404, "object not found")
        else:
            parts = self.hub.parts.get(oid, {})
            data = body if action == "basic" else b"".join(parts[n] for n in sorted(parts))
            if _sha256(data) != oid:
                raise _RefusedError(400, "content does not match its sha256")
            self.hub.lfs[oid] = data
        self._json({})

    def _commit(self, repo: Repo, ref: str, body: bytes) -> None:
        files, message = dict(repo.commits[self._commit_of(repo, ref)]), ""
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    raise _RefusedError(400, f"LFS object {value['oid']} has not been uploaded")
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise _RefusedError(400, f"unknown operation {item['key']}")
        commit = repo.commit(files, message=message, ref=ref)
        url = f"{self.hub.endpoint}/{repo.repo_id}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": url, "pullRequestUrl": None})

    def _resolve(self, match: re.Match[str]) -> None:
        repo = self._repo(unquote(match["repo"]), "dataset" if match["kind"] else "model")
        if repo.gated and not (repo.granted and self._token()):
            status = 403 if self._token() else 401
            raise _RefusedError(status, f"Access to model {repo.repo_id} is restricted.", "GatedRepo")
        commit = self._commit_of(repo, match["revision"])
        path = unquote(match["path"])
        if path not in repo.commits[commit]:
            raise _RefusedError(404, "Entry not found", "EntryNotFound")
        data = repo.commits[commit][path]
        etag = f'"{_sha256(data) if _is_large(path, len(data)) else _blob_id(data)}"'
        headers = {
            "Content-Type": "application/octet-stream",
            "Accept-Ranges": "bytes",
            "ETag": etag,
            "X-Linked-Etag": etag,
            "X-Linked-Size": str(len(data)),
            "X-Repo-Commit": commit,
        }
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            self._send(200, data, headers)
            return
        first, last = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
        if first > last:
            self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            return
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self._send(206, data[first : last + 1], headers)


def _tree(files: dict[str, bytes], prefix: str, *, recursive: bool) -> list[dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = {}
    for path, data in sorted(files.items()):
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts)):
            if depth == 1 or recursive:
                folder = prefix + "/".join(parts[:depth])
                entries[folder] = {
                    "type": "directory",
                    "oid": _sha1(folder.encode()),
                    "size": 0,
                    "path": folder,
                }
        if len(parts) == 1 or recursive:
            entry: dict[str, Any] = {"type": "file", "oid": _blob_id(data), "size": len(data), "path": path}
            if _is_large(path, len(data)):
                entry["lfs"] = {"oid": _sha256(data), "size": len(data), "pointerSize": 134}
            entries[path] = entry
    return list(entries.values())


def _is_large(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LARGE) or size > 10_000_000)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _blob_id(data: bytes) -> str:
    return _sha1(b"blob %d\0" % len(data) + data)
