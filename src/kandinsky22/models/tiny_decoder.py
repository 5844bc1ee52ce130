"""A small network that decodes the latents of MoVQ in a fraction of the time, distilled from MoVQ's own decoder.

The design is that of TAESD (Bohan 2023, https://github.com/madebyollin/taesd): convolutions, residual blocks and
nearest-neighbour upsampling, without attention and without norms. Most of the parameters are at small sizes, where a
convolution is cheap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.checkpoints.weights import read_tensors
from kandinsky22.config import Config
from kandinsky22.errors import CheckpointError, ConfigError, invalid
from kandinsky22.kernels import host_memory
from kandinsky22.kernels.conv import Conv2d, apply_conv
from kandinsky22.models.base import Model, checked_dtype
from kandinsky22.models.config_rules import MAX_LAYERS_PER_BLOCK, Settings
from kandinsky22.models.layers import is_private
from kandinsky22.models.movq import VQModel

SUBFOLDER = "tiny_decoder"  # folder of the network in a checkpoint
SAMPLED_WEIGHTS = 16  # of MoVQ, which tell apart any two autoencoders
MAX_DEVIATION = 0.05  # of these weights between dtypes, relative to their norm


@dataclass(frozen=True)
class TinyDecoderConfig(Config):
    """Constructor arguments of `TinyDecoder`; the defaults are for the published Kandinsky 2.2 autoencoder.

    Attributes:
        latent_channels: Channels of the latents.
        out_channels: Channels of the decoded images.
        block_out_channels: Channels per resolution level, from full size to latent size.
        layers_per_block: Residual blocks per resolution level, in the same order.
        movq_weights: Some weights of the MoVQ that the network was trained against, see `sampled_weights`; empty if it
            is not known.
    """

    latent_channels: int = 4
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (32, 64, 128, 192)
    layers_per_block: tuple[int, ...] = (1, 2, 2, 2)
    movq_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        settings = Settings("TinyDecoder", self)
        settings.integers(("latent_channels", "out_channels"))
        settings.widths("block_out_channels", multiple_of={"1": 1})
        levels, layers = len(self.block_out_channels), self.layers_per_block
        settings.check("layers_per_block", isinstance(layers, tuple), f"a list of {levels} numbers of blocks")
        for index, count in enumerate(layers):
            accepted = type(count) is int and 0 <= count <= MAX_LAYERS_PER_BLOCK
            settings.check(f"layers_per_block[{index}]", accepted, f"an integer from 0 to {MAX_LAYERS_PER_BLOCK}")
        if len(layers) != levels:
            expected = f"{levels}, one per entry of block_out_channels"
            raise invalid("TinyDecoder: len(layers_per_block)", len(layers), expected, error=ConfigError)
        sample: Any = self.movq_weights
        is_sample = isinstance(sample, tuple) and len(sample) in (0, SAMPLED_WEIGHTS)
        settings.check("movq_weights", is_sample, f"{SAMPLED_WEIGHTS} numbers, or none")
        for index, weight in enumerate(self.movq_weights):
            accepted = type(weight) in (int, float) and math.isfinite(weight)
            settings.check(f"movq_weights[{index}]", accepted, "a finite number")
        widths = zip(self.block_out_channels, layers, strict=True)
        settings.parameters(sum(9 * width**2 * (2 * count + 2) for width, count in widths))

    @classmethod
    def for_movq(cls, movq: VQModel, block_out_channels: tuple[int, ...] | None = None) -> TinyDecoderConfig:
        """Return the config of a decoder for an autoencoder.

        Args:
            movq: The autoencoder.
            block_out_channels: Channels per resolution level, from full size to latent size; None for those that suit
                the autoencoder's own.

        Raises:
            ConfigError: If the number of channels is not that of the resolution levels.
        """
        config = movq.config
        levels = len(config.block_out_channels)
        if block_out_channels is None:
            block_out_channels = tuple(
                max(8, config.block_out_channels[0] * min(level, 6) // 4) for level in (1, 2, 4, *range(6, levels + 3))
            )[:levels]
        elif len(block_out_channels) != levels:
            expected = f"{levels}, one per resolution level of MoVQ"
            raise invalid("len(block_out_channels)", len(block_out_channels), expected, error=ConfigError)
        return cls(
            latent_channels=config.latent_channels,
            out_channels=config.out_channels,
            block_out_channels=block_out_channels,
            layers_per_block=(1, *[2] * (levels - 1)),
            movq_weights=sampled_weights(movq) or (),
        )


def sampled_weights(movq: VQModel) -> tuple[float, ...] | None:
    """Return a few weights of an autoencoder, by which it is recognised in any dtype.

    Args:
        movq: The autoencoder.

    Returns:
        The weights; None while they are not in memory.
    """
    weight = movq.decoder.conv_in.weight.detach()
    if weight.is_meta:
        return None
    flat = weight.reshape(-1)
    positions = torch.linspace(0, flat.numel() - 1, SAMPLED_WEIGHTS).long()
    return tuple(round(value, 6) for value in flat[positions.to(flat.device)].float().tolist())


class TinyDecoder(Model):
    """Latents (batch, 4, h, w) to images (batch, 3, f h, f w) in about [-1, 1]; f is `upscale_factor`."""

    config_class = TinyDecoderConfig
    positional = ("latent_channels", "out_channels", "block_out_channels", "layers_per_block")
    supports_gradient_checkpointing = True
    config: TinyDecoderConfig

    def __init__(self, /, *arguments: Any, **config: Any) -> None:
        super().__init__(*arguments, **config)
        cfg = self.config
        widths, layers = cfg.block_out_channels[::-1], cfg.layers_per_block[::-1]
        self.conv_in = Conv2d(cfg.latent_channels, widths[0], 3, padding=1)
        self.up_blocks = nn.ModuleList(
            TinyStage(width, after, layers=count)
            for width, after, count in zip(widths, (*widths[1:], None), layers, strict=True)
        )
        self.conv_out = Conv2d(widths[-1], cfg.out_channels, 3, padding=1)

    @property
    def upscale_factor(self) -> int:
        """Pixels per latent along one side: 8 for the published autoencoder."""
        return int(2 ** (len(self.config.block_out_channels) - 1))

    def forward(self, latents: Tensor) -> Tensor:
        """Return images (batch, out_channels, f h, f w), about in [-1, 1].

        Args:
            latents: Latents (batch, latent_channels, h, w), not quantized.
        """
        inplace = not torch.is_grad_enabled() and all(is_private(module) for module in self.modules())
        # the layout of the CPU's kernels; training steps take two thirds of the time in it
        layout = torch.channels_last if latents.device.type == "cpu" else torch.contiguous_format
        with host_memory.reuse_buffers():
            features = _relu(apply_conv(self.conv_in, latents.contiguous(memory_format=layout)), inplace)
            for stage in self.up_blocks:
                features = self.run_block(stage, features, inplace=inplace)
            return apply_conv(self.conv_out, features).contiguous()

    @classmethod
    def from_single_file(
        cls, path: str | Path, *, torch_dtype: torch.dtype | Literal["auto"] | None = None
    ) -> TinyDecoder:
        """Load a network from its weights alone, whose shapes are those of the config.

        Args:
            path: The file of weights.
            torch_dtype: Type to convert weights to; None for float32, "auto" for the stored type.

        Returns:
            The network, in evaluation mode, on the CPU.

        Raises:
            CheckpointError: The file is missing or damaged, or its tensors are not those of such a network.
            InputError: `torch_dtype` is not a floating-point type.
        """
        dtype = checked_dtype(torch_dtype)
        shapes = {name: tuple(tensor.shape) for name, tensor in read_tensors(Path(path))}
        try:
            config = _config_of_shapes(shapes)
        except (KeyError, IndexError, ConfigError) as error:
            raise CheckpointError(f"{path} holds other tensors than those of a tiny decoder") from error
        with torch.device("meta"):
            network = cls(**config)
        network._fill([Path(path)], dtype)
        return network.eval()

    def belongs_to(self, movq: VQModel) -> bool:
        """Return whether the network was trained against an autoencoder, as far as its config tells.

        Args:
            movq: The autoencoder.
        """
        known, current = self.config.movq_weights, sampled_weights(movq)
        if not known or current is None:
            return True
        return math.dist(known, current) <= MAX_DEVIATION * math.hypot(*known)


def _config_of_shapes(shapes: Mapping[str, tuple[int, ...]]) -> TinyDecoderConfig:
    """Return the config of a network whose tensors have these shapes, by name."""
    levels = 1 + sum(name.endswith(".upsampler.weight") for name in shapes)
    widths = [shapes["conv_in.weight"][0]]
    widths += [shapes[f"up_blocks.{level}.upsampler.weight"][0] for level in range(levels - 1)]
    layers = [
        len({name.split(".")[3] for name in shapes if name.startswith(f"up_blocks.{level}.resnets.")})
        for level in range(levels)
    ]
    return TinyDecoderConfig(
        latent_channels=shapes["conv_in.weight"][1],
        out_channels=shapes["conv_out.weight"][0],
        block_out_channels=tuple(reversed(widths)),
        layers_per_block=tuple(reversed(layers)),
    )


class TinyStage(nn.Module):
    """Residual blocks at one resolution level, then twice the size by nearest neighbour and a convolution.

    Args:
        channels: Channels of the blocks.
        next_channels: Channels of the next level; None at full size, where nothing follows.
        layers: Number of blocks.
    """

    def __init__(self, channels: int, next_channels: int | None, *, layers: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(TinyBlock(channels) for _ in range(layers))
        self.upsampler = None if next_channels is None else Conv2d(channels, next_channels, 3, padding=1)

    def forward(self, features: Tensor, *, inplace: bool = False) -> Tensor:
        """Return features (batch, next_channels, 2 H, 2 W), or of the same size at the last level.

        Args:
            features: Tensor (batch, channels, H, W).
            inplace: Whether `features` and intermediate results may be overwritten.
        """
        for block in self.resnets:
            features = block(features, inplace=inplace)
        if self.upsampler is None:
            return features
        return _relu(apply_conv(self.upsampler, features, upsample=True), inplace)


class TinyBlock(nn.Module):
    """Two convolutions, added to their input: relu(x + conv(relu(conv(x)))).

    Args:
        channels: Channels of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = Conv2d(channels, channels, 3, padding=1)
        self.conv2 = Conv2d(channels, channels, 3, padding=1)

    def forward(self, features: Tensor, *, inplace: bool = False) -> Tensor:
        """Return features (batch, channels, H, W).

        Args:
            features: Tensor (batch, channels, H, W).
            inplace: Whether `features` and intermediate results may be overwritten.
        """
        hidden = _relu(apply_conv(self.conv1, features), inplace)
        if inplace:
            return _relu(apply_conv(self.conv2, hidden, residual=features), inplace)
        return F.relu(apply_conv(self.conv2, hidden) + features)


def _relu(features: Tensor, inplace: bool) -> Tensor:
    return F.relu(features, inplace=inplace)
