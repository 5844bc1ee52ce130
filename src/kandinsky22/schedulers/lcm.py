"""Sampling of latent consistency models: each call predicts the clean sample, which is noised anew for the next (Luo et
al. 2023, https://arxiv.org/abs/2310.04378)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from kandinsky22.errors import InputError
from kandinsky22.noise import Generators, randn_tensor
from kandinsky22.schedulers.base import Scheduler, SchedulerOutput
from kandinsky22.schedulers.config import ClipConfig, DiscreteConfig, SchedulerConfig, whole

SIGMA_DATA = 0.5  # standard deviation of the data that the boundary conditions assume (section 4.1)


@dataclasses.dataclass(frozen=True)
class LCMConfig(ClipConfig, DiscreteConfig):
    """Settings of `LCMScheduler`.

    `original_inference_steps` is the number of steps of the solver that was distilled: timesteps are among its.
    `timestep_scaling` sharpens the boundary conditions. With `set_alpha_to_one` what precedes timestep 0 is clean.
    """

    owner: ClassVar[str] = "LCMScheduler"

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    original_inference_steps: int = 50
    clip_sample: bool = False
    set_alpha_to_one: bool = True
    timestep_scaling: float = 10.0


class LCMScheduler(Scheduler):
    """Multistep consistency sampling; settings are the fields of `LCMConfig`. It needs a network distilled for it. A
    variance that the network learned is dropped."""

    config_class = LCMConfig
    config: LCMConfig

    def _build(self, config: SchedulerConfig) -> None:
        super()._build(config)
        if not self.config.set_alpha_to_one:
            self.final_alpha_cumprod = self.alphas_cumprod[0]

    def _spaced(self, steps: int) -> list[int]:
        return list(range(steps))[::-1]  # only their number counts

    def set_timesteps(  # type: ignore[override]  # the reference has its arguments in this order
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        original_inference_steps: int | None = None,
        timesteps: Sequence[int] | Tensor | None = None,
        strength: float = 1.0,
    ) -> None:
        """Choose the timesteps: a number of those of `original_inference_steps`, or the descending `timesteps`
        themselves; the less noisy part `strength` of them, above 0, at most 1. Raises InputError for numbers that do
        not fit."""
        total = self.config.num_train_timesteps
        given = self.config.original_inference_steps if original_inference_steps is None else original_inference_steps
        original = whole(given)
        if original is None or not 0 < original <= total:
            raise InputError(f"original_inference_steps={given!r}; accepted: an integer from 1 to {total}")
        if not 0 < strength <= 1:
            raise InputError(f"strength={strength!r}; accepted: a number above 0, at most 1")
        chosen = [int(step) for step in self._choose(num_inference_steps, timesteps)]
        if timesteps is None:
            solver = [step * (total // original) - 1 for step in range(int(original * strength), 0, -1)]
            if len(chosen) > len(solver):
                raise InputError(
                    f"num_inference_steps={num_inference_steps}; accepted: an integer from 1 to {len(solver)}, "
                    f"the part strength={strength} of original_inference_steps={original}"
                )
            count = len(chosen)
            chosen = [solver[math.floor(place * (len(solver) / count))] for place in range(count)]
        else:
            count = len(chosen)
            chosen = chosen[count - int(count * strength) :]
            if not chosen:
                raise InputError(f"strength={strength} leaves none of {count} timesteps; accepted: a higher one")
        self.num_inference_steps, self.custom_timesteps = count, timesteps is not None
        self.timesteps = torch.tensor(chosen, dtype=torch.int64, device=device)

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:  # fmt: skip
        """The sample at the next timestep, and the clean sample; both shaped as `sample` (B, C, ...).

        Noise is drawn from `generator` (one, or one a sample) at every timestep but the last. Raises InputError before
        `set_timesteps`, for other timesteps, and for shapes that do not fit.
        """
        if self.num_inference_steps is None:
            raise InputError("step before set_timesteps: how far a step leads depends on the number of steps")
        t = self._checked(timestep)
        following = self.previous_timestep(t)
        prediction, _ = self._split(model_output, sample)
        original = self._limit(self._original(prediction, sample, self._alpha_bar(t)))
        time = t * self.config.timestep_scaling
        spread = time**2 + SIGMA_DATA**2
        clean = (time / spread**0.5) * original + (SIGMA_DATA**2 / spread) * sample
        previous = clean
        if following >= 0:
            noise = randn_tensor(prediction.shape, generator, prediction.device, clean.dtype)
            after = self._alpha_bar(following)
            previous = after**0.5 * clean + (1 - after) ** 0.5 * noise
        return SchedulerOutput(previous, clean) if return_dict else (previous, clean)
