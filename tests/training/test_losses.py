"""Losses: the learned variance, min-SNR weights and targets against formulas of their own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kandinsky22 import DDPMScheduler, UnCLIPScheduler
from kandinsky22.training.finetuning.losses import LossWeights, denoising_losses, min_snr_weights, prediction_target

KINDS = ("epsilon", "v_prediction", "sample")
TIMESTEPS = torch.tensor([1, 250, 600, 999])


def scheduler(kind: str) -> DDPMScheduler:
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, prediction_type=kind)


def example() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    sample, noise = torch.randn(2, 4, 4, 6, 6).unbind(0)
    return sample, noise, torch.randn(4, 8, 6, 6)


def clean(kind: str, prediction: Tensor, noisy: Tensor, alpha_bar: Tensor) -> Tensor:
    """The clean sample that a prediction implies."""
    if kind == "sample":
        return prediction
    if kind == "epsilon":
        return (noisy - (1 - alpha_bar).sqrt() * prediction) / alpha_bar.sqrt()
    return alpha_bar.sqrt() * noisy - (1 - alpha_bar).sqrt() * prediction


def posterior_mean(x0: Tensor, noisy: Tensor, alpha_bar: Tensor, before: Tensor, beta: Tensor) -> Tensor:
    """Ho et al. 2020, equation 7."""
    return (before.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - before) * noisy) / (1 - alpha_bar)


@pytest.mark.parametrize("kind", KINDS)
def test_the_learned_variance_is_a_divergence_of_normal_distributions(kind: str) -> None:
    sample, noise, output = example()
    schedule = scheduler(kind)
    losses = denoising_losses(output, sample, noise, TIMESTEPS, schedule, LossWeights(vlb_weight=0.001))
    noisy = schedule.add_noise(sample, noise, TIMESTEPS)
    for row, t in enumerate(TIMESTEPS.tolist()):
        alpha_bar, before, beta = (
            value.double() for value in (schedule.alphas_cumprod[t], schedule.alphas_cumprod[t - 1], schedule.betas[t])
        )
        x0 = clean(kind, output[row, :4].double(), noisy[row].double(), alpha_bar)
        small = beta * (1 - before) / (1 - alpha_bar)
        coordinate = (output[row, 4:].double() + 1) / 2
        log_variance = coordinate * beta.log() + (1 - coordinate) * small.log()
        means = (posterior_mean(each, noisy[row].double(), alpha_bar, before, beta) for each in (sample[row], x0))
        true, learned = (
            torch.distributions.Normal(mean, deviation)
            for mean, deviation in zip(means, (small.sqrt(), (log_variance / 2).exp()), strict=True)
        )
        bits = torch.distributions.kl_divergence(true, learned).mean() / math.log(2)
        torch.testing.assert_close(losses["variance"][row].double(), bits, rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(losses["loss"], losses["prediction"] + losses["variance"])


def test_the_learned_variance_does_not_move_the_mean() -> None:
    sample, noise, output = example()
    output.requires_grad_()
    for weight in (0.0, 0.001):
        output.grad = None
        denoising_losses(output, sample, noise, TIMESTEPS, scheduler("epsilon"), LossWeights(vlb_weight=weight))[
            "loss"
        ].sum().backward()
        assert output.grad is not None
        if weight == 0:
            alone = output.grad.clone()
            assert not alone[:, 4:].any()
    assert output.grad is not None
    assert torch.equal(output.grad[:, :4], alone[:, :4])
    assert output.grad[:, 4:].abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_limits_the_weight_of_clean_samples(kind: str) -> None:
    sample, noise, output = example()
    schedule, gamma = scheduler(kind), 5.0
    weighted = denoising_losses(
        output[:, :4], sample, noise, TIMESTEPS, schedule, LossWeights(snr_gamma=gamma, vlb_weight=0)
    )
    noisy = schedule.add_noise(sample, noise, TIMESTEPS)
    for row, t in enumerate(TIMESTEPS.tolist()):
        alpha_bar = schedule.alphas_cumprod[t]
        error = clean(kind, output[row, :4], noisy[row], alpha_bar) - sample[row]
        snr = float(alpha_bar / (1 - alpha_bar))
        torch.testing.assert_close(weighted["loss"][row], min(snr, gamma) * error.square().mean(), rtol=2e-3, atol=1e-4)


def test_min_snr_weights_of_noise_and_velocity() -> None:
    alphas_cumprod = torch.tensor([0.95, 0.5])  # ratios of 19 and 1
    torch.testing.assert_close(min_snr_weights(alphas_cumprod, 5.0, "epsilon"), torch.tensor([5 / 19, 1.0]))
    torch.testing.assert_close(min_snr_weights(alphas_cumprod, 5.0, "v_prediction"), torch.tensor([5 / 20, 1 / 2]))
    torch.testing.assert_close(min_snr_weights(alphas_cumprod, 5.0, "sample"), torch.tensor([5.0, 1.0]))


def test_targets_follow_the_scheduler() -> None:
    sample, noise, _ = example()
    assert prediction_target(scheduler("epsilon"), sample, noise, TIMESTEPS) is noise
    assert prediction_target(scheduler("sample"), sample, noise, TIMESTEPS) is sample
    velocity = prediction_target(scheduler("v_prediction"), sample, noise, TIMESTEPS)
    assert torch.equal(velocity, scheduler("v_prediction").get_velocity(sample, noise, TIMESTEPS))
    prior = UnCLIPScheduler(prediction_type="sample")
    losses = denoising_losses(sample.flatten(1), sample.flatten(1), noise.flatten(1), TIMESTEPS, prior, LossWeights())
    assert losses.keys() == {"loss", "prediction"}
    assert not losses["loss"].any()
