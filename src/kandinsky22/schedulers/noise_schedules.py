"""Noise schedules: the betas of the training process, and the spacing of timesteps for sampling."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kandinsky22.schedulers.config import (
    BetaScheduleConfig,
    SchedulerConfig,
    TimestepSpacingConfig,
    ZeroTerminalSNRConfig,
)

FloatArray = np.ndarray[Any, np.dtype[np.floating[Any]]]


def betas_from_alpha_bar(alpha_bar: Callable[[float], float], num_timesteps: int) -> Tensor:
    """Return betas whose cumulative products of 1 - beta follow a function of time.

    Betas are capped at 0.999. Source: Nichol & Dhariwal 2021, section 3.2, https://arxiv.org/abs/2102.09672.

    Args:
        alpha_bar: Function of time, 0 (clean) to 1 (noise), that is proportional to alpha_bar, the signal's share of
            the variance. It decreases.
        num_timesteps: Number of betas.

    Returns:
        Betas, (num_timesteps,) float32.
    """
    curve = [alpha_bar(i / num_timesteps) for i in range(num_timesteps + 1)]
    betas = [min(1 - after / before, 0.999) for before, after in itertools.pairwise(curve)]
    return torch.tensor(betas, dtype=torch.float32, device="cpu")


def _cosine(time: float) -> float:
    """Cosine schedule (Nichol & Dhariwal 2021, equation 17, https://arxiv.org/abs/2102.09672)."""
    return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(time: float) -> float:
    """Laplace schedule: the log signal-to-noise ratio is Laplace distributed over time.

    Source: Hang et al. 2024, https://arxiv.org/abs/2407.03297.
    """
    distance = 0.5 - time
    snr = math.exp(-0.5 * math.copysign(1, distance) * math.log(1 - 2 * math.fabs(distance) + 1e-6))
    return math.sqrt(snr / (1 + snr))


def _exponential(time: float) -> float:
    return math.exp(-12 * time)


_ALPHA_BARS = {"squaredcos_cap_v2": _cosine, "laplace": _laplace, "exp": _exponential}


def training_betas(config: SchedulerConfig) -> Tensor:
    """Return the betas of the training process.

    The schedules are "linear" (Ho et al. 2020, https://arxiv.org/abs/2006.11239), "scaled_linear" (linear in the
    square root of beta: Rombach et al. 2022, https://arxiv.org/abs/2112.10752), "sigmoid" (Xu et al. 2022,
    https://arxiv.org/abs/2203.02923), "squaredcos_cap_v2" (the cosine schedule), "laplace" and "exp".

    Args:
        config: Settings of a scheduler.

    Returns:
        Betas, (num_train_timesteps,) float32.
    """
    steps = config.num_train_timesteps
    if not isinstance(config, BetaScheduleConfig):
        return betas_from_alpha_bar(_ALPHA_BARS[config.beta_schedule], steps)
    start, end = config.beta_start, config.beta_end
    if config.trained_betas is not None:
        betas = torch.tensor(config.trained_betas, dtype=torch.float32, device="cpu")
    elif config.beta_schedule == "linear":
        betas = torch.linspace(start, end, steps, dtype=torch.float32, device="cpu")
    elif config.beta_schedule == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32, device="cpu") ** 2
    elif config.beta_schedule == "sigmoid":
        betas = torch.sigmoid(torch.linspace(-6, 6, steps, dtype=torch.float32, device="cpu")) * (end - start) + start
    else:
        betas = betas_from_alpha_bar(_ALPHA_BARS[config.beta_schedule], steps)
    return rescale_zero_terminal_snr(betas) if has_zero_terminal_snr(config) else betas


def has_zero_terminal_snr(config: SchedulerConfig) -> bool:
    """Return whether the last timestep is pure noise.

    Args:
        config: Settings of a scheduler.
    """
    return isinstance(config, ZeroTerminalSNRConfig) and config.rescale_betas_zero_snr


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Return betas whose last timestep is pure noise.

    The square root of alpha_bar is shifted and scaled, so that its first value is unchanged and its last is 0.
    Source: Lin et al. 2023, algorithm 1, https://arxiv.org/abs/2305.08891.

    Args:
        betas: Betas, (num_timesteps,).

    Returns:
        Rescaled betas, (num_timesteps,).
    """
    sqrt_alpha_bar = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = sqrt_alpha_bar[0], sqrt_alpha_bar[-1]
    alpha_bar = ((sqrt_alpha_bar - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


def spaced_timesteps(config: SchedulerConfig, count: int, end: int | None = None, extra: int = 0) -> FloatArray:
    """Return training timesteps, spaced as configured.

    Source: Lin et al. 2023, table 2, https://arxiv.org/abs/2305.08891.

    Args:
        config: Settings of a scheduler. Without a choice of `timestep_spacing`, spacing is linear.
        count: Number of timesteps, 1 or more.
        end: Upper bound, exclusive; None means `num_train_timesteps`.
        extra: Number of additional timesteps that are spaced and then dropped; they are the least noisy ones.

    Returns:
        Timesteps in descending order, not rounded, (count,) float64.
    """
    total = config.num_train_timesteps
    end = total if end is None else end
    spacing, offset = "linspace", 0
    if isinstance(config, TimestepSpacingConfig):
        spacing, offset = config.timestep_spacing, config.steps_offset
    points = count + extra
    if spacing == "linspace":
        return np.linspace(0, end - 1, points)[::-1][:count]
    if spacing == "trailing":
        # Rounding inside arange can append one element below the last step, which the slice removes.
        return np.arange(end, 0, -total / count)[:count].round() - 1.0
    return np.arange(points)[::-1][:count] * float(end // points) + offset
