"""Inputs of the UNet's steps, from which the ranges of activations follow when a graph is quantized."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kandinsky22.engines.networks import unet_inputs
from kandinsky22.models import UNet2DConditionModel

STEPS = 8  # steps whose inputs are recorded
SIDE = 32  # largest side of their latents
GUIDANCE = 4.0
HINT_CHANNELS = 4  # channels that the UNet makes of a hint


def denoising_inputs(
    unet: UNet2DConditionModel, scheduler: Any, embeds: Tensor, latent_channels: int
) -> list[tuple[Tensor, ...]]:
    """Return the inputs of the UNet's graph in the steps of one guided generation from fixed noise.

    Hints and masked images are noise too.

    Args:
        unet: The UNet, which PyTorch runs here.
        scheduler: A scheduler whose steps depend on the predicted noise alone, such as DDIM.
        embeds: Image embeddings (2, encoder_hid_dim): the negative one first.
        latent_channels: Channels of the latents.
    """
    generator, config = torch.Generator().manual_seed(0), unet.config
    factor = 2 ** (len(config.block_out_channels) - 1)
    side = max(2 * factor, min(SIDE, config.sample_size or SIDE) // factor * factor)

    def noise(channels: int, size: int) -> Tensor:
        return torch.randn(1, channels, size, size, generator=generator)

    def doubled(tensor: Tensor) -> Tensor:
        return tensor.expand(2, -1, -1, -1).to(unet.dtype)

    has_hint = config.addition_embed_type == "image_hint"
    others = config.in_channels - latent_channels - (HINT_CHANNELS if has_hint else 0)
    condition: dict[str, Any] = {
        "image_embeds": embeds.to(unet.dtype),
        "hint": doubled(noise(3, 8 * side).clamp(-1, 1)) if has_hint else None,
        "channels": doubled(noise(others, side)) if others else None,
    }
    sample, recorded = noise(latent_channels, side), []
    scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        inputs, encoded = unet_inputs(unet, **condition), unet.encode_condition(**condition)
        for timestep in scheduler.timesteps:
            pair = doubled(scheduler.scale_model_input(sample, timestep))
            recorded.append(inputs(pair, timestep))
            negative, positive = unet.denoise(pair, timestep, encoded)[:, :latent_channels].float().chunk(2)
            predicted = negative + GUIDANCE * (positive - negative)
            sample = scheduler.step(predicted, timestep, sample, return_dict=False)[0]
    return recorded
