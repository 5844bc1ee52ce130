"""UniPC: an exponential integrator whose every step is corrected by the prediction made at its end (Zhao et al. 2023,
https://arxiv.org/abs/2302.04867)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from kandinsky22.schedulers.base import Floats, SchedulerOutput
from kandinsky22.schedulers.config import SpacingConfig, TableConfig, TerminalConfig
from kandinsky22.schedulers.exponential_integrator import (
    ExponentialScheduler,
    SolverConfig,
    Stride,
    combine,
    exact_weights,
)


@dataclasses.dataclass(frozen=True)
class UniPCConfig(SolverConfig, SpacingConfig, TerminalConfig):
    """Settings of `UniPCMultistepScheduler`.

    `predict_x0` steps with predictions of the clean sample, otherwise of the noise. `solver_type` is the function B of
    the paper: `bh1` is the step's length in lambda, `bh2` e to its power less 1. `disable_corrector` lists the steps,
    counted from 0, that are not corrected. `sigma_min` and `sigma_max` bound levels that are spread.
    """

    owner: ClassVar[str] = "UniPCMultistepScheduler"
    largest: ClassVar[int] = 9
    choices: ClassVar[Mapping[str, tuple[str | None, ...]]] = {**TableConfig.choices, "solver_type": ("bh1", "bh2")}
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


class UniPCMultistepScheduler(ExponentialScheduler):
    """Predictor and corrector of equal order at one network call a step; settings are the fields of `UniPCConfig`. A
    variance that the network learned is dropped."""

    config_class = UniPCConfig
    config: UniPCConfig

    def _restart(self) -> None:
        super()._restart()
        self._last: tuple[Stride, int, Tensor] | None = None  # the step before, its order, and where it began

    @property
    def _of_noise(self) -> bool:
        return not self.config.predict_x0

    def _final(self, levels: Floats) -> float:
        final = super()._final(levels)
        return float(levels[-1]) if final > 0 and self._spread() else final

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """The sample at the next level, and the predicted clean sample; both shaped as `sample` (B, C, ...).

        Raises InputError for timesteps that are not visited, and shapes that do not fit.
        """
        now = self._begin(model_output, timestep, sample)
        start = now.sample
        if self._last is not None and now.place - 1 not in self.config.disable_corrector:
            start = self._corrected(*self._last, now.prediction)
        self._remember(now.level, now.prediction)
        stride, order = self._stride(now.level, now.end), self._order_at(now.place)
        moves = now.end != now.level
        self._last = (stride, order, start) if moves else None
        terms = self._predictor(stride, order) if moves else []
        return self._result(combine(stride, start, terms, None), now.original, model_output, return_dict)

    def _order_at(self, place: int) -> int:
        left = len(self._order) - place  # here that limits the order of long runs as well
        order = super()._order_at(place)
        return min(order, left) if self.config.lower_order_final else order

    def _predictor(self, stride: Stride, order: int) -> list[tuple[float, Tensor]]:
        past = self._past[::-1][:order]
        if order == 1:
            return [(1.0, past[0][1])]
        nodes = [stride.node(level) for level, _ in past]
        if order == 2:
            part = self._half(stride) / nodes[1]
            weights = [1 - part, part]
        else:
            weights = exact_weights(stride, nodes)
        return [(weight, value) for weight, (_, value) in zip(weights, past, strict=True)]

    def _corrected(self, stride: Stride, order: int, start: Tensor, prediction: Tensor) -> Tensor:
        """The end of the step before, now that there is a prediction for it."""
        past = self._past[::-1][:order]
        if order == 1:
            weights = [1 - self._half(stride), self._half(stride)]
        else:
            weights = exact_weights(stride, [*(stride.node(level) for level, _ in past), 1.0])
        values = [*(value for _, value in past), prediction]
        return combine(stride, start, list(zip(weights, values, strict=True)), None)

    def _half(self, stride: Stride) -> float:
        """Half of B(h), as a part of the drift: the weight of a single difference."""
        return 0.5 if self.config.solver_type == "bh2" else 0.5 * stride.z / math.expm1(stride.z)
