"""DPM-Solver for the reverse diffusion SDE in the form of k-diffusion: two stages per step and noise of one path.

Sources: Karras et al. 2022, https://arxiv.org/abs/2206.00364; Lu et al. 2022, https://arxiv.org/abs/2211.01095.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kandinsky22.errors import invalid
from kandinsky22.noise import Generators
from kandinsky22.schedulers.base import SchedulerOutput
from kandinsky22.schedulers.brownian import BrownianPath
from kandinsky22.schedulers.config import BETA_ARGUMENTS, SIGMA_ARGUMENTS
from kandinsky22.schedulers.heun import AncestralStep, FirstStage, SecondStages, TwoStageConfig, TwoStageScheduler
from kandinsky22.schedulers.noise_schedules import FloatArray
from kandinsky22.schedulers.sigmas import sigmas_to_timesteps, to_float32


@dataclasses.dataclass(frozen=True)
class DPMSolverSDEConfig(TwoStageConfig):
    """Settings of `DPMSolverSDEScheduler`.

    Attributes:
        noise_sampler_seed: Seed of the noise of a generation, 0 to 2**63 - 1, or a list of one per batch item; None
            draws it from the generator of the first step.
    """

    owner: ClassVar[str] = "DPMSolverSDEScheduler"
    positional: ClassVar[tuple[str, ...]] = (
        *BETA_ARGUMENTS,
        "prediction_type",
        *SIGMA_ARGUMENTS,
        "noise_sampler_seed",
        "timestep_spacing",
        "steps_offset",
    )

    noise_sampler_seed: int | tuple[int, ...] | None = None


class NoisePath:
    """Noise of the steps of a generation: increments of Brownian motion in sigma.

    Args:
        sigma_min: Lowest sigma at which a step ends, except 0.
        sigma_max: Highest sigma.
        seeds: A seed for the whole batch, or a list of one per batch item.
        like: A sample, whose shape, type and device the noise has.
    """

    def __init__(self, sigma_min: float, sigma_max: float, seeds: int | Sequence[int], like: Tensor) -> None:
        self._per_item = not isinstance(seeds, int)
        shape = like.shape[1:] if self._per_item else like.shape
        each = [seeds] if isinstance(seeds, int) else seeds
        self._paths = [BrownianPath(sigma_min, sigma_max, seed, shape, like.dtype, like.device) for seed in each]

    def between(self, sigma_from: float, sigma_to: float) -> Tensor:
        """Return standard normal noise for a step from one sigma to a lower one.

        Args:
            sigma_from: Noise level at the start.
            sigma_to: Noise level at the end, below `sigma_from`.
        """
        increments = [path.increment(sigma_from, sigma_to) for path in self._paths]
        noise = torch.stack(increments) if self._per_item else increments[0]
        return noise / math.sqrt(abs(sigma_from - sigma_to))


class DPMSolverSDEScheduler(TwoStageScheduler):
    """DPM-Solver of second order for the SDE: ancestral steps in log sigma, the second from the middle's prediction.

    Source: `sample_dpmpp_sde` of k-diffusion; Lu et al. 2022, https://arxiv.org/abs/2211.01095.

    The noise of both stages belongs to one path of Brownian motion, so that results with different numbers of steps
    resemble each other. A learned variance is dropped.

    Args:
        *arguments: Settings by position, in the order of the reference's constructor.
        **settings: Settings, see `DPMSolverSDEConfig`.
    """

    spacing_type: ClassVar[type[np.floating[Any]]] = np.float64
    config_class = DPMSolverSDEConfig
    config: DPMSolverSDEConfig

    def _reset(self) -> None:
        super()._reset()
        self._noise: NoisePath | None = None

    def _second_stages(self, starts: FloatArray, ends: FloatArray, end_timesteps: FloatArray) -> SecondStages:
        middles = np.sqrt(starts.astype(np.float64) * ends)
        return SecondStages(middles, sigmas_to_timesteps(middles, self._training_sigmas))

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
        s_noise: float = 1.0,
        generator: Generators = None,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Return the sample for the next network evaluation.

        Args:
            model_output: Network output for the scaled sample, (B, C, ...), or (B, 2C, ...) with a learned variance.
            timestep: Timestep of the network evaluation, an element of `timesteps`.
            sample: Current sample x_0 + sigma epsilon, (B, C, ...).
            return_dict: Whether to return a `SchedulerOutput`, or the tuple of its fields.
            s_noise: Factor of the noise, 0 or more.
            generator: Generator of the seed of all noise, or one per batch item, used in the first step of a generation
                if the config has no `noise_sampler_seed`; None uses torch's global generator.

        Returns:
            The next sample and the predicted clean sample, both (B, C, ...).

        Raises:
            InputError: If `timestep`, the shape of `model_output` or the number of seeds is invalid.
        """
        index = self._index_for_timestep(timestep)
        sigma, sigma_next = self._sigma_list[index : index + 2]
        sample = to_float32(sample)
        denoised = self._denoised(self._split_output(model_output, sample).prediction, sample, sigma)
        if self._noise is None:
            self._noise = self._make_noise(sample, generator)
        if index % 2 == 0 or self._first_stage is None:
            self._first_stage = FirstStage(sample, denoised)
        else:
            # The second stage takes the step again from its start, with the prediction of the middle.
            sigma, sample = self._sigma_list[index - 1], self._first_stage.sample
            self._first_stage = None
        prev_sample = denoised
        if sigma_next > 0:
            step = AncestralStep.between(sigma, sigma_next)
            prev_sample = denoised + (sample - denoised) * (step.sigma_down / sigma)
            if step.noise > 0:
                noise = self._noise.between(_rounded(sigma), self._rounded_end(index))
                prev_sample = prev_sample + noise * (s_noise * step.noise)
        self._step_index = index + 1
        return self._output(prev_sample.to(model_output.dtype), denoised, return_dict)

    def _rounded_end(self, index: int) -> float:
        """Return the sigma at which the stage of an evaluation ends, rounded as in the reference."""
        if index % 2 or index + 2 == len(self._sigma_list):  # the last step, which has one stage
            return _rounded(self._sigma_list[index + 1])
        start, end = _log_time(self._sigma_list[index]), _log_time(self._sigma_list[index + 2])
        return float((-(start + (end - start) * 0.5)).exp())

    def _make_noise(self, like: Tensor, generator: Generators) -> NoisePath:
        """Return the noise of a generation that starts with a sample."""
        seeds: int | Sequence[int] | None = self.config.noise_sampler_seed
        if seeds is None:
            generators = generator if isinstance(generator, list | tuple) else [generator]
            drawn = [
                int(torch.randint(0, 2**63 - 1, (), generator=each, device="cpu" if each is None else each.device))
                for each in generators
            ]
            seeds = drawn[0] if len(drawn) == 1 else drawn
        if not isinstance(seeds, int) and len(seeds) != len(like):
            raise invalid("number of seeds", len(seeds), f"1 or {len(like)}, one per batch item")
        return NoisePath(min(filter(None, self._sigma_list)), max(self._sigma_list), seeds, like)


def _log_time(sigma: float) -> Tensor:
    return -torch.tensor(sigma, dtype=torch.float32).log()


def _rounded(sigma: float) -> float:
    """Return a sigma after a logarithm and an exponential in single precision.

    Noise is a function of sigmas with six decimals. Those of the reference go through logarithms, which changes the
    last decimals, and through them the noise.
    """
    return float((-_log_time(sigma)).exp())
