"""The model card of an orthogonalized checkpoint, written from its record and its evaluation alone.

The card says what was removed, how that was measured, how to make the checkpoint again, and what follows for
its use. What is not known is left out of the front matter and said in words.
"""

import json
from typing import Any

from huggingface_hub import ModelCardData

from abliterate.checkpoints.hub import CardFacts
from abliterate.edit_in_words import how_to_reproduce, local_name, summary, what_was_done
from abliterate.markdown import NOT_MEASURED, code, inline, is_number, mapping, number, table

_TAGS = ["abliterate", "abliteration", "refusal-direction", "orthogonalization", "arxiv:2406.11717"]
_FRONT_MATTER_ORDER = ["base_model", "base_model_relation", "license", "license_name", "license_link"]
_PROMPT_SETS = {
    "harmful": "Harmful prompts",
    "harmless": "Harmless prompts",
    "borderline": "Safe prompts that look unsafe",
}
_REFUSALS_REMOVED = """\
- The refusals of the base model were removed on purpose. **Safety is reduced**: this model may follow harmful
  requests that the base model refuses, and nothing was put in the place of the refusals."""
_REFUSALS_INDUCED = """\
- What the base model refuses was changed on purpose: this model is steered towards refusing, harmless requests
  too. **That makes it no safer**: what it still answers has not been checked."""
_SAFETY_NOTICE = """\
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
    is_adapter = record.get("format") == "adapter"
    front_matter = ModelCardData(
        base_model=base_id,
        base_model_relation=("adapter" if is_adapter else "finetune") if base_id else None,
        license=facts.license,
        license_name=facts.license_name if facts.license else None,
        license_link=facts.license_link if facts.license else None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[*_TAGS, "lora"] if is_adapter else _TAGS,
    )
    tool = code("abliterate " + str(record.get("tool", {}).get("version", "")))
    made = "A LoRA adapter. Merged into its base, it gives this model: " if is_adapter else ""
    introduction = (
        f"# {inline(title)}\n\n{made}{_base_in_words(record, facts)} {summary(record)} by {tool} "
        "(the method of arXiv 2406.11717). No training took place."
    )
    sections = [
        f"---\n{front_matter.to_yaml(original_order=_FRONT_MATTER_ORDER)}\n---\n",
        introduction,
        _safety_notice(record),
        *([_how_to_merge(record, title)] if is_adapter else []),
        what_was_done(record),
        _how_it_was_measured(evaluation),
        how_to_reproduce(record, evaluation),
        _licence(facts),
        _CITATION,
    ]
    return "\n\n".join(section.strip("\n") for section in sections) + "\n"


def _how_to_merge(record: dict[str, Any], title: str) -> str:
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


def _safety_notice(record: dict[str, Any]) -> str:
    added = mapping(record.get("options")).get("add")
    first = _REFUSALS_INDUCED if added is not None and added > 0 else _REFUSALS_REMOVED
    return f"## Safety notice\n\n{first}\n{_SAFETY_NOTICE}"


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


def _drift(evaluation: dict[str, Any]) -> str:
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
