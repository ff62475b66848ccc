"""Text for Markdown: tables, and values from files that must not become markup."""

import math
from collections.abc import Sequence
from typing import Any

NOT_MEASURED = "not measured"


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Return a Markdown table; its cells must be escaped already."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def inline(value: Any) -> str:
    """Put a value into running text or a table cell, with Markdown's own characters escaped."""
    text = " ".join(str(value).split())
    for character in "\\|`<>[]*_#":
        text = text.replace(character, "\\" + character)
    return text


def code(value: Any) -> str:
    """Put a value into a code span that also holds in a table cell."""
    text = " ".join(str(value).split()).replace("`", "'").replace("|", "\\|")
    return f"`{text}`"


def number(value: Any) -> str:
    """Return a number with four significant digits, or "not measured" for what is none."""
    return f"{value:.4g}" if is_number(value) else NOT_MEASURED


def mapping(value: Any) -> dict[str, Any]:
    """Return a mapping as it is, and an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def is_number(value: Any) -> bool:
    """Return whether a value from JSON is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
