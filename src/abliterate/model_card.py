"""The model card of an orthogonalized checkpoint, written from its record and its evaluation alone.

The card says what was removed, how that was measured, how to make the checkpoint again, and what follows for
its use. What is not known is left out of the front matter and said in words.
"""

import math
import shlex
from collections import Counter
from collections.abc import Sequence
from typing import Any

from huggingface_hub import ModelCardData

from abliterate.hub import CardFacts

_TAGS = ["abliterate", "abliteration", "refusal-direction", "orthogonalization", "arxiv:2406.11717"]
_FRONT_MATTER_ORDER = ["base_model", "base_model_relation", "license", "license_name", "license_link"]
_ROLES = {"embed": "token embedding", "attn": "attention out-projections", "mlp": "MLP out-projections"}
_PROMPT_SETS = {
    "harmful": "Harmful prompts",
    "harmless": "Harmless prompts",
    "borderline": "Safe prompts that look unsafe",
}
_NOT_MEASURED = "not measured"

_SAFETY_NOTICE = """\
## Safety notice

- The refusals of the base model were removed on purpose. **Safety is reduced**: this model may follow harmful
  requests that the base model refuses, and nothing was put in the place of the refusals.
- It is intended for research: on how refusal is represented, on how robust it is, and on how to measure it.
  It is not meant for products or services without safeguards of their own.
- Whoever runs it or passes it on is responsible for how it is used, for keeping to the law, and for keeping
  to the licence and the use policy of the base model.
- It was taught nothing new, and has the base model's errors and biases."""

_CITATION = """\
## Citation

The method is that of the paper [arXiv 2406.11717](https://arxiv.org/abs/2406.11717):

```bibtex
@article{arditi2024refusal,
  title   = {Refusal in Language Models Is Mediated by a Single Direction},
  author  = {Arditi, Andy and Obeso, Oscar and Syed, Aaquib and Paleka, Daniel and Panickssery, Nina and
             Gurnee, Wes and Nanda, Neel},
  journal = {arXiv preprint arXiv:2406.11717},
  year    = {2024}
}
```"""


def build_model_card(
    *, record: dict[str, Any], evaluation: dict[str, Any] | None, facts: CardFacts | None, title: str
) -> str:
    """Write the README.md of a checkpoint.

    Args:
        record: The content of `abliteration.json`.
        evaluation: The content of `evaluation.json`, or None where nothing was measured.
        facts: What the base model's own card says; None where it is not known.
        title: The heading, usually the repository's name.

    Returns:
        Markdown with the Hub's YAML front matter.
    """
    facts = facts or CardFacts()
    base_id = base_model_id(record, facts)
    front_matter = ModelCardData(
        base_model=base_id,
        base_model_relation="finetune" if base_id else None,
        license=facts.license,
        license_name=facts.license_name if facts.license else None,
        license_link=facts.license_link if facts.license else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=_TAGS,
    )
    introduction = (
        f"# {_inline(title)}\n\n{_base_in_words(record, facts)} with its refusal direction projected "
        f"out of the weights by {_code('abliterate ' + str(record.get('tool', {}).get('version', '')))} "
        "(the method of arXiv 2406.11717). No training took place."
    )
    sections = [
        f"---\n{front_matter.to_yaml(original_order=_FRONT_MATTER_ORDER)}\n---\n",
        introduction,
        _SAFETY_NOTICE,
        _what_was_removed(record),
        _how_it_was_measured(evaluation),
        _how_to_reproduce(record, evaluation),
        _licence(facts),
        _CITATION,
    ]
    return "\n\n".join(section.strip("\n") for section in sections) + "\n"


def base_model_id(record: dict[str, Any], facts: CardFacts | None) -> str | None:
    """Return the Hub id of the base model; for a local base the one that its own card names, or None."""
    base = record["base"]
    if base.get("revision"):
        return str(base["model"])
    return facts.base_model if facts else None


def _base_in_words(record: dict[str, Any], facts: CardFacts) -> str:
    base = record["base"]
    if base.get("revision"):
        return _code(base["model"])
    # The path itself may say more about its owner's disk than the owner wants to publish.
    name = _code(_local_name(record))
    made_from = f", itself made from {_code(facts.base_model)}," if facts.base_model else ""
    return f"A local model, {name}{made_from}"


def _local_name(record: dict[str, Any]) -> str:
    return str(record["base"]["model"]).rstrip("/").rpartition("/")[2] or "model"


def _what_was_removed(record: dict[str, Any]) -> str:
    base, directions, options = record["base"], record["directions"], record.get("options", {})
    tensors = record.get("tensors", [])
    layers = options.get("layers")
    rows = [
        ("Base revision", _code(base["revision"]) if base.get("revision") else "local files, no revision"),
        ("Model type", _code(base.get("model_type", "unknown"))),
        *(row for n, direction in enumerate(directions) for row in _direction_rows(direction, n, len(directions))),
        ("Components", ", ".join(_code(name) for name in options.get("components", [])) or "unknown"),
        ("Layers", f"{layers[0]} up to, not including, {layers[1]}" if layers else "all"),
        ("Strength", _number(options.get("strength"))),
        ("Tensors edited", _tensor_counts(tensors)),
        ("Largest share along the direction, before", _largest(tensors, "component_before")),
        ("Largest share along the direction, after", _largest(tensors, "component_after")),
    ]
    return (
        "## What was removed\n\n"
        "From the matrices counted below, which write to the residual stream, the part along one unit "
        "vector r, the refusal direction, was removed: W becomes W - s r (rᵀ W), with s the strength. "
        "All other tensors are the base model's, byte for byte. A tensor's share along r is |r·W| / |W|. "
        "The full record, with the hash of each file, is in "
        "`abliteration.json`.\n\n" + _table(("", ""), rows)
    )


def _direction_rows(direction: dict[str, Any], index: int, n_directions: int) -> list[tuple[str, str]]:
    metadata = _mapping(direction.get("metadata"))
    number = f" {index + 1} of {n_directions}" if n_directions > 1 else ""
    return [
        (f"Direction{number} (SHA-256 of its float32 bytes)", _code(direction["sha256"])),
        (f"Found{number and f' ({index + 1})'} at", _where_found(metadata)),
        *_score_rows(metadata),
    ]


def _where_found(metadata: dict[str, Any]) -> str:
    position, layer = metadata.get("position"), metadata.get("layer")
    if position is None or layer is None:
        return "not recorded: the direction file came without its origin"
    return (
        f"the input of layer {_inline(layer)}, token position {_inline(position)} "
        "(difference in means, harmful - harmless)"
    )


def _score_rows(metadata: dict[str, Any]) -> list[tuple[str, str]]:
    labels = {
        "bypass": "Bypass score when selected (lower is better)",
        "induce": "Induce score when selected",
        "kl": "KL to the base when selected, by ablation, nats",
    }
    return [(label, _number(metadata[key])) for key, label in labels.items() if _is_number(metadata.get(key))]


def _tensor_counts(tensors: list[dict[str, Any]]) -> str:
    counts = Counter(str(tensor.get("role")) for tensor in tensors)
    parts = [f"{count} {_ROLES.get(role, _inline(role))}" for role, count in counts.items()]
    return f"{len(tensors)}" + (f" ({', '.join(parts)})" if parts else "")


def _largest(tensors: list[dict[str, Any]], key: str) -> str:
    values = [float(tensor[key]) for tensor in tensors if _is_number(tensor.get(key))]
    return f"{max(values):.2e}" if values else _NOT_MEASURED


def _how_it_was_measured(evaluation: dict[str, Any] | None) -> str:
    heading = "## How it was measured\n\n"
    if evaluation is None:
        return (
            heading + "**Not measured.** No evaluation came with this checkpoint: how much it still refuses, and "
            "what else changed, is not known. `abliterate evaluate` measures both."
        )
    rates, base_rates = _mapping(evaluation.get("rates")), _mapping(evaluation.get("base_rates"))
    keys = [*(key for key in _PROMPT_SETS if key in rates), *sorted(set(rates) - set(_PROMPT_SETS))]
    rows = [
        (
            _PROMPT_SETS.get(key, _inline(key)),
            _inline((rates[key] or {}).get("n", "?")),
            _rate(base_rates.get(key)),
            _rate(rates[key]),
            _inline((rates[key] or {}).get("degenerate", "?")),
        )
        for key in keys
    ]
    header = ("Prompts", "n", "Base model refuses", "This model refuses", "Empty or degenerate answers")
    return (
        heading + f"Refusal rates, with Wilson 95 % intervals, of greedy completions of at most "
        f"{_inline(evaluation.get('max_new_tokens', '?'))} tokens; an answer counts as a refusal by "
        f"{_inline(evaluation.get('scorer', 'an unnamed scorer'))}.\n\n"
        + _table(header, rows)
        + "\n\n"
        + _drift(evaluation)
        + _prompt_sets(evaluation)
    )


def _rate(rate: dict[str, Any] | None) -> str:
    if not rate or not all(_is_number(rate.get(key)) for key in ("rate", "low", "high")):
        return _NOT_MEASURED
    return f"{100 * rate['rate']:.1f} % ({100 * rate['low']:.1f} to {100 * rate['high']:.1f})"


def _drift(evaluation: dict[str, Any]) -> str:
    kl, entropy = evaluation.get("kl_harmless"), evaluation.get("cross_entropy")
    rows = [("KL(base, this model), first token of the answer to harmless prompts, nats", _number(kl))]
    if entropy:
        change = entropy.get("relative_change")
        percent = f" ({100 * change:+.1f} %)" if _is_number(change) else ""
        text = f"{_number(entropy.get('base'))} to {_number(entropy.get('model'))}{percent}"
    else:
        text = _NOT_MEASURED
    rows.append(("Cross-entropy of the base's own harmless completions, nats per token, base to this model", text))
    return _table(("Change on harmless prompts", ""), rows)


def _prompt_sets(evaluation: dict[str, Any]) -> str:
    sets = _mapping(evaluation.get("prompt_sets"))
    if not sets:
        return ""
    parts = [
        f"{_inline(key)}: {_inline(info.get('name', '?'))}, {_inline(info.get('n', '?'))} prompts, SHA-256 "
        f"{_code(info.get('sha256', '?'))}"
        for key, info in sets.items()
    ]
    return "\n\nPrompt sets: " + "; ".join(parts) + "."


def _how_to_reproduce(record: dict[str, Any], evaluation: dict[str, Any] | None) -> str:
    base, options = record["base"], record.get("options", {})
    revision = base.get("revision")
    name = base["model"] if revision else _local_name(record)
    model = [name, "--revision", revision] if revision else [name]
    layers = options.get("layers")
    directions = record["directions"]
    files = (
        ["refusal.safetensors"]
        if len(directions) == 1
        else [f"direction-{n + 1}.safetensors" for n in range(len(directions))]
    )
    orthogonalize = ["abliterate", "orthogonalize", *model]
    orthogonalize += [word for file in files for word in ("--direction", file)] + ["-o", "OUT"]
    orthogonalize += ["--components", ",".join(options.get("components", []))]
    orthogonalize += ["--layers", f"{layers[0]}:{layers[1]}"] if layers else []
    orthogonalize += ["--strength", options.get("strength", 1.0)]
    commands = [
        *(
            ["abliterate", "extract", *model, "-o", file, *_extract_options(direction)]
            for file, direction in zip(files, directions, strict=True)
        ),
        orthogonalize,
        ["abliterate", "evaluate", "OUT", "--base", name, "--output", "OUT/evaluation.json"],
    ]
    if evaluation is None:
        commands.pop()
    block = "\n".join(" ".join(shlex.quote(" ".join(str(word).split())) for word in line) for line in commands)
    tool = dict(record.get("tool", {}))
    tool = {tool.pop("name", "abliterate"): tool.pop("version", "of unknown version"), **tool}
    versions = [f"{key} {value}" for key, value in tool.items()]
    made_with = ", ".join(_inline(version) for version in versions)
    return f"## How to reproduce\n\n```sh\n{block}\n```\n\nMade with these versions: {made_with}."


def _extract_options(direction: dict[str, Any]) -> list[Any]:
    metadata = _mapping(direction.get("metadata"))
    thresholds = _mapping(metadata.get("thresholds"))
    values = {
        "--seed": metadata.get("seed"),
        "--kl-threshold": thresholds.get("kl"),
        "--induce-threshold": thresholds.get("induce"),
        "--prune-layers": thresholds.get("prune_layers"),
        "--system-prompt": metadata.get("system_prompt"),
    }
    words = [word for option, value in values.items() if value is not None for word in (option, value)]
    return [*words, *(["--no-filter"] if metadata.get("filtered") is False else [])]


def _licence(facts: CardFacts) -> str:
    if facts.license is None:
        text = (
            "The licence of the base model is not known to the tool that wrote this card, so none is stated "
            "here. The base model's licence applies: find it there, and keep to it."
        )
    else:
        named = f" ({_code(facts.license_name)})" if facts.license_name else ""
        text = f"Inherited from the base model: {_code(facts.license)}{named}."
    return f"## Licence\n\n{text}"


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _inline(value: Any) -> str:
    """Put a value into running text or a table cell, with Markdown's own characters escaped."""
    text = " ".join(str(value).split())
    for character in "\\|`<>[]*_#":
        text = text.replace(character, "\\" + character)
    return text


def _code(value: Any) -> str:
    """Put a value into a code span that also holds in a table cell."""
    text = " ".join(str(value).split()).replace("`", "'").replace("|", "\\|")
    return f"`{text}`"


def _number(value: Any) -> str:
    return f"{value:.4g}" if _is_number(value) else _NOT_MEASURED


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
