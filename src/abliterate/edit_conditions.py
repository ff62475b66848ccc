"""What an edit promises, from its record alone: see docs/exactness.md.

The residual stream is clean if every writer is edited at strength 1. The logits besides equal those of directional
ablation if no norm stands between a writer and the stream and the output head keeps its rows.
"""

from collections.abc import Mapping
from typing import Any

from abliterate.architectures.writers import ROLES


def reasons_against_clean_stream(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Return why the edited model's stream may still have the directions; nothing if it may not.

    Args:
        record: The content of `abliteration.json`.
    """
    options = record.get("options") or {}
    reasons = []
    strength = float(options.get("strength", 1.0))
    if strength != 1.0:
        reasons.append(f"strength is {strength:g}, so {abs(1 - strength):.3g} of the component is kept")
    if options.get("layers") is not None:
        first, end = options["layers"]
        reasons.append(f"only layers {first} to {end - 1} were edited")
    left_out = [role for role in ROLES if role not in options.get("components", ROLES)]
    if left_out:
        reasons.append(f"components left out: {', '.join(left_out)}")
    if _is_tied(record) and options.get("tied") == "skip":
        reasons.append("the tied embeddings were skipped")
    if options.get("add"):
        reasons.append("an activation addition puts the direction into the stream on purpose")
    return tuple(reasons)


def reasons_against_equal_logits(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Return why the edited model's logits need not be those of directional ablation; nothing if they must be.

    Args:
        record: The content of `abliteration.json`.
    """
    options = record.get("options") or {}
    reasons = list(reasons_against_clean_stream(record))
    if _is_tied(record) and options.get("tied", "edit") == "edit":
        reasons.append("the embeddings are tied, so the output head was edited with them")
    if options.get("preserve_norms"):
        reasons.append("norms were preserved, which scales what is left")
    if any(tensor.get("norm_chain") for tensor in record.get("tensors") or ()):
        reasons.append("norms stand between writers and the stream, so what was taken away is not the component alone")
    return tuple(reasons)


def _is_tied(record: Mapping[str, Any]) -> bool:
    return bool((record.get("base") or {}).get("tied_embeddings"))
