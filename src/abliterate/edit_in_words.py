"""What an edit did and how to make it again, in words, from its record alone: two sections of a model card."""

import shlex
from collections import Counter
from typing import Any

from abliterate.markdown import NOT_MEASURED, code, inline, is_number, mapping, number, table

_ROLES = {"embed": "token embedding", "attn": "attention out-projections", "mlp": "MLP out-projections"}


def local_name(record: dict[str, Any]) -> str:
    """Return the last part of a local base's path: the rest may say more than its owner wants to publish."""
    return str(record["base"]["model"]).rstrip("/").rpartition("/")[2] or "model"


def summary(record: dict[str, Any]) -> str:
    """Return what was done to the base, to be read after its name: "with its refusal direction projected out ..."."""
    coefficient = mapping(record.get("options")).get("add")
    if coefficient is not None:
        return f"with {number(coefficient)} times its refusal direction added to the activations by a bias"
    several = len(record["directions"]) > 1
    return f"with {'several directions' if several else 'its refusal direction'} projected out of the weights"


def what_was_done(record: dict[str, Any]) -> str:
    """Return the section on what was removed from the base's weights, or added to them."""
    base, options = record["base"], mapping(record.get("options"))
    directions, tensors = record["directions"], record.get("tensors", [])
    rows = [
        ("Base revision", code(base["revision"]) if base.get("revision") else "local files, no revision"),
        ("Model type", code(base.get("model_type", "unknown")) + (_UNVERIFIED if options.get("unverified") else "")),
        *(row for n, direction in enumerate(directions) for row in _direction_rows(direction, n, len(directions))),
    ]
    if options.get("add") is not None:
        rows += [("Coefficient", number(options["add"])), ("Biases edited or new", str(len(tensors)))]
        return "## What was added\n\n" + _ADDED + _RECORD + _config_changes(record) + "\n\n" + table(("", ""), rows)
    text = _REMOVED if len(directions) == 1 else _REMOVED_SEVERAL
    if any(tensor.get("norm_chain") for tensor in tensors):
        text += _THROUGH_NORMS
    if options.get("preserve_norms"):
        text += _PRESERVED
    if any(tensor.get("stored_as") for tensor in tensors):
        text += _REQUANTIZED
    if record.get("format") == "adapter":
        text += _AS_ADAPTER
    return (
        "## What was removed\n\n"
        + text
        + _RECORD
        + _config_changes(record)
        + "\n\n"
        + table(("", ""), rows + _edit_rows(record, tensors))
    )


_REMOVED = (
    "From the matrices counted below, which write to the residual stream, the part along one unit vector r, the "
    "refusal direction, was removed: W becomes W - s r (rᵀ W), with s the strength. All other tensors are the base "
    "model's, byte for byte. A tensor's share along r is |r·W| / |W|."
)
_REMOVED_SEVERAL = (
    "From the matrices counted below, which write to the residual stream, the part in the span of the directions was "
    "removed: W becomes W - s Uᵀ (U W), with orthonormal rows of U that span them and s the strength. All other "
    "tensors are the base model's, byte for byte. A tensor's share along them is |U W| / |W|."
)
_THROUGH_NORMS = (
    " Where norms stand between a matrix and the stream, the direction was taken as it is seen through them, "
    "r times their weights."
)
_PRESERVED = " What each input writes was then scaled back to its length."
_REQUANTIZED = (
    " Weights that are quantised in the base are so here: the numbers they mean were edited and stored in the same "
    "layout, rounded so that the part stays removed; rounding moves each number by up to a step of its grid."
)
_AS_ADAPTER = (
    " The adapter holds the change alone, two factors for each matrix and each bias whole; the shares below are those "
    "that merging leaves, rounded once to the base's number format."
)
_ADDED = (
    "To the input of the layer named below, at every token position, a multiple of the difference in means of "
    "harmful and harmless prompts is added, by the bias of the MLP out-projection of the layer before. All other "
    "tensors are the base model's, byte for byte."
)
_RECORD = " The full record, with the hash of each file, is in `abliteration.json`."
_UNVERIFIED = ", which is not among the types that abliterate proves exact: accepted with `--unverified`"
_TIED = {
    "edit": "the shared matrix was edited, so the output head changed too",
    "untie": "untied: the output head keeps the base model's rows",
    "skip": "not edited",
}


def _config_changes(record: dict[str, Any]) -> str:
    changes = mapping(record.get("config_changes"))
    if not changes:
        return ""
    values = ", ".join(
        f"{code(key)}, which is gone" if value is None else code(f"{key}: {str(value).lower()}")
        for key, value in changes.items()
    )
    return f" `config.json` is the base model's but for {values}."


def _edit_rows(record: dict[str, Any], tensors: list[dict[str, Any]]) -> list[tuple[str, str]]:
    options = mapping(record.get("options"))
    layers = options.get("layers")
    tied = [("Tied embeddings", _TIED.get(str(options.get("tied", "edit")), "unknown"))]
    return [
        ("Components", ", ".join(code(name) for name in options.get("components", [])) or "unknown"),
        ("Layers", f"{layers[0]} up to, not including, {layers[1]}" if layers else "all"),
        ("Strength", number(options.get("strength"))),
        *(tied if record["base"].get("tied_embeddings") else []),
        ("Tensors edited", _tensor_counts(tensors)),
        ("Largest share along the direction, before", _largest(tensors, "component_before")),
        ("Largest share along the direction, after", _largest(tensors, "component_after")),
        ("Largest part of a tensor's component that survived", _largest(tensors, "survivor")),
    ]


def _direction_rows(direction: dict[str, Any], index: int, n_directions: int) -> list[tuple[str, str]]:
    metadata = mapping(direction.get("metadata"))
    number = f" {index + 1} of {n_directions}" if n_directions > 1 else ""
    return [
        (f"Direction{number} (SHA-256 of its float32 bytes)", code(direction["sha256"])),
        (f"Found{number and f' ({index + 1})'} at", _where_found(metadata)),
        *_score_rows(metadata),
    ]


def _where_found(metadata: dict[str, Any]) -> str:
    position, layer = metadata.get("position"), metadata.get("layer")
    if position is None or layer is None:
        return "not recorded: the direction file came without its origin"
    return (
        f"the input of layer {inline(layer)}, token position {inline(position)} "
        "(difference in means, harmful - harmless)"
    )


def _score_rows(metadata: dict[str, Any]) -> list[tuple[str, str]]:
    labels = {
        "bypass": "Bypass score when selected (lower is better)",
        "induce": "Induce score when selected",
        "kl": "KL to the base when selected, by ablation, nats",
    }
    return [(label, number(metadata[key])) for key, label in labels.items() if is_number(metadata.get(key))]


def _tensor_counts(tensors: list[dict[str, Any]]) -> str:
    counts = Counter(str(tensor.get("role")) for tensor in tensors)
    parts = [f"{count} {_ROLES.get(role, inline(role))}" for role, count in counts.items()]
    return f"{len(tensors)}" + (f" ({', '.join(parts)})" if parts else "")


def _largest(tensors: list[dict[str, Any]], key: str) -> str:
    values = [float(tensor[key]) for tensor in tensors if is_number(tensor.get(key))]
    return f"{max(values):.2e}" if values else NOT_MEASURED


def how_to_reproduce(record: dict[str, Any], evaluation: dict[str, Any] | None) -> str:
    """Return the section with the commands that make the checkpoint again, and measure it if it was measured."""
    base, options = record["base"], mapping(record.get("options"))
    revision = base.get("revision")
    name = base["model"] if revision else local_name(record)
    model = [name, "--revision", revision] if revision else [name]
    directions = record["directions"]
    files = (
        ["refusal.safetensors"]
        if len(directions) == 1
        else [f"direction-{n + 1}.safetensors" for n in range(len(directions))]
    )
    orthogonalize = ["abliterate", "orthogonalize", *model]
    orthogonalize += [word for file in files for word in ("--direction", file)] + ["-o", "OUT"]
    orthogonalize += _edit_options(options) + (["--format", "adapter"] if record.get("format") == "adapter" else [])
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
    made_with = ", ".join(inline(version) for version in versions)
    return f"## How to reproduce\n\n```sh\n{block}\n```\n\nMade with these versions: {made_with}."


def _edit_options(options: dict[str, Any]) -> list[Any]:
    unverified = ["--unverified"] if options.get("unverified") else []
    if options.get("add") is not None:
        return ["--add", options["add"], *unverified]
    layers, tied = options.get("layers"), options.get("tied", "edit")
    return [
        *("--components", ",".join(options.get("components", []))),
        *(["--layers", f"{layers[0]}:{layers[1]}"] if layers else []),
        *("--strength", options.get("strength", 1.0)),
        *(["--tied", tied] if tied != "edit" else []),
        *(["--preserve-norms"] if options.get("preserve_norms") else []),
        *(["--quantized", options["quantized"]] if options.get("quantized", "refuse") != "refuse" else []),
        *unverified,
    ]


def _extract_options(direction: dict[str, Any]) -> list[Any]:
    metadata = mapping(direction.get("metadata"))
    thresholds = mapping(metadata.get("thresholds"))
    values = {
        "--seed": metadata.get("seed"),
        "--kl-threshold": thresholds.get("kl"),
        "--induce-threshold": thresholds.get("induce"),
        "--prune-layers": thresholds.get("prune_layers"),
        "--system-prompt": metadata.get("system_prompt"),
    }
    words = [word for option, value in values.items() if value is not None for word in (option, value)]
    return [*words, *(["--no-filter"] if metadata.get("filtered") is False else [])]
