"""Ablating activations by hooks and orthogonalizing the weights give the same logits, where the head is untied."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from abliterate.directions import make_direction
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.models.chat_model import ChatModel, make_chat_model
from abliterate.models.hooks import ablate_direction
from abliterate.models.loading import load_chat_model
from abliterate.models.options import ModelOptions
from tests.support.tiny_models import make_tokenizer, save_chat_model, tiny_gpt2, tiny_llama

PROMPTS = ["How do locks work?", "Explain rain.", "Write a long letter about the garden behind my house, please."]


def logits(chat: ChatModel) -> Tensor:
    """Return the logits at all tokens of the prompts, one prompt after another."""
    with torch.inference_mode():
        return torch.cat([chat.model(torch.tensor([row])).logits[0] for row in chat.encode(PROMPTS)]).double()


# transformers computes llama's norms in float32 whatever the model's dtype, so only gpt2 is float64 throughout.
@pytest.mark.parametrize(
    ("build", "dtype", "tolerance"),
    [
        (tiny_llama, torch.float32, 1e-4),
        (tiny_gpt2, torch.float32, 1e-4),
        (tiny_llama, torch.float64, 1e-4),
        (tiny_gpt2, torch.float64, 1e-10),
    ],
)
def test_ablated_base_equals_orthogonalized_checkpoint(
    tmp_path: Path, build, dtype: torch.dtype, tolerance: float
) -> None:
    model = build().to(dtype)
    save_chat_model(tmp_path / "base", model, max_shard_size="30KB")
    direction = make_direction(mean_difference=torch.randn(32, generator=torch.Generator().manual_seed(8)))
    orthogonalize_checkpoint(source=tmp_path / "base", direction=direction, output=tmp_path / "edited")
    base = make_chat_model(model, make_tokenizer())
    name = str(dtype).removeprefix("torch.")
    edited = load_chat_model(tmp_path / "edited", name="edited", options=ModelOptions(dtype="auto", device="cpu"))
    assert str(edited.model.dtype).endswith(name)
    unchanged = logits(base)
    with ablate_direction(base, direction.vector):
        ablated = logits(base)
    orthogonalized = logits(edited)
    assert (ablated - unchanged).abs().max() > 0.05
    assert (ablated - orthogonalized).abs().max() < tolerance


def test_with_tied_embeddings_the_head_changes_too_and_the_logits_differ(tmp_path: Path) -> None:
    model = tiny_llama(tied=True)
    save_chat_model(tmp_path / "base", model)
    direction = make_direction(mean_difference=torch.randn(32, generator=torch.Generator().manual_seed(8)))
    orthogonalize_checkpoint(source=tmp_path / "base", direction=direction, output=tmp_path / "edited")
    base = make_chat_model(model, make_tokenizer())
    edited = load_chat_model(tmp_path / "edited", name="edited", options=ModelOptions(device="cpu"))
    with ablate_direction(base, direction.vector):
        ablated = logits(base)
    assert (ablated - logits(edited)).abs().max() > 0.01
