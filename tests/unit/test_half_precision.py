"""Half precision on CPUs that do not multiply it: float32 products, rounded once, of weights that stay as they are."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.kernels import conv, half_precision, linear
from kandinsky22.kernels.conv import Conv2d, apply_conv
from kandinsky22.kernels.linear import apply_linear, onednn_linear_layers
from kandinsky22.kernels.settings import optimisations
from kandinsky22.runtime.int8_layers import Int8Linear
from kandinsky22.runtime.quantized_layers import QuantizedConv2d, QuantizedLinear

TYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def float32_products(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Treat small layers like large ones, on a CPU that multiplies no half precision; returns the types of results."""
    monkeypatch.setattr(half_precision, "SLOW_TYPES", TYPES)
    for module in (half_precision, conv, linear):
        monkeypatch.setattr(module, "MIN_MULTIPLICATIONS", 1)
    types: list[torch.dtype] = []
    original = half_precision._in_parts

    def in_parts(product: Any, *arguments: Any, **options: Any) -> Tensor:
        def recorded(*tensors: Tensor | None) -> Tensor:
            out: Tensor = product(*tensors)
            types.append(out.dtype)
            return out

        return original(recorded, *arguments, **options)

    monkeypatch.setattr(half_precision, "_in_parts", in_parts)
    return types


def assert_rounded(out: Tensor, exact: Tensor) -> None:
    """Check that a result is the exact one, rounded once."""
    half_step = torch.finfo(out.dtype).eps / 2
    assert ((out.double() - exact).abs() <= half_step * exact.abs() + 1e-5 * exact.abs().max()).all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("block", [2**20, 100], ids=["whole", "in_parts"])
def test_linear(
    dtype: torch.dtype,
    rows: int,
    block: int,
    float32_products: list[torch.dtype],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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
        assert "_packed_weight" not in layer.__dict__, "weights take the memory of half precision"
    assert len(float32_products) >= 4 and set(float32_products) == {torch.float32}
    with optimisations(float32_products=False):
        before = len(float32_products)
        apply_linear(layer, features)
        assert len(float32_products) == before


@torch.no_grad()
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("block", [2**20, 100], ids=["whole", "in_parts"])
def test_convolution(
    dtype: torch.dtype, block: int, float32_products: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert set(float32_products) == {torch.float32}
    assert len(float32_products) >= (1 + 8 * 3) * (1 if block > 100 else 3)


class _Scaled(Conv2d):
    def __init__(self) -> None:
        super().__init__(4, 4, 3, padding=1)
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, features: Tensor, upsample: bool = False, residual: Tensor | None = None) -> Tensor:
        return super().forward(features, upsample, residual) * self.gain


@torch.no_grad()
def test_layers_of_other_kinds_take_the_usual_way(float32_products: list[torch.dtype]) -> None:
    features = torch.randn(1, 4, 8, 8).bfloat16()
    grouped, scaled, biased = Conv2d(4, 4, 3, padding=1, groups=2), _Scaled(), Conv2d(4, 4, 3, padding=1)
    nn.utils.parametrize.register_parametrization(biased, "bias", _Twice())
    for layer in (grouped, scaled, biased):
        layer.bfloat16()
        expected = F.conv2d(features, layer.weight, layer.bias, padding=1, groups=layer.groups)
        expected = expected * layer.gain if layer is scaled else expected
        torch.testing.assert_close(layer(features), expected, rtol=0.02, atol=0.02)
    plain = nn.Conv2d(4, 4, 3, padding=1, groups=2).bfloat16()
    torch.testing.assert_close(half_precision.call_conv(plain, features), plain(features), rtol=0, atol=0)
    assert not float32_products


@torch.no_grad()
@pytest.mark.parametrize("types", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)], ids=str)
def test_types_that_differ_are_an_error(types: tuple[torch.dtype, torch.dtype]) -> None:
    for layer, shape in ((Conv2d(4, 4, 3, padding=1), (1, 4, 8, 8)), (nn.Linear(4, 4), (1, 4))):
        features = torch.randn(shape).to(types[0])
        layer.to(types[1])
        with pytest.raises(RuntimeError):
            apply_linear(layer, features) if isinstance(layer, nn.Linear) else layer(features)


def test_gradients_autocast_and_computed_weights_take_the_usual_way() -> None:
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
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_weights_of_8_bits_with_large_inputs_and_adapters(dtype: torch.dtype) -> None:
    """Sums of 8-bit integers overflow in float16 before they are scaled."""
    features, image = 100 * torch.randn(3, 256), 100 * torch.randn(1, 64, 8, 8)
    matrix, kernels = nn.Linear(256, 32).to(dtype), nn.Conv2d(64, 32, 3, padding=1).to(dtype)
    for layer, weight, inputs in (
        (QuantizedLinear.from_linear(matrix, "int8"), matrix.weight, features),
        (Int8Linear(matrix, per_token=False), matrix.weight, features),
        (QuantizedConv2d(kernels, dynamic=False), kernels.weight, image),
    ):
        is_conv = inputs.ndim == 4
        exact = (kernels if is_conv else matrix).float()(inputs)
        if isinstance(layer, Int8Linear):
            layer.set_input_range(float(inputs.min()), float(inputs.max()))
        down, up = 0.01 * torch.randn(2, *weight.shape[1:]), torch.randn(32, 2)
        layer.set_low_rank((down, up))
        change = (up @ down.flatten(1)).view(weight.shape)
        exact = exact + (F.conv2d(inputs, change, padding=1) if is_conv else inputs @ change.T)
        out = layer(inputs.to(dtype))
        assert out.dtype == dtype
        assert (out.float() - exact).norm() < 0.03 * exact.norm()


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
