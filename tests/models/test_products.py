"""Float32 products by oneDNN: the same numbers to rounding, gradients, and layers that stay what they are."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from abliterate.models import machine
from abliterate.models.chat_model import make_chat_model
from abliterate.models.hooks import ablate_direction
from abliterate.models.machine import product, widen_products, wider_by_onednn
from tests.support.tiny_models import make_tokenizer, tiny_llama

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
pytestmark = needs_onednn


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """On any processor, and of any size; return the shapes that oneDNN was given."""
    monkeypatch.setattr(machine, "wider_by_onednn", lambda: True)
    monkeypatch.setattr(machine, "LEAST_MULTIPLICATIONS", 1)
    return _counted(monkeypatch)


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    by_onednn = machine._by_onednn

    def counting(hidden: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor:
        shapes.append(tuple(hidden.shape))
        return by_onednn(hidden, *rest)

    monkeypatch.setattr(machine, "_by_onednn", counting)
    return shapes


@pytest.mark.parametrize("for_gradients", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (1, 1, 24), (24,)])
def test_a_product_is_that_of_torch_to_rounding(
    wide: list[tuple[int, ...]], shape: tuple[int, ...], has_bias: bool, for_gradients: bool
) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    hidden, weight = torch.randn(shape, generator=generator), torch.randn(40, 24, generator=generator)
    bias = torch.randn(40, generator=generator) if has_bias else None
    found = product(hidden, weight.requires_grad_(for_gradients), bias)
    assert found.requires_grad is for_gradients
    exact = functional.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    assert found.dtype == torch.float32
    assert found.shape == exact.shape
    assert (found - exact).abs().max() < 1e-5
    assert wide == [shape]
    # Parts of tensors, as they come out of models.
    part = torch.randn(4, 6, 48, generator=generator)[:, ::2, 10:34]
    columns = torch.randn(24, 80, generator=generator)[:, ::2].T
    for of in (weight, columns):
        assert (product(part, of) - functional.linear(part, of)).abs().max() < 1e-4


def test_gradients_flow_to_what_goes_in_and_to_the_weight(wide: list[tuple[int, ...]]) -> None:
    hidden, weight = torch.randn(6, 24, requires_grad=True), torch.randn(40, 24, requires_grad=True)
    bias = torch.randn(40, requires_grad=True)
    towards = torch.randn(6, 40)
    found = torch.autograd.grad(product(hidden, weight, bias), (hidden, weight, bias), towards)
    expected = torch.autograd.grad(functional.linear(hidden, weight, bias), (hidden, weight, bias), towards)
    for one, other in zip(found, expected, strict=True):
        assert one.layout == torch.strided
        assert torch.allclose(one, other, atol=1e-4)
    assert wide


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_formats_are_left_to_torch(wide: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(6, 24, dtype=dtype), torch.randn(40, 24, dtype=dtype)
    assert torch.equal(product(hidden, weight), functional.linear(hidden, weight))
    assert wide == []


def test_small_products_and_other_processors_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _counted(monkeypatch)
    hidden, weight = torch.randn(512, 256), torch.randn(256, 256)
    monkeypatch.setattr(machine, "wider_by_onednn", lambda: True)
    assert torch.equal(product(hidden[:255], weight), functional.linear(hidden[:255], weight))
    assert asked == []
    product(hidden[:256], weight)
    assert asked == [(256, 256)]
    monkeypatch.setattr(machine, "wider_by_onednn", lambda: False)
    assert torch.equal(product(hidden, weight), functional.linear(hidden, weight))
    assert len(asked) == 1
    layer = nn.Linear(4, 4)
    widen_products(layer)
    assert "forward" not in layer.__dict__


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"avx512_f": True, "cpu_name": "AMD EPYC"}, True),
        ({"avx512_f": False, "cpu_name": "AMD EPYC"}, False),
        ({"avx512_f": True, "cpu_name": "Intel Xeon"}, False),
        ({}, False),
    ],
)
def test_the_processor_decides(monkeypatch: pytest.MonkeyPatch, found: dict[str, object], expected: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    wider_by_onednn.cache_clear()
    assert wider_by_onednn() is expected
    wider_by_onednn.cache_clear()


def test_a_torch_that_does_not_tell_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    wider_by_onednn.cache_clear()
    assert not wider_by_onednn()
    wider_by_onednn.cache_clear()


def test_a_model_computes_the_same_with_its_hooks_and_so_does_its_copy(wide: list[tuple[int, ...]]) -> None:
    plain, model = tiny_llama(), tiny_llama()
    model.load_state_dict(plain.state_dict())
    chat = make_chat_model(model, make_tokenizer())
    assert all(type(layer) is nn.Linear for layer in model.modules() if isinstance(layer, nn.Linear))
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.inference_mode():
        assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-4)
        assert wide
        direction = torch.randn(chat.d_model, generator=torch.Generator().manual_seed(0))
        with ablate_direction(chat, direction):
            ablated = model(ids).logits
        # The hooks did something.
        assert not torch.allclose(ablated, plain(ids).logits, atol=1e-2)
        another = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.allclose(another(ids).logits, plain(ids).logits, atol=1e-4)
    assert another.state_dict().keys() == plain.state_dict().keys()
