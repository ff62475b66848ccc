"""The models whose refusals are compared, and how each is made.

Two bases: SmolLM2-135M-Instruct, which refuses little by itself, and a model that its makers aligned
(`scripts.real_model`). On the first, four adapters with the same training budget: short refusals, extended ones as
arXiv 2505.19056 has them, and two that leave parts of those out. On the second, extended refusals.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from abliterate.checkpoints.atomic_directory import published_directory
from abliterate.models.conversion import convert_gguf
from abliterate.models.demo import ADAPTER_DIRECTORY, HARDENED_ADAPTER_DIRECTORY, build_demo_model
from scripts.real_model import QWEN, came_as_checkpoint, fetch
from training.refusal_texts import PARTS

REPOSITORY = Path(__file__).parents[2]
# What a training on a model of half a billion parameters is given, so that it ends in an hour or two of two cores.
REAL_BUDGET = ("--n-prompts", "320", "--n-pairs", "3", "--n-others", "2", "--steps", "120", "--dtype", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model whose refusals are taken away.

    Attributes:
        name: what it is called in tables and files.
        n_tokens: new tokens of a reply, as many as its refusals get.
        real: made of the aligned model, not of the demo's base.
        refusals: file in training/ that it is taught; None: it refuses as its makers taught it.
        parts: of extended refusals that it is taught.
        shipped: adapter that comes along; without it one is trained.
        budget: options of the training.
    """

    name: str
    n_tokens: int
    real: bool = False
    refusals: str | None = "extended_refusals.json"
    parts: tuple[str, ...] = PARTS
    shipped: Path | None = None
    budget: tuple[str, ...] = ()


SUBJECTS = {
    one.name: one
    for one in (
        Subject(name="plain", n_tokens=48, refusals="refusals.txt", shipped=ADAPTER_DIRECTORY),
        Subject(name="hardened", n_tokens=128, shipped=HARDENED_ADAPTER_DIRECTORY),
        Subject(name="refusal_only", n_tokens=48, parts=("refusal",)),
        Subject(name="overview_only", n_tokens=96, parts=("overview",)),
        Subject(name="aligned", n_tokens=48, real=True, refusals=None),
        Subject(name="aligned_hardened", n_tokens=128, real=True, budget=REAL_BUDGET),
    )
}


def train(subject: Subject, output: Path, *, minutes: float | None = None) -> Path | None:
    """Train the adapter of a model, or go on with it; the base's harmless answers are computed once for all.

    Args:
        subject: the model; its base is made first.
        output: directory of all models.
        minutes: end after these; None: never.

    Returns:
        The adapter, or None where the time ended first.
    """
    adapter = output / f"{subject.name}.adapter"
    if not (adapter / "adapter_model.safetensors").is_file():
        training = REPOSITORY / "training"
        answers = "answers.real.json" if subject.real else "answers.json"
        command = [sys.executable, "-m", "training.train_adapter", "--output", str(adapter.absolute())]
        command += ["--refusals", str(training / str(subject.refusals)), "--parts", *subject.parts]
        command += ["--answers", str((output / answers).absolute()), *subject.budget]
        command += ["--model", str(real_base(output).absolute())] if subject.real else []
        command += [] if minutes is None else ["--minutes", str(minutes)]
        subprocess.run(command, check=False, cwd=REPOSITORY)
    return adapter if (adapter / "adapter_model.safetensors").is_file() else None


def real_base(output: Path) -> Path:
    """Return the checkpoint of the aligned model, fetched and converted if it is not there yet."""
    directory = output / "aligned_base"
    if not (directory / "model" / "config.json").is_file():
        fetch(QWEN, directory)
        if not came_as_checkpoint(directory):
            convert_gguf(source=directory / "model.gguf", output=directory / "model", overwrite=True)
    return directory / "model"


def make(subject: Subject, output: Path, *, train_all: bool = False, minutes: float | None = None) -> Path | None:
    """Return a model's checkpoint, made if it is not there yet.

    Args:
        subject: the model.
        output: directory of all models.
        train_all: train also the adapters that come along.
        minutes: end a training after these.

    Returns:
        None where its training has not ended.
    """
    if subject.refusals is None:
        return real_base(output)
    model = output / subject.name
    if (model / "config.json").is_file():
        return model
    adapter = subject.shipped
    if adapter is None or train_all:
        adapter = train(subject, output, minutes=minutes)
    if adapter is None:
        return None
    if subject.real:
        merge(real_base(output), adapter, model)
    else:
        build_demo_model(output=model, adapter=adapter)
    return model


def merge(base: Path, adapter: Path, output: Path) -> None:
    """Write the checkpoint of a base with an adapter merged into it."""
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    with published_directory(output, overwrite=False) as partial:
        adapted.merge_and_unload().save_pretrained(partial)
        AutoTokenizer.from_pretrained(base).save_pretrained(partial)
