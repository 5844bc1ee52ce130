"""UniPC: a unified predictor and corrector, where the prediction at the end of a step corrects that step.

Source: Zhao et al. 2023, https://arxiv.org/abs/2302.04867.
"""

from __future__ import annotations

import dataclasses
import math
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
    ZeroTerminalSNRConfig,
)
from kandinsky22.schedulers.exponential_integrator import (
    ExponentialScheduler,
    SolverConfig,
    SolverStep,
    Term,
    exponential_weights,
)
from kandinsky22.schedulers.noise_schedules import FloatArray


@dataclasses.dataclass(frozen=True)
class UniPCConfig(SolverConfig, TimestepSpacingConfig, ZeroTerminalSNRConfig):
    """Settings of `UniPCMultistepScheduler`.

    Attributes:
        predict_x0: Whether steps use predictions of the clean sample, or of the noise.
        solver_type: The paper's function B(h) of the step's length h in lambda: "bh1" is h, "bh2" is e^h - 1.
        disable_corrector: Indices of the steps that are not corrected, 0 or more.
        final_sigmas_type: Sigma at which the last step ends: "zero", or "sigma_min", the lowest of training.
        sigma_min: Last sigma of a schedule of sigmas, above 0; None is the lowest of training.
        sigma_max: First sigma of a schedule of sigmas, above 0; None is the highest of training.
    """

    owner: ClassVar[str] = "UniPCMultistepScheduler"
    positional: ClassVar[tuple[str, ...]] = (
        *BETA_ARGUMENTS,
        "solver_order",
        *THRESHOLD_ARGUMENTS,
        "predict_x0",
        "solver_type",
        "lower_order_final",
        "disable_corrector",
        "solver_p",
        *SIGMA_ARGUMENTS,
        "use_flow_sigmas",
        "flow_shift",
        "timestep_spacing",
        "steps_offset",
        "final_sigmas_type",
        "rescale_betas_zero_snr",
        "use_dynamic_shifting",
        "time_shift_type",
        "sigma_min",
        "sigma_max",
        "shift_terminal",
    )
    max_solver_order: ClassVar[int] = 9
    choices: ClassVar[Mapping[str, tuple[str | None, ...]]] = {
        **BetaScheduleConfig.choices,
        "solver_type": ("bh1", "bh2"),
    }
    synonyms: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "solver_type": {"midpoint": "bh2", "heun": "bh2", "logrho": "bh2"}
    }

    predict_x0: bool = True
    solver_type: str = "bh2"
    disable_corrector: tuple[int, ...] = ()
    timestep_spacing: str = "linspace"
    final_sigmas_type: str = "zero"
    sigma_min: float | None = None
    sigma_max: float | None = None


@dataclasses.dataclass(frozen=True)
class CompletedStep:
    """The previous step, which the next prediction corrects.

    Attributes:
        step: Its coefficients.
        order: Number of predictions that it used.
        sample: Sample at its start, (B, C, ...).
    """

    step: SolverStep
    order: int
    sample: Tensor


class UniPCMultistepScheduler(ExponentialScheduler):
    """UniPC: a predictor of order p and a corrector that raises the order to p + 1, one network evaluation per step.

    Source: Zhao et al. 2023, algorithms 1 and 2, https://arxiv.org/abs/2302.04867.

    A learned variance is dropped.

    Args:
        **settings: Settings, see `UniPCConfig`.
    """

    config_class = UniPCConfig
    config: UniPCConfig

    def _reset(self) -> None:
        super()._reset()
        self._completed: CompletedStep | None = None

    @property
    def _predicts_noise(self) -> bool:
        return not self.config.predict_x0

    def _final_sigma(self, sigmas: FloatArray) -> float:
        final = super()._final_sigma(sigmas)
        return float(sigmas[-1]) if final > 0 and self._sigma_schedule() else final

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Correct `sample` with the new prediction, and return the sample at the next sigma.

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
        start = current.sample
        if self._completed is not None and current.index - 1 not in self.config.disable_corrector:
            start = self._corrected(self._completed, current.prediction)
        self._store_prediction(current.sigma, current.prediction)
        step, order = self._solver_step(current.sigma, current.sigma_next), self._order_at(current.index)
        advances = current.sigma_next != current.sigma
        self._completed = CompletedStep(step, order, start) if advances else None
        prev_sample = step.apply(start, self._predictor_terms(step, order) if advances else [])
        self._step_index = current.index + 1
        return self._output(prev_sample.to(model_output.dtype), current.x0, return_dict)

    def _order_at(self, index: int) -> int:
        remaining = len(self._timestep_list) - index  # unlike in other solvers, this limits long runs as well
        order = super()._order_at(index)
        return min(order, remaining) if self.config.lower_order_final else order

    def _predictor_terms(self, step: SolverStep, order: int) -> list[Term]:
        """Return the last predictions with the weights of the predictor, UniP."""
        history = self._history[::-1][:order]
        if order == 1:
            return [Term(1.0, history[0].value)]
        nodes = [step.node(past.sigma) for past in history]
        if order == 2:
            weight = self._difference_weight(step) / nodes[1]
            weights = [1 - weight, weight]
        else:
            weights = exponential_weights(step, nodes)
        return [Term(weight, past.value) for weight, past in zip(weights, history, strict=True)]

    def _corrected(self, completed: CompletedStep, prediction: Tensor) -> Tensor:
        """Return the sample at the end of the previous step, with the prediction made there: the corrector, UniC."""
        step, history = completed.step, self._history[::-1][: completed.order]
        if completed.order == 1:
            weight = self._difference_weight(step)
            weights = [1 - weight, weight]
        else:
            weights = exponential_weights(step, [*(step.node(past.sigma) for past in history), 1.0])
        values = [*(past.value for past in history), prediction]
        return step.apply(
            completed.sample, [Term(weight, value) for weight, value in zip(weights, values, strict=True)]
        )

    def _difference_weight(self, step: SolverStep) -> float:
        """Return the weight of a single difference of predictions: B(h) / 2 as a fraction of `prediction_scale`."""
        return 0.5 if self.config.solver_type == "bh2" else 0.5 * step.z / math.expm1(step.z)
