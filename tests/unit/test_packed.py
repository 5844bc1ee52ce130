"""Packed linear layers give the plain layer's results, follow their weights, and step aside where they must."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.kernels import linear
from kandinsky22.kernels.linear import DirectLinear, Linear, make_direct, product
from kandinsky22.models import PriorTransformer

needs_packing = pytest.mark.skipif(not linear.DTYPES, reason="this torch has no packed products on this machine")


@pytest.fixture(autouse=True)
def small_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "WORTHWHILE", 1)


def is_packed(layer: nn.Module) -> bool:
    return "_pack" in layer.__dict__


def error(layer: Linear, features: Tensor) -> float:
    expected = F.linear(features.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    return ((layer(features).double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("shape", [(40,), (1, 40), (6, 40), (2, 3, 40), (2, 1, 3, 40), (300, 40)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_product_is_right(shape: tuple[int, ...], bias: bool, mode: type[torch.no_grad]) -> None:
    layer = Linear(40, 24, bias=bias)
    with mode():
        assert layer(torch.zeros(shape)).shape == (*shape[:-1], 24)
        assert error(layer, torch.randn(shape)) < 1e-6
        assert error(layer, torch.randn(40, *shape[:-1]).movedim(0, -1)) < 1e-6, "in any memory layout"
    assert is_packed(layer) == bool(linear.DTYPES)


@torch.no_grad()
def test_the_copy_follows_the_weight() -> None:
    layer, features = Linear(40, 24), torch.randn(5, 40)
    changes = [
        lambda: layer.weight.mul_(2),
        lambda: layer.load_state_dict({"weight": torch.randn(24, 40), "bias": torch.zeros(24)}),
        lambda: layer.load_state_dict({"weight": torch.randn(24, 40), "bias": torch.zeros(24)}, assign=True),
        lambda: setattr(layer.weight, "data", torch.randn(24, 40)),
        lambda: layer.weight.data.mul_(0.5),  # torch does not count this
        lambda: layer.weight.data.numpy().fill(0.25),  # nor this
        lambda: setattr(layer, "weight", nn.Parameter(torch.randn(24, 40))),
        lambda: layer.double().float(),
    ]
    for change in changes:
        assert error(layer, features) < 1e-6
        change()
        assert error(layer, features) < 1e-6


@needs_packing
@torch.no_grad()
def test_the_copy_leaves_memory_when_the_layer_is_moved() -> None:
    layer = Linear(40, 24)
    for move in (lambda: layer.half().float(), lambda: layer.to("meta")):
        layer(torch.zeros(5, 40))
        assert is_packed(layer)
        move()
        assert not is_packed(layer)


@torch.no_grad()
def test_the_copy_is_private() -> None:
    layer, features = Linear(40, 24), torch.randn(5, 40)
    layer(features)
    assert set(layer.state_dict()) == {"weight", "bias"}
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert not is_packed(other)
        assert error(other, features) < 1e-6


def test_gradients_take_the_plain_product() -> None:
    layer, features = Linear(40, 24), torch.randn(5, 40)
    layer(features).sum().backward()
    assert layer.weight.grad is not None
    frozen = Linear(40, 24).requires_grad_(False)
    frozen(features.requires_grad_()).sum().backward()
    assert features.grad is not None
    assert not is_packed(layer)
    assert not is_packed(frozen)


@torch.no_grad()
def test_autocast_and_other_types_take_the_plain_product() -> None:
    layer, features = Linear(40, 24), torch.randn(5, 40)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(features).dtype == torch.bfloat16
    assert layer.double()(features.double()).dtype == torch.float64
    with pytest.raises(RuntimeError):
        layer.float()(features.double())
    assert not is_packed(layer)
    assert layer.to("meta")(features.to("meta")).shape == (5, 24)


@torch.no_grad()
def test_bfloat16_is_as_right_as_the_plain_product() -> None:
    layer, features = Linear(40, 24).bfloat16(), torch.randn(5, 40).bfloat16()
    assert error(layer, features) < 0.01


@needs_packing
@torch.no_grad()
def test_packing_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Linear, "packing", False)
    layer, features = Linear(40, 24), torch.randn(5, 40)
    assert error(layer, features) < 1e-6
    assert not is_packed(layer)
    monkeypatch.setattr(Linear, "direct", False)
    assert torch.equal(layer(features), F.linear(features, layer.weight, layer.bias))
    assert not is_packed(layer)


@needs_packing
@torch.no_grad()
def test_layers_of_others_use_what_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.Linear):
        pass

    network = nn.Sequential(nn.Linear(40, 24), Own(24, 24), nn.LayerNorm(24))
    features, before = torch.randn(5, 40), dict(network.state_dict())
    expected = network(features)
    make_direct(network)
    assert [type(m) for m in network] == [DirectLinear, Own, nn.LayerNorm]
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    products: list[Tensor] = []
    monkeypatch.setattr(linear, "product", lambda *given: products.append(product(*given)) or products[-1])
    assert torch.allclose(network(features), expected, atol=1e-5)
    assert len(products) == 1
    assert type(copy.deepcopy(network[0])) is type(pickle.loads(pickle.dumps(network[0]))) is DirectLinear
    with torch.enable_grad():
        network(features).sum().backward()
    assert network[0].weight.grad is not None
    network[0].weight = nn.Parameter(network[0].weight.T.contiguous().T)
    assert torch.allclose(network(features), expected, atol=1e-5)
    assert len(products) == 1, "transposed weights are for torch's own product"
    network[0].weight = nn.Parameter(network[0].weight.contiguous())
    network(features)
    assert len(products) == 2
    monkeypatch.setattr(DirectLinear, "direct", False)
    network(features)
    assert len(products) == 2


@needs_packing
@torch.no_grad()
def test_networks_use_it() -> None:
    prior = PriorTransformer(num_attention_heads=2, attention_head_dim=16, num_layers=1, embedding_dim=24).eval()
    prior(torch.randn(2, 24), 5, torch.randn(2, 24), torch.randn(2, 77, 24), torch.ones(2, 77))
    plain = [n for n, m in prior.named_modules() if isinstance(m, nn.Linear) and not is_packed(m)]
    assert plain == []


@needs_packing
@torch.no_grad()
def test_weights_of_other_kinds_have_products_of_their_own() -> None:
    class Doubled(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is F.linear:
                return F.linear(args[0], 2 * args[1].as_subclass(Tensor), args[2])
            return super().__torch_function__(func, types, args, kwargs or {})

    layer, features = DirectLinear(40, 24), torch.randn(5, 40)
    expected = F.linear(features, 2 * layer.weight, layer.bias)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Doubled))
    assert torch.equal(layer(features), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@torch.no_grad()
def test_layers_can_be_traced() -> None:
    for layer in (DirectLinear(40, 24), Linear(40, 24)):
        features = torch.randn(5, 40)
        traced = torch.jit.trace(layer, (features,))
        assert torch.allclose(traced(features), layer(features), atol=1e-5)


@needs_packing
def test_inference_mode_multiplies_alike() -> None:
    layer, features = DirectLinear(40, 24), torch.randn(5, 40)
    with torch.no_grad():
        plain = layer(features)
    with torch.inference_mode():
        assert torch.equal(layer(features), plain)
