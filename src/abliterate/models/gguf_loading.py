"""The model and the tokenizer in a GGUF file, loaded by transformers as a plain model.

Each stored block is decoded and the order of rows is put back to what the model class expects. Weights that the class
has no place for, or that the file lacks, are an error here.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from abliterate.errors import ModelError
from abliterate.files import known_error
from abliterate.formats.gguf_config import FREQUENCIES, alone, loads_as_a_model, read_gguf_config
from abliterate.formats.gguf_file import GgufFile, GgufTensor, read_gguf

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_gguf(
    path: Path,
    *,
    name: str,
    choose_class: "Callable[[PretrainedConfig], Any]",
    dtype: str = "float32",
    device_map: str | None = None,
    header: GgufFile | None = None,
) -> "PreTrainedModel":
    """Load the model in a GGUF file, its blocks decoded, as a plain model that can be saved.

    Args:
        path: the file.
        name: what to call the model in messages.
        choose_class: gives the class of transformers for a config.
        dtype: float32, bfloat16 or float16.
        device_map: see `ModelOptions`.
        header: of the file, where it was read before.

    Raises:
        InputError: the file cannot be read.
        ModelError: it is damaged, of a kind that transformers does not read, or does not fill the model.
        MissingDependencyError: the package `gguf` is not installed.
    """
    import torch
    from transformers import GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    header = header or read_gguf(path)
    config = read_gguf_config(path, name=name, header=header)
    with loads_as_a_model(name), alone(path) as (directory, file), _no_bar():
        loaded, report = choose_class(config).from_pretrained(
            directory,
            gguf_file=file,
            config=config,
            dtype=getattr(torch, dtype),
            device_map=device_map,
            quantization_config=GgufConfig(dequantize=True),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    with loads_as_a_model(name):
        _check_report(header, loaded, report, name=name)
    # It is marked as quantised and as not to be saved, although its weights are plain numbers by now.
    loaded.hf_quantizer = None
    for mark in ("is_quantized", "quantization_method"):
        if hasattr(loaded, mark):
            delattr(loaded, mark)
    for section in (loaded.config, config):
        if hasattr(section, "quantization_config"):
            del section.quantization_config
    loaded.config._name_or_path = name
    settings = loaded.generation_config
    settings._from_model_config = False
    stops = sorted({*_as_list(loaded.config.eos_token_id), *header.stop_tokens()})
    if stops:
        settings.eos_token_id = stops[0] if len(stops) == 1 else stops
    return cast("PreTrainedModel", loaded.eval())


def load_gguf_tokenizer(path: Path, *, name: str) -> "PreTrainedTokenizerBase":
    """Load the tokenizer in a GGUF file, its chat template with it.

    Raises:
        InputError: the file cannot be read.
        ModelError: there is none that loads.
        MissingDependencyError: the package `gguf` is not installed.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer

    read_gguf(path)
    with known_error(f"{name} has no tokenizer that loads"), alone(path) as (directory, file):
        tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=file)
    tokenizer.name_or_path = name
    return cast("PreTrainedTokenizerBase", tokenizer)


def _as_list(value: Any) -> list[int]:
    return [int(one) for one in (value if isinstance(value, list | tuple) else [value]) if one is not None]


@contextmanager
def _no_bar() -> Iterator[None]:
    """Keep transformers from drawing a bar of its own, which its switch for that does not reach."""
    from transformers import modeling_gguf_pytorch_utils

    reader: Any = modeling_gguf_pytorch_utils
    drawn = reader.tqdm
    reader.tqdm = lambda tensors, **_: tensors
    try:
        yield
    finally:
        reader.tqdm = drawn


def _check_report(header: GgufFile, model: Any, report: dict[str, Any], *, name: str) -> None:
    """Refuse a model that the file does not fill, and a file of which the model does not take everything."""
    wrong = {
        "missing_keys": "lacks",
        "unexpected_keys": "holds, but the model does not take,",
        "mismatched_keys": "holds in another shape than its config says",
    }
    for key, what in wrong.items():
        # Of a tensor that does not fit, the shapes are told besides.
        if names := sorted(found if isinstance(found, str) else found[0] for found in report[key]):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ModelError(
                f"{name}: the GGUF file {what} {', '.join(names[:3])}{more}; it would run with weights that nobody "
                "trained, so use another conversion of the model"
            )
    taken = sum(tensor.numel() for tensor in {t.data_ptr(): t for t in model.state_dict().values()}.values())
    passed_over = _passed_over(header, model)
    left = header.n_values - sum(prod(t.shape) for t in passed_over)
    if left > taken:
        raise ModelError(
            f"{name}: the GGUF file holds {left:,} values and the model takes {taken:,} of them, so transformers "
            f"leaves tensors of {header.architecture} out (biases, often); convert the original checkpoint instead"
        )


def _passed_over(header: GgufFile, model: Any) -> list[GgufTensor]:
    """Return the tensors that need no place: kept in the config, a second copy of the embedding, other heads."""
    n_layers = int(model.config.get_text_config(decoder=True).num_hidden_layers)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    found = []
    for tensor in header.tensors:
        parts = tensor.name.split(".")
        beyond = parts[0] == "blk" and parts[1].isdigit() and int(parts[1]) >= n_layers
        if tensor.name == FREQUENCIES or (tied and tensor.name == "output.weight") or beyond or "nextn" in parts:
            found.append(tensor)
    return found
