"""Recorded activations against transformers' own `output_hidden_states`."""

import torch

from abliterate.models.chat_model import ChatModel
from abliterate.models.hooks import difference_in_means, record

PROMPTS = ["How do locks work?", "Explain rain.", "Write a long letter about the garden behind my house, please."]


def test_recording_equals_output_hidden_states(chat: ChatModel) -> None:
    rows = chat.encode(PROMPTS)
    done: list[int] = []
    recording = record(chat, rows, advance=done.append)
    n_positions = chat.chat_format.n_positions
    assert recording.activations.shape == (3, n_positions, chat.n_layers, chat.d_model)
    assert sum(done) == 3
    for i, row in enumerate(rows):
        out = chat.model(torch.tensor([row]), output_hidden_states=True)
        expected = torch.stack(out.hidden_states[: chat.n_layers], dim=2)[0, -n_positions:].detach()
        assert torch.allclose(recording.activations[i], expected, atol=1e-4)
        assert torch.allclose(recording.logits[i], out.logits[0, -1].detach(), atol=1e-4)


def test_layer_zero_of_the_template_tokens_is_the_same_for_all_prompts(llama_chat: ChatModel) -> None:
    recording = record(llama_chat, llama_chat.encode(PROMPTS))
    candidates = difference_in_means(harmful=recording.activations[:2], harmless=recording.activations[2:])
    assert torch.equal(candidates[:, 0], torch.zeros_like(candidates[:, 0]))
    assert (candidates[:, 1:].norm(dim=-1) > 1e-4).all()


def test_difference_in_means_is_accumulated_in_float64() -> None:
    harmful = torch.full((3, 1, 1, 2), 16777216.0)
    harmful[2] = 16777218.0
    harmless = torch.zeros(5, 1, 1, 2)
    difference = difference_in_means(harmful=harmful, harmless=harmless)
    assert difference.dtype == torch.float64
    assert difference.flatten().tolist() == [16777216 + 2 / 3] * 2
