"""Packed linear layers: results equal torch's, packed weights follow the weights, and unsupported cases fall back."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.kernels import linear
from kandinsky22.kernels.linear import apply_linear, onednn_linear, onednn_linear_layers
from kandinsky22.kernels.settings import optimisations
from kandinsky22.models import PriorTransformer

needs_packing = pytest.mark.skipif(not linear.ONEDNN_DTYPES, reason="this torch has no packed products on this machine")


@pytest.fixture(autouse=True)
def small_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "MIN_MULTIPLICATIONS", 1)


def is_packed(layer: nn.Module) -> bool:
    return layer.__dict__.get("_packed_weight") is not None


def tiny_prior() -> PriorTransformer:
    return PriorTransformer(num_attention_heads=2, attention_head_dim=16, num_layers=1, embedding_dim=24).eval()


def error(layer: nn.Linear, features: Tensor) -> float:
    expected = F.linear(features.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    return ((apply_linear(layer, features).double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("shape", [(40,), (1, 40), (6, 40), (2, 3, 40), (2, 1, 3, 40), (300, 40)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_products_are_accurate(shape: tuple[int, ...], bias: bool, mode: type[torch.no_grad]) -> None:
    layer = nn.Linear(40, 24, bias=bias)
    with mode():
        assert apply_linear(layer, torch.zeros(shape)).shape == (*shape[:-1], 24)
        assert error(layer, torch.randn(shape)) < 1e-6
        assert error(layer, torch.randn(40, *shape[:-1]).movedim(0, -1)) < 1e-6, "in any memory layout"
    assert is_packed(layer) == bool(linear.ONEDNN_DTYPES)


@torch.no_grad()
def test_packed_weights_follow_the_weight() -> None:
    layer, features = nn.Linear(40, 24), torch.randn(5, 40)
    changes = [
        lambda: layer.weight.mul_(2),
        lambda: layer.load_state_dict({"weight": torch.randn(24, 40), "bias": torch.zeros(24)}),
        lambda: layer.load_state_dict({"weight": torch.randn(24, 40), "bias": torch.zeros(24)}, assign=True),
        lambda: setattr(layer.weight, "data", torch.randn(24, 40)),
        lambda: layer.weight.data.mul_(0.5),  # torch counts no version for this change
        lambda: layer.weight.data.numpy().fill(0.25),  # neither for this one
        lambda: setattr(layer, "weight", nn.Parameter(torch.randn(24, 40))),
        lambda: layer.double().float(),
    ]
    for change in changes:
        assert error(layer, features) < 1e-6
        change()
        assert error(layer, features) < 1e-6


@needs_packing
@torch.no_grad()
def test_packed_weights_are_dropped_when_the_network_moves() -> None:
    network = tiny_prior()
    layer = network.proj_in
    for move in (lambda: network.half().float(), lambda: network.to("meta")):
        apply_linear(layer, torch.zeros(5, 24))
        assert is_packed(layer)
        move()
        assert not is_packed(layer)


@torch.no_grad()
def test_packed_weights_are_private() -> None:
    layer, features = nn.Linear(40, 24), torch.randn(5, 40)
    apply_linear(layer, features)
    assert set(layer.state_dict()) == {"weight", "bias"}
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert not is_packed(other)
        assert error(other, features) < 1e-6


def test_gradients_use_torchs_product() -> None:
    layer, features = nn.Linear(40, 24), torch.randn(5, 40)
    apply_linear(layer, features).sum().backward()
    assert layer.weight.grad is not None
    frozen = nn.Linear(40, 24).requires_grad_(False)
    apply_linear(frozen, features.requires_grad_()).sum().backward()
    assert features.grad is not None
    assert not is_packed(layer)
    assert not is_packed(frozen)


@torch.no_grad()
def test_autocast_and_other_dtypes_use_torchs_product() -> None:
    layer, features = nn.Linear(40, 24), torch.randn(5, 40)
    with torch.autocast("cpu", torch.bfloat16):
        assert apply_linear(layer, features).dtype == torch.bfloat16
    assert apply_linear(layer.double(), features.double()).dtype == torch.float64
    with pytest.raises(RuntimeError):
        apply_linear(layer.float(), features.double())
    assert not is_packed(layer)
    assert apply_linear(layer.to("meta"), features.to("meta")).shape == (5, 24)


@torch.no_grad()
def test_bfloat16_is_as_accurate_as_torchs_product() -> None:
    layer, features = nn.Linear(40, 24).bfloat16(), torch.randn(5, 40).bfloat16()
    assert error(layer, features) < 0.01


@needs_packing
@torch.no_grad()
def test_packing_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, features = nn.Linear(40, 24), torch.randn(5, 40)
    layer.pack_weights = False
    assert error(layer, features) < 1e-6
    assert not is_packed(layer)
    layer.pack_weights = True
    products = count_products(monkeypatch)
    with optimisations(packed_linear=False):
        assert error(layer, features) < 1e-6
        assert not is_packed(layer)
        assert len(products) == 1
        with optimisations(onednn_linear=False):
            assert torch.equal(apply_linear(layer, features), F.linear(features, layer.weight, layer.bias))
    assert not is_packed(layer)
    assert len(products) == 1


def count_products(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    products: list[Tensor] = []
    monkeypatch.setattr(
        linear, "onednn_linear", lambda *arguments: products.append(onednn_linear(*arguments)) or products[-1]
    )
    return products


@needs_packing
@torch.no_grad()
def test_layers_of_other_libraries_use_the_faster_product(monkeypatch: pytest.MonkeyPatch) -> None:
    class OwnProduct(nn.Linear):
        pass

    network = nn.Sequential(nn.Linear(40, 24), OwnProduct(24, 24), nn.LayerNorm(24))
    features, before = torch.randn(5, 40), dict(network.state_dict())
    expected, products = network(features), count_products(monkeypatch)
    with onednn_linear_layers():
        assert torch.allclose(network(features), expected, atol=1e-5)
        assert len(products) == 2
        F.linear(features, weight=network[0].weight, bias=None)
        assert len(products) == 3, "arguments may be passed by name"
        products.clear()
        with torch.enable_grad():
            network(features).sum().backward()
        assert network[0].weight.grad is not None
        assert not products
        network[0].weight = nn.Parameter(network[0].weight.T.contiguous().T)
        assert torch.allclose(network(features), expected, atol=1e-5)
        assert len(products) == 1, "transposed weights are for torch's own product"
        network[0].weight = nn.Parameter(network[0].weight.contiguous())
        network(features)
        assert len(products) == 3
    assert torch.equal(network(features), expected)
    with optimisations(onednn_linear=False), onednn_linear_layers():
        assert torch.equal(network(features), expected)
    assert len(products) == 3, "only inside the context, and only with the setting"
    assert [type(m) for m in network] == [nn.Linear, OwnProduct, nn.LayerNorm]
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


@needs_packing
@torch.no_grad()
def test_other_threads_use_torchs_own_product(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, features = nn.Linear(40, 24), torch.randn(5, 40)
    expected, products = layer(features), count_products(monkeypatch)
    with onednn_linear_layers(), ThreadPoolExecutor(1) as pool:
        assert torch.allclose(pool.submit(torch.no_grad()(layer), features).result(), expected, atol=1e-6)
    assert not products


@torch.no_grad()
def test_compiled_layers_of_other_libraries_run_in_the_context() -> None:
    layer, features = nn.Linear(40, 24), torch.randn(5, 40)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with onednn_linear_layers():
        assert torch.allclose(compiled(features), layer(features), atol=1e-5)


@needs_packing
@torch.no_grad()
def test_networks_pack_their_linear_layers() -> None:
    prior = tiny_prior()
    prior(torch.randn(2, 24), 5, torch.randn(2, 24), torch.randn(2, 77, 24), torch.ones(2, 77))
    unpacked = [n for n, m in prior.named_modules() if isinstance(m, nn.Linear) and not is_packed(m)]
    assert unpacked == []


@needs_packing
@torch.no_grad()
def test_tensor_subclasses_use_their_own_product() -> None:
    class Doubled(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is F.linear:
                return F.linear(args[0], 2 * args[1].as_subclass(Tensor), args[2])
            return super().__torch_function__(func, types, args, kwargs or {})

    features = torch.randn(5, 40)
    layer = nn.Linear(40, 24)
    expected = F.linear(features, 2 * layer.weight, layer.bias)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Doubled))
    assert torch.equal(apply_linear(layer, features), expected)
    with onednn_linear_layers():
        assert torch.equal(layer(features), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_layers_can_be_traced() -> None:
    layer, features = nn.Linear(40, 24).requires_grad_(False), torch.randn(5, 40)
    with onednn_linear_layers():
        traced = torch.jit.trace(layer, (features,))
        assert torch.allclose(traced(features), layer(features), atol=1e-5)
    traced = torch.jit.trace(lambda inputs: apply_linear(layer, inputs), (features,))
    assert torch.allclose(traced(features), layer(features), atol=1e-5)


@needs_packing
def test_inference_mode_gives_equal_products() -> None:
    layer, features = nn.Linear(40, 24), torch.randn(5, 40)
    with onednn_linear_layers():
        with torch.no_grad():
            unpacked = layer(features)
        with torch.inference_mode():
            assert torch.equal(layer(features), unpacked)
