"""Exponential integrators: the mathematics that DPM-Solver, UniPC and DEIS share.

In lambda = log(sqrt(alpha_bar_t) / sqrt(1 - alpha_bar_t)) = -log sigma the probability flow ODE is linear, except for
the network's prediction. It is solved exactly for predictions that are polynomials in lambda: predictions of the noise
(DPM-Solver: Lu et al. 2022, https://arxiv.org/abs/2206.00927; DEIS: Zhang & Chen 2022,
https://arxiv.org/abs/2204.13902) or of the clean sample (DPM-Solver++: Lu et al. 2022,
https://arxiv.org/abs/2211.01095).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from kandinsky22.schedulers.config import BetaScheduleConfig, SigmaScheduleConfig, ThresholdConfig, as_int
from kandinsky22.schedulers.noise_schedules import FloatArray
from kandinsky22.schedulers.sigmas import SigmaScheduler, signal_scale, to_float32


class Term(NamedTuple):
    """Weighted prediction of a step.

    Attributes:
        weight: Weight, as a fraction of the weight of a constant prediction.
        value: Prediction, or a difference of predictions, (B, C, ...).
    """

    weight: float
    value: Tensor


@dataclasses.dataclass(frozen=True)
class SolverStep:
    """Coefficients of a step from one sigma to a smaller one.

    The step is x_end = sample_scale x_start + prediction_scale (sum of weight * value over the terms) + noise_scale
    noise, where a constant prediction has weight 1.

    Attributes:
        sigma_start: Noise level at the start.
        sigma_end: Noise level at the end, 0 or more.
        sample_scale: Factor of the sample.
        prediction_scale: Factor of a constant prediction.
        z: Argument of the phi functions, which give the weights of derivatives. If the length in lambda is h, it is h
            with predictions of the noise, -h with predictions of the clean sample, and -2h with the latter in
            stochastic steps.
        noise_scale: Standard deviation of the noise that a stochastic step adds.
    """

    sigma_start: float
    sigma_end: float
    sample_scale: float
    prediction_scale: float
    z: float
    noise_scale: float = 0.0

    @classmethod
    def between(
        cls, sigma_start: float, sigma_end: float, *, predicts_noise: bool, stochastic: bool = False
    ) -> SolverStep:
        """Return the step between two sigmas (DPM-Solver, proposition 3.1; DPM-Solver++, proposition 4.1).

        Args:
            sigma_start: Noise level at the start, above 0.
            sigma_end: Noise level at the end, 0 or more.
            predicts_noise: Whether the step uses predictions of the noise (DPM-Solver), or of the clean sample
                (DPM-Solver++).
            stochastic: Whether the step solves the reverse diffusion SDE, or the probability flow ODE.
        """
        length = math.log(sigma_start / sigma_end) if sigma_end > 0 else math.inf  # in lambda
        scale_start, scale_end, ratio = signal_scale(sigma_start), signal_scale(sigma_end), sigma_end / sigma_start
        if predicts_noise:
            factor = 2 if stochastic else 1
            noise_scale = scale_end * math.sqrt(max(sigma_start**2 - sigma_end**2, 0)) if stochastic else 0.0
            prediction_scale = -factor * scale_end * (sigma_start - sigma_end)
            return cls(sigma_start, sigma_end, scale_end / scale_start, prediction_scale, length, noise_scale)
        power = 2 if stochastic else 1
        prediction_scale = -scale_end * math.expm1(-power * length)
        noise_scale = scale_end * sigma_end * math.sqrt(max(1 - ratio**2, 0)) if stochastic else 0.0
        sample_scale = scale_end / scale_start * ratio**power
        return cls(sigma_start, sigma_end, sample_scale, prediction_scale, -power * length, noise_scale)

    def node(self, sigma: float) -> float:
        """Return the position of a sigma in the step: 0 at the start, 1 at the end, linear in lambda.

        Args:
            sigma: Noise level, above 0.
        """
        return math.log(self.sigma_start / sigma) / math.log(self.sigma_start / self.sigma_end)

    def apply(self, sample: Tensor, terms: Sequence[Term], noise: Tensor | None = None) -> Tensor:
        """Return the sample at the end of the step.

        Args:
            sample: Sample at the start, (B, C, ...). A step of length 0 returns it.
            terms: Weighted predictions.
            noise: Standard normal noise of a stochastic step, (B, C, ...); None adds none.
        """
        if self.sigma_end == self.sigma_start:
            return sample
        result = self.sample_scale * sample
        for term in terms:
            result = result + (self.prediction_scale * term.weight) * term.value
        return result if noise is None else result + self.noise_scale * noise


def phi_ratios(z: float, count: int) -> list[float]:
    """Return phi_k(z) / phi_1(z) for k = 1 to `count`.

    phi_1(z) = (e^z - 1) / z and phi_(k+1)(z) = (phi_k(z) - 1/k!) / z (Hochbruck & Ostermann 2010,
    https://doi.org/10.1017/S0962492910000048).

    Args:
        z: Argument, not 0.
        count: Number of ratios.
    """
    if abs(z) < 1:  # the recurrence loses digits here, the series does not
        values = [sum(z**j / math.factorial(j + k) for j in range(20)) for k in range(1, count + 1)]
    else:
        values = [math.expm1(z) / z]
        for k in range(1, count):
            values.append((values[-1] - 1 / math.factorial(k)) / z)
    return [value / values[0] for value in values]


def quadrature_weights(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """Return the weights of values at `nodes` with which a weighted sum integrates polynomials exactly.

    Args:
        nodes: Positions of the values, distinct.
        moments: Integrals of the powers 0, 1, ..., one per node.
    """
    powers = np.vander(np.asarray(nodes, np.float64), len(moments), increasing=True).T
    return [float(weight) for weight in np.linalg.solve(powers, np.asarray(moments, np.float64))]


def exponential_weights(step: SolverStep, nodes: Sequence[float]) -> list[float]:
    """Return the weights of predictions with which a step is exact for the polynomial in lambda through all of them.

    Args:
        step: The step.
        nodes: Positions of the predictions, see `SolverStep.node`.

    Returns:
        Weights as fractions of `step.prediction_scale`.
    """
    ratios = phi_ratios(step.z, len(nodes))
    return quadrature_weights(nodes, [math.factorial(power) * ratio for power, ratio in enumerate(ratios)])


@dataclasses.dataclass(frozen=True)
class SolverConfig(ThresholdConfig, SigmaScheduleConfig, BetaScheduleConfig):
    """Settings of exponential integrators.

    Attributes:
        solver_order: Largest number of predictions that a step uses, 1 to `max_solver_order`.
        lower_order_final: Whether the last steps of short runs use fewer predictions, which is more stable.
    """

    # Settings of flow matching, which the reference's classes implement as well.
    supported_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "use_flow_sigmas": (False, None),
        "flow_shift": (1.0,),
        "use_dynamic_shifting": (False, None),
        "time_shift_type": ("exponential",),
        "shift_terminal": (None,),
        "solver_p": (None,),
    }
    inert_settings: ClassVar[frozenset[str]] = frozenset(
        {"flow_shift", "use_dynamic_shifting", "time_shift_type", "shift_terminal"}
    )
    max_solver_order: ClassVar[int] = 3

    solver_order: int = 2
    lower_order_final: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        order, maximum = as_int(self.solver_order), self.max_solver_order
        self._require(order is not None and 1 <= order <= maximum, "solver_order", f"an integer from 1 to {maximum}")

    @classmethod
    def adapted(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return settings of another class or of a file in the form of this class.

        Args:
            settings: Settings by name.
        """
        adapted = super().adapted(settings)
        order = as_int(adapted.get("solver_order"))
        if order is not None and order > cls.max_solver_order:  # the reference uses its highest order then
            adapted["solver_order"] = cls.max_solver_order
        return adapted


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Prediction of an earlier network evaluation.

    Attributes:
        sigma: Noise level of the evaluation.
        value: Predicted noise or clean sample, (B, C, ...).
    """

    sigma: float
    value: Tensor


@dataclasses.dataclass(frozen=True)
class StepInput:
    """Inputs of a step, converted to what the solver uses.

    Attributes:
        index: Index of the network evaluation in `timesteps`.
        sigma: Noise level at the start of the step.
        sigma_next: Noise level at its end.
        sample: Sample at the start, at least in single precision, (B, C, ...).
        prediction: Predicted noise or clean sample, whichever the solver uses, (B, C, ...).
        x0: Predicted clean sample, (B, C, ...).
    """

    index: int
    sigma: float
    sigma_next: float
    sample: Tensor
    prediction: Tensor
    x0: Tensor


class ExponentialScheduler(SigmaScheduler):
    """Base class of multistep and singlestep exponential integrators.

    Samples are variance preserving, timesteps are integers, and steps use the predictions of earlier steps.

    Args:
        **settings: Settings, see `SolverConfig`.
    """

    extra_timesteps: ClassVar[int] = 1
    config: SolverConfig

    def _reset(self) -> None:
        super()._reset()
        self._history: list[Prediction] = []  # the last `solver_order` predictions, oldest first

    @property
    def _predicts_noise(self) -> bool:
        """Whether the solver uses predictions of the noise, not of the clean sample."""
        return False

    def _spaced_timesteps(self, steps: int) -> Sequence[float]:
        if steps == self.config.num_train_timesteps:
            return list(range(steps))[::-1]  # all timesteps: no extra one exists
        return [float(step) for step in np.asarray(super()._spaced_timesteps(steps)).round()]

    def _sigma_bounds(self, sigmas: FloatArray) -> tuple[float, float]:
        return super()._sigma_bounds(self._training_sigmas[::-1])

    def _sigmas_to_timesteps(self, sigmas: FloatArray, source: str) -> FloatArray:
        timesteps = super()._sigmas_to_timesteps(sigmas, source)
        return timesteps.round() if self._rounds_to_nearest(source) else np.trunc(timesteps)

    def _rounds_to_nearest(self, source: str) -> bool:
        """Return whether timesteps of sigmas are rounded to the nearest integer, or down."""
        return source not in ("use_exponential_sigmas", "use_beta_sigmas")

    def _solver_step(self, sigma_start: float, sigma_end: float) -> SolverStep:
        return SolverStep.between(sigma_start, sigma_end, predicts_noise=self._predicts_noise)

    def _step_input(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor) -> StepInput:
        """Locate a step, and convert the network's output to the prediction that the solver uses."""
        index = self._index_for_timestep(timestep)
        sigma, sigma_next = self._sigma_list[index : index + 2]
        sample, alpha_bar = to_float32(sample), signal_scale(sigma) ** 2
        output = self._split_output(model_output, sample).prediction
        x0 = self._threshold(self._predicted_x0(output, sample, alpha_bar))
        if not self._predicts_noise:
            prediction = x0
        elif self.config.thresholding:
            prediction = (sample - alpha_bar**0.5 * x0) / (1 - alpha_bar) ** 0.5
        else:
            prediction = self._predicted_epsilon(output, sample, x0, alpha_bar)
        return StepInput(index, sigma, sigma_next, sample, prediction, x0)

    def _store_prediction(self, sigma: float, value: Tensor) -> None:
        """Append a prediction to the history. It replaces one at the same sigma, which rounding of timesteps allows."""
        others = [past for past in self._history if past.sigma != sigma]
        self._history = [*others, Prediction(sigma, value)][-self.config.solver_order :]

    def _order_at(self, index: int) -> int:
        """Return the number of predictions that the step at this index uses."""
        remaining, order = len(self._timestep_list) - index, min(self.config.solver_order, len(self._history))
        if self._sigma_list[index + 1] == 0:
            return 1  # lambda is infinite there
        # In short runs the last steps are long, and extrapolation over them is unstable.
        return min(order, remaining) if self.config.lower_order_final and len(self._timestep_list) < 15 else order
