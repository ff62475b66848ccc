"""Making a `StreamedChat` of a checkpoint, once a small model of its kind has shown that streaming layers is exact."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch

from abliterate.architectures.tiny_config import shrink_config
from abliterate.chat_template import ChatFormat
from abliterate.checkpoints.checkpoint import open_checkpoint
from abliterate.errors import ModelError
from abliterate.layer_weights import LayerWeights
from abliterate.model import ModelOptions, auto_class, choose_device, find_blocks, load_tokenizer, make_chat_model
from abliterate.progress import SILENT, ProgressReporter
from abliterate.streamed_model import NotHandedOnError, StreamedChat

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_TWIN_TOLERANCE = 1e-4
_TWIN_ROWS = [[5, 17, 23, 42, 61], [7, 11, 13, 19, 3, 44, 50, 71, 9, 10, 12, 90, 33]]
_CANNOT_BUILD = (ValueError, RuntimeError, TypeError, KeyError, IndexError, AttributeError, AssertionError, ImportError)


def load_streamed_model(
    path: Path,
    *,
    name: str,
    options: ModelOptions,
    spill_directory: Path | None = None,
    progress: ProgressReporter = SILENT,
) -> StreamedChat:
    """Make a chat model from a checkpoint without reading its weights.

    Args:
        path: the directory.
        name: what to call the model in messages.
        options: see `ModelOptions`.
        spill_directory: where hidden states go that do not fit into memory.
        progress: where to show progress.

    Raises:
        ModelError: it is no chat model, or one that layers cannot be streamed of.
        CheckpointError: there are no safetensors weights.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, GenerationConfig

    checkpoint = open_checkpoint(path)
    device, trust = choose_device(options.device), options.trust_remote_code
    if checkpoint.config.get("quantization_config"):
        raise ModelError(f"{name} is quantised; --stream-layers reads float32, float16 and bfloat16 weights only")
    tokenizer = load_tokenizer(path, name=name, options=options)
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
    returns_tuples = blocks_return_tuples_alone(config, name=name)
    with init_empty_weights(include_buffers=False):
        model = auto_class(path, trust_remote_code=trust).from_config(config, dtype=_dtype(config, options, device))
    # Building without weights makes every parameter anew, tied ones too.
    model.tie_weights()
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    chat = make_chat_model(model, tokenizer, name=name, options=options)
    return StreamedChat(
        **{field.name: getattr(chat, field.name) for field in dataclasses.fields(chat)},
        weights=LayerWeights(model=model, blocks=chat.blocks, checkpoint=checkpoint, device=device),
        returns_tuples=returns_tuples,
        spill_directory=spill_directory,
        progress=progress,
    )


def blocks_return_tuples_alone(config: "PretrainedConfig", *, name: str) -> bool:
    """Tell whether blocks return tuples, by running a small random model both ways: whole, and layer by layer.

    Args:
        config: of the model; the small one differs in its sizes only.
        name: what to call the model in messages.

    Raises:
        ModelError: the two do not agree, or there is no small model of that kind.
    """
    refusal = f"{name}: layers of {config.model_type} cannot be run one by one"
    try:
        chat = _twin(config)
        whole = torch.stack([chat.forward([row])[0] for row in _TWIN_ROWS])
        for returns_tuples in (False, True):
            streamed = dataclasses.replace(chat, returns_tuples=returns_tuples)
            try:
                apart = streamed.last_logits(_TWIN_ROWS)
            except NotHandedOnError:
                continue
            if float((apart - whole).abs().max()) <= _TWIN_TOLERANCE * float(whole.abs().max()):
                return returns_tuples
            raise ModelError(
                f"{refusal}: in a small model the logits come out otherwise; load it without --stream-layers"
            )
    except _CANNOT_BUILD as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{refusal}: a small model to try it on does not run ({reason})") from error
    raise ModelError(f"{refusal}: something happens between them; load it without --stream-layers")


def _twin(config: "PretrainedConfig") -> StreamedChat:
    from transformers import AutoModelForCausalLM

    small = type(config).from_dict(shrink_config(config.to_dict()))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
        for parameter in model.parameters():
            # Larger than at the start of a training, so that every part of a block shows in the logits.
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    text = model.config.get_text_config(decoder=True)
    blocks = find_blocks(model, int(text.num_hidden_layers), "the small model")
    return StreamedChat(
        model=model,
        tokenizer=cast(Any, SimpleNamespace(pad_token_id=0, eos_token_id=0)),
        blocks=blocks,
        d_model=int(text.hidden_size),
        chat_format=ChatFormat(n_positions=0, post_instruction_tokens=()),
        weights=LayerWeights(model=model, blocks=blocks, checkpoint=None, device=torch.device("cpu")),
    )


def _dtype(config: "PretrainedConfig", options: ModelOptions, device: torch.device) -> torch.dtype:
    if options.dtype != "auto":
        return cast(torch.dtype, getattr(torch, options.dtype))
    stored = config.get_text_config(decoder=True).dtype or config.dtype or torch.float32
    half = stored in {torch.bfloat16, torch.float16}
    return torch.float32 if half and device.type == "cpu" else cast(torch.dtype, stored)
