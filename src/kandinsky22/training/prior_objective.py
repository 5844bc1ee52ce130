"""Objective of a prior: from text embeddings to image embeddings, on frozen CLIP towers.

Encoding a caption costs far more than denoising (about 25 tokens against 3). Each caption is therefore encoded once,
and its embedding is denoised at several timesteps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kandinsky22.models.prior import MASKED, STEP_TOKENS, PriorCondition, PriorTransformer
from kandinsky22.schedulers import UnCLIPScheduler
from kandinsky22.training.loop import StepRandomness
from kandinsky22.training.towers import TextEmbedding, Towers

TIMESTEPS_PER_CAPTION = 4  # one from each quarter of the schedule


def denoise_timesteps(prior: PriorTransformer, noisy: Tensor, timesteps: Tensor, condition: PriorCondition) -> Tensor:
    """Denoise several noisy embeddings for each text of a batch, like as many calls of `prior.denoise`.

    The tokens of all timesteps are in one sequence and do not attend to those of other timesteps, thus they share keys
    and values of the text.

    Args:
        prior: The network.
        noisy: Noisy embeddings (batch, count, D).
        timesteps: Timesteps (batch, count).
        condition: Condition of the texts.

    Returns:
        Predicted clean embeddings (batch, count, D).
    """
    batch, count, _ = noisy.shape
    time = prior.time_embedding(timesteps.flatten())
    query = prior.prd_embedding[0].expand(len(time), -1)
    tokens = torch.stack([time, prior.proj_in(noisy.flatten(0, 1)), query], dim=1)
    tokens = (tokens + prior.positional_embedding[:, -STEP_TOKENS:]).view(batch, count * STEP_TOKENS, -1)
    causal = torch.full((STEP_TOKENS, STEP_TOKENS), MASKED).triu(1)
    within_timestep = torch.block_diag(*[causal - MASKED] * count) + MASKED
    text = condition.mask.expand(-1, -1, count * STEP_TOKENS, -1)
    mask = torch.cat([text, within_timestep.expand(batch, 1, -1, -1)], dim=3)
    for block, past in zip(prior.transformer_blocks, condition.layers, strict=True):
        tokens = block(tokens, mask, past)
    last = tokens.view(batch, count, STEP_TOKENS, -1)[:, :, -1]
    return cast(Tensor, prior.proj_to_clip_embeddings(prior.norm_out(last)))


def prior_losses(
    prior: PriorTransformer,
    scheduler: UnCLIPScheduler,
    text: TextEmbedding,
    embeds: Tensor,
    randomness: StepRandomness,
) -> dict[str, Tensor]:
    """Return the losses of one training step.

    Args:
        prior: Network to be trained.
        scheduler: Noise schedule.
        text: Text embeddings of N captions.
        embeds: Image embeddings (N, D) that the captions describe.
        randomness: Random generators of the step.

    Returns:
        Scalars: the mean error "loss", and the errors "error_first" and "error_last" of the first and the last quarter
        of the timesteps.
    """
    clean = (embeds - prior.clip_mean) / prior.clip_std
    count = TIMESTEPS_PER_CAPTION
    timesteps = torch.arange(count) + torch.rand(len(clean), count, generator=randomness.torch)
    timesteps = (timesteps / count * len(scheduler)).long()
    clean = clean[:, None].expand(-1, count, -1)
    noise = torch.randn(clean.shape, generator=randomness.torch)
    noisy = scheduler.add_noise(clean.flatten(0, 1), noise.flatten(0, 1), timesteps.flatten()).view(clean.shape)
    # For such short sequences in bfloat16, the backward pass of fused attention is several times slower.
    with sdpa_kernel(SDPBackend.MATH):
        condition = prior.encode_condition(text.embeds, text.hidden, text.mask)
        predicted = denoise_timesteps(prior, noisy, timesteps, condition).float()
    error = (predicted - clean).square().mean((0, 2))
    return {"loss": error.mean(), "error_first": error[0], "error_last": error[-1]}


@torch.no_grad()
def sample_embeddings(
    prior: PriorTransformer,
    scheduler: UnCLIPScheduler,
    towers: Towers,
    texts: Sequence[str],
    *,
    steps: int,
    guidance: float,
    seed: int,
) -> Tensor:
    """Return image embeddings (N, D) that the prior generates for prompts, as its pipeline does.

    Args:
        prior: The network.
        scheduler: Its scheduler.
        towers: CLIP towers.
        texts: N prompts.
        steps: Number of denoising steps.
        guidance: Guidance scale; guidance is off up to 1.
        seed: Seed of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps)
    guided = guidance > 1
    text = towers.embed_texts([""] * len(texts) + list(texts) if guided else texts)
    condition = prior.encode_condition(text.embeds, text.hidden, text.mask, scheduler.timesteps.tolist())
    latents = torch.randn(len(texts), prior.clip_mean.shape[1], generator=generator)
    for t, following in zip(scheduler.timesteps, [*scheduler.timesteps[1:], None], strict=True):
        predicted = prior.denoise(torch.cat([latents] * 2) if guided else latents, t, condition)
        if guided:
            unconditional, predicted = predicted.chunk(2)
            predicted = unconditional + guidance * (predicted - unconditional)
        latents = scheduler.step(predicted, t, latents, following, generator, return_dict=False)[0]
    return prior.post_process_latents(latents)
