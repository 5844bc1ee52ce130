"""Objective of a decoder UNet: the error of the velocity, and the variance of each step.

The velocity of Salimans and Ho (2022, https://arxiv.org/abs/2202.00512) is predicted instead of the noise: at the last
timestep of the published schedule a trace of the image remains, which a network that predicts noise would have to
ignore, and flat colours come out wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kandinsky22.models.attention import KeyValue
from kandinsky22.models.unet import UNetCondition
from kandinsky22.schedulers import DDPMScheduler, Scheduler
from kandinsky22.training.loop import Objective, StepRandomness

SNR_CAP = 5.0


@dataclass(frozen=True)
class Examples:
    """Training examples of a UNet.

    Attributes:
        latents: Clean latents (n, c, h, w).
        embeds: Image embeddings (n, D).
        hint: Hints (n, 3, H, W), or None.
        channels: Further input channels (n, k, h, w), or None.
        weight: Weight of the velocity's error at each spatial position, a number or (n, 1, h, w).
    """

    latents: Tensor
    embeds: Tensor
    hint: Tensor | None = None
    channels: Tensor | None = None
    weight: Tensor | float = 1.0


class ExampleSource(Protocol):
    """Source of training examples.

    Attributes:
        name: Name of the examples in the log.
        timesteps_per_example: Number of timesteps at which each example is denoised, above 1 for examples whose
            conditions are more expensive to encode than to denoise.
    """

    name: str
    timesteps_per_example: int

    def examples(self, randomness: StepRandomness) -> Examples:
        """Return the examples of a step.

        Args:
            randomness: Random generators of the step.
        """
        ...


class Denoiser(Protocol):
    """Network that can be trained to denoise latents: a UNet, or several UNets in one."""

    def encode_condition(
        self, image_embeds: Tensor, hint: Tensor | None = None, channels: Tensor | None = None
    ) -> UNetCondition:
        """Return everything that does not depend on the noisy latents.

        Args:
            image_embeds: Image embeddings (batch, D).
            hint: Hints (batch, 3, H, W), or None.
            channels: Further input channels (batch, k, h, w), or None.
        """
        ...

    def denoise(self, sample: Tensor, timestep: Tensor, condition: UNetCondition) -> Tensor:
        """Return velocity and learned variance (batch, 2 c, h, w).

        Args:
            sample: Noisy latents (batch, c, h, w).
            timestep: Timesteps (batch,).
            condition: Result of `encode_condition`.
        """
        ...


def timestep_distribution(alphas_cumprod: Tensor) -> Tensor:
    """Return cumulative probabilities of the timesteps: nearly clean samples, which teach little, are rare.

    Velocity errors weigh clean-sample errors by SNR + 1. The density limits this weight to SNR_CAP + 1: this is min-SNR
    weighting (https://arxiv.org/abs/2303.09556) for velocity prediction.

    Args:
        alphas_cumprod: Cumulative products of alphas, one per timestep.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    density = (snr + 1).clamp(max=SNR_CAP + 1) / (snr + 1)
    return (density / density.sum()).cumsum(0)


def denoising_objective(network: Denoiser, scheduler: DDPMScheduler, sources: Sequence[ExampleSource]) -> Objective:
    """Return the denoising objective: error of the velocity, of its averages over areas, and the learned variance.

    Each step contains examples of all sources. If there are several, the velocity's error is also logged per source.

    Args:
        network: Network to be trained.
        scheduler: Noise schedule.
        sources: Sources of examples.
    """
    distribution = timestep_distribution(scheduler.alphas_cumprod)

    def objective(randomness: StepRandomness) -> dict[str, Tensor]:
        inputs, conditions = [], []
        for source in sources:
            examples = source.examples(randomness)
            repeats = source.timesteps_per_example
            latents = examples.latents.repeat(repeats, 1, 1, 1)
            timesteps = stratified_timesteps(distribution, len(latents), randomness)
            weight = torch.as_tensor(examples.weight).expand(len(examples.latents), 1, *latents.shape[2:])
            noise = torch.randn(latents.shape, generator=randomness.torch)
            inputs.append((latents, noise, timesteps, weight.repeat(repeats, 1, 1, 1)))
            conditions += [network.encode_condition(examples.embeds, examples.hint, examples.channels)] * repeats
        latents, noise, timesteps, weight = (torch.cat(parts) for parts in zip(*inputs, strict=True))
        noisy = scheduler.add_noise(latents, noise, timesteps)
        with sdpa_kernel(SDPBackend.MATH):  # the backward pass of fused attention is slower for so few tokens
            output = network.denoise(noisy, timesteps, concatenate_conditions(conditions)).float()
        losses = denoising_losses(output, latents, noise, timesteps, scheduler, weight)
        if len(sources) > 1:
            velocity = output.detach().chunk(2, dim=1)[0]
            errors = (velocity - scheduler.get_velocity(latents, noise, timesteps)).square()
            per_source = errors.mean((1, 2, 3)).split([len(parts[0]) for parts in inputs])
            losses |= {source.name: error.mean() for source, error in zip(sources, per_source, strict=True)}
        return losses

    return objective


def perturb_embeddings(
    embeds: Tensor, std: Tensor, negative: Tensor, randomness: StepRandomness, *, noise: float, empty_share: float
) -> Tensor:
    """Return embeddings with noise, like those of a prior, some of them replaced by the negative embedding.

    Args:
        embeds: Image embeddings (batch, D).
        std: Standard deviation (D,) of image embeddings.
        negative: Negative image embedding (1, D), which guidance needs.
        randomness: Random generators of the step.
        noise: Largest noise, in standard deviations.
        empty_share: Probability of the negative embedding, from 0 to 1.
    """
    amount = noise * torch.rand(len(embeds), 1, generator=randomness.torch)
    embeds = embeds + amount * std * torch.randn(embeds.shape, generator=randomness.torch)
    return torch.where(torch.rand(len(embeds), 1, generator=randomness.torch) < empty_share, negative, embeds)


def concatenate_conditions(conditions: Sequence[UNetCondition]) -> UNetCondition:
    """Return the condition of a batch that consists of several batches.

    Args:
        conditions: Conditions of the batches.
    """
    if len(conditions) == 1:
        return conditions[0]
    layers = (
        KeyValue(*(torch.cat(tensors) for tensors in zip(*layer, strict=True)))
        for layer in zip(*(condition.layers for condition in conditions), strict=True)
    )
    channels = [condition.channels for condition in conditions if condition.channels is not None]
    time = torch.cat([condition.time for condition in conditions])
    return UNetCondition(time, tuple(layers), torch.cat(channels) if channels else None)


def stratified_timesteps(distribution: Tensor, count: int, randomness: StepRandomness) -> Tensor:
    """Return one timestep from each of equally probable intervals, in order, thus batches differ less.

    Args:
        distribution: Cumulative probabilities of the timesteps.
        count: Number of intervals.
        randomness: Random generators of the step.
    """
    quantiles = (torch.arange(count) + torch.rand(count, generator=randomness.torch)) / count
    return torch.searchsorted(distribution, quantiles).clamp(max=len(distribution) - 1)


def denoising_losses(
    output: Tensor,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    scheduler: DDPMScheduler,
    weight: Tensor | float = 1.0,
) -> dict[str, Tensor]:
    """Return the losses of a UNet's output.

    Args:
        output: Velocity and learned variance (batch, 2 c, h, w).
        latents: Clean latents (batch, 4, h, w).
        noise: Noise of the same shape.
        timesteps: Timesteps (batch,).
        scheduler: Noise schedule.
        weight: Weight of the velocity's error, a number or (batch, 1, h, w).

    Returns:
        Scalars: "velocity", "area" (averages over areas, weighted towards high noise), "variance", and their weighted
        sum "loss".
    """
    velocity, coordinate = output.chunk(2, dim=1)
    error = velocity - scheduler.get_velocity(latents, noise, timesteps)
    variance = variance_loss(coordinate, error.detach(), timesteps, scheduler)
    error = error * weight
    # The factor 1 - alphas_cumprod turns squared errors of the velocity into those of the clean sample.
    clean = (1 - scheduler.alphas_cumprod[timesteps])[:, None, None, None]
    area = (clean * F.avg_pool2d(error, 4).square()).mean() + (clean * error.mean((2, 3), True).square()).mean()
    squared = error.square().mean()
    return {"loss": squared + 2 * area + 0.1 * variance, "velocity": squared, "area": area, "variance": variance}


def variance_loss(coordinate: Tensor, error: Tensor, timesteps: Tensor, scheduler: DDPMScheduler) -> Tensor:
    """Return the mean of `variance_divergence`.

    Args:
        coordinate: Learned-variance coordinate (batch, channels, h, w).
        error: Error of the velocity, of the same shape, without gradient.
        timesteps: Timesteps (batch,).
        scheduler: Noise schedule.
    """
    return variance_divergence(coordinate, error, timesteps, scheduler).mean()


def variance_divergence(coordinate: Tensor, error: Tensor, timesteps: Tensor, scheduler: Scheduler) -> Tensor:
    """Return the Kullback-Leibler divergence between the true and the predicted step of one timestep, per element.

    It is the training loss of the learned variance (Nichol and Dhariwal 2021, https://arxiv.org/abs/2102.09672,
    equations 15 and 16), in nats.

    Args:
        coordinate: Learned-variance coordinate (batch, channels, h, w): -1 is the smallest and 1 the largest logarithm
            of the variance.
        error: Error of the velocity, of the same shape, without gradient.
        timesteps: Timesteps (batch,), on the CPU.
        scheduler: Noise schedule.
    """
    alphas_cumprod = scheduler.alphas_cumprod
    previous = torch.cat([torch.ones(1), alphas_cumprod[:-1]])
    smallest = scheduler.betas * (1 - previous) / (1 - alphas_cumprod)
    smallest = torch.cat([smallest[1:2], smallest[1:]])  # it is zero at timestep 0
    to_mean = previous.sqrt() * scheduler.betas / (1 - alphas_cumprod).sqrt()  # from velocity to the mean of the step
    low, high, factor = (
        values[timesteps][:, None, None, None].to(error.device)
        for values in (smallest.log(), scheduler.betas.log(), to_mean)
    )
    log_variance = low + (coordinate + 1) / 2 * (high - low)
    divergence = log_variance - low - 1 + (low - log_variance).exp()
    return 0.5 * (divergence + (factor * error).square() * (-log_variance).exp())
