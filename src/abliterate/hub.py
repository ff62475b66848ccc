"""The Hub: models come down, checkpoints go up. No other module talks to it.

Endpoint, cache, token and offline mode are those of `huggingface_hub` itself (`HF_ENDPOINT`, `HF_HOME`,
`HF_TOKEN` or `hf auth login`, `HF_HUB_OFFLINE`); nothing here overrides them, and no token is ever shown.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import HfApi, constants, get_token, hf_hub_download, metadata_load, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils._paths import filter_repo_objects
from huggingface_hub.utils._safetensors import SafetensorsRepoMetadata
from huggingface_hub.utils._validators import validate_repo_id
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from abliterate.errors import HubError, InputError
from abliterate.hub_errors import LOG_IN, hub_errors, invalid_repo_id

_TEXT_PATTERNS = ["*.json", "*.jsonl", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "*.md"]
_TEXT_PATTERNS += ["LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"]
# Second copies of the same weights in other layouts, which transformers does not read.
_IGNORED_PATTERNS = ["*/*.safetensors", "consolidated*.safetensors"]

_ADAPTER_CONFIG_NAME = "adapter_config.json"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteModel:
    """What the Hub says of a model before any of its weights are downloaded.

    Attributes:
        name: The Hub id.
        revision: The commit all of this is from.
        config: The content of config.json.
        headers: Shard -> tensor -> dtype, shape and data_offsets, as its header has them.
        weight_map: The shard index's map; None for a single file.
        files: What `resolve_model` would download, path -> bytes.
        card: What its card says.
        gated: "auto" or "manual" where its owner asks for agreement first; None where not.
    """

    name: str
    revision: str
    config: dict[str, Any]
    headers: dict[str, dict[str, dict[str, Any]]]
    weight_map: dict[str, str] | None
    files: dict[str, int]
    card: CardFacts
    gated: str | None


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
    local = find_local_model(model, revision=revision)
    return local or _download(model, revision=revision, weights=weights)


def find_local_model(model: str, *, revision: str | None = None) -> ModelSource | None:
    """Return the source of a model that is a directory; None where `model` can only be a Hub id.

    Raises:
        InputError: `model` looks like a path and is not there, or is no model directory.
    """
    local = Path(model).expanduser()
    if model.strip() and local.is_dir():
        if revision is not None:
            raise InputError(f"--revision {revision}: {model} is a local directory; only Hub models have revisions")
        if not (local / constants.CONFIG_NAME).is_file() and (local / _ADAPTER_CONFIG_NAME).is_file():
            raise InputError(
                f"{model}: is an adapter and no model; merge it into its base (peft's `merge_and_unload`, then "
                "`save_pretrained`), or orthogonalize the base without --format adapter"
            )
        if not (local / constants.CONFIG_NAME).is_file():
            raise InputError(
                f"{model}: no config.json in this directory; give a transformers model directory, or a Hub id"
            )
        return ModelSource(path=local, name=model, revision=None)
    if local.is_file():
        raise InputError(f"{model}: this is a file; give the directory that holds config.json, or a Hub id")
    if _looks_like_a_path(model):
        raise InputError(f"{model}: no such directory; check the path (a Hub id has the form OWNER/NAME)")
    return None


def _looks_like_a_path(model: str) -> bool:
    return not model.strip() or model[0] in "./~" or model.endswith("/") or model.count("/") > 1 or "\\" in model


def _download(model: str, *, revision: str | None, weights: bool) -> ModelSource:
    patterns = [*_TEXT_PATTERNS, "*.safetensors"] if weights else _TEXT_PATTERNS
    with hub_errors(model, revision=revision):
        snapshot = Path(
            snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=_IGNORED_PATTERNS)
        )
    if not (snapshot / constants.CONFIG_NAME).is_file():
        raise _no_config(model)
    if weights and not any(snapshot.glob("*.safetensors")):
        raise _no_weights(model)
    return ModelSource(path=snapshot, name=model, revision=snapshot.name)


def _no_config(model: str) -> HubError:
    return HubError(f"{model}: the repository has no config.json; give a model in the transformers layout")


def _no_weights(model: str) -> HubError:
    return HubError(f"{model}: the repository has no safetensors weights; give a revision or a copy that has them")


def inspect_model(model: str, *, revision: str | None = None) -> RemoteModel:
    """Ask the Hub for a model's config, headers, licence and sizes; of its weights only the headers are read.

    Raises:
        InputError: The Hub id is malformed.
        HubError: The Hub does not have it, does not give it, or it has no readable safetensors weights.
    """
    api = HfApi()
    with hub_errors(model, revision=revision):
        info = api.model_info(model, revision=revision)
        commit = str(info.sha)
        files = {path: file.bytes for path, file in list_remote_files(model, revision=commit).items()}
        if constants.CONFIG_NAME not in files:
            raise _no_config(model)
        text = Path(hf_hub_download(model, constants.CONFIG_NAME, revision=commit)).read_bytes()
        headers = _read_headers(api, model, commit)
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HubError(f"{model}: its config.json is not JSON ({error}); use another revision") from error
    if not isinstance(config, dict):
        raise HubError(f"{model}: its config.json holds no JSON object; use another revision")
    wanted = set(
        filter_repo_objects(files, allow_patterns=[*_TEXT_PATTERNS, "*.safetensors"], ignore_patterns=_IGNORED_PATTERNS)
    )
    return RemoteModel(
        name=model,
        revision=commit,
        config=config,
        headers={
            shard: {
                name: {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": list(tensor.data_offsets)}
                for name, tensor in header.tensors.items()
            }
            for shard, header in sorted(headers.files_metadata.items())
        },
        weight_map=headers.weight_map if headers.sharded else None,
        files={path: size for path, size in files.items() if path in wanted},
        card=_card_facts(vars(info.card_data) if info.card_data is not None else {}),
        gated=info.gated or None,
    )


def _read_headers(api: HfApi, model: str, commit: str) -> SafetensorsRepoMetadata:
    try:
        return api.get_safetensors_metadata(model, revision=commit)
    except NotASafetensorsRepoError as error:
        raise _no_weights(model) from error
    # What the client raises about an index or a header that is not one.
    except (SafetensorsParsingError, AttributeError, TypeError, KeyError) as error:
        raise HubError(f"{model}: its shard index or a shard's header is damaged; use another revision") from error


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


def repo_is_private(repo_id: str) -> bool | None:
    """Return whether a model repository is private; None when there is none that this login can see."""
    try:
        with hub_errors(repo_id, writing=True):
            return bool(HfApi().model_info(repo_id).private)
    except HubError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError) and not isinstance(error.__cause__, GatedRepoError):
            return None
        raise


def create_repo(repo_id: str, *, private: bool) -> None:
    """Create a model repository; one that exists is left as it is, its visibility too."""
    with hub_errors(repo_id, writing=True):
        HfApi().create_repo(repo_id, private=private, exist_ok=True)


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
    with hub_errors(repo_id, revision=revision):
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
