"""What runs on a GPU equals what runs on the CPU, to rounding."""

import pytest
import torch

from abliterate.directions import make_direction
from abliterate.editing.options import WriteOptions
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.extraction.options import ExtractionOptions, Thresholds
from abliterate.extraction.refusal import FirstTokens
from abliterate.extraction.run import extract_direction
from abliterate.extraction.scoring import CandidateScorer
from abliterate.extraction.selection import ScoreName
from abliterate.models.chat_model import make_chat_model
from abliterate.models.loading import load_chat_model
from abliterate.models.options import ModelOptions
from abliterate.release.verification import verify_checkpoint
from tests.support.loaded_models import stored
from tests.support.tiny_models import (
    HARMFUL,
    HARMLESS,
    make_tokenizer,
    random_direction,
    save_tiny_model,
    tiny_gpt2,
    tiny_llama,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

SCORES: tuple[ScoreName, ...] = ("bypass", "induce", "kl", "ablated")
ANYTHING_PASSES = ExtractionOptions(
    n_train=16,
    n_val=8,
    filter="none",
    refusal_tokens=("I",),
    thresholds=Thresholds(kl=1e9, induce=-1e9),
    exhaustive=True,
)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_scores(make):
    found = []
    for device in ("cpu", "cuda"):
        chat = make_chat_model(make().to(device), make_tokenizer())
        shape = (chat.chat_format.n_positions, chat.n_layers, chat.d_model)
        scorer = CandidateScorer(
            chat=chat,
            candidates=torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64),
            harmful_rows=chat.encode(HARMFUL),
            harmless_rows=chat.encode(HARMLESS),
            measure=FirstTokens((70, 75)),
        )
        keys = [(-1, 1), (-2, 3), (-1, 4)]
        found.append({name: scorer.score(name, keys) for name in SCORES})
    for name in SCORES:
        for one, other in zip(found[0][name], found[1][name], strict=True):
            assert one.keys() == other.keys()
            for each in one:
                assert one[each] == pytest.approx(other[each], abs=1e-4)


@pytest.mark.parametrize("way", [{}, {"device_map": "auto"}, {"stream_layers": True}], ids=["whole", "map", "streamed"])
def test_extraction(llama_directory, way):
    on_cpu = extract_direction(model=llama_directory, options=ANYTHING_PASSES, model_options=ModelOptions(device="cpu"))
    on_gpu = extract_direction(
        model=llama_directory, options=ANYTHING_PASSES, model_options=ModelOptions(device="cuda", **way)
    )
    assert (on_gpu.report.selected.position, on_gpu.report.selected.layer) == (
        on_cpu.report.selected.position,
        on_cpu.report.selected.layer,
    )
    for one, other in zip(on_cpu.report.scores, on_gpu.report.scores, strict=True):
        for name in ("bypass", "induce", "kl"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-3)
    torch.testing.assert_close(on_cpu.direction.vector, on_gpu.direction.vector, atol=1e-5, rtol=0)


def test_completions(llama_directory):
    made = []
    for device in ("cpu", "cuda"):
        chat = load_chat_model(llama_directory, name="tiny", options=ModelOptions(device=device))
        made.append(chat.generate(chat.encode(HARMFUL), max_new_tokens=8))
    assert made[0] == made[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalized_weights(tmp_path, direction_file, dtype):
    base = save_tiny_model(tmp_path / "base", dtype=dtype)
    for device in ("cpu", "cuda"):
        orthogonalize_checkpoint(
            source=base, direction=direction_file, output=tmp_path / device, writing=WriteOptions(device=device)
        )
    on_cpu, on_gpu = stored(tmp_path / "cpu"), stored(tmp_path / "cuda")
    step = 2 * torch.finfo(dtype).eps
    for name, tensor in on_cpu.items():
        torch.testing.assert_close(on_gpu[name], tensor, atol=step, rtol=step)


def test_verification(llama_directory, tmp_path):
    direction = make_direction(mean_difference=random_direction(32))
    orthogonalize_checkpoint(source=llama_directory, direction=direction, output=tmp_path / "out")
    report = verify_checkpoint(
        checkpoint=tmp_path / "out", base=llama_directory, model_options=ModelOptions(device="cuda")
    )
    assert report.passed, report.failures
    assert report.stream is not None
    assert report.logits is not None
