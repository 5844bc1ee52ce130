"""Building blocks of the UNet and MoVQ: residual block, resampling, norms, time embedding."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.runtime.packed import Linear


class GroupNorm(nn.GroupNorm):
    """Group normalisation (https://arxiv.org/abs/1803.08494) that takes, and ignores, the decoder's latents."""

    def forward(self, features: Tensor, latents: Tensor | None = None) -> Tensor:
        """Normalised features of the same shape."""
        return super().forward(features)


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

    def forward(self, features: Tensor, latents: Tensor | None = None) -> Tensor:
        """Features (batch, channels, H, W) of the same shape, modulated by latents (batch, latent_channels, h, w)."""
        assert latents is not None
        size = features.shape[-2:]
        scale = F.interpolate(self.conv_y(latents), size, mode="nearest")
        shift = F.interpolate(self.conv_b(latents), size, mode="nearest")
        return torch.addcmul(shift, self.norm_layer(features), scale)


def double(features: Tensor) -> Tensor:
    """Each pixel repeated in a 2x2 square."""
    return F.interpolate(features, scale_factor=2.0, mode="nearest")


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
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = None if time_dim is None else Linear(time_dim, 2 * out_channels)
        self.norm2 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        self.resample = {None: None, "up": double, "down": halve}[resample]

    def forward(self, features: Tensor, time: Tensor | None = None, latents: Tensor | None = None) -> Tensor:
        """Features (batch, out_channels, H', W') from (batch, in_channels, H, W).

        `time` is the *activated* time embedding (batch or 1, time_dim): silu(embedding) is the same for every block,
        so whoever owns the blocks computes it once.
        """
        hidden = F.silu(self.norm1(features, latents))
        if self.resample is not None:
            hidden, features = self.resample(hidden), self.resample(features)
        hidden = self.norm2(self.conv1(hidden), latents)
        if self.time_emb_proj is not None:
            scale, shift = self.time_emb_proj(time)[:, :, None, None].chunk(2, dim=1)
            hidden = torch.addcmul(shift, hidden, 1 + scale)
        hidden = self.conv2(F.silu(hidden))
        return hidden + (features if self.conv_shortcut is None else self.conv_shortcut(features))


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
