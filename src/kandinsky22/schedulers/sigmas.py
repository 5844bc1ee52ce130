"""Noise levels: what the fast solvers step along, and how the levels may be spread.

The level of x_t is sigma = sqrt((1 - a_t) / a_t), the standard deviation of the noise if the sample is scaled so that
the signal keeps its size (Karras et al. 2022, https://arxiv.org/abs/2206.00364). Coefficients are Python floats,
computed in double precision from levels in single precision: they change neither the type of a sample nor its device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kandinsky22.errors import InputError
from kandinsky22.schedulers.base import Floats, Scheduler, SchedulerOutput, rescaled, spaced_timesteps
from kandinsky22.schedulers.config import GridConfig, SchedulerConfig

SMALLEST_SIGNAL = 2.0**-24  # a_t of pure noise, so that its level is finite; the smallest of half precision


def karras(highest: float, lowest: float, steps: int, rho: float = 7.0) -> Floats:
    """Levels evenly spaced in sigma^(1/rho) (Karras et al. 2022, equation 5)."""
    first, last = highest ** (1 / rho), lowest ** (1 / rho)
    return (first + np.linspace(0, 1, steps) * (last - first)) ** rho


def exponential(highest: float, lowest: float, steps: int) -> Floats:
    """Levels evenly spaced in log sigma, that is in half the logarithm of the signal-to-noise ratio."""
    return np.exp(np.linspace(math.log(highest), math.log(lowest), steps))


def beta_quantiles(probabilities: Floats, shape: float = 0.6) -> Floats:
    """Quantiles of the Beta distribution with both parameters `shape`, by bisection."""
    nodes, weights = np.polynomial.legendre.leggauss(48)
    nodes, weights = (nodes + 1) / 2, weights / 2
    total = math.gamma(shape) ** 2 / math.gamma(2 * shape)
    tails = np.minimum(probabilities, 1 - probabilities)  # the distribution is symmetric
    low, high = np.zeros_like(tails), np.full_like(tails, 0.5)
    for _ in range(60):
        middle = (low + high) / 2
        # The integral of the density up to `middle`, with x = middle u^5 to take the edge off its pole at 0.
        x = middle[:, None] * nodes**5
        below = 5 * middle**shape * ((nodes ** (5 * shape - 1) * (1 - x) ** (shape - 1)) @ weights) / total
        low, high = np.where(below < tails, middle, low), np.where(below < tails, high, middle)
    return np.where(probabilities < 0.5, low, 1 - low)


def beta(highest: float, lowest: float, steps: int) -> Floats:
    """Levels at even quantiles of a Beta distribution, dense at both ends (Lee et al. 2024,
    https://arxiv.org/abs/2407.12173)."""
    return lowest + beta_quantiles(1 - np.linspace(0, 1, steps)) * (highest - lowest)


SPREADS = {
    "use_karras_sigmas": karras,
    "use_lu_lambdas": exponential,  # even in lambda (Lu et al. 2022, https://arxiv.org/abs/2206.00927)
    "use_exponential_sigmas": exponential,
    "use_beta_sigmas": beta,
}


def timesteps_of(levels: Floats, table: Floats) -> Floats:
    """The timesteps, whole or between two, at which training had these levels; log sigma is interpolated."""
    wanted, logs = np.log(np.maximum(levels, 1e-10)), np.log(table)
    if len(logs) == 1:
        return np.zeros_like(wanted)
    below = np.clip(np.searchsorted(logs, wanted, side="right") - 1, 0, len(logs) - 2)
    part = np.clip((logs[below] - wanted) / (logs[below] - logs[below + 1]), 0, 1)
    return (1 - part) * below + part * (below + 1)


class SequentialScheduler(Scheduler):
    """Common ground of the methods whose steps build on those before: each knows its place in the order of visits."""

    _place: int | None = None

    def _restart(self) -> None:
        """Forget the steps made so far: a new generation begins."""
        self._place = None

    def _locate(self, timestep: float | Tensor) -> int:
        """The place of `timestep` in the order of visits: where the last step led, or else the start of a new run."""
        if self.num_inference_steps is None:
            raise InputError("step before set_timesteps: how far a step leads depends on the number of steps")
        try:
            wanted = float(timestep)
        except (TypeError, ValueError, RuntimeError):
            wanted = math.nan
        if self._place is None or self._place >= len(self._order) or self._order[self._place] != wanted:
            places = [place for place, step in enumerate(self._order) if step == wanted]
            if not places:
                shown = self._order if len(self._order) < 20 else f"{self._order[:3]} to {self._order[-1]}"
                raise InputError(f"timestep={timestep!r}; accepted: one of the scheduler's timesteps, {shown}")
            self._restart()
            # Of two visits to a timestep the second one begins a step, unless the whole run begins with the first.
            self._place = places[0 if places[0] == 0 else min(1, len(places) - 1)]
        return self._place


class SigmaScheduler(SequentialScheduler):
    """Common ground of the methods that step from level to level: `sigmas`, one a visit and the last one's end."""

    spare: ClassVar[int] = 0  # timesteps spaced and left out, see spaced_timesteps
    continuous: ClassVar[bool] = False  # timesteps need not be whole

    def _build(self, config: SchedulerConfig) -> None:
        super()._build(config)
        if rescaled(config):
            self.alphas_cumprod[-1] = SMALLEST_SIGNAL
        self.alphas_cumprod[self.alphas_cumprod == 0] = SMALLEST_SIGNAL  # after a beta of 1
        self._table: Floats = (((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5).numpy()
        self._visit(self._table[::-1].copy(), [self._final(self._table)], self.timesteps.numpy(), None)
        self.num_inference_steps = None

    # Levels

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Choose the levels: a number of steps, spaced as configured; descending `timesteps`; or the descending
        `sigmas` themselves, the last being where the last step ends.

        Raises InputError unless exactly one is given and it fits into the training steps, and for timesteps or sigmas
        given against a config that spreads the levels itself.
        """
        spread = self._spread()
        given = "sigmas" if sigmas is not None else "timesteps"
        if spread is not None and (timesteps is not None or sigmas is not None):
            raise InputError(f"{given} given, but the config has {spread}=True; accepted: num_inference_steps")
        self.custom_timesteps = timesteps is not None or sigmas is not None
        if sigmas is not None:
            if num_inference_steps is not None or timesteps is not None:
                raise InputError("sigmas and num_inference_steps or timesteps given; accepted: exactly one of them")
            levels = _levels(sigmas)
            visited = self._timesteps_of(levels[:-1], given)
            self._visit(levels[:-1], levels[-1:].tolist(), visited, device)
            return
        visited = np.asarray(self._choose(num_inference_steps, timesteps), np.float32)
        levels = self._interpolated(visited)
        if spread is not None:
            highest, lowest = self._bounds(levels)
            levels = SPREADS[spread](highest, lowest, len(visited))
            visited = self._timesteps_of(levels, spread)
        self._visit(levels, [self._final(levels)], visited, device)

    def _spaced(self, steps: int) -> list[Any]:
        spaced = spaced_timesteps(self.config, steps, spare=self.spare)
        return spaced.astype(np.float32).tolist()

    def _interpolated(self, timesteps: Floats) -> Floats:
        return np.interp(timesteps, np.arange(len(self._table)), self._table)

    def _spread(self) -> str | None:
        config = self.config
        return next((name for name in config.grids if config[name]), None) if isinstance(config, GridConfig) else None

    def _bounds(self, levels: Floats) -> tuple[float, float]:
        """Highest and lowest level of a spread, the chosen `levels`' own unless the config says otherwise."""
        names = self.config.names()
        chosen = [self.config[name] if name in names else None for name in ("sigma_max", "sigma_min")]
        own = float(levels[0]), float(levels[-1])
        return (own[0] if chosen[0] is None else chosen[0], own[1] if chosen[1] is None else chosen[1])

    def _final(self, levels: Floats) -> float:
        """Where the last step ends."""
        ends_early = "final_sigmas_type" in self.config.names() and self.config["final_sigmas_type"] == "sigma_min"
        return float(self._table[0]) if ends_early else 0.0

    def _timesteps_of(self, levels: Floats, spread: str) -> Floats:
        """Timesteps of levels that were spread, or given by hand, in the way `spread` says."""
        return timesteps_of(levels, self._table)

    def _visit(self, levels: Floats, final: list[float], timesteps: Floats, device: torch.device | str | None) -> None:
        """Make these the levels and timesteps of a new run."""
        self.sigmas = torch.from_numpy(np.concatenate([levels, final]).astype(np.float32))
        self._levels: list[float] = self.sigmas.double().tolist()
        kind = torch.float32 if self.continuous else torch.int64
        self.timesteps = torch.from_numpy(np.ascontiguousarray(timesteps)).to(device=device, dtype=kind)
        self.num_inference_steps = len(timesteps)
        self._restart()

    # Noise

    def _signal(self, sigma: float) -> float:
        """What multiplies the clean sample at this level."""
        return signal(sigma)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor | float) -> Tensor:
        """Clean samples (B, ...) with noise of that shape at the levels of `timesteps`: one for all, or (B,)."""
        steps = torch.as_tensor(timesteps).flatten().tolist()
        if len(steps) not in (1, len(original_samples)) or not all(0 <= step < len(self) for step in steps):
            raise InputError(
                f"timesteps={timesteps}; accepted: one, or one for each of {len(original_samples)} samples, "
                f"from 0 to {len(self) - 1}"
            )
        levels = dict(zip(self._order, self._levels, strict=False))
        chosen = [levels.get(step, float(np.interp(step, np.arange(len(self)), self._table))) for step in steps]
        shape = (-1, *[1] * (original_samples.ndim - 1))
        scale = torch.tensor([self._signal(level) for level in chosen], dtype=torch.float64).reshape(shape)
        level = torch.tensor(chosen, dtype=torch.float64).reshape(shape)
        return scale.to(original_samples) * original_samples + (scale * level).to(original_samples) * noise


class ExplodingScheduler(SigmaScheduler):
    """Common ground of the methods on samples whose signal keeps its size while the noise grows: x = x_0 + sigma noise.

    The network is shown the sample at variance 1, as in training. Timesteps may lie between those of training.
    """

    continuous = True

    def _build(self, config: SchedulerConfig) -> None:
        super()._build(config)
        self.custom_timesteps = False

    def _visit(self, levels: Floats, final: list[float], timesteps: Floats, device: torch.device | str | None) -> None:
        super()._visit(levels, final, timesteps, device)
        highest = max(self._levels)
        # At the noisiest timestep the signal's share is negligible; where leading spacing starts it is not.
        leading = self.config.get("timestep_spacing") == "leading"
        self.init_noise_sigma = math.hypot(highest, 1) if leading else highest

    def _signal(self, sigma: float) -> float:
        return 1.0

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The sample at variance 1, as the network knows it; `timestep` is needed to tell how noisy it is."""
        if timestep is None:
            raise InputError("timestep=None; accepted: one of the scheduler's timesteps")
        return sample * signal(self._levels[self._locate(timestep)])

    def _clean(self, prediction: Tensor, sample: Tensor, sigma: float) -> Tensor:
        """The clean sample that a prediction for `sample` at this level implies."""
        share = signal(sigma)
        return self._limit(self._original(prediction, sample * share, share**2))

    @staticmethod
    def _result(previous: Tensor, original: Tensor, like: Tensor, return_dict: bool) -> Any:
        previous = previous.to(like.dtype)
        return SchedulerOutput(previous, original) if return_dict else (previous, original)


def signal(sigma: float) -> float:
    """sqrt(a_t) at a level."""
    return 1 / math.hypot(sigma, 1)


def widened(sample: Tensor) -> Tensor:
    """At least in single precision, in which steps are computed."""
    return sample.float() if sample.dtype in (torch.float16, torch.bfloat16) else sample


def _levels(sigmas: Sequence[float] | Tensor) -> Floats:
    try:
        levels = np.asarray(sigmas, dtype=np.float32).astype(np.float64)
    except (TypeError, ValueError):
        levels = np.empty(0)
    descending = levels.ndim == 1 and all(a > b for a, b in itertools.pairwise(levels.tolist()))
    if len(levels.shape) != 1 or len(levels) < 2 or not descending or not 0 <= levels[-1] < levels[0] < math.inf:
        raise InputError(f"sigmas={sigmas}; accepted: two numbers or more, finite, descending, the last 0 or more")
    return levels
