"""The decomposition of the stream's component against independent computations, on several architectures."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from abliterate.interventions.contributions import (
    Contributions,
    HeadsUnknownError,
    check_decomposition,
    find_block_parts,
    n_heads_of,
)
from abliterate.interventions.traced_stream import StreamTrace, TracedPrompt, trace_stream, traced_prompts
from abliterate.models.chat_model import ChatModel, make_chat_model
from abliterate.models.options import ModelOptions
from tests.support.tiny_models import make_talkative_model, make_tokenizer, random_direction

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, "n_inner": 48}
PROMPTS = ["How do locks work?", "Explain rain.", "Write a long letter about the garden behind my house."]


def tiny_chat(model_type: str, *, dtype: torch.dtype = torch.float64, **changes: Any) -> ChatModel:
    sizes = GPT2 if model_type == "gpt2" else SIZES
    model = make_talkative_model(model_type, seed=3, pad_token_id=2, **sizes, **changes).to(dtype)
    # Without padding: in float64 a row of gemma2's mask that holds nothing but its minimum becomes NaN.
    options = ModelOptions(batch_size=1 if dtype == torch.float64 else None)
    return make_chat_model(model, make_tokenizer(), options=options)


def unit_vector() -> Tensor:
    return random_direction(seed=5)


def run(chat: ChatModel) -> tuple[list[TracedPrompt], StreamTrace]:
    prompts = traced_prompts(chat, PROMPTS)
    parts = find_block_parts(chat)
    return prompts, trace_stream(chat, prompts, unit_vector(), parts=parts, advance=lambda _n: None)


def found_in(stream: StreamTrace) -> Contributions:
    assert stream.contributions is not None
    return stream.contributions


# llama-like norms are computed in float32 whatever the model's dtype; they stand on the stream's readers, so that
# only gemma's and olmo's, which stand between writers and stream, bring float32 rounding into the sum.
@pytest.mark.parametrize(
    ("model_type", "tolerance"),
    [
        ("gpt2", 1e-12),
        ("llama", 1e-12),
        ("qwen2", 1e-12),
        ("granite", 1e-12),
        ("gemma2", 1e-5),
        ("gemma3_text", 1e-5),
        ("olmo2", 1e-5),
    ],
)
def test_the_contributions_sum_to_the_component_at_every_layer(model_type: str, tolerance: float) -> None:
    changes = {"residual_multiplier": 0.3} if model_type == "granite" else {}
    found = found_in(run(tiny_chat(model_type, **changes))[1])
    assert found.component.shape == (3, 4)
    assert found.heads.shape == (3, 3, 4)
    assert found.component.abs().max() > 0.3
    assert found.heads.abs().max() > 0.01
    assert found.largest_gap() < tolerance


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_in_float32_the_gap_is_rounding(model_type: str) -> None:
    found = found_in(run(tiny_chat(model_type, dtype=torch.float32))[1])
    assert 0 < found.largest_gap() < 2e-5


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_heads_contribution_is_what_zeroing_it_takes_from_the_attentions_write(model_type: str) -> None:
    """An oracle that knows nothing of the decomposition: the write with and without the head's columns."""
    chat = tiny_chat(model_type)
    prompts, stream = run(chat)
    part, row = find_block_parts(chat)[1], torch.tensor([list(prompts[0].tokens)])
    writes: list[Tensor] = []
    handle = part.attention.register_forward_hook(lambda _m, _a, out: writes.append(out[0][0, -1].detach()))
    with torch.inference_mode():
        for head in (None, 0, 1, 2, 3):
            weight = part.out_projection.weight.data
            columns = weight if model_type == "llama" else weight.T
            kept = columns.clone()
            if head is not None:
                columns[:, 8 * head : 8 * head + 8] = 0
            chat.model(row)
            columns.copy_(kept)
    handle.remove()
    for head in range(4):
        expected = float((writes[0] - writes[head + 1]) @ unit_vector())
        assert float(found_in(stream).heads[0, 1, head]) == pytest.approx(expected, abs=1e-12)


def test_through_a_post_norm_a_head_is_scaled_with_the_norms_measured_scale() -> None:
    """The oracle computes the RMS by hand from the attention's output before the norm."""
    chat = tiny_chat("gemma2")
    prompts, stream = run(chat)
    block: Any = chat.blocks[2]
    seen: dict[str, Tensor] = {}
    handles = [
        block.self_attn.o_proj.register_forward_pre_hook(lambda _m, args: seen.update(z=args[0][0, -1])),
        block.self_attn.o_proj.register_forward_hook(lambda _m, _a, out: seen.update(x=out[0, -1])),
    ]
    with torch.no_grad():
        chat.model(torch.tensor([list(prompts[1].tokens)]))
    for handle in handles:
        handle.remove()
    rms = (seen["x"].pow(2).mean() + block.post_attention_layernorm.eps).sqrt()
    gain = 1 + block.post_attention_layernorm.weight.detach()
    columns = block.self_attn.o_proj.weight[:, 8:16].detach()
    expected = float((gain / rms * (columns @ seen["z"][8:16])) @ unit_vector())
    assert float(found_in(stream).heads[1, 2, 1]) == pytest.approx(expected, abs=1e-5)


def test_the_components_and_cosines_equal_output_hidden_states() -> None:
    chat = tiny_chat("llama")
    prompts, stream = run(chat)
    for i, prompt in enumerate(prompts):
        with torch.inference_mode():
            states = chat.model(torch.tensor([list(prompt.tokens)]), output_hidden_states=True).hidden_states
        hidden = torch.stack(states[:-1])[:, 0]
        assert torch.allclose(stream.components[i][:, :-1].T, hidden @ unit_vector(), atol=1e-6)
        cosine = torch.nn.functional.cosine_similarity(hidden, unit_vector().expand_as(hidden), dim=-1)
        assert torch.allclose(stream.cosines[i][:, :-1].T, cosine, atol=1e-6)


def test_a_writer_that_is_not_counted_is_noticed() -> None:
    chat = tiny_chat("llama")
    handle = chat.blocks[1].register_forward_hook(lambda _m, _a, out: out + 0.01)
    try:
        with pytest.raises(HeadsUnknownError, match=r"llama.*do not sum to the residual stream.*layer [23]"):
            run(chat)
    finally:
        handle.remove()


def test_a_wrong_head_count_is_noticed() -> None:
    chat = tiny_chat("llama")
    chat.model.config.num_attention_heads = 5
    assert n_heads_of(chat) == 5
    with pytest.raises(HeadsUnknownError, match="5 heads do not share 32 entries"):
        run(chat)


def test_what_is_no_plain_linear_map_is_refused_by_name() -> None:
    chat = tiny_chat("llama")
    projection: Any = chat.blocks[1].self_attn.o_proj  # type: ignore[union-attr]

    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = projection.weight

        def forward(self, hidden: Tensor) -> Tensor:
            return 2 * projection(hidden)

    chat.blocks[1].self_attn.o_proj = Doubled()  # type: ignore[union-attr]
    with pytest.raises(HeadsUnknownError, match="llama: its out-projection is a Doubled"):
        run(chat)


def test_a_norm_that_centres_is_refused_by_name() -> None:
    chat = tiny_chat("gemma2")
    norm = nn.LayerNorm(32, dtype=torch.float64)
    chat.blocks[0].post_attention_layernorm = norm  # type: ignore[assignment]
    with pytest.raises(HeadsUnknownError, match="gemma2: the norm after attention is not an RMS norm"):
        run(chat)


def test_an_attention_without_a_known_out_projection_is_refused_by_name() -> None:
    chat = tiny_chat("llama")
    block: Any = chat.blocks[0]
    block.self_attn.strange = block.self_attn.o_proj
    del block.self_attn.o_proj
    with pytest.raises(HeadsUnknownError, match="llama: the head table needs one attention module"):
        find_block_parts(chat)


def test_the_check_allows_rounding_and_no_more() -> None:
    chat = tiny_chat("llama", dtype=torch.float32)
    found = found_in(run(chat)[1])
    norms = torch.full_like(found.component, 4.0)
    check_decomposition(found, norms=norms, chat=chat)
    off = Contributions(
        component=found.component + 1e-4,
        embedding=found.embedding,
        heads=found.heads,
        biases=found.biases,
        mlps=found.mlps,
    )
    with pytest.raises(HeadsUnknownError):
        check_decomposition(off, norms=norms, chat=chat)


def test_a_stream_that_is_not_a_number_does_not_pass() -> None:
    chat = tiny_chat("llama", dtype=torch.float32)
    with torch.no_grad():
        chat.model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")  # type: ignore[union-attr]
    with pytest.raises(HeadsUnknownError, match="do not sum"):
        run(chat)
