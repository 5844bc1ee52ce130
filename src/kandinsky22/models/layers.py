"""Building blocks of the UNet and MoVQ: norms, residual block, resampling, time embedding."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.kernels import group_norm
from kandinsky22.kernels.conv import Conv2d, apply_conv, upsample2x
from kandinsky22.kernels.group_norm import ScaleShift
from kandinsky22.kernels.half_precision import call_conv
from kandinsky22.kernels.linear import apply_linear
from kandinsky22.kernels.modules import has_foreign_hooks, has_global_hooks, runs_own_forward
from kandinsky22.models.movq_tiling import RowSource, row_statistics
from kandinsky22.runtime.device_offload import has_offload_forward


class Modulation(NamedTuple):
    """Scale and shift that follow a norm: norm(features) * scale + shift.

    Attributes:
        scale: Tensor (batch, channels, h, w), upsampled to the size of the features by nearest neighbour.
        shift: Tensor of the same shape.
    """

    scale: Tensor
    shift: Tensor


class GroupNorm(nn.GroupNorm):
    """Group normalisation (https://arxiv.org/abs/1803.08494), with an optional modulation and SiLU after it."""

    def forward(
        self,
        features: Tensor,
        latents: Tensor | None = None,
        *,
        modulation: Modulation | None = None,
        silu: bool = False,
        inplace: bool = False,
    ) -> Tensor:
        """Return normalised features (batch, channels, H, W).

        Args:
            features: Tensor (batch, channels, H, W).
            latents: Ignored; this norm and `SpatialNorm` are called alike.
            modulation: Scale and shift to apply after the norm; None applies none.
            silu: Whether SiLU follows.
            inplace: Whether `features` may be overwritten.
        """
        if group_norm.is_supported(features):
            return _fused_norm(self, features, modulation, silu=silu, inplace=inplace)
        # `functional.group_norm` is this with a check that refuses one item with groups of one value
        features = layout_for_backward(features)
        normed = torch.group_norm(features, self.num_groups, self.weight, self.bias, self.eps)
        return _modulate(normed, modulation, silu=silu, inplace=True)

    def scale_shift(self, rows: RowSource, latents: Tensor | None = None) -> ScaleShift:
        """Return what the norm multiplies features with and adds to them, for features that are not all in memory.

        Args:
            rows: Source of the features.
            latents: Ignored.
        """
        return _scale_shift(self, rows, None)


class SpatialNorm(nn.Module):
    """MoVQ's modulated norm: norm(f) * y(z) + b(z), with z the latents (https://arxiv.org/abs/2209.09002, equation 4).

    The two 1x1 convolutions y and b commute with nearest-neighbour upsampling, therefore they run at latent size.
    """

    reads_child_weights = True  # offloading moves them together, quantization leaves them alone

    def __init__(self, channels: int, latent_channels: int) -> None:
        super().__init__()
        # 32 groups whatever the config says about other norms, as in the published network
        self.norm_layer = nn.GroupNorm(32, channels, eps=1e-6)
        self.conv_y = nn.Conv2d(latent_channels, channels, 1)
        self.conv_b = nn.Conv2d(latent_channels, channels, 1)

    def forward(self, features: Tensor, latents: Tensor, *, silu: bool = False, inplace: bool = False) -> Tensor:
        """Return normalised and modulated features (batch, channels, H, W).

        Args:
            features: Tensor (batch, channels, H, W).
            latents: Tensor (batch, latent_channels, h, w); H is a multiple of h, W of w.
            silu: Whether SiLU follows.
            inplace: Whether `features` may be overwritten.
        """
        modulation = self._modulation(latents)
        is_plain = _is_plain_norm(self.norm_layer)
        if is_plain and group_norm.is_supported(features):
            return _fused_norm(self.norm_layer, features, modulation, silu=silu, inplace=inplace)
        return _modulate(self.norm_layer(layout_for_backward(features)), modulation, silu=silu, inplace=is_plain)

    def scale_shift(self, rows: RowSource, latents: Tensor) -> ScaleShift:
        """Return what the norm multiplies features with and adds to them, for features that are not all in memory.

        Args:
            rows: Source of the features.
            latents: Tensor (batch, latent_channels, h, w).
        """
        return _scale_shift(self.norm_layer, rows, self._modulation(latents))

    def _modulation(self, latents: Tensor) -> Modulation:
        return Modulation(call_conv(self.conv_y, latents), call_conv(self.conv_b, latents))


def apply_norm(
    norm: nn.Module,
    features: Tensor,
    latents: Tensor | None = None,
    *,
    modulation: Modulation | None = None,
    silu: bool = False,
    inplace: bool = False,
) -> Tensor:
    """Return norm(features), or norm(features, latents) in MoVQ's decoder, with a modulation and SiLU after it.

    A `GroupNorm` or `SpatialNorm` that nothing was attached to computes all of it in one pass. Any other norm is called
    as torch's norms are, and its hooks receive the output of the norm alone.

    Args:
        norm: Any module in the position of a norm.
        features: Tensor (batch, channels, H, W).
        latents: Tensor (batch, latent_channels, h, w); None for norms that are not modulated by latents.
        modulation: Scale and shift to apply after the norm; None applies none.
        silu: Whether SiLU follows.
        inplace: Whether `features` may be overwritten.
    """
    kind = type(norm)
    is_ours = kind is GroupNorm or (kind is SpatialNorm and modulation is None)
    if is_ours and (torch.compiler.is_compiling() or runs_own_forward(norm) or has_offload_forward(norm)):
        options: dict[str, Any] = {"silu": silu, "inplace": inplace}
        return norm(features, latents, **(options if modulation is None else {**options, "modulation": modulation}))
    normed = norm(features) if latents is None else norm(features, latents)
    return _modulate(normed, modulation, silu=silu, inplace=False)


def layout_for_backward(features: Tensor) -> Tensor:
    """Return features in the layout in which torch's norms have a fast backward pass, for training on a CPU.

    In channels last it takes up to sixty times as long: 119 instead of 2 ms for (8, 32, 128, 128) in bfloat16.

    Args:
        features: Tensor (batch, channels, H, W).
    """
    return features.contiguous() if torch.is_grad_enabled() and features.device.type == "cpu" else features


def _is_plain_norm(norm: nn.Module) -> bool:
    """Return whether weight and bias of a norm may be read instead of calling it."""
    return type(norm) is nn.GroupNorm and not torch.compiler.is_compiling() and runs_own_forward(norm)


def _fused_norm(
    norm: nn.GroupNorm, features: Tensor, modulation: Modulation | None, *, silu: bool, inplace: bool
) -> Tensor:
    affine = _affine(norm, modulation)
    return group_norm.group_norm(
        features, norm.num_groups, norm.eps, affine.scale, affine.shift, silu=silu, inplace=inplace
    )


def _scale_shift(norm: nn.GroupNorm, rows: RowSource, modulation: Modulation | None) -> ScaleShift:
    affine = _affine(norm, modulation)
    return ScaleShift(row_statistics(rows, norm.num_groups, norm.eps), affine.scale, affine.shift)


def _affine(norm: nn.GroupNorm, modulation: Modulation | None) -> Modulation:
    """Return weight and bias of a norm and the modulation after it as one modulation, in float32."""
    scale, shift = (part[None, :, None, None].float() for part in (norm.weight, norm.bias))
    if modulation is None:
        return Modulation(scale, shift)
    return Modulation(
        modulation.scale * scale, torch.addcmul(modulation.shift.float(), modulation.scale.float(), shift)
    )


def _modulate(normed: Tensor, modulation: Modulation | None, *, silu: bool, inplace: bool) -> Tensor:
    """Return silu(normed * scale + shift); `inplace` says whether `normed` may be overwritten without gradients."""
    inplace = inplace and not torch.is_grad_enabled()
    if modulation is not None:
        height, width = normed.shape[-2:]
        rows, columns = modulation.scale.shape[-2:]
        if (rows, columns) in ((height, width), (1, 1)):
            normed = torch.addcmul(modulation.shift, normed, modulation.scale)
        elif normed.device.type == "cpu" or height % rows or width % columns:
            parts = (layout_for_backward(part) for part in modulation)
            scale, shift = (F.interpolate(part, (height, width), mode="nearest") for part in parts)
            normed = torch.addcmul(shift, normed, scale)
        else:
            normed = _modulate_tiles(normed, modulation, inplace=inplace)
        inplace = not torch.is_grad_enabled()  # a new tensor, or one that may be overwritten
    return F.silu(normed, inplace=inplace) if silu else normed


def _modulate_tiles(normed: Tensor, modulation: Modulation, *, inplace: bool) -> Tensor:
    """Return normed * scale + shift, each element of scale and shift broadcast over a tile of the features.

    GPUs are limited by memory traffic here: scale and shift are not expanded to the size of the features.
    """
    rows, columns = modulation.scale.shape[-2:]
    tiles = normed.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))
    scale, shift = (part[:, :, :, None, :, None] for part in modulation)
    if not inplace or torch.is_grad_enabled() or torch.compiler.is_compiling() or normed.dtype != scale.dtype:
        return torch.addcmul(shift, tiles, scale).reshape(normed.shape)
    torch.addcmul(shift, tiles, scale, out=tiles)
    return normed


PLAIN_LAYERS = frozenset((Conv2d, GroupNorm, nn.Linear))


def downsample2x(features: Tensor) -> Tensor:
    """Return features (batch, channels, H / 2, W / 2): the mean of each 2x2 square.

    Args:
        features: Tensor (batch, channels, H, W).
    """
    return F.avg_pool2d(features, 2)


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, added to a shortcut: the residual block of both the UNet and MoVQ.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output. A 1x1 convolution is on the shortcut if the two differ.
        eps: Added to the variance in the norms.
        groups: Groups of channels in the norms.
        time_dim: Width of the time embedding, whose projection scales and shifts after the second norm; None for none.
        latent_channels: Channels of the latents that modulate the norms of MoVQ's decoder; None for group norms.
        resample: "up" or "down" changes the size by two between the first norm and its convolution; None keeps it.
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
        self.time_emb_proj = None if time_dim is None else nn.Linear(time_dim, 2 * out_channels)
        self.norm2 = norm(out_channels)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None if in_channels == out_channels else Conv2d(in_channels, out_channels, 1)
        self.resample = resample

    def forward(
        self, features: Tensor, time: Tensor | None = None, latents: Tensor | None = None, *, inplace: bool = False
    ) -> Tensor:
        """Return features (batch, out_channels, H', W').

        Args:
            features: Tensor (batch, in_channels, H, W).
            time: *Activated* time embedding (batch or 1, time_dim): silu(embedding) is the same for every block, so
                the network computes it once. None for blocks without `time_dim`.
            latents: Tensor (batch, latent_channels, h, w). None for blocks without `latent_channels`.
            inplace: Whether `features` may be overwritten.
        """
        # compiled code never overwrites its inputs
        inplace = inplace and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        is_private = self._layers_are_private()
        shortcut = features
        if self.resample is not None:
            shortcut = upsample2x(features) if self.resample == "up" else downsample2x(features)
        if self.conv_shortcut is not None:
            shortcut = apply_conv(self.conv_shortcut, shortcut)
        is_new = shortcut is not features
        hidden = apply_norm(self.norm1, features, latents, silu=True, inplace=inplace and is_new and is_private)
        if self.resample == "down":
            hidden = downsample2x(hidden)
        hidden = apply_conv(self.conv1, hidden, upsample=self.resample == "up")
        if self.time_emb_proj is None:
            hidden = apply_norm(self.norm2, hidden, latents, silu=True, inplace=is_private)
        else:
            assert time is not None, "a block with time_dim is called with the time embedding"
            scale, shift = apply_linear(self.time_emb_proj, time)[:, :, None, None].chunk(2, dim=1)
            hidden = apply_norm(
                self.norm2, hidden, modulation=Modulation(1 + scale, shift), silu=True, inplace=is_private
            )
        if not is_private:
            return apply_conv(self.conv2, hidden) + shortcut
        if is_new or inplace:
            return apply_conv(self.conv2, hidden, residual=shortcut)
        hidden = apply_conv(self.conv2, hidden)
        return hidden + shortcut if torch.is_grad_enabled() else hidden.add_(shortcut)

    def _layers_are_private(self) -> bool:
        """Return whether all layers are private; for those that usually are, with few operations."""
        if torch.compiler.is_compiling():
            return True
        if has_global_hooks():
            return False
        for layer in self._modules.values():
            if layer is None:
                continue
            is_plain = type(layer) in PLAIN_LAYERS and "forward" not in layer.__dict__
            if is_plain and not (layer._forward_hooks or layer._forward_pre_hooks):
                continue
            if not is_private(layer):
                return False
        return True


def is_private(module: nn.Module) -> bool:
    """Return whether nothing but its caller holds the inputs and outputs of a module, so that they may be overwritten.

    Hooks may store them, and so may modules of the user.

    Args:
        module: Any module.
    """
    if torch.compiler.is_compiling():
        return True
    is_replaced = "forward" in module.__dict__ and not has_offload_forward(module)
    if is_replaced or not _is_known(cast(Hashable, type(module))) or has_foreign_hooks(module):
        return False
    return not isinstance(module, SpatialNorm) or is_private(module.norm_layer)


@functools.cache
def _is_known(module_type: Hashable) -> bool:
    assert isinstance(module_type, type)
    return module_type.__module__.startswith(("torch.nn.modules.", "kandinsky22."))


def sinusoidal_embedding(timestep: Tensor | float, dim: int, device: torch.device) -> Tensor:
    """Return timesteps as [cos, sin] of `dim` / 2 frequencies from 1 down to 1/10000.

    Source: https://arxiv.org/abs/1706.03762, section 3.5.

    Args:
        timestep: One timestep, or a tensor (batch,) with one per batch item.
        dim: Width of the embedding, even.
        device: Device of the result.

    Returns:
        Float32 tensor (1, dim) for a single timestep, (batch, dim) for one per batch item.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=device) / half)
    angles = torch.as_tensor(timestep, dtype=torch.float32, device=device).reshape(-1, 1) * frequencies
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


class TimeEmbedding(nn.Module):
    """Sinusoids of the timestep through two linear layers with SiLU between them."""

    reads_child_weights = True  # offloading moves them together, quantization leaves them alone

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.linear_1 = nn.Linear(in_dim, out_dim)
        self.linear_2 = nn.Linear(out_dim, out_dim)

    def forward(self, timestep: Tensor | float) -> Tensor:
        """Return embeddings (1, out_dim) for a single timestep, (batch, out_dim) for one per batch item.

        Args:
            timestep: One timestep from 0 to 999, or a tensor (batch,).
        """
        # a layer that replaces ours, such as those of torch's own quantization, need not have a weight or a parameter
        weight = next((p for p in self.linear_1.parameters() if p.is_floating_point()), torch.empty(0).float())
        sinusoids = sinusoidal_embedding(timestep, self.in_dim, weight.device).to(weight.dtype)
        return apply_linear(self.linear_2, F.silu(apply_linear(self.linear_1, sinusoids)))
