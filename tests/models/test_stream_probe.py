"""A look at a model's stream: what holds is said, and a model whose blocks do more is refused beforehand."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from abliterate.errors import ModelError, UnsupportedArchitectureError
from abliterate.evaluation.auditing import audit_model
from abliterate.extraction.refusal import FirstTokens, Openings, RefusalMeasure
from abliterate.extraction.run import extract_direction
from abliterate.extraction.scoring import CandidateScorer
from abliterate.models.chat_model import ChatModel
from abliterate.models.hooks import ablate_direction, replaced_forward
from abliterate.models.stream import find_blocks
from abliterate.models.stream_probe import probe_stream
from tests.support.conformance import tiny_config

ROWS = [[5, 9, 17, 40, 7], [8, 11, 60, 61, 62]]


def test_a_plain_model_passes_on_prompts_of_our_own(chat: ChatModel) -> None:
    found = probe_stream(chat)
    assert found.starts_at_blocks
    assert found.returned == (0,) * chat.n_layers
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in chat.model.modules())


def test_something_else_that_writes_is_found_out(chat: ChatModel) -> None:
    plain = chat.blocks[1].forward

    def forward(hidden_states, *args, **kwargs):
        return plain(hidden_states, *args, **kwargs) + 3 * torch.ones(chat.d_model)

    with (
        replaced_forward(chat.blocks[1], forward),
        pytest.raises(ModelError, match=r"left behind block 1 .*something else"),
    ):
        probe_stream(chat)


def test_nan_does_not_pass(chat: ChatModel) -> None:
    plain = chat.blocks[0].forward

    def forward(*args, **kwargs):
        return plain(*args, **kwargs) * float("nan")

    with replaced_forward(chat.blocks[0], forward), pytest.raises(ModelError, match="left behind block 0"):
        probe_stream(chat)


def test_blocks_that_run_twice_are_refused(chat: ChatModel) -> None:
    decoder = chat.model.get_decoder()
    plain = decoder.forward

    def twice(*args, **kwargs):
        plain(*args, **kwargs)
        return plain(*args, **kwargs)

    with replaced_forward(decoder, twice), pytest.raises(ModelError, match="not each run once"):
        probe_stream(chat)


def test_a_block_that_needs_more_of_those_before_is_run_after_them(chat: ChatModel) -> None:
    seen: list[float] = []
    first, last = chat.blocks[0], chat.blocks[-1]
    plain_first, plain_last = first.forward, last.forward

    def note(*args, **kwargs):
        seen.append(1.0)
        return plain_first(*args, **kwargs)

    def use(*args, **kwargs):
        seen.pop()
        return plain_last(*args, **kwargs)

    with replaced_forward(first, note), replaced_forward(last, use):
        assert not probe_stream(chat, rows=ROWS).starts_at_blocks


def test_a_model_that_reads_its_embedding_past_the_first_block(llama_chat: ChatModel) -> None:
    embedding = llama_chat.model.get_input_embeddings()
    asked: list[torch.Tensor] = []
    handle = embedding.register_forward_pre_hook(lambda _m, args: asked.append(args[0]))
    last = llama_chat.blocks[-1]
    plain = last.forward

    def forward(hidden_states, *args, **kwargs):
        return hidden_states + plain(embedding(asked[-1]), *args, **kwargs)

    assert not probe_stream(llama_chat, rows=ROWS).reads_embedding
    with replaced_forward(last, forward):
        assert probe_stream(llama_chat, rows=ROWS).reads_embedding
    handle.remove()


@pytest.mark.parametrize("shortcut", ["starts_at_blocks", "mlp_by_token"])
@pytest.mark.parametrize("measure", [FirstTokens((3,)), Openings(((3, 7), (9,)))])
def test_scores_are_the_same_whether_passes_are_run_in_part_or_not(
    llama_chat: ChatModel, shortcut: str, measure: RefusalMeasure
) -> None:
    probe = probe_stream(llama_chat)
    assert getattr(probe, shortcut)
    candidates = torch.randn(2, llama_chat.n_layers, llama_chat.d_model, generator=torch.Generator().manual_seed(1))
    rows = [[*range(5, 15), *row] for row in (*ROWS, ROWS[0][:3])]
    given = {"chat": llama_chat, "candidates": candidates, "harmful_rows": rows, "harmless_rows": rows}
    in_part = CandidateScorer(**given, measure=measure, probe=probe)
    whole = CandidateScorer(**given, measure=measure, probe=replace(probe, **{shortcut: False}))
    for layer in range(llama_chat.n_layers):
        for score in ("induce", "bypass", "kl"):
            found, expected = (getattr(scorer, score)(-1, layer) for scorer in (in_part, whole))
            assert found == pytest.approx(expected, abs=1e-4)


def test_an_mlp_that_looks_at_other_tokens_is_run_whole(llama_chat: ChatModel, monkeypatch) -> None:
    mlp = llama_chat.blocks[-1].mlp
    plain = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda hidden: plain(hidden + hidden.roll(1, dims=1)))
    probe = probe_stream(llama_chat, rows=ROWS)
    assert probe.starts_at_blocks
    assert not probe.mlp_by_token


def test_a_refused_type_is_refused_before_a_prompt_is_run(llama_chat: ChatModel, monkeypatch) -> None:
    monkeypatch.setattr(type(llama_chat.model.config), "model_type", "doge")
    monkeypatch.setattr(type(llama_chat.model), "forward", None)
    with pytest.raises(UnsupportedArchitectureError, match=r"'doge' a direction cannot be ablated: .*learned number"):
        extract_direction(model=llama_chat)


def test_a_type_without_one_stream_is_refused_by_its_reason(llama_chat: ChatModel, monkeypatch) -> None:
    monkeypatch.setattr(type(llama_chat.model.config), "model_type", "deepseek_v4")
    with pytest.raises(ModelError, match="type deepseek_v4: it has four residual streams"):
        probe_stream(llama_chat)


@pytest.mark.parametrize("command", [extract_direction, audit_model])
def test_it_is_refused_by_its_config_before_any_weight_is_read(tmp_path, command) -> None:
    tiny_config("hrm_text").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="type hrm_text: its blocks run several times"):
        command(model=tmp_path)


def test_a_block_without_a_known_write_is_refused_by_its_childrens_names(llama_chat: ChatModel) -> None:
    block = llama_chat.blocks[1]
    block.gearbox, block.self_attn, block.mlp = block.mlp, nn.Identity(), nn.Identity()
    with pytest.raises(ModelError, match="gearbox"), ablate_direction(llama_chat, torch.ones(llama_chat.d_model)):
        pass


def test_blocks_of_several_stacks_are_joined_and_missing_ones_named() -> None:
    model = nn.Module()
    model.fast, model.slow = nn.Module(), nn.Module()
    model.fast.layers = nn.ModuleList([nn.Identity(), nn.Identity()])
    model.slow.layers = nn.ModuleList([nn.Identity()])
    assert find_blocks(model, 2, "it") == tuple(model.fast.layers)
    assert len(find_blocks(model, 16, "it")) == 3
    with pytest.raises(ModelError, match="it: no list of 4"):
        find_blocks(nn.Linear(2, 2), 4, "it")
