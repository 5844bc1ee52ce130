"""One UNet that serves text to image, inpainting and hints.

The network has the inputs of all three variants as channels next to each other; channels that an example does not use
are zero. The decoder and its variants are this network without the channels that they do not have: they share all other
weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky22.models.unet import UNet2DConditionModel, UNetCondition

UNSHARED_PREFIXES = ("conv_in.", "add_embedding.input_hint_block.")  # weights that each variant has for itself
INPAINT_CONFIG: dict[str, Any] = {"in_channels": 9}
HINT_CONFIG: dict[str, Any] = {"in_channels": 8, "addition_embed_type": "image_hint"}
# Input channels of the shared network: noisy latents, features of the hint, and latents of the known region with its
# mask.
LATENT_CHANNELS, HINT_CHANNELS, INPAINT_CHANNELS = range(0, 4), range(4, 8), range(8, 13)


class SharedUNet(nn.Module):
    """The decoder's UNet with the inputs of both variants, initialised to give the decoder's output.

    Args:
        unet: UNet of the decoder.
        hints: Hints (N, 3, H, W), from which the convolutions of hints are initialised.
    """

    def __init__(self, unet: UNet2DConditionModel, hints: Tensor) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel(**{**unet.config, "in_channels": INPAINT_CHANNELS.stop})
        state = dict(unet.state_dict())
        padding = (0, 0, 0, 0, 0, INPAINT_CHANNELS.stop - LATENT_CHANNELS.stop)
        state["conv_in.weight"] = F.pad(state["conv_in.weight"], padding)
        self.unet.load_state_dict(state)
        self.hint = UNet2DConditionModel(**{**unet.config, **HINT_CONFIG}).add_embedding.input_hint_block
        _init_hint_block(self.hint, hints)

    def encode_condition(
        self, image_embeds: Tensor, hint: Tensor | None = None, channels: Tensor | None = None
    ) -> UNetCondition:
        """Return everything that does not depend on the noisy latents, as `UNet2DConditionModel.encode_condition` does.

        Args:
            image_embeds: Image embeddings (batch, D).
            hint: Hints (batch, 3, H, W); None counts as features of zeros.
            channels: Latents of the known region and its mask (batch, 5, h, w); None counts as zeros.
        """
        side = self.unet.config.sample_size
        assert side is not None
        zeros = image_embeds.new_zeros(len(image_embeds), len(INPAINT_CHANNELS), side, side)
        features = zeros[:, : len(HINT_CHANNELS)] if hint is None else self.hint(hint)
        channels = torch.cat([features, zeros if channels is None else channels], dim=1)
        return self.unet.encode_condition(image_embeds, channels=channels)

    def denoise(self, sample: Tensor, timestep: Tensor, condition: UNetCondition) -> Tensor:
        """Return velocity and learned variance (batch, 8, h, w).

        Args:
            sample: Noisy latents (batch, 4, h, w).
            timestep: Timesteps (batch,).
            condition: Result of `encode_condition`.
        """
        return self.unet.denoise(sample, timestep, condition)

    def variant(self, changes: Mapping[str, Any]) -> UNet2DConditionModel:
        """Return the UNet of one variant, frozen.

        Args:
            changes: Changes to the decoder's config: none for the decoder, INPAINT_CONFIG or HINT_CONFIG.
        """
        channels = {
            LATENT_CHANNELS.stop: [*LATENT_CHANNELS],
            HINT_CONFIG["in_channels"]: [*LATENT_CHANNELS, *HINT_CHANNELS],
            INPAINT_CONFIG["in_channels"]: [*LATENT_CHANNELS, *INPAINT_CHANNELS],
        }
        unet = UNet2DConditionModel(**{**self.unet.config, "in_channels": LATENT_CHANNELS.stop, **changes})
        state = dict(self.unet.state_dict())
        state["conv_in.weight"] = state["conv_in.weight"][:, channels[unet.config.in_channels]]
        if unet.config.addition_embed_type == "image_hint":
            name = "add_embedding.input_hint_block"
            state |= {f"{name}.{key}": tensor for key, tensor in self.hint.state_dict().items()}
        unet.load_state_dict(state)
        return unet.eval().requires_grad_(False)


@torch.no_grad()
def _init_hint_block(block: nn.Module, hints: Tensor) -> None:
    """Initialise the convolutions of hints: with torch's default initialisation the signal vanishes after eight."""
    convolutions = [layer for layer in block.modules() if isinstance(layer, nn.Conv2d)]
    for layer in convolutions:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
    features = block(hints)
    convolutions[-1].weight /= features.std((0, 2, 3))[:, None, None, None]
