"""Quantized weights of 8 and 4 bits: errors, stored tensors, and refused settings."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kandinsky22 import PriorTransformer, UNet2DConditionModel
from kandinsky22.errors import CheckpointError, ConfigError, InputError, MissingDependencyError
from kandinsky22.runtime import quantized_layers
from kandinsky22.runtime.quantize import KINDS, kind_of, quantize

pytest.importorskip("torchao")

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "encoder_hid_dim": 32,
    "cross_attention_dim": 32,
    "attention_head_dim": 16,
}
PRIOR: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "embedding_dim": 32, "num_layers": 2}
# Largest difference from the same network in float32, relative to the largest value; about twice the measured one.
WITHIN = {"int8": 0.03, "int8-dynamic": 0.06, "int8-static": 0.06, "int4": 0.25}


def make_network(kind: type[Any], dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    result = kind(**(UNET if kind is UNet2DConditionModel else PRIOR)).eval()
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.normal_(std=0.15)
    return result.to(dtype)


def run(net: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(net.dtype)

    with torch.no_grad():
        if isinstance(net, UNet2DConditionModel):
            return net.denoise(draw(2, 4, 8, 8), 500, net.encode_condition(draw(2, 32))).float()
        mask = torch.ones(2, 77, dtype=torch.bool)
        return net(draw(2, 32), 500, draw(2, 32), draw(2, 77, 32), mask).predicted_image_embedding.float()


def error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def test_static_leaves_the_last_shortcuts_alone() -> None:
    """More than half of the error of all layers comes from them: benchmarks/int8_sensitivity.py."""
    net = make_network(UNet2DConditionModel, torch.float32)
    quantize(net, "int8-static")
    shortcuts = {name: type(layer) for name, layer in net.named_modules() if name.endswith("conv_shortcut")}
    last = f"up_blocks.{len(net.up_blocks) - 1}."
    kept = {name for name, kind in shortcuts.items() if issubclass(kind, torch.nn.Conv2d)}
    assert kept == {name for name in shortcuts if name.startswith(last)}
    assert kept
    assert len(kept) < len(shortcuts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network_class", [UNet2DConditionModel, PriorTransformer])
def test_results_stay_close_and_weights_become_small(network_class: type[Any], kind: str) -> None:
    dtype = torch.bfloat16 if kind == "int4" else torch.float32
    net = make_network(network_class, dtype)
    exact, before = run(make_network(network_class, torch.float32)), sum(p.nbytes for p in net.parameters())
    quantize(net, kind)
    assert kind_of(net) == kind
    assert 1e-4 < error(run(net), exact) < WITHIN[kind]
    after = sum(p.nbytes for p in net.parameters())
    share = {"int4": 0.7, "int8-static": 0.5}.get(kind, 0.45)
    assert after < share * before  # norms and embeddings are a large part of a tiny network


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network_class", [UNet2DConditionModel, PriorTransformer])
def test_quantized_weights_are_saved_and_loaded_bit_for_bit(
    network_class: type[Any], kind: str, tmp_path: Path
) -> None:
    dtype = torch.bfloat16 if kind == "int4" else torch.float32
    net = make_network(network_class, dtype)
    quantize(net, kind)
    net.save_pretrained(tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert entry == {"quant_method": "kandinsky22", "kind": kind}
    stored = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in stored.values()} >= {torch.uint8 if kind == "int4" else torch.int8}
    assert sum(t.nbytes for t in stored.values()) == sum(p.nbytes for p in net.state_dict().values())
    again = network_class.from_pretrained(tmp_path, torch_dtype="auto")
    assert kind_of(again) == kind
    assert error(run(again), run(net)) < 1e-6  # rounding depends on the memory alignment of weights
    again.save_pretrained(tmp_path / "again")
    twice = load_file(tmp_path / "again" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(twice[name], tensor) for name, tensor in stored.items())


def test_a_quantized_checkpoint_is_read_strictly(tmp_path: Path) -> None:
    net = make_network(PriorTransformer, torch.float32)
    quantize(net, "int8")
    net.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({name: t for name, t in tensors.items() if not name.endswith("to_q.weight_scale")}, file)
    with pytest.raises(CheckpointError, match=r"2 missing: .*to_q\.weight_scale"):
        PriorTransformer.from_pretrained(tmp_path)


def test_other_libraries_quantized_checkpoints_are_named(tmp_path: Path) -> None:
    make_network(PriorTransformer, torch.float32).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gguf"}}))
    with pytest.raises(
        ConfigError,
        match=r"quantization_config=.*gguf.*expected quant_method 'kandinsky22'.*int8, int8-dynamic, int8-static, int4",
    ):
        PriorTransformer.from_pretrained(tmp_path)


def test_8_bit_networks_can_be_converted_copied_and_computed_in_half(tmp_path: Path) -> None:
    net = make_network(UNet2DConditionModel, torch.float32)
    exact = run(net)
    quantize(net, "int8")
    assert torch.equal(run(copy.deepcopy(net)), run(net))
    assert error(run(net.to(torch.bfloat16)), exact) < 0.05


def test_4_bit_weights_compute_in_bfloat16_only(tmp_path: Path) -> None:
    net = make_network(PriorTransformer, torch.float32)
    with pytest.raises(InputError, match=r"kind='int4'.*PriorTransformer of torch\.float32 on cpu.*bfloat16 on CPUs"):
        quantize(net, "int4")
    assert torch.equal(run(net), run(make_network(PriorTransformer, torch.float32)))  # untouched
    quantize(net.to(torch.bfloat16), "int4")
    net.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"torch_dtype=torch\.float32"):
        PriorTransformer.from_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"not torch\.float32"):
        run(net.to(torch.float32))


def test_stored_4_bit_numbers_do_not_depend_on_the_order_of_this_cpu() -> None:
    """Stored row by row, two per byte, they are the values that the layer multiplies with."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 48, bias=False).to(torch.bfloat16)
    result = quantized_layers.QuantizedLinear.from_linear(layer, "int4")
    stored = result.portable_weight()
    numbers = torch.stack([stored & 15, stored >> 4], dim=-1).flatten(1).float()
    scale, zero = result.weight_scale_and_zero.float().unbind(-1)  # (groups, out)
    weight = (numbers.view(48, -1, quantized_layers.GROUP) - 8) * scale.T[..., None] + zero.T[..., None]
    weight = weight.flatten(1)
    assert error(weight, layer.weight.float()) < 0.1
    product = result(torch.eye(64, dtype=torch.bfloat16)).T.float()
    assert torch.allclose(product, weight, atol=0.01 * weight.abs().max().item())


def test_invalid_quantization_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    net = make_network(PriorTransformer, torch.float32)
    with pytest.raises(
        InputError, match="kind='int2' is invalid: expected one of int8, int8-dynamic, int8-static, int4"
    ):
        quantize(net, "int2")
    quantize(net, "int8")
    with pytest.raises(InputError, match=r"quantized already \(int8\)"):
        quantize(net, "int8")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'kandinsky22\[quantize\]'"):
        quantize(make_network(PriorTransformer, torch.float32), "int8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (1, 1, 0), (3, 2, 1)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_convolutions(dynamic: bool, kernel: int, stride: int, padding: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    exact_layer = nn.Conv2d(48, 32, kernel, stride=stride, padding=padding).to(dtype)
    quantized_layer = quantized_layers.QuantizedConv2d(exact_layer, dynamic=dynamic)
    for features in (torch.randn(2, 48, 10, 12), torch.rand(2, 48, 10, 12), torch.zeros(2, 48, 10, 12)):
        features[1] *= 5
        with torch.no_grad():
            expected, result = exact_layer(features.to(dtype)), quantized_layer(features.to(dtype))
            assert result.dtype == dtype
            assert error(result, expected) < 0.02 * 255 / quantized_layers.largest_level()
            assert error(quantized_layer(features[1:].to(dtype)), result[1:]) < (
                1e-6 if dtype == torch.float32 else 0.01
            )
            if stride == 1:
                doubled = features.repeat_interleave(2, -1).repeat_interleave(2, -2).to(dtype)
                assert torch.equal(quantized_layer(features.to(dtype), upsample=True), quantized_layer(doubled))


def test_weights_are_converted_without_integer_products(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    exact_layer, features = nn.Conv2d(32, 32, 3, padding=1), torch.randn(1, 32, 8, 8)
    monkeypatch.setattr(quantized_layers, "HAS_INTEGER_CONVOLUTION", False)
    with torch.no_grad():
        elsewhere = quantized_layers.QuantizedConv2d(exact_layer, dynamic=True)(features)
        assert torch.equal(elsewhere, quantized_layers.QuantizedConv2d(exact_layer, dynamic=False)(features))


def test_integer_products_are_used_where_supported() -> None:
    torch.manual_seed(0)
    exact_layer, features = nn.Conv2d(32, 32, 3, padding=1), torch.randn(1, 32, 8, 8)
    with torch.no_grad():
        result = [quantized_layers.QuantizedConv2d(exact_layer, dynamic=dynamic)(features) for dynamic in (False, True)]
    assert torch.equal(*result) is not quantized_layers.HAS_INTEGER_CONVOLUTION


def test_importing_torchao_suppresses_warnings_of_its_loggers_only() -> None:
    logger, level, disabled = (
        logging.getLogger("torchao"),
        logging.getLogger("torchao").level,
        logging.root.manager.disable,
    )
    with quantized_layers._errors_only("torchao"):
        assert not logging.getLogger("torchao.kernel.intmm").isEnabledFor(logging.WARNING)
        assert logging.getLogger("torchao.kernel.intmm").isEnabledFor(logging.ERROR)
        assert logging.getLogger("kandinsky22").isEnabledFor(logging.WARNING)
    assert (logger.level, logging.root.manager.disable) == (level, disabled)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["int8", "int8-dynamic"])
def test_8_bit_networks_on_a_gpu(kind: str) -> None:
    net = make_network(UNet2DConditionModel, torch.float32)
    exact = run(net)
    quantize(net, kind)
    net.to("cuda", torch.float16)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        sample, embeds = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 32, generator=generator)
        condition = net.encode_condition(embeds.to("cuda", torch.float16))
        result = net.denoise(sample.to("cuda", torch.float16), 500, condition)
    assert error(result.float().cpu(), exact) < WITHIN["int8-dynamic"]
