"""Calls of single networks on fixed inputs, as pipelines make them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kandinsky22.pipelines.network_calls import bind_prior, bind_unet, decode_latents

FACTOR = 8  # pixels per latent, along each side
PRIOR_STEPS = 25
TEXT_TOKENS = 14  # of the prompt, with begin and end; the negative one is empty


def bind_network(pipe: Any, stage: str, size: int) -> Callable[[], Any]:
    """Return the call of one network on fixed inputs.

    Args:
        pipe: A pipeline with the network.
        stage: "step" for a guided step of the UNet, "decode" for MoVQ, "prior" for all `PRIOR_STEPS` of the prior.
        size: Side of the image in pixels.
    """
    generator, side = torch.Generator().manual_seed(0), size // FACTOR

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(pipe.dtype)

    if stage == "decode":
        latents = noise(1, 4, side, side)
        return lambda: decode_latents(pipe.movq, latents)
    if stage == "step":
        embeds, sample = noise(2, pipe.unet.config.encoder_hid_dim), noise(2, 4, side, side)
        step = bind_unet(lambda: pipe.unet, {"image_embeds": embeds}, None, None)
        return lambda: step(sample, torch.tensor(500))
    config = pipe.prior.config
    mask = torch.zeros(2, config.num_embeddings, dtype=torch.bool)
    mask[0, :2], mask[1, :TEXT_TOKENS] = True, True
    texts = {
        "prompt_embeds": noise(2, config.embedding_dim),
        "text_encoder_hidden_states": noise(2, config.num_embeddings, config.embedding_dim),
        "text_mask": mask,
    }
    sample, timesteps = noise(2, config.embedding_dim), torch.linspace(999, 0, PRIOR_STEPS).round().tolist()

    def all_steps() -> Any:
        step = bind_prior(lambda: pipe.prior, texts, timesteps)
        return [step(sample, timestep) for timestep in timesteps][-1]

    return all_steps
