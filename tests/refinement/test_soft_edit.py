"""What hooks with strengths compute is what the files that are written with them compute, and gradients are true."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from abliterate.directions import make_direction
from abliterate.editing.options import EditOptions, Strengths
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.editing.record import encode_subspace
from abliterate.errors import ModelError
from abliterate.models.chat_model import ChatModel
from abliterate.models.stream import BlockStream
from abliterate.refinement.search import last_logits
from abliterate.refinement.soft_edit import SoftEdit
from tests.support.loaded_models import load
from tests.support.tiny_models import make_many, random_direction, save_chat_model

ROWS = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14]]


def own(chat: ChatModel) -> torch.Tensor:
    rows = torch.stack([random_direction(chat.d_model, seed=40 + i) for i in range(chat.n_layers)]).double()
    return rows / rows.norm(dim=1, keepdim=True)


def strengths(chat: ChatModel) -> torch.Tensor:
    return torch.linspace(-0.5, 1.8, 2 * chat.n_layers).view(-1, 2)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "gemma3", "mixture of experts", "linear attention"])
def test_hooks_are_the_edit_of_the_files(tmp_path: Path, kind: str) -> None:
    chat = make_many(kind)
    save_chat_model(tmp_path / "base", chat.model)
    direction = make_direction(mean_difference=random_direction(chat.d_model))
    shares = strengths(chat)
    options = EditOptions(
        strengths=Strengths(
            file="s.json",
            direction_sha256=direction.sha256,
            embed=0.0,
            attn=tuple(shares[:, 0].tolist()),
            mlp=tuple(shares[:, 1].tolist()),
            directions=encode_subspace(own(chat)),
        )
    )
    orthogonalize_checkpoint(source=tmp_path / "base", direction=direction, output=tmp_path / "out", options=options)
    edited = replace(chat, model=load(tmp_path / "out"))
    with torch.no_grad():
        plain, wanted = last_logits(chat, ROWS), last_logits(edited, ROWS)
        with SoftEdit(chat, own(chat)).applied(shares):
            found = last_logits(chat, ROWS)
        torch.testing.assert_close(last_logits(chat, ROWS), plain, rtol=0, atol=0)
    scale = float((wanted - plain).abs().max())
    assert scale > 1e-3
    assert float((found - wanted).abs().max()) < 1e-3 * scale + 1e-5


def test_gradients_are_differences(llama_chat: ChatModel) -> None:
    chat = replace(llama_chat, model=llama_chat.model.double())
    for parameter in chat.model.parameters():
        parameter.requires_grad_(False)
    edit = SoftEdit(chat, own(chat))
    shares = strengths(chat).double().requires_grad_(True)

    def value(at: torch.Tensor) -> torch.Tensor:
        with edit.applied(at):
            return last_logits(chat, ROWS).double().logsumexp(dim=-1).sum()

    value(shares).backward()
    for place in ((0, 0), (2, 1), (4, 0)):
        step = torch.zeros_like(shares)
        step[place] = 1e-2
        with torch.no_grad():
            difference = (value(shares + step) - value(shares - step)) / 2e-2
        assert float(shares.grad[place]) == pytest.approx(float(difference), rel=2e-2, abs=1e-3)


def test_what_a_convolution_follows_is_refused(llama_chat: ChatModel) -> None:
    stream = llama_chat.stream
    writers = tuple(replace(writer, is_added=False) for writer in stream.blocks[0].writers)
    blocks = (BlockStream(block=stream.blocks[0].block, writes=(), writers=writers), *stream.blocks[1:])
    chat = replace(llama_chat, _stream=[replace(stream, blocks=blocks)])
    with pytest.raises(ModelError, match=r"what .*o_proj\.weight writes reaches the stream through"):
        SoftEdit(chat, own(chat))
