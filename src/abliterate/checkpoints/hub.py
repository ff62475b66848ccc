"""The Hub: models come down, checkpoints go up. No other module talks to it.

Endpoint, cache, token and offline mode are those of `huggingface_hub` itself (`HF_ENDPOINT`, `HF_HOME`,
`HF_TOKEN` or `hf auth login`, `HF_HUB_OFFLINE`); nothing here overrides them. What the client and the network raise
becomes one line that says what to do. No token is ever shown.
"""

import errno
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import httpx2
from huggingface_hub import (
    HfApi,
    constants,
    get_session,
    get_token,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
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
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import hf_raise_for_status
from huggingface_hub.utils._paths import filter_repo_objects
from huggingface_hub.utils._validators import validate_repo_id
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from abliterate.checkpoints.model_source import CardFacts, ModelSource, card_facts
from abliterate.errors import AbliterateError, HubError, InputError
from abliterate.progress import SILENT, ProgressReporter

LOG_IN = "run `hf auth login` or set HF_TOKEN"


@contextmanager
def hub_errors(subject: str, *, revision: str | None = None, writing: bool = False) -> Iterator[None]:
    """Raise what goes wrong in the body as errors of abliterate.

    Args:
        subject: What is asked for, usually a Hub id; messages begin with it.
        revision: The revision asked for.
        writing: Whether the body needs permission to write.

    Raises:
        InputError: The Hub id is malformed.
        HubError: The Hub refused or could not be reached, or the disk failed; the cause is what really happened.
    """
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
        return invalid_repo_id(subject)
    if isinstance(cause, LocalTokenNotFoundError):
        return HubError(f"no Hub token found; {LOG_IN}")
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
            f"this model is gated ({status}); accept its conditions at {constants.ENDPOINT}/{subject}, "
            f"then {LOG_IN} with an account that has been given access"
        )
    if isinstance(error, DisabledRepoError):
        return "the Hub has disabled access to this repository; use another one"
    if isinstance(error, RevisionNotFoundError):
        return f"no revision {revision or constants.DEFAULT_REVISION!r}; give a branch, tag or commit it has"
    if isinstance(error, RepositoryNotFoundError):
        what = "no such repository" if writing else "no such directory here, and no such model"
        return (
            f"{what} on the Hub that this login can see ({status}); check the spelling, and for a private one {LOG_IN}"
        )
    said = f" ({_redact(error.server_message)})" if error.server_message else ""
    if status == 401:
        return f"the Hub did not accept the token (401){said}; {LOG_IN} with a valid one"
    if status == 403:
        access = "write" if writing else "read"
        return f"the token may not {access} here (403){said}; use one with {access} permission for it"
    if status == 429 or status >= 500:
        return f"the Hub is busy or out of order ({status}){said}; wait and run the same command again"
    return f"the Hub refused the request ({status}){said}"


def invalid_repo_id(repo_id: str) -> InputError:
    """Return the error about a malformed Hub id."""
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


_TEXT_PATTERNS = ["*.json", "*.jsonl", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "*.md"]
_TEXT_PATTERNS += ["LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"]
# Second copies of the same weights in other layouts, which transformers does not read.
_IGNORED_PATTERNS = ["*/*.safetensors", "consolidated*.safetensors"]
_PARTIAL_CONTENT = 206
_TIMEOUT = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RepoSettings:
    """Who can read a repository: `private`, its owner alone; `gated`, those who are given access, None where all."""

    private: bool
    gated: Literal["auto", "manual"] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """One file as the Hub holds it; `sha256` is known for files in large file storage only."""

    bytes: int
    sha256: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteModel:
    """What the Hub says of a model before any of its weights are downloaded.

    Attributes:
        name: The Hub id.
        revision: The commit all of this is from.
        sizes: Every file of the repository, path -> bytes.
        wanted: The files that `resolve_model` would download.
        card: What its card says.
        gated: "auto" or "manual" where its owner asks for agreement first; None where not.
        hashes: SHA-256 of those in large file storage, by path.
    """

    name: str
    revision: str
    sizes: dict[str, int]
    wanted: frozenset[str]
    card: CardFacts
    gated: str | None
    hashes: dict[str, str] = field(default_factory=dict)

    def read(self, path: str) -> bytes:
        """Return the content of a file that is not large, which is kept in the Hub's cache.

        Raises:
            HubError: The Hub does not give it, or cannot be reached.
        """
        with hub_errors(self.name, revision=self.revision):
            return Path(hf_hub_download(self.name, path, revision=self.revision)).read_bytes()

    def read_range(self, path: str, first: int, end: int) -> bytes:
        """Return the bytes of a file from `first` up to, not including, `end`; nothing else is downloaded.

        Raises:
            HubError: The Hub does not give them, or cannot be reached.
        """
        url = hf_hub_url(self.name, path, revision=self.revision)
        headers = build_hf_headers() | {"range": f"bytes={first}-{end - 1}"}
        data = bytearray()
        with (
            hub_errors(self.name, revision=self.revision),
            get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT) as response,
        ):
            if response.is_error:
                response.read()
            hf_raise_for_status(response)
            is_partial = response.status_code == _PARTIAL_CONTENT
            # A server that sends more than it was asked for is not read to its end.
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) >= end - first or not is_partial:
                    break
        if not is_partial or len(data) < end - first:
            raise HubError(
                f"{self.name}: the server does not give a part of {path}; download the model first (`hf download`), "
                "and name its directory"
            )
        return bytes(data[: end - first])


def download_without(model: str, *, revision: str, skipped: Sequence[str]) -> ModelSource:
    """Download a Hub model without some of its files.

    Raises:
        HubError: The Hub does not give it, or cannot be reached.
    """
    patterns, ignored = [*_TEXT_PATTERNS, "*.safetensors"], [*_IGNORED_PATTERNS, *skipped]
    with hub_errors(model, revision=revision):
        snapshot = snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=ignored)
    return ModelSource(path=Path(snapshot), name=model, revision=Path(snapshot).name)


def download_model(model: str, *, revision: str | None, progress: ProgressReporter = SILENT) -> ModelSource:
    """Download a Hub model into the Hub's cache; see `model_source.resolve_model`.

    Raises:
        InputError: The Hub id is malformed.
        HubError: The Hub does not have it, does not give it, or cannot be reached.
    """
    if not are_progress_bars_disabled():
        return _download(model, revision=revision)
    with progress.task(f"Getting {model} from the Hub", total=1) as advance:
        source = _download(model, revision=revision)
        advance(1)
    return source


def _download(model: str, *, revision: str | None) -> ModelSource:
    patterns = [*_TEXT_PATTERNS, "*.safetensors"]
    with hub_errors(model, revision=revision):
        snapshot = Path(
            snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=_IGNORED_PATTERNS)
        )
    if not (snapshot / constants.CONFIG_NAME).is_file():
        raise _no_config(model)
    if not any(snapshot.glob("*.safetensors")):
        raise _no_weights(model)
    return ModelSource(path=snapshot, name=model, revision=snapshot.name)


def _no_config(model: str) -> HubError:
    return HubError(f"{model}: the repository has no config.json; give a model in the transformers layout")


def _no_weights(model: str) -> HubError:
    return HubError(f"{model}: the repository has no safetensors weights; give a revision or a copy that has them")


def inspect_model(model: str, *, revision: str | None = None) -> RemoteModel:
    """Ask the Hub what a model consists of, for its licence and sizes; no file of it is read.

    Raises:
        InputError: The Hub id is malformed.
        HubError: The Hub does not have it, does not give it, or it has no config or no safetensors weights.
    """
    with hub_errors(model, revision=revision):
        info = HfApi().model_info(model, revision=revision)
        commit = str(info.sha)
        files = list_remote_files(model, revision=commit)
    sizes = {path: file.bytes for path, file in files.items()}
    if constants.CONFIG_NAME not in sizes:
        raise _no_config(model)
    if not {constants.SAFETENSORS_SINGLE_FILE, constants.SAFETENSORS_INDEX_FILE} & sizes.keys():
        raise _no_weights(model)
    patterns = [*_TEXT_PATTERNS, "*.safetensors"]
    return RemoteModel(
        name=model,
        revision=commit,
        sizes=sizes,
        wanted=frozenset(filter_repo_objects(sizes, allow_patterns=patterns, ignore_patterns=_IGNORED_PATTERNS)),
        card=card_facts(vars(info.card_data) if info.card_data is not None else {}),
        gated=info.gated or None,
        hashes={path: file.sha256 for path, file in files.items() if file.sha256 is not None},
    )


def check_repo_id(repo_id: str) -> None:
    """Raise `InputError` unless `repo_id` is a valid `NAME` or `OWNER/NAME`."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise invalid_repo_id(repo_id) from error


def whoami() -> str:
    """Return the user name of the login in effect; `HubError` when there is none or the Hub refuses it."""
    if get_token() is None:
        raise HubError(f"no Hub token found; {LOG_IN}, with a token that may write")
    with hub_errors("the login", writing=True):
        return str(HfApi().whoami()["name"])


def read_repo_settings(repo_id: str) -> RepoSettings | None:
    """Return who can read a model repository; None when there is none that this login can see."""
    try:
        with hub_errors(repo_id, writing=True):
            found = HfApi().model_info(repo_id)
    except HubError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError) and not isinstance(error.__cause__, GatedRepoError):
            return None
        raise
    return RepoSettings(private=bool(found.private), gated=found.gated or None)


def create_repo(repo_id: str, *, private: bool) -> None:
    """Create a model repository; one that exists is left as it is, its visibility too."""
    with hub_errors(repo_id, writing=True):
        HfApi().create_repo(repo_id, private=private, exist_ok=True)


def gate_repo(repo_id: str, *, gated: Literal["auto", "manual"]) -> None:
    """Have readers of a model repository ask for access, which is given at once (auto) or by its owner (manual)."""
    with hub_errors(repo_id, writing=True):
        HfApi().update_repo_settings(repo_id, gated=gated)


def check_collection(slug: str) -> None:
    """Raise `HubError` unless there is a collection that this login, or an organization of it, owns."""
    try:
        with hub_errors(slug, writing=True):
            HfApi().get_collection(slug)
            login = HfApi().whoami()
    except HubError as error:
        if isinstance(error.__cause__, HfHubHTTPError) and error.__cause__.response.status_code == 404:
            said = "no such collection on the Hub that this login can see (404); check the spelling, or make it first"
            raise HubError(f"{slug}: {said}") from error.__cause__
        raise
    names = [str(login["name"]), *(str(each["name"]) for each in login.get("orgs", ()))]
    if slug.split("/")[0].lower() not in {name.lower() for name in names}:
        raise HubError(f"{slug}: a collection of neither {names[0]}, who is logged in, nor their organizations")


def add_to_collection(slug: str, repo_id: str) -> None:
    """Add a model to a collection; one that is in it stays as it is."""
    with hub_errors(slug, writing=True):
        HfApi().add_collection_item(slug, repo_id, "model", exists_ok=True)


def upload_folder(repo_id: str, folder: Path, *, commit_message: str, quiet: bool = False) -> str:
    """Upload a folder by `huggingface_hub`'s own means, which delete nothing and resume when repeated.

    Returns:
        The commit that holds the upload.
    """
    with hub_errors(repo_id, writing=True), _progress_bars(hidden=quiet):
        commit = HfApi().upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
    return str(commit.oid)


def list_remote_files(repo_id: str, *, revision: str) -> dict[str, RemoteFile]:
    """List every file of a model repository at a commit, by path."""
    with hub_errors(repo_id, revision=revision):
        entries = list(HfApi().list_repo_tree(repo_id, recursive=True, revision=revision))
    return {
        entry.path: RemoteFile(bytes=entry.size, sha256=entry.lfs.sha256 if entry.lfs else None)
        for entry in entries
        if isinstance(entry, RepoFile)
    }


def repo_url(repo_id: str) -> str:
    """Return the address of a model's page under the endpoint in effect."""
    return f"{constants.ENDPOINT}/{repo_id}"


def fetch_card_facts(repo_id: str, *, revision: str | None) -> CardFacts:
    """Ask the Hub what a model's card says."""
    with hub_errors(repo_id, revision=revision):
        card = HfApi().model_info(repo_id, revision=revision).card_data
    return card_facts(vars(card) if card is not None else {})


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
