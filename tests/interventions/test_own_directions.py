"""Each layer's own direction: the difference in means, without what all prompts have."""

import pytest
import torch

from abliterate.interventions.own_directions import own_directions, stream_means
from abliterate.models.chat_model import ChatModel


def test_it_is_the_difference_in_means_without_the_harmless_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    harmful, harmless = torch.randn(2, 4, 8, generator=generator, dtype=torch.float64)
    found = own_directions(harmful=harmful, harmless=harmless)
    assert found.norm(dim=1).tolist() == pytest.approx([1.0] * 4)
    assert (found * harmless).sum(dim=1).tolist() == pytest.approx([0.0] * 4, abs=1e-12)
    # It lies in the plane of the two means, on the harmful side.
    assert bool(((found * harmful).sum(dim=1) > 0).all())
    for layer in range(4):
        plane = torch.linalg.qr(torch.stack([harmful[layer], harmless[layer]]).T).Q
        torch.testing.assert_close(plane @ (plane.T @ found[layer]), found[layer])


def test_where_the_means_are_the_same_there_is_nothing() -> None:
    same = torch.ones(2, 8, dtype=torch.float64)
    assert own_directions(harmful=same, harmless=same).abs().max() == 0


def test_the_means_are_those_of_what_each_block_puts_out(chat: ChatModel) -> None:
    rows = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]
    found = stream_means(chat, rows, position=-2)
    outputs: list[list[torch.Tensor]] = [[] for _ in chat.blocks]
    for layer, block in enumerate(chat.blocks):
        block.register_forward_hook(
            lambda _module, _args, out, layer=layer: outputs[layer].append(out[0] if isinstance(out, tuple) else out)
        )
    with torch.no_grad():
        for row in rows:
            chat.model(torch.tensor([row]))
    wanted = torch.stack([torch.stack([each[0, -2] for each in of_layer]).mean(0) for of_layer in outputs])
    torch.testing.assert_close(found, wanted.double(), rtol=1e-5, atol=1e-5)
