"""Stages of MoVQ's encoder and decoder: residual blocks, attention and changes of size."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.kernels.conv import Conv2d, apply_conv
from kandinsky22.kernels.modules import runs_own_forward
from kandinsky22.models.attention import ImageAttention
from kandinsky22.models.checkpointing import Checkpointing
from kandinsky22.models.layers import GroupNorm, ResidualBlock, SpatialNorm, apply_norm, is_private

if TYPE_CHECKING:
    from kandinsky22.models.movq import VQModelConfig

EPS = 1e-6  # added to the variance in every norm of the published network


class MoVQStage(nn.Module):
    """Residual blocks at one resolution level, the first of them followed by attention, then a change of size.

    Args:
        channels: Channels before the first block and after each block.
        attentions: Number of blocks that are followed by attention.
        groups: Groups of channels in the norms.
        latent_channels: Channels of the latents that modulate the norms; None for group norms.
        resample: "down" or "up" changes the size by two at the end; None keeps it.
    """

    def __init__(
        self,
        channels: list[int],
        *,
        attentions: int,
        groups: int,
        latent_channels: int | None = None,
        resample: str | None = None,
    ) -> None:
        super().__init__()
        width = channels[-1]
        norms: dict[str, Any] = {"eps": EPS, "groups": groups, "latent_channels": latent_channels}
        self.resnets = nn.ModuleList(
            ResidualBlock(before, after, **norms) for before, after in itertools.pairwise(channels)
        )
        self.attentions = nn.ModuleList(ImageAttention(width, head_dim=width, **norms) for _ in range(attentions))
        if resample == "down":
            self.downsamplers = nn.ModuleList([Downsample(width)])
        elif resample == "up":
            self.upsamplers = nn.ModuleList([Upsample(width)])
        self.resampler = {None: None, "down": "downsamplers", "up": "upsamplers"}[resample]

    def layers(self) -> Iterator[nn.Module]:
        """Yield residual blocks, attention layers and the resampler in the order of their use."""
        for index, block in enumerate(self.resnets):
            yield block
            if index < len(self.attentions):
                yield self.attentions[index]
        if self.resampler is not None:
            yield getattr(self, self.resampler)[0]

    def forward(self, features: Tensor, latents: Tensor | None = None) -> Tensor:
        """Return features (batch, channels, H', W') at the size of the next stage.

        Args:
            features: Tensor (batch, channels, H, W).
            latents: Tensor (batch, latent_channels, h, w); None for stages without `latent_channels`.
        """
        return run_layers(self.layers(), features, latents, inplace=False)


def run_layers(layers: Iterable[nn.Module], features: Tensor, latents: Tensor | None, *, inplace: bool) -> Tensor:
    """Run layers one after the other.

    A residual block may overwrite its input if the layer before it returned a new tensor that no hook received.

    Args:
        layers: Blocks, attention layers, resamplers and stages.
        features: Tensor (batch, channels, H, W).
        latents: Tensor (batch, latent_channels, h, w) for the decoder's norms; None in the encoder.
        inplace: Whether the first layer may overwrite `features`.

    Returns:
        Output of the last layer.
    """
    for layer in layers:
        options = {"inplace": True} if inplace and isinstance(layer, ResidualBlock) and is_private(layer) else {}
        features = layer(features, latents=latents, **options)
        inplace = not isinstance(layer, MoVQStage) and is_private(layer) and is_private(getattr(layer, "conv", layer))
    return features


def stage_layers(stages: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Yield the layers of stages. A stage with hooks, a replaced forward or a compiled form is yielded itself.

    Calling a stage would keep its input in memory until its last layer has run, because the call holds its arguments.

    Args:
        stages: Stages in the order of their use.
    """
    for stage in stages:
        if type(stage) is MoVQStage and runs_own_forward(stage):
            yield from stage.layers()
        else:
            yield stage


def run_stages(
    network: Encoder | Decoder, stages: Iterable[nn.Module], features: Tensor, latents: Tensor | None
) -> Tensor:
    """Run the stages of an encoder or a decoder.

    Args:
        network: The encoder or decoder, with the layer `conv_in` that `features` come from.
        stages: Stages in the order of their use.
        features: Tensor (batch, channels, H, W).
        latents: Tensor (batch, latent_channels, h, w) for the decoder's norms; None in the encoder.

    Returns:
        Output of the last stage.
    """
    if network.gradient_checkpointing and torch.is_grad_enabled():
        for stage in stages:
            features = network.run_block(stage, features, latents)
        return features
    return run_layers(stage_layers(stages), features, latents, inplace=is_private(network.conv_in))


def has_private_layers(network: nn.Module) -> bool:
    """Return whether nothing but its caller holds the outputs of all layers of an encoder or a decoder.

    Args:
        network: The encoder or decoder.
    """
    return torch.compiler.is_compiling() or all(is_private(module) for module in network.modules())


class Downsample(nn.Module):
    """Half the size by a strided convolution that reads one pixel beyond the lower right edge only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, features: Tensor, latents: Tensor | None = None) -> Tensor:
        """Return features (batch, channels, H / 2, W / 2).

        Args:
            features: Tensor (batch, channels, H, W).
            latents: Ignored; all layers of a stage are called alike.
        """
        return self.conv(F.pad(features, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the size by nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, features: Tensor, latents: Tensor | None = None) -> Tensor:
        """Return features (batch, channels, 2 H, 2 W).

        Args:
            features: Tensor (batch, channels, H, W).
            latents: Ignored; all layers of a stage are called alike.
        """
        return apply_conv(self.conv, features, upsample=True)


class Encoder(Checkpointing, nn.Module):
    """Images to features at latent size."""

    def __init__(self, cfg: VQModelConfig) -> None:
        super().__init__()
        widths, groups = cfg.block_out_channels, cfg.norm_num_groups
        self.conv_in = Conv2d(cfg.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            MoVQStage(
                [before] + [width] * cfg.layers_per_block,
                attentions=cfg.layers_per_block if kind.startswith("Attn") else 0,
                groups=groups,
                resample="down" if index < len(widths) - 1 else None,
            )
            for index, (kind, before, width) in enumerate(
                zip(cfg.down_block_types, (widths[0], *widths), widths, strict=False)
            )
        )
        self.mid_block = MoVQStage([widths[-1]] * 3, attentions=1, groups=groups)
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = Conv2d(widths[-1], cfg.latent_channels, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        """Return features (batch, latent_channels, H / f, W / f).

        Args:
            sample: Images (batch, in_channels, H, W) in [-1, 1].
        """
        features = run_stages(self, (*self.down_blocks, self.mid_block), self.conv_in(sample), None)
        return self.conv_out(apply_norm(self.conv_norm_out, features, silu=True, inplace=has_private_layers(self)))


class Decoder(Checkpointing, nn.Module):
    """Features at latent size to images; every norm is modulated by the latents."""

    def __init__(self, cfg: VQModelConfig, code_dim: int) -> None:
        super().__init__()
        widths, groups = cfg.block_out_channels[::-1], cfg.norm_num_groups
        self.conv_in = Conv2d(cfg.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MoVQStage([widths[0]] * 3, attentions=1, groups=groups, latent_channels=code_dim)
        self.up_blocks = nn.ModuleList(
            MoVQStage(
                [before] + [width] * (cfg.layers_per_block + 1),
                attentions=cfg.layers_per_block + 1 if kind.startswith("Attn") else 0,
                groups=groups,
                latent_channels=code_dim,
                resample="up" if index < len(widths) - 1 else None,
            )
            for index, (kind, before, width) in enumerate(
                zip(cfg.up_block_types, (widths[0], *widths), widths, strict=False)
            )
        )
        self.conv_norm_out = SpatialNorm(widths[-1], code_dim)
        self.conv_out = Conv2d(widths[-1], cfg.out_channels, 3, padding=1)

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        """Return images (batch, out_channels, H, W).

        Args:
            features: Tensor (batch, latent_channels, H / f, W / f).
            latents: Tensor (batch, vq_embed_dim, H / f, W / f).
        """
        if latents.device.type == "cpu":
            latents = latents.contiguous(memory_format=torch.channels_last)  # the layout of ScaleShift
        features = run_stages(self, (self.mid_block, *self.up_blocks), self.conv_in(features), latents)
        normed = apply_norm(self.conv_norm_out, features, latents, silu=True, inplace=has_private_layers(self))
        return self.conv_out(normed)
