"""Multistep sampling of latent consistency models (LCM).

Each network evaluation predicts the clean sample, to which noise is added for the next evaluation.
Source: Luo et al. 2023, https://arxiv.org/abs/2310.04378.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from kandinsky22.errors import invalid
from kandinsky22.inputs.validation import finite_float, storing_device
from kandinsky22.noise import Generators, randn_tensor
from kandinsky22.schedulers.base import SchedulerOutput
from kandinsky22.schedulers.config import (
    BETA_ARGUMENTS,
    THRESHOLD_ARGUMENTS,
    ClipConfig,
    DiscreteTimeConfig,
    SchedulerConfig,
    as_int,
)
from kandinsky22.schedulers.sigmas import StatefulScheduler

SIGMA_DATA = 0.5  # standard deviation of the data that the boundary conditions assume (section 4.1)


@dataclasses.dataclass(frozen=True)
class LCMConfig(ClipConfig, DiscreteTimeConfig):
    """Settings of `LCMScheduler`.

    Attributes:
        original_inference_steps: Number of steps of the solver that was distilled, 1 or more. The timesteps are a
            subset of its timesteps.
        set_alpha_to_one: Whether the last step removes all noise. Otherwise it ends at the noise level of timestep 0.
        timestep_scaling: Factor of timesteps in the boundary conditions, above 0.
    """

    owner: ClassVar[str] = "LCMScheduler"
    positional: ClassVar[tuple[str, ...]] = (
        *BETA_ARGUMENTS,
        "original_inference_steps",
        "clip_sample",
        "clip_sample_range",
        "set_alpha_to_one",
        "steps_offset",
        *THRESHOLD_ARGUMENTS,
        "timestep_spacing",
        "timestep_scaling",
        "rescale_betas_zero_snr",
    )

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    original_inference_steps: int = 50
    clip_sample: bool = False
    set_alpha_to_one: bool = True
    timestep_scaling: float = 10.0


class LCMScheduler(StatefulScheduler):
    """Multistep consistency sampling in latent space.

    Sources: Luo et al. 2023, https://arxiv.org/abs/2310.04378; Song et al. 2023, algorithm 1,
    https://arxiv.org/abs/2303.01469.

    It needs a network that was distilled for it. A learned variance is dropped.

    Args:
        **settings: Settings, see `LCMConfig`.
    """

    config_class = LCMConfig
    config: LCMConfig

    def _build(self, config: SchedulerConfig) -> None:
        super()._build(config)
        if not self.config.set_alpha_to_one:
            self.final_alpha_cumprod = self.alphas_cumprod[0]

    def _spaced_timesteps(self, steps: int) -> list[int]:
        return list(range(steps))[::-1]  # set_timesteps uses only the length and replaces the values

    def set_timesteps(  # type: ignore[override]  # the reference has its arguments in this order
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        original_inference_steps: int | None = None,
        timesteps: Sequence[int] | Tensor | None = None,
        strength: float = 1.0,
    ) -> None:
        """Set `timesteps` for a new generation: a subset of those of the distilled solver, or the timesteps themselves.

        Args:
            num_inference_steps: Number of steps, 1 to `original_inference_steps` * `strength`; None if `timesteps` is
                passed.
            device: Device of `timesteps`; None leaves them on the CPU.
            original_inference_steps: Number of steps of the distilled solver, 1 to `num_train_timesteps`; None uses the
                setting of the config.
            timesteps: Descending training timesteps; None takes them from the distilled solver.
            strength: Fraction of the timesteps that is used, the less noisy ones, above 0, at most 1.

        Raises:
            InputError: If not exactly one of `num_inference_steps` and `timesteps` is passed, or a value is invalid.
        """
        device, strength = storing_device(device), finite_float("strength", strength)
        total = self.config.num_train_timesteps
        requested = (
            self.config.original_inference_steps if original_inference_steps is None else original_inference_steps
        )
        solver_steps = as_int(requested)
        if solver_steps is None or not 0 < solver_steps <= total:
            raise invalid("original_inference_steps", requested, f"an integer from 1 to {total}")
        if not 0 < strength <= 1:
            raise invalid("strength", strength, "a number above 0, at most 1")
        values = [int(step) for step in self._requested_timesteps(num_inference_steps, timesteps)]
        count = len(values)
        if timesteps is None:
            stride = total // solver_steps
            solver_timesteps = [step * stride - 1 for step in range(int(solver_steps * strength), 0, -1)]
            if count > len(solver_timesteps):
                raise invalid(
                    "num_inference_steps",
                    num_inference_steps,
                    f"an integer from 1 to {len(solver_timesteps)}, the fraction strength={strength} "
                    f"of original_inference_steps={solver_steps}",
                )
            values = [solver_timesteps[math.floor(i * (len(solver_timesteps) / count))] for i in range(count)]
        else:
            values = values[count - int(count * strength) :]
            if not values:
                raise invalid(
                    "strength", strength, f"a fraction that selects at least one of {count} timesteps", "raise it"
                )
        self._require_signal(float(self._alpha_bar(values[0])))
        self.num_inference_steps, self.custom_timesteps = count, timesteps is not None
        self.timesteps = torch.tensor(values, dtype=torch.int64, device=device)
        self._begin_index = None
        self._reset()

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Return the sample at the next of `timesteps`: the predicted clean sample with fresh noise.

        Args:
            model_output: Network output for `sample`, (B, C, ...), or (B, 2C, ...) with a learned variance.
            timestep: Current timestep, an element of `timesteps`.
            sample: Current sample x_t, (B, C, ...).
            generator: Generator of the noise, or one per batch item; None uses torch's global generator. Noise is drawn
                at every timestep except the last.
            return_dict: Whether to return a `SchedulerOutput`, or the tuple of its fields.

        Returns:
            The previous sample and the predicted clean sample, both (B, C, ...).

        Raises:
            InputError: If timesteps are not set, or `timestep` or the shape of `model_output` is invalid.
        """
        index = self._index_for_timestep(timestep)
        t = int(self._timestep_list[index])
        prev_t = int(self._timestep_list[index + 1]) if index + 1 < len(self._timestep_list) else -1
        denoised = self.consistency_function(model_output, t, sample)
        prev_sample = denoised
        if prev_t >= 0:
            noise = randn_tensor(sample.shape, generator, model_output.device, denoised.dtype)
            alpha_bar_prev = self._alpha_bar(prev_t)
            prev_sample = alpha_bar_prev**0.5 * denoised + (1 - alpha_bar_prev) ** 0.5 * noise
        self._step_index = index + 1
        return self._output(prev_sample, denoised, return_dict)

    def consistency_function(
        self, model_output: Tensor, timestep: int, sample: Tensor, *, bounded: bool = True
    ) -> Tensor:
        """Return c_skip(t) x_t + c_out(t) x_0, the clean sample that a consistency model predicts.

        It is the sample itself at t = 0. Source: Luo et al. 2023, section 4.1, https://arxiv.org/abs/2310.04378.

        Args:
            model_output: Network output for `sample`, (B, C, ...), or (B, 2C, ...) with a learned variance.
            timestep: Timestep of the sample; a negative number stands for the end of sampling.
            sample: Sample x_t, (B, C, ...).
            bounded: Whether x_0 is clipped or thresholded as configured.

        Returns:
            Predicted clean sample, (B, C, ...).

        Raises:
            InputError: If the shape of `model_output` is invalid.
        """
        if timestep < 0:
            return sample
        prediction = self._split_output(model_output, sample).prediction
        x0 = self._predicted_x0(prediction, sample, self._alpha_bar(timestep))
        scaled_t = timestep * self.config.timestep_scaling
        c_skip = SIGMA_DATA**2 / (scaled_t**2 + SIGMA_DATA**2)
        c_out = scaled_t / (scaled_t**2 + SIGMA_DATA**2) ** 0.5
        return c_out * (self._threshold(x0) if bounded else x0) + c_skip * sample
