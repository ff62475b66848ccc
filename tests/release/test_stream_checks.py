"""What is measured of a running model agrees with independent computations."""

import math

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from abliterate.directions import orthonormalize
from abliterate.models.chat_model import ChatModel
from abliterate.models.hooks import ablate_subspace, capture_stream
from abliterate.release.stream_checks import LogitComparison, run_prompts

ROWS = [[4, 5, 6, 7, 8], [9, 10, 11]]


def subspace(k: int) -> torch.Tensor:
    return orthonormalize(torch.randn(k, 32, generator=torch.Generator().manual_seed(3)))[0]


@pytest.mark.parametrize("k", [1, 3])
def test_components_agree_with_the_hidden_states_of_transformers(chat: ChatModel, k):
    basis = subspace(k)
    found = run_prompts(chat, ROWS, subspace=basis)
    shares = []
    for row in ROWS:
        with torch.no_grad():
            out = chat.model(torch.tensor([row]), output_hidden_states=True)
        hidden = torch.stack(out.hidden_states).double()[:, 0]
        shares.append((hidden @ basis.T).norm(dim=-1) / hidden.norm(dim=-1))
    joined = torch.cat(shares, dim=1)
    # The last hidden state that transformers gives is behind the final norm, so the places before it are compared.
    assert found.largest[:-1] == pytest.approx(joined.max(dim=1).values[:-1].tolist(), rel=1e-6)
    assert found.mean[:-1] == pytest.approx(joined.mean(dim=1)[:-1].tolist(), rel=1e-6)
    assert (found.n_tokens, found.dtype, len(found.largest)) == (8, "float32", chat.n_layers + 1)
    assert all(a <= b * (1 + 1e-12) for a, b in zip(found.accumulated, found.largest, strict=True))


def test_the_last_place_is_what_the_final_norm_gets(chat: ChatModel):
    seen, into_norm = {}, []
    norm = chat.model.base_model.norm if hasattr(chat.model.base_model, "norm") else chat.model.base_model.ln_f
    handle = norm.register_forward_pre_hook(lambda _module, args: into_norm.append(args[0]))
    with capture_stream(chat, lambda layer, hidden: seen.__setitem__(layer, hidden)) as n_hooks:
        chat.model(torch.tensor([ROWS[0]]))
    handle.remove()
    assert n_hooks == chat.n_layers + 1
    assert torch.equal(seen[chat.n_layers], into_norm[0])


def test_all_rows_of_a_subspace_are_ablated_together(chat: ChatModel):
    basis = subspace(3)
    assert max(run_prompts(chat, ROWS, subspace=basis).largest) > 0.1
    with ablate_subspace(chat, basis):
        assert max(run_prompts(chat, ROWS, subspace=basis).largest) < 1e-6
    with ablate_subspace(chat, basis[:1]):
        assert max(run_prompts(chat, ROWS, subspace=basis).largest) > 0.1


def test_what_earlier_layers_accumulated_is_held_against_their_size(llama_chat: ChatModel):
    """A token that has lost most of its size keeps the rounding of what it was."""
    basis = subspace(1)
    shrink = llama_chat.blocks[2].register_forward_pre_hook(
        lambda _module, args, kwargs: ((args[0] * 1e-3, *args[1:]), kwargs), with_kwargs=True
    )
    found = run_prompts(llama_chat, ROWS, subspace=basis)
    shrink.remove()
    assert found.accumulated[2] < 0.01 * found.largest[2]


def test_logits_are_handed_over_row_by_row(llama_chat: ChatModel):
    received = {}
    run_prompts(llama_chat, ROWS, subspace=subspace(1), receive=received.__setitem__)
    with torch.no_grad():
        for index, row in enumerate(ROWS):
            torch.testing.assert_close(received[index], llama_chat.model(torch.tensor([row])).logits[0])


def test_differences_agree_with_torch():
    generator = torch.Generator().manual_seed(4)
    first, second = (3 * torch.randn(70, 50, generator=generator) for _ in range(2))
    comparison = LogitComparison()
    comparison.add(first[:40], second[:40])
    comparison.add(first[40:], second[40:])
    found = comparison.result()
    p, q = log_softmax(first.double(), dim=-1), log_softmax(second.double(), dim=-1)
    each = kl_div(q, p, reduction="none", log_target=True).sum(dim=-1)
    assert found.n_positions == 70
    assert found.kl_mean == pytest.approx(float(each.mean()))
    assert found.kl_max == pytest.approx(float(each.max()))
    assert found.largest == pytest.approx(float((first - second).abs().max()))
    centred = first.double() - first.double().mean(dim=-1, keepdim=True)
    assert found.relative == pytest.approx(float((first - second).double().norm() / centred.norm()))


def test_equal_logits_with_masked_tokens_do_not_differ():
    logits = torch.randn(3, 9)
    logits[:, 2] = -math.inf
    comparison = LogitComparison()
    comparison.add(logits, logits)
    found = comparison.result()
    assert (found.kl_max, found.largest, found.relative) == (0.0, 0.0, 0.0)


def test_a_nan_is_not_lost(llama_chat: ChatModel):
    with torch.no_grad():
        llama_chat.blocks[1].mlp.down_proj.weight[0, 0] = math.nan
    found = run_prompts(llama_chat, ROWS, subspace=subspace(1))
    assert not math.isnan(found.largest[1])
    assert math.isnan(found.largest[-1])
    comparison = LogitComparison()
    comparison.add(torch.ones(1, 3), torch.full((1, 3), math.nan))
    comparison.add(torch.ones(1, 3), torch.ones(1, 3))
    assert math.isnan(comparison.result().largest)
    assert math.isnan(comparison.result().kl_max)
