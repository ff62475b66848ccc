"""What the Hub client and the network raise, as one line that says what to do; no token is ever shown."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
from huggingface_hub import constants, get_token
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

from abliterate.errors import AbliterateError, HubError, InputError

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
