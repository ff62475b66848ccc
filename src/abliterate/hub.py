"""The Hub: models come down, checkpoints go up. No other module talks to it.

Endpoint, cache, token and offline mode are those of `huggingface_hub` itself (`HF_ENDPOINT`, `HF_HOME`,
`HF_TOKEN` or `hf auth login`, `HF_HUB_OFFLINE`); nothing here overrides them, and no token is ever shown.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import yaml  # type: ignore[import-untyped]
from huggingface_hub import HfApi, constants, get_token, metadata_load, snapshot_download
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from abliterate.errors import AbliterateError, HubError, InputError

_TEXT_PATTERNS = ["*.json", "*.jsonl", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "*.md"]
_TEXT_PATTERNS += ["LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"]
# Second copies of the same weights in other layouts, which transformers does not read.
_IGNORED_PATTERNS = ["*/*.safetensors", "consolidated*.safetensors"]

_LOG_IN = "run `hf auth login` or set HF_TOKEN"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where a model's files lie.

    Attributes:
        path: The directory that holds them.
        name: The Hub id, or the directory as it was given.
        revision: The commit the Hub id resolved to; None for a local directory.
    """

    path: Path
    name: str
    revision: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """What a base model's card says that a model made from it must repeat; None where it says nothing."""

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    base_model: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """One file as the Hub holds it; `sha256` is known for files in large file storage only."""

    bytes: int
    sha256: str | None


def resolve_model(model: str, *, revision: str | None = None, weights: bool = True) -> ModelSource:
    """Find a model's files: a local directory as it is, a Hub id downloaded into the Hub cache.

    Args:
        model: A directory that holds `config.json`, or a Hub id. An existing directory wins.
        revision: Branch, tag or commit of a Hub id.
        weights: Whether the safetensors files are needed too.

    Raises:
        InputError: `model` looks like a path and is not there, or is no model directory.
        HubError: The Hub does not have it, does not give it, or cannot be reached.
    """
    local = Path(model).expanduser()
    if model.strip() and local.is_dir():
        if revision is not None:
            raise InputError(f"--revision {revision}: {model} is a local directory; only Hub models have revisions")
        if not (local / constants.CONFIG_NAME).is_file():
            raise InputError(
                f"{model}: no config.json in this directory; give a transformers model directory, or a Hub id"
            )
        return ModelSource(path=local, name=model, revision=None)
    if local.is_file():
        raise InputError(f"{model}: this is a file; give the directory that holds config.json, or a Hub id")
    if _looks_like_a_path(model):
        raise InputError(f"{model}: no such directory; check the path (a Hub id has the form OWNER/NAME)")
    return _download(model, revision=revision, weights=weights)


def _looks_like_a_path(model: str) -> bool:
    return not model.strip() or model[0] in "./~" or model.endswith("/") or model.count("/") > 1 or "\\" in model


def _download(model: str, *, revision: str | None, weights: bool) -> ModelSource:
    patterns = [*_TEXT_PATTERNS, "*.safetensors"] if weights else _TEXT_PATTERNS
    with _hub_errors(model, revision=revision):
        snapshot = Path(
            snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=_IGNORED_PATTERNS)
        )
    if not (snapshot / constants.CONFIG_NAME).is_file():
        raise HubError(f"{model}: the repository has no config.json; give a model in the transformers layout")
    if weights and not any(snapshot.glob("*.safetensors")):
        raise HubError(f"{model}: the repository has no safetensors weights; give a revision or a copy that has them")
    return ModelSource(path=snapshot, name=model, revision=snapshot.name)


def check_repo_id(repo_id: str) -> None:
    """Raise `InputError` unless `repo_id` is a valid `NAME` or `OWNER/NAME`."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise _invalid_repo_id(repo_id) from error


def whoami() -> str:
    """Return the user name of the login in effect; `HubError` when there is none or the Hub refuses it."""
    if get_token() is None:
        raise HubError(f"no Hub token found; {_LOG_IN}, with a token that may write")
    with _hub_errors("the login", writing=True):
        return str(HfApi().whoami()["name"])


def repo_is_private(repo_id: str) -> bool | None:
    """Return whether a model repository is private; None when there is none that this login can see."""
    try:
        with _hub_errors(repo_id, writing=True):
            return bool(HfApi().model_info(repo_id).private)
    except HubError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError) and not isinstance(error.__cause__, GatedRepoError):
            return None
        raise


def create_repo(repo_id: str, *, private: bool) -> None:
    """Create a model repository; one that exists is left as it is, its visibility too."""
    with _hub_errors(repo_id, writing=True):
        HfApi().create_repo(repo_id, private=private, exist_ok=True)


def upload_folder(repo_id: str, folder: Path, *, commit_message: str, quiet: bool = False) -> str:
    """Upload a folder by `huggingface_hub`'s own means, which delete nothing and resume when repeated.

    Returns:
        The commit that holds the upload.
    """
    with _hub_errors(repo_id, writing=True), _progress_bars(hidden=quiet):
        commit = HfApi().upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
    return str(commit.oid)


def list_remote_files(repo_id: str, *, revision: str) -> dict[str, RemoteFile]:
    """List every file of a model repository at a commit, by path."""
    with _hub_errors(repo_id, revision=revision):
        entries = list(HfApi().list_repo_tree(repo_id, recursive=True, revision=revision))
    return {
        entry.path: RemoteFile(bytes=entry.size, sha256=entry.lfs.sha256 if entry.lfs else None)
        for entry in entries
        if isinstance(entry, RepoFile)
    }


def repo_url(repo_id: str) -> str:
    """Return the address of a model's page under the endpoint in effect."""
    return f"{constants.ENDPOINT}/{repo_id}"


def read_card_facts(card: Path) -> CardFacts | None:
    """Read the front matter of a local model card; None when there is no card or no readable front matter."""
    if not card.is_file():
        return None
    try:
        metadata = metadata_load(card)
    except (ValueError, yaml.YAMLError):
        return None
    return _card_facts(metadata or {})


def fetch_card_facts(repo_id: str, *, revision: str | None) -> CardFacts:
    """Ask the Hub what a model's card says."""
    with _hub_errors(repo_id, revision=revision):
        card = HfApi().model_info(repo_id, revision=revision).card_data
    return _card_facts(vars(card) if card is not None else {})


def _card_facts(metadata: dict[str, Any]) -> CardFacts:
    def text(key: str) -> str | None:
        value = metadata.get(key)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        return value if isinstance(value, str) and value.strip() else None

    return CardFacts(
        license=text("license"),
        license_name=text("license_name"),
        license_link=text("license_link"),
        base_model=text("base_model"),
    )


@contextmanager
def _progress_bars(*, hidden: bool) -> Iterator[None]:
    if not hidden or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _hub_errors(subject: str, *, revision: str | None = None, writing: bool = False) -> Iterator[None]:
    try:
        yield
    # RuntimeError is what the storage backend (hf_xet) raises; the others are the client's and the socket's.
    except (OSError, ValueError, RuntimeError, httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise _translate(error, subject=subject, revision=revision, writing=writing) from _cause(error)


def _cause(error: Exception) -> Exception:
    """Return what really happened: the client wraps it in "not in the cache" or "error while uploading"."""
    while isinstance(error, (LocalEntryNotFoundError, RuntimeError)) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _translate(error: Exception, *, subject: str, revision: str | None, writing: bool) -> AbliterateError:
    cause = _cause(error)
    if isinstance(cause, HFValidationError):
        return _invalid_repo_id(subject)
    if isinstance(cause, LocalTokenNotFoundError):
        return HubError(f"no Hub token found; {_LOG_IN}")
    if isinstance(cause, HfHubHTTPError):
        return HubError(f"{subject}: {_refusal(cause, subject=subject, revision=revision, writing=writing)}")
    if isinstance(cause, OfflineModeIsEnabled):
        return HubError(
            f"{subject}: not in the local cache as a whole, and offline mode is on; unset HF_HUB_OFFLINE, or "
            f"download it first with `hf download {subject}`"
        )
    if isinstance(cause, OSError) and cause.errno in {errno.ENOSPC, errno.EDQUOT}:
        return HubError(
            f"{subject}: the disk that holds {constants.HF_HUB_CACHE} is full; free some space, "
            "or set HF_HOME to a directory on another disk"
        )
    if isinstance(cause, PermissionError) and cause.filename:
        return HubError(f"{subject}: cannot write {cause.filename}; set HF_HOME to a directory you may write")
    if isinstance(cause, (httpx2.TransportError, ConnectionError, TimeoutError)):
        reason = f"{type(cause).__name__}: {_redact(str(cause))[:120]}".removesuffix(": ")
        return HubError(
            f"{subject}: the connection to {constants.ENDPOINT} failed ({reason}); check the network and "
            "HF_ENDPOINT and run the same command again, which goes on where it stopped"
        )
    return HubError(f"{subject}: the Hub client failed ({type(cause).__name__}): {_redact(str(cause))}")


def _refusal(error: HfHubHTTPError, *, subject: str, revision: str | None, writing: bool) -> str:
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return (
            f"this model is gated ({status}); accept its conditions at {repo_url(subject)}, "
            f"then {_LOG_IN} with an account that has been given access"
        )
    if isinstance(error, DisabledRepoError):
        return "the Hub has disabled access to this repository; use another one"
    if isinstance(error, RevisionNotFoundError):
        return f"no revision {revision or constants.DEFAULT_REVISION!r}; give a branch, tag or commit it has"
    if isinstance(error, RepositoryNotFoundError):
        what = "no such repository" if writing else "no such directory here, and no such model"
        return (
            f"{what} on the Hub that this login can see ({status}); check the spelling, and for a private one {_LOG_IN}"
        )
    said = f" ({_redact(error.server_message)})" if error.server_message else ""
    if status == 401:
        return f"the Hub did not accept the token (401){said}; {_LOG_IN} with a valid one"
    if status == 403:
        access = "write" if writing else "read"
        return f"the token may not {access} here (403){said}; use one with {access} permission for it"
    if status == 429 or status >= 500:
        return f"the Hub is busy or out of order ({status}){said}; wait and run the same command again"
    return f"the Hub refused the request ({status}){said}"


def _invalid_repo_id(repo_id: str) -> InputError:
    return InputError(
        f"{repo_id!r} is not a valid Hub id; use NAME or OWNER/NAME of letters, digits, '-', '_' and '.' "
        "(at most 96 characters, no '--' or '..')"
    )


def _redact(text: str) -> str:
    """Make one line of a message of others, without tokens and without the signatures that addresses carry."""
    token = get_token()
    if token:
        text = text.replace(token, "***")
    text = re.sub(r"\bhf_[A-Za-z0-9]{16,}", "hf_***", text)
    text = re.sub(r"(https?://[^\s?]+)\?\S*", r"\1", text)
    return " ".join(text.split())[:300]
