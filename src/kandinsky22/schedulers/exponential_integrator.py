"""Exponential integrators: the mathematics that DPM-Solver, UniPC and DEIS share.

In lambda = log(sqrt(a_t) / sqrt(1 - a_t)) = -log sigma the probability flow is linear but for the network's prediction,
so it is solved exactly for predictions that are polynomials in lambda (Lu et al. 2022,
https://arxiv.org/abs/2206.00927 for noise, https://arxiv.org/abs/2211.01095 for clean samples; Zhang & Chen 2022,
https://arxiv.org/abs/2204.13902).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from kandinsky22.schedulers.base import Floats, SchedulerOutput
from kandinsky22.schedulers.config import GridConfig, TableConfig, ThresholdConfig, whole
from kandinsky22.schedulers.sigmas import SigmaScheduler, signal, widened


@dataclasses.dataclass(frozen=True)
class Stride:
    """A step from one level to a lower one: x -> carry x + drift (D0 + ratios D1, D2, ...) + fresh noise.

    `drift` weighs a constant prediction; `z` is the exponent of the integral over the step, in which the ratios of the
    higher terms are functions; `noise` is the standard deviation of what a stochastic step adds.
    """

    start: float
    end: float
    carry: float
    drift: float
    z: float
    noise: float = 0.0

    @classmethod
    def between(cls, start: float, end: float, *, of_noise: bool, stochastic: bool = False) -> Stride:
        """The step with predictions of the noise or of the clean sample, along the flow or the stochastic equation."""
        length = math.log(start / end) if end > 0 else math.inf
        before, after, part = signal(start), signal(end), end / start
        if of_noise:
            twice = 2 if stochastic else 1
            spread = after * math.sqrt(max(start**2 - end**2, 0)) if stochastic else 0.0
            return cls(start, end, after / before, -twice * after * (start - end), length, spread)
        power = 2 if stochastic else 1
        drift = -after * math.expm1(-power * length)
        spread = after * end * math.sqrt(max(1 - part**2, 0)) if stochastic else 0.0
        return cls(start, end, after / before * part**power, drift, -power * length, spread)

    def node(self, level: float) -> float:
        """Where a level lies on the step's axis of lambda: 0 at the start, 1 at the end."""
        return math.log(self.start / level) / math.log(self.start / self.end)


def phi_ratios(z: float, count: int) -> list[float]:
    """phi_k(z) / phi_1(z) for k = 1 to `count`, where phi_1(z) = (e^z - 1) / z and phi_(k+1)(z) = (phi_k(z) - 1/k!) / z
    (Hochbruck & Ostermann 2010, https://doi.org/10.1017/S0962492910000048)."""
    if abs(z) < 1:  # the recurrence loses digits here, the series does not
        values = [sum(z**j / math.factorial(j + k) for j in range(20)) for k in range(1, count + 1)]
    else:
        values = [math.expm1(z) / z]
        for k in range(1, count):
            values.append((values[-1] - 1 / math.factorial(k)) / z)
    return [value / values[0] for value in values]


def weights(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """What to multiply values at `nodes` by, so that the sum is right for each power whose integral is in `moments`."""
    powers = np.vander(np.asarray(nodes, np.float64), len(moments), increasing=True).T
    return [float(weight) for weight in np.linalg.solve(powers, np.asarray(moments, np.float64))]


def exact_weights(stride: Stride, nodes: Sequence[float]) -> list[float]:
    """Weights, as parts of the drift, of predictions at `nodes`: exact for polynomials through all of them."""
    ratios = phi_ratios(stride.z, len(nodes))
    return weights(nodes, [math.factorial(power) * ratio for power, ratio in enumerate(ratios)])


@dataclasses.dataclass(frozen=True)
class SolverConfig(ThresholdConfig, GridConfig, TableConfig):
    """For exponential integrators: `solver_order` is the number of predictions a step is made of at most, and
    `lower_order_final` has the last steps made of fewer."""

    # Of flow matching, which the reference's classes do as well.
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "use_flow_sigmas": (False, None),
        "flow_shift": (1.0,),
        "use_dynamic_shifting": (False, None),
        "time_shift_type": ("exponential",),
        "shift_terminal": (None,),
        "solver_p": (None,),
    }
    largest: ClassVar[int] = 3

    solver_order: int = 2
    lower_order_final: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        order = whole(self.solver_order)
        self._require(
            order is not None and 1 <= order <= self.largest, "solver_order", f"an integer from 1 to {self.largest}"
        )


@dataclasses.dataclass(frozen=True)
class Begun:
    """A step so far: its place and levels, the sample it starts from, the prediction to step with and the clean
    sample."""

    place: int
    level: float
    end: float
    sample: Tensor
    prediction: Tensor
    original: Tensor


class ExponentialScheduler(SigmaScheduler):
    """Common ground of the multistep and singlestep exponential integrators: samples of variance 1, whole timesteps,
    predictions of the steps before."""

    spare: ClassVar[int] = 1
    config: SolverConfig

    def _restart(self) -> None:
        super()._restart()
        self._past: list[tuple[float, Tensor]] = []  # levels and predictions of the steps made, oldest first

    @property
    def _of_noise(self) -> bool:
        """Whether the method steps with predictions of the noise, not of the clean sample."""
        return False

    def _spaced(self, steps: int) -> list[Any]:
        if steps == self.config.num_train_timesteps:
            return list(range(steps))[::-1]  # there is none to spare
        return [float(step) for step in np.asarray(super()._spaced(steps)).round()]

    def _bounds(self, levels: Floats) -> tuple[float, float]:
        return super()._bounds(self._table[::-1])

    def _timesteps_of(self, levels: Floats, spread: str) -> Floats:
        found = super()._timesteps_of(levels, spread)
        return found.round() if self._rounds(spread) else np.trunc(found)

    def _rounds(self, spread: str) -> bool:
        """Whether timesteps of levels are rounded to the nearest, or down."""
        return spread not in ("use_exponential_sigmas", "use_beta_sigmas")

    def _stride(self, start: float, end: float) -> Stride:
        return Stride.between(start, end, of_noise=self._of_noise)

    def _convert(self, model_output: Tensor, sample: Tensor, level: float) -> tuple[Tensor, Tensor]:
        """The prediction that the method steps with, and the clean sample."""
        prediction, share = self._split(model_output, sample)[0], signal(level) ** 2
        original = self._limit(self._original(prediction, sample, share))
        if not self._of_noise:
            return original, original
        if self.config.thresholding:
            return (sample - share**0.5 * original) / (1 - share) ** 0.5, original
        return self._noise(prediction, sample, original, share), original

    def _begin(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor) -> Begun:
        place = self._locate(timestep)
        level, end = self._levels[place : place + 2]
        sample = widened(sample)
        return Begun(place, level, end, sample, *self._convert(model_output, sample, level))

    def _remember(self, level: float, prediction: Tensor) -> None:
        """Keep a prediction; a level seen twice, where rounding made two timesteps one, counts once."""
        others = [entry for entry in self._past if entry[0] != level]
        self._past = [*others, (level, prediction)][-self.config.solver_order :]

    def _order_at(self, place: int) -> int:
        """Of how many predictions the step at this place is made."""
        left, order = len(self._order) - place, min(self.config.solver_order, len(self._past))
        if self._levels[place + 1] == 0:
            return 1  # lambda is infinite there
        # With few steps the last ones are long, and extrapolating over them is unstable.
        return min(order, left) if self.config.lower_order_final and len(self._order) < 15 else order

    def _result(self, previous: Tensor, original: Tensor, like: Tensor, return_dict: bool) -> Any:
        assert self._place is not None
        self._place += 1
        previous = previous.to(like.dtype)
        return SchedulerOutput(previous, original) if return_dict else (previous, original)


def combine(stride: Stride, sample: Tensor, terms: Sequence[tuple[float, Tensor]], noise: Tensor | None) -> Tensor:
    """The sample at the end of a step; `terms` are predictions with their weights as parts of the drift."""
    if stride.end == stride.start:
        return sample
    result = stride.carry * sample
    for weight, prediction in terms:
        result = result + (stride.drift * weight) * prediction
    return result if noise is None else result + stride.noise * noise
