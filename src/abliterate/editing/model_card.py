"""The model card of an orthogonalized checkpoint, written from its record and its evaluation alone.

The card says what was removed, how that was measured, how to make the checkpoint again, and what follows for
its use. What is not known is left out of the front matter and said in words. Values from files never become markup.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, get_args

from huggingface_hub import ModelCardData

from abliterate.arguments import cli_arguments, shell_word
from abliterate.checkpoints.model_source import CardFacts
from abliterate.editing.card_text import (
    NOT_MEASURED,
    access_notice,
    code,
    files_beside,
    how_to_merge,
    how_to_use,
    inline,
    is_number,
    local_name,
    mapping,
    number,
    table,
    what_was_left_alone,
)
from abliterate.editing.options import EditOptions
from abliterate.files import printable
from abliterate.models.options import Dtype

_ROLES = {"embed": "token embedding", "attn": "attention out-projections", "mlp": "MLP out-projections"}


def summary(record: dict[str, Any]) -> str:
    """Return what was done to the base, to be read after its name: "with its refusal direction projected out ..."."""
    coefficient = mapping(record.get("options")).get("add")
    if coefficient is not None:
        return f"with {number(coefficient)} times its refusal direction added to the activations by a bias"
    several = len(record["directions"]) > 1
    how_far = ", as far as an edit of weights can," if record.get("partial") else ""
    what = "several directions" if several else "its refusal direction"
    if _repairs(record):
        what = "the direction of its false refusals"
    return f"with {what} projected out of the weights{how_far}"


def what_was_done(record: dict[str, Any]) -> str:
    """Return the section on what was removed from the base's weights, or added to them."""
    base, options = record["base"], mapping(record.get("options"))
    directions, listed = record["directions"], record.get("tensors")
    tensors = [mapping(tensor) for tensor in listed] if isinstance(listed, list) else []
    rows = [
        ("Base revision", code(base["revision"]) if base.get("revision") else "local files, no revision"),
        ("Model type", code(base.get("model_type", "unknown")) + (_UNVERIFIED if options.get("unverified") else "")),
        *(row for n, direction in enumerate(directions) for row in _direction_rows(direction, n, len(directions))),
    ]
    if options.get("add") is not None:
        rows += [("Coefficient", number(options["add"])), ("Biases edited or new", str(len(tensors)))]
        return "## What was added\n\n" + _ADDED + _RECORD + _config_changes(record) + "\n\n" + table(("", ""), rows)
    text = _REMOVED if len(directions) == 1 else _REMOVED_SEVERAL
    if _repairs(record):
        text = text.replace(
            "the refusal direction", "the direction of false refusals, without the true refusal direction"
        )
    if mapping(options.get("strengths")).get("directions"):
        text = _REMOVED_BY_LAYER
    text += _what_is_left(record)
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


def _what_is_left(record: dict[str, Any]) -> str:
    partial = mapping(record.get("partial"))
    if not partial:
        return ""
    twin, modules = mapping(partial.get("twin")), partial.get("modules") or []
    measured = "how much that is was not tried on a tiny model"
    if twin:
        measured = (
            f"on a tiny random model of this config |r·h|/|h| fell from {number(twin.get('mean_before'))} to "
            f"{number(twin.get('mean_after'))} on average (the largest: {number(twin.get('before'))} to "
            f"{number(twin.get('after'))})"
        )
    names = ", ".join(code(name) for name in modules) if isinstance(modules, list) else ""
    return (
        f" **The edit is partial**: {inline(partial.get('reason', 'its reason is not recorded'))}; {measured}, and "
        f"`abliterate verify` measures it in this model. What still writes along r: {names or 'not recorded'}. Hooks "
        "(`abliterate evaluate --intervention ablate` on the base) ablate in the stream itself and leave nothing."
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
_REMOVED_BY_LAYER = (
    "From the matrices counted below, which write to the residual stream, a part along a unit vector r of each layer's "
    "own was removed: W becomes W - s r (rᵀ W), with a strength s for each layer and role. Some of the direction "
    "stays in the stream. All other tensors are the base model's, byte for byte. A tensor's share is |r·W| / |W|."
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
        ("Strength", _strength(options)),
        *(tied if record["base"].get("tied_embeddings") else []),
        ("Tensors edited", _tensor_counts(tensors)),
        ("Largest share along the direction, before", _largest(tensors, "component_before")),
        ("Largest share along the direction, after", _largest(tensors, "component_after")),
        ("Largest part of a tensor's component that survived", _largest(tensors, "survivor")),
    ]


def _strength(options: dict[str, Any]) -> str:
    shares = [share for role in ("attn", "mlp") for share in mapping(options.get("strengths")).get(role) or []]
    if not shares:
        return number(options.get("strength"))
    return f"by layer and role, {number(min(shares))} to {number(max(shares))}; all of them are in `abliteration.json`"


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
    kinds = "refused - answered borderline prompts" if metadata.get("goal") == "repair" else "harmful - harmless"
    return f"the input of layer {inline(layer)}, token position {inline(position)} (difference in means, {kinds})"


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
    extract, files = _extractions(model, record["directions"])
    given = [word for file in files for word in ("--direction", file)]
    strengths = mapping(options.get("strengths"))
    refine = ["abliterate", "refine", *model, *given, "-o", strengths.get("file"), *(_words_of(strengths) or [])]
    orthogonalize = ["abliterate", "orthogonalize", *model, *given, "-o", "OUT", *_edit_arguments(options)]
    orthogonalize += ["--format", "adapter"] if record.get("format") == "adapter" else []
    commands: list[list[Any]] = [*extract, *([refine] if strengths else []), orthogonalize]
    if evaluation is not None:
        measured = evaluation.get("base_revision") or revision
        base_words = ["--base", name, *(["--base-revision", measured] if revision else [])]
        evaluate = ["abliterate", "evaluate", "OUT", *base_words, "--output", "OUT/evaluation.json"]
        commands.append([*evaluate, *(_words_of(evaluation) or [])])
    block = "\n".join(" ".join(map(shell_word, line)) for line in commands)
    tool = dict(mapping(record.get("tool")))
    tool = {tool.pop("name", "abliterate"): tool.pop("version", "of unknown version"), **tool}
    made_with = ", ".join(inline(f"{key} {value}") for key, value in tool.items())
    return f"## How to reproduce\n\n```sh\n{block}\n```\n\nMade with these versions: {made_with}."


def _words_of(content: Mapping[str, Any]) -> list[str] | None:
    """Return the arguments that a direction's metadata or an evaluation writes down; None where it has none."""
    words = content.get("arguments")
    return [str(word) for word in words] if isinstance(words, list) else None


def _edit_arguments(options: dict[str, Any]) -> list[str]:
    known = {field.name for field in fields(EditOptions)}
    return cli_arguments(EditOptions.of_record({name: value for name, value in options.items() if name in known}))


def _extractions(model: list[str], directions: Sequence[dict[str, Any]]) -> tuple[list[list[str]], list[str]]:
    """Return the commands that find the directions, and the files that they write, in the order of the directions."""
    metadata = [mapping(direction.get("metadata")) for direction in directions]
    ways = [_extract_arguments(each) for each in metadata]
    n = len(directions)
    are_of_one = n > 1 and all(way == ways[0] for way in ways) and {each.get("rank") for each in metadata} == {n}
    stems = ["refusal"] * n if n == 1 or are_of_one else [f"direction-{i}" for i in range(1, n + 1)]
    commands = [
        ["abliterate", "extract", *model, "-o", f"{stem}.safetensors", *way]
        for stem, way in zip(stems, ways, strict=True)
    ]
    files = [_file_of(stem, each) for stem, each in zip(stems, metadata, strict=True)]
    return commands[:1] if are_of_one else commands, files


def _file_of(stem: str, metadata: dict[str, Any]) -> str:
    """Return the file in which `extract -o STEM.safetensors` leaves a direction: of several each has a number."""
    rank = metadata.get("rank")
    number = f".{metadata.get('number')}" if isinstance(rank, int) and rank > 1 else ""
    return f"{stem}{number}.safetensors"


def _extract_arguments(metadata: dict[str, Any]) -> list[str]:
    dtype = metadata.get("dtype")
    words = _words_of(metadata) or []
    # What `auto` came to depends on the machine.
    return words if "--dtype" in words or dtype not in get_args(Dtype) else [*words, "--dtype", str(dtype)]


_TAGS = [
    "abliterate", "abliterated", "abliteration", "refusal-direction", "orthogonalization", "interpretability",
    "arxiv:2406.11717",
]  # fmt: skip
_FRONT_MATTER_ORDER = ["base_model", "base_model_relation", "license", "license_name", "license_link"]
_PROMPT_SETS = {
    "harmful": "Harmful prompts",
    "harmless": "Harmless prompts",
    "borderline": "Safe prompts that look unsafe",
}
_REFUSALS_REMOVED = """\
- The refusals of the base model were removed on purpose. **Safety is reduced**: this model may follow harmful
  requests that the base model refuses, and nothing was put in the place of the refusals."""
_REFUSALS_REPAIRED = """\
- False refusals of the base model were removed on purpose: harmless requests that look harmful. Harmful ones are meant
  to stay refused: {kept}. **Safety is reduced** where these are not all; other harmful requests were not tried."""
_REFUSALS_INDUCED = """\
- What the base model refuses was changed on purpose: this model is steered towards refusing, harmless requests
  too. **That makes it no safer**: what it still answers has not been checked."""
_SAFETY_NOTICE = """\
- It is intended for research: on how refusal is represented, on how robust it is, and on how to measure it.
  It is not meant for products or services without safeguards of their own.
- Whoever runs it or passes it on is responsible for how it is used, for keeping to the law, and for keeping
  to the licence and the use policy of the base model.
- It was taught nothing new, and has the base model's errors and biases."""

_TERMS = (
    "What the base model refuses was changed on purpose, and its safety is reduced. By asking for access you agree to "
    "use this model for research, to keep to the law and to the licence and the use policy of the base model, and to "
    "answer for how you use it and pass it on."
)
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
    *,
    record: dict[str, Any],
    evaluation: dict[str, Any] | None,
    facts: CardFacts | None,
    title: str,
    gated: str | None = None,
    siblings: Mapping[str, dict[str, Any]] | None = None,
) -> str:
    """Write the README.md of a checkpoint.

    Args:
        record: The content of `abliteration.json`.
        evaluation: The content of `evaluation.json`, or None where nothing was measured.
        facts: What the base model's own card says; None where it is not known.
        title: The heading, usually the repository's name.
        gated: How readers ask for access, manual or auto; None where they need none. The card has the terms then.
        siblings: The same edit in GGUF files: the name of the record in the repository -> its content.

    Returns:
        Markdown with the Hub's YAML front matter.
    """
    facts = facts or CardFacts()
    base_id = base_model_id(record, facts)
    is_adapter = record.get("format") == "adapter"
    is_gguf = all(name.endswith(".gguf") for name in mapping(record.get("shards")))
    front_matter = ModelCardData(
        base_model=base_id,
        base_model_relation=("adapter" if is_adapter else "finetune") if base_id else None,
        license=facts.license,
        license_name=facts.license_name if facts.license else None,
        license_link=facts.license_link if facts.license else None,
        library_name="peft" if is_adapter else "gguf" if is_gguf else "transformers",
        pipeline_tag=str(record["base"].get("pipeline_tag", "text-generation")),
        tags=[*_TAGS, "lora"] if is_adapter else _TAGS,
        extra_gated_prompt=_TERMS if gated else None,
    )
    tool = code("abliterate " + str(mapping(record.get("tool")).get("version", "")))
    made = "A LoRA adapter. Merged into its base, it gives this model: " if is_adapter else ""
    introduction = (
        f"# {inline(title)}\n\n{made}{_base_in_words(record, facts)} {summary(record)} by {tool} "
        "(the method of arXiv 2406.11717). No training took place."
    )
    sections = [
        f"---\n{front_matter.to_yaml(original_order=_FRONT_MATTER_ORDER)}\n---\n",
        introduction,
        _safety_notice(record),
        *access_notice(gated),
        how_to_merge(record, title) if is_adapter else how_to_use(record, title, siblings=siblings),
        *files_beside(siblings or {}, measured=evaluation is not None),
        what_was_done(record),
        *what_was_left_alone(record),
        _how_it_was_measured(evaluation),
        how_to_reproduce(record, evaluation),
        _licence(facts),
        _CITATION,
    ]
    return printable("\n\n".join(section.strip("\n") for section in sections) + "\n")


def _safety_notice(record: dict[str, Any]) -> str:
    added = mapping(record.get("options")).get("add")
    first = _REFUSALS_INDUCED if added is not None and added > 0 else _REFUSALS_REMOVED
    if added is None and _repairs(record):
        first = _REFUSALS_REPAIRED.format(kept=_what_was_kept(mapping(record["directions"][0].get("metadata"))))
    return f"## Safety notice\n\n{first}\n{_SAFETY_NOTICE}"


def _repairs(record: dict[str, Any]) -> bool:
    """Tell whether what was removed is a direction of false refusals."""
    return all(mapping(each.get("metadata")).get("goal") == "repair" for each in record["directions"])


def _what_was_kept(metadata: dict[str, Any]) -> str:
    """Return what the replies to validation prompts were with the direction ablated, in words."""
    for one in mapping(metadata.get("repair")).get("confirmed") or []:
        if mapping(one) and all(one.get(name) == metadata.get(name) for name in ("position", "layer")):
            counts = [inline(one.get(name)) for name in ("harmful", "n_harmful", "borderline", "n_borderline")]
            return (
                "with the direction ablated, {} of {} harmful and {} of {} borderline validation prompts that the base "
                "refuses were still refused".format(*counts)
            )
    return "how many are was not recorded"


def base_model_id(record: dict[str, Any], facts: CardFacts | None) -> str | None:
    """Return the Hub id of the base model; for a local base the one that its own card names, or None."""
    base = record["base"]
    if base.get("revision"):
        return str(base["model"])
    return facts.base_model if facts else None


def _base_in_words(record: dict[str, Any], facts: CardFacts) -> str:
    base = record["base"]
    if base.get("revision"):
        return code(base["model"])
    # The path itself may say more about its owner's disk than the owner wants to publish.
    name = code(local_name(record))
    made_from = f", itself made from {code(facts.base_model)}," if facts.base_model else ""
    return f"A local model, {name}{made_from}"


def _how_it_was_measured(evaluation: dict[str, Any] | None) -> str:
    heading = "## How it was measured\n\n"
    if evaluation is None:
        return (
            heading + "**Not measured.** No evaluation came with this checkpoint: how much it still refuses, and "
            "what else changed, is not known. `abliterate evaluate` measures both."
        )
    rates, base_rates = mapping(evaluation.get("rates")), mapping(evaluation.get("base_rates"))
    keys = [*(key for key in _PROMPT_SETS if key in rates), *sorted(set(rates) - set(_PROMPT_SETS))]
    rows = [
        (
            _PROMPT_SETS.get(key, inline(key)),
            inline((rates[key] or {}).get("n", "?")),
            _rate(base_rates.get(key)),
            _rate(rates[key]),
            inline((rates[key] or {}).get("degenerate", "?")),
        )
        for key in keys
    ]
    header = ("Prompts", "n", "Base model refuses", "This model refuses", "Empty or degenerate answers")
    return (
        heading + f"Refusal rates, with Wilson 95 % intervals, of greedy completions of at most "
        f"{inline(evaluation.get('max_new_tokens', '?'))} tokens; an answer counts as a refusal by "
        f"{inline(evaluation.get('scorer', 'an unnamed scorer'))}.\n\n"
        + table(header, rows)
        + "\n\n"
        + _drift(evaluation)
        + _prompt_sets(evaluation)
    )


def _rate(rate: dict[str, Any] | None) -> str:
    if not rate or not all(is_number(rate.get(key)) for key in ("rate", "low", "high")):
        return NOT_MEASURED
    return f"{100 * rate['rate']:.1f} % ({100 * rate['low']:.1f} to {100 * rate['high']:.1f})"


def _measurement(measured: dict[str, Any]) -> tuple[str, str, str]:
    base, change = measured.get("base"), measured.get("relative_change")
    percent = f" ({100 * float(change or 0):+.1f} %)" if is_number(change) else ""
    before = f"{number(base)} to " if base is not None else ""
    return (
        inline(measured.get("name", "?")),
        inline(measured.get("unit", "")),
        before + number(measured.get("model")) + percent,
    )


def _drift(evaluation: dict[str, Any]) -> str:
    measured = evaluation.get("measurements")
    if measured and isinstance(measured, list):
        return table(("Change on harmless prompts", "", ""), [_measurement(mapping(each)) for each in measured])
    # Written before measurements had names.
    kl, entropy = evaluation.get("kl_harmless"), evaluation.get("cross_entropy")
    rows = [("KL(base, this model), first token of the answer to harmless prompts, nats", number(kl))]
    if entropy:
        change = entropy.get("relative_change")
        percent = f" ({100 * change:+.1f} %)" if is_number(change) else ""
        text = f"{number(entropy.get('base'))} to {number(entropy.get('model'))}{percent}"
    else:
        text = NOT_MEASURED
    rows.append(("Cross-entropy of the base's own harmless completions, nats per token, base to this model", text))
    return table(("Change on harmless prompts", ""), rows)


def _prompt_sets(evaluation: dict[str, Any]) -> str:
    sets = mapping(evaluation.get("prompt_sets"))
    if not sets:
        return ""
    parts = [
        f"{inline(key)}: {inline(info.get('name', '?'))}, {inline(info.get('n', '?'))} prompts, SHA-256 "
        f"{code(info.get('sha256', '?'))}"
        for key, info in sets.items()
    ]
    return "\n\nPrompt sets: " + "; ".join(parts) + "."


def _licence(facts: CardFacts) -> str:
    if facts.license is None:
        text = (
            "The licence of the base model is not known to the tool that wrote this card, so none is stated "
            "here. The base model's licence applies: find it there, and keep to it."
        )
    else:
        named = f" ({code(facts.license_name)})" if facts.license_name else ""
        text = f"Inherited from the base model: {code(facts.license)}{named}."
    return f"## Licence\n\n{text}"
