"""Layers that multiply integers of 8 bits: rounding, ranges, sums in place, upsampling, batches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.kernels.conv import Conv2d
from kandinsky22.runtime import int8_layers, quantized_layers
from kandinsky22.runtime.calibration import Range, observed_ranges
from kandinsky22.runtime.int8_layers import Int8Conv2d, Int8Linear, rounded
from kandinsky22.runtime.quantized_layers import HAS_INTEGER_CONVOLUTION

DTYPES = [torch.float32, torch.bfloat16]
needs_integers = pytest.mark.skipif(not HAS_INTEGER_CONVOLUTION, reason="oneDNN multiplies no integers here")


def error(ours: Tensor, theirs: Tensor) -> float:
    """Return the root mean squared error, relative to the deviation of the expected values."""
    return ((ours.float() - theirs.float()).square().mean().sqrt() / theirs.float().std()).item()


def convolution(dtype: torch.dtype, features: Tensor, kernel: int = 3, stride: int = 1) -> tuple[Conv2d, Int8Conv2d]:
    torch.manual_seed(0)
    exact = Conv2d(48, 32, kernel, stride=stride, padding=kernel // 2)
    layer = Int8Conv2d(exact).to(dtype)
    layer.set_input_range(features.min().item(), features.max().item())
    return exact, layer


def channels_last(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return F.silu(torch.randn(*shape, generator=generator)).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("fused", [False, True])
def test_rounding_is_to_the_nearest_level_within_256(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_layers, "largest_level", lambda: 255)
    available = int8_layers._has_fused_rounding()  # torch warns at the first call of the operator
    monkeypatch.setattr(int8_layers, "_has_fused_rounding", lambda: fused and available)
    values = torch.tensor([-9.0, -1.0, -0.3, 0.0, 0.2, 1.0, 30.0, 99.0])
    levels = rounded(values, 0.25, 8)
    assert levels.dtype == torch.uint8
    assert levels.tolist() == [0, 4, 7, 8, 9, 12, 128, 255]
    assert rounded(values.bfloat16(), 0.25, 8).tolist() == [0, 4, 7, 8, 9, 12, 128, 255]
    image = channels_last(2, 3, 4, 5)
    levels = rounded(image, 0.02, 20)
    assert levels.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(levels, (image / 0.02).round().add(20).clamp(0, 255).to(torch.uint8))


@pytest.mark.parametrize("fused", [False, True])
def test_rounding_to_7_bits(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    available = int8_layers._has_fused_rounding()
    monkeypatch.setattr(int8_layers, "_has_fused_rounding", lambda: fused and available)
    monkeypatch.setattr(int8_layers, "largest_level", lambda: 127)
    values = torch.tensor([-9.0, -1.0, -0.3, 0.0, 0.2, 1.0, 25.0, 30.0, 99.0])
    assert rounded(values, 0.25, 8).tolist() == [0, 4, 7, 8, 9, 12, 108, 127, 127]


@needs_integers
@pytest.mark.parametrize("largest", [None, 127])
@torch.no_grad()
def test_the_largest_products_do_not_overflow(largest: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs without VNNI add products in 16 bits: equal weights and inputs at the end of their range are the worst."""
    if largest is not None:
        for module in (int8_layers, quantized_layers):
            monkeypatch.setattr(module, "largest_level", lambda: largest)
    image = torch.rand(1, 48, 10, 12).add_(3.0).contiguous(memory_format=torch.channels_last)
    convolution, matrix = nn.Conv2d(48, 32, 3, padding=1, bias=False), nn.Linear(48, 32, bias=False)
    for layer in (convolution, matrix):
        layer.weight.fill_(0.1)
    tokens = image[0].flatten(1).T.contiguous()
    calibrated = Int8Conv2d(convolution), Int8Linear(matrix, per_token=False)
    for layer in calibrated:
        layer.set_input_range(0.0, 4.0)
    dynamic, per_token = quantized_layers.QuantizedConv2d(convolution, dynamic=True), Int8Linear(matrix, per_token=True)
    for layer, exact, features in (
        (calibrated[0], convolution, image),
        (calibrated[1], matrix, tokens),
        (dynamic, convolution, image),
        (per_token, matrix, tokens),
    ):
        torch.testing.assert_close(layer(features), exact(features), rtol=0.01, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (1, 1), (3, 2)])
@pytest.mark.parametrize("size", [(10, 12), (6, 8)])  # padded by oneDNN, and here
def test_convolutions(size: tuple[int, int], kernel: int, stride: int, dtype: torch.dtype) -> None:
    features = channels_last(2, 48, *size)
    exact, layer = convolution(dtype, features, kernel, stride)
    with torch.no_grad():
        expected, result = exact(features), layer(features.to(dtype))
        assert result.dtype == dtype
        assert error(result, expected) < 0.02
        assert error(layer(features[1:].to(dtype)), result[1:]) < 1e-6  # whatever else is in the batch
        shortcut = channels_last(*expected.shape)
        total = shortcut.to(dtype, copy=True)
        assert error(layer(features.to(dtype), residual=total), expected + shortcut) < 0.02
        if HAS_INTEGER_CONVOLUTION:
            assert error(total, expected + shortcut) < 0.02  # in place
        other_layout = layer(features.to(dtype).contiguous())
        assert torch.equal(other_layout, result)


@pytest.mark.parametrize("dtype", DTYPES)
def test_upsampling_convolutions(dtype: torch.dtype) -> None:
    features = channels_last(2, 48, 5, 7)
    exact, layer = convolution(dtype, features)
    with torch.no_grad():
        expected = exact(features, upsample=True)
        assert error(layer(features.to(dtype), upsample=True), expected) < 0.02
        shortcut = channels_last(*expected.shape)
        total = layer(features.to(dtype), upsample=True, residual=shortcut.to(dtype, copy=True))
        assert error(total, expected + shortcut) < 0.02
        assert error(layer(features.to(dtype)), exact(features)) < 0.02  # packed again


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_token", [False, True])
def test_linear_layers(per_token: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    exact, tokens = nn.Linear(64, 48), torch.randn(2, 10, 64)
    layer = Int8Linear(exact, per_token=per_token).to(dtype)
    tokens[0, 0] *= 4 if per_token else 1
    if not per_token:
        layer.set_input_range(tokens.min().item(), tokens.max().item())
    with torch.no_grad():
        expected, result = exact(tokens), layer(tokens.to(dtype))
        assert result.dtype == dtype
        assert result.shape == expected.shape
        assert error(result, expected) < 0.02
        assert error(layer(tokens[1:].to(dtype)), result[1:]) < 1e-6


@needs_integers
def test_without_integer_products_the_inputs_are_not_rounded() -> None:
    features = channels_last(2, 48, 10, 12)
    exact, layer = convolution(torch.float32, features)
    with torch.no_grad():
        integers, expected = layer(features), exact(features)
    floats = layer(features).detach()  # a gradient could be needed
    assert not torch.equal(floats, integers)
    assert error(floats, expected) < error(integers, expected)


def test_low_rank_products_are_added() -> None:
    features = channels_last(2, 48, 10, 12)
    _, layer = convolution(torch.float32, features)
    with torch.no_grad():
        before = layer(features)
        down, up = torch.randn(2, 48, 3, 3), torch.randn(32, 2)
        layer.set_low_rank((down, up))
        product = F.conv2d(F.conv2d(features, down, padding=1), up[:, :, None, None])
        assert error(layer(features), before + product) < 1e-5
        assert error(layer(features, residual=product.clone()), before + 2 * product) < 1e-5


def test_ranges_cover_what_was_seen_unless_cutting_it_rounds_better() -> None:
    torch.manual_seed(0)
    layers = {"even": nn.Linear(64, 8), "outlier": nn.Linear(64, 8), "idle": nn.Linear(64, 8)}
    even = torch.rand(4000, 64) * 3 - 1
    outlier = even.clone()
    outlier[0, 0] = 8.0
    outlier[1:] = outlier[1:].clamp(max=1)

    def run() -> None:
        layers["even"](even)
        layers["outlier"](outlier)

    ranges = observed_ranges(layers, run)
    assert ranges.keys() == {"even", "outlier"}
    assert ranges["even"] == Range(even.min().item(), even.max().item())
    assert 1 < ranges["outlier"].high < 8
    assert not any(layer._forward_pre_hooks for layer in layers.values())
