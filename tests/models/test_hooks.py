"""Hooks: what they do, that they did not do it before, and that nothing stays attached."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from abliterate.errors import ModelError
from abliterate.models.chat_model import ChatModel
from abliterate.models.hooks import (
    ablate_direction,
    add_direction,
    capture_inputs,
    finish_with_last_tokens,
    start_at_block,
)
from abliterate.models.stream_probe import probe_stream
from tests.support.conformance import as_chat, build_model

ROWS = [[5, 9, 17, 40, 7], [8, 11, 60, 61, 62]]


def random_direction(chat: ChatModel) -> Tensor:
    return torch.randn(chat.d_model, generator=torch.Generator().manual_seed(3))


def stream(chat: ChatModel) -> list[Tensor]:
    inputs: list[Tensor] = []
    with capture_inputs(chat, lambda _layer, hidden: inputs.append(hidden.clone())):
        chat.forward(ROWS)
    return inputs


def n_hooks(chat: ChatModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in chat.model.modules())


def test_ablation_keeps_the_direction_out_of_the_stream(chat: ChatModel) -> None:
    unit = random_direction(chat) / random_direction(chat).norm()
    before = max(float((h @ unit).abs().max() / h.norm(dim=-1).max()) for h in stream(chat)[1:])
    final: list[Tensor] = []
    handle = chat.model.get_decoder().register_forward_hook(lambda _m, _a, out: final.append(out[0]))
    with ablate_direction(chat, random_direction(chat)) as attached:
        # Watchers attached after the ablating hooks see what the block sees.
        after = max(float((h @ unit).abs().max() / h.norm(dim=-1).max()) for h in stream(chat))
    handle.remove()
    assert attached == 1 + sum(1 + len(block.writes) for block in chat.stream.blocks) == 1 + 3 * chat.n_layers
    assert before > 1e-2
    assert after < 1e-6


def test_ablation_equals_removing_the_direction_from_each_submodule(chat: ChatModel) -> None:
    """An independent computation: project the outputs of embedding, attention and MLP by hand-written hooks."""
    unit = (random_direction(chat) / random_direction(chat).norm()).to(chat.model.dtype)

    def project(_module, _args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden - torch.outer((hidden @ unit).flatten(), unit).view_as(hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    modules = [m for name, m in chat.model.named_modules() if name.endswith(("embed_tokens", "wte", "wpe"))]
    modules += [m for name, m in chat.model.named_modules() if name.rpartition(".")[2] in {"self_attn", "attn", "mlp"}]
    handles = [m.register_forward_hook(project) for m in modules]
    expected = chat.forward(ROWS)
    for handle in handles:
        handle.remove()
    base = chat.forward(ROWS)
    with ablate_direction(chat, random_direction(chat)):
        ablated = chat.forward(ROWS)
    assert (ablated - base).abs().max() > 1e-2
    assert torch.allclose(ablated, expected, atol=1e-4)


def test_a_weight_that_is_held_in_another_form_is_ablated_all_the_same(llama_chat: ChatModel) -> None:
    class Packed(torch.nn.Module):
        """As quantised layers are: no parameter called weight."""

        def __init__(self, linear: torch.nn.Linear) -> None:
            super().__init__()
            self.register_buffer("qweight", linear.weight.detach().clone())

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden @ self.qweight.T

    with ablate_direction(llama_chat, random_direction(llama_chat)) as n_plain:
        expected = llama_chat.forward(ROWS)
    for block in llama_chat.blocks:
        block.self_attn.o_proj, block.mlp.down_proj = Packed(block.self_attn.o_proj), Packed(block.mlp.down_proj)
    packed = replace(llama_chat, _stream=[])
    with ablate_direction(packed, random_direction(packed)) as n_packed:
        assert torch.allclose(packed.forward(ROWS), expected, atol=1e-5)
    assert n_packed == n_plain


def test_a_zero_vector_ablates_nothing(chat: ChatModel) -> None:
    base = chat.forward(ROWS)
    with ablate_direction(chat, torch.zeros(chat.d_model)):
        assert torch.equal(chat.forward(ROWS), base)


def test_addition_shifts_one_blocks_input_at_all_positions(chat: ChatModel) -> None:
    vector = random_direction(chat)
    before = stream(chat)
    with add_direction(chat, vector, layer=2, coefficient=-1.5) as attached:
        after = stream(chat)
    assert attached == 1
    assert torch.equal(after[1], before[1])
    assert torch.allclose(after[2] - before[2], (-1.5 * vector).expand_as(after[2]), atol=1e-5)
    assert not torch.allclose(after[3], before[3])


def test_starting_at_a_block_gives_the_same_logits(chat: ChatModel) -> None:
    hidden = stream(chat)
    expected = chat.forward(ROWS)
    calls = []
    handle = chat.stream.blocks[1].writes[-1].module.register_forward_hook(lambda *_: calls.append(1))
    returned = probe_stream(chat, rows=ROWS).returned
    for layer in (0, 2, chat.n_layers - 1):
        calls.clear()
        with start_at_block(chat, hidden[layer], layer=layer, returned=returned):
            calls.clear()
            assert torch.allclose(chat.forward(ROWS), expected, atol=1e-5)
        assert len(calls) == (1 if layer <= 1 else 0)
    handle.remove()
    assert torch.equal(chat.forward(ROWS), expected)


@pytest.mark.parametrize("n_tokens", [1, 2])
def test_the_last_mlp_may_be_run_for_the_last_tokens_alone(chat: ChatModel, n_tokens: int) -> None:
    expected = chat.forward(ROWS, n_logits=n_tokens)
    lengths = []
    owner = chat.model.get_submodule(next(one.owner for one in chat.stream.blocks[-1].writers if one.role == "mlp"))
    handle = owner.register_forward_hook(lambda _module, args, _output: lengths.append(args[0].shape[1]))
    with finish_with_last_tokens(chat, n_tokens) as n_modules:
        assert torch.allclose(chat.forward(ROWS, n_logits=n_tokens), expected, atol=1e-5)
    handle.remove()
    assert n_modules == 1
    assert lengths == [n_tokens]
    assert torch.equal(chat.forward(ROWS, n_logits=n_tokens), expected)


def test_hooks_are_removed_whatever_happens(chat: ChatModel) -> None:
    vector = random_direction(chat)
    attached_before = n_hooks(chat)
    base = chat.forward(ROWS)
    for intervention in (
        ablate_direction(chat, vector),
        add_direction(chat, vector, layer=1),
        capture_inputs(chat, lambda *_: None),
        start_at_block(chat, torch.zeros(2, 5, chat.d_model), layer=3, returned=[0] * 3),
    ):
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            with intervention:
                assert n_hooks(chat) > attached_before
                raise KeyboardInterrupt
    assert n_hooks(chat) == attached_before
    assert torch.equal(chat.forward(ROWS), base)


def test_a_direction_of_another_width_is_refused(chat: ChatModel) -> None:
    with pytest.raises(ModelError, match="width is 32"), ablate_direction(chat, torch.ones(31)):
        pass


def test_of_several_streams_side_by_side_each_is_edited() -> None:
    model = build_model("qwen4_exp_text").float()
    chat = as_chat(model)
    direction = random_direction(chat)
    unit = direction / direction.norm()

    def apart(hidden: Tensor) -> Tensor:
        return hidden.unflatten(-1, (-1, chat.d_model))

    plain = stream(chat)
    with add_direction(chat, direction, layer=1, coefficient=2.0):
        added = stream(chat)
    assert plain[1].shape[-1] == 4 * chat.d_model
    torch.testing.assert_close(apart(added[1]), apart(plain[1]) + 2 * direction)
    with ablate_direction(chat, direction):
        ablated = stream(chat)
    for before, after in zip(plain, ablated, strict=True):
        shares = [(apart(hidden) @ unit).abs() / apart(hidden).norm(dim=-1) for hidden in (before, after)]
        assert float(shares[0].amax(dim=(0, 1)).min()) > 1e-2
        assert float(shares[1].max()) < 1e-6
