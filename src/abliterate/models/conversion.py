"""A GGUF file written as a safetensors checkpoint: weights, config, tokenizer, chat template, generation settings.

What a file stores in blocks stands for products and sums of a few small numbers, which are computed in float32 and need
more digits than half formats have. So float32 is the default and holds exactly what `extract` and `evaluate` see of the
file itself; a half format rounds once more, which is exact where the file is in that format throughout.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from abliterate.checkpoints.atomic_directory import check_output_directory, published_directory
from abliterate.errors import ModelError
from abliterate.files import in_one_line
from abliterate.formats.gguf_file import GgufFile, read_gguf
from abliterate.models.gguf_loading import load_gguf, load_gguf_tokenizer
from abliterate.models.loading import choose_device, class_of
from abliterate.models.machine import check_memory
from abliterate.models.options import ConvertedDtype
from abliterate.progress import SILENT, ProgressReporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHARD_SIZE = "5GB"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionReport:
    """What was read, and what was written.

    Attributes:
        source: the GGUF file.
        path: the checkpoint.
        architecture: as the file calls it.
        model_type: as transformers calls it.
        dtype: number format of the weights that were written.
        n_parameters: numbers in the model, tied ones once.
        n_bytes: of all files that were written.
        n_shards: files with weights among them.
        eos_token_ids: tokens that end an answer.
        has_chat_template: whether the file holds one.
    """

    source: Path
    path: Path
    architecture: str
    model_type: str
    dtype: str
    n_parameters: int
    n_bytes: int
    n_shards: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool


def convert_gguf(
    *,
    source: Path,
    output: Path,
    dtype: ConvertedDtype = "float32",
    overwrite: bool = False,
    name: str | None = None,
    shard_size: str = SHARD_SIZE,
    progress: ProgressReporter = SILENT,
) -> ConversionReport:
    """Write the model in a GGUF file as a safetensors checkpoint, whole or not at all.

    Args:
        source: the file.
        output: directory to make.
        dtype: number format of the weights; see the module.
        overwrite: replace `output` if it is a checkpoint or empty.
        name: what the config calls the model; by default the name of the file.
        shard_size: weights beyond it go to another file.
        progress: where to show progress.

    Raises:
        InputError: the file cannot be read, or `output` exists, and `overwrite` is false or it is no checkpoint.
        ModelError: the file is damaged, of a kind that is not read, or does not fill its model.
        CheckpointError: writing failed, as on a full disk.
        MissingDependencyError: the package `gguf` is not installed.
    """
    check_output_directory(output, overwrite=overwrite)
    header = read_gguf(source)
    label = name or source.name
    check_memory(source, name=label, dtype=dtype, device=choose_device("cpu"))
    with progress.task(f"Converting {source.name}", total=2) as advance:
        model, tokenizer = load_for_checkpoint(source, name=label, dtype=dtype)
        advance(1)
        with published_directory(output, overwrite=overwrite) as partial:
            try:
                model.save_pretrained(partial, max_shard_size=shard_size)
                tokenizer.save_pretrained(partial)
            except (ValueError, RuntimeError, TypeError, NotImplementedError) as error:
                reason = in_one_line(error)
                raise ModelError(f"{label}: transformers does not write this model ({reason})") from error
            (partial / "README.md").write_text(_card(header, label, dtype), encoding="utf-8")
        advance(1)
    stops = model.generation_config.eos_token_id
    return ConversionReport(
        source=source,
        path=output,
        architecture=header.architecture,
        model_type=str(model.config.model_type),
        dtype=dtype,
        n_parameters=model.num_parameters(),
        n_bytes=sum(file.stat().st_size for file in output.iterdir()),
        n_shards=len(list(output.glob("*.safetensors"))),
        eos_token_ids=tuple(stops) if isinstance(stops, list) else () if stops is None else (stops,),
        has_chat_template=bool(tokenizer.chat_template),
    )


def load_for_checkpoint(
    path: Path, *, name: str, dtype: ConvertedDtype = "float32"
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a GGUF file as a model that can be saved, its generation settings complete, and its tokenizer.

    Args:
        path: the file.
        name: what the config calls the model.
        dtype: number format of the weights.

    Raises:
        InputError: the file cannot be read.
        ModelError: it is damaged, of a kind that is not read, or does not fill its model.
        MissingDependencyError: the package `gguf` is not installed.
    """
    model = load_gguf(path, name=name, choose_class=class_of, dtype=dtype)
    tokenizer = load_gguf_tokenizer(path, name=name)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    cast(Any, model.generation_config).pad_token_id = pad
    return model, tokenizer


def _card(header: GgufFile, name: str, dtype: str) -> str:
    """Return a README with what the file says of its licence, which holds for the checkpoint too."""
    keys = {"license": "license", "license_name": "license.name", "license_link": "license.link"}
    said = {key: header.metadata.get(f"general.{name}") for key, name in keys.items()}
    # JSON is YAML, and a text in it cannot become more than a text.
    lines = [f"{key}: {json.dumps(value)}" for key, value in said.items() if isinstance(value, str) and value]
    front = "\n".join(["---", *lines, "---\n"]) if lines else ""
    title = str(header.metadata.get("general.name") or name)
    return f"{front}# {' '.join(title.split())}\n\nConverted from the GGUF file `{name}` to {dtype} safetensors.\n"
