"""JSON that others wrote, read without trust: what is ambiguous, or only some programs take, is an error.

A checkpoint's config, index and headers may be damaged or made to deceive. A key that occurs twice means one thing to
one program and another to the next; a name with terminal control characters can rewrite the line that reports it.
"""

import json
import math
import re
import reprlib
from typing import Any, NoReturn

# Real ones: 15 levels, 40 characters a number, names of 150 characters, 30 MB.
_MAX_DEPTH = 64
_MAX_DIGITS = 400
_MAX_NAME = 1000
MAX_BYTES = 100_000_000
_HALF_PAIR = re.compile("[\ud800-\udfff]")


def parse_json(data: bytes, *, infinities: bool = False) -> Any:
    """Parse a JSON document that must be UTF-8.

    Args:
        data: The document.
        infinities: Let the infinities pass, which are no JSON; configs that transformers 4 wrote have them.

    Raises:
        ValueError: It is not JSON, a key occurs twice, a number is no finite one or absurdly long, a name or string
            cannot be shown or written, or nested too deeply. The message is one line that any terminal can show.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_floating if not infinities else float,
            parse_constant=_infinity if infinities else _refuse_constant,
        )
    except RecursionError as error:
        raise ValueError("it nests too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from error
    _check_values(value)
    return value


def shown(value: Any) -> str:
    """Return a value as a message can show it: on one line, shortened, with nothing that a terminal acts on."""
    return printable(reprlib.repr(value))


def printable(text: str) -> str:
    """Return a text with everything that a terminal might act on, but line breaks and tabs, written as an escape."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii") for c in text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if len(name) > _MAX_NAME:
            raise ValueError(f"a name has {len(name)} characters, {name[:20]!a}...")
        if not name.isprintable():
            raise ValueError(f"the name {name!a} has characters that cannot be shown")
        if name in found:
            raise ValueError(f"the name {name!r} occurs twice")
        found[name] = value
    return found


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def _floating(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is not finite")
    return value


def _infinity(name: str) -> float:
    return float(name) if name != "NaN" else _refuse_constant(name)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _check_values(value: Any) -> None:
    pending = [(value, 1)]
    while pending:
        item, depth = pending.pop()
        if isinstance(item, str):
            if _HALF_PAIR.search(item):
                raise ValueError(f"the text {item[:40]!a} holds half of a surrogate pair")
        elif isinstance(item, (dict, list)):
            if depth > _MAX_DEPTH:
                raise ValueError(f"it nests more than {_MAX_DEPTH} levels")
            pending += [(each, depth + 1) for each in (item.values() if isinstance(item, dict) else item)]
