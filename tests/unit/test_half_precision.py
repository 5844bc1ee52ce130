"""Half precision on CPUs that do not multiply it: float32 products, rounded once, of weights that stay as they are."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.kernels import conv, half_precision, linear
from kandinsky22.kernels.conv import Conv2d, apply_conv
from kandinsky22.kernels.linear import apply_linear, onednn_linear_layers
from kandinsky22.runtime.quantized_layers import QuantizedConv2d, QuantizedLinear

TYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def slow_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat small layers like large ones, on a CPU that multiplies no half precision."""
    monkeypatch.setattr(half_precision, "SLOW_TYPES", TYPES)
    for module in (half_precision, conv, linear):
        monkeypatch.setattr(module, "MIN_MULTIPLICATIONS", 1)


def assert_rounded(out: Tensor, exact: Tensor) -> None:
    """Check that a result is the exact one, rounded once: products of half precision err more."""
    half_step = torch.finfo(out.dtype).eps / 2
    assert ((out.double() - exact).abs() <= half_step * exact.abs() + 1e-5 * exact.abs().max()).all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("block", [2**20, 100], ids=["whole", "in_parts"])
def test_linear(dtype: torch.dtype, rows: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_precision, "BLOCK", block)
    for bias in (True, False):
        layer = nn.Linear(40, 24, bias=bias).to(dtype)
        features = torch.randn(2, rows, 40).to(dtype)
        out = apply_linear(layer, features)
        assert out.dtype == dtype
        exact = features.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
        assert_rounded(out, exact)
        with onednn_linear_layers():
            assert_rounded(layer(features), exact)
        assert "_packed_weight" not in layer.__dict__, "memory stays that of half precision"


@torch.no_grad()
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("block", [2**20, 100], ids=["whole", "in_parts"])
def test_convolution(dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_precision, "KERNEL_BLOCK", block)
    for kernel, stride, bias in itertools.product((1, 3), (1, 2), (True, False)):
        layer = Conv2d(24, 40, kernel, stride, kernel // 2, bias=bias).to(dtype)
        features = torch.randn(2, 24, 16, 16).to(dtype)
        parameters = layer.weight.double(), layer.bias.double() if layer.bias is not None else None
        exact = F.conv2d(features.double(), *parameters, stride, kernel // 2)
        residual = torch.randn(exact.shape).to(dtype)
        assert_rounded(layer(features), exact)
        added = layer(features, residual=residual.clone())
        torch.testing.assert_close(added, layer(features) + residual, rtol=0, atol=0)
        assert "_packed_weight" not in layer.__dict__
        assert layer.out_channels == 40
    upsampling = Conv2d(24, 40, 3, padding=1).to(dtype)
    features = torch.randn(2, 24, 8, 8).to(dtype)
    larger = conv.upsample2x(features).double()
    exact = F.conv2d(larger, upsampling.weight.double(), upsampling.bias.double(), padding=1)  # type: ignore[union-attr]
    assert_rounded(upsampling(features, upsample=True), exact)


def test_gradients_compiled_code_and_computed_weights_take_the_usual_way() -> None:
    layer, features = Conv2d(4, 4, 3, padding=1).to(torch.bfloat16), torch.randn(1, 4, 8, 8).to(torch.bfloat16)
    layer(features).sum().backward()
    assert layer.weight.grad is not None
    assert not half_precision.is_slow(features.float(), layer.weight)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert not half_precision.is_slow(features, layer.weight)
    with torch.no_grad():
        assert half_precision.is_slow(features, layer.weight)
        expected = F.conv2d(features, layer.weight * 2, layer.bias, padding=1)
        nn.utils.parametrize.register_parametrization(layer, "weight", _Twice())
        torch.testing.assert_close(layer(features), expected, rtol=0, atol=0)


class _Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


@torch.no_grad()
def test_weights_of_8_bits() -> None:
    features, image = torch.randn(3, 64), torch.randn(1, 32, 8, 8)
    linear_layer, convolution = nn.Linear(64, 32), nn.Conv2d(32, 32, 3, padding=1)
    for dtype in TYPES:
        matrix = QuantizedLinear.from_linear(linear_layer.to(dtype), "int8")
        kernels = QuantizedConv2d(convolution.to(dtype), dynamic=False)
        for out, exact in (
            (matrix(features.to(dtype)), linear_layer.float()(features)),
            (kernels(image.to(dtype)), convolution.float()(image)),
        ):
            assert out.dtype == dtype
            assert (out.float() - exact).norm() < 0.02 * exact.norm()


@torch.no_grad()
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_plain_convolutions(dtype: torch.dtype) -> None:
    layer, features = nn.Conv2d(4, 40, 1).to(dtype), torch.randn(2, 4, 16, 16).to(dtype)
    exact = F.conv2d(features.double(), layer.weight.double(), layer.bias.double())  # type: ignore[union-attr]
    assert_rounded(half_precision.call_conv(layer, features), exact)
    assert_rounded(apply_conv(layer, features), exact)
    seen = []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert torch.equal(half_precision.call_conv(layer, features), seen[0]), "hooks are called"
