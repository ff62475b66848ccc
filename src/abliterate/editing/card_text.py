"""What the sections of a model card are made of, and those on its use and on what was left alone."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
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
    """Return a number with four significant digits, or "not measured" for what is not one."""
    return f"{value:.4g}" if is_number(value) else NOT_MEASURED


def mapping(value: Any) -> dict[str, Any]:
    """Return a mapping as it is, and an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def is_number(value: Any) -> bool:
    """Return whether a value from JSON is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def local_name(record: dict[str, Any]) -> str:
    """Return the last part of a local base's path: the rest may say more than its owner wants to publish."""
    return str(record["base"]["model"]).rstrip("/").rpartition("/")[2] or "model"


def how_to_merge(record: dict[str, Any], title: str) -> str:
    """Return the section on how an adapter is used."""
    base = record["base"]
    name, revision = (base["model"], base["revision"]) if base.get("revision") else (local_name(record), None)
    loader = "".join(filter(str.isalnum, str(base.get("auto_class", "AutoModelForCausalLM"))))
    arguments = ", ".join([json.dumps(name), *([f"revision={json.dumps(revision)}"] if revision else [])])
    return (
        "## How to use it\n\nMerge it before use: some layers are read past the adapter otherwise, and a tied output "
        "head is edited by merging only.\n\n```python\nfrom peft import PeftModel\n"
        f"from transformers import {loader}\n\n"
        f'base = {loader}.from_pretrained({arguments}, dtype="auto")\n'
        f"model = PeftModel.from_pretrained(base, {json.dumps(title)}).merge_and_unload()\n```"
    )


_LOADERS = {
    "text-generation": "AutoModelForCausalLM",
    "image-text-to-text": "AutoModelForImageTextToText",
}


def how_to_use(record: dict[str, Any], title: str, *, siblings: Mapping[str, dict[str, Any]] | None = None) -> str:
    """Return the section on what runs the checkpoint: whatever runs its base; `siblings` as in `files_beside`."""
    heading = "## How to use it\n\n"
    files = [name for name in mapping(record.get("shards")) if name.endswith(".gguf")]
    if files:
        return (
            heading + f"Type, names and metadata are the base file's, so what runs that runs this: llama.cpp "
            f"(`llama-server -m` {code(files[0])}), and what is built on it."
        )
    text = (
        "Architecture, names and number formats are the base model's, but for what is said below, so what runs that "
        f"runs this: transformers, vLLM (`vllm serve` {code(title)}), and llama.cpp "
        + ("from a file below." if siblings else "after its own conversion.")
    )
    loader = _LOADERS.get(str(record["base"].get("pipeline_tag", "text-generation")))
    if loader is None:
        return heading + text
    tokenizer = "AutoTokenizer" if loader == "AutoModelForCausalLM" else "AutoProcessor"
    name = json.dumps(title)
    return (
        heading
        + text
        + (
            f"\n\n```python\nfrom transformers import {loader}, {tokenizer}\n\n"
            f'model = {loader}.from_pretrained({name}, dtype="auto")\n'
            f"{tokenizer.removeprefix('Auto').lower()} = {tokenizer}.from_pretrained({name})\n```"
        )
    )


def files_beside(siblings: Mapping[str, dict[str, Any]], *, measured: bool) -> list[str]:
    """Return the section on the same edit in GGUF files, if there are any.

    Args:
        siblings: The record's name in the repository -> its content, of each.
        measured: Whether the card tells measurements, which are of the checkpoint.
    """
    rows = [
        (code(name), _gguf_types(record), f"{entry['bytes']:,}", code(record_name))
        for record_name, record in siblings.items()
        for name, entry in sorted(record["shards"].items())
    ]
    if not rows:
        return []
    run = (
        f"llama.cpp runs them (`llama-server -m` {rows[0][0]}; of a model in parts, the first), and what is built on it"
    )
    not_measured = " The measurements below are of the checkpoint and not of these files." if measured else ""
    return [
        "## Files\n\nThe same edit, made in GGUF files of the base, each with its own record. "
        f"{run}.{not_measured}\n\n" + table(("File", "Format", "Bytes", "Record"), rows)
    ]


def _gguf_types(record: dict[str, Any]) -> str:
    counts = Counter(str(tensor.get("dtype")) for tensor in record["tensors"])
    types = " and ".join(inline(name) for name, _ in counts.most_common(2))
    return f"GGUF, edited in {types}" if types else "GGUF"


def access_notice(gated: str | None) -> list[str]:
    """Return the section on how access is given, if readers must ask for it."""
    given = {"manual": "the owner of this repository decides on each request", "auto": "it is given at once"}
    return [f"## Access\n\nReaders ask for access and agree to the terms shown there; {given[gated]}."] if gated else []


def what_was_left_alone(record: dict[str, Any]) -> list[str]:
    """Return the section on tensors that could be taken for writers to the stream and are none, if there are any."""
    listed = record.get("left_alone")
    groups = [mapping(group) for group in listed] if isinstance(listed, list) else []
    rows = [
        (code(group.get("tensors", "?")), inline(group.get("count", "?")), inline(group.get("reason", "not recorded")))
        for group in groups
    ]
    if not rows:
        return []
    return [
        "## What was left alone\n\nThese have the width of the residual stream, and are the base model's.\n\n"
        + table(("Tensors", "Number", "Why"), rows)
    ]
