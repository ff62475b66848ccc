"""Loading a model: the one way in for all stages, whole or one layer at a time.

A model that does not fit is refused before it is read. Layers are streamed once a small random model of the same kind
has shown that this gives the logits of the whole.
"""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError

from abliterate.architectures.config import MOST_LAYERS
from abliterate.architectures.tiny_config import shrink_config
from abliterate.checkpoints.checkpoint import is_of_mlx, open_checkpoint, refuse_adapter, refuse_pickles
from abliterate.checkpoints.model_source import ModelSource, as_source
from abliterate.checkpoints.safetensors_file import is_lfs_pointer, lfs_pointer
from abliterate.directions import Direction
from abliterate.errors import AbliterateError, InputError, ModelError
from abliterate.files import in_one_line, known_error, shown
from abliterate.formats.gguf_config import read_gguf_config
from abliterate.formats.gguf_file import read_gguf
from abliterate.models.chat_format import ChatFormat
from abliterate.models.chat_model import ChatModel, make_chat_model, with_response_prefix
from abliterate.models.chat_template import processor_template, start_rendering
from abliterate.models.gguf_loading import load_gguf, load_gguf_tokenizer
from abliterate.models.layer_weights import LayerWeights
from abliterate.models.loading_report import OF_MLX, check_complete
from abliterate.models.machine import check_memory
from abliterate.models.options import ModelOptions
from abliterate.models.stream import check_extractable, find_blocks
from abliterate.models.stream_probe import probe_stream
from abliterate.models.streamed_model import NotHandedOnError, StreamedChat
from abliterate.progress import SILENT, ProgressReporter

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedModel:
    """A chat model and where it comes from.

    Attributes:
        chat: the model.
        source: its files; None for a model that the caller had loaded.
    """

    chat: ChatModel
    source: ModelSource | None

    @property
    def name(self) -> str:
        """What to call the model."""
        return self.source.name if self.source else str(self.chat.model.config._name_or_path)

    @property
    def revision(self) -> str | None:
        """The commit on the Hub, where it is known."""
        return self.source.revision if self.source else None


def open_model(
    model: "str | Path | ModelSource | ChatModel",
    *,
    options: ModelOptions,
    needs_template: bool = True,
    extracts: bool = False,
    can_stream: bool = False,
    spill_directory: Path | None = None,
    progress: ProgressReporter = SILENT,
) -> OpenedModel:
    """Find and load a chat model: the way in for all stages.

    Args:
        model: a directory, a GGUF file, a Hub id, a resolved source, or a loaded model, which is given back.
        options: see `ModelOptions`.
        needs_template: see `load_chat_model`.
        extracts: refuse, before weights are read, a model from which no direction can be extracted.
        can_stream: let `options.stream_layers` count; stages that need the whole model in memory do without it.
        spill_directory: see `load_streamed_model`.
        progress: where to show progress.

    Raises:
        InputError: there is no such directory, or no such device.
        HubError: the Hub does not give the model.
        ModelError: the files do not load as a chat model, or it does not fit into memory.
        CheckpointError: an adapter lies beside the weights of a model that a direction is to be extracted from.
    """
    if isinstance(model, ChatModel):
        return OpenedModel(chat=model, source=None)
    source = as_source(model)
    if extracts:
        if source.path.is_dir():
            refuse_adapter(Path(source.name), [file.name for file in source.path.iterdir()])
        check_extractable(_read_config(source.path, name=source.name, options=options), name=source.name)
    if can_stream and options.stream_layers:
        chat: ChatModel = load_streamed_model(
            source.path, name=source.name, options=options, spill_directory=spill_directory, progress=progress
        )
        return OpenedModel(chat=chat, source=source)
    with progress.task(f"Loading {source.name}", total=1) as advance:
        chat = load_chat_model(source.path, name=source.name, options=options, needs_template=needs_template)
        advance(1)
    return OpenedModel(chat=chat, source=source)


def open_as_extracted(
    model: "str | Path | ModelSource | ChatModel",
    direction: Direction,
    *,
    options: ModelOptions,
    extracts: bool = False,
    progress: ProgressReporter = SILENT,
) -> OpenedModel:
    """Open a model as a direction was extracted from it: with its system prompt and its forced answer prefix.

    Args:
        model: see `open_model`.
        direction: the direction; a bare one says nothing.
        options: how to load and run it; a system prompt of theirs counts.
        extracts: see `open_model`.
        progress: see `open_model`.
    """
    if options.system_prompt is None:
        options = dataclasses.replace(options, system_prompt=direction.metadata.get("system_prompt"))
    opened = open_model(model, options=options, extracts=extracts, progress=progress)
    forced = str(direction.metadata.get("response_prefix") or "").removeprefix(opened.chat.chat_format.response_prefix)
    return dataclasses.replace(opened, chat=with_response_prefix(opened.chat, forced))


def load_chat_model(path: Path, *, name: str, options: ModelOptions, needs_template: bool = True) -> ChatModel:
    """Load a causal language model and its tokenizer from a local directory or GGUF file.

    Args:
        path: the directory or file.
        name: what to call the model in messages.
        options: see `ModelOptions`.
        needs_template: refuse a model without a chat template; else it is given prompts as they are.

    Raises:
        ModelError: the files do not load as such a model, or it does not fit into memory.
        InputError: the device is not there.
    """
    tokenizer = load_tokenizer(path, name=name, options=options)
    model = load_weights(path, name=name, options=options)
    return make_chat_model(model, tokenizer, name=name, options=options, needs_template=needs_template)


def load_weights(
    path: Path,
    *,
    name: str,
    options: ModelOptions,
    choose_class: "Callable[[PretrainedConfig], Any] | None" = None,
    kind: str = "a causal language model",
) -> "PreTrainedModel":
    """Load a model onto its device; half formats are run in float32 on a CPU unless the options name a dtype.

    Args:
        path: the directory, or a GGUF file, whose blocks are decoded.
        name: what to call the model in messages.
        options: see `ModelOptions`.
        choose_class: gives the class of transformers for a config; None: see `class_of`.
        kind: what that class makes of it, for messages.

    Raises:
        ModelError: the files do not load as such a model or do not hold all of it, or it does not fit into memory.
        InputError: the device is not there.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    device, trust = choose_device(options.device), options.trust_remote_code
    if options.device_map is None:
        check_memory(path, name=name, dtype=options.dtype, device=device)
    if path.is_file():
        return _load_gguf(path, name=name, options=options, device=device, choose_class=choose_class or class_of)
    dtype: Any = "auto" if options.dtype == "auto" else getattr(torch, options.dtype)
    config = _read_config(path, name=name, options=options, kind=kind)
    refuse_pickles(path, name=name)
    with known_error(f"{name} does not load as {kind}", hint=f"; {OF_MLX}" if is_of_mlx(path) else ""):
        try:
            auto_class = (choose_class or class_of)(config)
            model, report = auto_class.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                trust_remote_code=trust,
                use_safetensors=True,
                device_map=options.device_map,
                output_loading_info=True,
                **_reading(config, name=name, on_cpu=device.type == "cpu" and options.device_map is None),
            )
        except SafetensorError as error:
            _refuse_pointers(path, error)
            raise ModelError(
                f"{name}: the weights are damaged or incomplete ({in_one_line(error)}); download them again"
            ) from error
    check_complete(model, report, path=path, name=name)
    if options.device_map is None:
        is_half = model.dtype in {torch.bfloat16, torch.float16} and not getattr(model, "is_quantized", False)
        if options.dtype == "auto" and device.type == "cpu" and is_half:
            model = model.float()
        model = cast(Any, model).to(device)
    return cast("PreTrainedModel", model)


def _reading(config: "PretrainedConfig", *, name: str, on_cpu: bool) -> dict[str, Any]:
    """Return how transformers is to read weights in few bits: decoded, where nothing runs them as they are.

    Raises:
        ModelError: it does not know the format, and would take codes for numbers.
    """
    content = getattr(config, "quantization_config", None)
    if content is None:
        return {}
    from transformers import CompressedTensorsConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    content = content if isinstance(content, dict) else content.to_dict()
    if not AutoHfQuantizer.supports_quant_method(content):
        raise ModelError(
            f"{name}: is quantised ({shown(content.get('quant_method'))}) in a way that transformers does not read; "
            "use the model it was quantised from"
        )
    if on_cpu and content.get("quant_method") == "compressed-tensors":
        return {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    return {}


def _load_gguf(
    path: Path,
    *,
    name: str,
    options: ModelOptions,
    device: torch.device,
    choose_class: "Callable[[PretrainedConfig], Any]",
) -> "PreTrainedModel":
    header = read_gguf(path)
    on_cpu = device.type == "cpu" and options.device_map is None
    dtype = options.dtype if options.dtype != "auto" else "float32" if on_cpu else header.stored_dtype()
    model = load_gguf(
        path, name=name, choose_class=choose_class, dtype=dtype, device_map=options.device_map, header=header
    )
    return model if options.device_map else cast("PreTrainedModel", cast(Any, model).to(device))


def _read_config(
    path: Path, *, name: str, options: ModelOptions, kind: str = "a causal language model"
) -> "PretrainedConfig":
    from transformers import AutoConfig

    if path.is_file():
        return read_gguf_config(path, name=name)
    with known_error(f"{name} does not load as {kind}"):
        config = text_part(AutoConfig.from_pretrained(path, trust_remote_code=options.trust_remote_code))
        n_layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
        if isinstance(n_layers, int) and not 1 <= n_layers <= MOST_LAYERS:
            raise ValueError(f"its config.json says that it has {n_layers} layers")
        return config


def text_part(config: "PretrainedConfig") -> "PretrainedConfig":
    """Return the part of a config that a text model is loaded by: of a model that also speaks, what thinks."""
    return cast("PretrainedConfig", getattr(config, "thinker_config", None) or config)


def load_tokenizer(path: Path, *, name: str, options: ModelOptions) -> "PreTrainedTokenizerBase":
    """Load a model's tokenizer, with the chat template of the model's processor where it has none of its own.

    Raises:
        ModelError: the files do not load as one.
    """
    start_rendering()
    if path.is_file():
        return load_gguf_tokenizer(path, name=name)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer

    with known_error(f"{name} has no tokenizer that loads"):
        try:
            loaded = AutoTokenizer.from_pretrained(path, trust_remote_code=options.trust_remote_code)
            loaded("a")  # what is wrong in its settings may show only now
        except Exception as error:
            _refuse_pointers(path, error)
            raise
    if not getattr(loaded, "chat_template", None):
        loaded.chat_template = processor_template(path)
    return cast("PreTrainedTokenizerBase", loaded)


def _refuse_pointers(path: Path, error: Exception) -> None:
    pointer = next((file for file in sorted(path.glob("*")) if is_lfs_pointer(file)), None)
    if pointer is not None:
        raise lfs_pointer(pointer) from error


def auto_class(path: Path, *, trust_remote_code: bool = False) -> Any:
    """Return the class of transformers that loads the model in a directory, images and sound included if need be."""
    from transformers import AutoConfig

    return class_of(text_part(AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)))


def class_of(config: "PretrainedConfig") -> Any:
    """Return the class of transformers that loads a model with this config."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    # Vision-language models run on text too; most of them are not registered as causal language models.
    is_causal = type(config) in AutoModelForCausalLM._model_mapping
    is_wrapper = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if is_wrapper and not is_causal else AutoModelForCausalLM


def empty_model(path: Path, *, name: str) -> "PreTrainedModel":
    """Build the model that a directory's config.json describes, without weights and without code of its own.

    Raises:
        ModelError: transformers does not build it.
    """
    from transformers import AutoConfig

    with known_error(f"{name} is not built by transformers"), torch.device("meta"):
        # Without the False it would ask at the terminal whether to run code that comes with the model.
        config = text_part(AutoConfig.from_pretrained(path, trust_remote_code=False))
        model = class_of(config).from_config(config)
    return cast("PreTrainedModel", model)


def choose_device(device: str) -> torch.device:
    """Return the device that `--device` names; auto takes a GPU when there is one.

    Raises:
        InputError: it is not there.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device} is not there; use auto, cpu, cuda, cuda:N or mps") from error
    return chosen


_TWIN_TOLERANCE = 1e-4
_TWIN_ROWS = [[5, 17, 23, 42, 61], [7, 11, 13, 19, 3, 44, 50, 71, 9, 10, 12, 90, 33]]


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
    from transformers import GenerationConfig

    checkpoint = open_checkpoint(path)
    device = choose_device(options.device)
    if checkpoint.config.get("quantization_config"):
        raise ModelError(f"{name} is quantised; --stream-layers reads float32, float16 and bfloat16 weights only")
    tokenizer = load_tokenizer(path, name=name, options=options)
    config = _read_config(path, name=name, options=options)
    returned = try_streaming(config, name=name)
    with known_error(f"{name} does not load as a causal language model"):
        with init_empty_weights(include_buffers=False):
            model = class_of(config).from_config(
                config, dtype=_dtype(config, options, device), trust_remote_code=options.trust_remote_code
            )
        # Building without weights makes every parameter anew, tied ones too.
        model.tie_weights()
        if (path / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(path)
    chat = make_chat_model(model, tokenizer, name=name, options=options)
    return StreamedChat(
        **{field.name: getattr(chat, field.name) for field in dataclasses.fields(chat)},
        weights=LayerWeights(model=model, blocks=chat.blocks, checkpoint=checkpoint, device=device),
        returned=returned,
        spill_directory=spill_directory,
        progress=progress,
    )


def try_streaming(config: "PretrainedConfig", *, name: str) -> int:
    """Run a small random model both ways, whole and layer by layer; return how many values its blocks return.

    Args:
        config: of the model; the small one differs in its sizes only.
        name: what to call the model in messages.

    Returns:
        0 where blocks return the stream alone, and not in a tuple.

    Raises:
        ModelError: the two do not agree, there is no small model of that kind, or no direction can be extracted.
    """
    refusal = f"{name}: layers of {config.model_type} cannot be run one by one"
    try:
        chat = _twin(config)
        probe = probe_stream(chat, rows=[row[-5:] for row in _TWIN_ROWS])
        if probe.reads_embedding:
            raise ModelError(f"{refusal}: more than its first block reads what starts the stream")
        returned = set(probe.returned)
        whole = torch.stack([chat.forward([row])[0] for row in _TWIN_ROWS])
        apart = dataclasses.replace(chat, returned=max(returned)).last_logits(_TWIN_ROWS)
    except NotHandedOnError as error:
        raise ModelError(f"{refusal}: something happens between them; load it without --stream-layers") from error
    except AbliterateError:
        raise
    except Exception as error:  # by a damaged config the model's own code fails in any way that Python knows
        raise ModelError(f"{refusal}: a small model to try it on does not run ({in_one_line(error)})") from error
    if not float((apart - whole).abs().max()) <= _TWIN_TOLERANCE * float(whole.abs().max()):
        raise ModelError(f"{refusal}: in a small model the logits come out otherwise; load it without --stream-layers")
    return max(returned)


def _twin(config: "PretrainedConfig") -> StreamedChat:
    small = type(config).from_dict(shrink_config(config.to_dict()))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = class_of(small).from_config(small, dtype=torch.float32).eval()
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
