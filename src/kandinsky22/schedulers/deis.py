"""DEIS: a multistep exponential integrator with predictions of the noise, exact for polynomials in log sigma.

Source: Zhang & Chen 2022, https://arxiv.org/abs/2204.13902.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from kandinsky22.schedulers.base import SchedulerOutput
from kandinsky22.schedulers.config import (
    BETA_ARGUMENTS,
    SIGMA_ARGUMENTS,
    THRESHOLD_ARGUMENTS,
    BetaScheduleConfig,
    TimestepSpacingConfig,
)
from kandinsky22.schedulers.exponential_integrator import ExponentialScheduler, SolverConfig, Term, exponential_weights
from kandinsky22.schedulers.noise_schedules import FloatArray


@dataclasses.dataclass(frozen=True)
class DEISConfig(SolverConfig, TimestepSpacingConfig):
    """Settings of `DEISMultistepScheduler`.

    Attributes:
        algorithm_type: Only "deis".
        solver_type: Only "logrho", the paper's form with polynomials in log rho = log sigma.
    """

    owner: ClassVar[str] = "DEISMultistepScheduler"
    positional: ClassVar[tuple[str, ...]] = (
        *BETA_ARGUMENTS,
        "solver_order",
        *THRESHOLD_ARGUMENTS,
        "algorithm_type",
        "solver_type",
        "lower_order_final",
        *SIGMA_ARGUMENTS,
        "use_flow_sigmas",
        "flow_shift",
        "timestep_spacing",
        "steps_offset",
        "use_dynamic_shifting",
        "time_shift_type",
    )
    choices: ClassVar[Mapping[str, tuple[str | None, ...]]] = {
        **BetaScheduleConfig.choices,
        "algorithm_type": ("deis",),
        "solver_type": ("logrho",),
    }
    synonyms: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "algorithm_type": dict.fromkeys(("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"), "deis"),
        "solver_type": dict.fromkeys(("midpoint", "heun", "bh1", "bh2"), "logrho"),
    }

    algorithm_type: str = "deis"
    solver_type: str = "logrho"
    timestep_spacing: str = "linspace"


class DEISMultistepScheduler(ExponentialScheduler):
    """DEIS: deterministic multistep of order 1 to 3, one network evaluation per step.

    Source: Zhang & Chen 2022, https://arxiv.org/abs/2204.13902.

    The last step ends at the lowest noise level of training. A learned variance is dropped.

    Args:
        **settings: Settings, see `DEISConfig`.
    """

    config_class = DEISConfig
    config: DEISConfig

    @property
    def _predicts_noise(self) -> bool:
        return True

    def _final_sigma(self, sigmas: FloatArray) -> float:
        return float(sigmas[-1] if self._sigma_schedule() else self._training_sigmas[0])

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Return the sample at the next sigma: the integral of the polynomial through the last predictions.

        Args:
            model_output: Network output for `sample`, (B, C, ...), or (B, 2C, ...) with a learned variance.
            timestep: Current timestep, an element of `timesteps`.
            sample: Current sample, (B, C, ...).
            return_dict: Whether to return a `SchedulerOutput`, or the tuple of its fields.

        Returns:
            The next sample and the predicted clean sample, both (B, C, ...).

        Raises:
            InputError: If timesteps are not set, or `timestep` or the shape of `model_output` is invalid.
        """
        current = self._step_input(model_output, timestep, sample)
        self._store_prediction(current.sigma, current.prediction)
        step = self._solver_step(current.sigma, current.sigma_next)
        history = self._history[::-1][: self._order_at(current.index)]
        weights = [1.0]
        if current.sigma_next != current.sigma and len(history) > 1:
            weights = exponential_weights(step, [step.node(past.sigma) for past in history])
        terms = [Term(weight, past.value) for weight, past in zip(weights, history, strict=False)]
        prev_sample = step.apply(current.sample, terms)
        self._step_index = current.index + 1
        return self._output(prev_sample.to(model_output.dtype), current.x0, return_dict)
