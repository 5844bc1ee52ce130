"""CPU kernels for convolutions, norms and attention: results equal torch's, and unsupported cases fall back to it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.kernels import attention, conv, group_norm, host_memory, linear, winograd
from kandinsky22.kernels.conv import Conv2d, apply_conv, upsample2x
from kandinsky22.kernels.settings import NAMES, optimisations
from kandinsky22.models.layers import GroupNorm, Modulation, ResidualBlock, SpatialNorm, _modulate_tiles
from kandinsky22.models.movq import VQModel

needs_packing = pytest.mark.skipif(not linear.ONEDNN_DTYPES, reason="this torch has no packed products on this machine")
MIN_MULTIPLICATIONS = conv.MIN_MULTIPLICATIONS  # the value before the fixture below replaces it
SIZES = [(1, 3, 8, 8, 8), (2, 12, 20, 12, 20), (3, 6, 5, 4, 36), (1, 4, 4, 68, 4)]  # batch, in, out, height, width


@pytest.fixture(autouse=True)
def small_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MIN_MULTIPLICATIONS", "MIN_WINOGRAD_CHANNELS", "MIN_WINOGRAD_TILES"):
        monkeypatch.setattr(conv, name, 0)
    monkeypatch.setattr(attention, "MIN_TOKENS_WIDE", 8)
    monkeypatch.setattr(attention, "MIN_TOKENS", 8)


def kind(layer: nn.Module) -> str | None:
    pack = vars(layer).get("_packed_weight")
    return None if pack is None else pack.layout


def distance(ours: Tensor, exact: Tensor) -> float:
    assert ours.shape == exact.shape
    return ((ours.double() - exact.double()).abs().max() / exact.abs().max()).item()


def exact_conv(layer: Conv2d, features: Tensor) -> Tensor:
    weight, bias = layer.weight.double(), None if layer.bias is None else layer.bias.double()
    return F.conv2d(features.double(), weight, bias, layer.stride, layer.padding)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_convolution_algorithm_is_accurate(size: tuple[int, ...], bias: bool, mode: type[torch.no_grad]) -> None:
    batch, inside, outside, *sides = size
    layer, features = Conv2d(inside, outside, 3, padding=1, bias=bias), torch.randn(batch, inside, *sides)
    for inputs in (features, features.contiguous(memory_format=torch.channels_last)):
        original = inputs.clone()
        with mode():
            assert distance(layer(inputs), exact_conv(layer, inputs)) < 3e-6
            assert kind(layer) == ("winograd" if linear.ONEDNN_DTYPES else None)
            assert distance(layer(inputs, upsample=True), exact_conv(layer, upsample2x(inputs))) < 1e-6
            assert kind(layer) == ("fused_upsample" if linear.ONEDNN_DTYPES else None)
            with optimisations(winograd=False, fused_upsample=False):
                assert distance(layer(inputs), exact_conv(layer, inputs)) < 1e-6
                assert distance(layer(inputs, upsample=True), exact_conv(layer, upsample2x(inputs))) < 1e-6
                assert kind(layer) == ("conv" if linear.ONEDNN_DTYPES else None)
        assert torch.equal(inputs, original)


@pytest.mark.parametrize("band", [1, 200, 10**6])
@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_large_results_are_computed_in_strips(
    size: tuple[int, ...], band: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "LARGE_BUFFER", 0)
    monkeypatch.setattr(conv, "STRIP_ELEMENTS", band)
    batch, inside, outside, *sides = size
    layer, features = Conv2d(inside, outside, 3, padding=1), torch.randn(batch, inside, *sides)
    for inputs in (features, features.contiguous(memory_format=torch.channels_last)):
        original = inputs.clone()
        with optimisations(winograd=False):
            assert distance(layer(inputs), exact_conv(layer, inputs)) < 1e-6
        assert distance(layer(inputs, upsample=True), exact_conv(layer, upsample2x(inputs))) < 1e-6
        assert torch.equal(inputs, original)


@pytest.mark.parametrize("off", [(), ("winograd", "fused_upsample"), ("packed_conv",)], ids=str)
@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_results_are_added_to_the_residual(size: tuple[int, ...], upsample: bool, off: tuple[str, ...]) -> None:
    batch, inside, outside, *sides = size
    layer, features = Conv2d(inside, outside, 3, padding=1), torch.randn(batch, inside, *sides)
    with optimisations(**dict.fromkeys(off, False)):
        result = exact_conv(layer, upsample2x(features) if upsample else features)
        for order in (torch.contiguous_format, torch.channels_last):
            residual = torch.randn_like(result, dtype=torch.float32).contiguous(memory_format=order)
            expected = result + residual
            summed = layer(features, upsample=upsample, residual=residual)
            assert distance(summed, expected) < 3e-6
            assert summed.data_ptr() == residual.data_ptr()
            with torch.enable_grad():  # autograd may need the residual: it is not overwritten
                before = residual.clone()
                assert (
                    distance(layer(features, upsample=upsample, residual=residual).detach(), result + residual) < 3e-6
                )
                assert torch.equal(residual, before)
        frozen = copy.deepcopy(layer).requires_grad_(False)
        residual = torch.randn_like(result, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
        before = residual.clone()
        with torch.enable_grad():
            frozen(features, upsample=upsample, residual=residual.requires_grad_()).sum().backward()
        assert torch.equal(residual, before)
        assert torch.equal(residual.grad, torch.ones_like(residual))
        residual = torch.randn_like(result, dtype=torch.float32)
        inputs, other = (upsample2x(features) if upsample else features), nn.Conv2d(inside, outside, 1)
        expected = other(inputs) + residual
        assert torch.equal(apply_conv(other, inputs, residual=residual), expected)


@torch.no_grad()
def test_hooks_of_a_layer_get_its_own_output() -> None:
    layer, features = Conv2d(6, 10, 3, padding=1), torch.randn(2, 6, 8, 8)
    outputs: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    for order in (torch.contiguous_format, torch.channels_last):
        residual = torch.randn(2, 10, 8, 8).contiguous(memory_format=order)
        expected = exact_conv(layer, features) + residual
        assert distance(apply_conv(layer, features, residual=residual), expected) < 3e-6
    assert len(outputs) == 2
    assert all(distance(result, exact_conv(layer, features)) < 3e-6 for result in outputs)
    handle.remove()
    layer.register_forward_pre_hook(lambda module, inputs: outputs.append(inputs[0]))
    apply_conv(layer, features, residual=torch.randn(2, 10, 8, 8))
    assert len(outputs) == 3
    layer.forward = lambda features: torch.zeros(1)  # as adapter libraries do
    assert torch.equal(apply_conv(layer, features, residual=torch.ones(1)), torch.ones(1))


@pytest.mark.parametrize("widths", [(32, 64), (64, 64)], ids=str)
@pytest.mark.parametrize("resample", [None, "up", "down"])
@pytest.mark.parametrize("latent_channels", [None, 4])
@torch.no_grad()
def test_blocks_overwrite_only_inplace_inputs(
    widths: tuple[int, int], resample: str | None, latent_channels: int | None
) -> None:
    block = ResidualBlock(*widths, eps=1e-5, resample=resample, latent_channels=latent_channels)
    features = torch.randn(2, widths[0], 8, 12).contiguous(memory_format=torch.channels_last)
    latents, original = torch.randn(2, 4, 4, 6), features.clone()
    with torch.enable_grad():
        expected = block(features, latents=latents, inplace=True).detach()
    assert torch.equal(features, original)
    result = block(features, latents=latents)
    assert torch.equal(features, original)
    assert distance(result, expected) < 1e-5
    assert distance(block(features, latents=latents, inplace=True), expected) < 1e-5
    assert not torch.equal(features, original)


@needs_packing
@pytest.mark.parametrize("settings", [{"stride": 2}, {"padding": 0}, {"kernel_size": 1}], ids=str)
@torch.no_grad()
def test_other_convolutions_are_packed(settings: dict[str, int]) -> None:
    layer = Conv2d(6, 10, **{"kernel_size": 3, "padding": 1, **settings})
    for sides in ((8, 12), (16, 8)):  # weights packed for one size are valid for others
        features = torch.randn(2, 6, *sides)
        assert distance(layer(features), exact_conv(layer, features)) < 1e-6
        assert distance(layer(features, upsample=True), exact_conv(layer, upsample2x(features))) < 1e-6
    assert kind(layer) == "conv"


@needs_packing
@torch.no_grad()
def test_winograd_is_used_for_sides_that_are_multiples_of_four() -> None:
    layer = Conv2d(6, 10, 3, padding=1)
    for sides in ((10, 12), (12, 9)):
        features = torch.randn(2, 6, *sides)
        assert distance(layer(features), exact_conv(layer, features)) < 1e-6
        assert kind(layer) == "conv"


@needs_packing
@torch.no_grad()
def test_small_batches_equal_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "MIN_WINOGRAD_TILES", 8)
    layer, features = Conv2d(6, 10, 3, padding=1), torch.randn(5, 6, 8, 12)
    assert distance(layer(features)[2:3], layer(features[2:3])) < 3e-6
    assert kind(layer) == "conv"
    features = torch.randn(5, 6, 8, 16)
    assert distance(layer(features)[2:3], layer(features[2:3])) < 1e-6
    assert kind(layer) == "winograd"


def test_the_transforms_are_exact() -> None:
    values, weights, results = winograd.transforms()
    for matrix in (values, results):
        assert torch.equal(matrix, matrix.float().double())
    numbers, kernel = torch.randn(36, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    tile = (results @ ((weights @ kernel) * (values @ numbers))).view(4, 4)
    expected = F.conv2d(numbers.view(1, 1, 6, 6), kernel.view(1, 1, 3, 3))[0, 0]
    assert (tile - expected).abs().max() < 1e-12


@torch.no_grad()
def test_bfloat16_is_as_accurate_as_torchs_convolution() -> None:
    layer, features = Conv2d(24, 16, 3, padding=1).bfloat16(), torch.randn(2, 24, 8, 8).bfloat16()
    assert distance(layer(features), exact_conv(layer, features)) < 0.01
    assert kind(layer) == ("conv" if torch.bfloat16 in linear.ONEDNN_DTYPES else None)
    assert distance(layer(features, upsample=True), exact_conv(layer, upsample2x(features))) < 0.01


@torch.no_grad()
def test_packed_weights_follow_the_weight() -> None:
    layer, features = Conv2d(6, 10, 3, padding=1), torch.randn(2, 6, 8, 8)
    changes: list[Callable[[], object]] = [
        lambda: layer.weight.mul_(2),
        lambda: layer.load_state_dict({"weight": torch.randn(10, 6, 3, 3), "bias": torch.zeros(10)}, assign=True),
        lambda: layer.weight.data.mul_(0.5),  # torch counts no version for this change
        lambda: setattr(layer, "weight", nn.Parameter(torch.randn(10, 6, 3, 3))),
        lambda: layer.double().float(),
    ]
    for change in changes:
        for upsample in (False, True):
            expected = exact_conv(layer, upsample2x(features) if upsample else features)
            assert distance(layer(features, upsample=upsample), expected) < 3e-6
            change()
            expected = exact_conv(layer, upsample2x(features) if upsample else features)
            assert distance(layer(features, upsample=upsample), expected) < 3e-6
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert kind(copy.deepcopy(layer)) is None


def test_gradients_and_other_dtypes_use_torchs_convolution() -> None:
    layer, features = Conv2d(6, 10, 3, padding=1), torch.randn(2, 6, 8, 8)
    layer(features, upsample=True).sum().backward()
    assert layer.weight.grad is not None
    frozen = Conv2d(6, 10, 3, padding=1).requires_grad_(False)
    frozen.bias.requires_grad_()
    frozen(features).sum().backward()
    assert frozen.bias.grad is not None
    with torch.no_grad():
        assert layer.double()(features.double()).dtype == torch.float64
        layer.float().pack_weights = False
        assert torch.equal(layer(features), F.conv2d(features, layer.weight, layer.bias, padding=1))
    assert kind(layer) is kind(frozen) is None


@torch.no_grad()
def test_stages_of_movq_are_called_when_they_have_hooks() -> None:
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    movq = VQModel(block_out_channels=(32, 64), layers_per_block=1, num_vq_embeddings=8, **kinds).eval()
    latents = torch.randn(1, 4, 8, 8)
    reference = movq.decode(latents, return_dict=False)[0]
    decoder, copies = movq.decoder, list[tuple[Tensor, Tensor]]()

    def record(module: nn.Module, inputs: Any, output: Tensor) -> None:
        copies.append((output, output.clone()))

    for module in (decoder.conv_in, decoder.mid_block, decoder.up_blocks[0], decoder.up_blocks[0].resnets[0]):
        module.register_forward_hook(record)
    assert distance(movq.decode(latents, return_dict=False)[0], reference) < 1e-5
    assert len(copies) == 4
    assert all(torch.equal(output, copied) for output, copied in copies)
    inputs = torch.randn(1, 64, 8, 8).contiguous(memory_format=torch.channels_last)
    before = inputs.clone()
    decoder.up_blocks[1](decoder.up_blocks[0](inputs, latents), latents)
    decoder.mid_block(inputs, latents)
    assert torch.equal(inputs, before)


# Norms


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("batch", "sides"), [(1, (8, 8)), (2, (16, 24))], ids=str)
@pytest.mark.parametrize("block", [64, 1000, 2**18])
@torch.no_grad()
def test_norms(
    inplace: bool, silu: bool, batch: int, sides: tuple[int, int], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_norm, "NORMALISE_BLOCK", block)
    monkeypatch.setattr(group_norm, "STATISTICS_BLOCK", block)
    features = (torch.randn(batch, 64, *sides) * 3 + 20).contiguous(memory_format=torch.channels_last)
    latents, after = torch.randn(batch, 4, sides[0] // 4, sides[1] // 4), F.silu if silu else lambda x: x
    reference, spatial = GroupNorm(16, 64, eps=1e-5), SpatialNorm(64, 4)
    for parameter in (*reference.parameters(), *spatial.parameters()):
        nn.init.normal_(parameter)
    scale, shift = torch.randn(2, batch, 64, 1, 1)
    normed = F.group_norm(features.double(), 16, reference.weight.double(), reference.bias.double(), 1e-5)
    y, b = (F.interpolate(conv(latents), sides).double() for conv in (spatial.conv_y, spatial.conv_b))
    inner = spatial.norm_layer
    expected = [
        (lambda x, **o: reference(x, **o), normed),
        (
            lambda x, **o: reference(x, modulation=Modulation(scale, shift), **o),
            normed * scale.double() + shift.double(),
        ),
        (
            lambda x, **o: spatial(x, latents, **o),
            F.group_norm(features.double(), 32, inner.weight.double(), inner.bias.double(), 1e-6) * y + b,
        ),
    ]
    for call, exact in expected:
        inputs = features.clone(memory_format=torch.channels_last)
        result = call(inputs, silu=silu, inplace=inplace)
        assert distance(result, after(exact)) < 1e-6
        assert (result.data_ptr() == inputs.data_ptr()) == inplace
        assert inplace or torch.equal(inputs, features)
        with torch.enable_grad():  # computed by torch, which is less accurate
            assert distance(call(features, silu=silu, inplace=inplace), after(exact)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [100, 1200, 2**18])
@pytest.mark.parametrize("places", [(1, 1), (3, 2), (6, 4), (24, 16)], ids=str)
@torch.no_grad()
def test_rows_of_a_norm_may_be_taken_from_anywhere(
    places: tuple[int, int], block: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_norm, "NORMALISE_BLOCK", block)
    pixels = torch.randn(2, 24, 16, 8, dtype=dtype)
    scale, shift = torch.randn(2, 2, 8, *places)
    mean, deviation = torch.randn(2, 1, 1, 8), torch.rand(2, 1, 1, 8) + 0.5
    table = group_norm.ScaleShift(group_norm.GroupStatistics(mean, deviation), scale, shift)
    y, b = (F.interpolate(part, (24, 16)).double().permute(0, 2, 3, 1) for part in (scale, shift))
    exact = F.silu((pixels.double() - mean) / deviation * y + b)
    bound = 1e-6 if dtype == torch.float32 else 4e-3  # bfloat16 has 8 bits: 2e-3 on average
    for first, last in ((0, 24), (1, 23), (5, 6), (7, 18), (23, 24)):
        result = table.apply(pixels[:, first:last], first, 24, silu=True)
        assert result.dtype == dtype
        assert distance(result, exact[:, first:last]) < bound


@torch.no_grad()
def test_norms_are_more_precise_than_torchs_in_channels_last() -> None:
    features = (torch.randn(1, 64, 64, 64) + 10).contiguous(memory_format=torch.channels_last)
    norm = GroupNorm(16, 64, eps=1e-5)
    exact = F.group_norm(features.double(), 16)
    assert distance(norm(features), exact) < 5e-7 < distance(F.group_norm(features, 16), exact)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sides", [(8, 8), (16, 24), (32, 8)], ids=str)
def test_modulation_by_broadcasting_equals_that_by_interpolation(
    sides: tuple[int, int], dtype: torch.dtype, order: torch.memory_format
) -> None:
    """GPUs take the first of these; the values are the same bit for bit."""
    normed = torch.randn(2, 5, *sides).to(dtype).contiguous(memory_format=order).requires_grad_()
    small = Modulation(*torch.randn(2, 2, 5, 8, 8).to(dtype))
    scale, shift = (F.interpolate(part, sides, mode="nearest") for part in small)
    expected = torch.addcmul(shift, normed, scale)
    assert torch.equal(_modulate_tiles(normed, small, inplace=True), expected)
    with torch.no_grad():
        copied = normed.detach().clone(memory_format=torch.preserve_format)
        assert torch.equal(_modulate_tiles(copied, small, inplace=True), expected)
        other = Modulation(*(part.double() for part in small))
        assert _modulate_tiles(normed, other, inplace=True).dtype == torch.float64
    _modulate_tiles(normed, small, inplace=True).sum().backward()
    assert torch.equal(normed.grad, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_one_item_with_groups_of_one_value_becomes_the_shift(
    dtype: torch.dtype, modulated: bool, gradients: bool
) -> None:
    """As in batches; torch's function refuses it, for the sake of batch norms in training."""
    norm = GroupNorm(32, 32).to(dtype)
    torch.nn.init.uniform_(norm.bias)
    features = torch.randn(1, 32, 1, 1, dtype=dtype).contiguous(memory_format=torch.channels_last)
    shift = torch.rand(1, 32, 1, 1, dtype=dtype)
    modulation = Modulation(torch.rand(1, 32, 1, 1, dtype=dtype), shift) if modulated else None
    with torch.set_grad_enabled(gradients):
        alone = norm(features, modulation=modulation)
        pair = None if modulation is None else Modulation(*(part.repeat(2, 1, 1, 1) for part in modulation))
        assert torch.equal(alone, norm(features.repeat(2, 1, 1, 1), modulation=pair)[:1])
    if modulation is None:
        torch.testing.assert_close(alone.flatten(), norm.bias, atol=0.002, rtol=0.01)


@torch.no_grad()
def test_norms_in_bfloat16() -> None:
    features = (torch.randn(2, 64, 16, 16) + 2).bfloat16().contiguous(memory_format=torch.channels_last)
    norm = GroupNorm(16, 64, eps=1e-5).bfloat16()
    for inplace in (False, True):
        result = norm(features.clone(memory_format=torch.channels_last), silu=True, inplace=inplace)
        assert result.dtype == torch.bfloat16
        assert distance(result, F.silu(F.group_norm(features.double(), 16))) < 0.005


@pytest.mark.parametrize("resample", [None, "up", "down"])
def test_blocks_with_and_without_gradients_agree(resample: str | None) -> None:
    block = ResidualBlock(32, 64, eps=1e-5, time_dim=8, resample=resample)
    features, time = torch.randn(2, 32, 16, 16), torch.randn(2, 8)
    original = features.clone()
    reference = block(features, time)
    with torch.no_grad():
        assert distance(block(features, time), reference.detach()) < 1e-5
    assert torch.equal(features, original)


# Attention


@needs_packing
@pytest.mark.parametrize("weights", [100, 2**20])
@pytest.mark.parametrize("shape", [(1, 1, 40, 16), (2, 3, 300, 8), (1, 2, 17, 512)], ids=str)
@torch.no_grad()
def test_large_attention(shape: tuple[int, ...], weights: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "CHUNK_WEIGHTS", weights * shape[2])
    query = torch.randn(shape)
    key, value = torch.randn(2, *shape[:2], shape[2] + 5, shape[3])
    key, value = (part.transpose(1, 2).contiguous().transpose(1, 2) for part in (key, value))
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    assert attention.is_supported(query, key, value)
    assert distance(attention.attention(query, key, value), exact) < 1e-5
    if torch.bfloat16 not in linear.ONEDNN_DTYPES:
        pytest.skip("this CPU does not multiply bfloat16")
    halves = [part.bfloat16() for part in (query, key, value)]
    assert attention.attention(*halves).dtype == torch.bfloat16
    assert distance(attention.attention(*halves), exact) < 0.03


# All kernels together


@torch.no_grad()
def test_all_optimisations_can_be_switched_off() -> None:
    movq = VQModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        num_vq_embeddings=8,
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    ).eval()
    latents = torch.randn(1, 4, 8, 8)
    fast = movq.decode(latents, return_dict=False)[0]
    kinds = {kind(module) for module in movq.modules()}
    assert {"conv", "winograd", "fused_upsample"} <= kinds or not linear.ONEDNN_DTYPES
    reference = copy.deepcopy(movq)
    with optimisations(**dict.fromkeys(NAMES, False)):
        assert distance(reference.decode(latents, return_dict=False)[0], fast) < 1e-5
    assert {kind(module) for module in reference.modules() if isinstance(module, Conv2d)} == {None}


@pytest.mark.parametrize(("channels", "side"), [(64, 24), (64, 28), (128, 14), (128, 32)])
def test_results_are_equal_bit_for_bit_in_every_batch(
    channels: int, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv, "MIN_MULTIPLICATIONS", MIN_MULTIPLICATIONS)
    layer = Conv2d(channels, channels, 3, padding=1)
    features = torch.randn(2, channels, side, side)
    with torch.no_grad():
        assert torch.equal(layer(features)[:1], layer(features[:1]))


def test_encoding_does_not_depend_on_the_layout_of_pictures() -> None:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    movq = VQModel(block_out_channels=(32, 64), layers_per_block=1, num_vq_embeddings=8, **blocks).eval()
    pictures = torch.rand(1, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        reference, from_channels_last = (
            movq.encode(p)[0] for p in (pictures, pictures.contiguous(memory_format=torch.channels_last))
        )
    assert torch.equal(reference, from_channels_last)
