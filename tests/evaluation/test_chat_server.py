"""A server is asked side by side, again where that may help, and what it says wrongly ends the run in one line."""

import asyncio
import os
import signal
import socket
import threading
import time
from typing import Any

import pytest

from abliterate.errors import InputError, ServerError
from abliterate.evaluation import chat_server
from abliterate.evaluation.chat_server import KEY_NAME, ChatServer, Request, connect
from abliterate.evaluation.report import ServerOptions
from tests.support.chat_servers import scripted_server

FAST = (0.01, 0.01, 0.01)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_server, "WAITS", FAST)
    monkeypatch.delenv(KEY_NAME, raising=False)


def asked(*texts: str, top: int = 0) -> list[Request]:
    return [Request(messages=({"role": "user", "content": text},), max_tokens=7, top=top) for text in texts]


def reply_to(server: ChatServer, *texts: str, **options: Any) -> list[str]:
    return [reply.text for reply in server.replies(asked(*texts, **options))]


def found(url: str, *, model: str | None = None, **options: Any) -> ChatServer:
    return connect(url, model=model, options=ServerOptions(**options))


def test_replies_come_in_order_and_only_so_many_at_once():
    with scripted_server(seconds=0.02) as server:
        texts = [str(i) for i in range(30)]
        steps: list[int] = []
        replies = found(server.url, requests=4).replies(asked(*texts), advance=steps.append)
        assert [reply.text for reply in replies] == [f"Sure: {text}" for text in texts]
        assert sum(steps) == 30
        assert 2 <= server.most_at_once <= 4
        body = server.bodies[0]
    assert (body["model"], body["max_tokens"], body["temperature"], body["stream"]) == ("tiny", 7, 0.0, False)
    assert "logprobs" not in body


def test_the_key_of_the_environment_is_sent_and_never_shown(monkeypatch):
    monkeypatch.setenv(KEY_NAME, "sk-very-secret")

    def repeat(handler: Any) -> None:
        handler.send(400, {"error": {"message": f"bad {handler.headers['Authorization']}"}})

    with scripted_server(failures=[repeat]) as server:
        asking = found(server.url)
        assert "sk-very-secret" not in repr(asking)
        with pytest.raises(ServerError, match="400 Bad Request: bad Bearer") as error:
            reply_to(asking, "x")
        assert server.keys == ["Bearer sk-very-secret"]
    assert "secret" not in str(error.value)


def test_more_for_each_request_is_sent_along():
    with scripted_server() as server:
        reply_to(found(server.url, body='{"chat_template_kwargs": {"enable_thinking": false}}'), "x")
        assert server.bodies[0]["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize(
    "failure",
    [
        (429, {"error": "slow down"}, {"Retry-After": "0"}),
        (429, {}, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}),
        (500, b"oops"),
        (503, {"error": {"message": "loading"}}),
        lambda handler: handler.connection.shutdown(socket.SHUT_RDWR),
    ],
)
def test_what_may_pass_is_tried_again(failure):
    with scripted_server(failures=[failure, failure]) as server:
        assert reply_to(found(server.url), "x") == ["Sure: x"]
        assert len(server.bodies) == 3


def test_a_server_that_says_how_long_is_waited_for():
    with scripted_server(failures=[(429, {}, {"Retry-After": "0.4"})]) as server:
        started = time.monotonic()
        assert reply_to(found(server.url), "x") == ["Sure: x"]
        assert time.monotonic() - started >= 0.4


def test_what_does_not_pass_is_given_up():
    with scripted_server(failures=[(500, {"error": "out of memory"})] * 10) as server:
        with pytest.raises(ServerError, match="500 Internal Server Error: out of memory, 4 times; see that the server"):
            reply_to(found(server.url), "x")
        assert len(server.bodies) == len(FAST) + 1


def test_a_refused_request_is_not_tried_again():
    with scripted_server(failures=[(422, {"detail": "too long"})]) as server:
        with pytest.raises(ServerError, match=r"422 Unprocessable .*: too long"):
            reply_to(found(server.url), "x", "y")
        assert len(server.bodies) <= 2


def test_a_server_that_stalls_is_left_after_the_time_that_is_given():
    with scripted_server(seconds=5.0) as server:
        started = time.monotonic()
        with pytest.raises(ServerError, match=r"no answer within 0\.1 seconds"):
            reply_to(found(server.url, timeout=0.1), "x")
        assert time.monotonic() - started < 3


def test_a_server_that_drips_is_left_too():
    def drip(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        for _ in range(60):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)

    with scripted_server(failures=[drip] * 4) as server, pytest.raises(ServerError, match=r"no answer within 0\.3 s"):
        reply_to(found(server.url, timeout=0.3), "x")


def test_a_server_that_is_gone():
    with scripted_server() as server:
        asking = found(server.url)
    with pytest.raises(ServerError, match=r"--server http://127.0.0.1:\d+/v1: .*4 times"):
        reply_to(asking, "x")
    with pytest.raises(ServerError, match="4 times"):
        found(asking.url)


def test_an_answer_without_end_is_cut(monkeypatch):
    monkeypatch.setattr(chat_server, "_MOST_BYTES", 1 << 20)
    with scripted_server(answer=lambda _messages: "x" * (2 << 20)) as server:
        with pytest.raises(ServerError, match="answered with more than 1 MB"):
            reply_to(found(server.url), "x")


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ((200, b"<html>"), "is no JSON; see"),
        ((200, b"[1]"), "no JSON object"),
        ((200, {"choices": []}), "no chat completion"),
        ((200, {"choices": [{"message": {"content": 5}}]}), "no chat completion"),
        ((200, {"choices": [{"message": None}]}), "no chat completion"),
        ((200, {"choices": {"a": 1}}), "no chat completion"),
        ((302, b"", {"Location": "http://127.0.0.1:1/"}), "302 Found"),
        ((401, {"error": {"message": "no key"}}), "401 Unauthorized: no key"),
    ],
)
def test_what_is_no_reply_is_said_so(failure, message):
    with scripted_server(failures=[failure]) as server, pytest.raises(ServerError, match=message) as error:
        reply_to(found(server.url), "x")
    assert "\n" not in str(error.value)


def test_a_model_that_answers_for_another():
    with scripted_server(model="large") as server:
        with pytest.raises(ServerError, match="was asked for 'tiny' and answered as 'large'"):
            reply_to(found(server.url), "x")
    with scripted_server(model="tiny@main") as server:
        assert reply_to(found(server.url), "x") == ["Sure: x"]


def test_which_model_is_asked():
    with scripted_server(models=("one", "two")) as server:
        with pytest.raises(ServerError, match="lists one, two; say which one with --api-model NAME"):
            found(server.url)
        assert found(server.url, model="two").model == "two"
        with pytest.raises(ServerError, match=r"--api-model three: .* has no such model; it lists one, two"):
            found(server.url, model="three")
    with scripted_server(models=None) as server:
        with pytest.raises(ServerError, match="does not list its models; say which one"):
            found(server.url)
        assert reply_to(found(server.url, model="any"), "x") == ["Sure: x"]


def test_what_a_server_says_may_be_nested_without_end():
    deep = b'{"error": ' + b"[" * 100_000
    with (
        scripted_server(failures=[(400, deep)]) as server,
        pytest.raises(ServerError, match="400 Bad Request") as error,
    ):
        reply_to(found(server.url), "x")
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("end", ["", "/v1", "/v1/", "/v1/chat/completions"])
def test_a_url_with_or_without_its_path(end):
    with scripted_server() as server:
        assert found(server.url.removesuffix("/v1") + end).url == server.url


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000", "is no URL of a server"),
        ("ftp://host/v1", "is no URL"),
        ("http://", "is no URL"),
        ("http://host:99999/v1", "is no URL"),
        ("http://host/v1?key=a", "is no URL"),
        ("http://user:secret@host/v1", "put the key into ABLITERATE_API_KEY"),
    ],
)
def test_a_url_that_is_none(url, message):
    with pytest.raises(InputError, match=message) as error:
        found(url)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("body", "message"), [("{", "is no JSON"), ("[]", "no JSON object"), ('{"model": "x"}', "model is what")]
)
def test_a_body_that_is_none(body, message):
    with pytest.raises(InputError, match=message):
        found("http://127.0.0.1:1/v1", body=body)


def choice(*tokens: bytes, text: str, **message: Any) -> dict[str, Any]:
    places = [
        {"token": token.decode(errors="replace"), "bytes": list(token), "logprob": -0.5, "top_logprobs": []}
        for token in tokens
    ]
    places[0]["top_logprobs"] = [{"token": "A", "logprob": -0.1}, {"token": "B", "bytes": None, "logprob": -3.0}]
    return {"message": {"content": text, **message}, "finish_reason": "length", "logprobs": {"content": places}}


def test_tokens_and_the_likeliest_first_ones():
    letter = "é".encode()
    said = choice(b"caf", letter[:1], letter[1:], b"!", b"<|end|>", text="café!")
    with scripted_server(answer=lambda _messages: said) as server:
        (reply,) = found(server.url).replies(asked("x", top=5))
        assert server.bodies[0]["logprobs"] is True
        assert server.bodies[0]["top_logprobs"] == 5
    assert reply.text == "café!"
    assert reply.truncated
    assert reply.tokens == ("caf", "", "é", "!", "<|end|>")
    assert reply.first == (("A", -0.1), ("B", -3.0))


def test_tokens_of_another_text_are_not_taken():
    with scripted_server(answer=lambda _messages: choice(b"other", text="this")) as server:
        (reply,) = found(server.url).replies(asked("x", top=5))
    assert reply.tokens is None


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thoughts_that_the_server_sets_apart(name):
    said = {"message": {"content": None, name: "hm"}, "finish_reason": "length"}
    with scripted_server(answer=lambda _messages: said) as server:
        (reply,) = found(server.url).replies(asked("x"))
    assert (reply.text, reply.thinking, reply.truncated) == ("", "hm", True)


def test_other_forms_of_a_message():
    parts = {"message": {"content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]}}
    refusal = {"message": {"content": None, "refusal": "I cannot"}}
    said = iter([parts, refusal])
    with scripted_server(answer=lambda _messages: next(said)) as server:
        assert reply_to(found(server.url, requests=1), "x", "y") == ["ab", "I cannot"]


def test_it_works_where_a_loop_runs_already():
    async def notebook() -> list[str]:
        return reply_to(asking, "x")

    with scripted_server() as server:
        asking = found(server.url)
        assert asyncio.run(notebook()) == ["Sure: x"]


def test_an_interruption_ends_all_requests():
    def stop(n_done: int) -> None:
        if n_done:
            os.kill(os.getpid(), signal.SIGINT)

    with scripted_server(seconds=0.1) as server:
        with pytest.raises(KeyboardInterrupt):
            found(server.url, requests=2).replies(asked(*"abcdefgh"), advance=stop)
        assert len(server.bodies) <= 4
    assert threading.active_count() < 50
