"""DPM-Solver and DPM-Solver++: exponential integrators for the probability flow ODE or the reverse diffusion SDE.

Sources: Lu et al. 2022, https://arxiv.org/abs/2206.00927 and https://arxiv.org/abs/2211.01095.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from kandinsky22.errors import invalid
from kandinsky22.noise import Generators, randn_tensor
from kandinsky22.schedulers.base import SchedulerOutput
from kandinsky22.schedulers.config import (
    BETA_ARGUMENTS,
    SIGMA_ARGUMENTS,
    THRESHOLD_ARGUMENTS,
    BetaScheduleConfig,
    TimestepSpacingConfig,
    ZeroTerminalSNRConfig,
)
from kandinsky22.schedulers.ddpm import VARIANCE_TYPES
from kandinsky22.schedulers.exponential_integrator import (
    ExponentialScheduler,
    Prediction,
    SolverConfig,
    SolverStep,
    Term,
    phi_ratios,
)
from kandinsky22.schedulers.noise_schedules import spaced_timesteps


@dataclasses.dataclass(frozen=True)
class DPMSolverConfig(SolverConfig):
    """Settings that the multistep and singlestep forms share.

    Attributes:
        algorithm_type: "dpmsolver" (predictions of the noise), "dpmsolver++" (of the clean sample), or the stochastic
            forms of both, "sde-dpmsolver" and "sde-dpmsolver++".
        solver_type: Weight of the second term of a step: "midpoint" from values, "heun" from the derivative.
        final_sigmas_type: Sigma at which the last step ends: "zero", or "sigma_min", the lowest of training.
        lambda_min_clipped: Timesteps with a smaller lambda, that is the noisiest ones, are not used; -inf uses all.
        variance_type: No effect: a learned variance is dropped.
    """

    choices: ClassVar[Mapping[str, tuple[str | None, ...]]] = {
        **BetaScheduleConfig.choices,
        "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"),
        "solver_type": ("midpoint", "heun"),
        "variance_type": (None, *VARIANCE_TYPES),
    }
    synonyms: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "algorithm_type": {"deis": "dpmsolver++"},
        "solver_type": {"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"},
    }

    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    final_sigmas_type: str = "zero"
    lambda_min_clipped: float = -math.inf
    variance_type: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        # The fresh noise of this algorithm does not vanish at sigma 0.
        possible = self.algorithm_type != "sde-dpmsolver" or self.final_sigmas_type == "sigma_min"
        self._require(possible, "final_sigmas_type", "sigma_min, because algorithm_type='sde-dpmsolver'")


class DPMSolverScheduler(ExponentialScheduler):
    """Base class of the multistep and singlestep forms.

    Args:
        **settings: Settings, see `DPMSolverConfig`.
    """

    config: DPMSolverConfig

    @property
    def _predicts_noise(self) -> bool:
        return not self.config.algorithm_type.endswith("++")

    @property
    def _is_stochastic(self) -> bool:
        return self.config.algorithm_type.startswith("sde")

    def _solver_step(self, sigma_start: float, sigma_end: float) -> SolverStep:
        return SolverStep.between(
            sigma_start, sigma_end, predicts_noise=self._predicts_noise, stochastic=self._is_stochastic
        )

    def _spaced_timesteps(self, steps: int) -> Sequence[float]:
        clipped = int((self._training_lambdas() < self.config.lambda_min_clipped).sum())
        if not clipped:
            return super()._spaced_timesteps(steps)
        end = self.config.num_train_timesteps - clipped
        if end < 1:
            raise invalid(
                "lambda_min_clipped", self.config.lambda_min_clipped, "a value that leaves a timestep", "lower it"
            )
        return [float(step) for step in spaced_timesteps(self.config, steps, end, self.extra_timesteps).round()]

    def _training_lambdas(self) -> Tensor:
        return self.alphas_cumprod.sqrt().log() - (1 - self.alphas_cumprod).sqrt().log()

    def _step_noise(
        self, like: Tensor, dtype: torch.dtype, generator: Generators, noise: Tensor | None
    ) -> Tensor | None:
        """Return the noise of a stochastic step, `noise` or else fresh noise; None if the algorithm adds none."""
        if not self._is_stochastic:
            return None
        if noise is not None:
            return noise.to(like.device, dtype)
        return randn_tensor(like.shape, generator, like.device, dtype)

    def _first_order_weight(self, step: SolverStep) -> float:
        """Return the weight of the first derivative in a step of order 2."""
        return 0.5 if self.config.solver_type == "midpoint" else phi_ratios(step.z, 2)[1]


class Derivatives(NamedTuple):
    """Derivatives of the parabola through three predictions, at the first of them, where the node is 0.

    Attributes:
        first: First derivative, (B, C, ...).
        half_second: Second divided difference, half of the second derivative, (B, C, ...).
    """

    first: Tensor
    half_second: Tensor


def parabola_derivatives(nodes: Sequence[float], values: Sequence[Tensor]) -> Derivatives:
    """Return the derivatives of the parabola through three values, at node 0.

    Args:
        nodes: Nodes of the second and third value; the node of the first is 0.
        values: Three values, (B, C, ...).
    """
    slopes = [(value - values[0]) / node for node, value in zip(nodes, values[1:], strict=True)]
    half_second = (slopes[1] - slopes[0]) / (nodes[1] - nodes[0])
    return Derivatives(slopes[0] - nodes[0] * half_second, half_second)


@dataclasses.dataclass(frozen=True)
class DPMSolverMultistepConfig(DPMSolverConfig, TimestepSpacingConfig, ZeroTerminalSNRConfig):
    """Settings of `DPMSolverMultistepScheduler`.

    Attributes:
        euler_at_final: Whether the last step is of order 1.
        use_lu_lambdas: Whether sigmas are evenly spaced in lambda.
    """

    owner: ClassVar[str] = "DPMSolverMultistepScheduler"
    positional: ClassVar[tuple[str, ...]] = (
        *BETA_ARGUMENTS,
        "solver_order",
        *THRESHOLD_ARGUMENTS,
        "algorithm_type",
        "solver_type",
        "lower_order_final",
        "euler_at_final",
        *SIGMA_ARGUMENTS,
        "use_lu_lambdas",
        "use_flow_sigmas",
        "flow_shift",
        "final_sigmas_type",
        "lambda_min_clipped",
        "variance_type",
        "timestep_spacing",
        "steps_offset",
        "rescale_betas_zero_snr",
        "use_dynamic_shifting",
        "time_shift_type",
    )
    sigma_schedules: ClassVar[tuple[str, ...]] = (*DPMSolverConfig.sigma_schedules, "use_lu_lambdas")

    timestep_spacing: str = "linspace"
    euler_at_final: bool = False
    use_lu_lambdas: bool = False


class DPMSolverMultistepScheduler(DPMSolverScheduler):
    """DPM-Solver(++) in multistep form: steps use the predictions of earlier steps, one network evaluation per step.

    Source: Lu et al. 2022, algorithm 2, https://arxiv.org/abs/2211.01095.

    The third-order form weights the second derivative as published, with half of its coefficient in Taylor's theorem.
    It converges with order 2, with a smaller error than the second-order form. A learned variance is dropped.

    Args:
        **settings: Settings, see `DPMSolverMultistepConfig`.
    """

    config_class = DPMSolverMultistepConfig
    config: DPMSolverMultistepConfig

    def _rounds_to_nearest(self, source: str) -> bool:
        cosine = self.config.beta_schedule == "squaredcos_cap_v2"
        return super()._rounds_to_nearest(source) and (source == "sigmas" or not cosine)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Return the sample at the next sigma.

        Args:
            model_output: Network output for `sample`, (B, C, ...), or (B, 2C, ...) with a learned variance.
            timestep: Current timestep, an element of `timesteps`.
            sample: Current sample, (B, C, ...).
            generator: Generator of the noise of the stochastic algorithms, or one per batch item; None uses torch's
                global generator.
            variance_noise: The noise itself, (B, C, ...); None draws it.
            return_dict: Whether to return a `SchedulerOutput`, or the tuple of its fields.

        Returns:
            The next sample and the predicted clean sample, both (B, C, ...).

        Raises:
            InputError: If timesteps are not set, or `timestep` or the shape of `model_output` is invalid.
        """
        current = self._step_input(model_output, timestep, sample)
        self._store_prediction(current.sigma, current.prediction)
        noise = self._step_noise(current.prediction, torch.float32, generator, variance_noise)
        step = self._solver_step(current.sigma, current.sigma_next)
        terms = self._terms(step, self._order_at(current.index)) if current.sigma_next != current.sigma else []
        prev_sample = step.apply(current.sample, terms, noise)
        self._step_index = current.index + 1
        return self._output(prev_sample.to(model_output.dtype), current.x0, return_dict)

    def _order_at(self, index: int) -> int:
        last = index == len(self._timestep_list) - 1
        return 1 if last and self.config.euler_at_final else super()._order_at(index)

    def _terms(self, step: SolverStep, order: int) -> list[Term]:
        """Return the derivatives D0, D1, D2 of the predictions with their weights."""
        history = self._history[::-1][:order]
        values = [past.value for past in history]
        nodes = [step.node(past.sigma) for past in history[1:]]
        d0 = values[0]
        if order == 1:
            return [Term(1.0, d0)]
        if order == 2:
            d1 = (values[1] - values[0]) / nodes[0]
            return [Term(1.0, d0), Term(self._first_order_weight(step), d1)]
        d1, d2 = parabola_derivatives(nodes, values)
        return [Term(ratio, value) for ratio, value in zip(phi_ratios(step.z, 3), (d0, d1, d2), strict=True)]


@dataclasses.dataclass(frozen=True)
class DPMSolverSinglestepConfig(DPMSolverConfig):
    """Settings of `DPMSolverSinglestepScheduler`.

    Attributes:
        lower_order_final: Whether the last steps may be of lower order. False acts if the number of steps is divisible
            by `solver_order` and the last step does not end at sigma 0; other runs need lower orders.
    """

    owner: ClassVar[str] = "DPMSolverSinglestepScheduler"
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
        "final_sigmas_type",
        "lambda_min_clipped",
        "variance_type",
        "use_dynamic_shifting",
        "time_shift_type",
    )
    choices: ClassVar[Mapping[str, tuple[str | None, ...]]] = {
        **DPMSolverConfig.choices,
        "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver++"),
    }

    lower_order_final: bool = False


class DPMSolverSinglestepScheduler(DPMSolverScheduler):
    """DPM-Solver(++) in singlestep form: a step uses only the predictions within it.

    Sources: Lu et al. 2022, algorithms 1 and 2 of https://arxiv.org/abs/2206.00927, and algorithm 1 of
    https://arxiv.org/abs/2211.01095.

    A step of order n spans n sigmas, with one network evaluation at each. Every evaluation leads from the start of the
    step to the next sigma, with the predictions of that step so far. A learned variance is dropped.

    Args:
        **settings: Settings, see `DPMSolverSinglestepConfig`.
    """

    config_class = DPMSolverSinglestepConfig
    config: DPMSolverSinglestepConfig

    def _reset(self) -> None:
        super()._reset()
        self._step_start: Tensor | None = None  # sample at the start of the current step

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Return the sample at the next sigma.

        Args:
            model_output: Network output for `sample`, (B, C, ...), or (B, 2C, ...) with a learned variance.
            timestep: Timestep of the network evaluation, an element of `timesteps`.
            sample: Current sample, (B, C, ...).
            generator: Generator of the noise of the stochastic algorithm, or one per batch item; None uses torch's
                global generator.
            return_dict: Whether to return a `SchedulerOutput`, or the tuple of its fields.

        Returns:
            The next sample and the predicted clean sample, both (B, C, ...).

        Raises:
            InputError: If timesteps are not set, or `timestep` or the shape of `model_output` is invalid.
        """
        current = self._step_input(model_output, timestep, sample)
        self._store_prediction(current.sigma, current.prediction)
        noise = self._step_noise(current.prediction, model_output.dtype, generator, None)
        if self._step_start is None or min(self._order_at(current.index), len(self._history)) == 1:
            self._step_start = current.sample
            self._history = [Prediction(current.sigma, current.prediction)]
        step = self._solver_step(self._history[0].sigma, current.sigma_next)
        terms = self._terms(step) if step.sigma_start != step.sigma_end else []
        prev_sample = step.apply(self._step_start, terms, noise)
        self._step_index = current.index + 1
        return self._output(prev_sample.to(model_output.dtype), current.x0, return_dict)

    def _order_at(self, index: int) -> int:
        order, evaluations = self.config.solver_order, len(self._timestep_list)
        divisible = evaluations % order == 0
        ends_at_zero = self._sigma_list[-1] == 0
        lower_order_final = self.config.lower_order_final or not divisible or ends_at_zero
        if index == evaluations - 1 and ((lower_order_final and divisible) or ends_at_zero):
            return 1
        return index % order + 1

    def _terms(self, step: SolverStep) -> list[Term]:
        """Return the derivatives D0, D1, D2 of the predictions with their weights."""
        values = [past.value for past in self._history]
        nodes = [step.node(past.sigma) for past in self._history[1:]]
        d0 = values[0]
        if not nodes:
            return [Term(1.0, d0)]
        slope = (values[-1] - values[0]) / nodes[-1]  # from the first to the last prediction
        if len(nodes) == 1:
            return [Term(1.0, d0), Term(self._first_order_weight(step), slope)]
        ratios = phi_ratios(step.z, 3)
        if self.config.solver_type == "midpoint":
            return [Term(1.0, d0), Term(ratios[1], slope)]
        d1, half_d2 = parabola_derivatives(nodes, values)
        return [Term(ratio, value) for ratio, value in zip(ratios, (d0, d1, 2 * half_d2), strict=True)]
