"""A judge behind a server: a guard whose chat template holds the question, or a model that is asked in words."""

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from abliterate.evaluation.chat_server import ChatServer, Message, Request, ServedReply
from abliterate.evaluation.judges import (
    MAX_VERDICT_TOKENS,
    YES_NO_PROMPT,
    Style,
    Verdict,
    ask_in_words,
    parse_verdict,
    question_file,
)
from abliterate.evaluation.replies import KeptReplies
from abliterate.progress import Advance

_GUARD = re.compile(r"guard|shield", re.IGNORECASE)


class ServedJudge:
    """See `Judge`.

    Args:
        server: where it is.
        prompt: auto (guard if its name says that it is one, else yes-no), guard, yes-no, or a file.
        cache: a folder that keeps its verdicts for resuming, or None.

    Raises:
        InputError: the prompt file is missing or lacks a placeholder.
    """

    def __init__(self, server: ChatServer, *, prompt: str, cache: Path | None) -> None:
        self._server = server
        self.name = server.model
        if prompt == "auto":
            prompt = "guard" if _GUARD.search(server.model) else "yes-no"
        self.style: Style = "guard" if prompt == "guard" else "yes-no" if prompt == "yes-no" else "file"
        self._template = YES_NO_PROMPT if self.style == "yes-no" else ""
        if self.style == "file":
            self._template = question_file(prompt)
        self.question = "the judge says safe, or Refusal: Yes" if self.style == "guard" else "the judge says no"
        self._cache: KeptReplies[dict[str, Any]] | None = None
        if cache is not None:
            conditions = {
                "judge": server.url,
                "model": server.model,
                "described": dict(server.described),
                "body": dict(server.body),
            }
            self._cache = KeptReplies(cache, conditions, parse=_with_text)

    def decide(self, pairs: Sequence[tuple[str, str]], *, advance: Advance = lambda _n: None) -> list[Verdict]:
        """See `Judge.decide`."""
        limit = MAX_VERDICT_TOKENS[self.style]
        requests = [Request(messages=self._messages(*pair), max_tokens=limit) for pair in pairs]
        said = [None if self._cache is None else self._cache.get(_key(request)) for request in requests]
        missing = [i for i, kept in enumerate(said) if kept is None]
        advance(len(requests) - len(missing))

        def receive(index: int, reply: ServedReply) -> None:
            place = missing[index]
            said[place] = asdict(reply)
            if self._cache is not None:
                self._cache.put(_key(requests[place]), asdict(reply))
            advance(1)

        self._server.replies([requests[i] for i in missing], receive=receive)
        return [parse_verdict(kept["text"]) for kept in said if kept is not None]

    def _messages(self, prompt: str, answer: str) -> tuple[Message, ...]:
        if self.style == "guard":
            return ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
        return ({"role": "user", "content": ask_in_words(self._template, prompt, answer)},)


def _key(request: Request) -> list[Any]:
    return [*map(dict, request.messages), request.max_tokens]


def _with_text(reply: Any) -> dict[str, Any]:
    if not isinstance(reply["text"], str):
        raise TypeError("not a reply's text")
    return dict(reply)
