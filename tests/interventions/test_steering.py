"""Affine editing and doses, against the stream itself."""

import json
import random

import pytest
import torch

from abliterate.directions import make_direction
from abliterate.errors import InputError
from abliterate.interventions.steering import default_coefficient, reference_components, steer, steering_key
from abliterate.models.chat_model import ChatModel
from abliterate.models.hooks import ablate_direction, capture_inputs, set_component
from abliterate.prompt_sets import load_prompt_set

ROWS = [[5, 9, 17, 40, 7], [8, 11, 60, 61, 62]]


def components(chat: ChatModel, unit: torch.Tensor) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    with capture_inputs(chat, lambda _layer, hidden: found.append(hidden @ unit)):
        chat.forward(ROWS)
    return found


def test_the_component_is_what_it_is_set_to_and_the_rest_of_the_stream_is_ablations(chat: ChatModel) -> None:
    vector = torch.randn(chat.d_model, generator=torch.Generator().manual_seed(3))
    unit = vector / vector.norm()
    wanted = [0.5, -1.0, 2.0, 0.0, 3.0]
    before = components(chat, unit)
    assert max(float((found - value).abs().max()) for found, value in zip(before, wanted, strict=True)) > 0.1
    with set_component(chat, vector, wanted) as attached:
        during = components(chat, unit)
        affine = chat.forward(ROWS)
    assert attached == 1 + 4 * chat.n_layers
    for found, value in zip(during, wanted, strict=True):
        assert torch.allclose(found, torch.full_like(found, value), atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(components(chat, unit), before, strict=True))
    with ablate_direction(chat, vector):
        ablated = chat.forward(ROWS)
    with set_component(chat, vector, [0.0] * chat.n_layers):
        assert torch.allclose(chat.forward(ROWS), ablated, atol=1e-5)
    assert not torch.allclose(affine, ablated, atol=1e-2)


def test_the_reference_is_the_harmless_mean_of_training_prompts(llama_chat: ChatModel) -> None:
    vector = torch.randn(32, generator=torch.Generator().manual_seed(4))
    direction = make_direction(mean_difference=vector, metadata={"position": -2, "layer": 1})
    harmless = reference_components(llama_chat, direction)
    harmful = reference_components(llama_chat, direction, towards_harmful=1.0)
    between = reference_components(llama_chat, direction, towards_harmful=0.25)
    expected = torch.tensor(harmless) + 0.25 * (torch.tensor(harmful) - torch.tensor(harmless))
    assert torch.allclose(torch.tensor(between), expected, atol=1e-5)
    assert len(harmless) == llama_chat.n_layers
    texts = load_prompt_set("bundled", kind="harmless", part="train")
    total = torch.zeros(llama_chat.n_layers, dtype=torch.float64)
    chosen = random.Random(42).sample(range(len(texts)), 128)
    for i in chosen:
        row = llama_chat.encode([texts.texts[i]])[0]
        with torch.inference_mode():
            states = llama_chat.model(torch.tensor([row]), output_hidden_states=True).hidden_states
        total += torch.stack([state[0, -2].double() @ direction.vector.double() for state in states[:-1]])
    assert torch.allclose(torch.tensor(harmless, dtype=torch.float64), total / 128, atol=1e-4)


@pytest.mark.parametrize(
    ("intervention", "given", "expected"),
    [("add", None, 1.0), ("add", -1.0, -1.0), ("affine", None, 0.0), ("affine", 0.5, 0.5), ("ablate", None, None)],
)
def test_doses(intervention: str, given: float | None, expected: float | None) -> None:
    assert default_coefficient(intervention, given) == expected


def test_the_key_of_a_cache_changes_with_all_that_steering_takes() -> None:
    def key(scale: float = 1.0, dose: float | None = None, intervention: str = "affine", **metadata: int) -> str:
        direction = make_direction(mean_difference=scale * torch.arange(1.0, 5.0), metadata=metadata)
        return json.dumps(steering_key(direction, intervention=intervention, coefficient=dose))

    keys = [key(), key(2.0), key(dose=0.5), key(intervention="add"), key(layer=1), key(position=-1)]
    assert len(set(keys)) == len(keys)
    assert key(dose=0.0) == key()


def test_addition_has_a_sign(llama_chat: ChatModel) -> None:
    vector = torch.randn(32, generator=torch.Generator().manual_seed(5))
    direction = make_direction(mean_difference=vector, metadata={"layer": 2})
    before = components(llama_chat, direction.vector)[2]
    for dose in (1.0, -1.0):
        with steer(llama_chat, direction, intervention="add", coefficient=dose):
            after = components(llama_chat, direction.vector)[2]
        assert torch.allclose(after - before, torch.full_like(before, dose * float(vector.norm())), atol=1e-4)


def test_what_the_file_lacks_is_said(llama_chat: ChatModel) -> None:
    with pytest.raises(InputError, match="mean difference and layer"):
        steer(llama_chat, make_direction(mean_difference=torch.ones(32)), intervention="add")
