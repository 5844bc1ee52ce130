"""Sampling of normally distributed data, for which the best network and the exact solutions are known.

With clean samples of mean `MEAN` and standard deviation `SPREAD`, the noisy sample x_t has mean a M and variance
v = a^2 S^2 + b^2, where a and b are the square roots of alphas_cumprod and 1 - alphas_cumprod. The best estimate of the
clean sample is linear in x_t, and (x_t - a M) / sqrt(v) is constant along the probability flow. Noise levels are given
as sigma = b / a.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

import kandinsky22.schedulers as schedulers

MEAN, SPREAD = 0.4, 0.6


def make_scheduler(name: str, **config: Any) -> Any:
    return getattr(schedulers, name)(**config)


def variance(sigma: float) -> float:
    """Return the variance of noisy samples."""
    return (SPREAD**2 + sigma**2) / (1 + sigma**2)


def centre(sigma: float) -> float:
    """Return the mean of noisy samples."""
    return MEAN / math.hypot(sigma, 1)


def best_prediction(sample: Tensor, sigma: float, prediction_type: str = "epsilon") -> Tensor:
    """Return the best network's prediction for a noisy sample of variance `variance(sigma)`."""
    signal, noise = 1 / math.hypot(sigma, 1), sigma / math.hypot(sigma, 1)
    clean = MEAN + signal * SPREAD**2 / variance(sigma) * (sample - signal * MEAN)
    epsilon = (sample - signal * clean) / noise
    return {"epsilon": epsilon, "sample": clean, "v_prediction": signal * epsilon - noise * clean}[prediction_type]


def flow(sample: Tensor, start: float, end: float) -> Tensor:
    """Return where the probability flow takes a sample from sigma `start` to sigma `end`."""
    return centre(end) + (variance(end) / variance(start)) ** 0.5 * (sample - centre(start))


def reverse_diffusion_mean(sample: Tensor, start: float, end: float) -> Tensor:
    """Return the mean of where the reversed diffusion takes a sample from sigma `start` to sigma `end`."""
    shrink = math.hypot(end, 1) / math.hypot(start, 1)  # of the signal, from the end back to the start
    return centre(end) + shrink * variance(end) / variance(start) * (sample - centre(start))
