"""Any server that speaks the OpenAI protocol for chats, asked for greedy replies: vLLM, SGLang, llama.cpp, Ollama, ...

Several requests are under way at once, each bounded in time. What may pass (a broken connection, 429, 5xx) is tried
again, after waits that grow or as long as the server says; all else ends the run with what the server said. Greedy
means temperature 0; whether the server then decodes exactly so, and the same in every batch, is its own affair.
"""

import asyncio
import os
import threading
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from abliterate.errors import InputError, ServerError
from abliterate.evaluation.replies import KeptReplies
from abliterate.evaluation.report import ServerOptions
from abliterate.files import in_one_line, parse_json, printable, without_secrets
from abliterate.progress import SILENT, Advance, ProgressReporter

if TYPE_CHECKING:
    from httpx2 import AsyncClient, Response

KEY_NAME = "ABLITERATE_API_KEY"
"""The environment variable that holds a server's key. None of another program is taken: it would go to any URL."""
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before a request is tried again; after these it is given up."""
TOP = 20
"""So many of the likeliest first tokens are asked for: what servers give without being told to give more."""

_PASSES = frozenset((408, 425, 429, 500, 502, 503, 504))
_LONGEST_WAIT = 120.0
_MOST_BYTES = 64 << 20
_DESCRIBES = ("id", "root", "meta", "owned_by")
_END_OF_CHAT = "/chat/completions"

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One conversation that ends with a request.

    Attributes:
        messages: with `role` and `content` each.
        max_tokens: length limit of the reply.
        top: how many of the likeliest tokens to ask for at each place; 0: none.
    """

    messages: tuple[Message, ...]
    max_tokens: int
    top: int = 0

    @property
    def key(self) -> list[Any]:
        """What its reply depends on but the server, as values JSON can hold."""
        return [*map(dict, self.messages), self.max_tokens, self.top]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedReply:
    """One reply, as the server gave it.

    Attributes:
        text: what it says.
        thinking: thoughts, where the server has taken them out of the text.
        truncated: whether it ended at its length limit.
        tokens: the tokens of the text, where the server says them; None otherwise.
        first: the likeliest first tokens with their log-probabilities, where the server says them; None otherwise.
    """

    text: str
    thinking: str = ""
    truncated: bool = False
    tokens: tuple[str, ...] | None = None
    first: tuple[tuple[str, float], ...] | None = None


class ServedReplies(KeptReplies[dict[str, Any]]):
    """The replies of one server, kept in a folder; see `KeptReplies`.

    Args:
        directory: where the file lies.
        server: whose they are; its URL, its name for the model and what it says about it tell it from others.
        more: what they depend on besides.
    """

    def __init__(self, directory: Path, server: "ChatServer", **more: Any) -> None:
        conditions = {
            "server": server.url,
            "model": server.model,
            "described": dict(server.described),
            "body": dict(server.body),
            **more,
        }
        super().__init__(directory, conditions, parse=lambda content: asdict(_reply_of(content)))


def _reply_of(content: Any) -> ServedReply:
    """Return a kept reply.

    Raises:
        TypeError: it is none.
    """
    tokens, first = content["tokens"], content["first"]
    if not isinstance(content["text"], str) or not isinstance(content["thinking"], str):
        raise TypeError("not a reply's text")
    return ServedReply(
        text=content["text"],
        thinking=content["thinking"],
        truncated=bool(content["truncated"]),
        tokens=None if tokens is None else tuple(map(str, tokens)),
        first=None if first is None else tuple((str(token), float(log_p)) for token, log_p in first),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatServer:
    """A model behind a URL.

    Attributes:
        url: of the API, such as http://127.0.0.1:8000/v1.
        model: what the server calls the model.
        flag: the option that named the server, for messages.
        described: what the server says about the model.
        requests: how many are under way at once.
        timeout: seconds that one request may take.
        body: added to each request.
        key: sent with each request; never shown.
        progress: told when a request is tried again.
    """

    url: str
    model: str
    flag: str = "--server"
    described: Mapping[str, Any] = field(default_factory=dict)
    requests: int = 8
    timeout: float = 600.0
    body: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = field(default=None, repr=False)
    progress: ProgressReporter = SILENT
    _told: set[str] = field(default_factory=set, repr=False)

    def replies(
        self,
        requests: Sequence[Request],
        *,
        cache: "ServedReplies | None" = None,
        advance: Advance = lambda _n: None,
    ) -> list[ServedReply]:
        """Return a greedy reply to each request, in their order.

        Args:
            requests: the conversations.
            cache: replies that are there already, and where each new one is kept as it comes; None keeps none.
            advance: called with the number of replies that are there.

        Raises:
            ServerError: the server cannot be reached, fails again and again, refuses a request, or answers something
                that is no reply, or for another model.
        """
        kept = [None if cache is None else cache.get(request.key) for request in requests]
        found = {i: _reply_of(content) for i, content in enumerate(kept) if content is not None}
        advance(len(found))

        async def ask_all() -> None:
            waiting = iter([(i, request) for i, request in enumerate(requests) if i not in found])
            async with _client(self) as client:

                async def work() -> None:
                    for index, request in waiting:
                        found[index] = await self._reply(client, request)
                        if cache is not None:
                            cache.put(request.key, asdict(found[index]))
                        advance(1)

                workers = [asyncio.create_task(work()) for _ in range(min(self.requests, len(requests)))]
                try:
                    await asyncio.gather(*workers)
                finally:
                    for worker in workers:
                        worker.cancel()
                    await asyncio.gather(*workers, return_exceptions=True)

        if len(found) < len(requests):
            _run(ask_all())
        return [found[i] for i in range(len(requests))]

    async def _reply(self, client: "AsyncClient", request: Request) -> ServedReply:
        body = {
            "model": self.model,
            "messages": [dict(message) for message in request.messages],
            "max_tokens": request.max_tokens,
            "temperature": 0.0,
            "stream": False,
            **({"logprobs": True, "top_logprobs": request.top} if request.top else {}),
            **self.body,
        }
        answer = await _ask(self, client, "POST", _END_OF_CHAT, body)
        said = answer.get("model")
        if isinstance(said, str) and not _is_same_model(self.model, said):
            raise ServerError(
                f"{self.flag} {self.url}: was asked for {self.model!r} and answered as {printable(said)!r}; name the "
                f"model as the server does, with {_name_flag(self.flag)}"
            )
        try:
            return _read_reply(answer)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise ServerError(
                f"{self.flag} {self.url}: answered something that is no chat completion; see that it is the URL of an "
                "OpenAI-compatible API, which mostly ends in /v1"
            ) from error


def connect(
    url: str,
    *,
    model: str | None,
    options: ServerOptions,
    flag: str = "--server",
    progress: ProgressReporter = SILENT,
) -> ChatServer:
    """Find a server, and what it calls its model.

    Args:
        url: of the API, with or without /v1 and /chat/completions.
        model: the name there; None: the only one that the server lists.
        options: how to ask.
        flag: the option that the URL came from, for messages.
        progress: told when a request is tried again.

    Raises:
        InputError: the URL or `options.body` is none.
        ServerError: the server cannot be reached, or lists other models.
    """
    server = ChatServer(
        url=_api_url(url, flag),
        model=model or "",
        flag=flag,
        requests=options.requests,
        timeout=options.timeout,
        body=_parsed_body(options.body),
        key=os.environ.get(KEY_NAME) or None,
        progress=progress,
    )
    listed = _listed_models(server)
    if model is None:
        if len(listed) != 1:
            known = f"lists {_names(listed)}" if listed else "does not list its models"
            raise ServerError(f"{flag} {server.url}: {known}; say which one with {_name_flag(flag)} NAME")
        model = next(iter(listed))
    names = {str(name): entry for entry in listed.values() for name in (entry["id"], *_aliases(entry))}
    if names and not any(_is_same_model(model, name) for name in names):
        raise ServerError(f"{_name_flag(flag)} {model}: {server.url} has no such model; it lists {_names(listed)}")
    entry = names.get(model, {})
    # When it was loaded, and who may use it, does not change what it says.
    described = {key: entry[key] for key in _DESCRIBES if key in entry}
    return replace(server, model=model, described=described)


def _api_url(url: str, flag: str) -> str:
    """Return where the API begins."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        sound = False
    if not sound or parts.query or parts.fragment:
        raise InputError(f"{flag} {printable(url)}: is no URL of a server; give one such as http://127.0.0.1:8000/v1")
    if parts.username or parts.password:
        raise InputError(f"{flag}: the URL holds a user or a key; put the key into {KEY_NAME} and leave it out there")
    path = parts.path.rstrip("/").removesuffix(_END_OF_CHAT)
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


def _parsed_body(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        body = parse_json(text.encode())
    except ValueError as error:
        raise InputError(f"--server-body: is no JSON ({in_one_line(error)})") from error
    if not isinstance(body, dict):
        raise InputError('--server-body: is no JSON object; give one such as {"seed": 0}')
    ours = sorted(body.keys() & {"model", "messages", "max_tokens", "stream", "n"})
    if ours:
        raise InputError(f"--server-body: {ours[0]} is what `evaluate` says itself; leave it out")
    return body


def _name_flag(flag: str) -> str:
    return {"--server": "--api-model", "--base-server": "--base-api-model", "--judge-server": "--judge-api-model"}[flag]


def _names(names: Mapping[str, Any]) -> str:
    shown = [printable(name) for name in list(names)[:8]]
    return ", ".join(shown) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _is_same_model(asked: str, said: str) -> bool:
    """Tell whether a server means the same model: some add a revision or a date."""
    return said == asked or said.startswith((f"{asked}@", f"{asked}:", f"{asked}-"))


def _aliases(entry: Mapping[str, Any]) -> list[Any]:
    aliases = entry.get("aliases")
    return aliases if isinstance(aliases, list) else []


def _listed_models(server: ChatServer) -> dict[str, dict[str, Any]]:
    """Return what the server says of each model that it lists; nothing where it does not list any."""
    found: dict[str, Any] = {}

    async def ask() -> None:
        async with _client(server) as client:
            found.update(await _ask(server, client, "GET", "/models", None, may_fail=True))

    try:
        _run(ask())
    except _AnsweredError as error:
        if error.status in {401, 403}:
            raise
        # Not every server lists its models; whether it answers shows with the first reply.
        return {}
    entries = found.get("data")
    if not isinstance(entries, list):
        return {}
    return {entry["id"]: entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)}


class _AnsweredError(ServerError):
    """A server answered with a status that says no."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


def _client(server: ChatServer) -> "AsyncClient":
    import httpx2

    headers = {"Authorization": f"Bearer {server.key}"} if server.key else {}
    limits = httpx2.Limits(max_connections=server.requests, max_keepalive_connections=server.requests)
    return httpx2.AsyncClient(headers=headers, limits=limits, timeout=server.timeout, follow_redirects=False)


async def _ask(
    server: ChatServer,
    client: "AsyncClient",
    method: str,
    path: str,
    body: Mapping[str, Any] | None,
    *,
    may_fail: bool = False,
) -> dict[str, Any]:
    """Send one request, again where that may help, and return the JSON object that is answered.

    Args:
        server: whom to ask.
        client: through what.
        method: GET or POST.
        path: below the URL.
        body: sent as JSON.
        may_fail: whether a server that fails need not be asked again.

    Raises:
        ServerError: there is no answer, or none that can be used.
    """
    import httpx2

    where, failure = f"{server.flag} {server.url}", ""
    for wait in (*WAITS, None):
        try:
            async with (
                asyncio.timeout(server.timeout),
                client.stream(method, server.url + path, json=body) as response,
            ):
                content = await _content(response, where)
                if response.status_code == 200:
                    return _object(content, where)
                failure = _refusal(response, content)
                if response.status_code not in _PASSES or (may_fail and response.status_code != 429):
                    raise _AnsweredError(f"{where}: {failure}", status=response.status_code)
                wait = _asked_wait(response, wait)
        except TimeoutError:
            failure = f"no answer within {server.timeout:g} seconds (--server-timeout)"
        except (httpx2.TransportError, OSError) as error:
            failure = in_one_line(error) or type(error).__name__
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise ServerError(f"{where}: {in_one_line(error)}") from error
        if wait is not None:
            if failure not in server._told:
                server._told.add(failure)
                server.progress.message(f"{where}: {failure}; trying again in {wait:g} s")
            await asyncio.sleep(wait)
    raise ServerError(f"{where}: {failure}, {len(WAITS) + 1} times; see that the server runs and is not overloaded")


async def _content(response: "Response", where: str) -> bytes:
    content = bytearray()
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) > _MOST_BYTES:
            raise ServerError(f"{where}: answered with more than {_MOST_BYTES >> 20} MB; it is no reply")
    return bytes(content)


def _object(content: bytes, where: str) -> dict[str, Any]:
    try:
        answer = parse_json(content)
    except ValueError as error:
        raise ServerError(f"{where}: answered something that is no JSON; see that it is the URL of an API") from error
    if not isinstance(answer, dict):
        raise ServerError(f"{where}: answered something that is no JSON object; see that it is the URL of an API")
    return answer


def _refusal(response: "Response", content: bytes) -> str:
    """Return what a server says about why it does not answer, in one line without keys."""
    said = content.decode(errors="replace")
    try:
        answer = parse_json(content)
        error = answer.get("error", answer)
        found = error if isinstance(error, str) else (error.get("message") or error.get("detail"))
        said = found if isinstance(found, str) else said
    except (ValueError, AttributeError):
        pass
    text = in_one_line(ValueError(without_secrets(said)))
    return f"{response.status_code} {response.reason_phrase}" + (f": {text}" if text else "")


def _asked_wait(response: "Response", wait: float | None) -> float | None:
    """Return how long a server asks to be left alone, where it does so in seconds."""
    try:
        asked = float(response.headers.get("retry-after", ""))
    except ValueError:
        return wait
    return None if wait is None else min(max(asked, 0.0), _LONGEST_WAIT)


def _read_reply(answer: Mapping[str, Any]) -> ServedReply:
    choice = answer["choices"][0]
    message = choice["message"]
    text = message.get("content")
    if isinstance(text, list):
        text = "".join(part["text"] for part in text if part.get("type") == "text")
    # A refusal that the protocol sets apart is what the model said.
    text = _text(text if text is not None else message.get("refusal"))
    thinking = _text(message.get("reasoning_content") or message.get("reasoning"))
    places = (choice.get("logprobs") or {}).get("content") or None
    tokens, first = None, None
    if places is not None:
        pieces = [_bytes(place) for place in places]
        tokens = tuple(_cuts(pieces)) if b"".join(pieces).decode(errors="replace").startswith(text) else None
        entries = places[0].get("top_logprobs") or [places[0]]
        first = tuple((_bytes(entry).decode(errors="replace"), float(entry["logprob"])) for entry in entries)
    return ServedReply(
        text=text, thinking=thinking, truncated=choice.get("finish_reason") == "length", tokens=tokens, first=first
    )


def _text(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError("a message that is no text")
    return value


def _bytes(place: Mapping[str, Any]) -> bytes:
    stored = place.get("bytes")
    return bytes(stored) if isinstance(stored, list) and stored else _text(place["token"]).encode(errors="replace")


def _cuts(pieces: Sequence[bytes]) -> list[str]:
    """Return the text that each token adds: a letter of several tokens comes with the last of them."""
    texts, held = [], b""
    for piece in pieces:
        held += piece
        try:
            texts.append(held.decode())
            held = b""
        except UnicodeDecodeError as error:
            whole = error.start if error.end >= len(held) else len(held)
            texts.append(held[:whole].decode(errors="replace"))
            held = held[whole:]
    return texts


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Run something asynchronous to its end, also where a loop runs already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    failures: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(work)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
