"""DPM-Solver and DPM-Solver++: exponential integrators of order 1 to 3, of the probability flow or the stochastic
equation (Lu et al. 2022, https://arxiv.org/abs/2206.00927 and https://arxiv.org/abs/2211.01095)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from kandinsky22.errors import InputError
from kandinsky22.noise import Generators, randn_tensor
from kandinsky22.schedulers.base import SchedulerOutput, spaced_timesteps
from kandinsky22.schedulers.config import SpacingConfig, TableConfig, TerminalConfig
from kandinsky22.schedulers.ddpm import VARIANCES
from kandinsky22.schedulers.exponential_integrator import (
    ExponentialScheduler,
    SolverConfig,
    Stride,
    combine,
    phi_ratios,
)

Term = tuple[float, Tensor]


@dataclasses.dataclass(frozen=True)
class DPMConfig(SolverConfig):
    """`algorithm_type`: predictions of noise, or of the clean sample (++), and the stochastic forms of both.

    `solver_type` says how the second term of a step is weighed: `midpoint` from values, `heun` from the derivative.
    `final_sigmas_type` says where the last step ends, at no noise or at the lowest level of training. Timesteps of
    lambda below `lambda_min_clipped` are left out. `variance_type` has no effect: a learned variance is dropped.
    """

    choices: ClassVar[Mapping[str, tuple[str | None, ...]]] = {
        **TableConfig.choices,
        "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"),
        "solver_type": ("midpoint", "heun"),
        "variance_type": (None, *VARIANCES),
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
        # The stochastic equation's noise does not vanish there.
        possible = self.algorithm_type != "sde-dpmsolver" or self.final_sigmas_type == "sigma_min"
        self._require(possible, "final_sigmas_type", "sigma_min, where algorithm_type is 'sde-dpmsolver'")


class DPMScheduler(ExponentialScheduler):
    """What the multistep and the singlestep form share."""

    config: DPMConfig

    @property
    def _of_noise(self) -> bool:
        return not self.config.algorithm_type.endswith("++")

    def _stride(self, start: float, end: float) -> Stride:
        stochastic = self.config.algorithm_type.startswith("sde")
        return Stride.between(start, end, of_noise=self._of_noise, stochastic=stochastic)

    def _spaced(self, steps: int) -> list[Any]:
        clipped = int((self._lambdas() < self.config.lambda_min_clipped).sum())
        if not clipped:
            return super()._spaced(steps)
        end = self.config.num_train_timesteps - clipped
        if end < 1:
            raise InputError(
                f"lambda_min_clipped={self.config.lambda_min_clipped} leaves no timestep; accepted: a lower one"
            )
        return [float(step) for step in spaced_timesteps(self.config, steps, end, self.spare).round()]

    def _lambdas(self) -> Tensor:
        return self.alphas_cumprod.sqrt().log() - (1 - self.alphas_cumprod).sqrt().log()

    def _drawn(self, like: Tensor, dtype: torch.dtype, generator: Generators, noise: Tensor | None) -> Tensor | None:
        """The noise of a step, if it takes any."""
        if not self.config.algorithm_type.startswith("sde"):
            return None
        return (
            randn_tensor(like.shape, generator, like.device, dtype) if noise is None else noise.to(like.device, dtype)
        )

    def _second(self, stride: Stride) -> float:
        """The weight of the first difference."""
        return 0.5 if self.config.solver_type == "midpoint" else phi_ratios(stride.z, 2)[1]


def derivatives(nodes: Sequence[float], values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """First derivative at node 0 of the parabola through three values, the first of them there, and its second divided
    difference; `nodes` are those of the other two."""
    slopes = [(value - values[0]) / node for node, value in zip(nodes, values[1:], strict=True)]
    second = (slopes[1] - slopes[0]) / (nodes[1] - nodes[0])
    return slopes[0] - nodes[0] * second, second


@dataclasses.dataclass(frozen=True)
class DPMMultistepConfig(DPMConfig, SpacingConfig, TerminalConfig):
    """Settings of `DPMSolverMultistepScheduler`. `euler_at_final` has the last step made of one prediction."""

    owner: ClassVar[str] = "DPMSolverMultistepScheduler"
    grids: ClassVar[tuple[str, ...]] = (*DPMConfig.grids, "use_lu_lambdas")

    timestep_spacing: str = "linspace"
    euler_at_final: bool = False
    use_lu_lambdas: bool = False


class DPMSolverMultistepScheduler(DPMScheduler):
    """Steps from the predictions of the steps before; settings are the fields of `DPMMultistepConfig`.

    The third-order form weighs the second difference as published, with half of what Taylor's theorem asks for, so it
    converges with order 2 and a smaller error.
    """

    config_class = DPMMultistepConfig
    config: DPMMultistepConfig

    def _rounds(self, spread: str) -> bool:
        return super()._rounds(spread) and (spread == "sigmas" or self.config.beta_schedule != "squaredcos_cap_v2")

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, generator: Generators = None,
        variance_noise: Tensor | None = None, return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:  # fmt: skip
        """The sample at the next level, and the predicted clean sample; both shaped as `sample` (B, C, ...).

        The stochastic algorithms add `variance_noise`, or noise drawn from `generator` (one, or one a sample). Raises
        InputError for timesteps that are not visited, and shapes that do not fit.
        """
        now = self._begin(model_output, timestep, sample)
        self._remember(now.level, now.prediction)
        noise = self._drawn(now.prediction, torch.float32, generator, variance_noise)
        stride = self._stride(now.level, now.end)
        terms = self._terms(stride, self._order_at(now.place)) if now.end != now.level else []
        return self._result(combine(stride, now.sample, terms, noise), now.original, model_output, return_dict)

    def _order_at(self, place: int) -> int:
        last = place == len(self._order) - 1
        return 1 if last and self.config.euler_at_final else super()._order_at(place)

    def _terms(self, stride: Stride, order: int) -> list[Term]:
        values = [value for _, value in self._past[::-1][:order]]
        nodes = [stride.node(level) for level, _ in self._past[::-1][1:order]]
        if order == 1:
            return [(1.0, values[0])]
        if order == 2:
            return [(1.0, values[0]), (self._second(stride), (values[1] - values[0]) / nodes[0])]
        slope, second = derivatives(nodes, values)
        return list(zip(phi_ratios(stride.z, 3), (values[0], slope, second), strict=True))


@dataclasses.dataclass(frozen=True)
class DPMSinglestepConfig(DPMConfig):
    """Settings of `DPMSolverSinglestepScheduler`. Without `lower_order_final` all steps are of the full order, which
    is possible for numbers of steps divisible by it that end above no noise; for others it has no effect."""

    owner: ClassVar[str] = "DPMSolverSinglestepScheduler"
    choices: ClassVar[Mapping[str, tuple[str | None, ...]]] = {
        **DPMConfig.choices,
        "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver++"),
    }

    lower_order_final: bool = False


class DPMSolverSinglestepScheduler(DPMScheduler):
    """Steps over as many levels as the order, each made of the predictions on the way; settings are the fields of
    `DPMSinglestepConfig`."""

    config_class = DPMSinglestepConfig
    config: DPMSinglestepConfig

    def _restart(self) -> None:
        super()._restart()
        self._base: Tensor | None = None  # the sample where the step at hand began

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:  # fmt: skip
        """The sample at the next level, and the predicted clean sample; both shaped as `sample` (B, C, ...).

        The stochastic algorithm draws noise from `generator` (one, or one a sample). Raises InputError for timesteps
        that are not visited, and shapes that do not fit.
        """
        now = self._begin(model_output, timestep, sample)
        self._remember(now.level, now.prediction)
        noise = self._drawn(now.prediction, model_output.dtype, generator, None)
        if self._base is None or min(self._order_at(now.place), len(self._past)) == 1:
            self._base, self._past = now.sample, [(now.level, now.prediction)]
        stride = self._stride(self._past[0][0], now.end)
        terms = self._terms(stride) if stride.start != stride.end else []
        return self._result(combine(stride, self._base, terms, noise), now.original, model_output, return_dict)

    def _order_at(self, place: int) -> int:
        order, steps = self.config.solver_order, len(self._order)
        whole_steps = steps % order == 0
        lower = self.config.lower_order_final or not whole_steps or self._levels[-1] == 0
        if place == steps - 1 and ((lower and whole_steps) or self._levels[-1] == 0):
            return 1
        return place % order + 1

    def _terms(self, stride: Stride) -> list[Term]:
        values = [value for _, value in self._past]
        nodes = [stride.node(level) for level, _ in self._past[1:]]
        if not nodes:
            return [(1.0, values[0])]
        farthest = (values[-1] - values[0]) / nodes[-1]
        if len(nodes) == 1:
            return [(1.0, values[0]), (self._second(stride), farthest)]
        ratios = phi_ratios(stride.z, 3)
        if self.config.solver_type == "midpoint":
            return [(1.0, values[0]), (ratios[1], farthest)]
        slope, second = derivatives(nodes, values)
        return list(zip(ratios, (values[0], slope, 2 * second), strict=True))
