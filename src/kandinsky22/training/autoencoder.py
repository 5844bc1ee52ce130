"""Objectives of a MoVQ: the autoencoder first, then its decoder alone on frozen latents.

The latents are final after the first stage, thus a diffusion model can be trained while the decoder still improves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from kandinsky22.models.layers import SpatialNorm
from kandinsky22.models.movq import VQModel
from kandinsky22.training.loop import Objective, StepRandomness

# From the randomness of a step to RGB images (batch, 3, H, W) in [-1, 1].
ImageSource: TypeAlias = Callable[[StepRandomness], Tensor]

# Drawings are mostly flat, and flat areas are learned within minutes: outlines limit the result.
EDGE_WEIGHT = 10.0
LATENT_NOISE = 0.05  # standard deviation; noise makes nearby latents decode to similar images
DECODER_NOISE = 0.1  # largest standard deviation in the second stage: latents of a diffusion model are inexact


def image_loss(output: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Return the reconstruction loss: error of colours, weighted towards outlines, and of differences between pixels.

    Args:
        output: Reconstructed images (batch, 3, H, W) in [-1, 1].
        target: True images of the same shape.

    Returns:
        Scalars: "loss", and for the log the unweighted errors "edge" and "flat" near outlines and elsewhere.
    """
    output = output.float()
    across, down = target.diff(dim=-1).abs().amax(1, keepdim=True), target.diff(dim=-2).abs().amax(1, keepdim=True)
    change = torch.maximum(F.pad(across, (0, 1)), F.pad(down, (0, 0, 0, 1)))
    outline = F.max_pool2d((change > 0.05).float(), 5, stride=1, padding=2)
    error = (output - target).abs()
    slope = (output.diff(dim=-1) - target.diff(dim=-1)).abs().mean()
    slope = slope + (output.diff(dim=-2) - target.diff(dim=-2)).abs().mean()
    with torch.no_grad():
        channels = error.shape[1]
        edge = (error * outline).sum() / (channels * outline.sum()).clamp_min(1)
        flat = (error * (1 - outline)).sum() / (channels * (1 - outline).sum()).clamp_min(1)
    return {"loss": (error * (1 + EDGE_WEIGHT * outline)).mean() + 2 * slope, "edge": edge, "flat": flat}


def latent_penalty(latents: Tensor) -> Tensor:
    """Return the squared deviation of latents from zero mean, unit variance and uncorrelated channels.

    Args:
        latents: Latents (batch, channels, h, w).
    """
    vectors = latents.float().movedim(1, -1).flatten(0, -2)
    mean = vectors.mean(0)
    centered = vectors - mean
    covariance = centered.mT @ centered / len(vectors)
    return mean.square().sum() + (covariance - torch.eye(len(mean))).square().sum()


def autoencoder_objective(movq: VQModel, images: ImageSource) -> Objective:
    """Return the objective of the first stage.

    Args:
        movq: Network to be trained.
        images: Source of images.
    """

    def objective(randomness: StepRandomness) -> dict[str, Tensor]:
        target = images(randomness)
        latents = movq.quant_conv(movq.encoder(target)).float()
        noisy = latents + LATENT_NOISE * torch.randn(latents.shape, generator=randomness.torch)
        losses = image_loss(movq.decoder(movq.post_quant_conv(noisy), noisy), target)
        penalty = latent_penalty(latents)
        return {**losses, "loss": losses["loss"] + 0.02 * penalty, "latents": penalty}

    return objective


def decoder_objective(movq: VQModel, images: ImageSource) -> Objective:
    """Return the objective of the second stage: the decoder alone, on exact, noisy and sometimes quantized latents.

    Args:
        movq: Network of the first stage, whose decoder becomes trainable.
        images: Source of images.
    """
    movq.requires_grad_(False)
    movq.decoder.requires_grad_(True)
    movq.post_quant_conv.requires_grad_(True)

    def objective(randomness: StepRandomness) -> dict[str, Tensor]:
        target = images(randomness)
        with torch.no_grad():
            latents = movq.quant_conv(movq.encoder(target)).float()
            if randomness.step % 8 == 7:
                latents = movq.quantize(latents)[0]
            noise = torch.randn(latents.shape, generator=randomness.torch)
            latents = latents + DECODER_NOISE * torch.rand(len(latents), 1, 1, 1, generator=randomness.torch) * noise
        return image_loss(movq.decoder(movq.post_quant_conv(latents), latents), target)

    return objective


@torch.no_grad()
def encode(movq: VQModel, images: Tensor, batch: int = 16) -> Tensor:
    """Return latents (n, channels, h, w), not quantized.

    Args:
        movq: The network.
        images: RGB images (n, 3, H, W) in [-1, 1].
        batch: Number of images that are encoded at a time.
    """
    return torch.cat([movq.quant_conv(movq.encoder(part)).float() for part in images.split(batch)])


@torch.no_grad()
def normalise_latents(movq: VQModel, images: Tensor, seed: int) -> None:
    """Fold an affine map into the network that gives latents zero mean and unit variance, and fit the codebook.

    Only 1 x 1 convolutions touch the latents, before and after, thus decoded images stay the same.

    Args:
        movq: Network, changed in place.
        images: RGB images (n, 3, H, W) in [-1, 1] whose latents are measured.
        seed: Seed of the codebook's initial entries.
    """
    latents = encode(movq, images)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    movq.quant_conv.weight.div_(std[:, None, None, None])
    assert movq.quant_conv.bias is not None
    movq.quant_conv.bias.sub_(mean).div_(std)
    norms = [module for module in movq.modules() if isinstance(module, SpatialNorm)]
    for conv in [movq.post_quant_conv, *(c for norm in norms for c in (norm.conv_y, norm.conv_b))]:
        assert conv.bias is not None
        conv.bias.add_(conv.weight[:, :, 0, 0] @ mean)
        conv.weight.mul_(std[:, None, None])
    vectors = ((latents - mean[:, None, None]) / std[:, None, None]).movedim(1, -1).flatten(0, -2)
    generator = torch.Generator().manual_seed(seed)
    movq.quantize.embedding.weight.copy_(_codebook(vectors, movq.config.num_vq_embeddings, generator))


def _codebook(points: Tensor, entries: int, generator: torch.Generator, rounds: int = 20) -> Tensor:
    """Return k-means centres of `points` (n, dim).

    Almost all points are the few colours of flat areas, which would fill a random initial codebook. Half of the initial
    centres are therefore spread evenly over the range of the points.
    """
    sample = points[torch.randperm(len(points), generator=generator)[: 40 * entries]]
    by_distance = torch.cdist(sample, sample[:1])[:, 0].argsort()
    centers = torch.cat([sample[: entries // 2], sample[by_distance[:: max(1, 2 * len(sample) // entries)]]])
    centers = torch.cat([centers, sample[-entries:]])[:entries].clone()
    for _ in range(rounds):
        nearest = torch.cdist(sample, centers).argmin(1)
        counts = torch.zeros(entries).index_add_(0, nearest, torch.ones(len(sample)))
        sums = torch.zeros_like(centers).index_add_(0, nearest, sample)
        centers = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centers)
    return centers
