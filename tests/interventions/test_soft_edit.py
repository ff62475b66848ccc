"""What hooks with strengths compute is what the files that are written with them compute, and gradients are true."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from abliterate.architectures.table import ARCHITECTURES, WRAPPERS
from abliterate.directions import encode_rows, make_direction
from abliterate.editing.options import EditOptions
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.editing.strengths import Strengths
from abliterate.errors import ModelError
from abliterate.interventions.soft_edit import SoftEdit
from abliterate.interventions.strength_search import last_logits
from abliterate.models.chat_model import ChatModel
from abliterate.models.stream import BlockStream
from tests.support.conformance import (
    TEXT_TYPES,
    WRAPPER_TYPES,
    as_chat,
    build_model,
    load_model,
    save_model,
    text_inputs,
)
from tests.support.tiny_models import random_direction

ROWS = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14]]


def _not_extracted(model_type: str) -> bool:
    text_type = WRAPPERS[model_type].text_type if model_type in WRAPPERS else model_type
    return ARCHITECTURES[text_type].not_extracted is not None


def own(chat: ChatModel) -> torch.Tensor:
    rows = torch.stack([random_direction(chat.d_model, seed=40 + i) for i in range(chat.n_layers)]).double()
    return rows / rows.norm(dim=1, keepdim=True)


def strengths(chat: ChatModel) -> torch.Tensor:
    return torch.linspace(-0.5, 1.8, 2 * chat.n_layers).view(-1, 2)


# One of each way into the stream: plain, positions, biases handed on, norms behind writers, experts in a stack and one
# by one, shared experts, other mixers, two of them in a block, parallel sub-layers.
WAYS = {
    *("llama", "gpt2", "gpt_neox_japanese", "gemma2", "gemma4_text", "olmo2", "qwen3_moe", "mixtral", "deepseek_v3"),
    *("granitemoehybrid", "falcon_h1", "nemotron_h", "qwen3_next", "zamba2", "dbrx", "cohere", "mllama"),
}
EXTRACTED = [name for name in (*TEXT_TYPES, *WRAPPER_TYPES) if not _not_extracted(name)]


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=() if name in WAYS else pytest.mark.proof) for name in EXTRACTED],
)
def test_hooks_are_the_edit_of_the_files(tmp_path: Path, model_type: str) -> None:
    save_model(build_model(model_type), tmp_path / "base", model_type)
    base = load_model(tmp_path / "base", model_type)
    chat = as_chat(base)
    direction = make_direction(mean_difference=random_direction(chat.d_model))
    shares = strengths(chat)
    options = EditOptions(
        strengths=Strengths(
            file="s.json",
            direction_sha256=direction.sha256,
            embed=0.0,
            attn=tuple(shares[:, 0].tolist()),
            mlp=tuple(shares[:, 1].tolist()),
            directions=encode_rows(own(chat).double().numpy()),
        )
    )
    orthogonalize_checkpoint(source=tmp_path / "base", direction=direction, output=tmp_path / "out", options=options)
    edited, inputs = load_model(tmp_path / "out", model_type), text_inputs(base, model_type)
    with torch.no_grad():
        plain, wanted = (model(**inputs, use_cache=False).logits for model in (base, edited))
        with SoftEdit(chat, own(chat)).applied(shares):
            found = base(**inputs, use_cache=False).logits
        assert torch.equal(base(**inputs, use_cache=False).logits, plain)
    assert float((found - wanted).norm()) < 1e-5 * float((wanted - plain).norm())


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
