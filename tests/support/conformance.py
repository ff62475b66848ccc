"""The conformance check of one architecture: a tiny random model, edited on disk and loaded, keeps a clean stream.

Clean means that r . h is zero at each block's own output and before the final norm. `check` also restores each group
of edited parameters in memory, one at a time: if the stream stays clean, that group was edited needlessly. And it holds
the hooks against the files: with the direction ablated in the base the stream is as clean, and, where no norm stands
behind a writer, the same as the edited model's.
"""

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.models.inkling import modeling_inkling
from transformers.utils import logging

from abliterate.architectures.table import ARCHITECTURES, WRAPPERS
from abliterate.architectures.tiny_config import shrink_config
from abliterate.architectures.vocabulary import TOWER
from abliterate.directions import make_direction
from abliterate.editing.options import EditOptions
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.editing.record import EditedTensor
from abliterate.errors import ModelError
from abliterate.models.chat_format import ChatFormat
from abliterate.models.chat_model import ChatModel
from abliterate.models.hooks import ablate_direction, capture_stream
from abliterate.models.loading import try_streaming
from abliterate.models.stream import find_blocks
from abliterate.models.stream_probe import probe_stream
from tests.support.conformance_models import (
    BIASES,
    EXTRAS,
    FLOAT32,
    FLOAT32_ALONE,
    IN_LAYOUT_OF,
    INPUTS,
    NEUTRAL,
    STREAMS_FIRST,
    WRAPPER_EXTRAS,
)
from tests.support.tiny_models import random_direction

logging.set_verbosity_error()
logging.disable_progress_bar()

ALL_TYPES = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})
# A part of a larger model is loaded as the type that the part has of its own, which is checked as such.
WRAPPER_TYPES = sorted(
    name
    for name, wrapper in WRAPPERS.items()
    if wrapper.within is None and ARCHITECTURES[wrapper.text_type].remains is None
)
TEXT_TYPES = sorted(name for name in set(ARCHITECTURES) & set(ALL_TYPES) if ARCHITECTURES[name].remains is None)
PARTIAL_TYPES = sorted((set(ARCHITECTURES) | set(WRAPPERS)) & set(ALL_TYPES) - {*WRAPPER_TYPES, *TEXT_TYPES})
REFUSED_TYPES = sorted({*ALL_TYPES} - {*WRAPPER_TYPES, *TEXT_TYPES, *PARTIAL_TYPES})
CLEAN, DIRTY = 1e-6, 1e-3
_LISTS = ("layers", "h", "blocks")
_FINAL_NORMS = (
    "norm",
    "norm_f",
    "ln_f",
    "out_norm",
    "final_norm",
    "final_layernorm",
    "final_layer_norm",
    "layer_norm",
    "embedding_norm",
)


def merge(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` with nested `changes` applied."""
    merged = dict(config)
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if nested else copy.deepcopy(value)
    return merged


def tiny_config(model_type: str, **changes: Any) -> Any:
    """Return the shrunken default config of a model type, with the extras of its recipe."""
    default = AutoConfig.for_model(model_type)
    extras = WRAPPER_EXTRAS.get(model_type, {}) if model_type in WRAPPERS else EXTRAS.get(model_type, {})
    shrunk = merge(merge(_with_biases(shrink_config(default.to_dict())), extras), changes)
    return type(default).from_dict(
        {k: v for k, v in shrunk.items() if k not in {"architectures", "transformers_version"}}
    )


def _with_biases(config: Mapping[str, Any]) -> dict[str, Any]:
    """Switch every bias on that the text model's config can switch on, so that all of its writers are there."""
    return {
        key: _with_biases(value) if key == "text_config" else True if key in BIASES and value is False else value
        for key, value in config.items()
    }


def _auto_class(model_type: str) -> Any:
    # One text type is registered beside the models of images only.
    is_causal = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in WRAPPERS
    return AutoModelForCausalLM if is_causal else AutoModelForImageTextToText


def build_model(model_type: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Build the tiny random model of a model type in float64, its norms and biases random too."""
    model_type = IN_LAYOUT_OF.get(model_type, model_type)
    config = tiny_config(model_type, **changes)
    settings: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"}
    with whole_numbers():
        model = _auto_class(model_type).from_config(config, dtype=dtype_of(model_type), **settings)
    generator = torch.Generator().manual_seed(seed)
    starts = [(n, b) for n, b in model.named_buffers() if n.endswith("z_L_init")]
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *starts]:
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            is_scale = tensor.dim() <= 1 and name.endswith(("weight", "layer_scalar"))
            scale = 0.3 if tensor.dim() <= 1 else tensor.shape[-1] ** -0.5
            tensor.copy_(float(is_scale) + scale * noise)
    return model.eval()


def load_model(path: Path, model_type: str) -> PreTrainedModel:
    """Load a checkpoint in float64 with eager attention and experts; what transformers reports of it must be empty."""
    settings: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"}
    if model_type in IN_LAYOUT_OF:
        settings["config"] = AutoConfig.from_pretrained(path).get_text_config()
    auto_class = _auto_class(IN_LAYOUT_OF.get(model_type, model_type))
    with whole_numbers():
        model, report = auto_class.from_pretrained(
            path, dtype=dtype_of(model_type), output_loading_info=True, **settings
        )
    # Keys that are missing because they are tied are in none of these lists.
    assert not any(report.values()), f"{path.name}: {report}"
    return cast(PreTrainedModel, model.eval())


def dtype_of(model_type: str) -> torch.dtype:
    """Return what a type's tiny model runs in."""
    return torch.float32 if model_type in FLOAT32_ALONE else torch.float64


@contextmanager
def whole_numbers() -> Iterator[None]:
    """Let Inkling's vision tower be built: transformers hands torch tensors there, where it takes whole numbers."""
    scales = modeling_inkling.plan_out_scales

    def as_numbers(*args: Any, **kwargs: Any) -> list[list[int]]:
        return [[int(value) for value in row] for row in scales(*args, **kwargs).tolist()]

    with mock.patch.object(modeling_inkling, "plan_out_scales", as_numbers):
        yield


def neutralize(model: PreTrainedModel) -> PreTrainedModel:
    """Make what an edit leaves do nothing but scale the stream."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for ending, value in NEUTRAL.items():
                if name.endswith(f".{ending}") and ".layers." in name:
                    parameter.fill_(value)
    return model


def save_model(model: PreTrainedModel, path: Path, model_type: str, *, shard: str = "60KB") -> None:
    """Save a model in the layout of its type, in shards, or (where that is another's) in one file."""
    if model_type not in IN_LAYOUT_OF:
        model.save_pretrained(path, max_shard_size=shard)
        # Without it some configs say of a plain checkpoint that it is quantised.
        config = json.loads((path / "config.json").read_text())
        config.pop("quantization_config", None)
        (path / "config.json").write_text(json.dumps(config))
        return
    model.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    renamed = {re.sub(r"^model\.", "model.language_model.", name): tensor for name, tensor in tensors.items()}
    save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({"model_type": model_type, "text_config": text}))


def text_inputs(model: PreTrainedModel, model_type: str) -> dict[str, Tensor]:
    """Return token ids, enough of them that every expert is used, and what else a type needs."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(1)
    inputs = {"input_ids": torch.randint(5, min(vocabulary, 100), (3, 20), generator=generator)}
    return inputs | (INPUTS[model_type](model) if model_type in INPUTS else {})


def layer_lists(model: PreTrainedModel) -> list[tuple[str, nn.ModuleList]]:
    """Return the lists of decoder blocks, outside vision and audio towers."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and name.rpartition(".")[2] in _LISTS
        and not any(TOWER.fullmatch(part) for part in name.split("."))
    ]


def stream_component(model: PreTrainedModel, inputs: Mapping[str, Tensor], direction: Tensor) -> float:
    """Return max |r . h| / |h| over all tokens of `read_stream`."""
    return max(_component(stream, direction) for stream in read_stream(model, inputs))


def read_stream(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Return what the first block receives, what each block puts out, and what the final norm receives."""
    streams: list[Tensor] = []
    handles = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        streams.append(args[0] if args else kwargs["hidden_states"])

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        streams.append(output[0] if isinstance(output, tuple) else output)

    stacks = layer_lists(model)
    assert stacks
    try:
        for name, blocks in stacks:
            parent = model.get_submodule(name.rpartition(".")[0])
            handles.append(blocks[0].register_forward_pre_hook(before, with_kwargs=True))
            handles += [block.register_forward_hook(after) for block in blocks]
            norms = [
                getattr(parent, norm) for norm in _FINAL_NORMS if isinstance(getattr(parent, norm, None), nn.Module)
            ]
            handles += [norm.register_forward_pre_hook(before, with_kwargs=True) for norm in norms[:1]]
        with torch.no_grad():
            model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    assert len(streams) >= sum(len(blocks) + 1 for _, blocks in stacks)
    return streams


def _component(stream: Tensor, direction: Tensor) -> float:
    # Some models hold several streams side by side.
    h = stream.double().reshape(-1, len(direction))
    along, norm = (h @ direction).abs(), h.norm(dim=-1)
    assert bool(torch.isfinite(norm).all())
    return float((along / norm.clamp_min(1e-300)).max())


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What the check of one architecture found.

    Attributes:
        before: The stream's component in the base model.
        after: In the edited one.
        without: For each group of edited parameters (numbers as `*`), the component when that group is restored.
        edited_on_disk: Entries of the tensors that were edited.
        edited_in_memory: Entries of the parameters that changed.
        writers: The edited tensors on disk in words, numbers as `*`.
        hooks: What hooks see and do in the base.
        unlike_saved: Largest difference between the logits of the model that was saved and of the one that was loaded.
    """

    before: float
    after: float
    without: dict[str, float]
    edited_on_disk: int
    edited_in_memory: int
    writers: str
    hooks: "HookResult"
    unlike_saved: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HookResult:
    """What the check of the hooks found.

    Attributes:
        ablated: The stream's component in the base with the direction ablated by hooks.
        unlike_edited: Largest difference between that stream and the edited model's, over the stream's length; None
            where norms stand behind writers, so that the two are not the same.
        unlike_alone: Largest difference between the stream of a row whose direction is ablated beside rows with others,
            as candidates are scored, and that of the same row with its direction alone.
        unlike_hidden_states: Largest difference between what is recorded and transformers' `output_hidden_states`; None
            where nothing is.
        starts_at_blocks: A pass may start at any block.
        not_extracted: Why no direction can be extracted; None where one can.
        not_streamed: Why layers cannot be read one at a time; None where they can.
    """

    ablated: float
    unlike_edited: float | None
    unlike_alone: float
    unlike_hidden_states: float | None
    starts_at_blocks: bool | None
    not_extracted: str | None
    not_streamed: str | None


def shortcomings(model_type: str, result: Result) -> list[str]:
    """Return what docs/architectures.md promises of a type that is edited and does not hold; empty if all does."""
    hooks = result.hooks
    holds = {
        "the base's stream has the direction": result.before > DIRTY,
        "the edited model's stream is clean": result.after < CLEAN,
        "each group of edits is needed": min(result.without.values()) > max(CLEAN, 100 * result.after),
        # Every entry that was edited on disk is one that the model has, and no other changed.
        "what is edited on disk is what changes in memory": result.edited_on_disk == result.edited_in_memory,
        "hooks keep the stream clean": hooks.ablated < (1e-6 if model_type in FLOAT32 else 1e-9),
        "hooks give the edited model's stream": (hooks.unlike_edited or 0) < 1e-6,
        "rows with directions of their own are as each alone": hooks.unlike_alone
        < (1e-5 if model_type in FLOAT32_ALONE else 1e-6),
        "what is loaded is what was saved": result.unlike_saved
        < (1e-5 if model_type in {*FLOAT32, *FLOAT32_ALONE} else 1e-6),
        "what is recorded is what transformers shows": (hooks.unlike_hidden_states or 0) < 1e-9,
    }
    return [promise for promise, kept in holds.items() if not kept]


def check(model_type: str, work: Path, *, model: PreTrainedModel | None = None, shard: str = "60KB") -> Result:
    """Save a tiny model, edit it with the real `orthogonalize_checkpoint`, load it and look at its stream."""
    model = model or build_model(model_type)
    save_model(model, work / "base", model_type, shard=shard)
    expected = logits_of(model, text_inputs(model, model_type))
    del model
    return check_saved(model_type, work, expected=expected)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialResult:
    """What the check of an architecture of whose stream no edit cleans all found.

    Attributes:
        whole: The check of a model in which what remains is neutral, so that the edit must be exact.
        mean_before: Mean |r . h| / |h| in the base, what remains as random as all else.
        mean_after: In the edited one.
        ablated: The largest in the base ablated by hooks.
    """

    whole: Result
    mean_before: float
    mean_after: float
    ablated: float


def partial_shortcomings(model_type: str, result: PartialResult) -> list[str]:
    """Return what docs/architectures.md promises of a type that is edited partially and does not hold."""
    holds = {
        "the edit leaves clearly less": CLEAN < result.mean_after < 0.8 * result.mean_before,
        "hooks keep the stream clean": result.ablated < (1e-6 if model_type in FLOAT32 else 1e-9),
    }
    missing = [promise for promise, kept in holds.items() if not kept]
    return missing + [f"without what remains {each}" for each in shortcomings(model_type, result.whole)]


def check_partial(model_type: str, work: Path) -> PartialResult:
    """Check a type of whose stream no edit cleans all: exactly with what remains neutral, and how much is left."""
    (work / "whole").mkdir()
    whole = check(model_type, work / "whole", model=neutralize(build_model(model_type)))
    save_model(build_model(model_type), work / "base", model_type)
    base = load_model(work / "base", model_type)
    vectors = torch.linalg.qr(torch.randn(base.config.get_text_config().hidden_size, 8, dtype=torch.float64)).Q.T
    orthogonalize_checkpoint(
        source=work / "base",
        direction=[make_direction(mean_difference=vector) for vector in vectors],
        output=work / "edited",
        options=EditOptions(partial=True),
    )
    edited, inputs = load_model(work / "edited", model_type), text_inputs(base, model_type)
    with ablate_direction(as_chat(base), vectors[0]):
        ablated = max(_component(stream, vectors[0]) for stream in read_stream(base, inputs))
    means = [
        torch.stack([_mean(stream, vectors) for stream in read_stream(model, inputs)]).mean()
        for model in (base, edited)
    ]
    return PartialResult(whole=whole, mean_before=float(means[0]), mean_after=float(means[1]), ablated=ablated)


def _mean(stream: Tensor, vectors: Tensor) -> Tensor:
    h = stream.double().reshape(-1, vectors.shape[-1])
    return ((h @ vectors.T).abs() / h.norm(dim=-1, keepdim=True)).mean()


def logits_of(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return all logits."""
    with torch.no_grad():
        return cast(Tensor, model(**inputs, use_cache=False).logits)


def check_saved(model_type: str, work: Path, *, expected: Tensor | None = None) -> Result:
    """Edit the checkpoint in `work`/base and look at its stream.

    Args:
        model_type: Its type.
        work: Where it lies, and what is made of it.
        expected: The logits of the model that was saved there, on `text_inputs`.
    """
    base = load_model(work / "base", model_type)
    d_model = base.config.get_text_config().hidden_size
    given = make_direction(mean_difference=random_direction(d_model))
    options = EditOptions(partial=model_type in PARTIAL_TYPES)
    report = orthogonalize_checkpoint(source=work / "base", direction=given, output=work / "edited", options=options)
    direction = given.vector.double() / given.vector.double().norm()
    edited = load_model(work / "edited", model_type)
    inputs = text_inputs(base, model_type)
    before = stream_component(base, inputs, direction)
    after = stream_component(edited, inputs, direction)
    groups = changed_parameters(base, edited)
    return Result(
        before=before,
        after=after,
        without={name: _without(edited, group, inputs, direction) for name, group in groups.items()},
        edited_on_disk=sum(_entries(tensor.edit.info.shape) for tensor in report.tensors),
        edited_in_memory=sum(changed.numel() for group in groups.values() for changed, _ in group),
        writers=describe_writers(report.tensors),
        hooks=check_hooks(base, edited, inputs, direction),
        unlike_saved=0.0 if expected is None else float((logits_of(base, inputs) - expected).abs().max()),
    )


def as_chat(model: PreTrainedModel) -> ChatModel:
    """Wrap a model without a tokenizer; it is run on token ids."""
    text = model.config.get_text_config(decoder=True)
    return ChatModel(
        model=model,
        tokenizer=cast(Any, SimpleNamespace(pad_token_id=0, eos_token_id=0)),
        blocks=find_blocks(model, int(text.num_hidden_layers), "the model"),
        d_model=int(text.hidden_size),
        chat_format=ChatFormat(n_positions=0, post_instruction_tokens=()),
    )


def check_hooks(
    base: PreTrainedModel, edited: PreTrainedModel, inputs: Mapping[str, Tensor], direction: Tensor
) -> HookResult:
    """Ablate a direction by hooks, record, and ask whether a direction can be extracted and layers streamed."""
    chat = as_chat(base)
    with ablate_direction(chat, direction):
        ablated = read_stream(base, inputs)
    has_norms = any(writer.has_norm for block in chat.stream.blocks for writer in block.writers)
    has_norms |= any(each.module is not base.get_input_embeddings() for each in chat.stream.embeddings)
    starts, not_extracted, not_streamed = None, None, None
    try:
        starts = probe_stream(chat, rows=[[5, 17, 23, 42, 61], [7, 11, 13, 19, 3]]).starts_at_blocks
    except ModelError as error:
        not_extracted = str(error).partition(": ")[2].partition(";")[0]
    try:
        with whole_numbers():
            try_streaming(base.config, name=base.config.model_type)
    except ModelError as error:
        not_streamed = str(error).partition(": ")[2].partition(";")[0]
    return HookResult(
        ablated=max(_component(stream, direction) for stream in ablated),
        unlike_edited=None if has_norms else _largest_difference(ablated, read_stream(edited, inputs)),
        unlike_alone=0.0 if base.config.model_type in STREAMS_FIRST else _unlike_alone(chat, inputs),
        unlike_hidden_states=None if chat.stream.not_extracted else _unlike_hidden_states(chat, inputs),
        starts_at_blocks=starts,
        not_extracted=not_extracted,
        not_streamed=not_streamed,
    )


def _largest_difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    pairs = zip(first, second, strict=True)
    return max(
        float(((a - b).double().norm(dim=-1) / a.double().norm(dim=-1).clamp_min(1e-300)).max()) for a, b in pairs
    )


def _unlike_alone(chat: ChatModel, inputs: Mapping[str, Tensor]) -> float:
    n_rows = len(inputs["input_ids"])
    directions = torch.randn(n_rows, chat.d_model, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with ablate_direction(chat, directions):
        together = read_stream(chat.model, inputs)
    worst = 0.0
    for row in range(n_rows):
        with ablate_direction(chat, directions[row]):
            alone = read_stream(chat.model, inputs)
        worst = max(worst, _largest_difference([s[row] for s in alone], [s[row] for s in together]))
    return worst


def _unlike_hidden_states(chat: ChatModel, inputs: Mapping[str, Tensor]) -> float:
    recorded: list[Tensor] = []
    with torch.no_grad(), capture_stream(chat, lambda _layer, hidden: recorded.append(hidden)):
        hidden_states = chat.model(**inputs, use_cache=False, output_hidden_states=True).hidden_states
    assert len(hidden_states) == chat.n_layers + 1
    # The last of them is normed. Mamba's are each block's output instead of its input.
    aligned = min(
        (recorded[start : start + chat.n_layers] for start in (0, 1)),
        key=lambda streams: _largest_difference(streams[:1], hidden_states[:1]),
    )
    return _largest_difference(aligned, hidden_states[: chat.n_layers])


def describe_writers(tensors: Sequence[EditedTensor]) -> str:
    """Return the names of edited tensors within their layers, each once, with the norms that they are seen through."""
    described = {}
    for tensor in tensors:
        name = _generic(tensor.name)
        writer = tensor.edit.writer
        norms = [norm.weight.removesuffix(".weight") for norm in writer.norm_chain]
        through = [_generic(norm).rpartition(".*.")[2].rpartition(".")[2] for norm in norms]
        within = re.sub(r"^.*?(layers|h|blocks|block)\.\*\.", "", name) if writer.layer is not None else name
        within = within.removesuffix(".weight")
        axis = f" [axis {writer.residual_axis}]" if writer.layer is not None and writer.residual_axis else ""
        described[f"`{within}`{axis}{' through ' + ', '.join(through) if through else ''}"] = None
    return ", ".join(sorted(described))


def _generic(name: str) -> str:
    return re.sub(r"(?<![^.])[0-9]+(?![^.])", "*", name)


def _entries(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def changed_parameters(base: PreTrainedModel, edited: PreTrainedModel) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Return the tensors of `edited` that differ from `base`, each with its original, by name with numbers as `*`."""
    originals = dict([*base.named_parameters(), *base.named_buffers()])
    groups: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, tensor in [*edited.named_parameters(), *edited.named_buffers()]:
        if name in originals and not torch.equal(tensor, originals[name]):
            groups.setdefault(_generic(name), []).append((tensor, originals[name]))
    return groups


def _without(
    edited: PreTrainedModel, group: list[tuple[Tensor, Tensor]], inputs: Mapping[str, Tensor], direction: Tensor
) -> float:
    kept = [changed.detach().clone() for changed, _ in group]
    with torch.no_grad():
        for changed, original in group:
            changed.copy_(original)
        component = stream_component(edited, inputs, direction)
        for (changed, _), value in zip(group, kept, strict=True):
            changed.copy_(value)
    return component
