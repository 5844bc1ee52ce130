"""The tiny decoder as a network: shapes, files, hooks, kernels and configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.unit.tiny_models import TINY_MOVQ, assert_same_weights

from kandinsky22.errors import CheckpointError, ConfigError, InputError
from kandinsky22.kernels.settings import optimisations
from kandinsky22.models import TinyDecoder, VQModel
from kandinsky22.models.tiny_decoder import TinyDecoderConfig

TINY: dict[str, Any] = {"block_out_channels": (8, 12, 16), "layers_per_block": (0, 1, 2)}


@pytest.fixture
def network() -> TinyDecoder:
    return TinyDecoder(**TINY).eval()


def test_the_published_size_has_1_to_3_million_parameters() -> None:
    with torch.device("meta"):
        movq, network = VQModel(), TinyDecoder()
        assert 1e6 < network.num_parameters() < 3e6
        assert TinyDecoderConfig.for_movq(movq) == TinyDecoderConfig()  # weights on the meta device are not known
        assert network(torch.empty(2, 4, 8, 6)).shape == (2, 3, 64, 48)


@torch.no_grad()
def test_a_network_decodes_batches_of_any_size_row_by_row(network: TinyDecoder) -> None:
    latents = torch.randn(3, 4, 5, 7)
    images = network(latents)
    assert images.shape == (3, 3, 20, 28) and network.upscale_factor == 4
    assert images.is_contiguous()
    torch.testing.assert_close(network(latents[1:2]), images[1:2], rtol=1e-4, atol=1e-5)


def test_kernels_and_gradients_agree_with_torch() -> None:
    network, latents = TinyDecoder(block_out_channels=(32, 64), layers_per_block=(1, 1)), torch.randn(2, 4, 48, 48)
    with torch.no_grad():
        fast = network(latents)
        with optimisations(packed_conv=False, buffer_pool=False):
            plain = network(latents)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)
    with_gradients = network(latents)
    with_gradients.sum().backward()
    torch.testing.assert_close(with_gradients, plain, rtol=1e-4, atol=1e-5)
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(network.parameters()))
    network.zero_grad()
    network.enable_gradient_checkpointing()
    network(latents).sum().backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_hooks_see_features_that_nothing_overwrites(network: TinyDecoder) -> None:
    latents = torch.randn(1, 4, 8, 8)
    expected, seen = network(latents), []
    block = network.up_blocks[0].resnets[0]
    for module in (block, block.conv1, block.conv2):
        module.register_forward_hook(lambda _, inputs, output: seen.append((output, output.clone())))
    torch.testing.assert_close(network(latents), expected, rtol=1e-4, atol=1e-5)
    assert len(seen) == 3
    assert all(torch.equal(output, copy) for output, copy in seen)


def test_saved_networks_load_from_their_folder_and_their_file(network: TinyDecoder, tmp_path: Path) -> None:
    network.save_pretrained(tmp_path)
    loaded = TinyDecoder.from_pretrained(tmp_path)
    assert loaded.config == network.config
    assert_same_weights(loaded, network)
    alone = TinyDecoder.from_single_file(tmp_path / "diffusion_pytorch_model.safetensors", torch_dtype=torch.bfloat16)
    assert alone.config == network.config and alone.dtype == torch.bfloat16
    assert_same_weights(alone.float(), network.to(torch.bfloat16).float())


def test_other_files_and_settings_are_refused(tmp_path: Path) -> None:
    for number, tensors in enumerate(({"x": torch.ones(1)}, {"conv_in.weight": torch.ones(2, 2, 3, 3)})):
        save_file(tensors, tmp_path / f"{number}.safetensors")
        with pytest.raises(CheckpointError, match="other tensors than those of a tiny decoder"):
            TinyDecoder.from_single_file(tmp_path / f"{number}.safetensors")
    with pytest.raises(CheckpointError):
        TinyDecoder.from_single_file(tmp_path / "nothing.safetensors")
    with pytest.raises(InputError, match="torch_dtype"):
        TinyDecoder.from_single_file(tmp_path / "0.safetensors", torch_dtype=torch.int8)
    VQModel(**TINY_MOVQ).save_pretrained(tmp_path / "movq")
    with pytest.raises(ConfigError, match="config of a VQModel"):
        TinyDecoder.from_pretrained(tmp_path / "movq")
    invalid: tuple[dict[str, Any], ...] = (
        {"layers_per_block": (1,)},
        {"layers_per_block": (1, 1, 1, -1)},
        {"block_out_channels": (8, 0)},
        {"block_out_channels": "8"},
        {"movq_weights": (1.0,)},
        {"movq_weights": (float("nan"),) * 16},
        {"latent_channels": 0},
        {"other": 1},
    )
    for settings in invalid:
        with pytest.raises(ConfigError):
            TinyDecoder(**settings)


def test_a_network_knows_its_autoencoder_in_any_dtype() -> None:
    movq, other = VQModel(**TINY_MOVQ), VQModel(**TINY_MOVQ)
    network = TinyDecoder(**TinyDecoderConfig.for_movq(movq, (8, 8)))
    assert network.belongs_to(movq) and not network.belongs_to(other)
    for dtype in (torch.bfloat16, torch.float16):
        assert network.belongs_to(movq.to(dtype))
    assert TinyDecoder(**TINY).belongs_to(other), "without a record, nothing is known"
    with pytest.raises(ConfigError, match="block_out_channels"):
        TinyDecoderConfig.for_movq(movq, (8, 8, 8))
