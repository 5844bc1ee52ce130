"""Losses of fine-tuning: what a network predicts, min-SNR weights and the learned variance; and of pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kandinsky22.schedulers import Scheduler
from kandinsky22.training.denoising import variance_divergence


@dataclass(frozen=True)
class LossWeights:
    """Weights of the parts of a loss.

    Attributes:
        snr_gamma: Gamma of min-SNR weights; None for equal weights.
        vlb_weight: Weight of the learned variance's loss.
    """

    snr_gamma: float | None = None
    vlb_weight: float = 0.001


def prediction_target(scheduler: Scheduler, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return what a network predicts: the noise, the clean sample or the velocity, as its scheduler says.

    Args:
        scheduler: Scheduler of the checkpoint.
        sample: Clean samples (batch, ...).
        noise: Noise of the same shape.
        timesteps: Timesteps (batch,), on the CPU.
    """
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        return scheduler.get_velocity(sample, noise, timesteps)
    return sample if kind == "sample" else noise


def min_snr_weights(alphas_cumprod: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Return the weights of squared errors, which are min(SNR, gamma) for errors of the clean sample.

    Source: Hang et al. 2023, https://arxiv.org/abs/2303.09556, section 3.4.

    Args:
        alphas_cumprod: Cumulative products of alphas (batch,).
        gamma: Largest weight.
        prediction_type: "epsilon", "sample" or "v_prediction".
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    weights = snr.clamp(max=gamma)
    if prediction_type == "epsilon":
        return weights / snr
    return weights / (snr + 1) if prediction_type == "v_prediction" else weights


def denoising_losses(
    output: Tensor, sample: Tensor, noise: Tensor, timesteps: Tensor, scheduler: Scheduler, weights: LossWeights
) -> dict[str, Tensor]:
    """Return the losses of a network's output, per example (batch,).

    Args:
        output: Prediction, of the shape of `sample`; or prediction and learned variance, twice the channels.
        sample: Clean samples (batch, ...).
        noise: Noise of the same shape.
        timesteps: Timesteps (batch,), on the CPU.
        scheduler: Scheduler of the checkpoint.
        weights: Weights of the parts.

    Returns:
        "loss", the sum to be minimised; "prediction", the mean squared error; and "variance", the loss of the learned
        variance in bits per element, if there is one and it has a weight.
    """
    output = output.float()
    has_variance = output.shape[1] == 2 * sample.shape[1]
    prediction = output[:, : sample.shape[1]]
    error = prediction - prediction_target(scheduler, sample, noise, timesteps)
    squared = error.square().flatten(1).mean(1)
    losses = {"loss": squared, "prediction": squared}
    alphas_cumprod = scheduler.alphas_cumprod[timesteps]
    kind = scheduler.config.prediction_type
    if weights.snr_gamma is not None:
        losses["loss"] = squared * min_snr_weights(alphas_cumprod, weights.snr_gamma, kind).to(squared)
    if has_variance and weights.vlb_weight > 0:
        velocity = error.detach() * velocity_factor(alphas_cumprod, kind).to(error)[:, None, None, None]
        nats = variance_divergence(output[:, sample.shape[1] :], velocity, timesteps, scheduler)
        losses["variance"] = nats.flatten(1).mean(1) / math.log(2)
        # The bound is the sum over all timesteps, of which one is drawn (Nichol and Dhariwal 2021, equation 16).
        losses["loss"] = losses["loss"] + weights.vlb_weight * len(scheduler) * losses["variance"]
    return losses


def velocity_factor(alphas_cumprod: Tensor, prediction_type: str) -> Tensor:
    """Return the factors that turn errors of a prediction into errors of the velocity.

    Args:
        alphas_cumprod: Cumulative products of alphas (batch,).
        prediction_type: "epsilon", "sample" or "v_prediction".
    """
    if prediction_type == "epsilon":
        return alphas_cumprod**-0.5
    if prediction_type == "sample":
        return -((1 - alphas_cumprod) ** -0.5)
    return alphas_cumprod**0


CHARBONNIER = 0.01  # below this difference the loss is nearly quadratic; a grey level is 0.008


def picture_losses(pictures: Tensor, target: Tensor, gradient_weight: float) -> dict[str, Tensor]:
    """Return the losses of pictures that should equal others, averaged over the batch.

    Args:
        pictures: Pictures (batch, 3, H, W), about in [-1, 1].
        target: What they should be, in [-1, 1].
        gradient_weight: Weight of the difference between neighbouring pixels, which keeps edges sharp.

    Returns:
        Scalars: "loss"; its parts "colour" (Charbonnier loss, https://arxiv.org/abs/1704.03915, section 3.2) and
        "gradient"; and "levels", the mean absolute difference in grey levels of 255.
    """
    pictures, target = pictures.float(), target.float()
    error = pictures - target
    colour = (error.square() + CHARBONNIER**2).sqrt().mean() - CHARBONNIER
    gradient = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    with torch.no_grad():
        levels = (pictures.clamp(-1, 1) - target).abs().mean() * 127.5
    return {"loss": colour + gradient_weight * gradient, "colour": colour, "gradient": gradient, "levels": levels}
