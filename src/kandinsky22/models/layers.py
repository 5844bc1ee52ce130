"""Building blocks of the UNet and MoVQ: residual block, resampling, norms, time embedding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.kernels import group_norm
from kandinsky22.kernels.conv import Conv2d, added, double
from kandinsky22.kernels.group_norm import Table
from kandinsky22.kernels.linear import Linear
from kandinsky22.models.movq_tiling import Rows, measured


class GroupNorm(nn.GroupNorm):
    """Group normalisation (https://arxiv.org/abs/1803.08494) that takes, and ignores, the decoder's latents."""

    def forward(
        self,
        features: Tensor | Rows,
        latents: Tensor | None = None,
        *,
        modulation: Sequence[Tensor] | None = None,
        activated: bool = False,
        spent: bool = False,
    ) -> Any:
        """Normalised features of the same shape, times the first of `modulation` plus the second, then through silu if
        they are to be `activated`. The memory of `spent` features may be used for them. Of `Rows`, their table."""
        return _normalised(super().forward, self, features, modulation, activated, spent)


class SpatialNorm(nn.Module):
    """MoVQ's modulated norm: norm(f) * y(z) + b(z), where z are the latents, one for each place
    (https://arxiv.org/abs/2209.09002, equation 4).

    The two 1x1 convolutions commute with nearest-neighbour upsampling, so they run at the size of the latents.
    """

    def __init__(self, channels: int, latent_channels: int) -> None:
        super().__init__()
        # 32 groups whatever the config says about other norms: so it is in the published network
        self.norm_layer = nn.GroupNorm(32, channels, eps=1e-6)
        self.conv_y = nn.Conv2d(latent_channels, channels, 1)
        self.conv_b = nn.Conv2d(latent_channels, channels, 1)

    def forward(
        self, features: Tensor | Rows, latents: Tensor | None = None, *, activated: bool = False, spent: bool = False
    ) -> Any:
        """Features (batch, channels, H, W) of the same shape, modulated by latents (batch, latent_channels, h, w).

        The rest is as in GroupNorm.
        """
        assert latents is not None
        modulation = self.conv_y(latents), self.conv_b(latents)
        return _normalised(self.norm_layer, self.norm_layer, features, modulation, activated, spent)


def _normalised(
    plain: Callable[[Tensor], Tensor],
    norm: nn.GroupNorm,
    features: Tensor | Rows,
    modulation: Sequence[Tensor] | None,
    activated: bool,
    spent: bool,
) -> Tensor | Table:
    """silu(norm(features) * scale + shift), as far as wanted, by scale and shift of the same or of a smaller size."""
    if not isinstance(features, Tensor) or group_norm.suits(features):
        scale, shift = (part[None, :, None, None].float() for part in (norm.weight, norm.bias))
        if modulation is not None:
            scale, shift = modulation[0] * scale, torch.addcmul(modulation[1].float(), modulation[0].float(), shift)
        if not isinstance(features, Tensor):
            return Table(measured(features, norm.num_groups, norm.eps), scale, shift)
        how = {"activated": activated, "spent": spent}
        return group_norm.group_norm(features, norm.num_groups, norm.eps, scale, shift, **how)
    out = plain(features)
    if modulation is not None:
        size = features.shape[-2:]
        spread = modulation[0].shape[-2:] not in (size, (1, 1))
        scale, shift = (F.interpolate(p, size, mode="nearest") for p in modulation) if spread else modulation
        out = torch.addcmul(shift, out, scale)
    return F.silu(out, inplace=not torch.is_grad_enabled()) if activated else out


def halve(features: Tensor) -> Tensor:
    """The mean of each 2x2 square."""
    return F.avg_pool2d(features, 2)


class ResidualBlock(nn.Module):
    """norm, silu, conv, norm, silu, conv, added to a shortcut; the one residual block of the UNet and of MoVQ.

    `time_dim` adds a scale and shift from the time embedding after the second norm; `latent_channels` takes the norms
    of MoVQ's decoder; `resample` ("up" or "down") changes the size by two between the first norm and convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        eps: float,
        groups: int = 32,
        time_dim: int | None = None,
        latent_channels: int | None = None,
        resample: str | None = None,
    ) -> None:
        super().__init__()

        def norm(channels: int) -> nn.Module:
            if latent_channels is None:
                return GroupNorm(groups, channels, eps=eps)
            return SpatialNorm(channels, latent_channels)

        self.norm1 = norm(in_channels)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = None if time_dim is None else Linear(time_dim, 2 * out_channels)
        self.norm2 = norm(out_channels)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None if in_channels == out_channels else Conv2d(in_channels, out_channels, 1)
        self.resample = resample

    def forward(
        self, features: Tensor, time: Tensor | None = None, latents: Tensor | None = None, *, spent: bool = False
    ) -> Tensor:
        """Features (batch, out_channels, H', W') from (batch, in_channels, H, W).

        `time` is the *activated* time embedding (batch or 1, time_dim): silu(embedding) is the same for every block,
        so whoever owns the blocks computes it once. The memory of `spent` features may be used.
        """
        # what is compiled changes nothing that it is given
        spent = spent and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        shortcut = features if self.resample is None else {"up": double, "down": halve}[self.resample](features)
        if self.conv_shortcut is not None:
            shortcut = self.conv_shortcut(shortcut)
        own = shortcut is not features
        hidden = self.norm1(features, latents, activated=True, spent=spent and own)
        if self.resample == "down":
            hidden = halve(hidden)
        hidden = self.conv1(hidden, doubled=self.resample == "up")
        if self.time_emb_proj is None:
            hidden = self.norm2(hidden, latents, activated=True, spent=True)
        else:
            scale, shift = self.time_emb_proj(time)[:, :, None, None].chunk(2, dim=1)
            hidden = self.norm2(hidden, modulation=(1 + scale, shift), activated=True, spent=True)
        if own or spent:
            return added(self.conv2, hidden, shortcut)
        hidden = self.conv2(hidden)
        return hidden + shortcut if torch.is_grad_enabled() else hidden.add_(shortcut)


def sinusoidal_embedding(timestep: Tensor | float, dim: int, device: torch.device) -> Tensor:
    """Timesteps as [cos, sin] of `dim` / 2 frequencies from 1 down to 1/10000 (https://arxiv.org/abs/1706.03762, 3.5).

    Returns float32 of shape (1, dim) for a single timestep, (batch, dim) for one timestep per sample.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=device) / half)
    angles = torch.as_tensor(timestep, device=device).reshape(-1, 1).float() * frequencies
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


class TimeEmbedding(nn.Module):
    """Sinusoids of the timestep through two linear layers with a silu between them."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.linear_1 = Linear(in_dim, out_dim)
        self.linear_2 = Linear(out_dim, out_dim)

    def forward(self, timestep: Tensor | float) -> Tensor:
        """(1, out_dim) for a single timestep, (batch, out_dim) for one per sample."""
        weight = self.linear_1.weight
        waves = sinusoidal_embedding(timestep, self.in_dim, weight.device).to(weight.dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))
