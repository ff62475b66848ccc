"""Claims of docs/exactness.md that no other test proves: mostly, that less would not do."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from abliterate.directions import orthonormalize
from abliterate.formats.component import component_norm
from abliterate.formats.projection import NormFactor, effective_directions, project_out
from tests.support.paths import DOCS, REPOSITORY
from tests.support.tiny_models import random_direction, randomize

DOCUMENT = DOCS / "exactness.md"
TOKENS = torch.randint(3, 61, (2, 12), generator=torch.Generator().manual_seed(3))
SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}


def build(model_type: str, **config) -> PreTrainedModel:
    settings = AutoConfig.for_model(model_type, pad_token_id=0, **config)
    model = AutoModelForCausalLM.from_config(settings, attn_implementation="eager", dtype=torch.float64)
    return randomize(model).eval()


@contextmanager
def recording(blocks: nn.ModuleList) -> Iterator[list[Tensor]]:
    streams: list[Tensor] = []

    def record(_module, args, kwargs):
        streams.append(args[0] if args else kwargs["hidden_states"])

    handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
    yield streams
    for handle in handles:
        handle.remove()


def component(model: PreTrainedModel, blocks: nn.ModuleList, direction: Tensor) -> float:
    with recording(blocks) as streams, torch.no_grad():
        model(TOKENS)
    stacked = torch.stack(streams).double()
    return float(((stacked @ direction).abs() / stacked.norm(dim=-1)).max())


def project_parameters(model: PreTrainedModel, axes: dict[str, int], vectors: dict[str, Tensor], r: Tensor) -> None:
    """Project by hand every parameter whose name ends as a key of `axes` does; `vectors` holds exceptions to r."""
    edited = set()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for ending, axis in axes.items():
                if name.endswith(ending):
                    unit = vectors.get(name, r)[None]
                    parameter.copy_(project_out(parameter, directions=unit, residual_axis=axis))
                    edited.add(ending)
    assert edited == set(axes)


@pytest.mark.parametrize(
    ("model_type", "config", "blocks", "axes"),
    [
        (
            "openai-gpt",
            {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
            lambda model: model.transformer.h,
            {
                "tokens_embed.weight": 1,
                "positions_embed.weight": 1,
                "attn.c_proj.weight": 1,
                "attn.c_proj.bias": 0,
                "mlp.c_proj.weight": 1,
                "mlp.c_proj.bias": 0,
            },
        ),
        (
            "doge",
            {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2},
            lambda model: model.model.layers,
            {"embed_tokens.weight": 1, "o_proj.weight": 0, "down_proj.weight": 0},
        ),
    ],
)
def test_where_a_norm_or_a_scale_acts_on_the_stream_no_edit_is_enough(model_type, config, blocks, axes):
    model, r = build(model_type, **config), random_direction(32)
    before = component(model, blocks(model), r)
    project_parameters(model, axes, {}, r)
    after = component(model, blocks(model), r)
    assert before > 0.1
    assert after > 0.01


def test_behind_a_norm_plain_r_is_not_enough():
    sizes = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
    axes = {"embed_tokens.weight": 1, "o_proj.weight": 0, "down_proj.weight": 0}
    r = random_direction(32)
    found = {}
    for kind in ("plain", "through the norms"):
        model = build("gemma2", **sizes, sliding_window=8)
        vectors = {}
        for index, layer in enumerate(model.model.layers if kind != "plain" else ()):
            for name, norm in (
                ("self_attn.o_proj", layer.post_attention_layernorm),
                ("mlp.down_proj", layer.post_feedforward_layernorm),
            ):
                # Gemma 2's norms multiply by 1 + weight.
                factor = NormFactor(gamma=1 + norm.weight.detach())
                vectors[f"model.layers.{index}.{name}.weight"] = effective_directions(r[None], norms=[factor])[0]
        before = component(model, model.model.layers, r)
        project_parameters(model, axes, vectors, r)
        found[kind] = component(model, model.model.layers, r) / before
    assert found["plain"] > 0.05
    assert found["through the norms"] < 1e-6


def test_one_direction_after_the_other_is_not_both_together():
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(64, 40, generator=generator, dtype=torch.float64)
    first = random_direction(64, seed=1)
    second = orthonormalize((first + random_direction(64, seed=2))[None])[0][0]
    assert abs(float(first @ second)) > 0.3
    in_turn = weight
    for each in (first, second):
        in_turn = project_out(in_turn, directions=each[None], residual_axis=0)
    together = project_out(weight, directions=torch.stack([first, second]), residual_axis=0)
    assert component_norm(in_turn, directions=first[None], residual_axis=0) > 0.01
    for each in (first, second):
        assert component_norm(together, directions=each[None], residual_axis=0) < 1e-14


def test_a_coarse_grid_rounds_most_of_the_edit_away():
    """FP8 with a scale for each block of 128: what plain rounding leaves of the component at d_model 4096."""
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(4096, 128, generator=generator)
    r = random_direction(4096)[None]

    def to_grid(tensor: Tensor) -> Tensor:
        blocks = tensor.view(32, 128, 128)
        scale = blocks.abs().amax(dim=(1, 2), keepdim=True) / 448
        return ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).view_as(tensor)

    stored = to_grid(weight)
    edited = to_grid(project_out(stored, directions=r, residual_axis=0))
    share = component_norm(edited, directions=r, residual_axis=0) / component_norm(
        stored, directions=r, residual_axis=0
    )
    assert 0.2 < share < 0.6
    bfloat16 = project_out(stored.bfloat16(), directions=r, residual_axis=0)
    assert component_norm(bfloat16, directions=r, residual_axis=0) < 1e-3 * component_norm(
        stored, directions=r, residual_axis=0
    )


def test_the_tests_that_the_document_names_exist():
    import re

    text = DOCUMENT.read_text()
    sources = {str(path.relative_to(REPOSITORY)): path.read_text() for path in REPOSITORY.glob("tests/**/*.py")}
    files = set(re.findall(r"`([\w/]+\.py)", text))
    assert files <= sources.keys()
    everything = "\n".join(sources.values())
    names = set(re.findall(r"\b(test_\w+)\b(?!\.py)", text)) | set(re.findall(r"\b(Test[A-Z]\w+)\b", text))
    missing = [name for name in names if not re.search(rf"\b(def|class) {name}\b", everything)]
    assert missing == []
    assert len(names) > 10
